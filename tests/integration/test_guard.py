"""Guard rails: bad steps left out and named, spikes answered, a limit; nothing else of the run
changes.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.training import (
    QUIET,
    add_callbacks,
    assert_same_weights,
    settings_for,
    weights_of,
)
from whisper_aut.config import TrainerSettings
from whisper_aut.data.dataset import Ledger
from whisper_aut.data.sampler import Cursor
from whisper_aut.errors import UserError
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.callbacks import stopping
from whisper_aut.training.callbacks.stopping import SPIKE_HISTORY, Guard, SpikeDetector
from whisper_aut.training.checkpoint import read_manifest
from whisper_aut.training.train import train


class _Poison(lightning.Callback):
    """Sets the audio of the first clip of some steps to NaN, after all checks of the data."""

    def __init__(self, *steps: int):
        self.steps, self.keys = steps, []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            batch.mel[0] = torch.nan
            self.keys.append(batch.keys[0])


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        *(pytest.param(f"deepspeed_stage_{stage}", marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_a_bad_clip_costs_one_step_and_is_named(
    strategy: str,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    poison = _Poison(2, 4)
    add_callbacks(monkeypatch, poison)
    # The host learns of the bad steps when metrics are due, here after the last step.
    options = (f"strategy={strategy}", "trainer.log_every_steps=50", "trainer.valid_every_steps=6")
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *options), QUIET).run
    lines = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == poison.keys
    assert {line["reason"] for line in lines} == {"non-finite loss"}
    assert lines[0]["detail"] == "step 3 was skipped"
    for name, weight in weights_of(run).items():
        if isinstance(weight, torch.Tensor):
            assert weight.isfinite().all(), name
    metrics = json.loads(run.done.read_text())["metrics"]
    assert metrics["train/skipped_steps"] == 2
    assert json.loads(run.done.read_text())["skipped"] == {}, (
        "the clips were trained on, not skipped"
    )


def test_a_skipped_step_changes_nothing(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All steps but the first are bad: the weights are those after the first step."""
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        "trainer.checkpoint_every_steps=1",
        "trainer.keep_checkpoints=9",
    )
    add_callbacks(monkeypatch, _Poison(1, 2, 3, 4, 5))
    run = train(settings, QUIET).run
    assert_same_weights(weights_of(run, "step-0000001.ckpt"), weights_of(run), atol=0)


def test_too_many_bad_steps_stop_the_run(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    add_callbacks(monkeypatch, _Poison(1, 3, 4, 5))
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        "trainer.max_bad_steps=3",
        "trainer.checkpoint_every_steps=3",
    )
    with pytest.raises(
        UserError, match=r"3 steps in a row, up to step 6.*ledger.*trainer\.max_bad_steps"
    ):
        train(settings, QUIET)
    (last,) = tmp_path.glob("smoke/2*/checkpoints/last.ckpt")
    assert read_manifest(last).step == 4  # of the validation: nothing was written after the fault


@pytest.mark.parametrize("another_rank_names_one", [False, True])
def test_a_gradient_without_a_culprit_names_the_clips_of_the_step(
    tmp_path: Path, another_rank_names_one: bool, monkeypatch: pytest.MonkeyPatch
):
    class MicroBatch:
        clips = (("sound", "a"), ("speech", "b"))

        def non_finite(self) -> list[Any]:
            return []

    monkeypatch.setattr(
        stopping, "max_over_ranks", lambda _, value: max(int(value), int(another_rank_names_one))
    )
    step = stopping.UnreadStep(7, math.nan, None, None, Cursor(), [MicroBatch()])
    warnings: list[str] = []
    ledger = Ledger(tmp_path / "ledger.jsonl")
    guard = Guard(ledger, TrainerSettings(max_bad_steps=2), warnings.append)
    guard._count_bad_step(SimpleNamespace(world_size=2), step)
    written = (
        (tmp_path / "ledger.jsonl").read_text() if (tmp_path / "ledger.jsonl").exists() else ""
    )
    lines = [json.loads(line) for line in written.splitlines()]
    innocent = (
        []
        if another_rank_names_one
        else [("a", "non-finite gradient"), ("b", "non-finite gradient")]
    )
    assert [(line["key"], line["reason"]) for line in lines] == innocent
    assert "Step 7 was skipped on all ranks" in warnings[0]
    assert guard.state_dict()["streak"] == 1


