"""Facts about shards → tables for the terminal.

In: `ShardFacts` of `corpora.inspect`. Out: a rich renderable, for a console without markup, since
names may hold brackets.
"""

from collections import Counter
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from whisper_aut.corpora.inspect import ShardFacts, distribution, histogram

BAR_CHARACTERS = 40
MOST_VALUES = 8
MOST_LABELS = 20


def render(facts: ShardFacts) -> RenderableType:
    """Return the tables in the order in which one asks: how much, how long, of what, what is wrong, for instance."""
    parts: list[RenderableType] = [_overview(facts)]
    if facts.clips:
        parts += [_lengths(facts), _durations(facts)]
    if facts.labels:
        without = facts.clips - facts.labelled
        title = f"{len(facts.labels)} labels" + (
            f", {without} clips without one" if without else ""
        )
        parts.append(_counted(title, facts.labels, MOST_LABELS))
    if facts.refused:
        parts.append(_counted("Samples that cannot be used", facts.refused, len(facts.refused)))
        parts += [
            f"  {fault['place']}: {fault['reason']}: {fault['detail']}" for fault in facts.faults
        ]
    if facts.fields_without_text:
        named = ", ".join(facts.fields_without_text)
        parts.append(
            f"Clips without text have the fields {named}. data.train[].text names one to read."
        )
    parts += [f"Warning: {warning}" for warning in facts.warnings]
    if facts.examples:
        parts.append(_examples(facts))
    return Group(*parts)


def _overview(facts: ShardFacts) -> Table:
    table = Table(title=facts.root, show_header=False)
    size = f"{facts.bytes / 1e9:.2f} GB" if facts.bytes >= 1e9 else f"{facts.bytes / 1e6:.1f} MB"
    table.add_row("clips", f"{facts.clips} in {facts.shards} shards, {size}")
    if any(facts.folders):
        table.add_row("folders", _inline(facts.folders))
    table.add_row("audio", f"{facts.hours:.2f} h")
    table.add_row(
        "rates", _inline({f"{rate} Hz": count for rate, count in facts.rates_hz.most_common()})
    )
    table.add_row("channels", _inline(dict(facts.channels.most_common())))
    table.add_row("codecs", _inline(dict(facts.codecs.most_common())))
    for name, counts in facts.fields.items():
        if set(counts) - {""}:
            table.add_row(
                name, _inline({value or "(none)": count for value, count in counts.most_common()})
            )
    table.add_row("text", f"{len(facts.words)} clips")
    refused = Counter()
    for build in facts.builds.values():
        refused.update(build.get("refused") or {})
    if refused:
        table.add_row("refused by the build", _inline(dict(refused)))
    return table


def _lengths(facts: ShardFacts) -> Table:
    table = Table("", "min", "median", "mean", "95 %", "max")
    for name, values in (
        ("seconds", facts.seconds),
        ("words", facts.words),
        ("characters", facts.characters),
    ):
        if len(values):
            table.add_row(name, *(f"{value:.4g}" for value in distribution(values).values()))
    return table


def _durations(facts: ShardFacts) -> Table:
    table = Table("duration", "clips", "", box=None)
    counts = histogram(facts.seconds)
    for name, count in counts.items():
        table.add_row(name, str(count), "█" * round(BAR_CHARACTERS * count / max(counts.values())))
    return table


def _counted(title: str, counts: Counter[str], most: int) -> Table:
    table = Table("", "clips", title=title)
    for value, count in counts.most_common(most):
        table.add_row(value, str(count))
    if len(counts) > most:
        table.add_row(f"… {len(counts) - most} more", "")
    return table


def _examples(facts: ShardFacts) -> Table:
    table = Table("key", "seconds", "text", "label", title="For instance")
    for example in facts.examples:
        label = example["label"]
        written = ", ".join(label) if isinstance(label, list) else label or ""
        table.add_row(
            example["key"],
            f"{example['seconds']:.2f}",
            example["text"],
            written,
        )
    return table


def _inline(counts: Mapping) -> str:
    shown = [f"{value!s} ({count})" for value, count in list(counts.items())[:MOST_VALUES]]
    return ", ".join(shown) + (
        f", … {len(counts) - MOST_VALUES} more" if len(counts) > MOST_VALUES else ""
    )
