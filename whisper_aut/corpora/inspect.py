"""Count what a folder of shards contains and what in it cannot be used.

Only headers are read, so damage after a valid header goes unnoticed until training decodes the
clip. The exceptions are float audio, which is decoded to check its scale, and audio whose header
has no duration.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from whisper_aut.audio.decode import ClipLimits, decode, read_header
from whisper_aut.data.annotation import Annotation, whisper_codes
from whisper_aut.data.reader import MemberGroups, audio_and_annotation, open_stream
from whisper_aut.data.shards import INDEX_NAME, ShardIndex, list_tars, open_index
from whisper_aut.errors import SkipReason, SkipSample

HISTOGRAM_EDGES_SECONDS = (0, 0.5, 1, 2, 5, 10, 15, 20, 30)
FIELDS = ("domain", "task", "language", "source", "licence")
EXAMPLES = 5


@dataclass
class ShardStatistics:
    """Statistics of a folder of shards.

    Attributes:
        root: the folder or URL.
        folders: number of clips per folder of shards under `root`.
        shards: number of tars.
        bytes: total size of the tars.
        clips: number of samples whose audio header and JSON are valid. Except for `refused` and
            `faults`, the counts below are of these.
        seconds: duration per clip.
        rates_hz, channels, codecs: number of clips by property of the stored audio.
        fields: number of clips by value, for each of `FIELDS`.
        labels: number of clips by class; a clip may have several classes.
        labelled: number of clips with a class.
        fields_without_text: for clips with neither text nor label, how often each other field
            occurs.
        words, characters: length of the text per clip that has one.
        refused: number of samples that cannot be used, by reason.
        examples: the first few clips (key, seconds, text, label).
        faults: the first few unusable samples (place, reason, detail).
        warnings: differences between tars and index, repeated keys and unknown languages.
        builds: per folder, the counts that its builder stored in the index.
    """

    root: str
    folders: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    bytes: int = 0
    clips: int = 0
    seconds: array = field(default_factory=lambda: array("d"))
    rates_hz: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    fields: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in FIELDS}
    )
    labels: Counter[str] = field(default_factory=Counter)
    labelled: int = 0
    fields_without_text: Counter[str] = field(default_factory=Counter)
    words: array = field(default_factory=lambda: array("L"))
    characters: array = field(default_factory=lambda: array("L"))
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    builds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def hours(self) -> float:
        """Total duration of the clips."""
        return sum(self.seconds) / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as values that JSON supports."""
        return {
            "root": self.root,
            "folders": self.folders,
            "shards": self.shards,
            "bytes": self.bytes,
            "clips": self.clips,
            "hours": self.hours,
            "sample_rates_hz": _ranked(self.rates_hz),
            "channels": _ranked(self.channels),
            "codecs": _ranked(self.codecs),
            "seconds": {**distribution(self.seconds), "histogram": histogram(self.seconds)},
            **{name: _ranked(counts) for name, counts in self.fields.items()},
            "labels": _ranked(self.labels),
            "clips_with_label": self.labelled,
            "clips_with_text": len(self.words),
            "fields_without_text": _ranked(self.fields_without_text),
            "words": distribution(self.words),
            "characters": distribution(self.characters),
            "refused": _ranked(self.refused),
            "examples": self.examples,
            "faults": self.faults,
            "warnings": self.warnings,
            "builds": self.builds,
        }


def inspect_shards(
    root: str | Path,
    limits: ClipLimits = ClipLimits(),  # noqa: B008 (frozen)
) -> ShardStatistics:
    """Read every header and annotation under `root`.

    Args:
        root: a folder or URL of shards, with or without an index, or a folder of such folders.
        limits: what a clip must satisfy.

    Raises:
        UserError: there are no shards, or an index is damaged or lists missing tars. Damage inside
            a tar is counted instead.
    """
    facts = ShardStatistics(str(root))
    for name, index in open_indices(str(root)):
        before = facts.clips
        for number in range(len(index.shards)):
            _read_shard(facts, index, number, limits)
        facts.folders[name] = facts.clips - before
        facts.builds[name] = {
            key: value
            for key, value in index.metadata.items()
            if key in ("recipe", "refused", "build")
        }
    unknown = {
        tag: n for tag, n in facts.fields["language"].items() if tag and not whisper_codes(tag)
    }
    if unknown:
        listed = ", ".join(f"{tag!r}: {n}" for tag, n in Counter(unknown).most_common(EXAMPLES))
        facts.warnings.append(
            f"{sum(unknown.values())} clips have a language that no Whisper has a token for "
            f"({listed})."
        )
    return facts


def distribution(values: Iterable[float]) -> dict[str, float]:
    """Return minimum, median, mean, 95th percentile and maximum; an empty dict for no values."""
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return {}
    low, median, high, top = np.percentile(numbers, [0, 50, 95, 100])
    named = {"min": low, "median": median, "mean": numbers.mean(), "p95": high, "max": top}
    return {name: float(value) for name, value in named.items()}


