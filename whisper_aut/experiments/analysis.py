"""Results of an experiment: scores and costs of each arm and seed, paired tests, tables, a figure.

The tests ask whether one recipe is better than another, so their unit is the training run: arms
are compared by paired t tests over seeds. Sources: Holm 1979; Cohen, Statistical Power Analysis.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from math import exp, log
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Self

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from pydantic import (
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass as schema
from scipy.stats import ttest_1samp

from whisper_aut.config import Domain
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import UserError
from whisper_aut.experiments.grid import QuestionSettings
from whisper_aut.probes.encoders import BASELINE_NAME
from whisper_aut.probes.stats import ALPHA, detectable_difference, holm, mean_std
from whisper_aut.report.plots import (
    BASELINE_COLOUR,
    BASELINE_DASHES,
    CHARACTERS_PER_PAGE,
    LINE_STYLES,
    MARKERS,
    PALETTE,
    STYLE,
    legend_below,
    new_figure,
    save_figure,
    set_category_labels,
)
from whisper_aut.report.tables import BLANK, Table, p_value
from whisper_aut.utils import write_json

MIN_RUNS = 5  # of each recipe, for any claim
ROUNDING = 1e-9


@dataclass(frozen=True)
class TaskMetadata:
    """What tables say about a probe task."""

    title: str
    domain: Domain
    test_clips: int


@dataclass(frozen=True)
class Cost:
    """Totals of a training run, without validation and checkpoints."""

    steps: int
    audio_seconds: FiniteFloat
    teraflop: NonNegativeFloat | None
    seconds: FiniteFloat
    padding_fraction: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Validation:
    """A validation loss, and the cost of training up to it."""

    step: int
    loss: FiniteFloat
    audio_seconds: FiniteFloat
    teraflop: NonNegativeFloat | None
    seconds: FiniteFloat


@dataclass(frozen=True)
class Measurement:
    """Results of one arm with one seed.

    Attributes:
        scores: Probe task → score, 0 … 1.
        answers: Metric of the language model's answers, such as `exact_sound_class` → value.
        curve, cost: Of the training run; none for an encoder with random weights.
    """

    arm: str
    seed: int
    scores: dict[str, float]
    answers: dict[str, float] = field(default_factory=dict)
    curve: tuple[Validation, ...] = ()
    cost: Cost | None = None


# Scores may be NaN, which `STRICT` forbids.
@schema(config=ConfigDict(extra="forbid", strict=True), kw_only=True)
class Results(QuestionSettings):
    """Results of an experiment.

    Attributes:
        arms: Arm → axis → title of the arm's choice, in the order of the tables.
        measurements: One for each arm and seed.
        baseline: Probe task → score of log-mel statistics.
        audits: Overlap of training and test data, one line for each set of probes.
        environment: Date, machine and package versions.
    """

    arms: dict[str, dict[str, str]]
    tasks: dict[str, TaskMetadata]
    measurements: tuple[Measurement, ...]
    baseline: dict[str, float]
    audits: tuple[str, ...]
    environment: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Check what tables and figure rely on, because the file may have been edited by hand."""
        if self.reference not in self.arms:
            raise ValueError(f"reference: there is no arm {self.reference!r}")
        axes = set(self.arms[self.reference])
        if self.figure.x not in axes or any(set(titles) != axes for titles in self.arms.values()):
            raise ValueError("arms: each needs the axes of the reference, with that of figure.x")
        for arm, runs in self.by_arm().items():
            if [one.seed for one in runs] != self.seeds:
                raise ValueError(f"measurements: {arm} must be measured once with each seed")
        if any(one.arm not in self.arms for one in self.measurements):
            raise ValueError("arms: a measurement has no arm")
        scores = [self.baseline, *(one.scores for one in self.measurements)]
        if any(name not in self.tasks for found in scores for name in found):
            raise ValueError("tasks: a score has no task")
        return self

    @property
    def seeds(self) -> list[int]:
        return sorted({one.seed for one in self.measurements})

    @property
    def domains(self) -> list[str]:
        found = {task.domain for task in self.tasks.values()}
        return sorted(found, key=lambda name: (*DOMAINS, name).index(name))

    @property
    def answers(self) -> list[str]:
        """Names of the metrics of answers."""
        return list(dict.fromkeys(name for one in self.measurements for name in one.answers))

    def by_arm(self) -> dict[str, list[Measurement]]:
        """Return the measurements of each arm, ordered by seed."""
        ordered = sorted(self.measurements, key=lambda one: one.seed)
        return {arm: [one for one in ordered if one.arm == arm] for arm in self.arms}

    def domain_score(self, one: Measurement, domain: str) -> float:
        """Return the unweighted mean score of a domain's tasks, in percent; NaN without any."""
        found = [score for name, score in one.scores.items() if self.tasks[name].domain == domain]
        return 100 * float(np.mean(found)) if found else np.nan

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file that `save` wrote.

        Raises:
            UserError: The file cannot be read, or does not hold results of this release.
        """
        try:
            return TypeAdapter(Results).validate_json(path.read_bytes(), strict=True)
        except OSError as error:
            raise UserError(f"Cannot read results from {path}: {error.strerror}.") from None
        except ValidationError as error:
            problem = error.errors()[0]
            location = "".join(f"{key}: " for key in [".".join(map(str, problem["loc"]))] if key)
            raise UserError(
                f"{path} does not hold results of this release ({location}{problem['msg']}). "
                "Run whisper-aut experiment again."
            ) from None


@dataclass(frozen=True)
class Endpoint:
    """A quantity by which training runs are compared.

    Attributes:
        value: Its value for one training run; NaN if the run has none.
        is_score: In points of 0 … 100: higher is better, and the margin applies. For other
            endpoints, lower is better.
        is_ratio: Values are logarithms, so differences are logarithms of ratios.
    """

    name: str
    title: str
    value: Callable[[Measurement], float]
    is_score: bool = True
    is_ratio: bool = False


@dataclass(frozen=True)
class Comparison:
    """One arm minus the reference in one endpoint, paired by seed.

    Attributes:
        differences, mean, std: One for each seed; their mean and sample standard deviation.
        low, high: 95 % t interval of the mean, for this comparison alone.
        p_value: Of a paired t test; NaN with one run, or if all differences are equal.
        p_adjusted: Corrected for all comparisons of the experiment.
        p_no_worse: One-sided, of being worse by the margin or more, with Holm's correction; NaN
            without a margin.
        detectable: The true difference that would be found with a probability of 80 %, with this
            standard deviation, number of runs (at least `MIN_RUNS`) and correction; NaN as above.
    """

    arm: str
    endpoint: Endpoint
    primary: bool
    differences: tuple[float, ...]
    mean: float
    std: float | None
    low: float
    high: float
    p_value: float
    p_adjusted: float
    p_no_worse: float
    detectable: float

    @property
    def verdict(self) -> str:
        runs = len(self.differences)
        if runs < MIN_RUNS:
            return f"no claim ({runs} run{'s' * (runs > 1)})"
        no_worse = self.p_no_worse < ALPHA / 2
        if self.p_adjusted < ALPHA:
            if (self.mean > 0) == self.endpoint.is_score:
                return "better"
            return "worse, within the margin" if no_worse else "worse"
        return "no worse" if no_worse else "no difference shown"


@dataclass(frozen=True)
class PairedTests:
    """Tests of R comparisons, `[R]` each; NaN where there is nothing to test.

    `alpha` is the level that the p-value of a comparison must reach.
    """

    p_value: np.ndarray
    p_adjusted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_no_worse: np.ndarray
    alpha: np.ndarray


def compare(results: Results) -> list[Comparison]:
    """Compare every arm with the reference in every endpoint that both have."""
    margin, primary = results.margin or np.nan, results.primary
    by_arm, rows = results.by_arm(), []
    reference = by_arm.pop(results.reference)
    for (arm, runs), endpoint in product(by_arm.items(), endpoints_of(results)):
        pairs = zip(runs, reference, strict=True)
        differences = [endpoint.value(one) - endpoint.value(other) for one, other in pairs]
        if differences and not np.isnan(differences).any():
            rows.append((arm, endpoint, differences))
    if not rows:
        return []
    names = [(arm, endpoint.name) for arm, endpoint, _ in rows]
    name = (primary.arm, primary.endpoint)
    primary_row = names.index(name) if name in names else None
    tests = paired_tests(
        np.array([differences for *_, differences in rows]),
        np.array([margin if endpoint.is_score else np.nan for _, endpoint, _ in rows]),
        primary_row,
        gated=bool(primary.arm),
    )
    comparisons = []
    for row, (arm, endpoint, differences) in enumerate(rows):
        mean, std = mean_std(differences)
        found = {name: float(array[row]) for name, array in vars(tests).items()}
        alpha, found["detectable"] = found.pop("alpha"), np.nan
        if std and not np.isnan(found["p_value"]):
            runs = max(len(differences), MIN_RUNS)
            found["detectable"] = detectable_difference(std, runs, alpha)
        comparisons.append(
            Comparison(arm, endpoint, row == primary_row, tuple(differences), mean, std, **found)
        )
    return comparisons


def paired_tests(
    differences: np.ndarray, margins: np.ndarray, primary: int | None = None, *, gated: bool = False
) -> PairedTests:
    """Test all comparisons of an experiment.

    Args:
        differences: `[R, N]`, one row for each comparison and one column for each seed.
        margins: `[R]`; worse by less than this counts as no worse. NaN if no margin applies.
        primary: Row of the primary comparison, which is not corrected. The other rows cannot be
            significant unless it is. With None, Holm's correction covers all rows.
        gated: There is a primary comparison but it was not measured, so no row is significant.
    """
    two_sided, low, high = _t_test(differences)
    no_worse, *_ = _t_test(differences + margins[:, None], alternative="greater")
    corrected = np.arange(len(differences)) != (-1 if primary is None else primary)
    p_adjusted, p_no_worse = two_sided.copy(), no_worse.copy()
    p_adjusted[corrected] = holm(two_sided[corrected].tolist())
    p_no_worse[corrected] = holm(no_worse[corrected].tolist())
    if gated or primary is not None:
        gate = 1.0 if primary is None else np.nan_to_num(two_sided[primary], nan=1.0)
        p_adjusted[corrected] = np.maximum(p_adjusted[corrected], gate)
    first_step = ALPHA / max(1, int(np.isfinite(two_sided[corrected]).sum()))
    alpha = np.where(corrected, first_step, ALPHA)
    return PairedTests(two_sided, p_adjusted, low, high, p_no_worse, alpha)


def _t_test(
    values: np.ndarray, alternative: str = "two-sided"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Test the mean of each row of `[R, N]` against 0: p-values and ends of 95 % intervals, `[R]`.

    They are NaN for rows that do not vary.
    """
    p_values, low, high = np.full((3, len(values)), np.nan)
    varies = np.ptp(values, axis=1) > ROUNDING * np.abs(values).max(axis=1)  # False for NaN
    if varies.any():
        test: Any = ttest_1samp(values[varies], 0.0, axis=1, alternative=alternative)
        p_values[varies] = test.pvalue
        low[varies], high[varies] = test.confidence_interval(1 - ALPHA)
    return p_values, low, high


