"""Results → means over seeds, paired comparisons between arms, and what a loss cost.

In: `Results`. Out: numbers for `experiments.tables` and `experiments.figures`. Two kinds of chance are kept apart: which test clips there
happen to be (paired bootstrap and sign flips over clips, each clip's correctness a mean over seeds; `probes.stats`), and which seed a
training happens to have (paired t-test over seeds, Student 1908). A difference is only called one where the test over clips, corrected
after Holm, and the sign for every single seed agree.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import ttest_rel

from whisper_aut.corpora.annotation import DOMAINS
from whisper_aut.errors import UserError
from whisper_aut.experiments.results import Measure, Point, Results, right_share
from whisper_aut.probes.stats import holm, mean_std, paired_difference

SIGNIFICANT = 0.05
ROUNDING = 1e-9


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; no deviation with one seed."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """`arm` − the reference in one domain, its tasks weighing alike, 0 … 1.

    Attributes:
        value, std: mean and deviation over seeds. per_seed: each of them.
        low, high: 95 % interval over test clips; None where the clips are not right or wrong.
        p_clips: of no difference, over clips; p_holm: corrected for all differences of the table.
        p_seeds: of no difference, over seeds; None with one seed.
    """

    arm: str
    domain: str
    value: float
    std: float | None
    per_seed: tuple[float, ...]
    low: float | None
    high: float | None
    p_clips: float | None
    p_holm: float | None
    p_seeds: float | None

    @property
    def verdict(self) -> str:
        agree = len({value > 0 for value in self.per_seed}) == 1 and all(self.per_seed)
        if self.p_holm is None or self.p_holm >= SIGNIFICANT or not agree:
            return "no significant difference"
        return "better" if self.value > 0 else "worse"


@dataclass(frozen=True)
class SeedDifference:
    """`arm` against the reference in a figure that a whole training has: one pair a seed, and nothing to resample within it.

    Attributes:
        figure: what is compared.
        value, std: mean and deviation over seeds of `per_seed`: differences, or logarithms of ratios.
        ratio: whether they are the latter.
        decimals: with which a difference is written.
        lower_is_better: of the figure.
        p_value: of no difference, by a paired t-test over seeds; p_holm: corrected for all differences of the table.
    """

    arm: str
    figure: str
    value: float
    std: float | None
    per_seed: tuple[float, ...]
    ratio: bool
    decimals: int
    lower_is_better: bool
    p_value: float | None
    p_holm: float | None

    @property
    def verdict(self) -> str:
        if self.p_holm is None or self.p_holm >= SIGNIFICANT:
            return "no significant difference"
        return "better" if (self.value < 0) == self.lower_is_better else "worse"


@dataclass(frozen=True)
class Price:
    """What it took to bring the validation loss down to a threshold: how many seeds reached it, and their means."""

    threshold: float
    reached: int
    seeds: int
    steps: Spread | None
    audio_seconds: Spread | None
    teraflop: Spread | None
    seconds: Spread | None


def spread(values: Sequence[float]) -> Spread:
    return Spread(*mean_std(values), len(values))


def domains_of(results: Results) -> list[str]:
    present = {result.domain for result in results.tasks.values()}
    return [domain for domain in DOMAINS if domain in present]


def domain_score(results: Results, measure: Measure, domain: str) -> float:
    """Return the mean of a domain's tasks, which weigh alike."""
    return float(
        np.mean([result.score for result in measure.tasks.values() if result.domain == domain])
    )


def differences(results: Results) -> list[Difference]:
    """Compare every arm with the reference, domain by domain, over the seeds that both have.

    Raises:
        UserError: arms were tested on different clips.
    """
    found = []
    for arm, pairs in _pairs(results):
        found += [_difference(results, arm, domain, pairs) for domain in domains_of(results)]
    corrected = _corrected([one.p_clips for one in found])
    return [replace(one, p_holm=p_holm) for one, p_holm in zip(found, corrected, strict=True)]


def seed_differences(results: Results) -> list[SeedDifference]:
    """Compare what arms answer and, where losses compare, their last loss and what a loss cost, seed by seed with the reference."""
    found = []
    for arm, pairs in _pairs(results):
        for figure in _seed_figures(results):
            values = [(figure.of(one), figure.of(other)) for one, other in pairs]
            known = [
                (mine, theirs) for mine, theirs in values if mine is not None and theirs is not None
            ]
            if known and len(known) == len(values):
                found.append(_seed_difference(arm, figure, known))
    corrected = _corrected([one.p_value for one in found])
    return [replace(one, p_holm=p_holm) for one, p_holm in zip(found, corrected, strict=True)]


