"""Confidence intervals of scores, and paired tests of differences: between encoders, over
independent groups of test clips, and between recipes, over trainings.

Clips of one speaker, recording or song resemble each other, so the unit is the group that a task
names, or the clip if it names none. With 30 groups or more, groups are resampled for an expanded
percentile interval, and the signs of their differences are flipped for a paired permutation
test. With fewer, a t interval and a t test on the groups are used. The functions of scipy handle
one sample; here, the draws of each task also add up to those of averages over tasks.

Sources: Efron & Tibshirani, An Introduction to the Bootstrap; Hesterberg 2015, What Teachers
Should Know About the Bootstrap (expanded intervals); Good, Permutation Tests; Cochran, Sampling
Techniques (ratio of group totals); Holm 1979; Cohen, Statistical Power Analysis; Wilson 1927;
Korn & Graubard 1998 (proportions of clustered samples); Piepho 2004 (letters).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import ceil, log2

import numpy as np
from scipy import stats
from scipy.optimize import root_scalar

ALPHA = 0.05
POWER = 0.8  # of the smallest detectable difference
MIN_TRAININGS = 5  # of a recipe, for any claim about it
MIN_FLIPS = ceil(1 - log2(ALPHA))  # fewer changed clips are never significant by sign flips
FEW_GROUPS = 30  # with fewer groups, bootstrap intervals are too narrow
RESAMPLES = 10_000
JACKKNIFE_BUNDLES = 100
BLOCK = 4_000_000  # random numbers drawn at once
DECIMALS = 9  # precision of the total of a group
TIE = 10.0 ** (1 - DECIMALS)  # smaller differences are rounding errors


@dataclass(frozen=True)
class Difference:
    """A difference `value` = a − b, its 95 % interval, and the two-sided p-value of no
    difference.

    Attributes:
        effect_size: Cohen's d of paired differences: their mean in standard deviations over the
            groups; None for an average of tasks, and if all differences are equal.
        detectable: the true difference that this test finds with a probability of 80 %.
    """

    value: float
    low: float
    high: float
    p_value: float
    effect_size: float | None = None
    detectable: float | None = None


@dataclass(frozen=True, eq=False)
class GroupTotals:
    """Contributions of independent groups of test clips to a score or a difference of scores,
    which is Σ totals / Σ sizes.

    Attributes:
        totals: `[G]`, sum over the clips of each group.
        sizes: `[G]`, number of clips per group, or the sum of their weights.
        seed: seed of the draws. Scores that are averaged need different seeds.
    """

    totals: np.ndarray
    sizes: np.ndarray
    seed: int = 0

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        seed: int = 0,
    ) -> "GroupTotals":
        """Sum clips by group.

        Args:
            values: `[U]`, contribution of each clip: its weight times its score.
            weights: `[U]`, weight of each clip. Defaults to ones.
            groups: `[U]`, group number of each clip. By default, each clip is a group.
            seed: seed of the draws.
        """
        weights = np.ones(values.shape) if weights is None else weights
        groups = np.arange(values.size) if groups is None else groups
        # Rounding makes totals equal that only differ in the last bits.
        totals = np.round(np.bincount(groups, values), DECIMALS)
        return cls(totals, np.bincount(groups, weights), seed)

    @property
    def value(self) -> float:
        """The score or difference: Σ totals / Σ sizes."""
        return float(self.totals.sum() / self.sizes.sum())

    @property
    def few(self) -> bool:
        return self.totals.size < FEW_GROUPS

    @property
    def error(self) -> float:
        """Standard error of the value, from the deviations of groups."""
        count = self.totals.size
        residuals = (self.totals - self.value * self.sizes) / self.sizes.mean()
        return float(np.sqrt(residuals @ residuals / (count * (count - 1))))

    @cached_property
    def draws(self) -> np.ndarray:
        """Values of resampled groups, `[RESAMPLES]`. With few groups, draws of a t distribution
        around the value.
        """
        rng = np.random.default_rng([self.seed, 0])
        if self.few:
            return self.value + self.error * rng.standard_t(self.totals.size - 1, RESAMPLES)
        # Equal groups are drawn together by a multinomial. This is equivalent, and the cost only
        # depends on the number of distinct groups.
        rows = np.column_stack([self.totals, self.sizes])
        rows, counts = np.unique(rows, axis=0, return_counts=True)
        probabilities = counts / counts.sum()
        drawn = [
            rng.multinomial(self.totals.size, probabilities, block) @ rows
            for block in _blocks(len(rows))
        ]
        totals, sizes = np.concatenate(drawn).T
        # Percentile intervals are too narrow, by the factors from n to n − 1 and from t to normal.
        count, tail = self.totals.size, 1 - ALPHA / 2
        expansion = stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail)
        expansion *= np.sqrt(count / (count - 1))
        return self.value + expansion * (totals / sizes - self.value)

    @cached_property
    def null(self) -> np.ndarray:
        """Differences under the null hypothesis, `[RESAMPLES]`: the signs of groups are flipped.
        With few groups, draws of a t distribution around 0.
        """
        rng = np.random.default_rng([self.seed, 1])
        if self.few:
            return self.error * rng.standard_t(self.totals.size - 1, RESAMPLES)
        magnitudes, counts = np.unique(np.abs(self.totals), return_counts=True)
        flipped = [
            (2 * rng.binomial(counts, 0.5, (block, len(counts))) - counts) @ magnitudes
            for block in _blocks(len(counts))
        ]
        return np.concatenate(flipped) / self.sizes.sum()


def _blocks(width: int) -> list[int]:
    """Split the resamples into blocks of at most `BLOCK` random numbers."""
    most = max(1, BLOCK // width)
    return [min(most, RESAMPLES - first) for first in range(0, RESAMPLES, most)]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which is None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval(
    tasks: Sequence[GroupTotals],
    weights: Sequence[float] = (1.0,),
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Return the 95 % interval of a score, or of the weighted average of several tasks.

    `bounds` are the smallest and largest possible value. They are returned if any task has a single
    group.
    """
    if any(task.totals.size == 1 for task in tasks):
        return bounds
    if len(tasks) == 1 and tasks[0].few:
        task = tasks[0]
        half = task.error * stats.t.ppf(1 - ALPHA / 2, task.totals.size - 1)
        low, high = task.value - half, task.value + half
    else:
        drawn = np.average([task.draws for task in tasks], axis=0, weights=weights)
        low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    low, high = np.clip([low, high], *bounds)
    return float(low), float(high)


