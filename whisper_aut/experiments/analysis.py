"""Results of an experiment: scores and costs of each arm and seed, paired tests, tables, a figure.

The tests ask whether one recipe is better than another, so their unit is the training run: arms
are compared by paired t tests over seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from math import exp, isnan, log, nan
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Self

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeFloat, model_validator
from pydantic.dataclasses import dataclass as schema

from whisper_aut.config import Domain
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.errors import UserError
from whisper_aut.experiments.grid import QuestionSettings
from whisper_aut.probes.encoders import BASELINE_NAME
from whisper_aut.probes.stats import (
    MIN_TRAININGS,
    PairedTest,
    detectable_difference,
    mean_std,
    paired_tests,
)
from whisper_aut.report import plots
from whisper_aut.report.tables import BLANK, Table, p_value
from whisper_aut.schema import build
from whisper_aut.utils import read_json, write_json

LOWER_IS_BETTER = ("loss", "compute")  # of the endpoints; the margin does not apply to them


@dataclass(frozen=True)
class TaskMetadata:
    """What tables say about a probe task."""

    title: str
    domain: Domain
    test_clips: int


@dataclass(frozen=True)
class Progress:
    """A training run up to a step: its validation loss there, if it was validated, and its cost.

    Validation and checkpoints do not count.
    """

    step: int
    loss: FiniteFloat | None
    audio_seconds: FiniteFloat
    teraflop: NonNegativeFloat | None
    seconds: FiniteFloat


@dataclass(frozen=True)
class Measurement:
    """Results of one arm with one seed.

    Attributes:
        scores: Probe task → score, 0 … 1.
        answers: Metric of the language model's answers, such as `exact_sound_class` → value.
        curve: The training run at each validation and at its end; empty for random weights.
        padding_fraction: Of the frames that the encoder processed.
    """

    arm: str
    seed: int
    scores: dict[str, float]
    answers: dict[str, float] = field(default_factory=dict)
    curve: tuple[Progress, ...] = ()
    padding_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None

    @property
    def final_loss(self) -> float:
        loss = self.curve[-1].loss if self.curve else None
        return nan if loss is None else loss

    @property
    def padded_seconds(self) -> float:
        """Seconds of audio that the encoder processed in training, padding included."""
        return self.curve[-1].audio_seconds / (1 - (self.padding_fraction or 0))

    @property
    def right_answers(self) -> float:
        """Mean score of the tasks in points: exact answers, 1 - WER, or ROUGE-L."""
        scores = [
            max(0.0, 1 - value) if name.startswith("wer_") else value
            for name, value in self.answers.items()
            if name.startswith(("exact_", "rouge_", "wer_"))
        ]
        return 100 * float(np.mean(scores)) if scores else nan

    def reached(self, loss: float) -> Progress | None:
        """Return the first validation whose loss is at or below this one."""
        found = (one for one in self.curve if one.loss is not None and one.loss <= loss)
        return next(found, None)

    def log_teraflop(self, loss: float) -> float:
        """Return the logarithm of the computation up to a loss; NaN if it was not reached."""
        point = self.reached(loss)
        return log(point.teraflop) if point and point.teraflop else nan


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
        axes = self.arms.get(self.reference, {}).keys()
        if self.figure.x not in axes or any(one.keys() != axes for one in self.arms.values()):
            raise ValueError("arms: each needs the axes of the reference, with that of figure.x")
        measured = sorted((one.arm, one.seed) for one in self.measurements)
        if measured != sorted(product(self.arms, self.seeds)):
            raise ValueError("measurements: every arm must be measured once with each seed")
        scored = self.baseline.keys() | {name for one in self.measurements for name in one.scores}
        if not scored <= self.tasks.keys():
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

    @property
    def reached_by_all(self) -> float | None:
        """The lowest threshold that every training run reaches."""

        def is_reached(loss: float) -> bool:
            return not any(isnan(one.log_teraflop(loss)) for one in self.measurements)

        return min(filter(is_reached, self.thresholds), default=None)

    def by_arm(self) -> dict[str, list[Measurement]]:
        """Return the measurements of each arm, ordered by seed."""
        ordered = sorted(self.measurements, key=lambda one: one.seed)
        return {arm: [one for one in ordered if one.arm == arm] for arm in self.arms}

    def domain_score(self, one: Measurement, domain: str) -> float:
        """Return the unweighted mean score of a domain's tasks, in percent; NaN without any."""
        found = [score for name, score in one.scores.items() if self.tasks[name].domain == domain]
        return 100 * float(np.mean(found)) if found else nan

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file that `save` wrote.

        Raises:
            UserError: The file cannot be read, or does not hold results of this release.
        """
        return build(cls, read_json(path), str(path))


# ---- Comparisons of arms ------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One arm minus the reference in one endpoint, paired by seed."""

    arm: str
    endpoint: str
    primary: bool
    test: PairedTest

    @property
    def verdict(self) -> str:
        return self.test.verdict(lower_is_better=self.endpoint in LOWER_IS_BETTER)


