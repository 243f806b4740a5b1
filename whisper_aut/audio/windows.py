"""Parts of long clips: one to train on, or overlapping windows of an encoder, joined and pooled.

An encoder reads audio longer than 30 s in overlapping windows. Each frame of the result is taken
from the window in which it is farther from the edge.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from whisper_aut.audio.decode import ROUNDING_SECONDS, SAMPLE_RATE_HZ, TRIM_SECONDS
from whisper_aut.audio.logmel import MAX_SAMPLES, WINDOW_SECONDS
from whisper_aut.errors import UserError

OVERLAP_SECONDS = 2
OVERLAP_SAMPLES = OVERLAP_SECONDS * SAMPLE_RATE_HZ
BATCH_SECONDS = 160.0


@dataclass
class PartOfClip:
    """Chooses the part of a clip to decode, see `audio.decode.decode`.

    A clip of up to `TRIM_SECONDS` more than `max_seconds` loses its end. With `crop`, a longer one
    gives a window of `max_seconds`. Any other clip is kept as it is.

    Args:
        max_seconds: the limit on clips.
        crop: start of the window among all possible ones, from 0 (the first) to 1 (the last); None
            for no window.
        chunk: start and duration, in seconds, of the part to take in any case; None for none.

    Attributes:
        is_cut: whether the last clip was cut.
    """

    max_seconds: float
    crop: float | None = None
    chunk: tuple[float, float] | None = None
    is_cut: bool = False

    def __call__(self, seconds: float) -> tuple[float, float]:
        """Return start and duration of the part of a clip that lasts `seconds`."""
        if self.chunk:
            self.is_cut = True
            return self.chunk
        spare = seconds - self.max_seconds
        is_long = spare > TRIM_SECONDS
        self.is_cut = spare > ROUNDING_SECONDS and (not is_long or self.crop is not None)
        if not self.is_cut:
            return 0.0, seconds
        return (self.crop or 0.0) * spare if is_long else 0.0, self.max_seconds


def cut_windows(waveform: Tensor) -> list[Tensor]:
    """Cut a waveform `[S]` at 16 kHz into windows of at most 30 s that overlap by 2 s.

    Examples:
        >>> [len(window) / 16_000 for window in cut_windows(torch.zeros(75 * 16_000))]
        [30.0, 30.0, 19.0]
    """
    if len(waveform) <= MAX_SAMPLES:
        return [waveform]
    step = MAX_SAMPLES - OVERLAP_SAMPLES
    return [
        waveform[i * step : i * step + MAX_SAMPLES]
        for i in range(ceil((len(waveform) - OVERLAP_SAMPLES) / step))
    ]


def join_windows(frames: Sequence[Tensor]) -> Tensor:
    """Join the frames `[…, T, D]` of a clip's windows; overlaps are cut in the middle.

    Examples:
        >>> join_windows([torch.zeros(1500, 8), torch.zeros(1500, 8), torch.zeros(950, 8)]).shape
        torch.Size([3750, 8])
    """
    if len(frames) == 1:
        return frames[0]
    # Only the last window can be shorter than 30 s, so the first one has the frame rate.
    half = round(frames[0].shape[-2] * OVERLAP_SECONDS / WINDOW_SECONDS / 2)
    first, *middle, last = frames
    cut = [
        first[..., :-half, :],
        *(window[..., half:-half, :] for window in middle),
        last[..., half:, :],
    ]
    return torch.cat(cut, -2)


def batches_by_seconds(seconds: Sequence[float], batch_seconds: float) -> Iterator[list[int]]:
    """Group consecutive clips into batches of at most `batch_seconds` of audio.

    A clip that is longer forms a batch of its own. Yields the indices of each batch.

    Examples:
        >>> list(batches_by_seconds([3.0, 4.0, 20.0, 1.0], batch_seconds=8))
        [[0, 1], [2], [3]]
    """
    batch, total = [], 0.0
    for index, length in enumerate(seconds):
        if batch and total + length > batch_seconds:
            yield batch
            batch, total = [], 0.0
        batch.append(index)
        total += length
    if batch:
        yield batch


def _mean(frames: Tensor) -> Tensor:
    return frames.mean(-2)


def _mean_std(frames: Tensor) -> Tensor:
    return torch.cat([frames.mean(-2), frames.std(-2, correction=0)], -1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "mean_std": _mean_std}


def get_pooling(name: str) -> Callable[[Tensor], Tensor]:
    """Return a pooling over time, which maps `[…, T, D]` to `[…, D']`.

    Raises:
        UserError: there is no pooling of that name.
    """
    if name not in POOLINGS:
        raise UserError(f"Pooling must be one of {', '.join(POOLINGS)}, not {name!r}.")
    return POOLINGS[name]
