"""What an experiment found, as data: per arm and seed the scores, answers, loss curve, price and commands; and back from JSON.

In: what `experiments.measure` measured. Out: plain JSON from which every table and figure is made again. Next: `experiments.statistics`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import root_scalar
from scipy.stats import chi2, norm, t, ttest_1samp

from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import UserError
from whisper_aut.probes.stats import holm, mean_std
from whisper_aut.utils import write_text

RESULTS_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """What a training run took: what it heard, what it computed, how long, and how much of what its encoder ran on was padding.

    Seconds are wall clock of the training loop, data wait included, validation and checkpoints not.
    """

    steps: int
    audio_seconds: float
    teraflop: float | None
    seconds: float
    padding_fraction: float


@dataclass(frozen=True)
class Point:
    """A validation: its loss, and what had been spent until then."""

    step: int
    loss: float
    audio_seconds: float
    teraflop: float | None
    seconds: float


@dataclass(frozen=True)
class TaskResult:
    """One encoder on one probe task.

    Attributes:
        score: mean over probe seeds, 0 … 1.
        spread: its deviation over probe seeds; None with one.
        valid: the score on validation clips by which the penalty was chosen; None where nothing was to be chosen.
        right: a digit for each test clip: in how many probe seeds it was right. Empty where clips are not right or wrong.
        keys: hash of the test clips' names: scores of equal hashes are of the same clips.
    """

    title: str
    domain: str
    score: float
    spread: float | None
    valid: float | None
    right: str
    keys: str
    test_clips: int


@dataclass(frozen=True)
class Measure:
    """One arm with one seed.

    Attributes:
        tasks: probe task → result. answers: figure → value, as `exact_sound_class`.
        curve: of its training; empty where nothing was trained.
        commands: that make and measure it, in order.
    """

    arm: str
    seed: int
    tasks: dict[str, TaskResult]
    answers: dict[str, float]
    curve: tuple[Point, ...]
    cost: Cost | None
    commands: tuple[str, ...]


@dataclass(frozen=True)
class ArmFacts:
    """What tables and figures call an arm: its choice and title on each axis."""

    name: str
    titles: tuple[str, ...]
    choices: dict[str, str]


@dataclass(frozen=True)
class Results:
    """An experiment's results.

    Attributes:
        settings: the experiment as it was run, without places of this machine.
        arms: in the order of the tables. measures: of each arm and seed; fewer where the experiment is not finished.
        baseline: log-mel statistics, which nothing trains.
        audits: what the audit of training shards against probe shards found, a line each.
        environment: versions, machine, date.
    """

    name: str
    title: str
    question: str
    reference: str
    seeds: tuple[int, ...]
    probe_seeds: int
    arms: tuple[ArmFacts, ...]
    measures: tuple[Measure, ...]
    baseline: dict[str, TaskResult]
    audits: tuple[str, ...]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, TaskResult]:
        """Return one result of each task, for its title and domain."""
        return {
            name: result
            for measure in reversed(self.measures)
            for name, result in measure.tasks.items()
        }

    @property
    def answers(self) -> list[str]:
        return list(dict.fromkeys(name for measure in self.measures for name in measure.answers))

    def of(self, arm: str) -> list[Measure]:
        """Return the measures of an arm, seed by seed."""
        return sorted(
            (measure for measure in self.measures if measure.arm == arm),
            key=lambda measure: measure.seed,
        )

    def to_json(self) -> str:
        return json.dumps(
            {"version": RESULTS_VERSION, **asdict(self)}, indent=1, ensure_ascii=False
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read `save`'s file.

        Raises:
            UserError: missing, of another version, or damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("version") != RESULTS_VERSION:
                raise ValueError("another version")
            tupled = {name: tuple(data[name]) for name in ("seeds", "audits")}
            arms = tuple(
                ArmFacts(arm["name"], tuple(arm["titles"]), arm["choices"]) for arm in data["arms"]
            )
            measures = tuple(_measure(measure) for measure in data["measures"])
            return cls(
                **data
                | tupled
                | {"arms": arms, "measures": measures, "baseline": _tasks(data["baseline"])}
            )
        except OSError as error:
            raise UserError(f"Cannot read results from {path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not hold results of this release ({error!r}). Run whisper-aut experiment again."
            ) from None


def _measure(data: dict[str, Any]) -> Measure:
    curve = tuple(Point(**point) for point in data["curve"])
    cost = Cost(**data["cost"]) if data["cost"] else None
    return Measure(
        **data
        | {
            "tasks": _tasks(data["tasks"]),
            "curve": curve,
            "cost": cost,
            "commands": tuple(data["commands"]),
        }
    )


def _tasks(data: dict[str, Any]) -> dict[str, TaskResult]:
    return {name: TaskResult(**result) for name, result in data.items()}


ALPHA = 0.05
POWER = 0.8  # of the smallest detectable difference
MIN_TRAININGS = 5  # of each recipe, for any claim
ROUNDING = 1e-9
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over trainings; no deviation with one."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Endpoint:
    """What trainings are compared by.

    Attributes:
        name: as `primary.endpoint` says it. title: for tables.
        of: its value for one training; None where it has none.
        points: in points of 0 … 100: higher is better, and the margin applies. Otherwise lower is
            better.
        ratio: values are logarithms; differences are those of ratios.
    """

    name: str
    title: str
    of: Callable[[Measure], float | None]
    points: bool = True
    ratio: bool = False


@dataclass(frozen=True)
class Comparison:
    """One arm − the reference in one endpoint, paired by seed.

    Attributes:
        per_training: the difference of each seed.
        value, std: their mean and sample standard deviation.
        low, high: 95 % t interval of the mean, of this comparison by itself.
        p_value: of no difference, by a paired t test; None with one training, or where all
            differences are the same.
        p_adjusted: corrected for all comparisons of the experiment.
        p_no_worse: of being worse by the margin or more, one-sided, corrected after Holm; None
            without a margin.
        detectable: the true difference that would be found with a probability of 80 %, at this
            spread, number of trainings (`MIN_TRAININGS`, where there are fewer) and correction.
    """

    arm: str
    endpoint: Endpoint
    primary: bool
    per_training: tuple[float, ...]
    value: float
    std: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None
    p_no_worse: float | None = None
    detectable: float | None = None

    @property
    def verdict(self) -> str:
        trainings = len(self.per_training)
        if trainings < MIN_TRAININGS:
            return f"no claim ({trainings} training{'s' * (trainings > 1)})"
        no_worse = self.p_no_worse is not None and self.p_no_worse < ALPHA / 2
        if self.p_adjusted is not None and self.p_adjusted < ALPHA:
            better = (self.value > 0) == self.endpoint.points
            return "better" if better else "worse, within the margin" if no_worse else "worse"
        return "no worse" if no_worse else NO_DIFFERENCE


@dataclass(frozen=True)
class Tests:
    """`[R]` each, for R comparisons; NaN where there is nothing to test."""

    p_value: np.ndarray
    p_adjusted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_no_worse: np.ndarray
    alpha: np.ndarray


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
    """Return the unweighted mean score of a domain's tasks, 0 … 1."""
    return float(
        np.mean([result.score for result in measure.tasks.values() if result.domain == domain])
    )


