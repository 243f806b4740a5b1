"""Augmentation of training clips: speed, added noise, gain, and SpecAugment on the log-mel.

All random draws depend only on the seed and the clip's position in the order, so a resumed run, or
one with a different number of workers, repeats them. Validation clips are never augmented. Sources:
Park et al. 2019 (SpecAugment), Ko et al. 2015 (speed perturbation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torchaudio import functional, transforms

from whisper_aut.audio.decode import SAMPLE_RATE_HZ

# Keys of independent random streams; `data.sampler` uses 1 to 5.
_WAVEFORM, _SPECTRUM, _NOISE = 6, 7, 8


@dataclass(frozen=True)
class SpecAugment:
    """The number of masks per clip and their maximum widths.

    Attributes:
        frequency_masks, time_masks: masks per clip along each axis.
        frequency_fraction: maximum width as a fraction of the mel bins; 27 of 80 in the paper.
        time_fraction, time_frames: maximum width as a fraction of the clip's valid frames, and in
            frames of 10 ms; the smaller of the two applies.
    """

    frequency_masks: int = 2
    frequency_fraction: float = 27 / 80
    time_masks: int = 2
    time_fraction: float = 0.1
    time_frames: int = 100


@dataclass
class Augment:
    """Augments training clips.

    Args:
        seed: seed of the run.
        spectrum: SpecAugment settings; None leaves the log-mel unchanged.
        gain_db: maximum change of loudness, up or down.
        speeds: speed factors, one of which is drawn for each clip.
        noise: draws a recording of noise `[S]` at 16 kHz with a random generator, or returns None
            if the recording cannot be used; see `data.dataset.ShardNoise`.
        noise_probability: fraction of clips that noise is added to.
        snr_db: lowest and highest signal-to-noise ratio.
        max_seconds: a clip that its new speed would make longer than this keeps its own speed.
    """

    seed: int = 0
    spectrum: SpecAugment | None = None
    gain_db: float = 0.0
    speeds: Sequence[float] = (1.0,)
    noise: Callable[[np.random.Generator], Tensor | None] | None = None
    noise_probability: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    max_seconds: float = 30.0

    def waveform(self, waveform: Tensor, position: int) -> Tensor:
        """Change the speed of a clip `[S]` at 16 kHz, add noise, and apply gain.

        Returns:
            `[S']`, where S' differs from S if the speed changed.
        """
        random = np.random.default_rng([self.seed, _WAVEFORM, position])
        speed = float(random.choice(np.asarray(self.speeds)))
        is_noisy, snr = random.random() < self.noise_probability, random.uniform(*self.snr_db)
        gain = random.uniform(-self.gain_db, self.gain_db)
        if speed != 1.0 and len(waveform) / speed <= self.max_seconds * SAMPLE_RATE_HZ:
            waveform = change_speed(waveform, speed)
        if self.noise and is_noisy:
            noise = self._draw_noise(position, len(waveform))
            if noise is not None:
                waveform = functional.add_noise(waveform, noise, torch.tensor(snr))
        return functional.gain(waveform, gain) if gain else waveform

    def mel(self, mel: Tensor, mel_length: int, position: int) -> Tensor:
        """Apply SpecAugment to a log-mel `[F', M]`; the mask value is the mean of the valid frames.

        Args:
            mel: `[F', M]`.
            mel_length: F, the valid frames. The silence after them is not masked.
            position: position of the clip in the order.
        """
        spec = self.spectrum
        if spec is None:
            return mel
        masked = mel.clone()
        valid = masked[:mel_length]
        mean = valid.mean()  # a tensor on the device, so the host does not wait for it
        bins = round(spec.frequency_fraction * mel.shape[1])
        frames = min(spec.time_frames, int(spec.time_fraction * mel_length))
        # Masks are drawn on the host, so they are the same on every device. A separate generator
        # leaves the global random state unchanged.
        seed = np.random.default_rng([self.seed, _SPECTRUM, position]).integers(2**63)
        random = torch.Generator().manual_seed(int(seed))
        for _ in range(spec.frequency_masks):
            valid[:, _draw_mask(random, mel.shape[1], bins)] = mean
        for _ in range(spec.time_masks):
            valid[_draw_mask(random, mel_length, frames)] = mean
        return masked

    def _draw_noise(self, position: int, samples: int) -> Tensor | None:
        """Return `[S]` of noise: recordings are cut at a random point, and short ones repeated."""
        random = np.random.default_rng([self.seed, _NOISE, position])
        noise = self.noise(random) if self.noise else None
        if noise is None:
            return None
        noise = noise.repeat(-(-samples // len(noise)) + 1)
        start = int(random.integers(len(noise) - samples + 1))
        return noise[start : start + samples]


def change_speed(waveform: Tensor, factor: float) -> Tensor:
    """Change the speed of a waveform `[S]` at 16 kHz as `torchaudio.functional.speed` does.

    The waveform is padded to a multiple of half a second before the convolution: oneDNN compiles a
    kernel for every new length, which takes longer than running it. A factor above 1 is faster.
    """
    padded = torch.nn.functional.pad(waveform, (0, -len(waveform) % (SAMPLE_RATE_HZ // 2)))
    faster, length = _speed(factor)(padded, torch.tensor(len(waveform)))
    return faster[: int(length)]


@cache
def _speed(factor: float) -> transforms.Speed:
    return transforms.Speed(SAMPLE_RATE_HZ, factor)


def _draw_mask(random: torch.Generator, size: int, max_width: int) -> slice:
    """Draw a mask as `torchaudio.functional.mask_along_axis` does."""
    if max_width < 1:
        return slice(0)
    width = torch.rand((), generator=random) * max_width
    start = int(torch.rand((), generator=random) * (size - width))
    return slice(start, start + int(width))
