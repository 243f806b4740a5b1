"""Draw probe scores and training logs as PNG charts.

Colours are those of Okabe and Ito, which stay distinct under the common kinds of colour blindness
(https://jfly.uni-koeln.de/color/).
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import SafetensorError
from sklearn.manifold import TSNE

from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings, load_cached
from whisper_aut.probes.results import AVERAGE, Average, Scores, TaskScore

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
BASELINE_COLOUR = "#333333"
PAGE_WIDTH_INCHES = 8.0
DOTS_PER_INCH = 150
GROUP_SHARE = 0.8  # fraction of the space between two tasks that the bars of one fill
MARKERS = "os^Dv"
DOMAIN_COLOURS = {"speech": "#0072B2", "sound": "#E69F00", "music": "#009E73"}

Series = list[tuple[float, float]]  # (step, value)


def plot_scores(scores: Scores, path: str | Path, *, baseline: str | None = None) -> Path:
    """Draw a bar for each task and encoder.

    Whiskers are the standard deviation over seeds or, for probes that were fitted only once, the
    95 % interval.

    Args:
        scores: The scores to draw.
        path: The PNG file to write.
        baseline: An encoder to draw as a line across each task's bars instead.

    Returns:
        The path of the chart.

    Raises:
        UserError: If the baseline is the only encoder, or if the file cannot be written.
    """
    encoders = [name for name in scores.encoders if name != baseline]
    if not encoders:
        raise UserError("There are no scores to draw besides the baseline's.")
    cells, labels = _cells(scores)
    figure = blank_figure(height=4.2)
    axes = figure.axes[0]
    width = GROUP_SHARE / len(encoders)
    for number, encoder in enumerate(encoders):
        places = [i for i, _ in enumerate(labels) if (encoder, i) in cells]
        found = [cells[encoder, i] for i in places]
        axes.bar(
            [i + (number - (len(encoders) - 1) / 2) * width for i in places],
            [100 * one.mean for one in found],
            width * 0.94,
            yerr=100 * np.array([_whiskers(one) for one in found]).reshape(-1, 2).T,
            capsize=2,
            color=PALETTE[number % len(PALETTE)],
            label=scores.label(encoder),
            error_kw={"elinewidth": 1.0},
            hatch="//" if number >= len(PALETTE) else None,
        )
    if baseline is not None:
        ends = [(cells[baseline, i].mean, i) for i in range(len(labels)) if (baseline, i) in cells]
        heights, left, right = (
            [100 * mean for mean, _ in ends],
            [i - 0.46 for _, i in ends],
            [i + 0.46 for _, i in ends],
        )
        axes.hlines(
            heights,
            left,
            right,
            colors=BASELINE_COLOUR,
            linestyles=(0, (4, 2)),
            linewidth=1.4,
            label=baseline,
        )
    rotated = len(labels) > 7
    wrapped = (
        labels if rotated else [fill(label, width=max(8, 80 // len(labels))) for label in labels]
    )
    axes.set_xticks(
        range(len(labels)),
        wrapped,
        rotation=30 if rotated else 0,
        ha="right" if rotated else "center",
    )
    axes.set_ylim(0, 100 + (2 if any(one.mean > 0.98 for one in cells.values()) else 0))
    axes.set_ylabel(
        "accuracy (%)"
        if {entry.metric for entry in scores.entries} == {"accuracy"}
        else "score (%)"
    )
    kinds = ", ".join(dict.fromkeys(entry.kind for entry in scores.entries))
    seeds = max(len(entry.seeds) for entry in scores.entries)
    whiskers = [f"± 1 standard deviation over {seeds} seeds"] if seeds > 1 else []
    if any(entry.std is None for entry in scores.entries):
        whiskers.append("the 95 % interval over test clips")
    subtitle = f"whiskers are {', or '.join(whiskers)}"
    _title(axes, f"Probes ({kinds}), protocol “{scores.protocol}”", subtitle)
    axes.grid(axis="y")
    _legend(axes, len(encoders) + (baseline is not None))
    return save_figure(figure, path)


def plot_losses(metrics_csv: str | Path, path: str | Path) -> Path:
    """Draw training and validation loss against the optimiser step, with one line per domain.

    Args:
        metrics_csv: The log of Lightning's `CSVLogger`.
        path: The PNG file to write.

    Returns:
        The path of the chart.

    Raises:
        UserError: If the log cannot be read or has no loss, or if the file cannot be written.
    """
    series = {name: points for name, points in read_metrics(metrics_csv).items() if "loss" in name}
    panels = {
        kind: {n: p for n, p in series.items() if n.startswith(f"{kind}/")}
        for kind in ("train", "valid")
    }
    panels = {kind: lines for kind, lines in panels.items() if lines}
    if not panels:
        raise UserError(
            f"{metrics_csv} has no columns train/loss… or valid/loss… with values in them: "
            "nothing to draw."
        )
    figure = blank_figure(height=3.6, columns=len(panels), sharey=True)
    for axes, (kind, lines) in zip(figure.axes, panels.items(), strict=True):
        for number, (name, points) in enumerate(sorted(lines.items())):
            _draw_loss(axes, name.split("/", 1)[-1], points, number)
        _title(axes, {"train": "Training", "valid": "Validation"}[kind])
        axes.set_xlabel("optimiser step")
        axes.grid(axis="both")
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("loss (nats per token)")
    return save_figure(figure, path)


def plot_speed(metrics_csv: str | Path, path: str | Path) -> Path | None:
    """Draw audio seconds per second and the fraction of time spent waiting for data.

    Returns:
        The path of the chart, or None if the run did not log its throughput.

    Raises:
        UserError: If the log cannot be read, or if the file cannot be written.
    """
    series = read_metrics(metrics_csv)
    speed, wait = (
        series.get("throughput/audio_seconds_per_second"),
        series.get("throughput/data_wait_fraction"),
    )
    if not speed or not wait:
        return None
    figure = blank_figure(height=2.6, columns=2)
    panels = (
        (speed, "Speed", "audio-seconds per second", 1),
        (wait, "Waiting for data", "share of the time (%)", 100),
    )
    for axes, (points, title, unit, scale) in zip(figure.axes, panels, strict=True):
        axes.plot(
            [step for step, _ in points],
            [scale * value for _, value in points],
            color=PALETTE[0],
            linewidth=1.4,
        )
        axes.set(xlabel="optimiser step", ylabel=unit, ylim=(0, None))
        _title(axes, title)
        axes.grid(axis="both")
    return save_figure(figure, path)


def plot_learning(metrics_csv: str | Path, path: str | Path) -> Path | None:
    """Draw the scores of the probes that ran during training against the optimiser step.

    Returns:
        The path of the chart, or None if no probe ran.

    Raises:
        UserError: If the log cannot be read, or if the file cannot be written.
    """
    series = {
        name.split("/", 1)[1]: points
        for name, points in read_metrics(metrics_csv).items()
        if name.startswith("probe/")
    }
    if not series:
        return None
    figure = blank_figure(height=3.2)
    axes = figure.axes[0]
    for number, (name, points) in enumerate(sorted(series.items())):
        steps, values = [step for step, _ in points], [100 * value for _, value in points]
        axes.plot(
            steps,
            values,
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=name,
        )
    axes.set(xlabel="optimiser step", ylabel="score (%)")
    _title(axes, "Probes during training")
    axes.grid(axis="both")
    _legend(axes, len(series))
    return save_figure(figure, path)


def read_metrics(metrics_csv: str | Path) -> dict[str, Series]:
    """Read the log of Lightning's `CSVLogger` into a series of `(step, value)` per metric.

    Blanks and values that are not finite are skipped. The logs that a run wrote before it was
    resumed, `metrics.N.csv` in the same folder, are read too. For a step that was repeated, the
    last value counts.

    Raises:
        UserError: If a log cannot be read or has no `step` column.
    """
    newest = Path(metrics_csv)
    series: dict[str, dict[float, float]] = defaultdict(dict)
    # Sort by length first, so that 10 comes after 9.
    kept = sorted(
        newest.parent.glob(f"{newest.stem}.*.csv"), key=lambda path: (len(path.name), path.name)
    )
    for part in [*kept, newest]:
        try:
            for step, name, value in _logged(part):
                series[name][step] = value
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"Cannot read the log {part}: {error}.") from None
    return {name: sorted(points.items()) for name, points in series.items()}


def _logged(metrics_csv: Path) -> Iterator[tuple[float, str, float]]:
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise UserError(
                f"{metrics_csv} has no column 'step': it is not a log of Lightning's CSVLogger."
            )
        for row in reader:
            step = _number(row["step"])
            for name, text in row.items():
                value = _number(text) if name not in ("step", "epoch") else None
                if isinstance(name, str) and step is not None and value is not None:
                    yield step, name, value


def _whiskers(one: TaskScore | Average) -> tuple[float, float]:
    """Return how far the whisker reaches below and above the mean."""
    if one.std is not None:
        return one.std, one.std
    low, high = one.interval
    return max(0.0, one.mean - low), max(0.0, high - one.mean)


def _cells(scores: Scores) -> tuple[dict[tuple[str, int], TaskScore | Average], list[str]]:
    """Return scores by `(encoder, index on the x axis)`, and the labels of the x axis.

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


