"""Results → tables: quality beside price, paired comparisons, what fixed losses cost, and the commands.

In: `Results`. Out: Markdown, whole or put between the marks of a page. Next: `docs/results.md`, the console.
"""

import math
import re
from pathlib import Path

from whisper_aut.errors import UserError
from whisper_aut.experiments.results import Results, TaskResult
from whisper_aut.experiments.statistics import (
    Difference,
    SeedDifference,
    Spread,
    differences,
    price,
    seed_differences,
    spread,
)
from whisper_aut.probes.baseline import BASELINE_NAME
from whisper_aut.report.tables import BLANK, Sheet, markdown

MAX_DIFFERENCES = 45  # in a table for people; the JSON gives all


def sheets(results: Results) -> list[Sheet]:
    """Return the tables of an experiment."""
    found = [score_sheet(results)] if results.tasks else []
    found += [answer_sheet(results)] if results.answers else []
    found += [cost_sheet(results)] if any(measure.cost for measure in results.measures) else []
    found += [price_sheet(results)] if _thresholds(results) else []
    found += [difference_sheet(results)] if results.tasks and len(results.arms) > 1 else []
    of_trainings = seed_difference_sheet(results)
    return [*found, of_trainings] if of_trainings.rows else found


def score_sheet(results: Results) -> Sheet:
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
    return Sheet(
        "Linear probes, protocol strict: scores in %",
        f"In brackets: domain and test clips. ± is the standard deviation over {len(results.seeds)} trainings with other seeds, each a "
        f"mean over {results.probe_seeds} subsamples of the probe's training clips. Log-mel statistics are not trained: one value.",
        head,
        tuple(rows),
        _axes(results),
    )


def answer_sheet(results: Results) -> Sheet:
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
    return Sheet("Answers", caption, head, tuple(rows), _axes(results))


def cost_sheet(results: Results) -> Sheet:
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
            _number(spread([cost.audio_seconds / (1 - cost.padding_share) for cost in costs]) if costs else None, "{:.0f}"),
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
    return Sheet("Price of training", caption, head, tuple(rows), _axes(results))


def price_sheet(results: Results) -> Sheet:
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
    return Sheet("Price of a validation loss", caption, head, tuple(rows), _axes(results))


def difference_sheet(results: Results) -> Sheet:
    """Lay out each arm against the reference, domain by domain."""
    titles = {arm.name: arm.titles for arm in results.arms}
    found = differences(results)
    shown = (
        found
        if len(found) <= MAX_DIFFERENCES
        else [one for one in found if one.verdict != "no significant difference"]
    )
    rows = tuple((*titles[one.arm], one.domain, *_difference_cells(one)) for one in shown)
    head = (
        *_axis_names(results), "domain", "difference", "95 % interval, clips", "p, clips (Holm)", "p, seeds", "verdict"
    )  # fmt: skip
    caption = (
        f"Points against {', '.join(titles[results.reference])}; ± over seeds. A domain's tasks weigh alike. Interval by paired bootstrap "
        "over test clips, p by paired sign flips over clips, corrected after Holm for the whole table, and by a paired t-test over seeds. "
        "Better or worse: the corrected p over clips is below 0.05 and all seeds agree in sign."
    )
    if len(shown) < len(found):
        caption += f" Only significant ones of {len(found)} are shown."
    return Sheet("Paired comparisons", caption, head, rows, _axes(results) + 1)


def seed_difference_sheet(results: Results) -> Sheet:
    """Lay out each arm against the reference in what whole trainings are compared by."""
    titles = {arm.name: arm.titles for arm in results.arms}
    found = seed_differences(results)
    rows = tuple((*titles[one.arm], one.figure, *_seed_difference_cells(one)) for one in found)
    head = (
        *_axis_names(results),
        "figure",
        "difference or ratio",
        "seed by seed",
        "p, seeds",
        "p, seeds (Holm)",
        "verdict",
    )
    caption = (
        f"Against {', '.join(titles[results.reference])}, by a paired t-test over seeds, corrected after Holm for the whole table. Ratios "
        "are compared by their logarithms. Answers: the mean of the tasks, which weigh alike. Few seeds find large differences only."
    )
    return Sheet("Paired comparisons of trainings", caption, head, rows, _axes(results) + 1)


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
    parts += [markdown(sheet) for sheet in sheets(results)]
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


def _difference_cells(one: Difference) -> tuple[str, ...]:
    interval = (
        BLANK
        if one.low is None or one.high is None
        else f"{100 * one.low:+.1f} … {100 * one.high:+.1f}"
    )
    deviation = "" if one.std is None else f" ± {100 * one.std:.1f}"
    return (
        f"{100 * one.value:+.1f}{deviation}",
        interval,
        _p_value(one.p_holm),
        _p_value(one.p_seeds),
        one.verdict,
    )


def _seed_difference_cells(one: SeedDifference) -> tuple[str, ...]:
    written = f"{{:+.{one.decimals}f}}"
    if one.ratio:
        value, each = (
            f"× {math.exp(one.value):.2f}",
            [f"{math.exp(value):.2f}" for value in one.per_seed],
        )
    else:
        value, each = written.format(one.value), [written.format(value) for value in one.per_seed]
        value += "" if one.std is None else f" ± {written.format(one.std).lstrip('+')}"
    return value, " · ".join(each), _p_value(one.p_value), _p_value(one.p_holm), one.verdict


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
