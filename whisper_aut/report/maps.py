"""Embeddings and predictions → pictures of what an encoder keeps apart and what it takes for what.

In: probe scores, and the cached embeddings of their test clips. Out: PNG files. Next: `report.build`. Maps are t-SNE (van der Maaten &
Hinton 2008) of pooled, standardised frames: neighbours mean something, distances between clusters and their sizes do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from safetensors import SafetensorError
from sklearn.manifold import TSNE

from whisper_aut.probes.cache import Embeddings, load_cached
from whisper_aut.probes.scores import Scores, TaskScore
from whisper_aut.report.plots import (
    DOMAIN_COLOURS,
    MARKERS,
    PALETTE,
    blank_figure,
    panel_title,
    save_figure,
)

MAX_CLIPS = 400  # of a task
MAX_STEPS = 500
MIN_CLIPS = 12
NAMED_CLASSES, LABELLED_CLASSES = (
    12,
    36,
)  # so many fit a legend or a matrix with numbers; the axes of a matrix


@dataclass(frozen=True)
class MappedTask:
    """The test clips of one task as one encoder hears them."""

    title: str
    domain: str
    features: np.ndarray  # [B, D]
    labels: tuple[str, ...]


def shown_encoders(scores: Scores) -> list[str]:
    """Return whom pictures compare: the two of the last comparison, before and after; without one the last encoder."""
    if scores.comparisons:
        return [scores.comparisons[-1].against, scores.comparisons[-1].encoder]
    return scores.encoders[-1:]


def plot_confusions(scores: Scores, task: str, path: Path) -> Path | None:
    """Draw what was taken for what in one task, an encoder a panel; None where nothing was recorded."""
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
    """Draw all test clips by domain, and each task's by class, a row per encoder; None where no embeddings are left."""
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
    """Return t-SNE coordinates `[B, 2]` of standardised features `[B, D]`, the same for the same input."""
    if not np.ptp(
        features, axis=0
    ).any():  # equal clips, on which scikit-learn crashes (NaN from its PCA)
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
        if entry is None or entry.confusion is None:  # only clips of one class each
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
        return None  # the cache was cleared, or is another machine's: the report goes without this picture


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
