"""Augmentation: drawn from (seed, position) alone, as strong as it says, only where it belongs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchaudio import functional

from tests.support.audio import encode_audio, tone, write_shards
from tests.support.downloads import tar_of
from whisper_aut.audio import augment as augment_module
from whisper_aut.audio.augment import Augment, AugmentSettings, SpecAugment, change_speed
from whisper_aut.audio.decode import SAMPLE_RATE_HZ, ClipLimits
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import ExampleBuilder, ShardNoise, StreamSource
from whisper_aut.data.shards import open_index
from whisper_aut.data.targets import WhisperText
from whisper_aut.data.writer import index_folder
from whisper_aut.errors import UserError
from whisper_aut.models.pretrained import PretrainedWhisper

CLIP = torch.from_numpy(tone(2.0))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory):
    folder = write_shards(tmp_path_factory.mktemp("noise") / "sound", 9, "sound")
    return ShardNoise([open_index(folder)])


def test_the_same_position_gives_the_same_clip_and_another_one_another(noise):
    def made(position: int, seed: int = 0) -> torch.Tensor:
        torch.rand(1)  # whatever else draws random numbers
        options = AugmentSettings(gain_db=6.0, speeds=[0.9, 1.0, 1.1], noise_probability=1.0)
        return Augment(options, seed, noise).waveform(CLIP, position)

    assert torch.equal(made(5), made(5))
    assert not torch.equal(made(5)[:100], made(6)[:100])
    assert not torch.equal(made(5)[:100], made(5, seed=1)[:100])


def test_noise_stands_at_the_ratio_asked_for(noise):
    options = AugmentSettings(noise_probability=1.0, snr_db=(10.0, 10.0))
    noisy = Augment(options, noise=noise).waveform(CLIP, 3)
    ratio = CLIP.pow(2).sum() / (noisy - CLIP).pow(2).sum()
    assert 10 * ratio.log10() == pytest.approx(10.0, abs=0.01)
    untouched = Augment(AugmentSettings(noise_probability=0.0), noise=noise).waveform(CLIP, 3)
    assert torch.equal(untouched, CLIP)


def test_a_silent_part_of_a_recording_adds_no_noise():
    """Recordings that are padded with zeros, such as those of ESC-50, have silent parts."""
    recording = torch.cat([CLIP[:8_000], torch.zeros(80_000)])
    options = AugmentSettings(noise_probability=1.0)
    augment = Augment(options, noise=lambda random: recording)
    made = [augment.waveform(CLIP, position) for position in range(20)]
    assert all(clip.isfinite().all() for clip in made)
    assert 0 < sum(torch.equal(clip, CLIP) for clip in made) < 20


@pytest.mark.parametrize("seconds", [1.0, 62.0])
def test_recordings_without_text_and_long_ones_are_noise_too(seconds: float, tmp_path: Path):
    """Noise corpora have no texts and recordings of minutes. They used to add nothing."""
    recording = encode_audio(tone(seconds))
    tar_of(tmp_path / "noise.tar", {"0.flac": recording, "1.flac": recording})
    draw = ShardNoise([index_folder(tmp_path)])
    drawn = draw(np.random.default_rng(0))
    assert drawn is not None
    assert len(drawn) == min(seconds, 60) * 16_000


def add_offset(waveform: torch.Tensor, random: np.random.Generator, largest: float) -> torch.Tensor:
    return waveform + random.uniform(0, largest)


def test_a_registered_augmentation_is_drawn_from_the_seed_and_the_position(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(augment_module.AUGMENTATIONS, "offset", add_offset)
    augment = Augment(AugmentSettings(custom={"offset": {"largest": 0.5}}))
    offsets = [(augment.waveform(CLIP, position) - CLIP)[0] for position in (0, 1, 0)]
    assert offsets[0] == offsets[2] != offsets[1]
    assert 0 < max(offsets) < 0.5


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ({"ofset": {}}, " 'ofset' is not an entry of AUGMENTATIONS.*Did you mean 'offset'"),
        ({"offset": {}}, "offset: missing a required argument: 'largest'"),
        ({"offset": {"largest": 1, "loud": 2}}, "offset: got an unexpected keyword argument"),
    ],
)
def test_a_custom_augmentation_that_does_not_exist_or_fit_is_an_error(
    custom: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(augment_module.AUGMENTATIONS, "offset", add_offset)
    with pytest.raises(UserError, match=rf"data\.augment\.custom.{message}"):
        Augment(AugmentSettings(custom=custom))


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 1.25, 2.0])
@pytest.mark.parametrize("samples", [1, 1_601, 7_999, 8_000, 8_001, 48_123])
def test_another_speed_is_torchaudios(factor: float, samples: int):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    assert_close(
        change_speed(waveform, factor),
        functional.speed(waveform, SAMPLE_RATE_HZ, factor)[0],
        atol=1e-5,
        rtol=0,
    )


def test_gain_and_speed_do_what_they_say():
    factors = [
        float(
            Augment(AugmentSettings(gain_db=6.0)).waveform(CLIP, position).abs().max()
            / CLIP.abs().max()
        )
        for position in range(50)
    ]
    assert min(factors) >= 10 ** (-6 / 20) - 1e-4
    assert max(factors) <= 10 ** (6 / 20) + 1e-4
    assert max(factors) > 1.2 > 0.8 > min(factors)
    slower = AugmentSettings(speeds=[0.8])
    slow = Augment(slower).waveform(CLIP, 0)
    assert len(slow) == pytest.approx(len(CLIP) / 0.8, abs=2)
    peak = torch.fft.rfft(slow).abs().argmax() / (len(slow) / 16_000)
    assert float(peak) == pytest.approx(440 * 0.8, abs=1)
    assert torch.equal(Augment(slower, max_seconds=2.1).waveform(CLIP, 0), CLIP)


def test_masks_keep_to_valid_frames_and_to_their_widths():
    length = mel_frames(len(CLIP))
    mel = LogMel(80)(
        CLIP + 0.01 * torch.randn(len(CLIP), generator=torch.Generator().manual_seed(0))
    )
    spec = SpecAugment(frequency_masks=1, time_masks=1, time_fraction=0.1)
    bins, frames = [], []
    for position in range(60):
        masked = Augment(AugmentSettings(), masks=spec).mel(mel, length, position)
        assert masked.shape == mel.shape
        assert_close(masked[length:], mel[length:], atol=0, rtol=0)
        changed = masked[:length] != mel[:length]
        bins.append(int((changed.float().mean(0) > 0.9).sum()))
        frames.append(int((changed.float().mean(1) > 0.9).sum()))
        kept = masked[:length][changed]
        assert_close(kept, torch.full_like(kept, float(mel[:length].mean())), atol=1e-6, rtol=0)
    assert 15 < max(bins) <= 27
    assert 10 < max(frames) <= length // 10


def test_masks_are_torchaudios_from_the_seed_and_the_position():
    spec = SpecAugment()
    for position, length in enumerate((5, 40, 300, 2_998)):
        mel = torch.rand(length + 2, 80, generator=torch.Generator().manual_seed(position))
        expected = mel[None, :length]
        mean = float(expected.mean())
        seed = int(np.random.default_rng([3, 7, position]).integers(2**63))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for _ in range(spec.frequency_masks):
                expected = functional.mask_along_axis(expected, 27, mean, axis=2)
            for _ in range(spec.time_masks):
                expected = functional.mask_along_axis(expected, 100, mean, axis=1, p=0.1)
        masked = Augment(AugmentSettings(), 3, masks=spec).mel(mel, length, position)
        assert torch.equal(masked[:length], expected[0])


def test_masking_touches_no_global_generator(monkeypatch: pytest.MonkeyPatch):
    """Dropout draws from the GPU's, which `torch.manual_seed` reseeds; it is told so without a GPU
    too.
    """
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    before, mel = torch.get_rng_state(), torch.arange(202.0 * 80).view(202, 80)
    masked = Augment(AugmentSettings()).mel(mel, 200, 0)
    assert not torch.equal(masked, mel)
    assert torch.equal(torch.get_rng_state(), before)
    assert reseeded == []


@pytest.mark.gpu
def test_a_gpu_masks_what_the_cpu_masks():
    augment, mel = Augment(AugmentSettings()), torch.rand(202, 80)
    before = torch.cuda.get_rng_state()
    on_gpu = augment.mel(mel.cuda(), 200, 5).cpu()
    assert_close(on_gpu, augment.mel(mel, 200, 5))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_training_is_changed_and_validation_is_not(tiny_whisper: Path, tiny_shards: Path):
    examples = ExampleBuilder(
        LogMel(80), WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer), ClipLimits()
    )
    source = StreamSource(open_index(tiny_shards / "music"), "music")

    def batches(augment: Augment | None, workers: int = 0) -> tuple[list, list]:
        module = ShardDataModule(
            [source],
            [source],
            [1.0],
            examples,
            seed=0,
            window=4,
            batch_clips=3,
            workers=workers,
            augment=augment,
        )
        return list(module.train_dataloader()), list(module.val_dataloader())

    plain, augmented = batches(None), batches(Augment(AugmentSettings()))
    again = batches(Augment(AugmentSettings()), workers=2)
    assert all(not torch.equal(a.mel, b.mel) for a, b in zip(plain[0], augmented[0], strict=True))
    assert all(torch.equal(a.mel, b.mel) for a, b in zip(augmented[0], again[0], strict=True))
    assert all(torch.equal(a.mel, b.mel) for a, b in zip(plain[1], augmented[1], strict=True))
