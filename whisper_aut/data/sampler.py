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
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from whisper_aut.data.reader import DEFAULT_POLICY, ReadPolicy
from whisper_aut.data.shards import UNKNOWN_MS, ShardIndex
from whisper_aut.errors import UserError

CHUNK_DRAWS = 1 << 16
# About this many batches are planned together, which spreads the unused part of the last batch over
# all of them.
CHUNK_BATCHES = 64
MAX_CACHED_TABLES = 512
# Each use of randomness has its own key, so that the random streams are independent.
_SHARD_ORDER, _WINDOW_ORDER, _MIXTURE, _INTERLEAVE, _BATCH_ORDER = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class SourceShape:
    """The metadata of a source that determines the order."""

    name: str
    shard_samples: tuple[int, ...]  # number of samples in each shard
    weight: float = 1.0  # in the mixture

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.shard_samples)


class Order(ABC):
    """An order of clips over sources.

    Attributes:
        sources: the sources; `draws` refers to them by index.
        window_clips: clips per window of a source.
        epoch_clips: positions per epoch, or None if there are no epochs. No batch spans two epochs.
        end: number of positions, or None for an endless order.
    """

    epoch_clips: int | None = None
    end: int | None = None

    def __init__(self, sources: Sequence[SourceShape], window: int):
        self.sources, self.window_clips = tuple(sources), window

    @abstractmethod
    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clips at positions `start` to `stop - 1`.

        Returns:
            Source indices, and running numbers within those sources. A running number counts the
            draws of its source from the beginning of the order, across epochs.
        """

    @abstractmethod
    def locate(self, source: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where the clips of one window (see `window`) of a source are stored.

        Returns:
            Shard indices, and sample indices within those shards, for the running numbers `first`
            to `last - 1`.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the order does."""

    def window(self, source: int, number: int) -> tuple[int, int]:
        """Return the range `[first, last)` of running numbers of the window that has `number`."""
        samples = self.sources[source].samples
        epoch, index = divmod(number, samples)
        first = index // self.window_clips * self.window_clips
        return epoch * samples + first, epoch * samples + min(first + self.window_clips, samples)


