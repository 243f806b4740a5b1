"""What a difference between two encoders is worth: spread over seeds, a paired interval, a paired test, Holm's correction.

In: per-clip correctness of two encoders on the same test clips. Out: numbers for `probes.suite`. Sources: Efron & Tibshirani,
An Introduction to the Bootstrap (percentile interval); Good, Permutation Tests (sign flips); Holm 1979. Clips are the unit: they
are taken as independent, and where several come from one recording the intervals are somewhat too narrow.

Differences per clip take few values (with k seeds, 2k + 1), so resampling draws how often each value comes up rather than
clips: exact, and the cost does not grow with the number of clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
DECIMALS = 9  # of a clip's difference
TIE = 10.0 ** (
    1 - DECIMALS
)  # means that differ by less are equal but for that rounding: thirds, of three seeds, have no end


@dataclass(frozen=True)
class Difference:
    """`value` = mean of a − b over clips, its 95 % interval, and the two-sided p-value of "no difference"."""

    value: float
    low: float
    high: float
    p_value: float


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which a single value does not have."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Compare two encoders over one task or a weighted average of several.

    `a[k]` and `b[k]` are `[B]`, the correctness of each test clip of task k in 0 … 1 (a mean over seeds, say). Clips are
    resampled, and signs flipped, within each task.
    """
    rng = np.random.default_rng(seed)
    shares = np.asarray(weights, dtype=float) / np.sum(weights)
    value, drawn, flipped = 0.0, np.zeros(resamples), np.zeros(resamples)
    for share, one, other in zip(shares, a, b, strict=True):
        assert one.shape == other.shape, (one.shape, other.shape)
        assert one.size, "no clips"
        # Rounding merges values that differ in the last bit only.
        differences = np.round(
            np.asarray(one, dtype=float) - np.asarray(other, dtype=float), DECIMALS
        )
        value += share * differences.mean()
        drawn += share * _bootstrap_means(differences, resamples, rng)
        flipped += share * _sign_flip_means(differences, resamples, rng)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    extreme = int((np.abs(flipped) >= abs(value) - TIE).sum())
    return Difference(float(value), float(low), float(high), (1 + extreme) / (1 + resamples))


def _bootstrap_means(
    differences: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    values, counts = np.unique(differences, return_counts=True)
    return (
        rng.multinomial(differences.size, counts / differences.size, size=resamples)
        @ values
        / differences.size
    )


def _sign_flip_means(
    differences: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    magnitudes, counts = np.unique(np.abs(differences), return_counts=True)
    positive = rng.binomial(counts, 0.5, size=(resamples, len(counts)))
    return (2 * positive - counts) @ magnitudes / differences.size


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for having looked at all of them, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, running)
    return adjusted
