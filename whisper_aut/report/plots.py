"""Draw probe scores and training logs as PNG charts.

Colours are those of Okabe and Ito, which stay distinct under the common kinds of colour blindness
(https://jfly.uni-koeln.de/color/).
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError

from whisper_aut.errors import UserError
from whisper_aut.probes.embed import Embeddings, load_cached
from whisper_aut.probes.results import AVERAGE, Average, Scores, TaskScore
from whisper_aut.utils import atomic_path

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
DOMAIN_COLOURS = {"speech": "#0072B2", "sound": "#E69F00", "music": "#009E73"}
BASELINE_COLOUR = "#333333"
BASELINE_DASHES = (0, (4, 2))
MARKERS = "os^Dv"
LINE_STYLES = ("-", "--", ":", "-.")
FEW_SHOT_COLUMNS = 3
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "errorbar.capsize": 2,
    "figure.titlesize": 12,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "text.parse_math": False,  # names may contain dollar signs
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
PAGE_WIDTH_INCHES = 8.0
DOTS_PER_INCH = 150
BAR_GROUP_WIDTH = 0.8  # of the distance between two tasks
CHARACTERS_PER_PAGE = 90  # in the tick labels below a figure
MAX_MARKED_POINTS = 30
# Maps: at most this many clips of a task and t-SNE iterations; no map for fewer clips.
MAX_MAP_CLIPS, MAX_TSNE_STEPS, MIN_MAP_CLIPS = 400, 500, 12
# At most this many classes get a legend or numbers in a matrix, and axis labels in a matrix.
MAX_LEGEND_CLASSES, MAX_LABELLED_CLASSES = 12, 36

Series = list[tuple[float, float]]  # (step, value)


def new_figure(height: float) -> Figure:
    """Return an empty figure of page width; `height` is in inches.

    Call it, and everything that draws on the figure, under `rc_context(STYLE)`.
    """
    figure = Figure(figsize=(PAGE_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, there is no global state and no figure to close
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, see `atomic_path`."""
    path = Path(path)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, format="png")
    return path


def series_style(index: int) -> dict[str, str]:
    """Return the colour, marker and line style of the series with this number."""
    styles = {"color": PALETTE, "marker": MARKERS, "linestyle": LINE_STYLES}
    return {name: values[index % len(values)] for name, values in styles.items()}


def legend_below(figure: Figure, columns: int = 4, **options: object) -> None:
    figure.legend(loc="outside lower center", ncols=columns, **options)  # pyright: ignore[reportArgumentType]


@rc_context(STYLE)
def plot_scores(scores: Scores, path: str | Path, *, baseline: str | None = None) -> Path:
    """Draw a bar for each task and encoder; `baseline` is a line across each task's bars instead.

    Whiskers are the standard deviation over seeds or, for probes that were fitted only once, the
    95 % interval.

    Raises:
        UserError: The baseline is the only encoder.
    """
    encoders = [name for name in scores.encoders if name != baseline]
    if not encoders:
        raise UserError("There are no scores to draw besides the baseline's.")
    cells, labels = _bars_by_position(scores)
    figure = new_figure(height=4.2)
    axes = figure.subplots()
    width = BAR_GROUP_WIDTH / len(encoders)
    for index, encoder in enumerate(encoders):
        offset = (index - (len(encoders) - 1) / 2) * width
        bars = {x: cell for (name, x), cell in cells.items() if name == encoder}
        axes.bar(
            [x + offset for x in bars],
            [100 * cell.mean for cell in bars.values()],
            0.94 * width,
            yerr=100 * np.array([_whiskers(cell) for cell in bars.values()]).reshape(-1, 2).T,
            color=PALETTE[index % len(PALETTE)],
            hatch="//" if index >= len(PALETTE) else None,
            label=scores.label(encoder),
            error_kw={"elinewidth": 1.0},
        )
    if baseline is not None:
        lines = {x: 100 * cell.mean for (name, x), cell in cells.items() if name == baseline}
        axes.hlines(
            list(lines.values()),
            [x - 0.46 for x in lines],
            [x + 0.46 for x in lines],
            colors=BASELINE_COLOUR,
            linestyles=BASELINE_DASHES,
            label=baseline,
        )
    set_category_labels(axes, labels)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 102 if any(cell.mean > 0.98 for cell in cells.values()) else 100)
    accuracies = all(entry.metric == "accuracy" for entry in scores.entries)
    axes.set_ylabel("accuracy (%)" if accuracies else "score (%)")
    kinds = ", ".join(dict.fromkeys(entry.kind for entry in scores.entries))
    axes.set_title(
        f"Probes ({kinds}), protocol {scores.protocol}\nwhiskers: {_describe_whiskers(scores)}"
    )
    legend_below(figure)
    return save_figure(figure, path)


