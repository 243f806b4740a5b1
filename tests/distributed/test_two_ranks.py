"""Two gloo ranks that train together, through the real entry point."""

import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from tests.support.audio import TEXTS
from tests.support.ranks import on_ranks
from tests.support.training import settings_for
from whisper_aut.config import Settings, dump_settings, load_settings
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import read_optimizer_state, read_weights
from whisper_aut.training.train import train

TWO_RANKS = ("hardware.devices=2", "strategy=ddp", "data.workers=0", "data.batch_clips=2")


def train_here(config: str, resume: str = "") -> str:
    """Train on this rank; return how it ended."""
    os.environ["WHISPER_AUT_RUN"] = "job"
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
