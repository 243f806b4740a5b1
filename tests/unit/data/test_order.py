"""The order of clips: a function of seed and position, exact in its epochs, faithful to weights."""

import numpy as np
import pytest
from scipy.stats import binom

from whisper_aut.data.sampler import MixtureOrder, SequentialOrder, SourceShape, mixture_weights

SOURCES = (
    SourceShape("a", (5, 3, 7, 1), 0.8),
    SourceShape("b", (4, 4), 0.1),
    SourceShape("c", (9,), 0.1),
)


@pytest.mark.parametrize("window", [1, 4, 7, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_epoch_of_a_source_holds_every_clip_once(window: int, epoch: int):
    order = MixtureOrder(SOURCES, seed=3, window=window)
    for number, source in enumerate(SOURCES):
        seen, place = [], epoch * source.samples
        while place < (epoch + 1) * source.samples:
            first, last = order.window(number, place)
            assert first == place
            shards, ordinals = order.locate(number, first, last)
            seen += list(zip(shards.tolist(), ordinals.tolist(), strict=True))
            place = last
        expected = [
            (shard, ordinal)
            for shard, samples in enumerate(source.shard_samples)
            for ordinal in range(samples)
        ]
        assert sorted(seen) == expected


def test_epochs_and_seeds_differ():
    def first_epoch(seed: int, epoch: int) -> list[int]:
        order = MixtureOrder(SOURCES, seed=seed, window=100)
        start = epoch * SOURCES[0].samples
        shards, ordinals = order.locate(0, *order.window(0, start))
        return (shards * 100 + ordinals).tolist()

    assert first_epoch(0, 0) == first_epoch(0, 0)
    assert first_epoch(0, 0) != first_epoch(0, 1)
    assert first_epoch(0, 0) != first_epoch(1, 0)


def test_any_range_of_positions_is_the_same_however_it_is_asked_for():
    whole = MixtureOrder(SOURCES, seed=0, window=4).draws(0, 140_000)
    for start, stop in ((0, 10), (65_530, 65_545), (131_000, 140_000)):
        part = MixtureOrder(SOURCES, seed=0, window=4).draws(start, stop)
        assert np.array_equal(part[0], whole[0][start:stop])
        assert np.array_equal(part[1], whole[1][start:stop])


def test_running_numbers_count_the_draws_of_each_source():
    sources, numbers = MixtureOrder(SOURCES, seed=0, window=4).draws(0, 70_000)
    for source in range(len(SOURCES)):
        drawn = numbers[sources == source]
        assert np.array_equal(drawn, np.arange(len(drawn)))


@pytest.mark.parametrize("seed", range(5))
def test_shares_lie_in_the_binomial_interval(seed: int):
    draws = 10_000
    sources, _ = MixtureOrder(SOURCES, seed=seed, window=4).draws(0, draws)
    for number, source in enumerate(SOURCES):
        low, high = binom.interval(0.999, draws, source.weight)
        assert low <= int((sources == number).sum()) <= high


def test_domain_shares_divide_by_weight():
    weights = mixture_weights(
        ["speech", "speech", "sound"], [3.0, 1.0, 7.0], {"speech": 0.8, "sound": 0.2}
    )
    assert weights == pytest.approx([0.6, 0.2, 0.2])


def test_a_source_without_a_share_is_never_drawn():
    order = MixtureOrder(
        [SourceShape("a", (3,), 0.0), SourceShape("b", (3,), 1.0)], seed=0, window=2
    )
    assert set(order.draws(0, 5_000)[0].tolist()) == {1}


def test_fingerprints_tell_orders_apart():
    base = MixtureOrder(SOURCES, seed=0, window=4).fingerprint()
    assert base == MixtureOrder(SOURCES, seed=0, window=4).fingerprint()
    changed = [
        MixtureOrder(SOURCES, 1, 4),
        MixtureOrder(SOURCES, 0, 5),
        MixtureOrder(SOURCES[:2], 0, 4),
    ]
    assert len({base, *(order.fingerprint() for order in changed)}) == 4


def test_the_validation_order_takes_the_first_clips_of_each_source():
    order = SequentialOrder(SOURCES, window=4, limit=6)
    assert order.end == 18
    sources, numbers = order.draws(4, 100)
    assert sources.tolist() == [0] * 2 + [1] * 6 + [2] * 6
    assert numbers[:4].tolist() == [4, 5, 0, 1]
    assert [order.window(0, number) for number in (0, 3, 4, 15)] == [
        (0, 4),
        (0, 4),
        (4, 8),
        (12, 16),
    ]
    shards, ordinals = order.locate(0, *order.window(0, 5))
    assert (shards.tolist(), ordinals.tolist()) == ([0, 1, 1, 1], [4, 0, 1, 2])
