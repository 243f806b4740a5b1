"""Throughput: sums computed by hand, and what a real run logs."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

from tests.support.training import QUIET, settings_for
from whisper_aut.training.callbacks.metrics import Throughput, peak_memory_gib
from whisper_aut.training.checkpoint import CheckpointWriter
from whisper_aut.training.plan import peak_flops
from whisper_aut.training.strategies import Background
from whisper_aut.training.train import train


def test_metrics_are_sums_over_seconds():
    part = Throughput()
    part.add_batch([500, 1000], tokens=60, flops=3e12, padded=[False, False])
    part.add_batch([300], tokens=20, flops=1e12, padded=[False])
    part.seconds, part.waited_seconds = 2.0, 0.5
    metrics = part.metrics(ranks=4, peak=8e12)
    assert metrics["audio_seconds_per_second"] == 4 * 18.0 / 2
    assert metrics["tokens_per_second"] == 4 * 40
    assert metrics["clips_per_second"] == 4 * 1.5
    assert metrics["data_wait_fraction"] == 0.25
    assert metrics["padding_fraction"] == 0
    assert metrics["teraflops"] == pytest.approx(8.0)
    assert metrics["mfu"] == pytest.approx(0.25)  # of one device, whatever the number of ranks
    assert (part + part).metrics()["tokens_per_second"] == pytest.approx(40)


def test_padding_counts_what_the_encoder_runs_on():
    part = Throughput()
    part.add_batch([600, 400], tokens=1, flops=math.nan, padded=[True, False])
    part.seconds = 1.0
    assert part.metrics()["padding_fraction"] == pytest.approx(1 - 1000 / 3400)
    assert "teraflops" not in part.metrics()


def test_peaks_know_the_devices_and_precisions():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16-mixed") == 756e12
    assert peak_flops("NVIDIA H100 NVL", "bf16-mixed") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "32-true") == 156e12
    assert peak_flops("NVIDIA GeForce RTX 4090", "16-mixed") == 165.2e12
    assert peak_flops("Something new", "bf16-mixed") is None
    held = torch.ones(64, 1024, 1024)
    assert peak_memory_gib(torch.device("cpu")) > held.nbytes / 2**30


def test_a_run_logs_its_throughput_and_closes_with_it(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    run = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.log_every_steps=2"), QUIET
    ).run
    rows = list(csv.DictReader(run.metrics.open()))
    logged = [row for row in rows if row.get("throughput/audio_seconds_per_second")]
    assert [int(row["step"]) for row in logged] == [2, 4, 6]
    metrics = json.loads(run.done.read_text())["metrics"]
    assert metrics["throughput/audio_seconds_per_second"] > 0
    assert 0 <= metrics["throughput/data_wait_fraction"] < 1
    assert metrics["throughput/padding_fraction"] == 0
    assert metrics["throughput/teraflops"] > 0
    assert "throughput/mfu" not in metrics


def test_totals_continue_over_a_resume(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    whole = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path / "a", "trainer.log_every_steps=1"), QUIET
    ).run
    stopped = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path / "b",
        "trainer.log_every_steps=1",
        "trainer.checkpoint_every_steps=3",
    )
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(stopped, QUIET, callbacks=[_Unplugged(step=4)])
    resumed = train(stopped, QUIET, resume="auto").run
    one, other = (json.loads(run.done.read_text())["metrics"] for run in (whole, resumed))
    for name in ("throughput/total_audio_seconds", "throughput/total_teraflop"):
        assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_are_not_counted(
    asynchronous: bool,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """On a clock that ticks when it is read, and jumps an hour for each checkpoint."""
    clock, begin, background = [0.0], CheckpointWriter.begin, []

    def ticked() -> float:
        clock[0] += 0.001
        return clock[0]

    def slowly(draft: CheckpointWriter) -> None:
        clock[0] += 3600
        begin(draft)

    monkeypatch.setattr(CheckpointWriter, "begin", slowly)
    monkeypatch.setattr(
        "whisper_aut.training.callbacks.metrics.time",
        SimpleNamespace(perf_counter=ticked, monotonic=ticked),
    )
    monkeypatch.setattr(Background, "start", lambda _, work: background.append(work))
    monkeypatch.setattr(Background, "wait", lambda _: background.pop()() if background else None)
    chosen = (
        "trainer.checkpoint_every_steps=2",
        "trainer.valid_every_steps=4",
        f"trainer.async_checkpoints={asynchronous}",
    )
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen), QUIET).run
    assert clock[0] >= 3 * 3600, "no checkpoint was written"
    assert 0 < json.loads(run.done.read_text())["metrics"]["throughput/total_seconds"] < 60


class _Unplugged(lightning.Callback):
    """Fails at a step, as a machine does."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("pulled the plug")