def endpoints_of(results: Results) -> list[Endpoint]:
    """Return what runs are compared by; losses only if the experiment has thresholds."""
    endpoints = [
        Endpoint(domain, domain, partial(results.domain_score, domain=domain))
        for domain in results.domains
    ]
    if results.answers:
        endpoints.append(Endpoint("answers", "right answers", _right_answers))
    if results.thresholds:
        endpoints.append(Endpoint("loss", "final validation loss", _final_loss, is_score=False))
    for threshold in sorted(results.thresholds):
        value = partial(_log_compute, threshold=threshold)
        if not np.isnan([value(one) for one in results.measurements]).any():
            title = f"TFLOP to a loss of {threshold:g}, ratio"
            return [*endpoints, Endpoint("compute", title, value, is_score=False, is_ratio=True)]
    return endpoints


def _right_answers(one: Measurement) -> float:
    """Return the mean score of the tasks in points: exact answers, 1 - WER, or ROUGE-L."""
    scores = [
        max(0.0, 1 - value) if name.startswith("wer_") else value
        for name, value in one.answers.items()
        if name.startswith(("exact_", "rouge_", "wer_"))
    ]
    return 100 * float(np.mean(scores)) if scores else np.nan


def _final_loss(one: Measurement) -> float:
    return one.curve[-1].loss if one.curve else np.nan


