"""Count what a folder of shards contains and what in it cannot be used.

Only headers are read, so damage after a valid header goes unnoticed until training decodes the
clip. The exceptions are float audio, which is decoded to check its scale, and audio whose header
has no duration.
"""

import io
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from whisper_aut.audio.decode import TRIM_SECONDS, ClipLimits, decode, read_header
from whisper_aut.data.annotation import KEY_FIELD, whisper_codes
from whisper_aut.data.reader import (
    TAR_SUFFIXES,
    MemberGroups,
    audio_and_annotation,
    is_local,
    open_filesystem,
    open_stream,
)
from whisper_aut.data.shards import INDEX_NAME, UNCOUNTED, ShardIndex, find_tars, open_index
from whisper_aut.errors import SkipReason, SkipSample, UserError

LIMITS = ClipLimits(max_seconds=ClipLimits().max_seconds + TRIM_SECONDS)
HISTOGRAM_EDGES_SECONDS = (0, 0.5, 1, 2, 5, 10, 15, 20, 30)
FIELDS = ("domain", "task", "language", "source", "licence")
COUNTED = ("sample_rates_hz", "channels", "codecs", *FIELDS, "labels", "other_fields")
LABEL_FIELDS = ("labels", "tags", "tag", "category", "class", "classes", "genre", "cls")
EXAMPLES = 5
BAR_CHARACTERS = 40
MOST_VALUES = 8
MOST_LABELS = 20


