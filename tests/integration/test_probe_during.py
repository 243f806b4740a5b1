"""probes.during: curves of probes while an encoder trains, which training does not notice, and a
guard against forgetting.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support.audio import write_shards
from tests.support.training import assert_same_weights, settings_for, weights_of
from whisper_aut.config import DuringSettings
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.probes.callback import ProbeDuringTraining
from whisper_aut.probes.tasks import task_from_mapping
from whisper_aut.report.plots import plot_learning, read_metrics
from whisper_aut.training.train import train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    write_shards(root / "train", 16, "speech")
    write_shards(root / "test", 10, "sound")
    values = {
        "name": "two",
        "title": "Two",
        "domain": "speech",
        "train": [str(root / "train")],
        "test": [str(root / "test")],
    }
    return task_from_mapping(values, "test")


def test_curves_are_logged_and_training_does_not_notice(
    task, tiny_whisper, tiny_shards, tmp_path: Path
):
    watching = ProbeDuringTraining([task], None, DuringSettings(every_steps=2))
    plain = train(settings_for(tiny_whisper, tiny_shards, tmp_path / "plain"), QUIET).run
    watched = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path / "seen"), QUIET, callbacks=[watching]
    ).run
    assert_same_weights(weights_of(plain), weights_of(watched), atol=0)
    curve = read_metrics(watched.metrics)["probe/two"]
    assert [step for step, _ in curve] == [0, 2, 4, 6] == sorted(watching.scores)
    assert plot_learning(watched.metrics, tmp_path / "learning.png").exists()
    assert plot_learning(plain.metrics, tmp_path / "none.png") is None
    resumed = ProbeDuringTraining([task], None, DuringSettings(every_steps=2))
    resumed.load_state_dict(json.loads(json.dumps(watching.state_dict())))
    assert resumed.scores == watching.scores


def test_their_time_is_not_that_of_training(
    task, tiny_whisper, tiny_shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a clock that ticks when it is read, and jumps an hour for each measurement."""
    clock, score = [0.0], ProbeDuringTraining._score

    def ticked() -> float:
        clock[0] += 0.001
        return clock[0]

    def slowly(*arguments: Any) -> dict[str, float]:
        clock[0] += 3600
        return score(*arguments)

    monkeypatch.setattr(ProbeDuringTraining, "_score", slowly)
    monkeypatch.setattr(
        "whisper_aut.training.callbacks.metrics.time",
        SimpleNamespace(perf_counter=ticked, monotonic=ticked),
    )
    watching = ProbeDuringTraining([task], None, DuringSettings(every_steps=2))
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path), QUIET, callbacks=[watching]).run
    assert clock[0] >= 4 * 3600
    metrics = json.loads(run.done.read_text())["metrics"]
    assert 0 < metrics["throughput/total_seconds"] < 60
    assert metrics["throughput/data_wait_fraction"] < 0.9


def test_a_fall_stops_the_run_with_its_last_step_saved(
    task, tiny_whisper, tiny_shards, tmp_path: Path, caplog
):
    settings = DuringSettings(every_steps=4, on_drop="stop")
    settings.max_drop = -1.5  # any score is a fall
    watching = ProbeDuringTraining([task], None, settings)
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path), QUIET, callbacks=[watching]).run
    assert json.loads(run.done.read_text())["steps"] == 4
    assert (run.checkpoints / "step-0000004.ckpt").exists()
    assert "has fallen by" in caplog.text
    warned = ProbeDuringTraining([task], None, DuringSettings(guarded_domain="music"))
    warned.scores = {0: {"two": 0.9}, 4: {"two": 0.1}}
    assert warned.score_drop() is None, "the task is of another domain"
    watching.scores = {0: {"two": 0.9}, 4: {"two": 0.1}}
    assert watching.score_drop() == pytest.approx(0.8)
    watching.load_state_dict({"scores": {"0": {"another": 0.9}, "4": {"another": 0.1}}})
    assert watching.score_drop() is None  # resumed with another task


def test_an_encoder_in_half_precision_is_probed_in_whole(task, tiny_whisper):
    class Module(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.encoder = load_encoder(str(tiny_whisper)).encoder.train()

    module = Module()
    watching = ProbeDuringTraining([task], None, DuringSettings(every_steps=1))
    whole = watching._score(module, module.encoder.state_dict())
    assert module.encoder.training
    module.encoder.bfloat16()
    assert watching._score(module, module.encoder.state_dict())["two"] == pytest.approx(
        whole["two"], abs=0.21
    )
    assert next(module.encoder.parameters()).dtype == torch.bfloat16


def test_shared_weights_cannot_be_probed(task):
    class Strategy:
        zero_stage_3 = True

    class Trainer:
        strategy = Strategy()

    with pytest.raises(UserError, match="ZeRO stage 3"):
        ProbeDuringTraining([task], None, DuringSettings(every_steps=1)).setup(
            Trainer(), None, "fit"
        )
