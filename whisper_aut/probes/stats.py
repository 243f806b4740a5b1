"""What a score, or a difference between two encoders, is worth: intervals and tests over independent groups of test clips.

Clips of one speaker, recording or song resemble each other, so the unit is the group that a task names, or the clip where it names
none. With 30 groups or more, groups are resampled (percentile interval) and the signs of their differences flipped (paired test);
below that, a t interval and a t test on the groups, which hold for few. Sources: Efron & Tibshirani, An Introduction to the
Bootstrap; Good, Permutation Tests; Cochran, Sampling Techniques (ratio of group totals); Holm 1979.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEW_GROUPS = 30  # below this, resampling groups gives intervals that are too narrow
RESAMPLES = 10_000
BLOCK = 4_000_000  # numbers drawn at once
DECIMALS = 9  # of a group's total
TIE = 10.0 ** (1 - DECIMALS)  # scores that differ by less are equal but for rounding


@dataclass(frozen=True)
class Difference:
    """`value` = a − b, its 95 % interval, and the two-sided p-value of "no difference"."""

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, eq=False)
class GroupTotals:
    """What independent groups of test clips add to a score, or to a difference between two: the score is Σ totals / Σ sizes.

    Attributes:
        totals: `[G]`, the sum over a group's clips.
        sizes: `[G]`, how many clips that is; a weighted clip counts with its weight.
        seed: of the draws; scores that are averaged need different ones.
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
        """Add up clips by group.

        Args:
            values: `[U]`, what each clip adds: its weight times how right it is, say.
            weights: `[U]`; ones by default.
            groups: `[U]`, the number of the group of each; by default each clip is a group.
        """
        assert values.size, "no clips"
        weights = np.ones(values.shape) if weights is None else weights
        groups = np.arange(values.size) if groups is None else groups
        # Rounding merges totals that differ in the last bit only.
        totals = np.round(np.bincount(groups, values), DECIMALS)
        return cls(totals, np.bincount(groups, weights), seed)

    @property
    def value(self) -> float:
        return float(self.totals.sum() / self.sizes.sum())

    @property
    def few(self) -> bool:
        return self.totals.size < FEW_GROUPS

    @property
    def error(self) -> float:
        """The standard error of the value, from how far groups lie from it."""
        count = self.totals.size
        residuals = (self.totals - self.value * self.sizes) / self.sizes.mean()
        return float(np.sqrt(residuals @ residuals / (count * (count - 1))))

    @cached_property
    def draws(self) -> np.ndarray:
        """`[RESAMPLES]`, the value in resampled groups; for few groups, a t distribution around it."""
        rng = np.random.default_rng([self.seed, 0])
        if self.few:
            return self.value + self.error * rng.standard_t(self.totals.size - 1, RESAMPLES)
        # How often each kind of group comes up is drawn, not each group: the same, and the cost does not grow with their number.
        rows = np.column_stack([self.totals, self.sizes])
        rows, counts = np.unique(rows, axis=0, return_counts=True)
        chances = counts / counts.sum()
        drawn = [
            rng.multinomial(self.totals.size, chances, block) @ rows for block in _blocks(len(rows))
        ]
        totals, sizes = np.concatenate(drawn).T
        return totals / sizes

    @cached_property
    def null(self) -> np.ndarray:
        """`[RESAMPLES]`, the difference if there were none: signs of groups flipped; for few groups, a t distribution around 0."""
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
    """Cut the resamples into blocks of at most `BLOCK` numbers."""
    most = max(1, BLOCK // width)
    return [min(most, RESAMPLES - first) for first in range(0, RESAMPLES, most)]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which a single value does not have."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval(
    tasks: Sequence[GroupTotals],
    weights: Sequence[float] = (1.0,),
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Return the 95 % interval of a score, or of the weighted average of several tasks.

    Args:
        bounds: of what is possible; a task with a single group says no more than that.
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
    """Judge the paired difference of two encoders on one task, or on the weighted average of several.

    Args:
        tasks: for each, the differences between the two on the same clips.
    """
    value = float(np.average([task.value for task in tasks], weights=weights))
    low, high = interval(tasks, weights, (-1.0, 1.0))
    return Difference(value, low, high, _p_value(tasks, weights, value))


def _p_value(tasks: Sequence[GroupTotals], weights: Sequence[float], value: float) -> float:
    if any(task.totals.size == 1 for task in tasks):
        return 1.0
    if len(tasks) == 1 and tasks[0].few:
        task, freedom = tasks[0], tasks[0].totals.size - 1
        if task.error < TIE:  # all groups alike: what flipping their signs gives
            return 1.0 if abs(value) < TIE else 2.0**-freedom
        return float(2 * stats.t.sf(abs(value) / task.error, freedom))
    flipped = np.average([task.null for task in tasks], axis=0, weights=weights)
    extreme = int((np.abs(flipped) >= abs(value) - TIE).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for having looked at all of them, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted
