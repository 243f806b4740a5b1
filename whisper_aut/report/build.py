"""Runs → one report folder: a page that holds everything itself, the same as Markdown, tables as CSV, pictures as PNG.

In: run directories (of training or of `whisper-aut probe`). Out: `report.html`, `report.md`, and per run `scores.csv` and PNG files.
Next: people.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from whisper_aut.errors import UserError
from whisper_aut.probes.baseline import BASELINE_NAME
from whisper_aut.probes.scores import Scores
from whisper_aut.report.facts import data_sheet, refusal_sheet, run_sheet
from whisper_aut.report.html import html_page
from whisper_aut.report.maps import plot_confusions, plot_maps, shown_encoders
from whisper_aut.report.page import Block, Picture, Run, Section, markdown_page
from whisper_aut.report.plots import (
    plot_learning,
    plot_losses,
    plot_scores,
    plot_speed,
    read_metrics,
)
from whisper_aut.report.sounds import listened
from whisper_aut.report.tables import rich_table, scores_csv, sheets
from whisper_aut.training.rundir import RunDirectory

MAX_CONFUSIONS = 6  # tasks with a picture of their own


def build_report(runs: Sequence[Path], out: Path, console: Console) -> Path:
    """Write the report of one or more runs, show its tables, and return the path of `report.html`.

    Raises:
        UserError: a path is no run, or there is nothing in it to report.
    """
    found = [RunDirectory(run.resolve()) for run in runs]
    empty = [
        str(run) for run, resolved in zip(runs, found, strict=True) if not _has_content(resolved)
    ]
    if empty:
        raise UserError(
            f"No scores.json and no logs/metrics.csv in {', '.join(empty)}. Runs lie under runs/NAME/TIMESTAMP."
        )
    pages = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for run in found:
            prefix = f"{run.path.parent.name}-{run.path.name}-" if len(found) > 1 else ""
            pages.append(_run(run, out, prefix, console))
        (out / "report.md").write_text(markdown_page(pages), encoding="utf-8")
        report = out / "report.html"
        report.write_text(html_page(pages), encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write the report to {out}: {error.strerror}.") from None
    console.print(f"Report: {report}")
    return report


def _run(run: RunDirectory, out: Path, prefix: str, console: Console) -> Run:
    sections = [
        Section("Probes", _probes(run, out, prefix, console)),
        Section("What the encoder keeps apart", _maps(run, out, prefix)),
        Section("Training", _training(run, out, prefix)),
        Section("What the decoder writes", [*listened(run.path)]),
        Section(
            "Run",
            [
                sheet
                for sheet in (run_sheet(run.path), data_sheet(run.path), refusal_sheet(run.path))
                if sheet
            ],
        ),
    ]
    return Run(
        f"{run.path.parent.name} · {run.path.name}",
        [section for section in sections if section.blocks],
    )


def _probes(run: RunDirectory, out: Path, prefix: str, console: Console) -> list[Block]:
    """Write the tables and the picture of all scores."""
    if not run.scores.exists():
        return []
    scores = Scores.load(run.scores)
    blocks: list[Block] = []
    for sheet in sheets(scores):
        console.print(rich_table(sheet))
        blocks.append(sheet)
    (out / f"{prefix}scores.csv").write_text(scores_csv(scores), encoding="utf-8")
    baseline = BASELINE_NAME if BASELINE_NAME in scores.encoders else None
    if scores.encoders != [
        baseline
    ]:  # the baseline is a line across the others' bars; alone it is no picture
        picture = plot_scores(scores, out / f"{prefix}scores.png", baseline=baseline)
        blocks.insert(0, Picture(picture, "Scores of every task and encoder"))
    return blocks


def _maps(run: RunDirectory, out: Path, prefix: str) -> list[Block]:
    """Write maps of the test clips, and what was taken for what."""
    if not run.scores.exists():
        return []
    scores = Scores.load(run.scores)
    named = " and ".join(map(scores.label, shown_encoders(scores)))
    blocks: list[Block] = []
    if picture := plot_maps(scores, out / f"{prefix}maps.png"):
        blocks.append(
            "Test clips as t-SNE lays them out: neighbours are alike to the encoder; distances between clusters say nothing."
        )
        blocks.append(Picture(picture, f"Test clips in the space of {named}"))
    for task in scores.tasks[:MAX_CONFUSIONS]:
        if picture := plot_confusions(scores, task, out / f"{prefix}confusion-{task}.png"):
            blocks.append(
                Picture(
                    picture,
                    f"What probes of {named} take for what in {task}, over all seeds and folds",
                )
            )
    return blocks


def _training(run: RunDirectory, out: Path, prefix: str) -> list[Block]:
    if not run.metrics.exists():
        return []
    pictures = []
    if any("loss" in name for name in read_metrics(run.metrics)):
        pictures.append(
            Picture(
                plot_losses(run.metrics, out / f"{prefix}losses.png"),
                "Training and validation loss by domain",
            )
        )
    if learning := plot_learning(run.metrics, out / f"{prefix}learning.png"):
        pictures.append(Picture(learning, "Scores of the probes that ran during training"))
    if speed := plot_speed(run.metrics, out / f"{prefix}speed.png"):
        pictures.append(Picture(speed, "Speed of training and time spent waiting for data"))
    return pictures


def _has_content(run: RunDirectory) -> bool:
    return run.scores.exists() or run.metrics.exists()
