"""The order of clips in training and validation, and how it is cut into micro-batches.

An order is a pure function of (seed, position). It does not depend on workers, ranks or timing, so
a run can resume at any position and see the same clips as an uninterrupted run.

Each position first selects a source: either by the source's weight, without end (`MixtureOrder`),
or so that every epoch contains every clip of all sources exactly once (`EpochOrder`). Within a
source, the n-th draw takes the n-th clip of an endless sequence of epochs. Each epoch contains
every clip once, with the shards in a new order and the clips shuffled within consecutive windows,
so that shards are read almost sequentially.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from whisper_aut.data.reader import DEFAULT_POLICY, ReadPolicy
from whisper_aut.data.shards import UNKNOWN_MS, ShardIndex
from whisper_aut.errors import UserError

CHUNK_DRAWS = 1 << 16
# Each use of randomness has its own key, so that the random streams are independent.
_SHARD_ORDER, _WINDOW_ORDER, _MIXTURE, _INTERLEAVE = 1, 2, 3, 4


@dataclass(frozen=True)
class SourceShape:
    """The metadata of a source that determines the order.

    Attributes:
        name: identifies the source.
        shard_samples: number of samples in each shard.
        weight: weight of the source in the mixture.
    """

    name: str
    shard_samples: tuple[int, ...]
    weight: float = 1.0

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.shard_samples)


class Order(Protocol):
    """An order of clips over sources."""

    @property
    def sources(self) -> Sequence[SourceShape]:
        """The sources; `draws` refers to them by index."""
        ...

    @property
    def epoch_clips(self) -> int | None:
        """Positions per epoch, or None if the order has no epochs. No batch spans two epochs."""
        ...

    @property
    def end(self) -> int | None:
        """Number of positions, or None for an endless order."""
        ...

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clips at positions `start` to `stop - 1`.

        Returns:
            Source indices, and running numbers within those sources. A running number counts the
            draws of its source from the beginning of the order, across epochs.
        """
        ...

    def window(self, source: int, number: int) -> tuple[int, int]:
        """Return the range `[first, last)` of running numbers of the window that has `number`."""
        ...

    def locate(self, source: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the clips of one window are stored.

        Args:
            source: index of the source.
            first, last: the window, as `window` returns it.

        Returns:
            Shard indices, and sample indices within those shards, for the running numbers `first`
            to `last - 1`.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash that changes whenever the order does."""
        ...


class ShuffledOrder:
    """Base class of the training orders.

    It draws sources in chunks of positions and shuffles each source again in every epoch.

    Args:
        sources: the sources, at least one of them with samples; weights are normalised.
        seed: the only source of randomness.
        window: clips per shuffle window.
    """

    def __init__(self, sources: Sequence[SourceShape], seed: int, window: int):
        self.epoch_clips: int | None = None
        self.end: int | None = None
        self.sources, self.seed, self.window_clips = tuple(sources), seed, window
        # `_counts[i]`: draws of each source before chunk i.
        self._counts = [np.zeros(len(sources), dtype=np.int64)]

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        stop = stop if self.end is None else min(stop, self.end)
        numbers = range(self._chunk_of(start), self._chunk_of(max(start, stop - 1)) + 1)
        parts = [self._chunk(number) for number in numbers]
        offset = self._chunk_start(numbers.start)
        within = slice(start - offset, max(start, stop) - offset)
        return tuple(np.concatenate(column)[within] for column in zip(*parts, strict=True))  # pyright: ignore[reportReturnType]

    def draw_counts(self, position: int) -> np.ndarray:
        """Return how many clips of each source come before a position."""
        number = self._chunk_of(position)
        sources = self._chunk_sources(number)[: position - self._chunk_start(number)]
        return self._count(number) + np.bincount(sources, minlength=len(self.sources))

    def window(self, source: int, number: int) -> tuple[int, int]:
        samples = self.sources[source].samples
        epoch, place = divmod(number, samples)
        first = place // self.window_clips * self.window_clips
        return epoch * samples + first, epoch * samples + min(first + self.window_clips, samples)

    def locate(self, source: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        shape = self.sources[source]
        epoch, place = divmod(first, shape.samples)
        shards = self._random(_SHARD_ORDER, source, epoch).permutation(len(shape.shard_samples))
        row = np.arange(place, place + last - first)
        self._random(_WINDOW_ORDER, source, epoch, place).shuffle(row)
        ends = np.cumsum(np.array(shape.shard_samples)[shards])
        turn = np.searchsorted(ends, row, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        return shards[turn], row - starts[turn]

    def fingerprint(self) -> str:
        return _fingerprint(self.sources, self.seed, self.window_clips)

    def _chunk_of(self, position: int) -> int:
        return position // CHUNK_DRAWS

    def _chunk_start(self, number: int) -> int:
        return number * CHUNK_DRAWS

    def _chunk_sources(self, number: int) -> np.ndarray:
        raise AssertionError("each order draws its own way")

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source indices and running numbers of one chunk of positions."""
        sources = self._chunk_sources(number)
        numbers = np.empty(len(sources), dtype=np.int64)
        for source, before in enumerate(self._count(number)):
            drawn = np.flatnonzero(sources == source)
            numbers[drawn] = before + np.arange(len(drawn))
        return sources, numbers

    def _count(self, number: int) -> np.ndarray:
        while len(self._counts) <= number:
            passed = self._chunk_sources(len(self._counts) - 1)
            self._counts.append(self._counts[-1] + np.bincount(passed, minlength=len(self.sources)))
        return self._counts[number]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


class MixtureOrder(ShuffledOrder):
    """The endless training order, which draws sources by weight."""

    def __init__(self, sources: Sequence[SourceShape], seed: int, window: int):
        super().__init__(sources, seed, window)
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        self._edges = np.cumsum(weights / weights.sum())

    @lru_cache(maxsize=4)  # noqa: B019 — an order lives as long as its run
    def _chunk_sources(self, number: int) -> np.ndarray:
        uniform = self._random(_MIXTURE, number).random(CHUNK_DRAWS)
        return np.minimum(
            np.searchsorted(self._edges, uniform, side="right"), len(self.sources) - 1
        )


class EpochOrder(ShuffledOrder):
    """The finite training order: every epoch contains every clip of every source once.

    Sources are mixed evenly over the epoch; their weights are ignored. The number of clips that a
    chunk takes from each source is drawn without replacement from the clips that remain in the
    epoch. The whole epoch is thus shuffled, although only chunks are kept in memory.
    """

    def __init__(self, sources: Sequence[SourceShape], seed: int, window: int, epochs: int):
        super().__init__(sources, seed, window)
        self._samples = np.array([source.samples for source in sources], dtype=np.int64)
        self._clips = int(self._samples.sum())
        self.epoch_clips, self.end = self._clips, epochs * self._clips
        self._per_epoch = -(-self._clips // CHUNK_DRAWS)

    def fingerprint(self) -> str:
        return _fingerprint(self.sources, self.seed, self.window_clips, self._per_epoch, -1)

    def _chunk_of(self, position: int) -> int:
        epoch, place = divmod(position, self._clips)
        return epoch * self._per_epoch + place // CHUNK_DRAWS

    def _chunk_start(self, number: int) -> int:
        epoch, chunk = divmod(number, self._per_epoch)
        return epoch * self._clips + chunk * CHUNK_DRAWS

    @lru_cache(maxsize=4)  # noqa: B019 — an order lives as long as its run
    def _chunk_sources(self, number: int) -> np.ndarray:
        epoch = number // self._per_epoch
        left = (epoch + 1) * self._samples - self._count(number)
        random = self._random(_INTERLEAVE, number)
        taken = random.multivariate_hypergeometric(
            left, min(CHUNK_DRAWS, int(left.sum())), method="marginals"
        )
        sources = np.repeat(np.arange(len(self.sources)), taken)
        random.shuffle(sources)
        return sources


class SequentialOrder:
    """The finite validation order: one source after another, unshuffled, in shard order.

    Args:
        sources: the sources; may be empty.
        window: clips that are read together.
        limit: use only this many clips from the beginning of each source; None for all.
    """

    epoch_clips: int | None = None

    def __init__(self, sources: Sequence[SourceShape], window: int, limit: int | None = None):
        self.sources, self.window_clips = tuple(sources), window
        self._ends = np.cumsum(
            [
                min(source.samples, limit) if limit is not None else source.samples
                for source in sources
            ]
        )
        self.end = len(self)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, min(stop, len(self)))
        sources = np.searchsorted(self._ends, positions, side="right")
        return sources, positions - np.concatenate([[0], self._ends])[sources]

    def window(self, source: int, number: int) -> tuple[int, int]:
        first = number // self.window_clips * self.window_clips
        return first, min(first + self.window_clips, self.sources[source].samples)

    def locate(self, source: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum(self.sources[source].shard_samples)
        row = np.arange(first, last)
        shards = np.searchsorted(ends, row, side="right")
        return shards, row - np.concatenate([[0], ends])[shards]

    def fingerprint(self) -> str:
        return _fingerprint(self.sources, int(self._ends[-1]))


def mixture_weights(
    domains: Sequence[str],
    weights: Sequence[float],
    domain_weights: dict[str, float],
    temperature: float = 1.0,
) -> list[float]:
    """Return the weight of each source in the mixture.

    The weight of a domain is divided among its sources in proportion to their own weights.

    Args:
        domains: domain of each source.
        weights: weight of each source within its domain.
        domain_weights: weight of each domain; normalised over the domains that have sources.
        temperature: both kinds of weights are raised to the power `1 / temperature`. Values above 1
            draw small domains and sources more often and approach a uniform mixture.

    Returns:
        One weight per source; 0 if its domain has no weight.
    """
    weights = [weight ** (1 / temperature) for weight in weights]
    flattened = {
        domain: weight ** (1 / temperature) for domain, weight in domain_weights.items() if weight
    }
    whole = math.fsum(weight for domain, weight in flattened.items() if domain in domains)
    totals: dict[str, float] = {}
    for domain, weight in zip(domains, weights, strict=True):
        totals[domain] = totals.get(domain, 0.0) + weight
    return [
        flattened.get(domain, 0.0) / whole * weight / totals[domain]
        if totals[domain] and whole
        else 0.0
        for domain, weight in zip(domains, weights, strict=True)
    ]


def _fingerprint(sources: Sequence[SourceShape], *numbers: int) -> str:
    listing = [[source.name, source.shard_samples, source.weight] for source in sources]
    return hashlib.sha256(json.dumps([listing, numbers]).encode()).hexdigest()[:16]


# About this many batches are planned together, which spreads the unused part of the last batch over
# all of them.
CHUNK_BATCHES = 64
TABLES_HELD = 512
_BATCH_ORDER = 5


class Cursor(NamedTuple):
    """A point between two micro-batches.

    Attributes:
        position: position at which the current chunk begins.
        taken: batches of that chunk that come before the cursor.
    """

    position: int = 0
    taken: int = 0


class Batching(Protocol):
    """Cuts an order into micro-batches."""

    @property
    def span_batches(self) -> int:
        """Batches that a worker looks ahead, so that it reads each window in one pass."""
        ...

    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        """Return the batches of the chunk that begins at `position`, and where the next one begins.

        Each batch is an array of positions.
        """
        ...

    def count(self, cursor: Cursor, end: int) -> int:
        """Return the number of micro-batches between a cursor and position `end`."""
        ...

    def fingerprint(self) -> str:
        """Return a string that identifies the settings a cursor inside a chunk depends on."""
        ...


def batches_from(
    batching: Batching, cursor: Cursor, end: int | None
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Yield micro-batches from a cursor up to position `end`, each with the cursor after it."""
    position, taken = cursor
    while end is None or position < end:
        batches, following = batching.chunk(position)
        for number in range(taken, len(batches)):
            next_cursor = (
                Cursor(following) if number + 1 == len(batches) else Cursor(position, number + 1)
            )
            yield batches[number], next_cursor
        position, taken = following, 0


@dataclass(frozen=True)
class ByClips:
    """Micro-batches of a fixed number of clips; the last one of an epoch may be smaller."""

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
        # Each chunk is one batch, so a cursor is only a position and depends on no setting.
        return "clips"


class BySeconds:
    """Micro-batches with a limit on their seconds of audio.

    Args:
        order: a training order.
        indexes: the shards of its sources; they must have sample tables.
        seconds: the most audio per batch; at least `longest_seconds`.
        longest_seconds: the longest clip that is accepted. Longer clips are skipped later and are
            planned with this length, as are clips of unknown length.
        policy: retries and timeouts for reading the tables.
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
        # Without this shuffle, the batches with the longest clips would come first.
        turns = np.random.default_rng([self.order.seed, _BATCH_ORDER, position]).permutation(
            len(batches)
        )
        return [position + batches[turn] for turn in turns], following

    def count(self, cursor: Cursor, end: int) -> int:
        return sum(1 for _ in batches_from(self, cursor, end))

    def fingerprint(self) -> str:
        return f"seconds {self.budget_ms} {self.longest_ms} {self.chunk_clips}"

    def lengths_ms(self, start: int, stop: int) -> np.ndarray:
        """Return the lengths in ms of the clips at positions `start` to `stop - 1`."""
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
        shards, ordinals = self.order.locate(source, *self.order.window(source, first))
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
                f"The lengths of {index.url(shard)} cannot be read ({error}), "
                "and data.batch_seconds plans by them. "
                f"Make them anew: whisper-aut data index {index.root}"
            ) from None


def fill(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Distribute items over as few bins as the heuristic finds, all of them nearly equally full.

    Items are placed longest first, each into the emptiest bin. If a bin then exceeds the budget,
    the items are placed again with one more bin.

    Args:
        lengths: length of each item, none above the budget.
        budget: the most that a bin may contain.

    Returns:
        For each bin, the indices of its items in ascending order.
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
    """Return `stop`, or the end of the epoch or of the order if that comes first."""
    if order.epoch_clips:
        stop = min(stop, (position // order.epoch_clips + 1) * order.epoch_clips)
    return stop if order.end is None else min(stop, order.end)


def _mean_seconds(order: ShuffledOrder, indexes: Sequence[ShardIndex]) -> float:
    weights = [
        index.samples if order.epoch_clips else shape.weight
        for index, shape in zip(indexes, order.sources, strict=True)
    ]
    means = [index.seconds / max(1, index.samples) for index in indexes]
    return sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)
