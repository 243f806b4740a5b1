"""Results → tables: scores, answers, costs, comparisons between recipes, and the commands."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from whisper_aut.errors import UserError
from whisper_aut.experiments.analysis import (
    MIN_TRAININGS,
    ArmFacts,
    Comparison,
    Measure,
    Results,
    Spread,
    TaskResult,
    compare,
    domain_score,
    domains_of,
    price,
    spread,
)
from whisper_aut.probes.embed import BASELINE_NAME
from whisper_aut.report.plots import (
    BASELINE_COLOUR,
    MARKERS,
    PALETTE,
    new_figure,
    save_figure,
)
from whisper_aut.report.tables import BLANK, Table


def _table(
    title: str,
    caption: str,
    columns: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
    text_columns: int,
) -> Table:
    return Table(title, columns, rows, text_columns, caption)


def sheets(results: Results) -> list[Table]:
    """Return the tables of an experiment."""
    found = [score_sheet(results)] if results.tasks else []
    found += [answer_sheet(results)] if results.answers else []
    found += [cost_sheet(results)] if any(measure.cost for measure in results.measures) else []
    found += [price_sheet(results)] if _thresholds(results) else []
    comparisons = comparison_sheet(results)
    return [*found, comparisons] if comparisons.rows else found


def score_sheet(results: Results) -> Table:
    """Lay out arms × probe tasks."""
    tasks = results.tasks
    rows = []
    if results.baseline:
        known = [results.baseline.get(name) for name in tasks]
        rows.append(
            (
                BASELINE_NAME,
                *[""] * (_axes(results) - 1),
                *(_percent(_alone(result)) for result in known),
            )
        )
    for arm in results.arms:
        measures = results.of(arm.name)
        cells = [[m.tasks[name].score for m in measures if name in m.tasks] for name in tasks]
        rows.append((*arm.titles, *(_percent(spread(cell) if cell else None) for cell in cells)))
    head = (
        *_axis_names(results),
        *(f"{task.title} ({task.domain}, {task.test_clips})" for task in tasks.values()),
    )
    subsampled = any(task.spread is not None for task in tasks.values())  # by earlier releases
    each = f", each a mean over {results.probe_seeds} subsamples of the probe's training clips"
    return _table(
        "Linear probes, protocol strict: scores in %",
        "In brackets: domain and test clips. ± is the standard deviation over "
        f"{len(results.seeds)} trainings with other seeds{each * subsampled}. Log-mel statistics are "
        "not trained: one value.",
        head,
        tuple(rows),
        _axes(results),
    )


def answer_sheet(results: Results) -> Table:
    """Lay out arms × what the language model answers about held-out clips."""
    rows = []
    for arm in results.arms:
        measures = results.of(arm.name)
        cells = [
            [m.answers[name] for m in measures if name in m.answers] for name in results.answers
        ]
        rows.append((*arm.titles, *(_percent(spread(cell) if cell else None) for cell in cells)))
    head = (*_axis_names(results), *(name.replace("_", " ") for name in results.answers))
    caption = "What the language model answers about test clips, greedily, in %. `exact`: equal to the reference after normalisation."
    return _table("Answers", caption, head, tuple(rows), _axes(results))


def cost_sheet(results: Results) -> Table:
    """Lay out what each arm's own training cost."""
    rows = []
    for arm in results.arms:
        measures = results.of(arm.name)
        costs = [measure.cost for measure in measures if measure.cost]
        finals = [measure.curve[-1].loss for measure in measures if measure.curve]
        work = [cost.teraflop for cost in costs if cost.teraflop is not None]
        rows.append((
            *arm.titles,
            _number(spread([cost.steps for cost in costs]) if costs else None, "{:.0f}"),
            _number(spread([cost.audio_seconds for cost in costs]) if costs else None, "{:.0f}"),
            _number(spread([cost.audio_seconds / (1 - cost.padding_fraction) for cost in costs]) if costs else None, "{:.0f}"),
            _number(spread(work) if work else None, "{:.3f}"),
            _number(spread([cost.seconds for cost in costs]) if costs else None, "{:.0f}"),
            _number(spread(finals) if finals else None, "{:.3f}"),
        ))  # fmt: skip
    head = (
        *_axis_names(results),
        "steps",
        "audio heard (s)",
        "encoder ran on (s)",
        "TFLOP, useful",
        "wall clock (s)",
        "final validation loss",
    )
    caption = (
        "Of the arm's own training; what it starts from is not in it. FLOPs are counted from the lengths of clips and texts: "
        "forward, and backward where something learns; none for padding. Wall clock is of the training loop on a shared machine, so "
        "compare FLOPs first. Losses in nats per token, a mean over domains; they compare within a decoder and its tokens only."
    )
    return _table("Price of training", caption, head, tuple(rows), _axes(results))


