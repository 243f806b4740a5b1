"""Shards → the clips of a task: chosen, labelled, decoded ahead of the encoder, cropped.

In: a `ShardIndex` and a `ProbeTask`. Out: `Clip`s in shard order, and a count of what is not among them. Next: `probes.embed`. Labels are
read as the tars hold them: a class, several in one text, a list of events, captions in fields of their own, a transcript.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from torch import Tensor

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.data.ahead import decoded_ahead
from whisper_aut.data.sample import Refusal, Sample, iter_samples
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, load_waveform
from whisper_aut.errors import Reason, SampleRefused, UserError
from whisper_aut.probes.tasks import ProbeTask

NOT_SELECTED = "not selected"
LEFT_OUT = (NOT_SELECTED, str(Reason.NO_LABEL))  # not part of the task, as opposed to broken


@dataclass(frozen=True)
class Clip:
    """One clip of a task: where it is, its label and its group, `[S]` at 16 kHz, and how many samples of the folder were read up to it."""

    key: str
    label: Any
    waveform: Tensor
    seen: int
    group: str = ""


@dataclass(frozen=True)
class Share:
    """The samples of a folder that one of several processes takes: a run of them, so that shares lie end to end."""

    rank: int = 0
    ranks: int = 1

    def bounds(self, samples: int) -> tuple[int, int | None]:
        """Return how many samples come before the share, and before its end; the last share has none."""
        last = self.rank + 1 == self.ranks
        return samples * self.rank // self.ranks, None if last else samples * (
            self.rank + 1
        ) // self.ranks

    def identity(self, whole: dict[str, Any]) -> dict[str, Any]:
        """Return the identity of the share's embeddings, given the folder's."""
        return whole | {"share": [self.rank, self.ranks]} if self.ranks > 1 else whole


WHOLE = Share()


@dataclass
class ClipReader:
    """Iterates over the clips of one folder.

    Attributes:
        skip: samples at the beginning that an interrupted run, or another process, deals with.
        stop: how many samples come before the end; None for all.
        left_out: filled while iterating: which sample was left out, counted from 1, and why.
        advance: called for every sample read.
    """

    index: ShardIndex
    task: ProbeTask
    limits: ClipLimits
    workers: int
    skip: int
    advance: Callable[[], None]
    stop: int | None = None
    left_out: list[tuple[int, str]] = field(default_factory=list)

    def skipped(self, upto: int | None = None) -> dict[str, int]:
        """Count what was left out, by reason, among the samples up to one; clips further ahead have been looked at too."""
        return dict(
            Counter(reason for seen, reason in self.left_out if upto is None or seen <= upto)
        )

    def __iter__(self) -> Iterator[Clip]:
        for found, waveform in decoded_ahead(
            self._found(),
            lambda item: load_waveform(item.audio, self.limits),
            lambda item: len(item.audio),
            self.workers,
        ):
            if isinstance(waveform, SampleRefused):
                self.left_out.append((found.seen, str(waveform.reason)))
                continue
            if self.task.crop_seconds is not None:
                waveform = waveform[: round(self.task.crop_seconds * SAMPLE_RATE_HZ)]
            yield Clip(found.key, found.label, waveform, found.seen, found.group)

    def _found(self) -> Iterator["_Found"]:
        for seen, item in enumerate(islice(iter_samples(self.index, self.limits), self.stop), 1):
            if seen <= self.skip:
                continue
            self.advance()
            if isinstance(item, Refusal):
                self.left_out.append((seen, str(item.reason)))
            elif (label := self._label(item, seen)) is not None:
                key = f"{item.shard.rpartition('/')[2]}:{item.key}"
                yield _Found(key, label, item.audio, seen, group_of(item, self.task))

    def _label(self, sample: Sample, seen: int) -> Any:
        if any(
            _single(sample.annotation, name) not in wanted
            for name, wanted in self.task.select.items()
        ):
            self.left_out.append((seen, NOT_SELECTED))
            return None
        label = label_of(sample.annotation, self.task)
        if label is None:
            self.left_out.append((seen, str(Reason.NO_LABEL)))
        return label


@dataclass(frozen=True)
class _Found:
    key: str
    label: Any
    audio: bytes
    seen: int
    group: str


def group_of(sample: Sample, task: ProbeTask) -> str:
    """Return the group that a clip of a task belongs to; empty where it belongs to none."""
    if not task.group:
        return ""
    value = sample.key if task.group == "key" else _single(sample.annotation, task.group) or ""
    if not task.group_pattern:
        return value
    found = re.search(task.group_pattern, value)
    return (found[1] if found.re.groups else found[0]) if found else ""


def label_of(annotation: Annotation, task: ProbeTask) -> Any:
    """Return a clip's label in the form of its task's answer, or None where it has none.

    Raises:
        UserError: a label of another form.
    """
    if task.answer == "captions":
        fields = {**annotation.extra, "text": annotation.text}
        return (
            tuple(
                str(fields[name])
                for name in sorted(fields)
                if fnmatchcase(name, task.label) and fields[name]
            )
            or None
        )
    if task.answer in ("class", "text"):
        return _single(annotation, task.label)
    value = _field(annotation, task.label)
    if value is None:
        return None
    if task.answer == "events":
        return _events(value, task)
    values = value if isinstance(value, list) else [value]
    return tuple(name for item in values for name in _names(item, task.separator))


def _events(value: Any, task: ProbeTask) -> tuple[tuple[float, float, str], ...]:
    start, end, name = task.event
    try:
        return tuple(
            (float(event[start]), float(event[end]), one)
            for event in value
            for one in _names(event[name], task.separator)
        )
    except (TypeError, KeyError, ValueError):
        raise UserError(
            f"Probe task {task.name!r}: {task.label!r} must be a list of events with {start}, {end} and {name}, not {value!r:.80}."
        ) from None


def _names(value: Any, separator: str) -> list[str]:
    parts = str(value).split(separator) if separator else [str(value)]
    return [part.strip() for part in parts if part.strip()]


def _single(annotation: Annotation, name: str) -> str | None:
    value = _field(annotation, name)
    if isinstance(value, list):
        if len(value) > 1:
            raise UserError(
                f"A clip has {len(value)} values in {name!r} ({', '.join(map(str, value))}); this metric needs one class."
            )
        value = value[0] if value else None
    return None if value in (None, "") else str(value)


def _field(annotation: Annotation, name: str) -> Any:
    return (
        getattr(annotation, name)
        if name in annotation.__dataclass_fields__
        else annotation.extra.get(name)
    )