def compare(results: Results) -> list[Comparison]:
    """Compare every arm with the reference in every endpoint, over the seeds that both have.

    Raises:
        UserError: arms were tested on different clips.
    """
    primary = results.settings.get("primary") or {}
    margin = results.settings.get("margin")
    found: list[Comparison] = []
    for arm, pairs in _pairs(results):
        for endpoint in endpoints_of(results):
            values = [(endpoint.of(one), endpoint.of(other)) for one, other in pairs]
            known = [one - other for one, other in values if one is not None and other is not None]
            if len(known) == len(values):
                chosen = (primary.get("arm"), primary.get("endpoint")) == (arm, endpoint.name)
                found.append(Comparison(arm, endpoint, chosen, tuple(known), *mean_std(known)))
    if not found:
        return []
    longest = max(len(one.per_training) for one in found)
    differences = np.full((len(found), longest), np.nan)
    for row, one in enumerate(found):
        differences[row, : len(one.per_training)] = one.per_training
    margins = [margin if one.endpoint.points and margin else np.nan for one in found]
    first = next((row for row, one in enumerate(found) if one.primary), None)
    tests = judge(differences, np.array(margins), first, gated=any(primary.values()))
    return [_tested(one, tests, row) for row, one in enumerate(found)]


def judge(
    differences: np.ndarray, margins: np.ndarray, primary: int | None = None, *, gated: bool = False
) -> Tests:
    """Test all comparisons of an experiment.

    Args:
        differences: `[R, N]`, a row for each comparison, NaN where a training is missing.
        margins: `[R]`: worse by less than this counts as no worse; NaN where no margin applies.
        primary: row of the primary comparison; None: Holm's correction covers all rows.
        gated: the other rows need a primary comparison that is not among them, so they cannot pass.
    """
    two_sided, interval = _t_test(differences)
    no_worse, _ = _t_test(differences + margins[:, None], alternative="greater")
    rest = np.arange(len(differences)) != (-1 if primary is None else primary)
    p_adjusted, p_no_worse = two_sided.copy(), no_worse.copy()
    p_adjusted[rest], p_no_worse[rest] = _holm(two_sided[rest]), _holm(no_worse[rest])
    if gated or primary is not None:
        gate = 1.0 if primary is None else np.nan_to_num(two_sided[primary], nan=1.0)
        p_adjusted[rest] = np.maximum(p_adjusted[rest], gate)
    strictest = ALPHA / max(1, int(np.isfinite(two_sided[rest]).sum()))  # Holm's first step
    return Tests(two_sided, p_adjusted, *interval, p_no_worse, np.where(rest, strictest, ALPHA))


