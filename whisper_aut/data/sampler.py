"""The order of clips in training and validation, and how it is cut into micro-batches.

An order is a pure function of (seed, position). It does not depend on workers, ranks or timing, so
a run can resume at any position and see the same clips as an uninterrupted run.

The training order consists of P partitions with an order of their own, which take turns:
micro-batch m comes from partition m mod P. In every epoch of a source, its shards are shuffled and
laid end to end, and each partition gets one of P equal parts of this sequence: in epoch e,
partition k gets part (k + e) mod P. It shuffles the clips within consecutive windows of its part,
so every partition reads bytes in sequence, and no other partition reads the same bytes. MosaicML
Streaming's canonical nodes are a similar idea (https://docs.mosaicml.com/projects/streaming).

Each position of a partition first selects a source: either by the source's weight, without end
(`MixtureOrder`), or so that every epoch contains every clip of all sources exactly once
(`EpochOrder`). The n-th draw of a source takes the n-th clip of the partition's parts of it.
"""

import hashlib
import heapq
import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from whisper_aut.data.shards import UNKNOWN_MS, ShardIndex
from whisper_aut.errors import UserError

CHUNK_DRAWS = 1 << 16  # over all partitions
MIN_CHUNK_DRAWS = 1 << 10
# About this many batches of a partition are planned together, which spreads the unused part of the
# last batch over all of them.
CHUNK_BATCHES = 64
MAX_CACHED_TABLES = 4096
# Windows of a partition are at least this large, so that a window is one large request. Data that
# is too small for P partitions of `PARTITION_BYTES` has fewer of them.
WINDOW_BYTES, PARTITION_BYTES = 16 << 20, 128 << 20
# Each use of randomness has its own key, so that the random streams are independent.
_SHARD_ORDER, _WINDOW_ORDER, _MIXTURE, _INTERLEAVE, _BATCH_ORDER = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class SourceShape:
    """The metadata of a source that determines the order."""

    name: str
    shard_samples: tuple[int, ...]  # number of samples in each shard
    weight: float = 1.0  # in the mixture
    sample_bytes: float = 0.0  # mean size of a sample in a shard; 0 if unknown

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.shard_samples)