def histogram(seconds: Iterable[float]) -> dict[str, int]:
    """Count clips by duration; a clip of exactly 30 s is counted under `20–30 s`."""
    edges = np.asarray([*HISTOGRAM_EDGES_SECONDS, np.inf])
    # Upper edges belong to the lower bin, with the same half-millisecond tolerance that decoding
    # applies to the maximum duration.
    bins = np.searchsorted(edges + 5e-4, np.asarray(seconds, dtype=np.float64)) - 1
    counts = np.bincount(np.maximum(bins, 0), minlength=len(edges) - 1)
    names = [f"{low:g}–{high:g} s" for low, high in pairwise(edges[:-1])] + [f"> {edges[-2]:g} s"]
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def open_indices(root: str) -> Iterator[tuple[str, ShardIndex]]:
    """Yield the name and index of each folder of shards under `root`.

    If `root` itself is a folder of shards, its name is "".

    Raises:
        UserError: there are no shards, or an index is damaged or lists missing tars.
    """
    filesystem, path = fsspec.url_to_fs(root)
    is_own = (
        filesystem.exists(f"{path}/{INDEX_NAME}")
        or not filesystem.isdir(path)
        or list_tars(filesystem, path)
    )
    folders = [] if is_own else sorted(filesystem.ls(path, detail=False))
    below = [folder for folder in folders if filesystem.exists(f"{folder}/{INDEX_NAME}")]
    if not below:
        yield "", open_index(root)
    for folder in below:
        name = folder.rpartition("/")[2]
        yield name, open_index(f"{root.rstrip('/')}/{name}")


def _read_shard(facts: ShardStatistics, index: ShardIndex, number: int, limits: ClipLimits) -> None:
    url, shard = index.url(number), index.shards[number]
    samples = 0
    with open_stream(url) as stream:
        groups = MemberGroups(stream, limits)
        last, repeated = None, 0
        for _, group in groups:
            samples += 1
            repeated += group["__key__"] == last
            last = group["__key__"]
            try:
                _add(facts, group, limits)
            except SkipSample as refused:
                _refuse(facts, f"{url}: {group['__key__']}", refused.reason, refused.detail)
        facts.bytes += stream.seek(0, 2) if stream.seekable() else shard.bytes
    facts.shards += 1
    if groups.damage:
        _refuse(facts, url, SkipReason.BAD_TAR, groups.damage)
    if repeated:
        facts.warnings.append(f"{url}: {repeated} samples have the key of the sample before them")
    if samples != shard.samples:
        facts.warnings.append(
            f"{url} holds {samples} samples where its index counts {shard.samples}"
        )


def _add(facts: ShardStatistics, group: dict[str, Any], limits: ClipLimits) -> None:
    _, audio, annotation = audio_and_annotation(group)
    header = read_header(audio, limits)
    seconds = header.seconds
    if seconds is None or header.codec.endswith(("FLOAT", "DOUBLE")):  # floats may be on any scale
        seconds = decode(audio, limits).seconds
    facts.clips += 1
    facts.seconds.append(seconds)
    facts.rates_hz[header.sample_rate_hz] += 1
    facts.channels[header.channels] += 1
    facts.codecs[header.codec] += 1
    _add_annotation(facts, annotation)
    if len(facts.examples) < EXAMPLES:
        text = annotation.text or annotation.answer
        facts.examples.append(
            {"key": group["__key__"], "seconds": seconds, "text": text, "label": annotation.label}
        )


def _add_annotation(facts: ShardStatistics, annotation: Annotation) -> None:
    for name, counts in facts.fields.items():
        counts[getattr(annotation, name)] += 1
    labels = annotation.label if isinstance(annotation.label, list) else [annotation.label]
    facts.labels.update(label for label in labels if label is not None)
    facts.labelled += annotation.label is not None
    text = annotation.text or annotation.answer
    if not text and annotation.label is None:
        facts.fields_without_text.update(list(annotation.extra))
    if text:
        facts.words.append(len(text.split()))
        facts.characters.append(len(text))


def _refuse(facts: ShardStatistics, place: str, reason: SkipReason, detail: str) -> None:
    facts.refused[reason] += 1
    if len(facts.faults) < EXAMPLES:
        facts.faults.append({"place": place, "reason": str(reason), "detail": detail})


def _ranked(counts: Counter) -> dict[str, int]:
    return {str(value): count for value, count in counts.most_common()}


BAR_CHARACTERS = 40
MOST_VALUES = 8
MOST_LABELS = 20


def render(facts: ShardStatistics) -> RenderableType:
    """Return tables for the terminal.

    The order is: overview, durations, labels, unusable samples, warnings, examples.
    """
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


def _overview(facts: ShardStatistics) -> Table:
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


def _lengths(facts: ShardStatistics) -> Table:
    table = Table("", "min", "median", "mean", "95 %", "max")
    for name, values in (
        ("seconds", facts.seconds),
        ("words", facts.words),
        ("characters", facts.characters),
    ):
        if len(values):
            table.add_row(name, *(f"{value:.4g}" for value in distribution(values).values()))
    return table


def _durations(facts: ShardStatistics) -> Table:
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


def _examples(facts: ShardStatistics) -> Table:
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
