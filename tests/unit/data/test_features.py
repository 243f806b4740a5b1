"""Features on the device: the same log-mels and masks as the workers', in full precision."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

from whisper_aut.audio.augment import Augment, AugmentSettings
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data.batch import Batch, Waveforms
from whisper_aut.data.datamodule import DeviceFeatures, ShardDataModule
from whisper_aut.data.dataset import ExampleBuilder, StreamSource
from whisper_aut.data.shards import open_index
from whisper_aut.data.targets import WhisperText
from whisper_aut.models.pretrained import PretrainedWhisper


def batches(
    tiny_whisper: Path, shards: Path, on_device: bool, workers: int = 0
) -> tuple[list[Batch], list[Batch]]:
    build = ExampleBuilder(
        LogMel(80),
        WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer),
        ClipLimits(),
        on_device=on_device,
    )
    source, augment = (
        StreamSource(open_index(shards / "music"), "music"),
        Augment(AugmentSettings(gain_db=3.0)),
    )
    module = ShardDataModule(
        [source],
        [source],
        [1.0],
        build,
        seed=0,
        window=4,
        batch_clips=3,
        workers=workers,
        augment=augment,
    )
    train, valid = list(module.train_dataloader()), list(module.val_dataloader())
    assert all(
        (batch.waveforms is not None) == on_device and bool(len(batch.mel)) != on_device
        for batch in train + valid
    )
    return tuple(
        [module.on_after_batch_transfer(batch, 0) for batch in part] for part in (train, valid)
    )  # pyright: ignore


@pytest.mark.parametrize("workers", [0, 1])
def test_the_device_makes_what_workers_make(tiny_whisper: Path, tiny_shards: Path, workers: int):
    ours, theirs = (
        batches(tiny_whisper, tiny_shards, True, workers),
        batches(tiny_whisper, tiny_shards, False),
    )
    for made, expected in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert made.waveforms is None
        assert_close(made.mel, expected.mel, atol=0, rtol=0)
        assert replace(made, mel=expected.mel, targets=expected.targets) == expected


def test_an_empty_batch_stays_one(tiny_whisper: Path):
    empty = Batch(torch.zeros(0, 80), (), None, (), (), (), (), ())  # pyright: ignore[reportArgumentType]
    assert DeviceFeatures(LogMel(80))(empty) is empty


def test_half_precision_does_not_round_the_waveform():
    waveforms = [torch.randn(1600), torch.randn(800)]
    packed = HalfPrecision("bf16-true").convert_input(Waveforms.pack(waveforms, [None, None]))
    assert all(
        torch.equal(there, given) for there, given in zip(packed.clips(), waveforms, strict=True)
    )


def test_features_are_full_precision_under_autocast_and_low_matmul_precision():
    waveform = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    expected = WhisperFeatureExtractor(feature_size=80)(
        waveform.numpy(), sampling_rate=16_000, return_tensors="pt"
    )
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mel = LogMel(80)(waveform)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(mel[:100], expected.input_features[0].T[:100], atol=1e-5, rtol=0)
