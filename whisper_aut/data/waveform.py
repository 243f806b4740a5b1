"""Encoded clip → mono waveform at 16 kHz, float32 `[S]`.

`corpora.audio` decodes and mixes down. Other rates are resampled by libsoxr at its high-quality
setting, the fastest of those measured.
"""

from pathlib import Path

import numpy as np
import soxr
import torch

from whisper_aut.corpora.audio import ClipLimits, check_not_silent, decode, mix_down
from whisper_aut.errors import Reason, SampleRefused

SAMPLE_RATE_HZ = 16_000


def load_waveform(data: bytes, limits: ClipLimits) -> torch.Tensor:
    """Decode, mix down and resample one clip to `[S]` at 16 kHz.

    Raises:
        SampleRefused: see `corpora.audio.decode`.
    """
    clip = decode(data, limits)
    waveform = to_mono_16k(clip.samples, clip.sample_rate_hz)
    check_not_silent(waveform.numpy(), limits)  # again: what lay above 8 kHz is gone
    # Resampling may round the limit itself up by a sample; what is longer was refused above.
    return waveform[: round(limits.max_seconds * SAMPLE_RATE_HZ)]


def load_file(path: Path, limits: ClipLimits) -> torch.Tensor:
    """Read one audio file as `[S]` at 16 kHz.

    Raises:
        SampleRefused: not to be read, larger than the limits, or see `corpora.audio.decode`.
    """
    try:
        if (size := path.stat().st_size) > limits.max_bytes:  # before it is read
            raise SampleRefused(Reason.TOO_LARGE, f"{size} bytes, limit {limits.max_bytes}")
        data = path.read_bytes()
    except OSError as error:
        raise SampleRefused(Reason.MISSING_FILE, error.strerror or str(error)) from None
    return load_waveform(data, limits)


def to_mono_16k(samples: np.ndarray, sample_rate_hz: int) -> torch.Tensor:
    """Average the channels of `[S]` or `[S, channels]` and resample to `[S]` at 16 kHz."""
    mono = mix_down(samples)
    if sample_rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, sample_rate_hz, SAMPLE_RATE_HZ)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
