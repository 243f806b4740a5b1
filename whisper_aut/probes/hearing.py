"""A clip → what a probe sees of it: the pieces that an encoder takes, their frames joined again, and pooled.

In: a waveform `[S]` of any length, then frames `[T, D]` or `[layers, T, D]` of its pieces. Out: one vector, one per layer, one per
segment, or the frames. Next: `probes.embed`. Clips longer than the encoder's window are heard in windows that overlap; each instant
counts once, seen from the window in which it lies farther from the edge. Only frames that hold the clip are averaged, except under the
`padded` hearing, which is X-ARES's: chunks of ten seconds, each in thirty seconds of silence, silence included in the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from whisper_aut.data.logmel import MAX_SAMPLES
from whisper_aut.data.waveform import SAMPLE_RATE_HZ
from whisper_aut.model.windows import cut_windows, join_windows, pooling_named

PADDED_CHUNK_SECONDS = 10
CHUNK_SAMPLES = PADDED_CHUNK_SECONDS * SAMPLE_RATE_HZ

Hearing = Literal["masked", "padded"]


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
        pooling_named(self.pooling)

    def __call__(self, frames: Tensor, frame_seconds: float) -> Tensor:
        """`[T, D]` or `[layers, T, D]` → `[D']`, `[layers, D']`, `[segments, D']` or `[T, D]`."""
        pool = pooling_named(self.pooling)
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
        return [
            torch.nn.functional.pad(chunk, (0, MAX_SAMPLES - len(chunk)))
            for chunk in waveform.split(CHUNK_SAMPLES)
        ]
    return cut_windows(waveform)


def join(frames: Sequence[Tensor], hearing: Hearing) -> Tensor:
    """Put the frames `[…, T, D]` of a clip's pieces end to end."""
    if hearing == "padded":
        return torch.cat(list(frames), -2)
    return join_windows(frames)


def segment_borders(
    frames: int, frame_seconds: float, segment_seconds: float
) -> list[tuple[int, int]]:
    """Return for each segment of a clip of T frames its first frame and the one behind its last; none is empty."""
    count = max(1, ceil(frames * frame_seconds / segment_seconds - 1e-6))
    edges = [min(int(i * segment_seconds / frame_seconds + 1e-6), frames) for i in range(count)] + [
        frames
    ]
    return [
        (min(start, frames - 1), max(end, min(start, frames - 1) + 1))
        for start, end in pairwise(edges)
    ]