def difference(tasks: Sequence[GroupTotals], weights: Sequence[float] = (1.0,)) -> Difference:
    """Return the paired difference of two encoders on one task, or on the weighted average of
    several, from the differences of the two encoders on the same clips of each task.
    """
    value = float(np.average([task.value for task in tasks], weights=weights))
    low, high = interval(tasks, weights, (-1.0, 1.0))
    found = Difference(value, low, high, _p_value(tasks, weights, value))
    if any(task.totals.size == 1 for task in tasks):
        return found
    count, shares = sum(task.totals.size for task in tasks), np.array(weights) / np.sum(weights)
    error = float(np.linalg.norm(shares * [task.error for task in tasks]))
    detectable, effect = error * _detectable_errors(count), None
    if len(tasks) == 1:
        effect = value / (error * count**0.5) if error > TIE else None
        detectable = max(detectable, min(MIN_FLIPS, count) / count)
    return replace(found, effect_size=effect, detectable=detectable)


def _p_value(tasks: Sequence[GroupTotals], weights: Sequence[float], value: float) -> float:
    if any(task.totals.size == 1 for task in tasks):
        return 1.0
    if len(tasks) == 1 and tasks[0].few:
        task, freedom = tasks[0], tasks[0].totals.size - 1
        if task.error < TIE:  # all groups are equal: use the p-value of flipping their signs
            return 1.0 if abs(value) < TIE else 2.0**-freedom
        return float(2 * stats.t.sf(abs(value) / task.error, freedom))
    flipped = np.average([task.null for task in tasks], axis=0, weights=weights)
    extreme = int((np.abs(flipped) >= abs(value) - TIE).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def detectable_difference(std: float, runs: int, alpha: float = ALPHA) -> float:
    """Return the true difference that a two-sided paired t test finds with probability `POWER`.

    Args:
        std: standard deviation of the paired differences, in the unit of the result.
        runs: number of pairs, such as training runs of each recipe, at least 2.
        alpha: the level that the p-value must reach.
    """
    freedom, critical = runs - 1, stats.t.isf(alpha / 2, runs - 1)
    # scipy's noncentral t is NaN this far out: average the normal over quantiles of the chi-square.
    quantiles = stats.chi2.ppf((np.arange(2_000) + 0.5) / 2_000, freedom)
    bounds = critical * np.sqrt(quantiles / freedom)

    def excess_power(effect: float) -> float:
        tails = stats.norm.sf(bounds - effect) + stats.norm.cdf(-bounds - effect)
        return float(np.mean(tails)) - POWER

    effect = root_scalar(excess_power, bracket=(0.0, 10 * (critical + 1))).root
    return effect * std / runs**0.5


@cache
def _detectable_errors(groups: int) -> float:
    """Return the detectable difference of a test in standard errors."""
    return detectable_difference(groups**0.5, groups)


@dataclass(frozen=True)
class PairedTest:
    """A recipe minus another one in one quantity, by a paired t test over trainings.

    Attributes:
        differences: one for each pair of trainings.
        low, high: 95 % t interval of the mean, for this comparison alone.
        p_value: NaN with one pair, or if all differences are equal.
        p_adjusted: corrected for all comparisons.
        p_no_worse: one-sided, of being worse by the margin or more, with Holm's correction; NaN
            without a margin.
        alpha: the level that the p-value must reach before correction.
    """

    differences: tuple[float, ...]
    low: float
    high: float
    p_value: float
    p_adjusted: float
    p_no_worse: float
    alpha: float

    @property
    def mean(self) -> float:
        return mean_std(self.differences)[0]

    @property
    def std(self) -> float:
        """Sample standard deviation of the differences; 0 for a single one."""
        return mean_std(self.differences)[1] or 0.0

    def verdict(self, *, lower_is_better: bool = False) -> str:
        runs = len(self.differences)
        if runs < MIN_TRAININGS:
            return f"no claim ({runs} run{'s' * (runs > 1)})"
        no_worse = self.p_no_worse < ALPHA / 2
        if self.p_adjusted < ALPHA:
            if (self.mean < 0) == lower_is_better:
                return "better"
            return "worse, within the margin" if no_worse else "worse"
        return "no worse" if no_worse else "no difference shown"


def paired_tests(
    differences: Sequence[Sequence[float]] | np.ndarray,
    margins: Sequence[float] | None = None,
    primary: int | None = None,
    *,
    gated: bool = False,
) -> list[PairedTest]:
    """Test whether recipes differ, with the training as the unit.

    Args:
        differences: `[R, N]`, one row for each comparison and one column for each pair of
            trainings.
        margins: `[R]`; worse by less than this counts as no worse. NaN if no margin applies.
        primary: row of the primary comparison, which is not corrected. The other rows cannot be
            significant unless it is. With None, Holm's correction covers all rows.
        gated: there is a primary comparison but it was not measured, so no row is significant.
    """
    if not len(differences):
        return []
    values = np.array(differences, dtype=float)
    margin = np.nan if margins is None else np.array(margins)
    freedom, mean = values.shape[1] - 1, values.mean(1)
    error = values.std(1, ddof=min(1, freedom)) / values.shape[1] ** 0.5
    error[error <= TIE] = np.nan  # nothing varies, so there is no test
    half = stats.t.isf(ALPHA / 2, freedom) * error
    two_sided = 2 * stats.t.sf(np.abs(mean) / error, freedom)
    no_worse = stats.t.sf((mean + margin) / error, freedom)
    corrected = np.arange(len(values)) != (-1 if primary is None else primary)
    p_adjusted, p_no_worse = two_sided.copy(), no_worse.copy()
    p_adjusted[corrected] = holm(two_sided[corrected].tolist())
    p_no_worse[corrected] = holm(no_worse[corrected].tolist())
    if gated or primary is not None:
        gate = 1.0 if primary is None else np.nan_to_num(two_sided[primary], nan=1.0)
        p_adjusted[corrected] = np.maximum(p_adjusted[corrected], gate)
    first_step = ALPHA / max(1, int(np.isfinite(two_sided[corrected]).sum()))
    alpha = np.where(corrected, first_step, ALPHA)
    columns = np.stack([mean - half, mean + half, two_sided, p_adjusted, p_no_worse, alpha], axis=1)
    return [
        PairedTest(tuple(row), *found)
        for row, found in zip(values.tolist(), columns.tolist(), strict=True)
    ]


def proportion_interval(part: GroupTotals) -> tuple[float, float]:
    """Return the 95 % interval (Wilson) of a proportion, such as the recall of a class. Clips in
    groups count as that many independent clips as would have the same standard error.
    """
    count, rate = float(part.sizes.sum()), part.value
    if part.totals.size < count:
        known = part.totals.size > 1 and part.error > TIE
        count = min(count, rate * (1 - rate) / part.error**2) if known else part.totals.size
    squared = stats.norm.ppf(1 - ALPHA / 2) ** 2 / count
    half = np.sqrt(squared * (rate * (1 - rate) + squared / 4))
    low, high = ((rate + squared / 2 + side * half) / (1 + squared) for side in (-1, 1))
    return max(0.0, float(low)), min(1.0, float(high))


def letter_groups(names: Sequence[str], different: Collection[frozenset[str]]) -> dict[str, str]:
    """Return the letters of each name: two share a letter unless their pair is `different`."""
    groups = [frozenset(names)]
    for pair in different:
        split = [group - {name} for group in groups if pair <= group for name in pair]
        groups = list(dict.fromkeys([*(group for group in groups if not pair <= group), *split]))
        groups = [group for group in groups if not any(group < other for other in groups)]
    groups.sort(key=lambda group: [name not in group for name in names])
    return {
        name: "".join(chr(ord("a") + i) for i, group in enumerate(groups) if name in group)
        for name in names
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979), in the given order.

    A comparison without a test has NaN, which stays NaN and does not count.
    """
    adjusted, running = [float("nan")] * len(p_values), 0.0
    tested = int(np.isfinite(p_values).sum())
    for rank, i in enumerate(np.argsort(p_values, kind="stable")[:tested]):  # NaN comes last
        running = max(running, (tested - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def jackknife(score: Callable[[np.ndarray], float], groups: np.ndarray) -> np.ndarray:
    """Return pseudo-values `[U]` of a score that is not a mean over clips (F1, mean average
    precision).

    Each of up to `JACKKNIFE_BUNDLES` bundles of groups is left out once: U · score(all) − (U − 1)
    · score(all but the bundle). Pseudo-values vary like the score, so paired tests can treat
    them like clips (Tukey's pseudo-values; Efron & Tibshirani, chapter 11). They are shifted so
    that their mean is the score. Their own mean would correct the score for a bias, which rare
    classes make larger than the score.

    Args:
        score: score of the clips marked by a mask `[B]`.
        groups: `[B]`, group number of each clip, from 0. Groups are left out whole.
    """
    bundles = groups % min(JACKKNIFE_BUNDLES, int(groups.max()) + 1)
    count = int(bundles.max()) + 1
    whole = score(np.ones(len(groups), dtype=bool))
    if count == 1:
        return np.array([whole])
    without = np.array([score(bundles != bundle) for bundle in range(count)])
    return whole + (count - 1) * (without.mean() - without)
