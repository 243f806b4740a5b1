"""probes.stats: intervals cover, p-values are those of full enumeration, groups count once, Holm is
Holm's.
"""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from whisper_aut.probes.stats import (
    GroupTotals,
    difference,
    holm,
    interval,
    letter_groups,
    mean_std,
    paired_tests,
    proportion_interval,
)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for simulations, which average over hundreds of intervals."""
    monkeypatch.setattr("whisper_aut.probes.stats.RESAMPLES", 400)


def compared(a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None, seed: int = 0):
    return difference([GroupTotals.of(a.astype(float) - b, groups=groups, seed=seed)])


def test_mean_and_sample_deviation():
    assert mean_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    assert mean_std([0.5]) == (0.5, None)


@pytest.mark.usefixtures("few_draws")
def test_interval_covers_the_truth_as_often_as_it_says():
    rng, covered, simulations = np.random.default_rng(0), 0, 600
    truth = _true_difference()
    for simulation in range(simulations):
        shared = rng.random(150)  # clips have a difficulty of their own: the pairs are correlated
        a, b = (shared + 0.2 * rng.standard_normal(150) < level for level in (0.75, 0.65))
        found = compared(a, b, seed=simulation)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / simulations <= 0.97


def _true_difference() -> float:
    rng = np.random.default_rng(1)
    shared, noise = rng.random(2_000_000), 0.2 * rng.standard_normal(2_000_000)
    return float((shared + noise < 0.75).mean() - (shared + noise < 0.65).mean())


def _speakers(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two equal encoders, each of which knows some speakers better; `[B]` and the speaker of each
    clip.
    """
    sizes = rng.integers(15, 26, groups)
    speaker = np.repeat(np.arange(groups), sizes)
    levels = np.clip(rng.normal(0.7, 0.15, (2, groups)), 0, 1)
    return *(rng.random(speaker.size) < level[speaker] for level in levels), speaker  # pyright: ignore[reportReturnType]


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("groups", [6, 24, 40])
def test_false_positives_are_as_rare_as_promised_for_grouped_clips(groups: int):
    """24 actors, say, or 40 speakers. Clips taken as independent find a difference where there is
    none.
    """
    rng, simulations = np.random.default_rng(groups), 400
    by_group, by_clip, covered = 0, 0, 0
    for seed in range(simulations):
        a, b, speaker = _speakers(rng, groups)
        found = compared(a, b, speaker, seed)
        by_group += found.p_value < 0.05
        covered += found.low <= 0 <= found.high
        by_clip += compared(a, b, seed=seed).p_value < 0.05
    assert by_group / simulations < 0.075
    assert covered / simulations > 0.92
    assert by_clip / simulations > 0.2


SIMULATIONS = [pytest.param(150, marks=()), pytest.param(4_000, marks=pytest.mark.slow)]


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("simulations", SIMULATIONS)
@pytest.mark.parametrize("groups", [30, 60])
def test_intervals_of_clustered_clips_cover(groups: int, simulations: int):
    """Differences and scores, from 30 groups on; the margin is four standard errors."""
    rng, margin = np.random.default_rng(groups), 4 * (0.05 * 0.95 / simulations) ** 0.5
    level = np.clip(np.random.default_rng(1).normal(0.7, 0.15, 1_000_000), 0, 1).mean()
    covered = np.zeros(2)
    for seed in range(simulations):
        a, b, speaker = _speakers(rng, groups)
        found = compared(a, b, speaker, seed)
        low, high = interval([GroupTotals.of(a.astype(float), groups=speaker, seed=seed)])
        covered += found.low <= 0 <= found.high, low <= level <= high
    assert (covered / simulations > 0.945 - margin).all()
    assert (covered / simulations < 0.955 + margin).all()
    if simulations >= 4_000:
        assert (covered / simulations >= 0.93).all()
        assert (covered / simulations <= 0.97).all()


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("simulations", SIMULATIONS)
def test_a_table_of_equal_encoders_rarely_has_a_verdict(simulations: int):
    """Family-wise error at most 6 %: four tasks, two of them in groups, and their average."""
    rng, wrong = np.random.default_rng(11), 0
    for seed in range(simulations):
        tasks = []
        for task in range(4):
            groups = None
            if task < 2:
                a, b, groups = _speakers(rng, 40)
            else:
                a, b = rng.random((2, 150)) < 0.8
            tasks.append(GroupTotals.of(a.astype(float) - b, groups=groups, seed=4 * seed + task))
        p_values = [difference([task]).p_value for task in tasks]
        p_values.append(difference(tasks, [1.0] * 4).p_value)
        wrong += min(holm(p_values)) < 0.05
    assert wrong / simulations <= 0.06 + (0 if simulations >= 4_000 else 0.04)