class ShuffledOrder(Order):
    """Base class of the training orders.

    It draws sources in chunks of positions and shuffles each source again in every epoch.

    Args:
        sources: the sources, at least one of them with samples; weights are normalised.
        seed: the only source of randomness.
        window: clips per shuffle window.
    """

    def __init__(self, sources: Sequence[SourceShape], seed: int, window: int):
        super().__init__(sources, window)
        self.seed = seed
        # `_counts[i]`: draws of each source before chunk i.
        self._counts = [np.zeros(len(sources), dtype=np.int64)]

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        stop = stop if self.end is None else min(stop, self.end)
        chunks = range(self._chunk_of(start), self._chunk_of(max(start, stop - 1)) + 1)
        sources, numbers = zip(*(self._chunk(chunk) for chunk in chunks), strict=True)
        offset = self._chunk_start(chunks.start)
        within = slice(start - offset, max(start, stop) - offset)
        return np.concatenate(sources)[within], np.concatenate(numbers)[within]

    def draw_counts(self, position: int) -> np.ndarray:
        """Return how many clips of each source come before a position."""
        chunk = self._chunk_of(position)
        sources = self._chunk_sources(chunk)[: position - self._chunk_start(chunk)]
        return self._count_before(chunk) + np.bincount(sources, minlength=len(self.sources))

    def locate(self, source: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        shape = self.sources[source]
        epoch, index = divmod(first, shape.samples)
        shards = self._random(_SHARD_ORDER, source, epoch).permutation(len(shape.shard_samples))
        indices = np.arange(index, index + last - first)
        self._random(_WINDOW_ORDER, source, epoch, index).shuffle(indices)
        which, ordinals = _split_by_shard(np.array(shape.shard_samples)[shards], indices)
        return shards[which], ordinals

    def fingerprint(self) -> str:
        return _fingerprint(self.sources, self.seed, self.window_clips)

    @abstractmethod
    def _chunk_sources(self, chunk: int) -> np.ndarray:
        """Return the source index of every position of a chunk."""

    def _chunk_of(self, position: int) -> int:
        return position // CHUNK_DRAWS

    def _chunk_start(self, chunk: int) -> int:
        return chunk * CHUNK_DRAWS

    def _chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source indices and running numbers of one chunk of positions."""
        sources = self._chunk_sources(chunk)
        numbers = np.empty(len(sources), dtype=np.int64)
        for source, before in enumerate(self._count_before(chunk)):
            drawn = np.flatnonzero(sources == source)
            numbers[drawn] = before + np.arange(len(drawn))
        return sources, numbers

    def _count_before(self, chunk: int) -> np.ndarray:
        while len(self._counts) <= chunk:
            sources = self._chunk_sources(len(self._counts) - 1)
            drawn = np.bincount(sources, minlength=len(self.sources))
            self._counts.append(self._counts[-1] + drawn)
        return self._counts[chunk]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


class MixtureOrder(ShuffledOrder):
    """The endless training order, which draws sources by weight."""

    def __init__(self, sources: Sequence[SourceShape], seed: int, window: int):
        super().__init__(sources, seed, window)
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        self._edges = np.cumsum(weights / weights.sum())

    @lru_cache(maxsize=4)  # noqa: B019 — an order lives as long as its run
    def _chunk_sources(self, chunk: int) -> np.ndarray:
        uniform = self._random(_MIXTURE, chunk).random(CHUNK_DRAWS)
        sources = np.searchsorted(self._edges, uniform, side="right")
        return np.minimum(sources, len(self.sources) - 1)


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
        self._epoch_chunks = -(-self._clips // CHUNK_DRAWS)

    def fingerprint(self) -> str:
        return _fingerprint(self.sources, self.seed, self.window_clips, self._epoch_chunks, -1)

    def _chunk_of(self, position: int) -> int:
        epoch, index = divmod(position, self._clips)
        return epoch * self._epoch_chunks + index // CHUNK_DRAWS

    def _chunk_start(self, chunk: int) -> int:
        epoch, index = divmod(chunk, self._epoch_chunks)
        return epoch * self._clips + index * CHUNK_DRAWS

    @lru_cache(maxsize=4)  # noqa: B019 — an order lives as long as its run
    def _chunk_sources(self, chunk: int) -> np.ndarray:
        epoch = chunk // self._epoch_chunks
        left = (epoch + 1) * self._samples - self._count_before(chunk)
        random = self._random(_INTERLEAVE, chunk)
        taken = random.multivariate_hypergeometric(
            left, min(CHUNK_DRAWS, int(left.sum())), method="marginals"
        )
        sources = np.repeat(np.arange(len(self.sources)), taken)
        random.shuffle(sources)
        return sources


class SequentialOrder(Order):
    """The finite validation order: one source after another, unshuffled, in shard order.

    With a `limit`, only that many clips from the beginning of each source are used.
    """

    end: int

    def __init__(self, sources: Sequence[SourceShape], window: int, limit: int | None = None):
        super().__init__(sources, window)
        most = math.inf if limit is None else limit
        sizes = [int(min(source.samples, most)) for source in sources]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.end = sum(sizes)

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, min(stop, self.end))
        sources = np.searchsorted(self._ends, positions, side="right")
        return sources, positions - np.concatenate([[0], self._ends])[sources]

    def locate(self, source: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return _split_by_shard(self.sources[source].shard_samples, np.arange(first, last))

    def fingerprint(self) -> str:
        return _fingerprint(self.sources, self.end)


def mixture_weights(
    domains: Sequence[str],
    weights: Sequence[float],
    domain_weights: Mapping[Any, float],
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
    tempered = {
        domain: weight ** (1 / temperature) for domain, weight in domain_weights.items() if weight
    }
    whole = math.fsum(weight for domain, weight in tempered.items() if domain in domains)
    totals: dict[str, float] = {}
    for domain, weight in zip(domains, weights, strict=True):
        totals[domain] = totals.get(domain, 0.0) + weight
    return [
        tempered.get(domain, 0.0) / whole * weight / totals[domain]
        if totals[domain] and whole
        else 0.0
        for domain, weight in zip(domains, weights, strict=True)
    ]


def _split_by_shard(
    shard_samples: Sequence[int] | np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard of each index into consecutive shards, and the index within that shard."""
    ends = np.cumsum(shard_samples)
    shards = np.searchsorted(ends, indices, side="right")
    return shards, indices - np.concatenate([[0], ends[:-1]])[shards]


def _fingerprint(sources: Sequence[SourceShape], *numbers: int) -> str:
    listing = [[source.name, source.shard_samples, source.weight] for source in sources]
    return hashlib.sha256(json.dumps([listing, numbers]).encode()).hexdigest()[:16]


class Cursor(NamedTuple):
    """A point between two micro-batches."""

    position: int = 0  # at which the current chunk begins
    taken: int = 0  # batches of that chunk that come before the cursor


class Batching(ABC):
    """Cuts an order into micro-batches."""

    span_batches: int  # that a worker looks ahead, so that it reads each window in one pass

    @abstractmethod
    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        """Return the batches of the chunk that begins at `position`, and where the next one begins.

        Each batch is an array of positions.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that identifies the settings a cursor inside a chunk depends on."""

    def count(self, cursor: Cursor, end: int) -> int:
        """Return the number of micro-batches between a cursor and position `end`."""
        return sum(1 for _ in batches_from(self, cursor, end))


def batches_from(
    batching: Batching, cursor: Cursor, end: int | None
) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Yield micro-batches from a cursor up to position `end`, each with the cursor after it."""
    position, taken = cursor
    while end is None or position < end:
        batches, next_position = batching.chunk(position)
        for number in range(taken, len(batches)):
            is_last = number + 1 == len(batches)
            yield (
                batches[number],
                Cursor(next_position) if is_last else Cursor(position, number + 1),
            )
        position, taken = next_position, 0


class ByClips(Batching):
    """Micro-batches of a fixed number of clips; the last one of an epoch may be smaller."""

    span_batches = 256

    def __init__(self, order: Order, clips: int):
        self.order, self.clips = order, clips

    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        next_position = _boundary(self.order, position, position + self.clips)
        return [np.arange(position, next_position)], next_position

    def count(self, cursor: Cursor, end: int) -> int:
        return -(-(end - cursor.position) // self.clips)

    def fingerprint(self) -> str:
        # Each chunk is one batch, so a cursor is only a position and depends on no setting.
        return "clips"


class BySeconds(Batching):
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
        weights = [
            index.samples if order.epoch_clips else shape.weight
            for index, shape in zip(indexes, order.sources, strict=True)
        ]
        means = [index.seconds / max(1, index.samples) for index in indexes]
        mean = sum(w * mean for w, mean in zip(weights, means, strict=True)) / sum(weights)
        self.mean_seconds = mean or longest_seconds
        self.chunk_clips = max(1, round(CHUNK_BATCHES * seconds / self.mean_seconds))

    def chunk(self, position: int) -> tuple[list[np.ndarray], int]:
        next_position = _boundary(self.order, position, position + self.chunk_clips)
        batches = fill_batches(self.lengths_ms(position, next_position), self.budget_ms)
        # Without this shuffle, the batches with the longest clips would come first.
        random = np.random.default_rng([self.order.seed, _BATCH_ORDER, position])
        shuffled = random.permutation(len(batches))
        return [position + batches[number] for number in shuffled], next_position

    def fingerprint(self) -> str:
        return f"seconds {self.budget_ms} {self.longest_ms} {self.chunk_clips}"

    def lengths_ms(self, start: int, stop: int) -> np.ndarray:
        """Return the lengths in ms of the clips at positions `start` to `stop - 1`."""
        sources, numbers = self.order.draws(start, stop)
        lengths = np.empty(len(sources), dtype=np.int64)
        windows: dict[tuple[int, int], list[int]] = {}
        draws = zip(sources.tolist(), numbers.tolist(), strict=True)
        for index, (source, number) in enumerate(draws):
            window = (source, self.order.window(source, number)[0])
            windows.setdefault(window, []).append(index)
        for (source, first), indices in windows.items():
            lengths[indices] = self._window_lengths(source, first)[numbers[indices] - first]
        return lengths

    @lru_cache(maxsize=64)  # noqa: B019 — it lives as long as its run
    def _window_lengths(self, source: int, first: int) -> np.ndarray:
        shards, ordinals = self.order.locate(source, *self.order.window(source, first))
        lengths = np.empty(len(shards), dtype=np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            lengths[chosen] = self._shard_lengths(source, int(shard))[ordinals[chosen]]
        return np.where(lengths == UNKNOWN_MS, self.longest_ms, lengths).clip(1, self.longest_ms)

    @lru_cache(maxsize=MAX_CACHED_TABLES)  # noqa: B019
    def _shard_lengths(self, source: int, shard: int) -> np.ndarray:
        index = self.indexes[source]
        try:
            return index.table(shard, self.policy).milliseconds[index.ordinals(shard)]
        except (OSError, ValueError) as error:
            raise UserError(
                f"The lengths of {index.url(shard)} cannot be read ({error}), which "
                "data.batch_seconds needs to plan batches. Write them again: "
                f"whisper-aut data index {index.root}"
            ) from None


def fill_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Distribute clips over as few batches as the heuristic finds, all nearly equally full.

    Clips are placed longest first, each into the emptiest batch. If a batch then exceeds the
    budget, the clips are placed again with one more batch. No length may exceed the budget.

    Returns:
        For each batch, the indices of its clips in ascending order.
    """
    descending = np.argsort(-lengths, kind="stable")
    count = max(1, -(-int(lengths.sum()) // budget))
    while True:
        heap = [(0, number) for number in range(count)]
        chosen = np.empty(len(lengths), dtype=np.int64)
        for clip, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
            filled, number = heap[0]
            heapq.heapreplace(heap, (filled + length, number))
            chosen[clip] = number
        if max(heap)[0] <= budget or count >= len(lengths):
            batches = [np.flatnonzero(chosen == number) for number in range(count)]
            return [clips for clips in batches if len(clips)]
        count += 1


def _boundary(order: Order, position: int, stop: int) -> int:
    """Return `stop`, or the end of the epoch or of the order if that comes first."""
    if order.epoch_clips:
        stop = min(stop, (position // order.epoch_clips + 1) * order.epoch_clips)
    return stop if order.end is None else min(stop, order.end)
