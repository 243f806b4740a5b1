"""Results → tables: scores, answers, costs, comparisons between recipes, and the commands."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from whisper_aut.errors import UserError
from whisper_aut.experiments.results import Results, TaskResult
from whisper_aut.experiments.statistics import (
    MIN_TRAININGS,
    Comparison,
    Spread,
    compare,
    price,
    spread,
)
from whisper_aut.probes.baseline import BASELINE_NAME
from whisper_aut.report.tables import BLANK, Sheet, markdown


def sheets(results: Results) -> list[Sheet]:
    """Return the tables of an experiment."""
    found = [score_sheet(results)] if results.tasks else []
    found += [answer_sheet(results)] if results.answers else []
    found += [cost_sheet(results)] if any(measure.cost for measure in results.measures) else []
    found += [price_sheet(results)] if _thresholds(results) else []
    comparisons = comparison_sheet(results)
    return [*found, comparisons] if comparisons.rows else found


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
    subsampled = any(task.spread is not None for task in tasks.values())  # by earlier releases
    each = f", each a mean over {results.probe_seeds} subsamples of the probe's training clips"
    return Sheet(
        "Linear probes, protocol strict: scores in %",
        "In brackets: domain and test clips. ± is the standard deviation over "
        f"{len(results.seeds)} trainings with other seeds{each * subsampled}. Log-mel statistics are "
        "not trained: one value.",
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


def comparison_sheet(results: Results) -> Sheet:
    """Lay out each arm against the reference, endpoint by endpoint."""
    titles = {arm.name: arm.titles for arm in results.arms}
    found = compare(results)
    head = (
        *_axis_names(results),
        "endpoint",
        "difference",
        "training by training",
        "95 % interval",
        "p",
        "p, corrected",
        "detectable",
        "verdict",
    )
    rows = tuple((*titles[one.arm], *_comparison_cells(one)) for one in found)
    caption = (
        f"Against {', '.join(titles[results.reference])}, paired by seed: the unit is a training. "
        "± is the standard deviation of the differences; intervals and p are of a paired t test over "
        f"trainings, {_correction(found, results)} Domains (their tasks count alike) and answers in "
        "points, losses in nats; ratios are compared by their logarithms. Detectable: the true "
        f"difference that this number of trainings ({MIN_TRAININGS} where there are fewer), with this "
        "standard deviation and correction, finds with a probability of 80 %. Better, worse: the "
        f"corrected p is below 0.05. A claim needs {MIN_TRAININGS} trainings. {_margin(results)}"
    )
    return Sheet("Comparisons of trainings", caption.strip(), head, rows, _axes(results) + 1)


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


def _comparison_cells(one: Comparison) -> tuple[str, ...]:
    def show(value: float, sign: str = "+") -> str:
        if one.endpoint.ratio:
            return f"{math.exp(value):.3g}"
        return f"{value:{sign}.{1 if one.endpoint.points else 3}f}"

    times = "× " * one.endpoint.ratio
    deviation = f" ± {show(one.std, '')}" if one.std is not None and not one.endpoint.ratio else ""
    return (
        one.endpoint.title + ", primary" * one.primary,
        times + show(one.value) + deviation,
        " · ".join(map(show, one.per_training)),
        BLANK if one.low is None or one.high is None else f"{show(one.low)} … {show(one.high)}",
        _p_value(one.p_value),
        _p_value(one.p_adjusted),
        BLANK if one.detectable is None else times + show(one.detectable, ""),
        one.verdict,
    )


def _correction(found: Sequence[Comparison], results: Results) -> str:
    rest = sum(not one.primary for one in found)
    if results.settings.get("primary", {}).get("arm"):
        return (
            "the primary one at 5 % by itself, the others corrected after Holm for "
            f"{rest} comparisons and no smaller than the primary one's."
        )
    return f"corrected after Holm for all {rest} comparisons; no primary one was named beforehand."


def _margin(results: Results) -> str:
    margin = results.settings.get("margin")
    if not margin:
        return ""
    return (
        f"No worse: the lower end of the 95 % interval is above -{margin:g} points, corrected after "
        "Holm but for the primary comparison."
    )


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