@pytest.mark.usefixtures("few_draws")
def test_effect_size_and_detectable_difference():
    rng = np.random.default_rng(12)
    a, b = rng.random(200) < 0.8, rng.random(200) < 0.7
    differences = a.astype(float) - b
    found = compared(a, b)
    assert found.effect_size == pytest.approx(differences.mean() / differences.std(ddof=1))
    # A paired z test finds 2.8 standard errors with a probability of 80 %.
    error = differences.std(ddof=1) / 200**0.5
    assert found.detectable == pytest.approx(2.8 * error, rel=0.02)
    power = 0
    for seed in range(300):
        one = rng.random(200) < 0.7 + found.detectable
        power += compared(one, rng.random(200) < 0.7, seed=seed).p_value < 0.05
    assert 0.7 < power / 300 < 0.9
    same = compared(np.ones(50), np.ones(50))
    assert (same.effect_size, same.detectable) == (None, 6 / 50)  # 2 · 2⁻⁶ < 5 %
    average = difference([GroupTotals.of(differences), GroupTotals.of(differences, seed=1)], [1, 1])
    assert average.effect_size is None
    assert average.detectable == pytest.approx(found.detectable / 2**0.5, rel=0.02)


def test_recipes_are_compared_over_trainings():
    values = [1.2, 0.4, 0.9, 1.5, -0.1]
    (found,), expected = paired_tests([values]), stats.ttest_1samp(values, 0)
    assert found.p_value == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert (found.mean, found.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    (single,), (equal,) = paired_tests([[1.0]]), paired_tests([[2.0, 2.0]])
    assert np.isnan([single.low, single.p_value, equal.low, equal.p_value]).all()
    assert (single.mean, single.std, equal.mean, equal.std) == (1.0, 0.0, 2.0, 0.0)
    assert paired_tests([]) == []


@pytest.mark.parametrize(("right", "clips"), [(0, 8), (8, 8), (3, 8), (190, 200)])
def test_proportions_have_the_interval_of_wilson(right: int, clips: int):
    marks = (np.arange(clips) < right).astype(float)
    expected = stats.binomtest(right, clips).proportion_ci(method="wilson")
    found = proportion_interval(GroupTotals.of(marks))
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    doubled = np.repeat(marks, 2), np.repeat(np.arange(clips), 2)
    again = proportion_interval(GroupTotals.of(doubled[0], groups=doubled[1]))
    assert again == pytest.approx(found, abs=0.03)  # pairs of equal clips count once


def test_two_names_share_a_letter_unless_they_differ():
    names = ["a", "b", "c", "d"]
    assert letter_groups(names, []) == dict.fromkeys(names, "a")
    chain = letter_groups(names, [frozenset("ac"), frozenset("ad"), frozenset("bd")])
    assert chain == {"a": "a", "b": "ab", "c": "bc", "d": "c"}
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = [frozenset(p) for p in product("abcdef", repeat=2) if p[0] < p[1]]
        different = [pair for pair in pairs if rng.random() < 0.4]
        letters = letter_groups(list("abcdef"), different)
        for pair in pairs:
            one, other = (set(letters[name]) for name in pair)
            assert bool(one & other) == (pair not in different)


def test_few_groups_of_one_size_get_the_t_interval_and_test_of_their_means():
    rng = np.random.default_rng(5)
    a, b, speaker = rng.random(120) < 0.8, rng.random(120) < 0.6, np.repeat(np.arange(12), 10)
    means = (a.astype(float) - b).reshape(12, 10).mean(1)
    found, expected = compared(a, b, speaker), stats.ttest_1samp(means, 0)
    assert found.p_value == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    score = GroupTotals.of(a.astype(float), groups=speaker)
    ends = stats.ttest_1samp(a.reshape(12, 10).mean(1), 0).confidence_interval(0.95)
    assert interval([score]) == pytest.approx((ends.low, min(1.0, ends.high)))


def test_many_groups_are_resampled_as_scipy_resamples_them():
    rng = np.random.default_rng(6)
    a, _, speaker = _speakers(rng, 50)
    sizes, right = np.bincount(speaker), np.bincount(speaker, a)
    ends = stats.bootstrap(
        (right, sizes),
        lambda r, s, axis: r.sum(axis) / s.sum(axis),
        paired=True,
        method="percentile",
        rng=rng,
    ).confidence_interval
    found = interval([GroupTotals.of(a.astype(float), groups=speaker)])
    expansion = stats.t.ppf(0.975, 49) / 1.959964 * np.sqrt(50 / 49)
    expected = [a.mean() + expansion * (end - a.mean()) for end in (ends.low, ends.high)]
    assert found == pytest.approx(expected, abs=0.003)


def test_p_value_is_that_of_all_sign_flips():
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(30), 2)
    a, b = np.zeros(60), np.zeros(60)
    a[:24:2] = rng.integers(1, 4, 12) / 3  # of thirty groups, twelve differ
    b[1:10:2] = 1.0
    totals = np.bincount(groups, a - b)
    changing = totals[totals != 0]
    sums = [abs(np.dot(signs, changing)) for signs in product((-1, 1), repeat=len(changing))]
    exact = np.mean(np.array(sums) >= abs(changing.sum()) - 1e-9)
    assert compared(a, b, groups).p_value == pytest.approx(exact, abs=0.015)


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
    assert compared(a / 3, b / 3).p_value == pytest.approx(exact, abs=0.015)


