"""Lay out probe scores as tables, and render them for the terminal, as Markdown and as CSV.

Scores are in percent and differences in percentage points. A difference that its test does not
support is labelled "no significant difference".
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from whisper_aut.probes.kinds import KINDS
from whisper_aut.probes.results import AVERAGE, NO_ASR, Average, Comparison, Scores, TaskScore
from whisper_aut.probes.stats import FEW_GROUPS

BLANK = "–"
AVERAGE_NAMES = {AVERAGE: "all tasks, weighted", NO_ASR: "all but recognition, weighted"}
METRIC_NAMES = {
    "segment_f1_macro": "segment F1, macro",
    "segment_f1_micro": "segment F1, micro",
    "word_accuracy": "1 − word error rate",
}
FITTED_ON = {
    "train": "on the full training split (train)",
    "train+valid": "on training and validation split (train+valid)",
}
KIND_NAMES = {name: kind.title for name, kind in KINDS.items()}


@dataclass(frozen=True)
class Sheet:
    """A table before it is rendered.

    Attributes:
        title: The heading of the table.
        caption: A note on how to read it.
        head: The column names.
        rows: The cells of each row.
        text_columns: How many columns, from the left, hold text and are aligned left.
    """

    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int


def score_sheet(scores: Scores) -> Sheet:
    """Lay out the scores of every task and encoder, then the weighted averages.

    Averages are printed from 0 to 1, as X-ARES and UniWhisper print them.
    """
    rows = []
    for task in scores.tasks:
        entries = {encoder: scores.get(encoder, task) for encoder in scores.encoders}
        any_entry = next(entry for entry in entries.values() if entry is not None)
        chance = BLANK if any_entry.chance is None else _percent(any_entry.chance)
        facts = (
            any_entry.title,
            any_entry.domain,
            METRIC_NAMES.get(any_entry.metric, any_entry.metric),
        )
        clips = f"{any_entry.test_clips}"
        clips += f" ({any_entry.group_count})" if any_entry.groups else ""
        rows.append((*facts, clips, chance, *(_cell(entry) for entry in entries.values())))
    averages = {(average.domain, average.encoder): average for average in scores.averages()}
    for domain in [*scores.domains, *AVERAGE_NAMES] if len(scores.tasks) > 1 else []:
        found = [averages.get((domain, encoder)) for encoder in scores.encoders]
        if any(found):
            label, named = (
                AVERAGE_NAMES.get(domain, f"{domain}, weighted"),
                "" if domain in AVERAGE_NAMES else domain,
            )
            rows.append(
                (
                    label,
                    named,
                    "0 … 1",
                    "",
                    "",
                    *(_cell(average, _share) for average in found),
                )
            )
    named = map(scores.label, scores.encoders)
    grouped = any(entry.groups for entry in scores.entries)
    clips = "test clips (groups)" if grouped else "test clips"
    head = ("task", "domain", "metric", clips, "commonest class", *named)
    kinds = " and ".join(
        dict.fromkeys(KIND_NAMES.get(entry.kind, entry.kind) for entry in scores.entries)
    )
    title = f"{kinds[:1].upper()}{kinds[1:]}, protocol {scores.protocol}: scores in %"
    return Sheet(title, _score_caption(scores), head, tuple(rows), 3)


def fold_sheet(scores: Scores) -> Sheet:
    """Lay out the score of each fold, averaged over seeds, for the tasks that have folds."""
    entries = [entry for entry in scores.entries if entry.folds > 1]
    most = max((entry.folds for entry in entries), default=0)
    rows = tuple(
        (
            entry.title,
            scores.label(entry.encoder),
            *(map(_percent, entry.per_fold())),
            *([BLANK] * (most - entry.folds)),
        )
        for entry in entries
    )
    head = ("task", "encoder", *(f"fold {number}" for number in range(1, most + 1)))
    caption = (
        "Folds differ in how hard their clips are: "
        "their spread says nothing about how sure the mean is."
    )
    return Sheet("Scores by fold, in %", caption, head, rows, 2)


def comparison_sheet(scores: Scores) -> Sheet:
    """Lay out every paired comparison with its interval, p-values and verdict."""
    titles = {entry.task: entry.title for entry in scores.entries} | {
        AVERAGE: "all tasks, weighted",
        NO_ASR: "all but recognition, weighted",
    }
    rows = tuple(
        (
            scores.label(c.encoder),
            scores.label(c.against),
            titles[c.task],
            f"{100 * c.difference:+.1f}",
            f"{100 * c.low:+.1f} … {100 * c.high:+.1f}",
            _p_value(c.p_value),
            _p_value(c.p_holm),
            verdict(c),
        )
        for c in scores.comparisons
    )
    caption = (
        "Difference in points, its 95 % interval by paired bootstrap and p by paired sign flips, "
        "over test clips or the groups that they come in; "
        f"below {FEW_GROUPS} groups a paired t interval and test. "
        f"p (Holm) is corrected for all {len(scores.comparisons)} rows. "
        "What another training of a probe or an encoder would give is not in it."
    )
    head = ("encoder", "against", "task", "difference", "95 % interval", "p", "p (Holm)", "verdict")
    return Sheet("Paired comparisons", caption, head, rows, 3)


def verdict(comparison: Comparison) -> str:
    """Return `better`, `worse`, or `no significant difference`."""
    if not comparison.significant:
        return "no significant difference"
    return "better" if comparison.difference > 0 else "worse"


def sheets(scores: Scores) -> list[Sheet]:
    """Return the tables of a run: scores, and folds and comparisons if there are any."""
    folds = any(entry.folds > 1 for entry in scores.entries)
    return [
        score_sheet(scores),
        *([fold_sheet(scores)] if folds else []),
        *([comparison_sheet(scores)] if scores.comparisons else []),
    ]


def rich_table(sheet: Sheet) -> Table:
    """Render a table for the terminal."""
    table = Table(title=sheet.title, caption=sheet.caption, caption_justify="left")
    for number, name in enumerate(sheet.head):
        table.add_column(
            name,
            justify="left" if number < sheet.text_columns else "right",
            overflow="fold",
        )
    for row in sheet.rows:
        table.add_row(*row)
    return table


def markdown(sheet: Sheet) -> str:
    """Render a table as Markdown, with its title and caption."""
    rule = [":---" if number < sheet.text_columns else "---:" for number in range(len(sheet.head))]
    lines = [f"**{sheet.title}**", "", _markdown_row(sheet.head), _markdown_row(rule)]
    return "\n".join([*lines, *map(_markdown_row, sheet.rows), "", sheet.caption, ""])


def scores_csv(scores: Scores) -> str:
    """Return all scores as CSV, one line per encoder and task.

    Scores are from 0 to 1 and have full precision; those of folds have six significant digits.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "encoder",
            "task",
            "domain",
            "protocol",
            "kind",
            "metric",
            "mean",
            "std",
            "low",
            "high",
            "final_fit",
            "epochs",
            "seeds",
            "folds",
            "fold_means",
            "test_clips",
            "groups",
            "classes",
            "weight",
            "identity",
        ]
    )
    for e in scores.entries:
        std = "" if e.std is None else e.std
        row = [
            e.encoder,
            e.task,
            e.domain,
            e.protocol,
            e.kind,
            e.metric,
            e.mean,
            std,
            *e.interval,
            e.final_fit,
            "" if e.epochs is None else e.epochs,
            len(e.seeds),
            e.folds,
            " ".join(f"{score:.6g}" for score in e.per_fold()),
        ]
        clips = [e.test_clips, e.group_count]
        writer.writerow([*row, *clips, e.classes, e.weight, e.identity])
    return text.getvalue()