def usable_partitions(partitions: int, total_bytes: int) -> int:
    """Return the largest divisor of `partitions` that the data is large enough for."""
    most = max(1, total_bytes // PARTITION_BYTES)
    return max(n for n in range(1, partitions + 1) if partitions % n == 0 and n <= most)


@dataclass(frozen=True)
class MixedPadding:
    """Draws the training clips that are padded to 30 s, by their numbers (`Order.clip_number`)."""

    probability: float
    seed: int

    def __call__(self, number: int) -> bool:
        # Seeded with a string: unlike `hash`, it gives the same result in every process.
        draw = random.Random(f"padding {self.seed} {number}").random()
        return draw < self.probability


class Order(ABC):
    """An order of clips over sources. Positions count the clips of one partition.

    Args:
        sources: the sources, at least one of them with samples; `draws` refers to them by index.
        seed: the only source of randomness; None for sources that are not shuffled.
        window: clips of a source that are shuffled together, over all partitions.
        partitions: number of partitions.

    Attributes:
        windows: clips per window of each source in a partition.
        epoch_clips: positions per epoch, or None if there are no epochs. No batch spans two epochs.
        end: number of positions, or None for an endless order.
    """

    epoch_clips: int | None = None
    end: int | None = None

    def __init__(
        self, sources: Sequence[SourceShape], seed: int | None, window: int, partitions: int = 1
    ):
        self.sources, self.seed, self.partitions = tuple(sources), seed, partitions
        self.windows = [window] * len(sources)
        if partitions > 1:
            self.windows = [
                max(
                    math.ceil(window / partitions),
                    math.ceil(WINDOW_BYTES / source.sample_bytes) if source.sample_bytes else 1,
                )
                for source in sources
            ]
        self._window = window
        # Positions are drawn in chunks of this size.
        self.chunk_draws = max(MIN_CHUNK_DRAWS, CHUNK_DRAWS // partitions)
        # `_counts[k][i]`: draws of each source by partition k before chunk i.
        self._counts = [[np.zeros(len(sources), dtype=np.int64)] for _ in range(partitions)]
        # The last two chunks of each partition, with their numbers.
        self._chunks: dict[tuple[int, int], tuple[int, tuple[np.ndarray, np.ndarray]]] = {}

    @abstractmethod
    def clips_end(self, partition: int, position: int) -> int | None:
        """Return the position after a partition's last clip in the epoch of `position`.

        It may come before the end of the epoch: parts of a source differ by up to one clip. None in
        an endless order.
        """

    @abstractmethod
    def _chunk_sources(self, partition: int, chunk: int) -> np.ndarray:
        """Return the source index of every position of a chunk of a partition."""

    def draws(self, partition: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the clips of a partition at positions `start` to `stop - 1` of one epoch.

        There are fewer at the end of an epoch or of the order, see `clips_end`.

        Returns:
            Source indices, and running numbers within those sources. A running number counts the
            draws of its source by this partition from the beginning of the order, across epochs.
        """
        stop = stop if self.end is None else min(stop, self.end)
        chunks = range(self._chunk_of(start), self._chunk_of(max(start, stop - 1)) + 1)
        parts = [self._chunk(partition, chunk) for chunk in chunks]
        sources, numbers = zip(*parts, strict=True)
        offset = self._chunk_start(chunks.start)
        within = slice(start - offset, max(start, stop) - offset)
        return np.concatenate(sources)[within], np.concatenate(numbers)[within]

    def clip_number(self, partition: int, position: int) -> int:
        """Return a number that no other clip of the run has."""
        return position * self.partitions + partition

    def draw_counts(self, partition: int, position: int) -> np.ndarray:
        """Return how many clips of each source a partition draws before a position."""
        chunk = self._chunk_of(position)
        sources, _ = self._chunk(partition, chunk)
        drawn = sources[: position - self._chunk_start(chunk)]
        before = self._count_before(partition, chunk)
        return before + np.bincount(drawn, minlength=len(self.sources))

    def window(self, partition: int, source: int, number: int) -> tuple[int, int]:
        """Return the range `[first, last)` of running numbers of the window that has `number`."""
        start, index, part = self._sequence_index(partition, source, number)
        samples, size = self.sources[source].samples, self.windows[source]
        begin, end = (samples * edge // self.partitions for edge in (part, part + 1))
        first = begin + (index - begin) // size * size
        return first - start, min(first + size, end) - start

    def locate(
        self, partition: int, source: int, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the clips of one window (see `window`) of a source are stored.

        Returns:
            Shard indices, and sample indices within those shards, for the running numbers `first`
            to `last - 1`.
        """
        _, index, part = self._sequence_index(partition, source, first)
        epoch, index = part - partition, index % self.sources[source].samples
        shards, ends = self._shard_order(source, epoch)
        indices = np.arange(index, index + last - first)
        if self.seed is not None:
            self.random(_WINDOW_ORDER, source, epoch, index).shuffle(indices)
        which = np.searchsorted(ends[1:], indices, side="right")
        return shards[which], indices - ends[which]

    def fingerprint(self) -> str:
        """Return a hash that changes whenever the order does."""
        sources = [[source.name, source.shard_samples, source.weight] for source in self.sources]
        listing = [sources, self.seed, self._window, self.partitions, self.epoch_clips]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]

    def _sequence_index(self, partition: int, source: int, number: int) -> tuple[int, int, int]:
        """Return the index of a clip in the endless sequence of its source.

        The sequence has P parts per epoch. Partition k begins at part k and takes one part in each
        epoch, so it goes through the parts in turn.

        Returns:
            The index at which the partition begins, the index of `number`, and its part.
        """
        samples = self.sources[source].samples
        start = samples * partition // self.partitions
        index = start + number
        return start, index, ((index + 1) * self.partitions - 1) // samples

    @lru_cache(maxsize=64)  # noqa: B019 — an order lives as long as its run
    def _shard_order(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of an epoch in their order, and where each begins in that sequence."""
        samples = np.array(self.sources[source].shard_samples)
        shards = np.arange(len(samples))
        if self.seed is not None:
            self.random(_SHARD_ORDER, source, epoch).shuffle(shards)
        return shards, np.concatenate([[0], np.cumsum(samples[shards])])

    def _chunk_of(self, position: int) -> int:
        return position // self.chunk_draws

    def _chunk_start(self, chunk: int) -> int:
        return chunk * self.chunk_draws

    def _chunk(self, partition: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source indices and running numbers of one chunk of positions."""
        number, cached = self._chunks.get((partition, chunk % 2), (-1, None))
        if cached is not None and number == chunk:
            return cached
        sources = self._chunk_sources(partition, chunk)
        numbers = np.empty(len(sources), dtype=np.int64)
        for source, before in enumerate(self._count_before(partition, chunk)):
            drawn = np.flatnonzero(sources == source)
            numbers[drawn] = before + np.arange(len(drawn))
        self._chunks[partition, chunk % 2] = chunk, (sources, numbers)
        return sources, numbers

    def _count_before(self, partition: int, chunk: int) -> np.ndarray:
        counts = self._counts[partition]
        while len(counts) <= chunk:
            sources = self._chunk_sources(partition, len(counts) - 1)
            counts.append(counts[-1] + np.bincount(sources, minlength=len(self.sources)))
        return counts[chunk]

    def random(self, *key: int) -> np.random.Generator:
        """Return an independent random generator for each key."""
        return np.random.default_rng([self.seed or 0, *key])


class MixtureOrder(Order):
    """The endless training order, which draws sources by weight.

    `schedule` holds other weights of the sources, each after a number of clips of all partitions.
    """

    def __init__(
        self,
        sources: Sequence[SourceShape],
        seed: int,
        window: int,
        partitions: int = 1,
        schedule: Sequence[tuple[int, Sequence[float]]] = (),
    ):
        super().__init__(sources, seed, window, partitions)
        self.schedule = [(0, [source.weight for source in sources]), *schedule]
        weights = np.array([weights for _, weights in self.schedule], dtype=np.float64)
        self._edges = np.cumsum(weights / weights.sum(1, keepdims=True), 1)
        # The positions of a partition at which the weights change.
        self._changes = [-(-clips // partitions) for clips, _ in schedule]

    def clips_end(self, partition: int, position: int) -> int | None:
        return None

    def _chunk_sources(self, partition: int, chunk: int) -> np.ndarray:
        uniform = self.random(_MIXTURE, chunk, partition).random(self.chunk_draws)
        begin = self._chunk_start(chunk)
        bounds = np.clip([begin, *self._changes], begin, begin + self.chunk_draws) - begin
        parts = np.split(uniform, bounds[1:])
        drawn = [
            np.searchsorted(edges, part, side="right")
            for edges, part in zip(self._edges, parts, strict=True)
        ]
        return np.minimum(np.concatenate(drawn), len(self.sources) - 1)

    def fingerprint(self) -> str:
        if not self._changes:
            return super().fingerprint()
        listing = json.dumps([super().fingerprint(), self.schedule])
        return hashlib.sha256(listing.encode()).hexdigest()[:16]


class EpochOrder(Order):
    """The finite training order: every epoch contains every clip of every source once.

    Sources are mixed evenly over the epoch; their weights are ignored. The number of clips that a
    chunk takes from each source is drawn without replacement from the clips that remain in the
    epoch. The whole epoch is thus shuffled, although only chunks are kept in memory.
    """

    epoch_clips: int
    end: int

    def __init__(
        self,
        sources: Sequence[SourceShape],
        seed: int,
        window: int,
        epochs: int,
        partitions: int = 1,
    ):
        super().__init__(sources, seed, window, partitions)
        self._samples = np.array([source.samples for source in sources], dtype=np.int64)
        # Parts are rounded up; `clips_end` is where the clips of a partition really end.
        self.epoch_clips = int((-(-self._samples // partitions)).sum())
        self.end = epochs * self.epoch_clips
        self._epoch_chunks = -(-self.epoch_clips // self.chunk_draws)

    def clips_end(self, partition: int, position: int) -> int:
        epoch = position // self.epoch_clips
        drawn = self._drawn(partition, epoch + 1) - self._drawn(partition, epoch)
        return epoch * self.epoch_clips + int(drawn.sum())

    def _drawn(self, partition: int, epochs: int) -> np.ndarray:
        """Return how many clips of each source a partition has in its first epochs."""
        parts = (self._samples * (partition + epochs), self._samples * partition)
        return parts[0] // self.partitions - parts[1] // self.partitions

    def _chunk_of(self, position: int) -> int:
        epoch, index = divmod(position, self.epoch_clips)
        return epoch * self._epoch_chunks + index // self.chunk_draws

    def _chunk_start(self, chunk: int) -> int:
        epoch, index = divmod(chunk, self._epoch_chunks)
        return epoch * self.epoch_clips + index * self.chunk_draws

    def _chunk_sources(self, partition: int, chunk: int) -> np.ndarray:
        epoch = chunk // self._epoch_chunks
        left = self._drawn(partition, epoch + 1) - self._count_before(partition, chunk)
        random = self.random(_INTERLEAVE, chunk, partition)
        taken = random.multivariate_hypergeometric(
            left, min(self.chunk_draws, int(left.sum())), method="marginals"
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
        if limit is not None:
            cut = [np.minimum(np.cumsum((0, *one.shard_samples)), limit) for one in sources]
            sources = [
                replace(source, shard_samples=tuple(np.diff(ends).tolist()))
                for source, ends in zip(sources, cut, strict=True)
            ]
        super().__init__(sources, None, window)
        self._ends = np.cumsum([source.samples for source in sources], dtype=np.int64)
        self.end = sum(source.samples for source in sources)

    def clips_end(self, partition: int, position: int) -> int:
        return self.end

    def _chunk_sources(self, partition: int, chunk: int) -> np.ndarray:
        start = self._chunk_start(chunk)
        positions = np.arange(start, min(start + self.chunk_draws, self.end))
        return np.searchsorted(self._ends, positions, side="right")


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


class Cursor(NamedTuple):
    """A point between two micro-batches."""

    position: int = 0  # at which the current chunk begins, in every partition
    taken: int = 0  # batches of that chunk that come before the cursor


class MicroBatch(NamedTuple):
    """The clips of one micro-batch."""

    partition: int
    positions: Sequence[int] | np.ndarray  # in that partition, ascending


class Batching(ABC):
    """Cuts an order into micro-batches. A chunk has equally many batches of each partition.

    Attributes:
        chunk_clips: clips of each partition in a chunk, unless its epoch ends before.
    """

    order: Order
    chunk_clips: int

    @abstractmethod
    def chunk(self, position: int) -> tuple[list[MicroBatch], int]:
        """Return the batches of the chunk that begins at `position`, and where the next one begins.

        Partitions take turns. At the end of an epoch, those without clips are left out.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that identifies the settings a cursor inside a chunk depends on."""

    def next_chunk(self, position: int) -> int:
        """Return where the chunk after the one at `position` begins.

        No chunk spans the end of an epoch or of the order.
        """
        stop, order = position + self.chunk_clips, self.order
        if order.epoch_clips:
            stop = min(stop, (position // order.epoch_clips + 1) * order.epoch_clips)
        return stop if order.end is None else min(stop, order.end)

    def count(self, cursor: Cursor, end: int) -> int:
        """Return the number of micro-batches between a cursor and position `end`."""
        return sum(1 for _ in batches_from(self, cursor, end))


def batches_from(
    batching: Batching, cursor: Cursor, end: int | None
) -> Iterator[tuple[MicroBatch, Cursor]]:
    """Yield micro-batches from a cursor up to position `end`, each with the cursor after it."""
    position, taken = cursor
    while end is None or position < end:
        batches, next_position = batching.chunk(position)
        for number in range(taken, len(batches)):
            is_last = number + 1 == len(batches)
            after = Cursor(next_position) if is_last else Cursor(position, number + 1)
            yield batches[number], after
        position, taken = next_position, 0


class ByClips(Batching):
    """Micro-batches of a fixed number of clips.

    The last one of a partition in an epoch may be smaller.
    """

    def __init__(self, order: Order, clips: int):
        self.order, self.clips = order, clips
        self.chunk_clips = clips

    def chunk(self, position: int) -> tuple[list[MicroBatch], int]:
        next_position = self.next_chunk(position)
        ranges = _clip_ranges(self.order, position, next_position)
        batches = [MicroBatch(partition, positions) for partition, positions in ranges]
        return [batch for batch in batches if len(batch.positions)], next_position

    def count(self, cursor: Cursor, end: int) -> int:
        if cursor.position >= end:
            return 0
        ranges = _clip_ranges(self.order, cursor.position, end)
        return sum(-(-len(positions) // self.clips) for _, positions in ranges) - cursor.taken

    def fingerprint(self) -> str:
        # A chunk of a single partition is one batch, so a cursor depends on no setting.
        return f"clips {self.clips}" if self.order.partitions > 1 else "clips"


@dataclass(frozen=True)
class TokenLimit:
    """The most tokens of a batch, and the line that predicts those of a clip.

    Attributes:
        tokens: the limit.
        lines: of each source: tokens per text byte, and tokens of a clip without text.
    """

    tokens: int
    lines: tuple[tuple[float, float], ...]


class BySeconds(Batching):
    """Micro-batches with a limit on their seconds of audio, and perhaps on their tokens.

    Every chunk takes the same number of clips from all partitions, and cuts them into equally many
    batches: as many as the partition with the most audio needs.

    Args:
        order: a training order.
        indexes: the shards of its sources; they must have sample tables.
        seconds: maximum seconds of audio per batch; at least `longest_seconds`.
        longest_seconds: the longest clip that is accepted. Longer clips are skipped later and are
            planned with this length, as are clips of unknown length.
        padding: draws clips that count as `padded_seconds`; None for none.
        tokens: limit on the tokens. A clip then counts as its fraction of the limit that it takes
            up more of.
    """

    def __init__(
        self,
        order: Order,
        indexes: Sequence[ShardIndex],
        seconds: float,
        longest_seconds: float,
        padding: MixedPadding | None = None,
        padded_seconds: float = 30.0,
        tokens: TokenLimit | None = None,
    ):
        self.padding, self.padded_ms = padding, round(padded_seconds * 1000)
        self.tokens = tokens
        self.order, self.indexes = order, tuple(indexes)
        self.budget_ms, self.longest_ms = round(seconds * 1000), round(longest_seconds * 1000)
        weights = [
            index.samples if order.epoch_clips else shape.weight
            for index, shape in zip(indexes, order.sources, strict=True)
        ]
        means = [index.seconds / max(1, index.samples) for index in indexes]
        if tokens:
            shards = [index.first_shard for index in indexes]
            first = [self._shard_lengths(n, shard).max(0) for n, shard in enumerate(shards)]
            means = [lengths.sum() / max(1, len(lengths)) / 1000 for lengths in first]
        mean = sum(w * mean for w, mean in zip(weights, means, strict=True)) / sum(weights)
        self.mean_seconds = mean or longest_seconds
        if padding:
            self.mean_seconds += padding.probability * (padded_seconds - self.mean_seconds)
        self.chunk_clips = max(1, round(CHUNK_BATCHES * seconds / self.mean_seconds))

    def chunk(self, position: int) -> tuple[list[MicroBatch], int]:
        next_position = self.next_chunk(position)
        ranges = _clip_ranges(self.order, position, next_position)
        lengths = [self.lengths_ms(k, position, position + len(clips)) for k, clips in ranges]
        filled = [fill_batches(each, self.budget_ms) for each in lengths]
        count = max(map(len, filled))
        turns: list[list[MicroBatch]] = [[] for _ in range(count)]
        for partition, batches in enumerate(filled):
            if 0 < len(batches) < count:
                batches = fill_batches(lengths[partition], self.budget_ms, count)
            # Without this shuffle, the batches with the longest clips would come first.
            random = self.order.random(_BATCH_ORDER, position, partition)
            shuffled = random.permutation(len(batches))
            for turn, number in zip(turns, shuffled, strict=False):
                turn.append(MicroBatch(partition, position + batches[number]))
        return [batch for turn in turns for batch in turn], next_position

    def fullness(self, position: int) -> float:
        """Return the mean fraction of the limit that the batches of a chunk use."""
        batches, stop = self.chunk(position)
        ranges = _clip_ranges(self.order, position, stop)
        used = sum(int(self.lengths_ms(k, position, clips.stop).sum()) for k, clips in ranges)
        return used / (len(batches) * self.budget_ms)

    def fingerprint(self) -> str:
        others = "".join(f" {one}" for one in (self.padding, self.tokens) if one)
        return f"seconds {self.budget_ms} {self.longest_ms} {self.chunk_clips}{others}"

    def lengths_ms(self, partition: int, start: int, stop: int) -> np.ndarray:
        """Return the lengths in ms that a partition's clips at positions `start` to `stop - 1`
        count as.
        """
        sources, numbers = self.order.draws(partition, start, stop)
        lengths = np.empty((2, len(sources)), dtype=np.int64)
        for source in np.unique(sources).tolist():
            indices = np.flatnonzero(sources == source)
            while len(indices):  # the running numbers ascend
                first, last = self.order.window(partition, source, int(numbers[indices[0]]))
                count = np.searchsorted(numbers[indices], last)
                here, indices = indices[:count], indices[count:]
                window = self._window_lengths(partition, source, first, last)
                lengths[:, here] = window[:, numbers[here] - first]
        if self.padding:
            for index in range(len(sources)):
                if self.padding(self.order.clip_number(partition, start + index)):
                    lengths[0, index] = self.padded_ms
        return lengths.max(0)

    @lru_cache(maxsize=512)  # noqa: B019 — it lives as long as its run
    def _window_lengths(self, partition: int, source: int, first: int, last: int) -> np.ndarray:
        shards, ordinals = self.order.locate(partition, source, first, last)
        lengths = np.empty((2, len(shards)), dtype=np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            lengths[:, chosen] = self._shard_lengths(source, int(shard))[:, ordinals[chosen]]
        return lengths

    @lru_cache(maxsize=MAX_CACHED_TABLES)  # noqa: B019
    def _shard_lengths(self, source: int, shard: int) -> np.ndarray:
        """Return the lengths in ms of a shard's clips, and what their tokens count as: `[2, N]`."""
        index = self.indexes[source]
        try:
            table, rows = index.table(shard), index.ordinals(shard)
            known = table.milliseconds[rows]
            lengths = np.where(known == UNKNOWN_MS, self.longest_ms, known).clip(1, self.longest_ms)
            tokens = np.zeros_like(lengths)
            if self.tokens:
                slope, intercept = self.tokens.lines[source]
                fractions = (slope * table.text_bytes[rows] + intercept) / self.tokens.tokens
                tokens = (fractions.clip(0, 1) * self.budget_ms).astype(np.int64)
            return np.stack([lengths, tokens])
        except (OSError, ValueError) as error:
            raise UserError(
                f"The lengths of {index.url(shard)} cannot be read ({error}), which "
                "data.batch_seconds needs to plan batches. Write them again: "
                f"whisper-aut data index {index.root}"
            ) from None


def fill_batches(lengths: np.ndarray, budget: int, least: int = 1) -> list[np.ndarray]:
    """Distribute clips over as few batches as the heuristic finds, all nearly equally full.

    Clips are placed longest first, each into the emptiest batch. If a batch then exceeds the
    budget, the clips are placed again with one more batch. No length may exceed the budget.

    Args:
        lengths: the length of each clip.
        budget: the longest sum of lengths in a batch.
        least: make at least this many batches, if there are as many clips.

    Returns:
        For each batch, the indices of its clips in ascending order.
    """
    descending = np.argsort(-lengths, kind="stable")
    count = max(least, -(-int(lengths.sum()) // budget))
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


def _clip_ranges(order: Order, start: int, stop: int) -> list[tuple[int, range]]:
    """Return each partition with its positions from `start` to `stop - 1` that have clips."""
    ends = [order.clips_end(partition, start) for partition in range(order.partitions)]
    return [
        (partition, range(start, stop if end is None else min(stop, end)))
        for partition, end in enumerate(ends)
    ]