def _log_compute(one: Measurement, threshold: float) -> float:
    point = first_at_most(one.curve, threshold)
    return log(point.teraflop) if point and point.teraflop else np.nan


def first_at_most(curve: Sequence[Validation], threshold: float) -> Validation | None:
    """Return the first validation whose loss is at or below a threshold."""
    return next((point for point in curve if point.loss <= threshold), None)


def result_tables(results: Results) -> list[Table]:
    """Return the tables of an experiment that have rows."""
    builders = (score_table, answer_table, cost_table, threshold_table, comparison_table)
    return [table for build in builders if (table := build(results)).rows]


def _arm_table(
    title: str,
    results: Results,
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    caption: str,
    text_columns: int = 0,
) -> Table:
    """Build a table from pairs of an arm and the cells after the titles of its choices."""
    axes = [axis.replace("_", " ") for axis in results.arms[results.reference]]
    cells = tuple((*results.arms[arm].values(), *row) for arm, row in rows)
    return Table(title, (*axes, *columns), cells, len(axes) + text_columns, caption)


def score_table(results: Results) -> Table:
    """Return arms × probe tasks."""
    rows = [
        (arm, [_mean([one.scores.get(name) for one in runs], 1, 100) for name in results.tasks])
        for arm, runs in results.by_arm().items()
        if results.tasks
    ]
    table = _arm_table(
        "Linear probes, protocol strict: scores in %",
        results,
        [f"{one.title} ({one.domain}, {one.test_clips})" for one in results.tasks.values()],
        rows,
        "In brackets: domain and test clips. ± is the standard deviation over "
        f"{len(results.seeds)} training runs with different seeds. Log-mel statistics are not "
        "trained.",
    )
    if not results.baseline:
        return table
    blanks = [""] * (table.text_columns - 1)
    cells = [_mean([results.baseline.get(name)], 1, 100) for name in results.tasks]
    return replace(table, rows=((BASELINE_NAME, *blanks, *cells), *table.rows))


