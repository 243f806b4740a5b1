"""Changed clips for training: speed, added noise, gain, and SpecAugment on the log-mel.

Every change is drawn from (seed, position in the order) alone, so that a resumed run, or one with
other workers, draws it again. Validation is never changed. Sources: Park et al. 2019 (SpecAugment),
Ko et al. 2015 (speed perturbation).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torchaudio import functional, transforms

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, ClipLimits, load_waveform
from whisper_aut.data.reader import Sample, ShardReader
from whisper_aut.data.remote import DEFAULT_POLICY, ReadPolicy
from whisper_aut.data.shards import ShardIndex
from whisper_aut.errors import SampleRefused

NOISE_LIMITS = ClipLimits(min_seconds=0.1, max_seconds=60.0)
_WAVEFORM, _SPECTRUM, _NOISE = 6, 7, 8  # keep the random streams apart, from those of the order too


@dataclass(frozen=True)
class SpecAugment:
    """How many stripes are masked, and how wide they are at most.

    Attributes:
        frequency_masks, time_masks: stripes of a clip.
        frequency_share: of the mel bins; 27 of 80 in the paper.
        time_share, time_frames: of the clip's valid frames, and in frames of 10 ms; the narrower holds.
    """

    frequency_masks: int = 2
    frequency_share: float = 27 / 80
    time_masks: int = 2
    time_share: float = 0.1
    time_frames: int = 100


@dataclass
class Augment:
    """What is done to a training clip.

    Args:
        seed: of the run.
        spectrum: None leaves the log-mel as it is.
        gain_db: the loudness changes by up to so much, either way.
        speeds: factors of which one is drawn for each clip.
        noise: shards with sample tables that noise is taken from.
        noise_share: of the clips that get noise.
        snr_db: the lowest and the highest ratio of clip to noise.
        max_seconds: a clip that another speed would make longer keeps its own.
    """

    seed: int = 0
    spectrum: SpecAugment | None = None
    gain_db: float = 0.0
    speeds: Sequence[float] = (1.0,)
    noise: Sequence[ShardIndex] = ()
    noise_share: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    max_seconds: float = 30.0
    policy: ReadPolicy = DEFAULT_POLICY
    _reader: ShardReader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = ShardReader(NOISE_LIMITS, self.policy)

    def waveform(self, waveform: Tensor, position: int) -> Tensor:
        """Return `[S']` for `[S]`."""
        random = np.random.default_rng([self.seed, _WAVEFORM, position])
        speed = float(random.choice(np.asarray(self.speeds)))
        noisy, snr = random.random() < self.noise_share, random.uniform(*self.snr_db)
        gain = random.uniform(-self.gain_db, self.gain_db)
        if speed != 1.0 and len(waveform) / speed <= self.max_seconds * SAMPLE_RATE_HZ:
            waveform = at_speed(waveform, speed)
        if self.noise and noisy:
            noise = self._noise(position, len(waveform))
            if noise is not None:
                waveform = functional.add_noise(waveform, noise, torch.tensor(snr))
        return functional.gain(waveform, gain) if gain else waveform

    def mel(self, mel: Tensor, mel_length: int, position: int) -> Tensor:
        """Mask stripes of `[F', M]` with the mean of the clip; the silence behind its valid frames stays."""
        spec = self.spectrum
        if spec is None:
            return mel
        masked = mel.clone()
        valid = masked[:mel_length]
        mean = valid.mean()  # stays on its device, which nobody has to wait for
        bins = round(spec.frequency_share * mel.shape[1])
        frames = min(spec.time_frames, int(spec.time_share * mel_length))
        # Drawn on the host whatever the device: a clip gets the same masks everywhere, and no
        # generator that others draw from is touched.
        seed = np.random.default_rng([self.seed, _SPECTRUM, position]).integers(2**63)
        random = torch.Generator().manual_seed(int(seed))
        for _ in range(spec.frequency_masks):
            valid[:, _stripe(random, mel.shape[1], bins)] = mean
        for _ in range(spec.time_masks):
            valid[_stripe(random, mel_length, frames)] = mean
        return masked

    def _noise(self, position: int, samples: int) -> Tensor | None:
        """Return `[S]` of noise, a piece of a longer recording or a shorter one over and over; None where it was refused."""
        random = np.random.default_rng([self.seed, _NOISE, position])
        sizes = np.array([index.samples for index in self.noise])
        index = self.noise[int(random.choice(len(sizes), p=sizes / sizes.sum()))]
        ends = np.cumsum(index.shard_samples)
        number = int(random.integers(ends[-1]))
        shard = int(np.searchsorted(ends, number, side="right"))
        place = (shard, number - int(ends[shard] - index.shard_samples[shard]))
        _, item = next(iter(self._reader.read({0: place}, index)))
        try:
            noise = load_waveform(item.audio, NOISE_LIMITS) if isinstance(item, Sample) else None
        except SampleRefused:
            noise = None
        if noise is None:
            return None
        noise = noise.repeat(-(-samples // len(noise)) + 1)
        start = int(random.integers(len(noise) - samples + 1))
        return noise[start : start + samples]


def at_speed(waveform: Tensor, factor: float) -> Tensor:
    """Return `[S']` for `[S]`, as `torchaudio.functional.speed` does.

    Its convolution runs on whole half seconds: oneDNN compiles one for each length that it meets, which takes longer than to run it.
    """
    padded = torch.nn.functional.pad(waveform, (0, -len(waveform) % (SAMPLE_RATE_HZ // 2)))
    faster, length = _speed(factor)(padded, torch.tensor(len(waveform)))
    return faster[: int(length)]


@cache
def _speed(factor: float) -> transforms.Speed:
    return transforms.Speed(SAMPLE_RATE_HZ, factor)


def _stripe(random: torch.Generator, size: int, widest: int) -> slice:
    """Draw up to `widest` neighbours out of `size`, as `torchaudio.functional.mask_along_axis` does."""
    if widest < 1:
        return slice(0)
    width = torch.rand((), generator=random) * widest
    start = int(torch.rand((), generator=random) * (size - width))
    return slice(start, start + int(width))
