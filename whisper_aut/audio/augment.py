"""Augmentation of training clips: speed, added noise, gain, and SpecAugment on the log-mel.

All random draws depend only on the seed and the clip's position in the order, so a resumed run, or
one with a different number of workers, repeats them. Validation clips are never augmented. Sources:
Park et al. 2019 (SpecAugment), Ko et al. 2015 (speed perturbation).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

import numpy as np
import pydantic.dataclasses
import torch
from pydantic import AfterValidator, Field, NonNegativeFloat
from torch import Tensor
from torchaudio import functional, transforms

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, ClipLimits
from whisper_aut.errors import UserError, nearest
from whisper_aut.schema import STRICT, Text

# Keys of independent random streams; `data.sampler` uses 1 to 5.
_WAVEFORM, _SPECTRUM, _NOISE, _CUSTOM = 6, 7, 8, 9

# Further augmentations of the waveform by name, which `data.augment.custom` turns on. They are
# called as `function(waveform, random, **options)` with `[S]` at 16 kHz, and return `[S]`.
AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {}


def _check_range(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"{list(ends)} is not [lowest, highest]")
    return ends


@pydantic.dataclasses.dataclass(config=STRICT)
class AugmentSettings:
    """The keys of `data.augment`. Validation clips are never augmented.

    Attributes:
        spec: mask bands and times of the log-mel, see `SpecAugment`.
        gain_db: the largest random gain, in either direction.
        speeds: speed factors, one drawn per clip, such as [0.9, 1.0, 1.1].
        noise: folders or URLs of shards, with sample tables, whose clips are mixed in as noise.
        noise_probability: fraction of the training clips that get noise.
        snr_db: lowest and highest signal-to-noise ratio.
        custom: options of entries of `AUGMENTATIONS`, applied last, in this order.
    """

    spec: bool = True
    gain_db: NonNegativeFloat = 0.0
    speeds: Annotated[list[Annotated[float, Field(ge=0.5, le=2)]], Field(min_length=1)] = field(
        default_factory=lambda: [1.0]
    )
    noise: list[Text] = field(default_factory=list)
    noise_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    snr_db: Annotated[tuple[float, float], AfterValidator(_check_range)] = (5.0, 30.0)
    custom: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        options: what to do.
        seed: seed of the run.
        noise: draws a recording of noise `[S]` at 16 kHz with a random generator, or returns None
            if the recording cannot be used; see `data.dataset.ShardNoise`.
        max_seconds: a clip that its new speed would make longer than this keeps its own speed.
        masks: number and widths of the masks of the log-mel.

    Raises:
        UserError: a custom augmentation is not registered, or does not take its options.
    """

    options: AugmentSettings
    seed: int = 0
    noise: Callable[[np.random.Generator], Tensor | None] | None = None
    max_seconds: float = 30.0
    masks: SpecAugment = SpecAugment()

    def __post_init__(self) -> None:
        # Functions, which spawned workers import, whereas their registry would be empty.
        self.custom = [(_find_custom(name, own), own) for name, own in self.options.custom.items()]

    def waveform(self, waveform: Tensor, position: int) -> Tensor:
        """Change the speed of a clip `[S]` at 16 kHz, add noise, and apply gain.

        Returns:
            `[S']`, where S' differs from S if the speed changed.
        """
        options = self.options
        random = np.random.default_rng([self.seed, _WAVEFORM, position])
        speed = float(random.choice(np.asarray(options.speeds)))
        is_noisy = random.random() < options.noise_probability
        snr = random.uniform(*options.snr_db)
        gain = random.uniform(-options.gain_db, options.gain_db)
        if speed != 1.0 and len(waveform) / speed <= self.max_seconds * SAMPLE_RATE_HZ:
            waveform = change_speed(waveform, speed)
        if is_noisy and (noise := self._draw_noise(position, len(waveform))) is not None:
            waveform = functional.add_noise(waveform, noise, torch.tensor(snr))
        waveform = functional.gain(waveform, gain) if gain else waveform
        for number, (function, own) in enumerate(self.custom):
            random = np.random.default_rng([self.seed, _CUSTOM, number, position])
            waveform = function(waveform, random, **own)
        return waveform

    def mel(self, mel: Tensor, mel_length: int, position: int) -> Tensor:
        """Apply SpecAugment to a log-mel `[F', M]`; the mask value is the mean of the valid frames.

        Args:
            mel: `[F', M]`.
            mel_length: F, the valid frames. The silence after them is not masked.
            position: position of the clip in the order.
        """
        if not self.options.spec:
            return mel
        spec, masked = self.masks, mel.clone()
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
        """Return `[S]` of noise: recordings are cut at a random point, and short ones repeated.

        None if that part of the recording is silent: no gain gives it a signal-to-noise ratio.
        """
        random = np.random.default_rng([self.seed, _NOISE, position])
        if self.noise is None or (noise := self.noise(random)) is None:
            return None
        noise = noise.repeat(-(-samples // len(noise)) + 1)
        start = int(random.integers(len(noise) - samples + 1))
        part = noise[start : start + samples]
        return part if part.abs().max() >= ClipLimits.silence_peak else None


def _find_custom(name: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    if name not in AUGMENTATIONS:
        raise UserError(
            f"data.augment.custom: {name!r} is not an entry of AUGMENTATIONS in "
            f"whisper_aut/audio/augment.py.{nearest(name, AUGMENTATIONS)}"
        )
    function = AUGMENTATIONS[name]
    try:
        inspect.signature(function).bind(None, None, **options)
    except TypeError as error:
        raise UserError(f"data.augment.custom.{name}: {error}.") from None
    return function


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