def answer_table(results: Results) -> Table:
    """Return arms × metrics of the language model's answers for test clips."""
    rows = [
        (arm, [_mean([one.answers.get(name) for one in runs], 1, 100) for name in results.answers])
        for arm, runs in results.by_arm().items()
        if results.answers
    ]
    names = [name.replace("_", " ") for name in results.answers]
    caption = "Greedy answers of the language model for test clips, in %. `exact`: equal to the "
    caption += "reference after normalisation."
    if not all(name.startswith("exact") for name in names):
        caption += " In comparisons, right answers are a mean of `exact`, `rouge` and 1 - `wer`."
    return _arm_table("Answers", results, names, rows, caption)


def cost_table(results: Results) -> Table:
    """Return what each arm's own training cost."""
    rows = []
    for arm, runs in results.by_arm().items():
        costs = [one.cost for one in runs if one.cost]
        row = [
            _mean([cost.steps for cost in costs]),
            _mean([cost.audio_seconds for cost in costs]),
            _mean([cost.audio_seconds / (1 - cost.padding_fraction) for cost in costs]),
            _mean([cost.teraflop for cost in costs], 3),
            _mean([cost.seconds for cost in costs]),
            _mean([_final_loss(one) for one in runs], 3),
        ]
        rows += [(arm, row)] if costs else []
    if len(rows) > 1 and len({tuple(row) for _, row in rows}) == 1:  # arms measure the same runs
        rows = []
    columns = ("steps", "audio (s)", "audio with padding (s)", "TFLOP", "wall clock (s)")
    return _arm_table(
        "Training cost",
        results,
        (*columns, "final validation loss"),
        rows,
        "Of the arm's own training run, without its pretraining. FLOPs are computed from clip and "
        "text lengths: the forward pass, plus the backward pass where parameters are trained; "
        "padding is not counted. Wall-clock time of the training loop depends on what else runs "
        "on the machine, so compare FLOPs first. Losses are in nats per token, averaged over "
        "domains; they are comparable only for the same decoder and tokenizer.",
    )


def threshold_table(results: Results) -> Table:
    """Return the cost until each arm reached fixed validation losses."""
    rows = []
    for (arm, runs), threshold in product(results.by_arm().items(), results.thresholds):
        curves = [one.curve for one in runs if one.curve]
        points = [first_at_most(curve, threshold) for curve in curves]
        reached = [point for point in points if point]
        row = [
            f"{threshold:g}",
            f"{len(reached)} of {len(curves)}",
            _mean([point.step for point in reached]),
            _mean([point.audio_seconds for point in reached]),
            _mean([point.teraflop for point in reached], 3),
            _mean([point.seconds for point in reached]),
        ]
        rows += [(arm, row)] if curves else []
    return _arm_table(
        "Cost to reach a validation loss",
        results,
        ("loss ≤", "runs that reach it", "steps", "audio (s)", "TFLOP", "wall clock (s)"),
        rows,
        "At the first validation with this loss or less; means over the runs that reach it.",
    )