def _score_caption(scores: Scores) -> str:
    parts = [_fitting(scores)]
    skipped = [
        f"{entry.task} {split}: {count} {reason}"
        for entry in {entry.task: entry for entry in scores.entries}.values()
        for split, reasons in entry.skipped.items()
        for reason, count in reasons.items()
    ]
    return " ".join([*parts, *(["Clips left out: " + "; ".join(skipped) + "."] if skipped else [])])


def _fitting(scores: Scores) -> str:
    """Explain on which clips probes were tuned and fitted, and what ± and brackets mean."""
    fitted_on = {
        "on all other folds" if entry.folds > 1 else FITTED_ON[entry.final_fit]
        for entry in scores.entries
    }
    seeded = {KIND_NAMES[entry.kind]: len(entry.seeds) for entry in scores.entries if entry.seeds}
    parts = [
        "Settings are chosen on validation clips; "
        f"the tested probe is fitted {' or '.join(sorted(fitted_on, reverse=True))}."
    ]
    if any(count > 1 for count in seeded.values()):
        parts.append(
            f"± is the standard deviation over {max(seeded.values())} seeds, "
            f"which decide start and batch order of {', '.join(seeded)}."
        )
    if any(not entry.seeds for entry in scores.entries):
        parts.append("A probe without a random start is fitted once and has no ±.")
    if any(entry.std is None for entry in scores.entries):
        parts.append(
            "Brackets hold the 95 % interval over the choice of test clips, by bootstrap, "
            f"or by a t interval below {FEW_GROUPS} clips or groups."
        )
    groups = {entry.task: entry.group for entry in scores.entries if entry.groups}
    if groups:
        listed = ", ".join(f"{task} by {group}" for task, group in groups.items())
        parts.append(
            f"Clips that belong together count as one group, their number in (): {listed}."
        )
    return " ".join(parts)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _cell(one: TaskScore | Average | None, written: Callable[[float], str] = _percent) -> str:
    """Format a score with its deviation over seeds or, if it has none, with its interval."""
    if one is None:
        return BLANK
    if one.std is not None:
        return f"{written(one.mean)} ± {written(one.std)}"
    low, high = one.interval
    return f"{written(one.mean)} [{written(low)}, {written(high)}]"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
