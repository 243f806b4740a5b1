"""probes.stats: intervals cover, p-values are those of full enumeration, Holm is Holm's."""

from itertools import product

import numpy as np
import pytest

from whisper_aut.probes.stats import holm, mean_std, paired_difference


def test_mean_and_sample_deviation():
    assert mean_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert mean_std([0.5]) == (0.5, None)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng, covered, simulations = np.random.default_rng(0), 0, 600
    truth = _true_difference()
    for simulation in range(simulations):
        shared = rng.random(150)  # clips have a difficulty of their own: the pairs are correlated
        a, b = (
            shared + 0.2 * rng.standard_normal(150) < 0.75,
            shared + 0.2 * rng.standard_normal(150) < 0.65,
        )
        found = paired_difference([a], [b], [1.0], resamples=1_000, seed=simulation)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / simulations <= 0.97


def _true_difference() -> float:
    rng = np.random.default_rng(1)
    shared, noise = rng.random(2_000_000), 0.2 * rng.standard_normal(2_000_000)
    return float((shared + noise < 0.75).mean() - (shared + noise < 0.65).mean())


def test_p_value_is_that_of_all_sign_flips():
    a, b = np.array([1, 1, 1, 0.5, 1, 0, 1, 1]), np.array([0, 0.5, 1, 0, 0.5, 1, 0, 0])
    differences = a - b
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(a))]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert paired_difference([a], [b], [1.0], resamples=100_000).p_value == pytest.approx(
        exact, abs=0.005
    )


def test_ties_of_thirds_count_as_extreme():
    rng = np.random.default_rng(0)
    a, b = (
        rng.binomial(3, 0.5, 180) for _ in range(2)
    )  # of three seeds, how many had each clip right
    chances = np.ones(1)  # of the sum of signed differences, in thirds, from -spread to spread
    for step in np.abs(a - b):
        widened = np.zeros(len(chances) + 2 * step)
        widened[: len(chances)] += chances / 2
        widened[2 * step :] += chances / 2
        chances = widened
    sums = np.arange(len(chances)) - len(chances) // 2
    exact = chances[np.abs(sums) >= abs((a - b).sum())].sum()
    assert paired_difference([a / 3], [b / 3], [1.0], resamples=100_000).p_value == pytest.approx(
        exact, abs=0.007
    )


def test_false_alarms_are_as_rare_as_promised():
    rng = np.random.default_rng(3)
    records = [(rng.random(100) < 0.7, rng.random(100) < 0.7) for _ in range(600)]
    p_values = np.array(
        [
            paired_difference([a], [b], [1.0], resamples=1_000, seed=i).p_value
            for i, (a, b) in enumerate(records)
        ]
    )
    assert 0.01 <= (p_values < 0.05).mean() <= 0.065


def test_difference_of_nothing_and_of_everything():
    same = paired_difference([np.ones(40)], [np.ones(40)], [1.0])
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    far = paired_difference([np.ones(40)], [np.zeros(40)], [1.0])
    assert (far.value, far.low, far.high) == (1.0, 1.0, 1.0)
    assert far.p_value == pytest.approx(1 / 10_001)


def test_swapping_sides_swaps_the_sign():
    rng = np.random.default_rng(4)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    one, other = paired_difference([a], [b], [1.0]), paired_difference([b], [a], [1.0])
    assert one.value == -other.value
    assert one.low == pytest.approx(-other.high, abs=0.02)


def test_weighted_average_over_tasks():
    a, b = [np.ones(10), np.zeros(30)], [np.zeros(10), np.zeros(30)]
    assert paired_difference(a, b, [1.0, 3.0]).value == pytest.approx(0.25)


def test_many_clips_cost_no_more_than_few():
    rng = np.random.default_rng(5)
    found = paired_difference([rng.random(200_000) < 0.7], [rng.random(200_000) < 0.7], [1.0])
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.42 / 200_000), rel=0.1)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
