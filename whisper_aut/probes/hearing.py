"""What a probe sees of a clip's frames: all of them, pooled, pooled per segment, or pooled per layer.

In: frames `[T, D]` or `[layers, T, D]` of a clip. Out: one vector, one per layer, one per segment, or the frames. Only frames that hold
the clip are averaged.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from whisper_aut.model.windows import pooling_named


@dataclass(frozen=True)
class View:
    """What is kept of a clip; all of it decides what an embedding is.

    Attributes:
        name: `pooled` (one vector), `layers` (one per layer), `segments`, or `frames`.
        pooling: a key of `POOLINGS`.
        layers: which layers, 0 for what enters the first; none for the encoder's output.
        segment_seconds: the grid of `segments`.
    """

    name: str = "pooled"
    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    segment_seconds: float = 0.0

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