def _draw_loss(axes: Axes, name: str, points: Series, number: int) -> None:
    domain = next((domain for domain in DOMAIN_COLOURS if domain in name), None)
    colour = (
        DOMAIN_COLOURS[domain]
        if domain
        else "#000000"
        if name == "loss"
        else PALETTE[(number + 3) % len(PALETTE)]
    )
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(points) <= 30 else None
    label = {"loss": "all domains"}.get(name, domain or name)
    axes.plot(
        steps,
        values,
        color=colour,
        label=label,
        linewidth=2.0 if name == "loss" else 1.4,
        marker=marker,
        markersize=3,
    )


def blank_figure(height: float, columns: int = 1, rows: int = 1, sharey: bool = False) -> Figure:
    """Return a figure of page width with a grid of empty panels; `height` is in inches."""
    figure = Figure(figsize=(PAGE_WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, there is no global state and no figure to close
    for axes in figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure


def panel_title(axes: Axes, title: str) -> None:
    """Set the title of one panel in a figure of several."""
    axes.set_title(title, loc="left", fontsize=9)


def _title(axes: Axes, title: str, subtitle: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=12, pad=20 if subtitle else 8)
    if subtitle:
        axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color="#555555")


def _legend(axes: Axes, entries: int) -> None:
    figure = axes.figure
    figure.legend(loc="outside lower center", ncols=min(entries, 4), frameon=False, fontsize=9)  # pyright: ignore[reportAttributeAccessIssue]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, creating its folder if necessary.

    Raises:
        UserError: If the file cannot be written.
    """
    path = Path(path)
    for axes in figure.axes:
        for line in axes.get_xgridlines() + axes.get_ygridlines():
            line.set(color="#dddddd", linewidth=0.7)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise UserError(f"Cannot write the chart {path}: {error.strerror}.") from None
    return path


# Limits of the maps: clips of a task, t-SNE iterations, and clips below which no map is drawn.
MAX_CLIPS = 400
MAX_STEPS = 500
MIN_CLIPS = 12
# The most classes for a legend or a confusion matrix with numbers, and for axis labels of a matrix.
NAMED_CLASSES, LABELLED_CLASSES = 12, 36


@dataclass(frozen=True)
class MappedTask:
    """The test clips of one task, embedded by one encoder."""

    title: str
    domain: str
    features: np.ndarray  # [B, D]
    labels: tuple[str, ...]


def shown_encoders(scores: Scores) -> list[str]:
    """Return the encoders that charts compare, in the order before, after.

    These are the two of the last comparison or, if there is none, only the last encoder.
    """
    if scores.comparisons:
        return [scores.comparisons[-1].against, scores.comparisons[-1].encoder]
    return scores.encoders[-1:]


def plot_confusions(scores: Scores, task: str, path: Path) -> Path | None:
    """Draw the confusion matrices of a task, one panel for each of `shown_encoders`.

    Returns:
        The path of the chart, or None if no confusions were recorded.

    Raises:
        UserError: If the file cannot be written.
    """
    entries = [
        entry
        for name in shown_encoders(scores)
        if (entry := scores.get(name, task)) and entry.confusion
    ]
    if not entries:
        return None
    figure = blank_figure(columns=len(entries), height=4.0)
    for axes, entry in zip(figure.axes, entries, strict=True):
        _confusion(axes, entry, f"{entry.title}, {scores.label(entry.encoder)}")
    figure.axes[0].set_ylabel("true class")
    image = figure.axes[0].images[0]
    figure.colorbar(image, ax=figure.axes, shrink=0.7, label="share of the true class's clips (%)")
    return save_figure(figure, path)


def plot_maps(scores: Scores, path: Path) -> Path | None:
    """Draw t-SNE maps of the test clips, one row for each of `shown_encoders`.

    The first map shows all clips by domain if there are several domains. The others show the
    clips of one task by class.

    Returns:
        The path of the chart, or None if the cache has no embeddings of the test clips.

    Raises:
        UserError: If the file cannot be written.
    """
    found = {name: _mapped(scores, name) for name in shown_encoders(scores)}
    rows = {name: tasks for name, tasks in found.items() if tasks}
    if not rows:
        return None
    columns = max(
        len(tasks) + (len({task.domain for task in tasks}) > 1) for tasks in rows.values()
    )
    figure = blank_figure(columns=columns, rows=len(rows), height=0.6 + 2.6 * len(rows))
    grid = [figure.axes[first : first + columns] for first in range(0, len(figure.axes), columns)]
    for places, (encoder, tasks) in zip(grid, rows.items(), strict=True):
        places[0].set_ylabel(scores.label(encoder))
        several = len({task.domain for task in tasks}) > 1
        if several:
            _map_domains(places[0], tasks)
        for axes, task in zip(places[several:], tasks, strict=False):
            _map_classes(axes, task)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    return save_figure(figure, path)


def project(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the t-SNE coordinates `[B, 2]` of features `[B, D]`, which are standardised first.

    The result is deterministic for a given input and seed.
    """
    # If all clips are equal, the PCA of scikit-learn returns NaN and t-SNE crashes.
    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2))
    centred = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(
        perplexity=perplexity, init="pca", max_iter=MAX_STEPS, random_state=seed, n_jobs=1
    ).fit_transform(centred)