@pytest.mark.usefixtures("few_draws")
def test_false_positives_are_as_rare_as_promised():
    rng = np.random.default_rng(3)
    records = [(rng.random(100) < 0.7, rng.random(100) < 0.7) for _ in range(600)]
    p_values = np.array([compared(a, b, seed=i).p_value for i, (a, b) in enumerate(records)])
    assert 0.01 <= (p_values < 0.05).mean() <= 0.065


def test_difference_of_nothing_and_of_everything():
    for count in (40, 8):  # resampled, and few
        same = compared(np.ones(count), np.ones(count))
        assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
        far = compared(np.ones(count), np.zeros(count))
        assert (far.value, far.low, far.high) == (1.0, 1.0, 1.0)
        assert far.p_value == pytest.approx(1 / 10_001 if count == 40 else 2**-7)


def test_one_group_has_no_significance():
    one = np.zeros(20, dtype=int)
    found = compared(np.ones(20), np.zeros(20), one)
    assert (found.value, found.low, found.high, found.p_value) == (1.0, -1.0, 1.0, 1.0)
    assert interval([GroupTotals.of(np.ones(20), groups=one)]) == (0.0, 1.0)


def test_swapping_sides_swaps_the_sign():
    rng = np.random.default_rng(4)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    one, other = compared(a, b), compared(b, a)
    assert one.value == -other.value
    assert one.low == pytest.approx(-other.high, abs=0.03)


def test_weighted_average_over_tasks():
    tasks = [GroupTotals.of(np.ones(10)), GroupTotals.of(np.zeros(30), seed=1)]
    assert difference(tasks, [1.0, 3.0]).value == pytest.approx(0.25)


def test_the_error_of_an_average_is_that_of_independent_tasks():
    rng = np.random.default_rng(8)
    tasks = [
        GroupTotals.of(rng.random(400) - 0.5, seed=0),
        GroupTotals.of(rng.random(160) - 0.5, groups=np.repeat(np.arange(16), 10), seed=1),
    ]
    low, high = interval(tasks, [1.0, 2.0], (-1.0, 1.0))
    expected = np.hypot(1.96 * tasks[0].error, 2 * stats.t.ppf(0.975, 15) * tasks[1].error) / 3
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)


def test_many_clips_cost_no_more_than_few():
    rng = np.random.default_rng(5)
    found = compared(rng.random(200_000) < 0.7, rng.random(200_000) < 0.7)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.42 / 200_000), rel=0.1)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