@rc_context(STYLE)
def plot_interpolation(
    curves: Mapping[str, Mapping[float, tuple[float, float]]], best: float, path: str | Path
) -> Path:
    """Draw test scores (lines) and validation scores (dashed) of tasks, given by fraction."""
    figure = new_figure(height=3.6)
    axes = figure.subplots()
    for (task, curve), colour in zip(curves.items(), cycle(PALETTE), strict=False):
        valid, test = (100 * np.array([curve[x][part] for x in curve]) for part in (0, 1))
        axes.plot(list(curve), valid, "--", color=colour)
        axes.plot(list(curve), test, "o-", color=colour, label=task)
    axes.axvline(best, color=BASELINE_COLOUR, linestyle=BASELINE_DASHES)
    axes.set(xlabel="fraction of the trained weights", ylabel="test score, % (dashed: validation)")
    legend_below(figure)
    return save_figure(figure, path)


def set_category_labels(axes: Axes, labels: Sequence[str], panels: int = 1) -> None:
    """Label the positions 0, 1, … of the x axis: wrapped, or rotated if words are too long.

    `panels` is the number of panels side by side.
    """
    width = max(1, CHARACTERS_PER_PAGE // (len(labels) * panels))
    if max((len(word) for label in labels for word in label.split()), default=0) > width:
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    else:
        axes.set_xticks(range(len(labels)), [fill(label, width) for label in labels])


def _bars_by_position(
    scores: Scores,
) -> tuple[dict[tuple[str, int], TaskScore | Average], list[str]]:
    """Return scores by `(encoder, position on the x axis)`, and the labels of the x axis.

    The axis has every task and, if there are several, their weighted average at the end.
    """
    tasks = scores.tasks
    titles = {entry.task: entry.title for entry in scores.entries}
    cells: dict[tuple[str, int], TaskScore | Average] = {
        (entry.encoder, tasks.index(entry.task)): entry for entry in scores.entries
    }
    labels = [titles[task] for task in tasks]
    if len(tasks) > 1:
        labels.append("weighted average")
        cells |= {(a.encoder, len(tasks)): a for a in scores.averages() if a.domain == AVERAGE}
    return cells, labels


def _whiskers(score: TaskScore | Average) -> tuple[float, float]:
    """Return how far the whisker reaches below and above the mean."""
    if score.std is not None:
        return score.std, score.std
    low, high = score.interval
    return max(0.0, score.mean - low), max(0.0, high - score.mean)


def _describe_whiskers(scores: Scores) -> str:
    seeds = max(len(entry.seeds) for entry in scores.entries)
    parts = [f"± 1 standard deviation over {seeds} seeds"] if seeds > 1 else []
    if any(entry.std is None for entry in scores.entries):
        parts.append("95 % interval over test clips")
    return " or ".join(parts)


@rc_context(STYLE)
def plot_layers(scores: Scores, weighted: Scores | None, path: Path) -> Path:
    """Draw score against layer, one panel per domain, and the learned weights of the layers.

    `scores` are those of one encoder for each layer, see `TaskScore.layers`. `weighted` are those
    of a probe on the weighted sum of layers, drawn as a dashed line.
    """
    domains = scores.domains
    figure = new_figure(height=3.4)
    panels = figure.subplots(1, len(domains) + (weighted is not None), squeeze=False)[0]
    layer_of = {entry.encoder: entry.layers[0] for entry in scores.entries}
    averages = scores.averages()
    for axes, domain in zip(panels, domains, strict=False):
        entries = [entry for entry in scores.entries if entry.domain == domain]
        for index, task in enumerate(dict.fromkeys(entry.task for entry in entries)):
            own = sorted((e.layers[0], 100 * e.mean, e.title) for e in entries if e.task == task)
            layers, means, titles = zip(*own, strict=True)
            axes.plot(layers, means, label=titles[0], **series_style(index))
        found = sorted(
            (layer_of[a.encoder], a.mean, *a.interval) for a in averages if a.domain == domain
        )
        layers, mean, low, high = np.array(found).T
        axes.plot(layers, 100 * mean, color="black", linewidth=2, label="weighted average")
        axes.fill_between(layers, 100 * low, 100 * high, color="black", alpha=0.12, linewidth=0)
        for average in weighted.averages() if weighted else ():
            if average.domain == domain:
                axes.axhline(
                    100 * average.mean,
                    color=BASELINE_COLOUR,
                    linestyle=BASELINE_DASHES,
                    label="learned weights",
                )
        axes.set(title=domain, xlabel="layer")
        axes.legend(fontsize=6)
    panels[0].set_ylabel("score (%)")
    for index, entry in enumerate(weighted.entries if weighted else ()):
        style = series_style(index) | {"linestyle": "-"}
        panels[-1].plot(entry.layers, entry.layer_weights, label=entry.title, **style)
        panels[-1].set(title="learned weights", xlabel="layer", ylim=(0, None))
        panels[-1].legend(fontsize=6)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return save_figure(figure, path)


@rc_context(STYLE)
def plot_few_shot(scores: Scores, path: Path) -> Path:
    """Draw score against training clips per class, one panel per task and one line per encoder,
    with the standard deviation over draws of clips.
    """
    rows = -(-len(scores.tasks) // FEW_SHOT_COLUMNS)
    figure = new_figure(height=0.5 + 2.4 * rows)
    columns = min(FEW_SHOT_COLUMNS, len(scores.tasks))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    shots = sorted({entry.shots for entry in scores.entries})
    lines: dict[str, int] = {}
    for axes, task in zip(panels, scores.tasks, strict=False):
        series = defaultdict(list)
        for entry in (entry for entry in scores.entries if entry.task == task):
            series[entry.encoder.removesuffix(f", {entry.shots} a class")].append(entry)
            axes.set_title(entry.title)
        for encoder, entries in series.items():
            axes.errorbar(
                [entry.shots for entry in entries],
                [100 * entry.mean for entry in entries],
                yerr=[100 * (entry.std or 0) for entry in entries],
                label=encoder,
                **series_style(lines.setdefault(encoder, len(lines))),
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.set(xlabel="training clips per class", ylabel="score (%)", ylim=(0, 102))
    for axes in panels[len(scores.tasks) :]:
        axes.remove()
    handles = panels[0].get_legend_handles_labels()
    legend_below(figure, handles=handles[0], labels=handles[1])
    return save_figure(figure, path)


@rc_context(STYLE)
def plot_losses(metrics_csv: str | Path, path: str | Path) -> Path:
    """Draw training and validation loss against the step, with one line per domain.

    Raises:
        UserError: The log cannot be read or has no loss.
    """
    panels: dict[str, dict[str, Series]] = defaultdict(dict)
    for name, points in sorted(read_metrics(metrics_csv).items()):
        split, _, metric = name.partition("/")
        if split in ("train", "valid") and "loss" in metric:
            panels[split][metric] = points
    if not panels:
        raise UserError(
            f"{metrics_csv} has no values in columns train/loss… or valid/loss…: nothing to draw."
        )
    figure = new_figure(height=3.6)
    figure.subplots(1, len(panels), sharey=True)
    for axes, (split, lines) in zip(figure.axes, panels.items(), strict=True):
        for index, (metric, points) in enumerate(lines.items()):
            domain = metric.removeprefix("loss_")
            colour = DOMAIN_COLOURS.get(domain, PALETTE[(index + 3) % len(PALETTE)])
            if metric == "loss":
                _plot_series(axes, points, color="black", label="all domains", linewidth=2)
            else:
                _plot_series(axes, points, color=colour, label=domain)
        axes.set_title({"train": "Training", "valid": "Validation"}[split])
        axes.legend()
    figure.axes[0].set_ylabel("loss (nats per token)")
    return save_figure(figure, path)


@rc_context(STYLE)
def plot_speed(metrics_csv: str | Path, path: str | Path) -> Path | None:
    """Draw speed and time spent waiting for data; return None if the run did not log them."""
    series = read_metrics(metrics_csv)
    speed = series.get("throughput/audio_seconds_per_second")
    wait = series.get("throughput/data_wait_fraction")
    if not speed or not wait:
        return None
    figure = new_figure(height=2.6)
    left, right = figure.subplots(1, 2)
    _plot_series(left, speed, color=PALETTE[0])
    left.set(title="Speed", ylabel="audio-seconds per second", ylim=(0, None))
    _plot_series(right, wait, scale=100, color=PALETTE[0])
    right.set(title="Waiting for data", ylabel="% of the time", ylim=(0, None))
    return save_figure(figure, path)


@rc_context(STYLE)
def plot_learning(metrics_csv: str | Path, path: str | Path) -> Path | None:
    """Draw the scores of probes during training against the step; return None if none ran."""
    series = {
        name.removeprefix("probe/"): points
        for name, points in sorted(read_metrics(metrics_csv).items())
        if name.startswith("probe/")
    }
    if not series:
        return None
    figure = new_figure(height=3.2)
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        _plot_series(axes, points, scale=100, color=PALETTE[index % len(PALETTE)], label=name)
    axes.set(ylabel="score (%)", title="Probes during training")
    legend_below(figure)
    return save_figure(figure, path)


def _plot_series(axes: Axes, points: Series, scale: float = 1, **options: Any) -> None:
    """Plot a series against the step; few points get markers."""
    marker = "o" if len(points) <= MAX_MARKED_POINTS else None
    steps, values = np.array(points).T
    axes.plot(steps, scale * values, marker=marker, **options)
    axes.set_xlabel("optimizer step")


def read_metrics(metrics_csv: str | Path) -> dict[str, Series]:
    """Read the log of Lightning's `CSVLogger` into a series of `(step, value)` per metric.

    Blanks and values that are not finite are skipped. The logs that a run wrote before it was
    resumed, `metrics.N.csv` in the same folder, are read too. For a step that was repeated, the
    last value counts.

    Raises:
        UserError: A log cannot be read or has no `step` column.
    """
    newest = Path(metrics_csv)
    earlier = newest.parent.glob(f"{newest.stem}.*.csv")
    series: dict[str, dict[float, float]] = defaultdict(dict)
    # Sorted by length first, so that 10 comes after 9.
    for part in [*sorted(earlier, key=lambda path: (len(path.name), path.name)), newest]:
        try:
            for step, name, value in _read_log(part):
                series[name][step] = value
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"Cannot read the log {part}: {error}.") from None
    return {name: sorted(points.items()) for name, points in series.items()}


def _read_log(metrics_csv: Path) -> Iterator[tuple[float, str, float]]:
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise UserError(
                f"{metrics_csv} has no column 'step': it is not a log of Lightning's CSVLogger."
            )
        for row in reader:
            step = _finite_number(row["step"])
            for name, text in row.items():
                value = _finite_number(text) if name not in ("step", "epoch") else None
                if isinstance(name, str) and step is not None and value is not None:
                    yield step, name, value


def _finite_number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except (ValueError, TypeError):  # a row with too many fields has a list of them
        return None
    return value if math.isfinite(value) else None


def compared_encoders(scores: Scores) -> list[str]:
    """Return the encoders that maps and confusion matrices show, in the order before, after.

    These are the two of the last comparison or, if there is none, only the last encoder.
    """
    if scores.comparisons:
        return [scores.comparisons[-1].against, scores.comparisons[-1].encoder]
    return scores.encoders[-1:]


@rc_context({**STYLE, "axes.grid": False})
def plot_confusions(scores: Scores, task: str, path: Path) -> Path | None:
    """Draw the confusion matrices of a task, one panel for each of `compared_encoders`.

    Return None if no confusions were recorded.
    """
    entries = [scores.get(encoder, task) for encoder in compared_encoders(scores)]
    found = [(entry, entry.confusion) for entry in entries if entry and entry.confusion]
    if not found:
        return None
    figure = new_figure(height=4.0)
    figure.subplots(1, len(found))
    for axes, (entry, confusion) in zip(figure.axes, found, strict=True):
        _plot_confusion(axes, np.array(confusion.counts), confusion.classes)
        axes.set_title(f"{entry.title}, {scores.label(entry.encoder)}")
    figure.axes[0].set_ylabel("true class")
    figure.colorbar(
        figure.axes[0].images[0], ax=figure.axes, shrink=0.7, label="% of the true class's clips"
    )
    return save_figure(figure, path)


def _plot_confusion(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    rates = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(rates, cmap="cividis", vmin=0, vmax=100)
    axes.set_xlabel("predicted class")
    if len(classes) > MAX_LABELLED_CLASSES:
        axes.set_xlabel("predicted class (index in alphabetical order)")
        return
    few, ticks = len(classes) <= MAX_LEGEND_CLASSES, range(len(classes))
    size = 7 if few else 5.5
    axes.set_xticks(ticks, classes, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(ticks, classes, fontsize=size)
    style: Any = {"ha": "center", "va": "center", "fontsize": 6}
    for row, column in np.argwhere(rates >= 0.5) if few else ():
        rate = rates[row, column]
        axes.text(column, row, f"{rate:.0f}", color="white" if rate < 55 else "black", **style)


class _TaskClips(NamedTuple):
    """The test clips of one task, embedded by one encoder: features `[B, D]` and labels `[B]`."""

    title: str
    domain: str
    features: np.ndarray
    labels: np.ndarray


@rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 9})
def plot_maps(scores: Scores, path: Path) -> Path | None:
    """Draw t-SNE maps of the test clips, one column for each of `compared_encoders`.

    The first row shows all clips by domain if there are several domains. The others show the
    clips of one task by class. Return None if the cache has no embeddings of the test clips.
    """
    found = {encoder: _cached_clips(scores, encoder) for encoder in compared_encoders(scores)}
    columns = {encoder: tasks for encoder, tasks in found.items() if tasks}
    if not columns:
        return None
    several_domains = len({task.domain for tasks in columns.values() for task in tasks}) > 1
    rows = max(map(len, columns.values())) + several_domains
    figure = new_figure(height=0.3 + 2.4 * rows)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for panels, (encoder, tasks) in zip(grid.T, columns.items(), strict=True):
        panels[0].set_title(scores.label(encoder))
        if several_domains:
            features = np.concatenate([task.features for task in tasks])
            domains = np.concatenate([[task.domain] * len(task.labels) for task in tasks])
            _plot_map(panels[0], features, domains, DOMAIN_COLOURS, "all, by domain")
        for axes, task in zip(panels[several_domains:], tasks, strict=False):
            _plot_map(axes, task.features, task.labels, sorted(set(task.labels)), task.title)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], visible=axes.has_data())
        axes.label_outer()
    for axes in grid[:, -1]:
        if 0 < len(labels := axes.get_legend_handles_labels()[1]) <= MAX_LEGEND_CLASSES:
            columns_of_legend = 1 + (len(labels) > MAX_LEGEND_CLASSES // 2)
            axes.legend(
                loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns_of_legend, fontsize=7
            )
    return save_figure(figure, path)


def _plot_map(
    axes: Axes, features: np.ndarray, labels: np.ndarray, groups: Iterable[str], title: str
) -> None:
    points = project(features)
    for index, group in enumerate(groups):
        x, y = points[labels == group].T
        colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        axes.scatter(x, y, s=8, color=colour, marker=marker, linewidths=0, label=group)
    axes.set_ylabel(title)


def project(features: np.ndarray) -> np.ndarray:
    """Return the t-SNE coordinates `[B, 2]` of features `[B, D]`, which are standardised first."""
    from sklearn.manifold import TSNE  # imported here because it takes a second

    # If all clips are equal, the PCA of scikit-learn returns NaN and t-SNE crashes.
    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2))
    centred = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(
        perplexity=perplexity, init="pca", max_iter=MAX_TSNE_STEPS, random_state=0, n_jobs=1
    )
    return tsne.fit_transform(centred)


def _cached_clips(scores: Scores, encoder: str) -> list[_TaskClips]:
    """Return a sample of the test clips of each task with one class per clip."""
    tasks = []
    for task in scores.tasks:
        entry = scores.get(encoder, task)
        if entry is None or entry.confusion is None:
            continue
        cache = Path(scores.settings.get("cache", ""))
        parts = [part for name in entry.embedded if (part := _load_pooled(cache / name))]
        if sum(map(len, parts)) < MIN_MAP_CLIPS:
            continue
        clips = Embeddings.join(parts)
        chosen = np.random.default_rng(0).permutation(len(clips))[:MAX_MAP_CLIPS]
        features, labels = clips.features.numpy()[chosen], np.array(clips.labels)[chosen]
        tasks.append(_TaskClips(entry.title, entry.domain, features, labels))
    return tasks


def _load_pooled(path: Path) -> Embeddings | None:
    """Load embeddings of one vector per clip; None if there are none, or the cache is gone."""
    try:
        found = load_cached(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return found if found.features.ndim == 2 and len(found.features) == len(found) else None
