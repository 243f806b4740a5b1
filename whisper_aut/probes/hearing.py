"""A clip → what a probe sees of it: the pieces that an encoder takes, their frames joined again, and pooled.

In: a waveform `[S]` of any length, then frames `[T, D]` or `[layers, T, D]` of its pieces. Out: one vector, one per layer, one per
segment, or the frames. Next: `probes.embed`. Clips longer than the encoder's window are heard in windows that overlap; each instant
counts once, seen from the window in which it lies farther from the edge. Only frames that hold the clip are averaged, except under the
`padded` hearing, which is X-ARES's: chunks of ten seconds, each in thirty seconds of silence, silence included in the mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from whisper_aut.data.waveform import SAMPLE_RATE_HZ
from whisper_aut.errors import UserError

WINDOW_SECONDS = 30  # Whisper's own
OVERLAP_SECONDS = 2
PADDED_CHUNK_SECONDS = 10
WINDOW, OVERLAP, CHUNK = (s * SAMPLE_RATE_HZ for s in (WINDOW_SECONDS, OVERLAP_SECONDS, PADDED_CHUNK_SECONDS))

Hearing = Literal["masked", "padded"]


def _mean(frames: Tensor) -> Tensor:
    return frames.mean(-2)


def _mean_std(frames: Tensor) -> Tensor:
    return torch.cat([frames.mean(-2), frames.std(-2, correction=0)], -1)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "mean_std": _mean_std}


@dataclass(frozen=True)
class View:
    """What is kept of a clip; all of it decides what an embedding is.

    Attributes:
        name: `pooled` (one vector), `layers` (one per layer), `segments`, or `frames`.
        pooling: a key of `POOLINGS`.
        layers: which layers, 0 for what enters the first; none for the encoder's output.
        segment_seconds: the grid of `segments`.
        hearing: `masked` or `padded`.
    """

    name: str = "pooled"
    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    segment_seconds: float = 0.0
    hearing: Hearing = "masked"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(f"Pooling must be one of {', '.join(POOLINGS)}, not {self.pooling!r}.")

    def __call__(self, frames: Tensor, frame_seconds: float) -> Tensor:
        """`[T, D]` or `[layers, T, D]` → `[D']`, `[layers, D']`, `[segments, D']` or `[T, D]`."""
        pool = POOLINGS[self.pooling]
        if self.name == "layers":
            return pool(frames)
        frames = frames.transpose(0, 1).flatten(1) if frames.ndim == 3 else frames
        if self.name == "frames":
            return frames
        if self.name == "segments":
            borders = segment_borders(len(frames), frame_seconds, self.segment_seconds)
            return torch.stack([pool(frames[start:end]) for start, end in borders])
        return pool(frames)


def pieces(waveform: Tensor, hearing: Hearing) -> list[Tensor]:
    """Cut `[S]` into waveforms that an encoder takes."""
    if hearing == "padded":
        return [torch.nn.functional.pad(chunk, (0, WINDOW - len(chunk))) for chunk in waveform.split(CHUNK)]
    if len(waveform) <= WINDOW:
        return [waveform]
    step = WINDOW - OVERLAP
    return [waveform[i * step : i * step + WINDOW] for i in range(ceil((len(waveform) - OVERLAP) / step))]


def join(frames: Sequence[Tensor], hearing: Hearing) -> Tensor:
    """Put the frames `[…, T, D]` of a clip's pieces end to end, what overlaps cut in the middle."""
    if len(frames) == 1:
        return frames[0]
    if hearing == "padded":
        return torch.cat(list(frames), -2)
    half = round(frames[0].shape[-2] * OVERLAP_SECONDS / WINDOW_SECONDS / 2)  # the first piece is a full window
    first, *middle, last = frames
    cut = [first[..., :-half, :], *(piece[..., half:-half, :] for piece in middle), last[..., half:, :]]
    return torch.cat(cut, -2)


def segment_borders(frames: int, frame_seconds: float, segment_seconds: float) -> list[tuple[int, int]]:
    """Return for each segment of a clip of T frames its first frame and the one behind its last; none is empty."""
    count = max(1, ceil(frames * frame_seconds / segment_seconds - 1e-6))
    edges = [min(int(i * segment_seconds / frame_seconds + 1e-6), frames) for i in range(count)] + [frames]
    return [(min(start, frames - 1), max(end, min(start, frames - 1) + 1)) for start, end in pairwise(edges)]