def compare(results: Results) -> list[Comparison]:
    """Compare every arm with the reference in every endpoint that both have."""
    margin, primary = results.margin or nan, (results.primary.arm, results.primary.endpoint)
    by_arm, rows = results.by_arm(), {}
    reference = by_arm.pop(results.reference)
    for (arm, runs), (endpoint, value) in product(by_arm.items(), endpoints(results).items()):
        pairs = zip(runs, reference, strict=True)
        differences = [value(one) - value(other) for one, other in pairs]
        if differences and not np.isnan(differences).any():
            rows[arm, endpoint] = differences
    tests = paired_tests(
        list(rows.values()),
        [nan if endpoint in LOWER_IS_BETTER else margin for _, endpoint in rows],
        list(rows).index(primary) if primary in rows else None,
        gated=bool(results.primary.arm),
    )
    return [
        Comparison(arm, endpoint, (arm, endpoint) == primary, test)
        for (arm, endpoint), test in zip(rows, tests, strict=True)
    ]


def endpoints(results: Results) -> dict[str, Callable[[Measurement], float]]:
    """Return what runs are compared by; losses only if the experiment has thresholds.

    Domains and answers are in points, `compute` is a logarithm. A value is NaN if a run has none.
    """
    found: dict[str, Callable[[Measurement], float]] = {
        domain: partial(results.domain_score, domain=domain) for domain in results.domains
    }
    if results.answers:
        found["answers"] = lambda one: one.right_answers
    if results.thresholds:
        found["loss"] = lambda one: one.final_loss
    if (lowest := results.reached_by_all) is not None:
        found["compute"] = lambda one: one.log_teraflop(lowest)
    return found


# ---- Tables and page ----------------------------------------------------------------------------


def result_tables(results: Results) -> list[Table]:
    """Return the tables of an experiment that have rows."""
    builders = (score_table, answer_table, cost_table, threshold_table, comparison_table)
    return [table for build_table in builders if (table := build_table(results)).rows]


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


def _mean(values: Sequence[float | None], decimals: int = 0) -> str:
    """Format a mean and, unless it rounds to zero, the standard deviation."""
    known = [value for value in values if value is not None and not isnan(value)]
    if not known or len(known) < len(values):
        return BLANK
    mean, std = mean_std(known)
    deviation = f"{std or 0:.{decimals}f}"
    return f"{mean:.{decimals}f}" + (f" ± {deviation}" if float(deviation) else "")


def _percent(found: Sequence[Mapping[str, float]], names: Iterable[str]) -> list[str]:
    """Format the means of scores or answers, in percent."""
    return [_mean([100 * one.get(name, nan) for one in found], 1) for name in names]


def _costs(points: Sequence[Progress]) -> list[str]:
    """Format the means of steps, audio seconds, TFLOP and wall-clock seconds."""
    return [
        _mean([point.step for point in points]),
        _mean([point.audio_seconds for point in points]),
        _mean([point.teraflop for point in points], 3),
        _mean([point.seconds for point in points]),
    ]


