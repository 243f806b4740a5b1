"""Results → one figure: scores by domain along an axis of the experiment, and loss curves over the price where they are asked for.

In: `Results`. Out: a PNG. Next: `docs/results.md`. Points are means over seeds, whiskers ± 1 standard deviation, small marks the single
seeds. Colours and markers are those of `report.plots`, which common kinds of colour blindness keep apart.
"""

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from whisper_aut.errors import UserError
from whisper_aut.experiments.results import ArmFacts, Measure, Results
from whisper_aut.experiments.statistics import domain_score, domains_of, spread
from whisper_aut.probes.baseline import BASELINE_NAME
from whisper_aut.report.plots import (
    BASELINE_COLOUR,
    MARKERS,
    PALETTE,
    blank_figure,
    panel_title,
    save_figure,
)

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
    figure = blank_figure(
        height=PANEL_HEIGHT * (1 + curves) + 0.5, columns=columns, rows=1 + curves
    )
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
    panel_title(axes, panel if panel in LABELS else fill(f"{panel}: {tasks}", 24))
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
    panel_title(axes, "Loss against " + ("computation" if spent == "teraflop" else "time"))
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
