"""Throughput: sums computed by hand, and what a real run logs."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

from tests.support.training import QUIET, settings_for
from whisper_aut.data.batch import collate
from whisper_aut.models.decoders.whisper import WhisperDecoder
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.flops import encoder_flops
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.callbacks.metrics import Throughput, peak_memory_gib
from whisper_aut.training.checkpoint import CheckpointWriter
from whisper_aut.training.plan import peak_flops, placeholder_targets
from whisper_aut.training.strategies import Background
from whisper_aut.training.train import train


def test_metrics_are_sums_over_seconds():
    sums = {"mel_frames": 1800, "computed_mel_frames": 2000, "tokens": 80, "clips": 3}
    part = Throughput(2.0, 0.5, **sums, flops=4e12, computed_flops=6e12)
    metrics = part.metrics(ranks=4, peak=8e12)
    assert metrics["audio_seconds_per_second"] == 4 * 18.0 / 2
    assert metrics["tokens_per_second"] == 4 * 40
    assert metrics["clips_per_second"] == 4 * 1.5
    assert metrics["data_wait_fraction"] == 0.25
    assert metrics["padding_fraction"] == pytest.approx(0.1)
    assert metrics["teraflops"] == pytest.approx(8.0)
    assert metrics["mfu"] == pytest.approx(0.25)  # of one device, whatever the number of ranks
    assert metrics["hfu"] == pytest.approx(0.375)
    assert (part + part).metrics()["tokens_per_second"] == pytest.approx(40)


@pytest.mark.parametrize("recomputed", [False, True])
def test_hardware_flops_count_padding_and_recomputation_and_model_flops_neither(
    recomputed: bool, tiny_whisper: Path
):
    model = PretrainedWhisper(str(tiny_whisper)).model.model
    encoder = PackedEncoder(model.encoder, gradient_checkpointing=recomputed)
    decoder = WhisperDecoder(model.decoder, 0, gradient_checkpointing=recomputed)
    parts = {"encoder": encoder, "decoder": decoder, "encoder_learns": True}
    module, batch = SimpleNamespace(**parts, distillation=None), collate([], [], 80)
    batch.mel_lengths, batch.padded = (600, 400), (True, False)
    batch.targets = placeholder_targets((7, 9))
    sums = Throughput(1.0)
    sums.add_batch(module, batch)
    assert sums.metrics()["padding_fraction"] == pytest.approx(1 - 1000 / 3400)
    useful, computed = (
        encoder_flops(model.config, mel, lengths, recomputed=again)
        + decoder.flops(lengths, batch.targets, recomputed=again)
        for mel, lengths, again in (
            ((600, 400), (300, 200), False),
            ((3000, 400), (1500, 200), recomputed),
        )
    )
    assert (sums.flops, sums.computed_flops) == (useful, computed)
    held = Throughput(1.0)
    held.add_batch(SimpleNamespace(**parts | {"encoder_learns": False}, distillation=None), batch)
    assert held.flops == encoder_flops(
        *(model.config, (600, 400), (300, 200)), trained=False
    ) + decoder.flops((300, 200), batch.targets, through_frames=False)
    module.decoder = torch.nn.Identity()  # which does not count its FLOPs
    sums.add_batch(module, batch)
    assert "teraflops" not in sums.metrics()


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
