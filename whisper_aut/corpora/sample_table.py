"""Where the samples of one tar lie, and how long they are: the small table beside each shard.

In: offsets and durations as a shard is written, or as `corpora.index` finds them. Out: `NAME.samples.npy`, an int64 array
`[samples + 1, 2]` of first byte and milliseconds, whose last row is the end of the last sample. Next: `data.stream` fetches single
samples by it instead of reading every header, `data.batching` plans batches of equal length. Read with `allow_pickle=False`.
"""

import io
from dataclasses import dataclass

import numpy as np

UNKNOWN_MS = -1


def table_name(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.samples.npy"


@dataclass(frozen=True)
class SampleTable:
    """Samples of a tar in order: `starts` has one entry more, the end of the last; `milliseconds` is -1 where it is not known."""

    starts: np.ndarray
    milliseconds: np.ndarray

    def __len__(self) -> int:
        return len(self.milliseconds)

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        rows = np.stack([self.starts, np.append(self.milliseconds, 0)], axis=1).astype("<i8")
        np.save(buffer, rows, allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, samples: int) -> "SampleTable":
        """Read a table.

        Raises:
            ValueError: it is damaged, or not of a tar with so many samples.
        """
        rows = np.load(io.BytesIO(data), allow_pickle=False)
        if rows.dtype.kind != "i" or rows.shape != (samples + 1, 2):
            raise ValueError(f"a table of {rows.dtype} {rows.shape} for {samples} samples")
        starts, milliseconds = rows[:, 0], rows[:-1, 1]
        if starts[0] < 0 or (np.diff(starts) <= 0).any() or (milliseconds < UNKNOWN_MS).any():
            raise ValueError("offsets that do not ascend, or negative lengths")
        return cls(starts, milliseconds)


class TableWriter:
    """Collects the rows of a table."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._milliseconds: list[int] = []

    def add(self, start: int, seconds: float | None) -> None:
        self._starts.append(start)
        self._milliseconds.append(UNKNOWN_MS if seconds is None else round(seconds * 1000))

    def finish(self, end: int) -> SampleTable:
        return SampleTable(
            np.array([*self._starts, end], np.int64), np.array(self._milliseconds, np.int64)
        )
