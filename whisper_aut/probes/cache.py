"""Cache of embeddings, written once and read back only if complete and made under the requested
identity.

The `Embeddings` of a shard folder are stored as a safetensors file named by the hash of their
identity. The file repeats the identity and has a checksum; on a mismatch or damage it counts as
missing. Files are memory-mapped when read and written piece by piece, so that the frames of a
corpus are never all in memory (103 GB for 100 h at large-v3's width).
"""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, ClipLimits, load_waveform
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.reader import Sample, SkippedSample, prefetch_decoded
from whisper_aut.data.shards import ShardIndex, iter_samples
from whisper_aut.errors import SkipReason, SkipSample, UserError
from whisper_aut.probes.tasks import ProbeTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """The embedded clips of a folder or split.

    Attributes:
        features: float32 `[B, D]` or `[B, layers, D]`. With `lengths`, `[I, D]` for the I
            segments of all clips. Empty if `frames` are kept.
        labels: per clip, a class, a tuple of classes or captions, a tuple of events, or a
            transcript.
        keys: per clip, the names of tar and sample.
        skipped: number of skipped samples, by reason.
        lengths: per clip, the number of segments.
        frames: per clip, its frames `[T, D]`, memory-mapped from the cache file.
        groups: per clip, its group. Empty for a clip without one.
    """

    features: Tensor
    labels: tuple[Any, ...]
    keys: tuple[str, ...]
    skipped: dict[str, int]
    lengths: tuple[int, ...] = ()
    frames: tuple[Tensor, ...] = ()
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def group_numbers(self) -> np.ndarray:
        """Return the group number of each clip, `[B]`, see the function `group_numbers`."""
        return group_numbers(self.groups or ("",) * len(self))

    @classmethod
    def join(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Concatenate folders into one split. Frames stay memory-mapped."""
        filled = [part.features for part in parts if len(part.features)]
        skipped = sum((Counter(part.skipped) for part in parts), Counter())
        return cls(
            torch.cat(filled) if filled else torch.empty(0, 0),
            tuple(label for part in parts for label in part.labels),
            tuple(key for part in parts for key in part.keys),
            dict(skipped),
            tuple(length for part in parts for length in part.lengths),
            tuple(clip for part in parts for clip in part.frames),
            tuple(group for part in parts for group in part.groups),
        )


def group_numbers(groups: Sequence[str]) -> np.ndarray:
    """Return the group number of each clip, `[B]`. A clip without a group (empty text) gets a
    number of its own.
    """
    names = [("group", group) if group else ("clip", str(i)) for i, group in enumerate(groups)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=int)


def digest(identity: Any) -> str:
    """Return a hash of a JSON-serialisable object."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def cache_path(folder: str | Path, identity: dict[str, Any]) -> Path:
    """Return the path of the embeddings with this identity."""
    return Path(folder) / f"{digest(identity)}.safetensors"


def read_embeddings(folder: str | Path, identity: dict[str, Any]) -> Embeddings | None:
    """Return the embeddings stored under an identity, or None if they are missing or damaged."""
    stored = _read(cache_path(folder, identity), identity)
    return stored[0] if stored else None


def write_embeddings(folder: str | Path, identity: dict[str, Any], embeddings: Embeddings) -> None:
    """Write embeddings under a temporary name, then rename.

    Raises:
        UserError: if the folder cannot be written to.
    """
    _write(cache_path(folder, identity), identity, embeddings, 0)


def load_cached(path: Path) -> Embeddings:
    """Read a cache file by path, e.g. to inspect what a score was computed from.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: if the file is missing or damaged.
    """
    return _open(path)[0]


class PartialEmbeddings:
    """Parts written by an unfinished run, one file each, from which the run resumes."""

    def __init__(self, folder: str | Path, identity: dict[str, Any]):
        self.path, self.identity, self.written = cache_path(folder, identity), identity, 0

    def read(self) -> tuple[Embeddings, int]:
        """Return the embeddings of all valid parts and the number of samples they cover. Reading
        stops at a damaged part.
        """
        parts: list[Embeddings] = []
        seen, skipped = 0, {}
        while (stored := _read(self._part(len(parts)), self.identity)) is not None:
            part, seen = stored
            skipped = part.skipped  # of all samples so far
            parts.append(replace(part, skipped={}))
        self.written = len(parts)
        return replace(Embeddings.join(parts), skipped=skipped), seen

    def write(self, part: Embeddings, seen: int, skipped: Mapping[str, int]) -> None:
        """Write the next part. `seen` and `skipped` count all samples up to its end."""
        _write(self._part(self.written), self.identity, replace(part, skipped=dict(skipped)), seen)
        self.written += 1

    def remove(self) -> None:
        """Delete all parts."""
        for number in range(self.written):
            self._part(number).unlink(missing_ok=True)

    def _part(self, number: int) -> Path:
        return self.path.with_suffix(f".part-{number:05d}.safetensors")


def _read(path: Path, identity: dict[str, Any]) -> tuple[Embeddings, int] | None:
    if not path.exists():
        return None
    try:
        found, facts = _open(path)
        if facts["identity"] == identity:
            return found, facts["seen"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning("Cached embeddings %s are damaged; computing them again.", path.name)
    return None


def _open(path: Path) -> tuple[Embeddings, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        stored = file.get_tensor("features")  # memory-mapped
    lengths = tuple(facts["lengths"])
    features, frames = (
        (torch.empty(0, 0), stored.split(lengths)) if facts["frames"] else (stored, ())
    )
    found = Embeddings(
        features,
        _frozen(facts["labels"]),
        _frozen(facts["keys"]),
        facts["skipped"],
        () if frames else lengths,
        tuple(frames),
        tuple(facts["groups"]),
    )
    if facts["sha256"] != _checksum(found):
        raise ValueError(f"{path} is damaged")
    return found, facts


def _write(path: Path, identity: dict[str, Any], embeddings: Embeddings, seen: int) -> None:
    facts = {
        "identity": identity,
        "sha256": _checksum(embeddings),
        "labels": embeddings.labels,
        "keys": embeddings.keys,
        "skipped": embeddings.skipped,
        "lengths": [len(clip) for clip in embeddings.frames] or embeddings.lengths,
        "frames": bool(embeddings.frames),
        "groups": embeddings.groups,
        "seen": seen,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(partial, _pieces(embeddings), {"facts": json.dumps(facts, ensure_ascii=False)})
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"Cannot write embeddings to {path.parent}: {error}. Name another cache folder."
        ) from None


def _save(path: Path, pieces: Sequence[Tensor], metadata: dict[str, str]) -> None:
    """Write float32 pieces `[n, …]` as the tensor `features` of a safetensors file.

    `save_file` would need the concatenated tensor in memory.
    """
    shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
    end = sum(piece.nbytes for piece in pieces)
    features = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"__metadata__": metadata, "features": features}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in pieces:
            file.write(piece.numpy().data)


def _pieces(embeddings: Embeddings) -> list[Tensor]:
    return [piece.contiguous() for piece in embeddings.frames or (embeddings.features,)]


def _checksum(embeddings: Embeddings) -> str:
    checksum = hashlib.sha256()
    for piece in _pieces(embeddings):
        checksum.update(piece.numpy().data)
    lengths = [len(clip) for clip in embeddings.frames] or embeddings.lengths
    own = (embeddings.labels, embeddings.keys, embeddings.skipped, lengths, embeddings.groups)
    names = json.dumps(own)
    checksum.update(names.encode())
    return checksum.hexdigest()


def _frozen(value: Any) -> Any:
    """Convert lists to tuples, which JSON does not have: `[[0.0, 1.0, "dog"]]` → `((0.0, 1.0,
    "dog"),)`.
    """
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


NOT_SELECTED = "not selected"
LEFT_OUT = (NOT_SELECTED, str(SkipReason.NO_LABEL))  # not part of the task, rather than broken


@dataclass(frozen=True)
class Clip:
    """One clip of a task.

    Attributes:
        key: names of tar and sample.
        label: its label.
        waveform: `[S]` at 16 kHz.
        seen: number of samples of the folder read so far, including this one.
        group: its group; empty for none.
    """

    key: str
    label: Any
    waveform: Tensor
    seen: int
    group: str = ""


@dataclass(frozen=True)
class Share:
    """The contiguous range of a folder's samples that one of several processes embeds."""

    rank: int = 0
    ranks: int = 1

    def bounds(self, samples: int) -> tuple[int, int | None]:
        """Return the indices of the first sample and of the end (exclusive). The last share has
        no end.
        """
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
        index: the shards.
        task: the task.
        limits: which clips are decoded.
        workers: number of decoding threads.
        skip: number of samples at the beginning to leave to an earlier run or another process.
        advance: called for every sample read.
        stop: index of the end (exclusive); None for all samples.
        left_out: filled while iterating: number of each skipped sample, counted from 1, and the
            reason.
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
        """Count the skipped samples by reason, up to sample number `upto`.

        Decoding reads ahead, so `left_out` may hold later samples too.
        """
        return dict(
            Counter(reason for seen, reason in self.left_out if upto is None or seen <= upto)
        )

    def __iter__(self) -> Iterator[Clip]:
        for found, waveform in prefetch_decoded(
            self._found(),
            lambda item: load_waveform(item.audio, self.limits),
            lambda item: len(item.audio),
            self.workers,
        ):
            if isinstance(waveform, SkipSample):
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
            if isinstance(item, SkippedSample):
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
            self.left_out.append((seen, str(SkipReason.NO_LABEL)))
        return label


@dataclass(frozen=True)
class _Found:
    key: str
    label: Any
    audio: bytes
    seen: int
    group: str


def group_of(sample: Sample, task: ProbeTask) -> str:
    """Return the group of a clip; empty for none."""
    if not task.group:
        return ""
    value = sample.key if task.group == "key" else _single(sample.annotation, task.group) or ""
    if not task.group_pattern:
        return value
    found = re.search(task.group_pattern, value)
    return (found[1] if found.re.groups else found[0]) if found else ""


def label_of(annotation: Annotation, task: ProbeTask) -> Any:
    """Return a clip's label in the form that the task needs, or None if it has none.

    Raises:
        UserError: if the label has another form.
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
            f"Probe task {task.name!r}: {task.label!r} must be a list of events with {start}, "
            f"{end} and {name}, not {value!r:.80}."
        ) from None


def _names(value: Any, separator: str) -> list[str]:
    parts = str(value).split(separator) if separator else [str(value)]
    return [part.strip() for part in parts if part.strip()]


def _single(annotation: Annotation, name: str) -> str | None:
    value = _field(annotation, name)
    if isinstance(value, list):
        if len(value) > 1:
            raise UserError(
                f"A clip has {len(value)} values in {name!r} ({', '.join(map(str, value))}); this "
                "metric needs one class."
            )
        value = value[0] if value else None
    return None if value in (None, "") else str(value)


def _field(annotation: Annotation, name: str) -> Any:
    return (
        getattr(annotation, name)
        if name in annotation.__dataclass_fields__
        else annotation.extra.get(name)
    )