def price_sheet(results: Results) -> Table:
    """Lay out what it took each arm to reach fixed validation losses."""
    rows = []
    for arm in results.arms:
        curves = [measure.curve for measure in results.of(arm.name) if measure.curve]
        for threshold in _thresholds(results) if curves else []:
            found = price(curves, threshold)
            cells = (
                (found.steps, "{:.0f}"),
                (found.audio_seconds, "{:.0f}"),
                (found.teraflop, "{:.3f}"),
                (found.seconds, "{:.0f}"),
            )
            rows.append(
                (
                    *arm.titles,
                    f"{threshold:g}",
                    f"{found.reached} of {found.seeds}",
                    *(_number(*cell) for cell in cells),
                )
            )
    head = (
        *_axis_names(results),
        "loss ≤",
        "seeds that reach it",
        "steps",
        "audio heard (s)",
        "TFLOP, useful",
        "wall clock (s)",
    )
    caption = "Read off at the first validation at or below it; means over the seeds that reach it."
    return _table("Price of a validation loss", caption, head, tuple(rows), _axes(results))


def comparison_sheet(results: Results) -> Table:
    """Lay out each arm against the reference, endpoint by endpoint."""
    titles = {arm.name: arm.titles for arm in results.arms}
    found = compare(results)
    head = (
        *_axis_names(results),
        "endpoint",
        "difference",
        "training by training",
        "95 % interval",
        "p",
        "p, corrected",
        "detectable",
        "verdict",
    )
    rows = tuple((*titles[one.arm], *_comparison_cells(one)) for one in found)
    caption = (
        f"Against {', '.join(titles[results.reference])}, paired by seed: the unit is a training. "
        "± is the standard deviation of the differences; intervals and p are of a paired t test over "
        f"trainings, {_correction(found, results)} Domains (their tasks count alike) and answers in "
        "points, losses in nats; ratios are compared by their logarithms. Detectable: the true "
        f"difference that this number of trainings ({MIN_TRAININGS} where there are fewer), with this "
        "standard deviation and correction, finds with a probability of 80 %. Better, worse: the "
        f"corrected p is below 0.05. A claim needs {MIN_TRAININGS} trainings. {_margin(results)}"
    )
    return _table("Comparisons of trainings", caption.strip(), head, rows, _axes(results) + 1)


def commands_page(results: Results) -> str:
    """Return every command of the experiment once: the runs in their order, then what measures each arm."""
    of_runs = {
        command: None
        for measure in results.measures
        for command in measure.commands
        if " train " in command
    }
    lines = [
        f"# {results.title}: commands",
        "",
        "## Runs, in the order in which they can be made",
        "",
        "```",
        *of_runs,
        "```",
        "",
        "## Probes",
        "",
    ]
    for measure in results.measures:
        probes = [command for command in measure.commands if command not in of_runs]
        lines += (
            [f"{measure.arm}, seed {measure.seed}:", "", "```", *probes, "```", ""]
            if probes
            else []
        )
    return "\n".join(lines)


def page(results: Results, picture: str) -> str:
    """Return an experiment as Markdown: figure, tables, audit."""
    parts = [f"![{results.title}: {results.question}]({picture})", ""]
    parts += [sheet.to_markdown() for sheet in sheets(results)]
    if results.audits:
        parts += [
            "**Audit of the training shards**",
            "",
            *(f"- {line}" for line in results.audits),
            "",
        ]
    return "\n".join(parts)