def _mapped(scores: Scores, encoder: str) -> list[MappedTask]:
    mapped = []
    for task in scores.tasks:
        entry = scores.get(encoder, task)
        # Confusions exist only for tasks with one class per clip, and a map needs such tasks.
        if entry is None or entry.confusion is None:
            continue
        parts = [_read(Path(scores.settings.get("cache", "")) / name) for name in entry.embedded]
        held = [
            part
            for part in parts
            if part is not None and part.features.ndim == 2 and len(part.features) == len(part) > 0
        ]
        if not held or sum(map(len, held)) < MIN_CLIPS:
            continue
        joined = Embeddings.join(held)
        chosen = np.random.default_rng(0).permutation(len(joined))[:MAX_CLIPS]
        labels = tuple(joined.labels[place] for place in chosen)
        mapped.append(
            MappedTask(entry.title, entry.domain, joined.features.numpy()[chosen], labels)
        )
    return mapped


def _read(path: Path) -> Embeddings | None:
    try:
        return load_cached(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        # The cache was cleared or is on another machine. The report then has no map.
        return None


def _map_domains(axes: Axes, tasks: Sequence[MappedTask]) -> None:
    places = project(np.concatenate([task.features for task in tasks]))
    domains = np.concatenate([[task.domain] * len(task.labels) for task in tasks])
    for number, domain in enumerate(DOMAIN_COLOURS):
        own = places[domains == domain]
        if len(own):
            axes.scatter(
                *own.T,
                s=7,
                marker=MARKERS[number],
                color=DOMAIN_COLOURS[domain],
                label=domain,
                linewidths=0,
            )
    panel_title(axes, "All, by domain")
    axes.legend(frameon=False, fontsize=7, markerscale=1.6, handletextpad=0.1, loc="best")


def _map_classes(axes: Axes, task: MappedTask) -> None:
    places, labels = project(task.features), np.array(task.labels)
    classes = sorted(set(task.labels))
    for number, name in enumerate(classes):
        colour, marker = (
            PALETTE[number % len(PALETTE)],
            MARKERS[number // len(PALETTE) % len(MARKERS)],
        )
        axes.scatter(
            *places[labels == name].T, s=9, marker=marker, color=colour, label=name, linewidths=0
        )
    panel_title(axes, f"{task.title}, {len(classes)} classes")
    if len(classes) <= NAMED_CLASSES:
        axes.legend(
            frameon=False,
            fontsize=5.5,
            markerscale=1.2,
            handletextpad=0.1,
            labelspacing=0.2,
            loc="best",
        )


def _confusion(axes: Axes, entry: TaskScore, title: str) -> None:
    assert entry.confusion
    counts = np.array(entry.confusion.counts, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    axes.set_xlabel("taken for")
    panel_title(axes, title)
    names = entry.confusion.classes
    if len(names) > LABELLED_CLASSES:
        axes.set_xlabel("taken for (classes by their place in the alphabet)")
        return
    size = 7 if len(names) <= NAMED_CLASSES else 5.5
    axes.set_xticks(
        range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=size
    )
    axes.set_yticks(range(len(names)), names, fontsize=size)
    if len(names) > NAMED_CLASSES:
        return
    for true, row in enumerate(shares):
        for taken, share in enumerate(row):
            if share >= 0.5:
                axes.text(
                    taken,
                    true,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if share < 55 else "black",
                )
