"""Tables of probe scores, and one table model that renders to the terminal, Markdown and CSV.

Scores are in percent and differences in percentage points. A difference that its test does not
support is labelled "no significant difference".
"""

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as RichTable

from whisper_aut.probes.fit import PROBES
from whisper_aut.probes.results import (
    AVERAGE,
    NO_ASR,
    Average,
    Comparison,
    Scores,
    TaskScore,
    read_predictions,
)
from whisper_aut.probes.stats import FEW_GROUPS, GroupTotals, proportion_interval

BLANK = "–"
MAX_CLASSES = 60  # of a table of classes
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
CSV_COLUMNS = (
    *("encoder", "task", "domain", "protocol", "kind", "metric", "mean", "std", "low", "high"),
    *("final_fit", "epochs", "seeds", "folds", "fold_means", "test_clips", "groups", "classes"),
    *("weight", "identity"),
)


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first `text_columns` columns are aligned left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    caption: str = ""

    def to_rich(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.caption, caption_justify="left")
        for index, name in enumerate(self.columns):
            justify = "left" if index < self.text_columns else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Return the table as Markdown, with its title above and its caption below."""
        numbers = len(self.columns) - self.text_columns
        rule = [":---"] * self.text_columns + ["---:"] * numbers
        lines = [_markdown_row(row) for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.caption, ""])

    def to_csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def score_tables(scores: Scores) -> list[Table]:
    """Return the tables of a run: scores, and folds and comparisons if there are any."""
    tables = [score_table(scores)]
    if any(entry.folds > 1 for entry in scores.entries):
        tables.append(fold_table(scores))
    if scores.comparisons:
        tables.append(comparison_table(scores))
    return tables


def score_table(scores: Scores) -> Table:
    """Return the scores of every task and encoder, and the weighted averages.

    Averages are from 0 to 1, as X-ARES and UniWhisper print them.
    """
    rows = []
    for task in scores.tasks:
        entries = [scores.get(encoder, task) for encoder in scores.encoders]
        first = next(entry for entry in entries if entry is not None)
        clips = f"{first.test_clips} ({first.group_count})" if first.groups else first.test_clips
        metric = METRIC_NAMES.get(first.metric, first.metric)
        chance = BLANK if first.chance is None else percent(first.chance)
        rows.append(
            (first.title, first.domain, metric, str(clips), chance, *map(score_cell, entries))
        )
    if len(scores.tasks) > 1:
        rows += _average_rows(scores)
    grouped = any(entry.groups for entry in scores.entries)
    clips = "test clips (groups)" if grouped else "test clips"
    labels = map(scores.label, scores.encoders)
    kinds = " and ".join(dict.fromkeys(_probe_title(entry.kind) for entry in scores.entries))
    return Table(
        f"{kinds[:1].upper()}{kinds[1:]}, protocol {scores.protocol}: scores in %",
        ("task", "domain", "metric", clips, "commonest class", *labels),
        tuple(rows),
        text_columns=3,
        caption=_score_caption(scores),
    )


def _average_rows(scores: Scores) -> list[tuple[str, ...]]:
    averages = {(average.domain, average.encoder): average for average in scores.averages()}
    rows = []
    for domain in [*scores.domains, *AVERAGE_NAMES]:
        cells = [averages.get((domain, encoder)) for encoder in scores.encoders]
        if any(cells):
            title = AVERAGE_NAMES.get(domain, f"{domain}, weighted")
            domain_cell = "" if domain in AVERAGE_NAMES else domain
            formatted = [score_cell(cell, "{:.3f}".format) for cell in cells]
            rows.append((title, domain_cell, "0 … 1", "", "", *formatted))
    return rows


def fold_table(scores: Scores) -> Table:
    """Return the score of each fold, averaged over seeds, for the tasks that have folds."""
    entries = [entry for entry in scores.entries if entry.folds > 1]
    folds = max((entry.folds for entry in entries), default=0)
    rows = []
    for entry in entries:
        cells = [percent(score) for score in entry.per_fold()]
        blanks = [BLANK] * (folds - len(cells))
        rows.append((entry.title, scores.label(entry.encoder), *cells, *blanks))
    return Table(
        "Scores by fold, in %",
        ("task", "encoder", *(f"fold {number + 1}" for number in range(folds))),
        tuple(rows),
        text_columns=2,
        caption="Some folds have harder clips than others, so the spread over folds does not "
        "measure the uncertainty of the mean.",
    )


def comparison_table(scores: Scores) -> Table:
    """Return every paired comparison with its interval, p-values and verdict."""
    titles = {entry.task: entry.title for entry in scores.entries} | AVERAGE_NAMES
    rows = [
        (
            scores.label(one.encoder),
            scores.label(one.against),
            titles.get(one.task, one.task),
            f"{100 * one.difference:+.1f}",
            f"{100 * one.low:+.1f} … {100 * one.high:+.1f}",
            BLANK if one.effect_size is None else f"{one.effect_size:+.2f}",
            BLANK if one.detectable is None else percent(one.detectable),
            p_value(one.p_value),
            p_value(one.p_holm),
            verdict(one),
        )
        for one in scores.comparisons
    ]
    return Table(
        "Paired comparisons",
        (
            *("encoder", "against", "task", "difference", "95 % interval", "d", "detectable"),
            *("p", "p (Holm)", "verdict"),
        ),
        tuple(rows),
        text_columns=3,
        caption="Difference in points, with its 95 % interval by paired bootstrap and its p-value "
        "by paired sign flips, over test clips or groups of test clips; with fewer than "
        f"{FEW_GROUPS} groups, a paired t interval and t test. p (Holm) is corrected for all "
        f"{len(rows)} rows. The interval does not cover the variation between training runs of "
        "an encoder. d: the mean difference in standard deviations of the paired differences. "
        "Detectable: the true difference that this test, uncorrected, finds with a probability "
        "of 80 %.",
    )


def class_tables(scores: Scores, predictions_file: Path) -> list[Table]:
    """Return the recall of each class with its interval, and what it is mistaken for, for tasks
    with one class per clip. None without the file of predictions.
    """
    predictions, tables = read_predictions(predictions_file), []
    for task in scores.tasks:
        columns: dict[str, dict[str, str]] = {}
        clips: Counter[str] = Counter()
        for encoder in scores.encoders:
            entry = scores.get(encoder, task)
            if not entry or not 0 < entry.classes <= MAX_CLASSES or not entry.confusion:
                continue
            by_class: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
            for row in predictions.get((encoder, task), ()):
                group = row.get("group") or row["key"]
                by_class[row["true"]].setdefault(group, []).append(row)
            for name, groups in sorted(by_class.items()):
                seeds = len(entry.record)
                right = [sum(r["predicted"] == name for r in rows) for rows in groups.values()]
                sizes = np.array([len(rows) for rows in groups.values()])
                totals = GroupTotals(np.array(right) / seeds, sizes / seeds)
                clips[name] = int(sizes.sum() / seeds)
                low, high = proportion_interval(totals)
                wrong = Counter(r["predicted"] for rows in groups.values() for r in rows)
                del wrong[name]
                cell = f"{percent(totals.value)} [{percent(low)}, {percent(high)}]"
                mistaken = f" {wrong.most_common(1)[0][0]}" if wrong else ""
                columns.setdefault(scores.label(encoder), {})[name] = cell + mistaken
        if columns:
            rows = [
                (name, str(count), *(column.get(name, BLANK) for column in columns.values()))
                for name, count in clips.items()
            ]
            title = next(entry.title for entry in scores.entries if entry.task == task)
            tables.append(
                Table(
                    f"{title}: recall of each class, in %",
                    ("class", "test clips", *columns),
                    tuple(rows),
                    caption="With the 95 % interval (Wilson; related clips count as fewer) and the "
                    "class that its clips are most often mistaken for.",
                )
            )
    return tables


def verdict(comparison: Comparison) -> str:
    """Return `better`, `worse`, or `no significant difference`."""
    if not comparison.significant:
        return "no significant difference"
    return "better" if comparison.difference > 0 else "worse"


def scores_csv(scores: Scores) -> str:
    """Return all scores as CSV, one line per encoder and task.

    Scores are from 0 to 1 and have full precision; those of folds have six significant digits.
    """
    rows = [_csv_row(entry) for entry in scores.entries]
    return Table("", CSV_COLUMNS, tuple(rows)).to_csv()


def _csv_row(entry: TaskScore) -> tuple[str, ...]:
    fold_means = " ".join(f"{score:.6g}" for score in entry.per_fold())
    names = (entry.encoder, entry.task, entry.domain, entry.protocol, entry.kind, entry.metric)
    values = (entry.mean, entry.std, *entry.interval, entry.final_fit, entry.epochs)
    sizes = (len(entry.seeds), entry.folds, fold_means, entry.test_clips, entry.group_count)
    cells = (*names, *values, *sizes, entry.classes, entry.weight, entry.identity)
    return tuple("" if cell is None else str(cell) for cell in cells)


def _score_caption(scores: Scores) -> str:
    """Explain on which clips probes were tuned and fitted, and what ± and brackets mean."""
    entries = scores.entries
    fitted_on = {
        "on all other folds" if entry.folds > 1 else FITTED_ON[entry.final_fit] for entry in entries
    }
    parts = [
        "Settings are chosen on validation clips; "
        f"the tested probe is fitted {' or '.join(sorted(fitted_on, reverse=True))}."
    ]
    seeds = max((len(entry.seeds) for entry in entries), default=0)
    if seeds > 1:
        seeded = dict.fromkeys(_probe_title(entry.kind) for entry in entries if entry.seeds)
        parts.append(
            f"± is the standard deviation over {seeds} seeds, which set the initial weights and "
            f"the batch order of {', '.join(seeded)}."
        )
    if any(not entry.seeds for entry in entries):
        parts.append("A probe without random initialisation is fitted once and has no ±.")
    if any(entry.std is None for entry in entries):
        parts.append(
            "Brackets contain the 95 % interval over the choice of test clips, by bootstrap, "
            f"or by a t interval with fewer than {FEW_GROUPS} clips or groups."
        )
    groups = {entry.task: entry.group for entry in entries if entry.groups}
    if groups:
        listed = ", ".join(f"{task} by {group}" for task, group in groups.items())
        parts.append(f"Related clips count as one group, with their number in (): {listed}.")
    skipped = [
        f"{task} {split}: {count} {reason}"
        for task, entry in {entry.task: entry for entry in entries}.items()
        for split, reasons in entry.skipped.items()
        for reason, count in reasons.items()
    ]
    if skipped:
        parts.append(f"Skipped clips: {'; '.join(skipped)}.")
    return " ".join(parts)


def _probe_title(kind: str) -> str:
    return PROBES[kind].title if kind in PROBES else kind  # an extension may be missing here


def score_cell(score: TaskScore | Average | None, number: Callable[[float], str] = percent) -> str:
    """Format a score with its deviation over seeds or, if it has none, with its interval."""
    if score is None:
        return BLANK
    if score.std is not None:
        return f"{number(score.mean)} ± {number(score.std)}"
    low, high = score.interval
    return f"{number(score.mean)} [{number(low)}, {number(high)}]"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
