"""Embed the clips of a task: stream its shards, encode them in batches, pool, and cache the result.

The `Embeddings` of a shard folder are cached in a safetensors file named by the hash of encoder,
data and settings, so tasks and folds that share folders share the work. The file repeats what it
was made from and has a checksum; on a mismatch or damage it is computed again. It is
memory-mapped when read and written piece by piece, so that the frames of a corpus are never all in
memory (103 GB for 100 h at large-v3's width). An interrupted run resumes after the last part it
wrote.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count, islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, load_waveform
from whisper_aut.audio.logmel import WINDOW_SECONDS
from whisper_aut.audio.windows import BATCH_SECONDS, get_pooling
from whisper_aut.data.reader import SkippedSample, prefetch_decoded
from whisper_aut.data.shards import ShardIndex, iter_samples
from whisper_aut.errors import Problems, SkipReason, SkipSample, UserError
from whisper_aut.inference.encoder import DECODE_THREADS
from whisper_aut.probes.encoders import HOP_SECONDS, FrameEncoder, hop_seconds_of, layer_indices
from whisper_aut.probes.tasks import ProbeTask, open_parts
from whisper_aut.utils import atomic_path, file_lock, parse_json, progress_bar

EMBED_VERSION = 5  # increase whenever a change here affects embeddings
LABELS_VERSION = 2  # the same, for labels that are not a single text
GROUP_BATCHES = 8  # clips are sorted by length within this many batches
MAX_BROKEN = 0.02  # fraction of broken samples in a folder above which they are an error
PART_SECONDS = 60.0  # an interrupted run loses about this much work at most
PART_BYTES = 1 << 28  # write a part once this many bytes of embeddings are in memory
NOT_SELECTED = "not selected"
LEFT_OUT = (NOT_SELECTED, str(SkipReason.NO_LABEL))  # not part of the task, rather than broken

log = logging.getLogger(__name__)


FeatureKind = Literal["pooled", "layers", "segments", "frames"]


@dataclass(frozen=True)
class FeatureSpec:
    """What is kept of a clip. Every attribute is part of the embedding's identity.

    Attributes:
        kind: `pooled` (one vector), `layers` (one vector per layer), `segments` (one vector per
            segment), or `frames`.
        pooling: a key of `POOLINGS`.
        layers: layer indices, where 0 is the input of the first layer. Empty for the output.
        segment_seconds: length of a segment, for `segments`.
    """

    kind: FeatureKind = "pooled"
    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    segment_seconds: float = 0.0

    def reduce(self, frames: Tensor, hop_seconds: float) -> Tensor:
        """Reduce frames `[T, D]` or `[layers, T, D]` to `[D']`, `[layers, D']`, `[segments, D']`
        or `[T, D]`, depending on `kind`.
        """
        pool = get_pooling(self.pooling)
        if self.kind == "layers":
            return pool(frames)
        frames = frames.transpose(0, 1).flatten(1) if frames.ndim == 3 else frames
        if self.kind == "frames":
            return frames
        if self.kind == "segments":
            borders = segment_borders(len(frames), hop_seconds, self.segment_seconds)
            return torch.stack([pool(frames[start:end]) for start, end in borders])
        return pool(frames)


def segment_borders(
    frames: int, hop_seconds: float, segment_seconds: float
) -> list[tuple[int, int]]:
    """Return `(start, end)` frame indices of each segment of a clip; no segment is empty."""
    segments = max(1, ceil(frames * hop_seconds / segment_seconds - 1e-6))
    edges = [min(int(i * segment_seconds / hop_seconds + 1e-6), frames) for i in range(segments)]
    return [
        (min(start, frames - 1), max(end, min(start, frames - 1) + 1))
        for start, end in pairwise([*edges, frames])
    ]


@dataclass(frozen=True)
class EmbedSettings:
    """How clips are embedded.

    Attributes:
        pooling: a key of `POOLINGS`.
        layers: layer indices of the encoder, where 0 is the input of the first layer. Empty for
            its output.
        batch_seconds: seconds of audio encoded at once. Memory grows with it.
        quiet: show no progress bar.
    """

    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    batch_seconds: float = BATCH_SECONDS
    quiet: bool = False

    def __post_init__(self) -> None:
        get_pooling(self.pooling)


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
        samples: of a part of a folder, the number of samples read, including those that were
            skipped.
    """

    features: Tensor
    labels: tuple[Any, ...]
    keys: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    frames: tuple[Tensor, ...] = ()
    groups: tuple[str, ...] = ()
    samples: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def group_numbers(self) -> np.ndarray:
        """Return the group number of each clip, `[B]`. A clip without a group gets its own."""
        groups = self.groups or ("",) * len(self)
        names = [("group", group) if group else ("clip", i) for i, group in enumerate(groups)]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return np.array([numbers[name] for name in names], dtype=int)

    def select(self, layers: Sequence[int]) -> "Embeddings":
        """Return these layers side by side, `[B, len(layers) · D]`, or all as it is for none."""
        if not layers or not len(self):
            return self
        return replace(self, features=self.features[:, list(layers)].flatten(1))

    @classmethod
    def join(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Concatenate embeddings. Frames stay memory-mapped."""
        filled = [part.features for part in parts if len(part.features)]
        return cls(
            torch.cat(filled) if filled else torch.empty(0, 0),
            tuple(label for part in parts for label in part.labels),
            tuple(key for part in parts for key in part.keys),
            dict(sum((Counter(part.skipped) for part in parts), Counter())),
            tuple(length for part in parts for length in part.lengths),
            tuple(clip for part in parts for clip in part.frames),
            tuple(group for part in parts for group in part.groups),
            sum(part.samples for part in parts),
        )


def digest(identity: Any) -> str:
    """Return a hash of a JSON-serialisable object."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def cache_path(folder: str | Path, identity: dict[str, Any], part: int | None = None) -> Path:
    """Return the path of the embeddings with this identity, or of a part of them."""
    mark = "" if part is None else f".part-{part:05d}"
    return Path(folder) / f"{digest(identity)}{mark}.safetensors"


def read_embeddings(
    folder: str | Path, identity: dict[str, Any], part: int | None = None
) -> Embeddings | None:
    """Return the embeddings cached under an identity, or None if they are missing or damaged."""
    path = cache_path(folder, identity, part)
    if not path.exists():
        return None
    try:
        found, metadata = _open(path)
        if metadata["identity"] == identity:
            return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning("Cached embeddings %s are damaged; computing them again.", path.name)
    return None


def load_cached(path: Path) -> Embeddings:
    """Read a cache file by path, e.g. to inspect what a score was computed from.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: the file is missing or damaged.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[Embeddings, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = parse_json(file.metadata()["metadata"])
        stored = file.get_tensor("features")  # memory-mapped
    lengths, frames = tuple(metadata["lengths"]), ()
    if metadata["frames"]:
        stored, frames, lengths = torch.empty(0, 0), tuple(stored.split(lengths)), ()
    found = Embeddings(
        stored,
        _to_tuples(metadata["labels"]),
        tuple(metadata["keys"]),
        metadata["skipped"],
        lengths,
        frames,
        tuple(metadata["groups"]),
        metadata["samples"],
    )
    if metadata["sha256"] != _checksum(found):
        raise ValueError(f"{path} is damaged")
    return found, metadata


def write_embeddings(
    folder: str | Path, identity: dict[str, Any], embeddings: Embeddings, part: int | None = None
) -> None:
    """Write embeddings atomically.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = cache_path(folder, identity, part)
    metadata = {
        "identity": identity,
        "sha256": _checksum(embeddings),
        "labels": embeddings.labels,
        "keys": embeddings.keys,
        "skipped": embeddings.skipped,
        "lengths": _lengths(embeddings),
        "frames": bool(embeddings.frames),
        "groups": embeddings.groups,
        "samples": embeddings.samples,
    }
    # `safetensors.save_file` would need the concatenated tensor in memory.
    pieces = _pieces(embeddings)
    shape = [sum(len(piece) for piece in pieces), *pieces[0].shape[1:]]
    end = sum(piece.nbytes for piece in pieces)
    header = {
        "__metadata__": {"metadata": json.dumps(metadata, ensure_ascii=False)},
        "features": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]},
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_path(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in pieces:
            file.write(piece.numpy().data)


def _pieces(embeddings: Embeddings) -> list[Tensor]:
    return [piece.contiguous() for piece in embeddings.frames or (embeddings.features,)]


def _lengths(embeddings: Embeddings) -> Sequence[int]:
    return [len(clip) for clip in embeddings.frames] or embeddings.lengths


def _checksum(embeddings: Embeddings) -> str:
    checksum = hashlib.sha256()
    for piece in _pieces(embeddings):
        checksum.update(piece.numpy().data)
    part = embeddings
    listed = (part.labels, part.keys, part.skipped, _lengths(part), part.groups, part.samples)
    checksum.update(json.dumps(listed).encode())
    return checksum.hexdigest()


def _to_tuples(value: Any) -> Any:
    """Undo JSON's lists: `[[0.0, 1.0, "dog"]]` → `((0.0, 1.0, "dog"),)`."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def feature_spec(
    encoder: FrameEncoder, task: ProbeTask, settings: EmbedSettings, kind: FeatureKind
) -> FeatureSpec:
    """Return what to keep of a clip: with the encoder's own pooling, if it has one, and all layers
    for `layers`, unless the settings name some.

    Raises:
        UserError: the encoder does not have the layers, or does not return single layers.
    """
    layers = getattr(encoder, "selected_layers", settings.layers)
    if layers or kind == "layers":
        known = layer_indices(encoder)
        if not set(layers) <= set(known):
            raise UserError(
                f"The encoder has layers 0 (the input of the first layer) to {known[-1]}; "
                f"requested: {', '.join(map(str, layers))}."
            )
        layers = layers or tuple(known)
    seconds = task.segment_seconds if kind == "segments" else 0.0
    return FeatureSpec(kind, getattr(encoder, "pooling", settings.pooling), layers, seconds)


@dataclass(frozen=True)
class TaskEmbedder:
    """Embeds the clips of one task with one encoder, from the cache where possible.

    Args:
        encoder: the encoder to run.
        task: the task.
        root: replaces `{root}` in the task's folders.
        cache: folder for embeddings.
        settings: how clips are embedded.
        kind: what the probe needs of a clip, see `FeatureSpec.kind`.
        fingerprint: the encoder's fingerprint, if already computed: hashing gigabytes of weights
            takes seconds.
        rank, world_size: of the processes that divide the samples of every folder among
            themselves. Folders that are already cached are returned whole.
    """

    encoder: FrameEncoder
    task: ProbeTask
    root: str | Path | None
    cache: str | Path
    settings: EmbedSettings = field(default_factory=EmbedSettings)
    kind: FeatureKind = "pooled"
    fingerprint: str = ""
    rank: int = 0
    world_size: int = 1

    @cached_property
    def selected(self) -> tuple[int, ...]:
        """The encoder's `selected_layers`, whose vectors are taken from those of all layers."""
        selected = getattr(self.encoder, "selected_layers", ())
        return selected if self.kind == "pooled" else ()

    @cached_property
    def spec(self) -> FeatureSpec:
        """What is kept of a clip, see `feature_spec`. If layers are `selected`, this is one vector
        of every layer, so that another choice of layers needs no more embedding.
        """
        spec = feature_spec(self.encoder, self.task, self.settings, self.kind)
        if not self.selected:
            return spec
        return replace(spec, kind="layers", layers=tuple(layer_indices(self.encoder)))

    @cached_property
    def encoder_hash(self) -> str:
        """The fingerprint of the encoder."""
        return self.fingerprint or self.encoder.fingerprint()

    @cached_property
    def indexes(self) -> dict[str, list[ShardIndex]]:
        """The shard indexes of each part of the task.

        Raises:
            UserError: shards are missing, or a tar is in two parts.
        """
        problems = Problems()
        indexes = open_parts(self.task, self.root, problems)
        problems.raise_if_any(f"Probe task {self.task.name!r}")
        return indexes

    def embed(self) -> dict[str, Embeddings]:
        """Return the embeddings of each part of the task.

        Raises:
            UserError: shards are missing, too many clips are broken, or frames are not finite.
        """
        return {
            part: Embeddings.join(
                [self._embed_folder(index).select(self.selected) for index in listed]
            )
            for part, listed in self.indexes.items()
        }

    def identity(self, index: ShardIndex) -> dict[str, Any]:
        """Return everything that the embeddings of a folder depend on."""
        task = self.task
        event = task.event if task.answer == "events" else ()
        version = () if task.answer in ("class", "text") else (LABELS_VERSION,)
        return {
            "version": EMBED_VERSION,
            "encoder": self.encoder_hash,
            "data": _data_fingerprint(index),
            "features": {**asdict(self.spec), "layers": list(self.spec.layers)},
            "label": [task.answer, task.label, task.separator, *event, *version],
            "group": [task.group, task.group_pattern],
            "select": {name: sorted(values) for name, values in task.select.items()},
            "crop_seconds": task.crop_seconds,
            "limits": asdict(LONG_CLIPS),
        } | ({"hop": HOP_SECONDS} if self.spec.kind == "segments" else {})

    def identities(self) -> dict[str, list[dict[str, Any]]]:
        """Return the identities of the folders of each part of the task."""
        return {
            part: [self.identity(index) for index in listed]
            for part, listed in self.indexes.items()
        }

    def join_ranks(self) -> None:
        """Join what the ranks embedded of each folder, and cache it as the folder's embeddings.

        Raises:
            UserError: the part of a rank is missing, or too many clips of a folder are broken.
        """
        for index in (index for listed in self.indexes.values() for index in listed):
            identity = self.identity(index)
            if read_embeddings(self.cache, identity) is not None:
                continue
            identities = [self._rank_identity(identity, rank) for rank in range(self.world_size)]
            found = [read_embeddings(self.cache, own) for own in identities]
            parts = [part for part in found if part is not None]
            if len(parts) < len(found):
                raise UserError(
                    f"Rank {found.index(None)} left no embeddings of {index.root} in {self.cache}. "
                    "All ranks must see one folder: put --out on a disk that they share."
                )
            joined = Embeddings.join(parts)
            self._check_skipped(index, joined)
            write_embeddings(self.cache, identity, joined)
            for own in identities:
                cache_path(self.cache, own).unlink(missing_ok=True)

    def _rank_identity(self, identity: dict[str, Any], rank: int) -> dict[str, Any]:
        return identity | {"rank": [rank, self.world_size]}

    def _embed_folder(self, index: ShardIndex) -> Embeddings:
        identity = self.identity(index)
        found = read_embeddings(self.cache, identity)
        if found is None and self.world_size > 1:
            identity = self._rank_identity(identity, self.rank)
            found = read_embeddings(self.cache, identity)
        if found is not None:
            return found
        with file_lock(cache_path(self.cache, identity)):
            if (found := read_embeddings(self.cache, identity)) is not None:
                return found  # by another process
            parts = self._embed_parts(index, identity)
            joined = Embeddings.join(parts)
            self._check_skipped(index, joined)
            write_embeddings(self.cache, identity, joined)
            for number in range(len(parts)):
                cache_path(self.cache, identity, number).unlink(missing_ok=True)
            # Read back, so that frames are memory-mapped instead of held in memory.
            return read_embeddings(self.cache, identity) or joined

    def _embed_parts(self, index: ShardIndex, identity: dict[str, Any]) -> list[Embeddings]:
        """Return the embeddings of a folder in parts. All but the last part are written, and an
        interrupted run resumes after them.
        """
        parts = self._written_parts(identity)
        written = len(parts)
        # What comes after a damaged part is embedded again, so its parts must not be read later.
        resumed = {cache_path(self.cache, identity, number) for number in range(written)}
        for path in set(Path(self.cache).glob(f"{digest(identity)}.part-*")) - resumed:
            path.unlink(missing_ok=True)
        start, end = sample_range(index.samples, self.rank, self.world_size)
        position = start + sum(part.samples for part in parts)
        hop = hop_seconds_of(self.encoder) if self.spec.kind == "segments" else 0.0
        rows, clips, skipped = [], [], list[tuple[int, str]]()
        started = time.monotonic()
        with progress_bar(not self.settings.quiet) as bar:
            folder = index.root.rstrip("/").rpartition("/")[2]
            line = bar.add_task(
                f"embed {self.task.name} · {folder}",
                total=(end or index.samples) - start,
                completed=position - start,
            )
            reader = self._read_clips(index, position, end, skipped, lambda: bar.advance(line))
            for group, waveforms in self._group_clips(reader):
                frames = self.encoder.encode(
                    waveforms,
                    SAMPLE_RATE_HZ,
                    self.spec.layers,
                    batch_seconds=self.settings.batch_seconds,
                )
                rows += [self.spec.reduce(clip.float(), hop).cpu() for clip in frames]
                clips += group
                held = sum(row.nbytes for row in rows)
                if held > PART_BYTES or time.monotonic() - started > PART_SECONDS:
                    stop = clips[-1].number + 1  # decoding reads ahead: `skipped` may go further
                    part = self._collect(rows, clips, index)
                    counts = Counter(reason for number, reason in skipped if number < stop)
                    part = replace(part, skipped=dict(counts), samples=stop - position)
                    write_embeddings(self.cache, identity, part, written)
                    skipped[:] = [(number, reason) for number, reason in skipped if number >= stop]
                    position, written = stop, written + 1
                    rows, clips, started = [], [], time.monotonic()
        last = self._collect(rows, clips, index)
        parts = self._written_parts(identity)
        if start + sum(part.samples for part in parts) != position:
            raise UserError(f"Embeddings in {self.cache} cannot be read back. Start again.")
        return [*parts, replace(last, skipped=dict(Counter(reason for _, reason in skipped)))]

    def _written_parts(self, identity: dict[str, Any]) -> list[Embeddings]:
        found = (read_embeddings(self.cache, identity, number) for number in count())
        return list(iter(lambda: next(found), None))

    def _read_clips(
        self,
        index: ShardIndex,
        start: int,
        end: int | None,
        skipped: list[tuple[int, str]],
        advance: Callable[[], None],
    ) -> Iterator[tuple["_Clip", Tensor]]:
        """Yield clips and waveforms of samples `start` to `end`; add the others to `skipped`."""

        def clips() -> Iterator[_Clip]:
            samples = iter_samples(index, LONG_CLIPS)
            for number, sample in enumerate(islice(samples, start, end), start):
                advance()
                if isinstance(sample, SkippedSample):
                    skipped.append((number, str(sample.reason)))
                elif not self.task.selects(sample.annotation):
                    skipped.append((number, NOT_SELECTED))
                elif (label := self.task.label_of(sample.annotation)) is None:
                    skipped.append((number, str(SkipReason.NO_LABEL)))
                else:
                    key = _to_utf8(f"{sample.shard.rpartition('/')[2]}:{sample.key}")
                    group = _to_utf8(self.task.group_of(sample))
                    yield _Clip(key, label, group, number, sample.audio)

        for clip, waveform in prefetch_decoded(
            clips(),
            lambda clip: load_waveform(clip.audio, LONG_CLIPS),
            lambda clip: len(clip.audio),
            DECODE_THREADS,
        ):
            if isinstance(waveform, SkipSample):
                skipped.append((clip.number, str(waveform.reason)))
                continue
            if self.task.crop_seconds is not None:
                waveform = waveform[: round(self.task.crop_seconds * SAMPLE_RATE_HZ)]
            yield replace(clip, audio=b""), waveform

    def _group_clips(
        self, reader: Iterator[tuple["_Clip", Tensor]]
    ) -> Iterator[tuple[list["_Clip"], list[Tensor]]]:
        """Yield groups of about `GROUP_BATCHES` batches."""
        padded = getattr(self.encoder, "padding", "none") == "30s"
        clips, waveforms, seconds = [], [], 0.0
        for clip, waveform in reader:
            if seconds >= GROUP_BATCHES * self.settings.batch_seconds:
                yield clips, waveforms
                clips, waveforms, seconds = [], [], 0.0
            clips.append(clip)
            waveforms.append(waveform)
            seconds += WINDOW_SECONDS if padded else len(waveform) / SAMPLE_RATE_HZ
        if clips:
            yield clips, waveforms

    def _collect(self, rows: list[Tensor], clips: list["_Clip"], index: ShardIndex) -> Embeddings:
        bad = [clip.key for clip, row in zip(clips, rows, strict=True) if not row.isfinite().all()]
        if bad:
            raise UserError(
                f"The encoder gave frames that are not finite for {len(bad)} of {len(clips)} clips "
                f"of {index.root}, first {bad[0]!r}. Its weights may be damaged, or half precision "
                "overflows: try float32 or bfloat16."
            )
        features, lengths, frames = torch.empty(0, 0), (), ()
        if self.spec.kind == "frames":
            frames = tuple(rows)
        elif self.spec.kind == "segments" and rows:
            features, lengths = torch.cat(rows), tuple(len(row) for row in rows)
        elif rows:
            features = torch.stack(rows)
        labels, keys, groups = (
            tuple(getattr(clip, name) for clip in clips) for name in ("label", "key", "group")
        )
        return Embeddings(features, labels, keys, {}, lengths, frames, groups)

    def _check_skipped(self, index: ShardIndex, found: Embeddings) -> None:
        """Warn about broken samples, and raise if there are too many or a tar is damaged."""
        broken = {reason: n for reason, n in found.skipped.items() if reason not in LEFT_OUT}
        if not broken:
            return
        listed = ", ".join(f"{n} × {reason}" for reason, n in sorted(broken.items()))
        total = sum(broken.values())
        if total > MAX_BROKEN * max(index.samples, 1) or SkipReason.BAD_TAR in broken:
            raise UserError(
                f"{index.root}: {total} of {index.samples} samples cannot be used "
                f"({listed}); at most {MAX_BROKEN:.0%} may be left out of a probe. See them: "
                f"whisper-aut data inspect {index.root}"
            )
        log.warning("%s: %s left out of the probe.", index.root, listed)


@dataclass(frozen=True)
class _Clip:
    """A clip of a task; `number` is the index of its sample in the folder."""

    key: str
    label: Any
    group: str
    number: int
    audio: bytes


def _to_utf8(name: str) -> str:
    """Escape the bytes of a name in a tar that are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def sample_range(samples: int, rank: int, world_size: int) -> tuple[int, int | None]:
    """Return the samples of a folder that a rank embeds: the first, and the end (exclusive).

    The last rank has no end, because a folder without an index may have more samples.
    """
    end = samples * (rank + 1) // world_size if rank + 1 < world_size else None
    return samples * rank // world_size, end


def _data_fingerprint(index: ShardIndex) -> str:
    # Tars without an index have no checksum: use their size and modification time instead.
    states = []
    for number, shard in enumerate(index.shards):
        if not shard.sha256:
            filesystem, path = fsspec.url_to_fs(index.url(number))
            states.append(str(filesystem.ukey(path)))
    return digest([index.fingerprint(), states]) if states else index.fingerprint()
