"""Runs → one report folder: `report.md` with tables, and the plots beside it.

In: run directories (of training or of `whisper-aut probe`). Out: per run `scores.csv`, `scores.png`, `losses.png`, and one
`report.md` over all. Next: people.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from whisper_aut.errors import UserError
from whisper_aut.probes.baseline import BASELINE_NAME
from whisper_aut.probes.scores import Scores
from whisper_aut.report.plots import plot_losses, plot_scores, read_metrics
from whisper_aut.report.tables import markdown, rich_table, scores_csv, sheets
from whisper_aut.training.rundir import RunDirectory


def build_report(runs: Sequence[Path], out: Path, console: Console) -> Path:
    """Write the report of one or more runs, show its tables, and return the path of `report.md`.

    Raises:
        UserError: a path is no run, or there is nothing in it to report.
    """
    found = [RunDirectory(run.resolve()) for run in runs]
    empty = [str(run) for run, resolved in zip(runs, found, strict=True) if not _has_content(resolved)]
    if empty:
        raise UserError(f"No scores.json and no logs/metrics.csv in {', '.join(empty)}. Runs lie under runs/NAME/TIMESTAMP.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write the report to {out}: {error.strerror}.") from None
    parts = ["# Report"]
    for run in found:
        prefix = f"{run.path.parent.name}-{run.path.name}-" if len(found) > 1 else ""
        parts += [f"## {run.path.parent.name} · {run.path.name}", *_section(run, out, prefix, console)]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    console.print(f"Report: {report}")
    return report


def _section(run: RunDirectory, out: Path, prefix: str, console: Console) -> list[str]:
    """Write one run's files and return its paragraphs of Markdown."""
    parts = []
    if run.scores.exists():
        scores = Scores.load(run.scores)
        for sheet in sheets(scores):
            console.print(rich_table(sheet))
            parts.append(markdown(sheet))
        (out / f"{prefix}scores.csv").write_text(scores_csv(scores))
        baseline = BASELINE_NAME if BASELINE_NAME in scores.encoders else None
        if scores.encoders != [baseline]:  # the baseline is a line across the others' bars; alone it is no picture
            picture = plot_scores(scores, out / f"{prefix}scores.png", baseline=baseline)
            parts.append(f"![Probe accuracy per task and encoder]({picture.name})")
    if run.metrics.exists() and any("loss" in name for name in read_metrics(run.metrics)):
        picture = plot_losses(run.metrics, out / f"{prefix}losses.png")
        parts.append(f"![Training and validation loss]({picture.name})")
    return parts


def _has_content(run: RunDirectory) -> bool:
    return run.scores.exists() or run.metrics.exists()
