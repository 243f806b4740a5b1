"""Confidence intervals of scores and paired tests of differences between encoders, over
independent groups of test clips.

Clips of one speaker, recording or song resemble each other, so the unit is the group that a task
names, or the clip if it names none. With 30 groups or more, groups are resampled for a
percentile interval, and the signs of their differences are flipped for a paired permutation
test. With fewer, a t interval and a t test on the groups are used.

Sources: Efron & Tibshirani, An Introduction to the Bootstrap; Good, Permutation Tests; Cochran,
Sampling Techniques (ratio of group totals); Holm 1979.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
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
    """

    value: float
    low: float
    high: float
    p_value: float


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
        return totals / sizes

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

    Args:
        tasks: one `GroupTotals` per task.
        weights: weight of each task.
        bounds: smallest and largest possible value. They are returned if any task has a single
            group.
    """
    if any(task.totals.size == 1 for task in tasks):
        return bounds
    if len(tasks) == 1 and tasks[0].few:
        task = tasks[0]
        half = task.error * stats.t.ppf((1 + CONFIDENCE) / 2, task.totals.size - 1)
        low, high = task.value - half, task.value + half
    else:
        drawn = np.average([task.draws for task in tasks], axis=0, weights=weights)
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.clip([low, high], *bounds)
    return float(low), float(high)


def difference(tasks: Sequence[GroupTotals], weights: Sequence[float] = (1.0,)) -> Difference:
    """Return the paired difference of two encoders on one task, or on the weighted average of
    several.

    Args:
        tasks: for each task, the differences of the two encoders on the same clips.
        weights: weight of each task.
    """
    value = float(np.average([task.value for task in tasks], weights=weights))
    low, high = interval(tasks, weights, (-1.0, 1.0))
    return Difference(value, low, high, _p_value(tasks, weights, value))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979), in the given order."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - rank) * p_values[i])
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