def test_lightning_clips_the_gradients_that_the_guard_has_measured(tmp_path: Path):
    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1, bias=False)
            self.micro_batches, self.clipped = [], torch.zeros(())

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch).sum()
            self.log("train/loss", loss)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.clipped = self.layer.weight.grad.norm()  # pyright: ignore

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    model, guard = Model(), Guard(Ledger(None), TrainerSettings(max_bad_steps=1), print)
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options["log_every_n_steps"] = 1
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, gradient_clip_val=0.5, callbacks=[guard], **options
    )
    trainer.fit(model, DataLoader(torch.full((1, 4), 2.5)))  # pyright: ignore[reportArgumentType]
    assert guard.last_metrics["train/grad_norm"] == pytest.approx(5.0)
    assert float(model.clipped) == pytest.approx(0.5)


def test_spikes_stand_out_from_noise_and_plateaus():
    detector = SpikeDetector(factor=6.0)
    generator = torch.Generator().manual_seed(0)
    noisy = [
        5.0 - 0.01 * step + 0.05 * float(torch.randn((), generator=generator)) for step in range(60)
    ]
    assert not any(detector.median_before_spike(loss) for loss in noisy)
    assert detector.median_before_spike(9.0) == pytest.approx(4.6, abs=0.2)
    assert detector.median_before_spike(9.0), "a spike is not taken into the history"
    still = SpikeDetector(factor=6.0)
    assert not any(still.median_before_spike(1.0) for _ in range(SPIKE_HISTORY + 1))
    assert still.median_before_spike(1.05) is None
    assert still.median_before_spike(1.5) == 1.0
    early = SpikeDetector(factor=6.0)
    assert early.median_before_spike(1.0) is None
    assert early.median_before_spike(100.0) is None


class _Derail(lightning.Callback):
    """Spoils the weights once before a step, as a spike does, and writes down what each step has
    read.
    """

    def __init__(self, step: int):
        self.step, self.read, self.done = step, [], False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.read.append((trainer.global_step, batch.keys))
        if trainer.global_step == self.step and not self.done:
            self.done = True
            with torch.no_grad():
                module.decoder.whisper.embed_tokens.weight.mul_(30.0)


def test_a_spike_goes_back_and_leaves_out_the_data_since(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The spike of step 26 is read with the metrics of step 28."""
    steps = (
        "trainer.max_steps=30",
        "trainer.checkpoint_every_steps=10",
        "trainer.valid_every_steps=30",
        "trainer.log_every_steps=4",
    )
    derail, plain = _Derail(25), _Derail(-1)
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        *steps,
        "trainer.spike_factor=20",
        "trainer.on_spike=rewind",
    )
    with monkeypatch.context() as patch:
        add_callbacks(patch, derail)
        run = train(settings, QUIET).run
    assert [step for step, _ in derail.read] == [*range(28), *range(20, 30)]
    add_callbacks(monkeypatch, plain)
    train(
        settings_for(
            tiny_whisper, tiny_shards, tmp_path / "other", *steps[1:], "trainer.max_steps=36"
        ),
        QUIET,
    )
    assert [keys for _, keys in derail.read[28:]] == [keys for _, keys in plain.read[26:]]
    assert max(loss for step, loss in read_metrics(run.metrics)["train/loss"] if step > 20) < 7


def test_a_rewound_run_plans_the_epochs_that_are_left(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = (
        "data.mode=epochs",
        "data.batch_clips=4",
        "trainer.max_epochs=3",
        "trainer.max_steps=null",
    )
    steps = ("trainer.checkpoint_every_steps=10", "trainer.valid_every_steps=50")
    derail = _Derail(25)
    trainers = add_callbacks(monkeypatch, derail)
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        *chosen,
        *steps,
        "trainer.spike_factor=10",
        "trainer.on_spike=rewind",
    )
    run = train(settings, QUIET).run
    assert [trainer.max_steps for trainer in trainers] == [33, 27]
    assert [step for step, _ in derail.read] == [*range(26), *range(20, 27)]
    done = json.loads(run.done.read_text())
    assert done["steps"] == 27
    assert set(done["sources"].values()) == {3.0}
