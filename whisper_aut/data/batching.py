"""Which positions of the order form which micro-batch: a number of clips, or a budget of audio seconds.

In: an `Order`, and for seconds the sample tables. Out: micro-batches of the whole world, one after another, and a `Cursor` behind
each. Next: `data.stream`, where rank r of R takes every R-th of them. Ranks and workers do not enter: another world takes the
same row of micro-batches up where the cursor stands.

By seconds, positions are taken in chunks of a fixed number of clips. A chunk's clips go into the fewest batches that the budget
allows, longest first, each into the batch that is shortest so far (Graham 1969, "LPT"), so that the batches of a chunk are equal to a
fraction of a clip. A chunk depends on nothing before it, so a run goes on at any chunk without planning what lies behind.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from whisper_aut.corpora.remote import DEFAULT_POLICY, ReadPolicy
from whisper_aut.corpora.sample_table import UNKNOWN_MS
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.data.order import Order, ShuffledOrder
from whisper_aut.errors import UserError

CHUNK_BATCHES = (
    64  # about so many batches are planned together; the last one's emptiness is spread over them
)
TABLES_HELD = 512
_BATCH_ORDER = 5


class Cursor(NamedTuple):
    """A place between two micro-batches: the position at which a chunk begins, and how many of its batches lie before."""

    position: int = 0
    taken: int = 0


class Batching(Protocol):
    """Cuts an order into micro-batches."""

    @property
    def span_batches(self) -> int:
        """How many batches a worker should look ahead, to read what it needs of a window in one pass."""
        ...

    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        """Return the batches, as positions, of the chunk that begins there, and where the next chunk begins."""
        ...

    def count(self, cursor: Cursor, end: int) -> int:
        """Return the micro-batches between a cursor and a position."""
        ...

    def fingerprint(self) -> str:
        """Return what a cursor inside a chunk depends on."""
        ...


def batches_from(
    batching: Batching, cursor: Cursor, end: int | None
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Yield micro-batches from a cursor up to a position, each with the cursor behind it."""
    position, taken = cursor
    while end is None or position < end:
        batches, following = batching.chunk(position)
        for number in range(taken, len(batches)):
            behind = (
                Cursor(following) if number + 1 == len(batches) else Cursor(position, number + 1)
            )
            yield batches[number], behind
        position, taken = following, 0


@dataclass(frozen=True)
class ByClips:
    """Micro-batches of so many clips; the last of an epoch holds what is left."""

    order: Order
    clips: int
    span_batches: int = 256

    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        following = min(
            position + self.clips, _boundary(self.order, position, position + self.clips)
        )
        return [np.arange(position, following)], following

    def count(self, cursor: Cursor, end: int) -> int:
        return -(-(end - cursor.position) // self.clips)

    def fingerprint(self) -> str:
        return "clips"  # one batch is one chunk, so a cursor is a position and nothing else


class BySeconds:
    """Micro-batches of at most so many seconds of audio.

    Args:
        order: a training order.
        indexes: its sources' shards, with tables.
        seconds: the budget; no less than the longest clip.
        longest_seconds: of a clip; longer ones are refused, so they count as this, and so do those of unknown length.
    """

    span_batches = 32

    def __init__(
        self,
        order: ShuffledOrder,
        indexes: Sequence[ShardIndex],
        seconds: float,
        longest_seconds: float,
        policy: ReadPolicy = DEFAULT_POLICY,
    ):
        self.order, self.indexes, self.policy = order, tuple(indexes), policy
        self.budget_ms, self.longest_ms = round(seconds * 1000), round(longest_seconds * 1000)
        self.mean_seconds = _mean_seconds(order, indexes) or longest_seconds
        self.chunk_clips = max(1, round(CHUNK_BATCHES * seconds / self.mean_seconds))

    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        following = _boundary(self.order, position, position + self.chunk_clips)
        batches = fill(self.lengths_ms(position, following), self.budget_ms)
        # Batches that hold the longest clips would come first.
        turns = np.random.default_rng([self.order.seed, _BATCH_ORDER, position]).permutation(
            len(batches)
        )
        return [position + batches[turn] for turn in turns], following

    def count(self, cursor: Cursor, end: int) -> int:
        return sum(1 for _ in batches_from(self, cursor, end))

    def fingerprint(self) -> str:
        return f"seconds {self.budget_ms} {self.longest_ms} {self.chunk_clips}"

    def lengths_ms(self, start: int, stop: int) -> np.ndarray:
        """Return the lengths of the clips at positions start … stop - 1."""
        sources, numbers = self.order.draws(start, stop)
        lengths = np.empty(len(sources), dtype=np.int64)
        windows: dict[tuple[int, int], list[int]] = {}
        for place, (source, number) in enumerate(
            zip(sources.tolist(), numbers.tolist(), strict=True)
        ):
            windows.setdefault((source, self.order.window(source, number)[0]), []).append(place)
        for (source, first), places in windows.items():
            lengths[places] = self._window(source, first)[numbers[places] - first]
        return lengths

    @lru_cache(maxsize=64)  # noqa: B019 — it lives as long as its run
    def _window(self, source: int, first: int) -> np.ndarray:
        shards, ordinals = self.order.places(source, *self.order.window(source, first))
        lengths = np.empty(len(shards), dtype=np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            lengths[chosen] = self._table(source, int(shard))[ordinals[chosen]]
        return np.where(lengths == UNKNOWN_MS, self.longest_ms, lengths).clip(1, self.longest_ms)

    @lru_cache(maxsize=TABLES_HELD)  # noqa: B019
    def _table(self, source: int, shard: int) -> np.ndarray:
        index = self.indexes[source]
        try:
            return index.table(shard, self.policy).milliseconds[index.ordinals(shard)]
        except (OSError, ValueError) as error:
            raise UserError(
                f"The lengths of {index.url(shard)} cannot be read ({error}), and data.batch_seconds plans by them. "
                f"Make them anew: whisper-aut data index {index.root}"
            ) from None


def fill(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Put items into the fewest bins that `fill` finds to hold them, all nearly equally full, none above the budget.

    Returns:
        For each bin the numbers of its items, ascending.
    """
    descending = np.argsort(-lengths, kind="stable")
    bins = max(1, -(-int(lengths.sum()) // budget))
    while True:
        heap = [(0, number) for number in range(bins)]
        chosen = np.empty(len(lengths), dtype=np.int64)
        for item, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
            filled, number = heap[0]
            heapq.heapreplace(heap, (filled + length, number))
            chosen[item] = number
        if max(heap)[0] <= budget or bins >= len(lengths):
            return [
                items
                for items in (np.flatnonzero(chosen == number) for number in range(bins))
                if len(items)
            ]
        bins += 1


def _boundary(order: Order, position: int, stop: int) -> int:
    """Return `stop`, or the end of the epoch or order that comes before it."""
    if order.epoch_clips:
        stop = min(stop, (position // order.epoch_clips + 1) * order.epoch_clips)
    return stop if order.end is None else min(stop, order.end)


def _mean_seconds(order: ShuffledOrder, indexes: Sequence[ShardIndex]) -> float:
    shares = [
        index.samples if order.epoch_clips else shape.share
        for index, shape in zip(indexes, order.sources, strict=True)
    ]
    means = [index.seconds / max(1, index.samples) for index in indexes]
    return sum(share * mean for share, mean in zip(shares, means, strict=True)) / sum(shares)