def detectable_difference(
    std: float, trainings: int, alpha: float = ALPHA, power: float = POWER
) -> float:
    """Return the true difference that a two-sided paired t test finds with a given probability.

    Args:
        std: standard deviation of the differences between trainings, in the unit of the result.
        trainings: of each recipe, at least 2.
        alpha: the level that the p-value must reach.
        power: the probability.
    """
    freedom = trainings - 1
    critical = t.isf(alpha / 2, freedom)
    # scipy's noncentral t is NaN this far out: average the normal over quantiles of the chi-square.
    bounds = critical * np.sqrt(chi2.ppf((np.arange(2_000) + 0.5) / 2_000, freedom) / freedom)

    def missing(effect: float) -> float:
        return float(np.mean(norm.sf(bounds - effect) + norm.cdf(-bounds - effect))) - power

    return root_scalar(missing, bracket=(0.0, 10 * (critical + 1))).root * std / sqrt(trainings)


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


def endpoints_of(results: Results) -> list[Endpoint]:
    """Return what trainings are compared by; losses only where the experiment has thresholds."""
    endpoints = [
        Endpoint(domain, domain, partial(_domain_points, results, domain))
        for domain in domains_of(results)
    ]
    if results.answers:
        endpoints.append(Endpoint("answers", "right answers", _right_answers))
    thresholds = results.settings.get("thresholds", [])
    if thresholds:
        endpoints.append(Endpoint("loss", "final validation loss", _final_loss, points=False))
    shared = [
        threshold
        for threshold in thresholds
        if all(_teraflop_to(threshold, measure) for measure in results.measures)
    ]
    if shared:
        title = f"TFLOP to a loss of {min(shared):g}, ratio"
        log_work = partial(_log_teraflop_to, min(shared))
        endpoints.append(Endpoint("compute", title, log_work, points=False, ratio=True))
    return endpoints


def _pairs(results: Results) -> Iterator[tuple[str, list[tuple[Measure, Measure]]]]:
    """Yield each arm but the reference with its measures and the reference's of the same seeds."""
    base = {measure.seed: measure for measure in results.of(results.reference)}
    for arm in results.arms:
        pairs = [
            (measure, base[measure.seed])
            for measure in results.of(arm.name)
            if measure.seed in base
        ]
        if arm.name != results.reference and pairs:
            _check_clips(pairs)
            yield arm.name, pairs


def _check_clips(pairs: Sequence[tuple[Measure, Measure]]) -> None:
    for one, other in pairs:
        for task in one.tasks.keys() & other.tasks.keys():
            if one.tasks[task].keys != other.tasks[task].keys:
                raise UserError(
                    f"Arms were tested on different clips of {task!r}: its shards have changed. "
                    "Run the experiment again."
                )


def _domain_points(results: Results, domain: str, measure: Measure) -> float:
    return 100 * domain_score(results, measure, domain)


def _right_answers(measure: Measure) -> float | None:
    """Return the unweighted mean over tasks, in points."""
    return 100 * float(np.mean(list(measure.answers.values()))) if measure.answers else None


def _final_loss(measure: Measure) -> float | None:
    return measure.curve[-1].loss if measure.curve else None


def _teraflop_to(threshold: float, measure: Measure) -> float | None:
    return next((point.teraflop for point in measure.curve if point.loss <= threshold), None)


def _log_teraflop_to(threshold: float, measure: Measure) -> float | None:
    work = _teraflop_to(threshold, measure)
    return log(work) if work else None


def _t_test(
    values: np.ndarray, alternative: str = "two-sided"
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Test the mean of each row of `[R, N]` against 0.

    Returns:
        p-values `[R]` and 95 % intervals, NaN where a row does not vary.
    """
    p_value, low, high = (np.full(len(values), np.nan) for _ in range(3))
    known = np.isfinite(values)
    largest = np.max(np.abs(values), axis=1, where=known, initial=0.0)
    ranges = np.where(known, values, -np.inf).max(1) - np.where(known, values, np.inf).min(1)
    varied = ranges > ROUNDING * largest
    if varied.any():
        test = ttest_1samp(values[varied], 0.0, axis=1, nan_policy="omit", alternative=alternative)
        interval = test.confidence_interval(1 - ALPHA)
        p_value[varied] = test.pvalue  # pyright: ignore[reportAttributeAccessIssue]
        low[varied], high[varied] = interval
    return p_value, (low, high)


def _holm(p_values: np.ndarray) -> np.ndarray:
    """Correct the p-values that there are after Holm; NaN stays."""
    adjusted = p_values.copy()
    known = np.isfinite(p_values)
    adjusted[known] = holm(p_values[known].tolist())
    return adjusted


def _tested(one: Comparison, tests: Tests, row: int) -> Comparison:
    known = {
        field.name: float(values[row])
        for field in fields(Tests)
        if np.isfinite((values := getattr(tests, field.name))[row])
    }
    alpha = known.pop("alpha")
    if one.std and "p_value" in known:
        trainings = max(len(one.per_training), MIN_TRAININGS)
        known["detectable"] = detectable_difference(one.std, trainings, alpha)
    return replace(one, **known)