def comparison_table(results: Results) -> Table:
    """Return each arm compared with the reference, endpoint by endpoint."""
    found = compare(results)
    others = sum(not one.primary for one in found)
    correction = (
        f"The primary comparison is tested at 5 % alone. The {others} others get Holm's "
        "correction, and their p is at least that of the primary one."
        if results.primary.arm
        else f"Holm's correction covers all {others} comparisons; no primary one was named."
    )
    no_worse = (
        f" No worse: the lower end of the 95 % interval is above -{results.margin:g} points, with "
        "Holm's correction except for the primary comparison."
        if results.margin
        else ""
    )
    columns = ("endpoint", "difference", "by seed", "95 % interval", "p", "p, corrected")
    return _arm_table(
        "Comparisons of training runs",
        results,
        (*columns, "detectable", "verdict"),
        [(one.arm, _comparison_cells(one)) for one in found],
        f"Compared with {', '.join(results.arms[results.reference].values())}, paired by seed. ± "
        "is the standard deviation of the differences; intervals and p are of a paired t test "
        f"over training runs. {correction} Domains (unweighted means of their tasks) and answers "
        "are in points, losses in nats; ratios are compared by their logarithms. Detectable: the "
        "true difference that the test finds with a probability of 80 %, with this standard "
        f"deviation, number of runs (at least {MIN_RUNS}) and correction. Better, worse: the "
        f"corrected p is below 0.05. A claim needs {MIN_RUNS} runs.{no_worse}",
        text_columns=1,
    )


def _comparison_cells(one: Comparison) -> tuple[str, ...]:
    def number(value: float, sign: str = "+") -> str:
        if one.endpoint.is_ratio:
            return f"{exp(value):.3g}"
        return f"{value:{sign}.{1 if one.endpoint.is_score else 3}f}"

    times = "× " if one.endpoint.is_ratio else ""
    no_std = one.std is None or one.endpoint.is_ratio
    return (
        one.endpoint.title + (", primary" if one.primary else ""),
        times + number(one.mean) + ("" if no_std else f" ± {number(one.std or 0, '')}"),
        " · ".join(map(number, one.differences)),
        BLANK if np.isnan(one.low) else f"{number(one.low)} … {number(one.high)}",
        *(BLANK if np.isnan(p) else p_value(p) for p in (one.p_value, one.p_adjusted)),
        BLANK if np.isnan(one.detectable) else times + number(one.detectable, ""),
        one.verdict,
    )


def _mean(values: Sequence[float | None], decimals: int = 0, scale: float = 1) -> str:
    """Format a mean and, unless it rounds to zero, the standard deviation."""
    known = [scale * value for value in values if value is not None and not np.isnan(value)]
    if not known or len(known) < len(values):
        return BLANK
    mean, std = mean_std(known)
    deviation = f"{std or 0:.{decimals}f}"
    return f"{mean:.{decimals}f}" + (f" ± {deviation}" if float(deviation) else "")