def put_into(document: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end NAME -->` in a page.

    Raises:
        UserError: the page is not there, or has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    try:
        before = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {document}: {error.strerror}.") from None
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.S)
    if not pattern.search(before):
        raise UserError(f"{document} has no lines {begin} and {end}; the tables go between them.")
    document.write_text(
        pattern.sub(lambda _: f"{begin}\n{text.strip()}\n{end}", before), encoding="utf-8"
    )


def _comparison_cells(one: Comparison) -> tuple[str, ...]:
    def show(value: float, sign: str = "+") -> str:
        if one.endpoint.ratio:
            return f"{math.exp(value):.3g}"
        return f"{value:{sign}.{1 if one.endpoint.points else 3}f}"

    times = "× " * one.endpoint.ratio
    deviation = f" ± {show(one.std, '')}" if one.std is not None and not one.endpoint.ratio else ""
    return (
        one.endpoint.title + ", primary" * one.primary,
        times + show(one.value) + deviation,
        " · ".join(map(show, one.per_training)),
        BLANK if one.low is None or one.high is None else f"{show(one.low)} … {show(one.high)}",
        _p_value(one.p_value),
        _p_value(one.p_adjusted),
        BLANK if one.detectable is None else times + show(one.detectable, ""),
        one.verdict,
    )


def _correction(found: Sequence[Comparison], results: Results) -> str:
    rest = sum(not one.primary for one in found)
    if results.settings.get("primary", {}).get("arm"):
        return (
            "the primary one at 5 % by itself, the others corrected after Holm for "
            f"{rest} comparisons and no smaller than the primary one's."
        )
    return f"corrected after Holm for all {rest} comparisons; no primary one was named beforehand."


def _margin(results: Results) -> str:
    margin = results.settings.get("margin")
    if not margin:
        return ""
    return (
        f"No worse: the lower end of the 95 % interval is above -{margin:g} points, corrected after "
        "Holm but for the primary comparison."
    )


def _thresholds(results: Results) -> list[float]:
    return results.settings.get("thresholds", [])


def _axes(results: Results) -> int:
    return len(results.arms[0].titles)


def _axis_names(results: Results) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in results.arms[0].choices)


def _alone(result: TaskResult | None) -> Spread | None:
    return None if result is None else Spread(result.score, None, 1)


def _percent(value: Spread | None) -> str:
    if value is None:
        return BLANK
    return f"{100 * value.mean:.1f}" + ("" if value.std is None else f" ± {100 * value.std:.1f}")


def _number(value: Spread | None, written: str) -> str:
    if value is None:
        return BLANK
    std = written.format(value.std or 0.0)
    return written.format(value.mean) + ("" if std == written.format(0) else f" ± {std}")


def _p_value(value: float | None) -> str:
    if value is None:
        return BLANK
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


Stroke = Literal["-", "--", ":", "-."]
LINES: tuple[Stroke, ...] = ("-", "--", ":", "-.")
SHIFT = 0.14  # between series at one place of x
PANEL_HEIGHT = 3.1
CHARACTERS = 100  # that stand side by side under all panels; more are turned
ANSWERS, PRICE = "answers", "price"  # panels beside those of domains
LABELS = {ANSWERS: "right answers (%)", PRICE: "wall clock of training (s)"}


@dataclass(frozen=True)
class _Layout:
    """Which axis goes where: its choices in order, and their titles."""

    x: str
    colour: str
    line: str
    choices: dict[str, list[str]]
    titles: dict[tuple[str, str], str]

    @classmethod
    def of(cls, results: Results) -> "_Layout":
        figure = results.settings["figure"]
        axes = list(results.arms[0].choices)
        choices = {
            axis: list(dict.fromkeys(arm.choices[axis] for arm in results.arms)) for axis in axes
        }
        titles = {
            (axis, arm.choices[axis]): title
            for arm in results.arms
            for axis, title in zip(axes, arm.titles, strict=True)
        }
        return cls(figure["x"], figure["colour"], figure["line"], choices, titles)

    def place(self, axis: str, arm: ArmFacts) -> int:
        return self.choices[axis].index(arm.choices[axis]) if axis else 0

    def series(self) -> list[tuple[str, str]]:
        """Return the combinations of colour and line, each drawn as one series."""
        return [
            (c, m)
            for c in self.choices.get(self.colour, [""])
            for m in self.choices.get(self.line, [""])
        ]


def draw(results: Results, path: Path) -> Path:
    """Draw the experiment.

    Raises:
        UserError: nothing is measured yet, or no room to write.
    """
    domains = domains_of(results)
    layout, curves = _Layout.of(results), results.settings["figure"]["curves"]
    panels = [*domains, *([ANSWERS] if results.answers else [])]
    if not panels:
        raise UserError("Nothing is measured yet: there is no figure to draw.")
    panels += [PRICE] if not curves and any(measure.cost for measure in results.measures) else []
    columns = max(2, len(panels))
    figure = new_figure(height=PANEL_HEIGHT * (1 + curves) + 0.5, columns=columns, rows=1 + curves)
    for axes, panel in zip(figure.axes, panels, strict=False):
        _draw_panel(axes, results, layout, panel)
    for axes in figure.axes[len(panels) : columns]:
        axes.set_axis_off()
    if curves:
        _draw_curves(figure.axes[columns], results, layout, "teraflop", "TFLOP of training, useful")
        _draw_curves(
            figure.axes[columns + 1], results, layout, "seconds", "wall clock of training (s)"
        )
        for axes in figure.axes[columns + 2 :]:
            axes.set_axis_off()
    figure.suptitle(results.title, x=0.01, ha="left", fontsize=12)
    handles = _legend(results, layout, curves)
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(3, len(handles)),
            frameon=False,
            fontsize=8.5,
        )
    return save_figure(figure, path)


def _draw_panel(axes: Axes, results: Results, layout: _Layout, panel: str) -> None:
    """Draw one domain, or the answers: a point per arm at its place along x."""
    series = layout.series()
    names = layout.choices[layout.x]
    for number, (colour, line) in enumerate(series):
        arms = [arm for arm in results.arms if _belongs(arm, layout, colour, line)]
        offset = (number - (len(series) - 1) / 2) * min(SHIFT, 0.6 / len(series))
        places, means, deviations = [], [], []
        hue, marker, stroke = _look(layout, colour, line)
        for arm in arms:
            values = [_value(results, measure, panel) for measure in results.of(arm.name)]
            known = [value for value in values if value is not None]
            if known:
                found, place = spread(known), layout.place(layout.x, arm) + offset
                places.append(place)
                means.append(found.mean)
                deviations.append(found.std or 0.0)
                axes.plot([place] * len(known), known, ".", color=hue, markersize=3, alpha=0.5)
        axes.errorbar(
            places,
            means,
            yerr=deviations,
            color=hue,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            capsize=2,
            linestyle=stroke if results.settings["figure"].get("ordered", True) else "none",
        )
    known = [result.score for result in results.baseline.values() if result.domain == panel]
    if known:
        axes.axhline(
            100 * float(np.mean(known)), color=BASELINE_COLOUR, linestyle=(0, (4, 2)), linewidth=1.2
        )
    titles = [fill(layout.titles[layout.x, name], 11) for name in names]
    panels = axes.get_gridspec().ncols  # pyright: ignore[reportOptionalMemberAccess]
    long = sum(len(title.split("\n")[0]) + 2 for title in titles) > CHARACTERS // panels
    if long:  # turned, and therefore in one line each
        axes.set_xticks(
            range(len(names)),
            [layout.titles[layout.x, name] for name in names],
            fontsize=8,
            rotation=35,
            ha="right",
        )
    else:
        axes.set_xticks(range(len(names)), titles, fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xlabel(layout.x.replace("_", " "), fontsize=9)
    axes.set_ylabel(LABELS.get(panel, "probe score (%)"), fontsize=9)
    if panel == PRICE:
        axes.set_ylim(0, None)
    tasks = ", ".join(result.title for result in results.tasks.values() if result.domain == panel)
    axes.set_title(panel if panel in LABELS else fill(f"{panel}: {tasks}", 24))
    axes.grid(axis="y")


def _draw_curves(axes: Axes, results: Results, layout: _Layout, spent: str, label: str) -> None:
    """Draw the mean validation loss of each arm against what was spent; every seed validates at the same steps."""
    for number, arm in enumerate(results.arms):
        curves = [measure.curve for measure in results.of(arm.name) if measure.curve]
        steps = (
            set.intersection(*({point.step for point in curve} for curve in curves))
            if curves
            else set()
        )
        points = [[point for point in curve if point.step in steps] for curve in curves]
        if not steps or any(getattr(point, spent) is None for curve in points for point in curve):
            continue
        price = np.mean([[getattr(point, spent) for point in curve] for curve in points], axis=0)
        losses = np.array([[point.loss for point in curve] for curve in points])
        colour, marker, stroke = _curve_look(results, layout, arm, number)
        axes.plot(
            price,
            losses.mean(0),
            color=colour,
            linestyle=stroke,
            marker=marker,
            markersize=3,
            linewidth=1.4,
        )
        if len(losses) > 1:
            deviation = losses.std(0, ddof=1)
            axes.fill_between(
                price,
                losses.mean(0) - deviation,
                losses.mean(0) + deviation,
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    for threshold in results.settings.get("thresholds", []):
        axes.axhline(threshold, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("validation loss (nats per token)", fontsize=9)
    axes.set_title("Loss against " + ("computation" if spent == "teraflop" else "time"))
    axes.grid(axis="both")


def _belongs(arm: ArmFacts, layout: _Layout, colour: str, line: str) -> bool:
    return arm.choices.get(layout.colour, "") == colour and arm.choices.get(layout.line, "") == line


def _value(results: Results, measure: Measure, panel: str) -> float | None:
    """Return what a panel shows of an arm and seed, in the unit of its axis."""
    if panel == PRICE:
        return measure.cost.seconds if measure.cost else None
    if panel == ANSWERS:
        exact = [value for name, value in measure.answers.items() if name.startswith("exact_")]
        return 100 * float(np.mean(exact)) if exact else None
    return 100 * domain_score(results, measure, panel)


def _look(layout: _Layout, colour: str, line: str) -> tuple[str, str, Stroke]:
    """Return colour, marker and stroke of a series. Without an order along x, nothing is joined by lines."""
    c = layout.choices[layout.colour].index(colour) if layout.colour else 0
    m = layout.choices[layout.line].index(line) if layout.line else 0
    return (
        PALETTE[c % len(PALETTE)],
        MARKERS[(c if not layout.line else m) % len(MARKERS)],
        LINES[m % len(LINES)],
    )


def _curve_look(
    results: Results, layout: _Layout, arm: ArmFacts, number: int
) -> tuple[str, str, Stroke]:
    """Return how an arm's curve looks: its colour along x, its stroke along the axis of colours."""
    if not layout.colour:
        return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], "-"
    x, stroke = layout.place(layout.x, arm), layout.place(layout.colour, arm)
    return PALETTE[x % len(PALETTE)], MARKERS[x % len(MARKERS)], LINES[stroke % len(LINES)]


def _legend(results: Results, layout: _Layout, curves: bool) -> list[Line2D]:
    handles = []
    for colour, line in layout.series() if layout.colour or layout.line else []:
        hue, marker, stroke = _look(layout, colour, line)
        parts = [
            f"{axis.replace('_', ' ')}: {layout.titles[axis, name]}"
            for axis, name in ((layout.colour, colour), (layout.line, line))
            if axis
        ]
        handles.append(
            Line2D([], [], color=hue, marker=marker, linestyle=stroke, label=", ".join(parts))
        )
    if results.baseline:
        handles.append(
            Line2D([], [], color=BASELINE_COLOUR, linestyle=(0, (4, 2)), label=BASELINE_NAME)
        )
    return handles + (_curve_legend(results, layout) if curves else [])


def _curve_legend(results: Results, layout: _Layout) -> list[Line2D]:
    """Name what tells curves apart: colours alone, or colours along x and strokes along the axis of colours."""
    shown = [arm for arm in results.arms if any(measure.curve for measure in results.of(arm.name))]
    handles: dict[str, Line2D] = {}
    for number, arm in enumerate(shown):
        colour, marker, stroke = _curve_look(results, layout, arm, number)
        if not layout.colour:
            label = "curve: " + ", ".join(arm.titles)
            handles[label] = Line2D([], [], color=colour, marker=marker, markersize=3, label=label)
            continue
        label = f"curve: {layout.titles[layout.x, arm.choices[layout.x]]}"
        handles[label] = Line2D([], [], color=colour, marker=marker, markersize=3, label=label)
        label = f"curve: {layout.titles[layout.colour, arm.choices[layout.colour]]}"
        handles[label] = Line2D([], [], color="#000000", linestyle=stroke, label=label)
    return sorted(handles.values(), key=lambda handle: handle.get_color() == "#000000")