def score_table(results: Results) -> Table:
    """Return arms × probe tasks."""
    rows = [
        (arm, _percent([one.scores for one in runs], results.tasks))
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
    baseline = (BASELINE_NAME, *blanks, *_percent([results.baseline], results.tasks))
    return replace(table, rows=(baseline, *table.rows))


def answer_table(results: Results) -> Table:
    """Return arms × metrics of the language model's answers for test clips."""
    rows = [
        (arm, _percent([one.answers for one in runs], results.answers))
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
        trained = [one for one in runs if one.curve]
        steps, audio, *others = _costs([one.curve[-1] for one in trained])
        padded = _mean([one.padded_seconds for one in trained])
        loss = _mean([one.final_loss for one in trained], 3)
        rows += [(arm, (steps, audio, padded, *others, loss))] if trained else []
    if len(rows) > 1 and len({row for _, row in rows}) == 1:  # arms measure the same runs
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
    for (arm, runs), loss in product(results.by_arm().items(), results.thresholds):
        points = [one.reached(loss) for one in runs if one.curve]
        reached = [point for point in points if point]
        row = (f"{loss:g}", f"{len(reached)} of {len(points)}", *_costs(reached))
        rows += [(arm, row)] if points else []
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
        [(one.arm, _comparison_cells(results, one)) for one in found],
        f"Compared with {', '.join(results.arms[results.reference].values())}, paired by seed. ± "
        "is the standard deviation of the differences; intervals and p are of a paired t test "
        f"over training runs. {correction} Domains (unweighted means of their tasks) and answers "
        "are in points, losses in nats; ratios are compared by their logarithms. Detectable: the "
        "true difference that the test finds with a probability of 80 %, with this standard "
        f"deviation, number of runs (at least {MIN_TRAININGS}) and correction. Better, worse: the "
        f"corrected p is below 0.05. A claim needs {MIN_TRAININGS} runs.{no_worse}",
        text_columns=1,
    )


def _comparison_cells(results: Results, one: Comparison) -> tuple[str, ...]:
    test, is_ratio = one.test, one.endpoint == "compute"
    times, decimals = "× " if is_ratio else "", 3 if one.endpoint == "loss" else 1
    titles = {
        "answers": "right answers",
        "loss": "final validation loss",
        "compute": f"TFLOP to a loss of {results.reached_by_all or 0:g}, ratio",
    }

    def number(value: float, sign: str = "+") -> str:
        return f"{exp(value):.3g}" if is_ratio else f"{value:{sign}.{decimals}f}"

    with_std = len(test.differences) > 1 and not is_ratio
    cells = (
        titles.get(one.endpoint, one.endpoint) + (", primary" if one.primary else ""),
        times + number(test.mean) + (f" ± {number(test.std, '')}" if with_std else ""),
        " · ".join(map(number, test.differences)),
    )
    if isnan(test.p_value):
        return (*cells, *[BLANK] * 4, one.verdict)
    runs = max(len(test.differences), MIN_TRAININGS)
    return (
        *cells,
        f"{number(test.low)} … {number(test.high)}",
        p_value(test.p_value),
        p_value(test.p_adjusted),
        times + number(detectable_difference(test.std, runs, test.alpha), ""),
        one.verdict,
    )


def results_page(results: Results) -> str:
    """Return an experiment as Markdown: figure, tables, audit."""
    parts = [f"# {results.title}", results.question, f"![{results.title}]({results.name}.png)"]
    parts += [table.to_markdown() for table in result_tables(results)]
    if results.audits:
        lines = [f"- {line}" for line in results.audits]
        parts += ["**Overlap of training and test data**", "\n".join(lines)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# ---- Figure -------------------------------------------------------------------------------------


@rc_context(plots.STYLE)
def plot_results(results: Results, path: Path) -> Path:
    """Draw scores and answers of all arms, and loss curves if `figure.curves` is set.

    Raises:
        UserError: There is nothing to draw, or the file cannot be written.
    """
    panels = {
        name: value for name, value in endpoints(results).items() if name not in LOWER_IS_BETTER
    }
    if not panels:
        raise UserError("There are no scores and no answers to draw.")
    layout = [[name for name in panels for _ in range(2)]]
    if results.figure.curves:
        layout.append(["teraflop"] * len(panels) + ["seconds"] * len(panels))
    figure = plots.new_figure(height=3.1 * len(layout) + 0.5)
    axes = figure.subplot_mosaic(layout)  # pyright: ignore[reportArgumentType, reportCallIssue]
    baseline = Measurement(BASELINE_NAME, 0, results.baseline)
    for name, value in panels.items():
        _plot_scores(axes[name], results, name, value, len(panels))
        if not isnan(level := value(baseline)):
            style = {"color": plots.BASELINE_COLOUR, "linestyle": plots.BASELINE_DASHES}
            axes[name].axhline(level, label=BASELINE_NAME, **style)
    if results.figure.curves:
        _plot_curves(axes["teraflop"], results, "teraflop", "TFLOP of training")
        _plot_curves(axes["seconds"], results, "seconds", "wall clock of training (s)")
        axes["teraflop"].legend(fontsize=6)
    figure.suptitle(results.title, x=0.01, ha="left")
    handles, labels = axes[next(iter(panels))].get_legend_handles_labels()
    if handles:
        plots.legend_below(figure, 3, handles=handles, labels=labels)
    return plots.save_figure(figure, path)


def _choices(results: Results, axis: str) -> list[str]:
    """Return the titles of an axis' choices; one empty title if the arms do not have the axis."""
    return list(dict.fromkeys(titles.get(axis, "") for titles in results.arms.values()))


def _plot_scores(
    axes: Axes, results: Results, name: str, value: Callable[[Measurement], float], panels: int
) -> None:
    """Draw mean, standard deviation and runs of each arm; points of one colour are a series."""
    figure, by_arm = results.figure, results.by_arm()
    choices, colours = _choices(results, figure.x), _choices(results, figure.colour)
    shift = min(0.14, 0.6 / len(colours))
    for index, title in enumerate(colours):
        line, points = "-" if figure.ordered else "none", []
        style: dict[str, Any] = plots.series_style(index) | {"linestyle": line}
        for arm, titles in results.arms.items():
            known = [x for x in map(value, by_arm[arm]) if not isnan(x)]
            if known and titles.get(figure.colour, "") == title:
                x = choices.index(titles[figure.x]) + (index - (len(colours) - 1) / 2) * shift
                mean, std = mean_std(known)
                points.append((x, mean, std or 0.0))
                dots = {"color": style["color"], "markersize": 3, "alpha": 0.5}
                axes.plot([x] * len(known), known, ".", **dots)
        label = f"{figure.colour.replace('_', ' ')}: {title}" if len(colours) > 1 else None
        x, means, deviations = np.reshape(points, (-1, 3)).T
        axes.errorbar(x, means, deviations, label=label, **style)
    tasks = ", ".join(task.title for task in results.tasks.values() if task.domain == name)
    title = f"{name}: {tasks}" if tasks else "right answers"
    axes.set_title(fill(title, plots.CHARACTERS_PER_PAGE // panels))
    plots.set_category_labels(axes, choices, panels)
    axes.set(xlim=(-0.5, len(choices) - 0.5), xlabel=figure.x.replace("_", " "), ylabel="%")
    axes.grid(visible=False, axis="x")


def _plot_curves(axes: Axes, results: Results, cost: str, label: str) -> None:
    """Draw the mean validation loss of each arm, with its standard deviation, by cost."""
    figure, by_arm = results.figure, results.by_arm()
    choices, colours = _choices(results, figure.x), _choices(results, figure.colour)
    for arm, titles in results.arms.items():
        runs = [one.curve for one in by_arm[arm] if one.curve]
        curves = [[point for point in curve if point.loss is not None] for curve in runs]
        length = min(map(len, curves), default=0)
        spent = np.array([[getattr(p, cost) for p in curve[:length]] for curve in curves], float)
        if not length or np.isnan(spent).any():
            continue
        losses = np.array([[point.loss for point in curve[:length]] for curve in curves])
        mean, std = losses.mean(0), losses.std(0, ddof=min(1, len(losses) - 1))
        colour = plots.series_style(choices.index(titles[figure.x]))["color"]
        line = plots.series_style(colours.index(titles.get(figure.colour, "")))["linestyle"]
        x = spent.mean(0)
        axes.plot(x, mean, color=colour, linestyle=line, label=", ".join(titles.values()))
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    for threshold in results.thresholds:
        axes.axhline(threshold, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(xlabel=label, ylabel="validation loss (nats per token)")