def price(curves: Sequence[Sequence[Point]], threshold: float) -> Price:
    """Return what the first validation at or below a threshold had cost, over the seeds that reached it."""
    reached = [
        point
        for curve in curves
        if (point := next((p for p in curve if p.loss <= threshold), None))
    ]

    def over(values: Sequence[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return spread(known) if known and len(known) == len(values) else None

    return Price(
        threshold,
        len(reached),
        len(curves),
        over([point.step for point in reached]),
        over([point.audio_seconds for point in reached]),
        over([point.teraflop for point in reached]),
        over([point.seconds for point in reached]),
    )


def _pairs(results: Results) -> Iterator[tuple[str, list[tuple[Measure, Measure]]]]:
    """Yield each arm but the reference with its measures beside the reference's of the same seeds."""
    base = {measure.seed: measure for measure in results.of(results.reference)}
    for arm in results.arms:
        pairs = [
            (measure, base[measure.seed])
            for measure in results.of(arm.name)
            if measure.seed in base
        ]
        if arm.name != results.reference and pairs:
            yield arm.name, pairs


def _corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct the p-values that there are after Holm; None stays."""
    adjusted = iter(holm([p_value for p_value in p_values if p_value is not None]))
    return [None if p_value is None else next(adjusted) for p_value in p_values]


@dataclass(frozen=True)
class _SeedFigure:
    name: str
    of: Callable[[Measure], float | None]
    ratio: bool = False
    decimals: int = 3
    lower_is_better: bool = True


def _seed_figures(results: Results) -> list[_SeedFigure]:
    """Name what a whole training is compared by. Losses compare where an experiment has thresholds for them."""
    figures = []
    if results.answers:
        figures.append(
            _SeedFigure("right answers (points)", _right_answers, decimals=1, lower_is_better=False)
        )
    thresholds = results.settings.get("thresholds", [])
    if not thresholds:
        return figures
    figures.append(
        _SeedFigure(
            "final validation loss",
            lambda measure: measure.curve[-1].loss if measure.curve else None,
        )
    )
    shared = [
        threshold
        for threshold in thresholds
        if all(_teraflop_to(measure, threshold) for measure in results.measures)
    ]
    if shared:
        lowest = min(shared)
        name = f"TFLOP to a loss of {lowest:g}, ratio"
        figures.append(_SeedFigure(name, lambda measure: _teraflop_to(measure, lowest), ratio=True))
    return figures


def _right_answers(measure: Measure) -> float | None:
    """Return the mean over tasks, which weigh alike, in points."""
    return 100 * float(np.mean(list(measure.answers.values()))) if measure.answers else None


def _teraflop_to(measure: Measure, threshold: float) -> float | None:
    return next((point.teraflop for point in measure.curve if point.loss <= threshold), None)


def _seed_difference(
    arm: str, figure: _SeedFigure, pairs: Sequence[tuple[float, float]]
) -> SeedDifference:
    per_seed = tuple(
        math.log(mine / theirs) if figure.ratio else mine - theirs for mine, theirs in pairs
    )
    value, std = mean_std(per_seed)
    p_value = _over_seeds(per_seed)
    return SeedDifference(
        arm,
        figure.name,
        value,
        std,
        per_seed,
        figure.ratio,
        figure.decimals,
        figure.lower_is_better,
        p_value,
        None,
    )


def _difference(
    results: Results, arm: str, domain: str, pairs: Sequence[tuple[Measure, Measure]]
) -> Difference:
    per_seed = [
        domain_score(results, one, domain) - domain_score(results, other, domain)
        for one, other in pairs
    ]
    value, std = mean_std(per_seed)
    clips = _clips(results, domain, pairs)
    over_clips = paired_difference(*clips, [1.0] * len(clips[0])) if clips else None
    return Difference(
        arm=arm,
        domain=domain,
        value=value,
        std=std,
        per_seed=tuple(per_seed),
        low=over_clips.low if over_clips else None,
        high=over_clips.high if over_clips else None,
        p_clips=over_clips.p_value if over_clips else None,
        p_holm=None,
        p_seeds=_over_seeds(per_seed),
    )


def _clips(
    results: Results, domain: str, pairs: Sequence[tuple[Measure, Measure]]
) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Return for each task of a domain the correctness of each clip, a mean over seeds, of both arms."""
    ours, theirs = [], []
    for task in [name for name, result in results.tasks.items() if result.domain == domain]:
        found = [(one.tasks[task], other.tasks[task]) for one, other in pairs]
        if len({result.keys for pair in found for result in pair}) > 1:
            raise UserError(
                f"Arms were tested on different clips of {task!r}: their shards changed. Run the experiment anew."
            )
        if not all(result.right for pair in found for result in pair):
            return None
        ours.append(np.mean([right_share(one, results.probe_seeds) for one, _ in found], axis=0))
        theirs.append(
            np.mean([right_share(other, results.probe_seeds) for _, other in found], axis=0)
        )
    return ours, theirs


def _over_seeds(per_seed: Sequence[float]) -> float | None:
    if len(per_seed) < 2 or np.ptp(per_seed) <= ROUNDING * np.abs(per_seed).max():
        return None  # one and the same value: nothing to test it by
    p_value = float(ttest_rel(per_seed, np.zeros(len(per_seed))).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return p_value if math.isfinite(p_value) else None