@dataclass
class ShardStatistics:
    """Counts over a folder of shards. A clip is a sample whose audio header and JSON are valid."""

    root: str  # the folder or URL
    folders: dict[str, int] = field(default_factory=dict)  # clips per folder of shards in it
    shards: int = 0  # number of tars
    bytes: int = 0  # their total size
    seconds: array = field(default_factory=lambda: array("d"))  # duration of each clip
    # Clips by value, for each name in `COUNTED`. A clip may have several labels. `other_fields`
    # counts the fields that an annotation has no name for.
    counts: dict[str, Counter] = field(
        default_factory=lambda: {name: Counter() for name in COUNTED}
    )
    clips_with_label: int = 0
    clips_with_id: int = 0  # of their own
    # Length of the text of each clip that has one, and number of words in the other fields.
    words: array = field(default_factory=lambda: array("L"))
    characters: array = field(default_factory=lambda: array("L"))
    other_words: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # samples that cannot be used, by reason
    examples: list[dict[str, Any]] = field(default_factory=list)  # key, seconds, text, label
    problems: list[dict[str, str]] = field(default_factory=list)  # location, reason, detail
    # Differences between tars and index, repeated keys and unknown languages.
    warnings: list[str] = field(default_factory=list)
    # For each folder, the counts that its builder stored in the index.
    builds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        """Number of usable samples."""
        return len(self.seconds)

    @property
    def samples(self) -> int:
        """Number of samples that were read."""
        return self.clips + self.skipped.total()

    @property
    def hours(self) -> float:
        """Total duration of the clips."""
        return sum(self.seconds) / 3600

    def suggested_fields(self) -> dict[str, str]:
        """Return the `fields` of a source for what most clips lack under the usual names.

        The text is probably the field with the most words per clip. A single word per clip is more
        likely a file name or a code, so a sentence with the label is preferred to it.
        """
        most, found = self.clips / 2, {}
        other = {name: n for name, n in self.counts["other_fields"].items() if n > most}
        texts = {name: self.other_words[name] / n for name, n in other.items()}
        texts = {name: words for name, words in texts.items() if words}
        labels = [name for name in LABEL_FIELDS if name in other]
        if self.clips_with_label <= most and labels:
            found["label"] = labels[0]
            texts.pop(labels[0], None)
        label = found.get("label", "label" if self.clips_with_label > most else "")
        if len(self.words) <= most and label and max(texts.values(), default=0) <= 1:
            found["text"] = f'"{{{label}:words}}"'
        elif len(self.words) <= most and texts:
            found["text"] = max(texts, key=lambda name: texts[name])
        if self.clips_with_id <= most:
            found["id"] = KEY_FIELD
        return found

    def source(self) -> str:
        """Return the entry of `data.train` that trains on these shards."""
        domains = [name for name in self.counts["domain"] if name]
        fields = ", ".join(f"{name}: {field}" for name, field in self.suggested_fields().items())
        # In a folder of folders of shards, one of them.
        inner = "" if "" in self.folders else "/train" if "train" in self.folders else "/FOLDER"
        path = self.root.rstrip("/") + inner if self.folders else self.root
        entry = f"path: {path}, domain: {domains[0] if len(domains) == 1 else 'DOMAIN'}"
        return f"{{{entry}, fields: {{{fields}}}}}" if fields else f"{{{entry}}}"

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as values that JSON supports."""
        own = {name: value for name, value in vars(self).items() if name != "counts"}
        return {
            **own,
            **{name: _ranked(counts) for name, counts in self.counts.items()},
            "clips": self.clips,
            "hours": self.hours,
            "seconds": {**distribution(self.seconds), "histogram": histogram(self.seconds)},
            "clips_with_text": len(self.words),
            "words": distribution(self.words),
            "characters": distribution(self.characters),
            "skipped": _ranked(self.skipped),
            "source": self.source(),
        }

    def add_shard(
        self, index: ShardIndex, number: int, limits: ClipLimits, most: int | None = None
    ) -> None:
        """Read the headers and annotations of one tar, or of its first `most` samples."""
        url, shard = index.url(number), index.shards[number]
        samples, repeated, last_key = 0, 0, None
        with open_stream(url) as stream:
            groups = MemberGroups(stream, limits)
            for _, group in islice(groups, most):
                key = group["__key__"]
                samples += 1
                repeated += key == last_key
                last_key = key
                try:
                    self._add_clip(group, limits)
                except SkipSample as skip:
                    self._skip(f"{url}: {key}", skip.reason, skip.detail)
            try:
                self.bytes += stream.seek(0, io.SEEK_END)
            except MemberGroups.damages:  # the server does not report it, or it is compressed
                self.bytes += shard.bytes
        self.shards += 1
        if groups.damage:
            self._skip(url, SkipReason.BAD_TAR, groups.damage)
        if repeated:
            self.warnings.append(f"{url}: {repeated} samples have the key of the previous sample")
        if samples != shard.samples and most is None and shard.samples != UNCOUNTED:
            self.warnings.append(f"{url} has {samples} samples, but its index says {shard.samples}")

    def _add_clip(self, group: dict[str, Any], limits: ClipLimits) -> None:
        _, audio, annotation = audio_and_annotation(group)
        header = read_header(audio, limits)
        seconds = header.seconds
        # Float audio may have any scale.
        if seconds is None or header.codec.endswith(("FLOAT", "DOUBLE")):
            seconds = decode(audio, limits).seconds
        self.seconds.append(seconds)
        self.counts["sample_rates_hz"][header.sample_rate_hz] += 1
        self.counts["channels"][header.channels] += 1
        self.counts["codecs"][header.codec] += 1
        for name in FIELDS:
            self.counts[name][getattr(annotation, name)] += 1
        label, text = annotation.label, annotation.text or annotation.answer
        if label is not None:
            self.clips_with_label += 1
            self.counts["labels"].update(label if isinstance(label, list) else [label])
        if text:
            self.words.append(len(text.split()))
            self.characters.append(len(text))
        self.clips_with_id += bool(annotation.id)
        self.counts["other_fields"].update(list(annotation.extra))
        for name, value in annotation.extra.items():
            first = value[0] if isinstance(value, list) and value else value
            self.other_words[name] += len(first.split()) if isinstance(first, str) else 0
        if len(self.examples) < EXAMPLES:
            key = group["__key__"]
            self.examples.append({"key": key, "seconds": seconds, "text": text, "label": label})

    def _skip(self, location: str, reason: SkipReason, detail: str) -> None:
        self.skipped[reason] += 1
        if len(self.problems) < EXAMPLES:
            self.problems.append({"location": location, "reason": str(reason), "detail": detail})


def inspect_shards(
    root: str | Path, limits: ClipLimits = LIMITS, most: int | None = None
) -> ShardStatistics:
    """Read every header and annotation under `root`.

    Args:
        root: a folder or URL of shards, with or without an index, or a folder of such folders.
        limits: what a clip must satisfy; by default, what training requires of it by default.
        most: read only the first samples of each folder.

    Raises:
        UserError: there are no shards, or an index is damaged or lists missing tars. Damage inside
            a tar is counted instead.
    """
    statistics = ShardStatistics(str(root))
    for name, index in open_indices(str(root), counted=False):
        before, begun = statistics.clips, statistics.samples
        for number in range(len(index.shards)):
            rest = None if most is None else most - (statistics.samples - begun)
            if rest is None or rest > 0:
                statistics.add_shard(index, number, limits, rest)
        statistics.folders[name] = statistics.clips - before
        stored = ("recipe", "skipped", "build")
        found = index.metadata
        statistics.builds[name] = {key: found[key] for key in stored if key in found}
    languages = statistics.counts["language"].items()
    unknown = Counter({tag: n for tag, n in languages if tag and not whisper_codes(tag)})
    if unknown:
        listed = ", ".join(f"{tag!r}: {n}" for tag, n in unknown.most_common(EXAMPLES))
        statistics.warnings.append(
            f"{unknown.total()} clips have a language that no Whisper has a token for ({listed})."
        )
    return statistics


def open_indices(root: str, *, counted: bool = True) -> Iterator[tuple[str, ShardIndex]]:
    """Yield the name and index of each folder of shards under `root`.

    If `root` itself is a folder of shards, its name is "". Local folders need no index. Unless
    `counted`, the samples of tars without an index are not counted, and these may be remote or
    compressed.

    Raises:
        UserError: there are no shards, `root` cannot be read, or an index is damaged or lists
            missing tars.
    """
    filesystem, path = open_filesystem(root)
    try:
        has_index = filesystem.exists(f"{path}/{INDEX_NAME}")
        is_folder = not has_index and filesystem.isdir(path)
        inside = sorted(filesystem.ls(path, detail=False)) if is_folder else []
        has_tars = any(one.endswith(TAR_SUFFIXES) for one in (root, *inside))
        folders = [] if has_tars else inside
        found = [
            one
            for one in folders
            if filesystem.exists(f"{one}/{INDEX_NAME}")
            or (is_local(root) and any(Path(one).glob("[!.]*.tar")))
        ]
    except Exception as error:  # every fsspec file system raises its own types
        raise UserError(f"{root} cannot be read: {error}.") from None
    if not found:
        is_first_look = has_tars and not counted and not has_index
        yield "", find_tars(root) if is_first_look else open_index(root)
    for folder in found:
        name = folder.rpartition("/")[2]
        yield name, open_index(f"{root.rstrip('/')}/{name}")


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


def render(statistics: ShardStatistics) -> RenderableType:
    """Return tables for the terminal."""
    parts: list[RenderableType] = [_overview(statistics)]
    if statistics.clips:
        parts += _lengths(statistics)
    if labels := statistics.counts["labels"]:
        title, unlabelled = f"{len(labels)} labels", statistics.clips - statistics.clips_with_label
        title += f", {unlabelled} clips without one" if unlabelled else ""
        parts.append(_count_table(title, labels, MOST_LABELS))
    if skipped := statistics.skipped:
        parts.append(_count_table("Samples that cannot be used", skipped, len(skipped)))
        parts += [
            f"  {problem['location']}: {problem['reason']}: {problem['detail']}"
            for problem in statistics.problems
        ]
    if names := statistics.counts["other_fields"]:
        parts.append(f"Other fields: {_inline(names)}")
    parts += [f"Warning: {warning}" for warning in statistics.warnings]
    parts.append(f"To train on them: data.train=[{statistics.source()}]")
    if statistics.examples:
        table = Table("key", "seconds", "text", "label", title="Examples")
        for example in statistics.examples:
            label = example["label"] or ""
            label = ", ".join(label) if isinstance(label, list) else label
            table.add_row(example["key"], f"{example['seconds']:.2f}", example["text"], label)
        parts.append(table)
    return Group(*parts)


def _overview(statistics: ShardStatistics) -> Table:
    table = Table(title=statistics.root, show_header=False)
    size = decimal(statistics.bytes)
    table.add_row("clips", f"{statistics.clips} in {statistics.shards} shards, {size}")
    if any(statistics.folders):
        table.add_row("folders", _inline(statistics.folders))
    table.add_row("audio", f"{statistics.hours:.2f} h")
    for name in ("sample_rates_hz", "channels", "codecs", *FIELDS):
        counts = _ranked(statistics.counts[name])
        if set(counts) - {""}:
            unit, counts = " Hz" if name == "sample_rates_hz" else "", counts.items()
            named = {f"{value}{unit}" or "(none)": count for value, count in counts}
            table.add_row(name.removesuffix("_hz").replace("_", " "), _inline(named))
    table.add_row("text", f"{len(statistics.words)} clips")
    skipped = Counter()
    for build in statistics.builds.values():
        skipped.update(build.get("skipped") or {})
    if skipped:
        table.add_row("skipped by the build", _inline(skipped))
    return table


def _lengths(statistics: ShardStatistics) -> list[Table]:
    lengths = Table("", "min", "median", "mean", "95 %", "max")
    for name in ("seconds", "words", "characters"):
        if values := distribution(getattr(statistics, name)):
            lengths.add_row(name, *(f"{value:.4g}" for value in values.values()))
    durations = Table("duration", "clips", "", box=None)
    counts = histogram(statistics.seconds)
    for name, count in counts.items():
        bar = "█" * round(BAR_CHARACTERS * count / max(counts.values()))
        durations.add_row(name, str(count), bar)
    return [lengths, durations]


def _count_table(title: str, counts: Counter[str], most: int) -> Table:
    table = Table("", "clips", title=title)
    for value, count in counts.most_common(most):
        table.add_row(value, str(count))
    if len(counts) > most:
        table.add_row(f"… {len(counts) - most} more", "")
    return table


def _ranked(counts: Counter) -> dict[str, int]:
    return {str(value): count for value, count in counts.most_common()}


def _inline(counts: Mapping[str, int]) -> str:
    shown = [f"{value} ({count})" for value, count in list(counts.items())[:MOST_VALUES]]
    more = [f"… {len(counts) - MOST_VALUES} more"] if len(counts) > MOST_VALUES else []
    return ", ".join([*shown, *more])