def results_page(results: Results) -> str:
    """Return an experiment as Markdown: figure, tables, audit."""
    parts = [f"# {results.title}", results.question, f"![{results.title}]({results.name}.png)"]
    parts += [table.to_markdown() for table in result_tables(results)]
    if results.audits:
        lines = [f"- {line}" for line in results.audits]
        parts += ["**Overlap of training and test data**", "\n".join(lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


@rc_context(STYLE)
def plot_results(results: Results, path: Path) -> Path:
    """Draw scores and answers of all arms, and loss curves if `figure.curves` is set.

    Raises:
        UserError: There is nothing to draw, or the file cannot be written.
    """
    panels = [endpoint for endpoint in endpoints_of(results) if endpoint.is_score]
    if not panels:
        raise UserError("There are no scores and no answers to draw.")
    layout = [[panel.name for panel in panels for _ in range(2)]]
    if results.figure.curves:
        layout.append(["teraflop"] * len(panels) + ["seconds"] * len(panels))
    figure = new_figure(height=3.1 * len(layout) + 0.5)
    axes = figure.subplot_mosaic(layout)  # pyright: ignore[reportArgumentType, reportCallIssue]
    baseline = Measurement(BASELINE_NAME, 0, results.baseline)
    for panel in panels:
        _plot_scores(axes[panel.name], results, panel, len(panels))
        level = panel.value(baseline)
        if not np.isnan(level):
            axes[panel.name].axhline(
                level, color=BASELINE_COLOUR, linestyle=BASELINE_DASHES, label=BASELINE_NAME
            )
    if len(layout) > 1:
        _plot_curves(axes["teraflop"], results, "teraflop", "TFLOP of training")
        _plot_curves(axes["seconds"], results, "seconds", "wall clock of training (s)")
        axes["teraflop"].legend(fontsize=6)
    figure.suptitle(results.title, x=0.01, ha="left")
    handles, labels = axes[panels[0].name].get_legend_handles_labels()
    if handles:
        legend_below(figure, 3, handles=handles, labels=labels)
    return save_figure(figure, path)


def _styled_arms(results: Results) -> Iterator[tuple[str, int, int, str]]:
    """Yield each arm with the indices of its choices on the x and colour axes, and the latter."""
    x_axis, colour_axis = results.figure.x, results.figure.colour
    choices = list(dict.fromkeys(titles[x_axis] for titles in results.arms.values()))
    colours = list(dict.fromkeys(titles.get(colour_axis, "") for titles in results.arms.values()))
    for arm, titles in results.arms.items():
        colour = titles.get(colour_axis, "")
        yield arm, choices.index(titles[x_axis]), colours.index(colour), colour


def _plot_scores(axes: Axes, results: Results, endpoint: Endpoint, panels: int) -> None:
    """Draw mean, standard deviation and runs of each arm; points of one colour are a series."""
    figure, by_arm = results.figure, results.by_arm()
    arms = list(_styled_arms(results))
    count = 1 + max(colour for _, _, colour, _ in arms)
    shift = min(0.14, 0.6 / count)
    for index in range(count):
        series = [(arm, x, title) for arm, x, number, title in arms if number == index]
        colour = PALETTE[index % len(PALETTE)]
        positions, means, deviations = [], [], []
        for arm, x, _ in series:
            values = [endpoint.value(one) for one in by_arm[arm]]
            known = [value for value in values if not np.isnan(value)]
            if known:
                positions.append(x + (index - (count - 1) / 2) * shift)
                mean, std = mean_std(known)
                means.append(mean)
                deviations.append(std or 0.0)
                x_runs = [positions[-1]] * len(known)
                axes.plot(x_runs, known, ".", color=colour, markersize=3, alpha=0.5)
        axes.errorbar(
            positions,
            means,
            yerr=deviations,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            linestyle="-" if figure.ordered else "none",
            label=f"{figure.colour.replace('_', ' ')}: {series[0][2]}" if count > 1 else None,
        )
    tasks = [task.title for task in results.tasks.values() if task.domain == endpoint.name]
    title = ": ".join([endpoint.title, *([", ".join(tasks)] if tasks else [])])
    axes.set_title(fill(title, CHARACTERS_PER_PAGE // panels))
    choices = dict.fromkeys(titles[figure.x] for titles in results.arms.values())
    set_category_labels(axes, list(choices), panels)
    axes.set(xlim=(-0.5, len(choices) - 0.5), xlabel=figure.x.replace("_", " "), ylabel="%")
    axes.grid(visible=False, axis="x")


def _plot_curves(axes: Axes, results: Results, cost: str, label: str) -> None:
    """Draw the mean validation loss of each arm, with its standard deviation, by cost."""
    by_arm = results.by_arm()
    for arm, choice, line, _ in _styled_arms(results):
        curves = [one.curve for one in by_arm[arm] if one.curve]
        length = min(map(len, curves), default=0)
        spent = np.array([[getattr(p, cost) for p in curve[:length]] for curve in curves], float)
        if not length or np.isnan(spent).any():
            continue
        losses = np.array([[point.loss for point in curve[:length]] for curve in curves])
        mean, std = losses.mean(0), losses.std(0, ddof=min(1, len(losses) - 1))
        colour, style = PALETTE[choice % len(PALETTE)], LINE_STYLES[line % len(LINE_STYLES)]
        name = ", ".join(results.arms[arm].values())
        axes.plot(spent.mean(0), mean, color=colour, linestyle=style, label=name)
        axes.fill_between(
            spent.mean(0), mean - std, mean + std, color=colour, alpha=0.15, linewidth=0
        )
    for threshold in results.thresholds:
        axes.axhline(threshold, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(xlabel=label, ylabel="validation loss (nats per token)")
