"""The table of one tar: starts and lengths of its samples, hashes of their keys and licences.

`NAME.samples.npy` is an int64 array `[samples + 1, 4]` of first byte, milliseconds, key, licence,
whose last row is the end of the last sample. By it the stream reads single samples, batches are
planned by seconds, and a run leaves out clips before it orders them. It is read with
`allow_pickle=False`.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

import numpy as np

UNKNOWN_MS = -1
COLUMNS = 4
# NumPy parses a header with `ast`, which in Python 3.11 is not safe in threads:
# https://github.com/python/cpython/issues/106905
_HEADER_LOCK = Lock()


def table_name(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.samples.npy"


def text_hash(text: str) -> int:
    """Return the 64-bit number by which tables know a key or a licence."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class SampleTable:
    """Samples of a tar in order.

    Attributes:
        starts: the first byte of each, and one entry more, the end of the last.
        milliseconds: their lengths; -1 where unknown.
        keys, licences: `text_hash` of the key, and of the licence as the sample states it.
    """

    starts: np.ndarray
    milliseconds: np.ndarray
    keys: np.ndarray
    licences: np.ndarray

    def __len__(self) -> int:
        return len(self.milliseconds)

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        columns = [self.milliseconds, self.keys, self.licences]
        rows = np.stack([self.starts, *(np.append(column, 0) for column in columns)], axis=1)
        np.save(buffer, rows.astype("<i8"), allow_pickle=False)
        return buffer.getvalue()

    def licence_counts(
        self, rows: np.ndarray | slice = slice(None)
    ) -> Iterator[tuple[int, int, float]]:
        """Yield hash, samples and seconds of each licence among some rows."""
        licences, seconds = self.licences[rows], self.milliseconds[rows].clip(min=0) / 1000
        for licence in np.unique(licences):
            own = licences == licence
            yield int(licence), int(own.sum()), float(seconds[own].sum())

    @classmethod
    def from_bytes(cls, data: bytes, samples: int) -> "SampleTable":
        """Read a table.

        Raises:
            ValueError: it is damaged, or not of a tar with so many samples.
        """
        with _HEADER_LOCK:
            rows = np.load(io.BytesIO(data), allow_pickle=False)
        if rows.dtype.kind != "i" or rows.shape != (samples + 1, COLUMNS):
            raise ValueError(f"a table of {rows.dtype} {rows.shape} for {samples} samples")
        starts, (milliseconds, keys, licences) = rows[:, 0], rows[:-1, 1:].T
        if starts[0] < 0 or (np.diff(starts) <= 0).any() or (milliseconds < UNKNOWN_MS).any():
            raise ValueError("offsets that do not ascend, or negative lengths")
        return cls(starts, milliseconds, keys, licences)


class TableWriter:
    """Collects the rows of a table."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, start: int, seconds: float | None, key: str, licence: str) -> None:
        milliseconds = UNKNOWN_MS if seconds is None else round(seconds * 1000)
        self._rows.append((start, milliseconds, text_hash(key), text_hash(licence)))

    def finish(self, end: int) -> SampleTable:
        rows = np.array(self._rows, np.int64).reshape(-1, COLUMNS)
        return SampleTable(np.append(rows[:, 0], end), *rows[:, 1:].T)
