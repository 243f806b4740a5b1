"""One table over the encoders and tasks of several files of scores: averages, ranks, costs."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from whisper_aut.errors import UserError, nearest
from whisper_aut.probes.results import AVERAGE, NO_ASR, Scores, TaskScore
from whisper_aut.probes.stats import (
    MIN_TRAININGS,
    detectable_difference,
    letter_groups,
    paired_tests,
)
from whisper_aut.probes.suite import compare
from whisper_aut.report.tables import AVERAGE_NAMES, BLANK, Table, p_value, score_cell

# Column → its format.
COST_COLUMNS = {
    "parameters (M)": "{:.1f}",
    "width": "{:d}",
    "frames/s": "{:.4g}",
    "GFLOP/s of audio": "{:.3g}",
    "ms/s of audio": "{:,.1f}",
}


def join_scores(files: Sequence[Path]) -> dict[str, tuple[Scores, list[str]]]:
    """Join files of scores: kind of probe → all its scores, and what makes them hard to compare.

    A score that is in two files counts once. A name that stands for two encoders gets the name or
    the path of the file's folder, and a title of two tasks the name of the task.

    Raises:
        UserError: a file is missing or holds no scores.
    """
    joined: dict[str, dict[tuple[str, str], TaskScore]] = defaultdict(dict)
    costs, hashes, audited = {}, {}, {}
    for file in files:
        scores, folder = Scores.load(file), file.resolve().parent
        if not scores.entries:
            raise UserError(f"{file} holds no scores.")
        kinds = {entry.kind for entry in scores.entries}
        kind = kinds.pop() if len(kinds) == 1 else str(scores.settings.get("kind"))
        known, audit = joined[kind], (folder / "audit.json").is_file()
        for given in scores.encoders:
            own = {e.task: e for e in scores.entries if e.encoder == given}
            cost = scores.costs.get(given)
            for name in (given, f"{given} ({folder.name})", f"{given} ({folder})"):
                same = all(
                    known.get((name, e.task), e).identity == e.identity for e in own.values()
                )
                if same and (not cost or hashes.get((kind, name)) in (None, cost.fingerprint)):
                    break
            known.update({(name, task): replace(e, encoder=name) for task, e in own.items()})
            audited[name] = audited.get(name, False) or audit
            if cost:
                costs[name], hashes[kind, name] = cost, cost.fingerprint
    found = {}
    for kind, known in joined.items():
        titles = Counter(title for title, _ in {(e.title, e.task) for e in known.values()})
        entries = (
            replace(e, title=f"{e.title} ({e.task})") if titles[e.title] > 1 else e
            for e in known.values()
        )
        scores = Scores(tuple(entries), costs=costs)
        found[kind] = scores, _warnings(scores, audited)
    return found


def _warnings(scores: Scores, audited: dict[str, bool]) -> list[str]:
    """Return how protocols, splits, tasks, audits and machines of the encoders differ."""
    found = []
    for task in scores.tasks:
        entries = [entry for entry in scores.entries if entry.task == task]
        for aspect, fields in {
            "another protocol": ("protocol",),
            "other test clips": ("keys_sha256", "groups"),
            "other numbers of training or validation clips": ("clips",),
            "another final fit": ("final_fit",),
            "another metric, weight or domain": ("metric", "weight", "domain"),
        }.items():
            values = [[getattr(entry, name) for name in fields] for entry in entries]
            names = [entry.encoder for entry in entries]
            others = [one for one, v in zip(names, values, strict=True) if v != values[0]]
            if others:
                found.append(f"{task}: {', '.join(others)} with {aspect} than {names[0]}.")
    for encoder in scores.encoders:
        if missing := [task for task in scores.tasks if scores.get(encoder, task) is None]:
            found.append(f"{encoder} has no score of {', '.join(missing)}.")
    missing = [name for name in scores.encoders if not audited[name]]
    if 0 < len(missing) < len(scores.encoders):
        found.append(
            f"No audit of overlap with training clips is next to the scores of "
            f"{', '.join(missing)}; there is one for the others."
        )
    machines = {scores.costs[name].machine for name in scores.encoders if name in scores.costs}
    if len(machines) > 1:
        found.append(f"Times are of several machines: {'; '.join(sorted(machines))}.")
    return found


def leaderboard_rows(scores: Scores) -> list[dict[str, Any]]:
    """Return a row for each encoder, the best first: column → number, text, average or score.

    Ranks, significance groups and averages over all tasks are those of the encoders that have all
    tasks on the same clips; the other encoders come last.
    """
    everything = {entry.task: (entry.keys_sha256, entry.groups) for entry in scores.entries}
    averages = {(one.encoder, one.domain): one for one in scores.averages()}
    own = {name: [e for e in scores.entries if e.encoder == name] for name in scores.encoders}
    complete = [
        name
        for name, entries in own.items()
        if {e.task: (e.keys_sha256, e.groups) for e in entries} == everything
    ]
    complete.sort(key=lambda name: -averages[name, AVERAGE].mean)
    kept = replace(scores, entries=tuple(entry for name in complete for entry in own[name]))
    compared = compare(kept, complete, only=AVERAGE if len(everything) > 1 else kept.tasks[0])
    letters = letter_groups(
        complete, [frozenset((one.encoder, one.against)) for one in compared if one.significant]
    )
    means = [[-one.mean for one in kept.entries if one.task == task] for task in kept.tasks]
    ranks = dict(zip(complete, rankdata(means, axis=1).mean(0) if means else (), strict=True))
    rows = []
    for name in [*complete, *(name for name in own if name not in complete)]:
        row: dict[str, Any] = {"encoder": scores.label(name)}
        if name in complete:
            row |= {"rank": complete.index(name) + 1, "mean rank": float(ranks[name])}
            row["group"] = letters[name]
        for domain in (AVERAGE, NO_ASR, *scores.domains):
            if (name, domain) in averages:
                row[AVERAGE_NAMES.get(domain, domain)] = averages[name, domain]
        if cost := scores.costs.get(name):
            speed = cost.frames_per_second, cost.gflops_per_second, cost.ms_per_second
            values = cost.parameters / 1e6, cost.width, *speed
            row |= dict(zip(COST_COLUMNS, values, strict=True)) | {"machine": cost.machine}
        rows.append(row | {entry.title: entry for entry in own[name]})
    return rows


def leaderboard_tables(scores: Scores) -> list[Table]:
    """Return the leaderboard, and the scores of every encoder and task."""
    rows = leaderboard_rows(scores)
    means = [AVERAGE_NAMES.get(one, one) for one in (AVERAGE, NO_ASR, *scores.domains)]
    columns = ["encoder", "group", "rank", "mean rank", *means, *COST_COLUMNS]
    columns = [name for name in columns if any(name in row for row in rows)]
    tasks = tuple(dict.fromkeys(entry.title for entry in scores.entries))
    summary = Table(
        "Leaderboard",
        tuple(columns),
        tuple(tuple(_cell(name, row.get(name)) for name in columns) for row in rows),
        text_columns=2,
        caption="Weighted averages from 0 to 1, with 95 % intervals over test clips. Encoders that "
        "share a letter do not differ significantly on the average of all tasks (paired "
        "permutation test over test clips or their groups, Holm's correction over all pairs; it "
        "does not cover the variation between trainings). Mean rank: over tasks. Costs: of the "
        "forward pass, for clips of 10 s.",
    )
    by_task = Table(
        "Scores by task, in %",
        ("encoder", *tasks),
        tuple(tuple(_cell(name, row.get(name)) for name in ("encoder", *tasks)) for row in rows),
    )
    return [summary, by_task]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return BLANK
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, float):
        return COST_COLUMNS.get(column, "{:.2f}").format(value)
    return score_cell(value) if isinstance(value, TaskScore) else score_cell(value, "{:.3f}".format)


def leaderboard_csv(boards: dict[str, Scores]) -> str:
    """Return the leaderboards of all kinds of probes as CSV, with scores from 0 to 1."""
    rows = []
    for kind, scores in boards.items():
        for row in leaderboard_rows(scores):
            plain = {"kind": kind}
            for name, value in row.items():
                scored = hasattr(value, "interval")
                plain[name] = value.mean if scored else value
                if scored:
                    plain[f"{name} (low)"], plain[f"{name} (high)"] = value.interval
            rows.append(plain)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple("" if row.get(c) is None else str(row[c]) for c in columns) for row in rows]
    return Table("", columns, tuple(cells)).to_csv()


def recipe_table(scores: Scores, recipe: str, against: str) -> Table:
    """Compare the trainings of a recipe, RECIPE-0, RECIPE-1 and so on, with an encoder, or with
    the trainings of the same number of another recipe. The training is the unit.

    Raises:
        UserError: there are no such trainings, or no encoder of that name.
    """
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for one in (*scores.entries, *scores.averages()):
        name = one.title if isinstance(one, TaskScore) else one.domain
        values[one.encoder][AVERAGE_NAMES.get(name, name)] = 100 * one.mean
    runs, others = (
        {int(n[1]): v for name, v in values.items() if (n := re.fullmatch(pattern, name))}
        for pattern in (rf"{re.escape(of)}-(\d+)" for of in (recipe, against))
    )
    if against in values:
        others = dict.fromkeys(runs, values[against])
    for of, found in ((recipe, runs), (against, others)):
        if not found:
            raise UserError(
                f"There are no trainings {of}-0, {of}-1, …, and no encoder {of}."
                f"{nearest(of, values)} There are: {', '.join(values)}."
            )
    pairs = [(runs[number], others[number]) for number in sorted(runs.keys() & others.keys())]
    names = dict.fromkeys(name for one in values.values() for name in one)
    shared = [
        name for name in names if pairs and all(name in one.keys() & other for one, other in pairs)
    ]
    tests = paired_tests([[one[name] - other[name] for one, other in pairs] for name in shared])
    rows = []
    for name, test in zip(shared, tests, strict=True):
        cells = [BLANK, BLANK, BLANK]
        if not isnan(test.p_value):
            smallest = detectable_difference(test.std, len(pairs))
            effect = f"{test.mean / test.std:+.1f}"
            cells = [f"{test.low:+.1f} … {test.high:+.1f}", effect, f"{smallest:.1f}"]
        tested = len(pairs) >= MIN_TRAININGS and not isnan(test.p_value)
        rows.append(
            (
                name,
                f"{test.mean:+.1f}",
                " · ".join(f"{value:+.1f}" for value in test.differences),
                *cells,
                p_value(test.p_adjusted) if tested else BLANK,
                test.verdict(),
            )
        )
    columns = ("difference", "by training", "95 % interval", "d", "detectable", "p (Holm)")
    return Table(
        f"Recipe {recipe} against {against}: {len(pairs)} trainings",
        ("task", *columns, "verdict"),
        tuple(rows),
        caption="In points. Interval and p-value are of a paired t test over trainings, which "
        f"needs differences that vary; a claim needs {MIN_TRAININGS} trainings. d: the mean "
        "difference in standard deviations. Detectable: the true difference that this test, "
        "uncorrected, finds with a probability of 80 %.",
    )
