"""Two gloo ranks that train together, through the real entry point."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch.testing import assert_close
from transformers import PreTrainedModel

from tests.support.audio import TEXTS, write_shards
from tests.support.ranks import on_ranks
from tests.support.training import settings_for
from whisper_aut.config import DuringSettings, Settings, dump_settings, load_settings
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.probes.callback import ProbeDuringTraining
from whisper_aut.probes.tasks import task_from_mapping
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.checkpoint import read_optimizer_state, read_weights
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.training.train import train

TWO_RANKS = ("hardware.devices=2", "strategy=ddp", "data.workers=0", "data.batch_clips=2")


def train_here(config: str, resume: str = "") -> str:
    """Train on this rank; return how it ended. Only the first rank may read pretrained weights."""
    os.environ["WHISPER_AUT_RUN"] = "job"
    if rank_zero_only.rank:
        PreTrainedModel.from_pretrained = None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        train(load_settings(config), Console(quiet=True), resume=resume)
    except UserError as error:
        return str(error)
    return "done"


def test_a_limit_that_one_rank_exceeds_at_the_end_leaves_no_finished_run(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    """The second rank alone reads the one clip of a source, and cannot use it."""
    with ShardWriter(tmp_path / "bad") as shards:
        shards.write("k", "wav", b"not audio", Annotation(text=TEXTS[0], domain="sound"))
    sources = ", ".join(
        f"{{path: {folder}, domain: {domain}}}"
        for folder, domain in ((tiny_shards / "speech", "speech"), (tmp_path / "bad", "sound"))
    )
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path / "runs",
        *TWO_RANKS,
        f"data.train=[{sources}]",
        "data.domains={speech: 1, sound: 1, music: 0}",
        "data.mode=epochs",
        "data.samples_per_epoch=null",
        "trainer.max_steps=null",
        "trainer.max_epochs=1",
        "data.valid_clips=1",
        "seed=1",  # by which the second rank reads the clip
    )
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    ends = on_ranks(train_here, str(tmp_path / "config.yaml"))
    run = tmp_path / "runs" / "smoke" / "job"
    assert [f"1 of 1 samples of {tmp_path / 'bad'} were skipped" in end for end in ends] == [
        True,
        True,
    ], ends
    assert (run / "ledger-rank1.jsonl").exists()
    assert not (run / "ledger.jsonl").exists()
    assert not (run / "done.json").exists()


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_3", marks=pytest.mark.slow),
    ],
)
def test_a_rank_without_validation_clips_changes_no_metric(
    strategy: str, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def settings(*overrides: str) -> Settings:
        valid = f"data.valid=[{{path: {tiny_shards / 'speech'}, domain: speech}}]"
        short = ("trainer.max_steps=2", valid, "data.valid_clips=1")
        return settings_for(tiny_whisper, tiny_shards, tmp_path, *short, *overrides)

    def metrics(run: Path) -> dict[str, float]:
        found = json.loads((run / "done.json").read_text())["metrics"]
        return {key: found[key] for key in found if key.startswith(("valid/", "tasks/"))}

    one = metrics(train(settings("data.batch_clips=4"), Console(quiet=True)).run.path)
    config = tmp_path / "config.yaml"
    config.write_text(dump_settings(settings(*TWO_RANKS, f"strategy={strategy}")))
    assert on_ranks(train_here, str(config)) == ["done", "done"]
    assert one.keys() >= {"valid/loss", "valid/accuracy_speech"}
    assert metrics(tmp_path / "smoke" / "job") == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bfloat16_run_of_deepspeed_resumes_as_if_it_had_not_stopped(
    stage: int, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def config(name: str, *overrides: str) -> str:
        settings = settings_for(
            tiny_whisper,
            tiny_shards,
            tmp_path,
            *TWO_RANKS,
            f"strategy=deepspeed_stage_{stage}",
            "hardware.precision=bf16-mixed",
            "trainer.accumulate=2",
            "trainer.max_steps=4",
            "trainer.checkpoint_every_steps=2",
            "trainer.keep_checkpoints=9",
            *overrides,
        )
        (tmp_path / name).write_text(dump_settings(settings))
        return str(tmp_path / name)

    assert on_ranks(train_here, config("whole.yaml")) == ["done", "done"]
    checkpoints = tmp_path / "smoke" / "job" / "checkpoints"
    whole = read_weights(checkpoints / "last.ckpt")
    assert whole["encoder.whisper.conv1.weight"].dtype == torch.float32
    optimizer_state = dict(read_optimizer_state(checkpoints / "last.ckpt"))
    again = config("again.yaml", "trainer.generate_clips=1")  # another run than the finished one
    step_2 = str(checkpoints / "step-0000002.ckpt")
    assert on_ranks(train_here, again, step_2) == ["done", "done"]
    assert_close(read_weights(checkpoints / "last.ckpt"), whole, atol=1e-6, rtol=0)
    assert_close(
        dict(read_optimizer_state(checkpoints / "last.ckpt")), optimizer_state, atol=1e-6, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_stage_3"])
def test_the_other_ranks_get_a_language_model_and_a_teacher_from_the_first(
    strategy: str, tiny_whisper: Path, tiny_language_model: Path, tiny_shards: Path, tmp_path: Path
):
    def settings(*overrides: str) -> Settings:
        language = ("decoder=causal_lm", f"decoder.language_model={tiny_language_model}")
        teacher = ("distillation.weight=2", "trainer.max_steps=3")
        return settings_for(tiny_whisper, tiny_shards, tmp_path, *language, *teacher, *overrides)

    one = train(settings("data.batch_clips=4"), Console(quiet=True)).run
    config = tmp_path / "config.yaml"
    config.write_text(dump_settings(settings(*TWO_RANKS, f"strategy={strategy}")))
    assert on_ranks(train_here, str(config)) == ["done", "done"]
    run = RunDirectory(tmp_path / "smoke" / "job")
    for name in ("train/loss", "valid/loss"):
        expected = [value for _, value in read_metrics(one.metrics)[name]]
        losses = [value for _, value in read_metrics(run.metrics)[name]]
        assert losses == pytest.approx(expected, abs=1e-4)


def probe_here(config: str, task: dict[str, Any]) -> Any:
    """Train with probes on this rank; return their scores by step."""
    os.environ["WHISPER_AUT_RUN"] = "job"
    task_ = task_from_mapping(task, "test")
    probes = ProbeDuringTraining([task_], None, DuringSettings(every_steps=2))
    train(load_settings(config), Console(quiet=True), callbacks=[probes])
    return probes.scores


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_averages_and_probes_under_fsdp_are_those_of_one_device(
    precision: str, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    write_shards(tmp_path / "train", 16, "speech")
    write_shards(tmp_path / "test", 10, "sound")
    task = {"name": "two", "title": "Two", "domain": "speech"}
    task |= {part: [str(tmp_path / part)] for part in ("train", "test")}
    options = ("optim.ema_decay=0.8", "trainer.max_steps=4", f"hardware.precision={precision}")
    single = settings_for(tiny_whisper, tiny_shards, tmp_path / "one", *options)
    sharded = settings_for(
        *(tiny_whisper, tiny_shards, tmp_path / "two", *options, *TWO_RANKS), "strategy=fsdp"
    )
    single.data.batch_clips = 4
    (tmp_path / "one.yaml").write_text(dump_settings(single))
    (tmp_path / "two.yaml").write_text(dump_settings(sharded))
    (expected,) = on_ranks(probe_here, str(tmp_path / "one.yaml"), task, ranks=1)
    scores = on_ranks(probe_here, str(tmp_path / "two.yaml"), task)
    tolerance = 1e-6 if precision == "32-true" else 0.21  # two of ten clips
    assert sorted(expected) == [0, 2, 4], expected
    for of_rank in scores:
        assert sorted(of_rank) == [0, 2, 4], of_rank
        for step, entry in expected.items():
            assert of_rank[step] == pytest.approx(entry, abs=tolerance)
    last = [tmp_path / n / "smoke" / "job" / "checkpoints" / "last.ckpt" for n in ("one", "two")]
    one, two = (read_weights(path, averaged=True) for path in last)
    own = read_weights(last[1])
    assert not torch.equal(two["encoder.whisper.conv1.weight"], own["encoder.whisper.conv1.weight"])
    if precision == "32-true":
        assert_close(two, one, atol=2e-5, rtol=0)
