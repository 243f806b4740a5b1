"""The order of clips: a function of seed and position, as a naive simulation computes it."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from whisper_aut.data.sampler import (
    PARTITION_BYTES,
    WINDOW_BYTES,
    ByClips,
    Cursor,
    EpochOrder,
    MixtureOrder,
    Order,
    SequentialOrder,
    SourceShape,
    batches_from,
    mixture_weights,
    usable_partitions,
)

SOURCES = (
    SourceShape("a", (5, 3, 7, 1), 0.8),
    SourceShape("b", (4, 4), 0.1),
    SourceShape("c", (9,), 0.1),
)
Place = tuple[int, int, int]  # source, shard, and sample in the shard


def clips_of_source(
    shards: tuple[int, ...], source: int, seed: int, window: int, partition: int, partitions: int
) -> Iterator[tuple[int, list[Place]]]:
    """Yield the clips of a source in each epoch of one partition, from the definition alone."""
    samples, epoch = sum(shards), 0
    while True:
        row: list[Place] = []
        for shard in np.random.default_rng([seed, 1, source, epoch]).permutation(len(shards)):
            row += [(source, int(shard), sample) for sample in range(shards[shard])]
        part = (partition + epoch) % partitions
        begin, end = samples * part // partitions, samples * (part + 1) // partitions
        clips = []
        for first in range(begin, end, window):
            indices = np.arange(first, min(first + window, end))
            np.random.default_rng([seed, 2, source, epoch, first]).shuffle(indices)
            clips += [row[index] for index in indices]
        yield epoch, clips
        epoch += 1


def places(order: Order, batches: int, clips: int, end: int | None) -> list[list[Place]]:
    """Return the first micro-batches of an order, as the code under test computes them."""
    found = []
    for batch, _ in islice(batches_from(ByClips(order, clips), Cursor(), end), batches):
        first, last = batch.positions[0], batch.positions[-1]
        draws = order.draws(batch.partition, first, last + 1)
        rows = []
        for source, number in zip(*(each.tolist() for each in draws), strict=True):
            window = order.window(batch.partition, source, number)
            assert window[0] <= number < window[1]
            shards, samples = order.locate(batch.partition, source, *window)
            index = number - window[0]
            rows.append((source, int(shards[index]), int(samples[index])))
        found.append(rows)
    return found


shapes = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.1, 0.3, 1])),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.integers(0, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, 5))
def test_the_mixture_is_that_of_a_naive_simulation(shapes, seed, window, partitions, clips):
    sources = [SourceShape(str(n), tuple(size), weight) for n, (size, weight) in enumerate(shapes)]
    order = MixtureOrder(sources, seed, window, partitions)
    weights = np.array([source.weight for source in sources])
    edges, per_window = np.cumsum(weights / weights.sum()), -(-window // partitions)
    sequences, draws = {}, {}
    for k in range(partitions):
        for n, source in enumerate(sources):
            epochs = clips_of_source(source.shard_samples, n, seed, per_window, k, partitions)
            sequences[k, n] = (clip for _, epoch in epochs for clip in epoch)
        uniform = np.random.default_rng([seed, 3, 0, k]).random(order.chunk_draws)
        draws[k] = iter(np.searchsorted(edges, uniform, side="right").clip(max=len(sources) - 1))
    expected = []
    for m in range(3 * partitions + 2):
        k = m % partitions
        expected.append([next(sequences[k, n]) for n in islice(draws[k], clips)])
    assert places(order, len(expected), clips, None) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.integers(0, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, 5))
def test_epochs_are_those_of_a_naive_simulation(shapes, seed, window, partitions, clips):
    """Which source comes next is drawn; which clips of it a partition reads, and when, is not."""
    sources = [SourceShape(str(n), tuple(size)) for n, (size, _) in enumerate(shapes)]
    epochs, per_window = 3, -(-window // partitions)
    order = EpochOrder(sources, seed, window, epochs, partitions)
    batches = places(order, 10**6, clips, order.end)
    every = sorted(
        (n, shard, sample)
        for n, source in enumerate(sources)
        for shard, size in enumerate(source.shard_samples)
        for sample in range(size)
    )
    read = [clip for batch in batches for clip in batch]
    for epoch in range(epochs):
        assert sorted(read[epoch * len(every) : (epoch + 1) * len(every)]) == every
    cursors = [
        (batch, cursor)
        for batch, cursor in batches_from(ByClips(order, clips), Cursor(), order.end)
    ]
    for k in range(partitions):
        own = [
            clip
            for rows, (batch, _) in zip(batches, cursors, strict=True)
            if batch.partition == k
            for clip in rows
        ]
        for n, source in enumerate(sources):
            args = (source.shard_samples, n, seed, per_window, k, partitions)
            parts = islice(clips_of_source(*args), epochs)
            expected = [clip for _, part in parts for clip in part]
            assert [clip for clip in own if clip[0] == n] == expected
    if len(every) % (partitions * clips) == 0 and len(sources) == 1:
        assert [batch.partition for batch, _ in cursors] == [
            m % partitions for m in range(len(cursors))
        ]


@pytest.mark.parametrize("partitions", [1, 3, 64])
def test_every_epoch_of_a_source_has_every_clip_once_over_all_partitions(partitions: int):
    order = MixtureOrder(SOURCES, seed=3, window=4, partitions=partitions)
    for n, source in enumerate(SOURCES):
        counts = Counter()
        for k in range(partitions):
            number, begin = 0, source.samples * k // partitions
            while number < source.samples * (k + 5) // partitions - begin:
                first, last = order.window(k, n, number)
                shards, samples = order.locate(k, n, first, last)
                counts.update(zip(shards.tolist(), samples.tolist(), strict=True))
                number = last
        assert len(counts) == source.samples
        assert set(counts.values()) == {5}


def test_epochs_and_seeds_differ():
    def first_epoch(seed: int, epoch: int) -> list[int]:
        order = MixtureOrder(SOURCES, seed=seed, window=100)
        start = epoch * SOURCES[0].samples
        shards, ordinals = order.locate(0, 0, *order.window(0, 0, start))
        return (shards * 100 + ordinals).tolist()

    assert first_epoch(0, 0) == first_epoch(0, 0)
    assert first_epoch(0, 0) != first_epoch(0, 1)
    assert first_epoch(0, 0) != first_epoch(1, 0)


@pytest.mark.parametrize("partitions", [1, 6])
def test_any_range_of_positions_is_the_same_however_it_is_requested(partitions: int):
    def draws(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return MixtureOrder(SOURCES, 0, 4, partitions).draws(partitions - 1, start, stop)

    whole = draws(0, 140_000)
    for start, stop in ((0, 10), (65_530, 65_545), (131_000, 140_000)):
        part = draws(start, stop)
        assert np.array_equal(part[0], whole[0][start:stop])
        assert np.array_equal(part[1], whole[1][start:stop])


def test_running_numbers_count_the_draws_of_each_source():
    order = MixtureOrder(SOURCES, seed=0, window=4, partitions=2)
    for partition in (0, 1):
        sources, numbers = order.draws(partition, 0, 70_000)
        for source in range(len(SOURCES)):
            drawn = numbers[sources == source]
            assert np.array_equal(drawn, np.arange(len(drawn)))
        counts = np.bincount(sources[:50_001], minlength=len(SOURCES))
        assert np.array_equal(order.draw_counts(partition, 50_001), counts)


@pytest.mark.parametrize("partitions", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_weights_lie_in_the_binomial_interval(seed: int, partitions: int):
    draws = 10_000
    order = MixtureOrder(SOURCES, seed, 4, partitions)
    sources = np.concatenate([order.draws(k, 0, draws // partitions)[0] for k in range(partitions)])
    for number, source in enumerate(SOURCES):
        low, high = binom.interval(0.999, draws, source.weight)
        assert low <= int((sources == number).sum()) <= high


def test_windows_of_partitions_hold_a_large_request():
    one, many = (SourceShape("a", (10**6,), sample_bytes=size) for size in (WINDOW_BYTES / 50, 100))
    assert MixtureOrder([one], 0, 1000).windows == [1000]
    assert MixtureOrder([one, SourceShape("b", (9,))], 0, 1000, 64).windows == [50, 16]
    assert MixtureOrder([one], 0, 64_000, 64).windows == [1000]
    assert MixtureOrder([many], 0, 1000, 2).windows == [-(-WINDOW_BYTES // 100)]


def test_small_data_has_fewer_partitions():
    assert usable_partitions(64, 0) == usable_partitions(64, 2 * PARTITION_BYTES - 1) == 1
    assert usable_partitions(64, 30 * PARTITION_BYTES) == 16
    assert usable_partitions(60, 31 * PARTITION_BYTES) == 30
    assert usable_partitions(64, 10**14) == 64


def test_domain_weights_divide_by_source_weight():
    weights = mixture_weights(
        ["speech", "speech", "sound"], [3.0, 1.0, 7.0], {"speech": 0.8, "sound": 0.2}
    )
    assert weights == pytest.approx([0.6, 0.2, 0.2])


def test_a_source_without_weight_is_never_drawn():
    order = MixtureOrder(
        [SourceShape("a", (3,), 0.0), SourceShape("b", (3,), 1.0)], seed=0, window=2
    )
    assert set(order.draws(0, 0, 5_000)[0].tolist()) == {1}


def test_fingerprints_tell_orders_apart():
    base = MixtureOrder(SOURCES, seed=0, window=4).fingerprint()
    assert base == MixtureOrder(SOURCES, seed=0, window=4).fingerprint()
    changed = [
        MixtureOrder(SOURCES, 1, 4),
        MixtureOrder(SOURCES, 0, 5),
        MixtureOrder(SOURCES, 0, 4, 2),
        MixtureOrder(SOURCES[:2], 0, 4),
        EpochOrder(SOURCES, 0, 4, 1),
    ]
    assert len({base, *(order.fingerprint() for order in changed)}) == 6
    longer = EpochOrder(SOURCES, 0, 4, epochs=2)  # a run may be continued for more epochs
    assert longer.fingerprint() == changed[-1].fingerprint()


def test_the_validation_order_takes_the_first_clips_of_each_source():
    order = SequentialOrder(SOURCES, window=4, limit=6)
    assert order.end == 18
    sources, numbers = order.draws(0, 4, 100)
    assert sources.tolist() == [0] * 2 + [1] * 6 + [2] * 6
    assert numbers[:4].tolist() == [4, 5, 0, 1]
    assert [order.window(0, 0, number) for number in (0, 3, 4, 5)] == [
        (0, 4),
        (0, 4),
        (4, 6),
        (4, 6),
    ]
    shards, ordinals = order.locate(0, 0, *order.window(0, 0, 5))
    assert (shards.tolist(), ordinals.tolist()) == ([0, 1], [4, 0])


@pytest.mark.parametrize("partitions", [1, 4])
def test_a_schedule_changes_the_weights_after_its_clips_and_nothing_before(partitions: int):
    plain = MixtureOrder(SOURCES, 3, 6, partitions)
    schedule = [(2_000, [0.0, 0.5, 0.5]), (300_000, [0.0, 0.0, 1.0])]
    order = MixtureOrder(SOURCES, 3, 6, partitions, schedule)
    changes = [-(-clips // partitions) for clips, _ in schedule]
    for partition in range(partitions):
        before, _ = order.draws(partition, 0, changes[0])
        assert (before == plain.draws(partition, 0, changes[0])[0]).all()
        middle = order.draws(partition, changes[0], changes[1])[0]
        counts = np.bincount(middle, minlength=3)
        assert counts[0] == 0
        assert abs(counts[1] - len(middle) / 2) < 4 * (len(middle) / 4) ** 0.5
        after, numbers = order.draws(partition, changes[1], changes[1] + 100)
        assert set(after.tolist()) == {2}
        # The clips of a source go on where the weights before left off.
        assert numbers[0] == order.draw_counts(partition, changes[1])[2]
    assert order.fingerprint() != plain.fingerprint()
    other = MixtureOrder(SOURCES, 3, 6, partitions, schedule[:1])
    assert order.fingerprint() != other.fingerprint()
