"""Overlapping windows, in which an encoder reads audio longer than 30 s, joined and pooled.

Each frame of the result is taken from the window in which it is farther from the edge.
"""

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import torch
from torch import Tensor

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.audio.logmel import MAX_SAMPLES, WINDOW_SECONDS
from whisper_aut.errors import UserError

OVERLAP_SECONDS = 2
OVERLAP_SAMPLES = OVERLAP_SECONDS * SAMPLE_RATE_HZ
BATCH_SECONDS = 160.0


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
    last = frames[0].shape[-2] - half
    middle = [window[..., half:last, :] for window in frames[1:-1]]
    return torch.cat([frames[0][..., :last, :], *middle, frames[-1][..., half:, :]], -2)


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


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda frames: frames.mean(-2),
    "mean_std": lambda frames: torch.cat([frames.mean(-2), frames.std(-2, correction=0)], -1),
}


def get_pooling(name: str) -> Callable[[Tensor], Tensor]:
    """Return a pooling over time, which maps `[…, T, D]` to `[…, D']`.

    Raises:
        UserError: there is no pooling of that name.
    """
    if name not in POOLINGS:
        raise UserError(f"Pooling must be one of {', '.join(POOLINGS)}, not {name!r}.")
    return POOLINGS[name]
