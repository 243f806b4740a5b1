"""Clips → one vector each, once: stream a task's shards, encode them in packed batches, pool over valid frames, keep the result.

In: an encoder, a `ProbeTask`, a cache folder. Out: `Embeddings` per split, `[B, D]`. Next: `probes.linear`. Files are cached per
shard folder under the hash of encoder, data and settings, so tasks and folds that share folders share the work, and nothing
stale is ever read.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fsspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.shards import ShardIndex, open_index
from whisper_aut.data.sample import Refusal, Sample, iter_samples
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, load_waveform
from whisper_aut.errors import Reason, SampleRefused, UserError
from whisper_aut.probes.cache import Embeddings, digest, read_embeddings, write_embeddings
from whisper_aut.probes.tasks import SPLITS, ProbeTask

EMBED_VERSION = 1  # raise it when anything here changes what an embedding is
NOT_SELECTED = "not selected"
LEFT_OUT = (NOT_SELECTED, str(Reason.NO_LABEL))  # clips that are no part of the task, as against clips that are broken
LOOKAHEAD_CLIPS = 256  # at most 30 s each: half a gigabyte of decoded audio
WINDOW_BATCHES = 8  # clips are sorted by length within this many batches
WINDOW_SECONDS = 30.0  # Whisper's own, which `padding: 30s` costs every clip

log = logging.getLogger(__name__)


class FrameEncoder(Protocol):
    """What a probe asks of an encoder; `model.pretrained.AudioEncoder` and `probes.baseline.LogMelBaseline` are two.

    An encoder may name its own `pooling`, which then stands for it whatever the run's is.
    """

    def encode(self, waveforms: Sequence[Tensor], sample_rate_hz: int) -> list[Tensor]:
        """Return one `[T, D]` per waveform `[S]`, valid frames only."""
        ...

    def fingerprint(self) -> str: ...


def _mean(frames: Tensor) -> Tensor:
    return frames.mean(0)


def _mean_std(frames: Tensor) -> Tensor:
    return torch.cat([frames.mean(0), frames.std(0, correction=0)])


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "mean_std": _mean_std}


@dataclass(frozen=True)
class EmbedSettings:
    """How clips are embedded. Only `pooling` and `limits` touch the result; the rest is speed and manners.

    Attributes:
        batch_seconds: audio encoded at once; the memory that encoding takes grows with it.
        workers: decoding threads.
        max_refused_share: of a folder's clips, above which broken audio is fatal.
        quiet: no progress bar.
    """

    pooling: str = "mean"
    limits: ClipLimits = field(default_factory=ClipLimits)
    batch_seconds: float = 160.0
    workers: int = min(8, os.cpu_count() or 1)
    max_refused_share: float = 0.02
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(f"Pooling must be one of {', '.join(POOLINGS)}, not {self.pooling!r}.")


def embed_task(
    encoder: FrameEncoder,
    task: ProbeTask,
    root: str | Path | None,
    cache: str | Path,
    settings: EmbedSettings | None = None,
    fingerprint: str | None = None,
) -> dict[str, Embeddings]:
    """Return `{"train", "valid", "test"}` → embeddings, from the cache where it holds them.

    `fingerprint` is the encoder's, where the caller has it: hashing gigabytes of weights takes seconds.

    Raises:
        UserError: shards are missing, too many clips are broken, or frames are not finite.
    """
    settings, fingerprint = settings or EmbedSettings(), fingerprint or encoder.fingerprint()
    indexes = {split: [open_index(folder) for folder in task.folders(split, root)] for split in SPLITS}
    _check_disjoint(indexes, task)
    return {
        split: Embeddings.join([_embed_folder(encoder, fingerprint, index, task, cache, settings) for index in indexes[split]])
        for split in SPLITS
    }


def folder_identity(
    fingerprint: str, pooling: str, index: ShardIndex, task: ProbeTask, settings: EmbedSettings
) -> dict[str, Any]:
    """Return all that the embeddings of a folder depend on."""
    return {
        "version": EMBED_VERSION,
        "encoder": fingerprint,
        "data": _data_fingerprint(index),
        "pooling": pooling,
        "label": task.label,
        "select": {name: sorted(values) for name, values in task.select.items()},
        "limits": asdict(settings.limits),
    }


def pooling_of(encoder: FrameEncoder, settings: EmbedSettings) -> str:
    """Return the encoder's own pooling, or the run's."""
    return getattr(encoder, "pooling", settings.pooling)


def _embed_folder(
    encoder: FrameEncoder, fingerprint: str, index: ShardIndex, task: ProbeTask, cache: str | Path, settings: EmbedSettings
) -> Embeddings:
    identity = folder_identity(fingerprint, pooling_of(encoder, settings), index, task, settings)
    found = read_embeddings(cache, identity)
    if found is None:
        found = _embed(encoder, index, task, settings)
        write_embeddings(cache, identity, found)
    return found


def _check_disjoint(indexes: dict[str, list[ShardIndex]], task: ProbeTask) -> None:
    """Refuse splits that share a tar, byte for byte, whatever its folder is called."""
    where: dict[str, str] = {}
    for split, listed in indexes.items():
        for index in listed:
            for number, shard in enumerate(index.shards):
                if shard.sha256 and where.setdefault(shard.sha256, split) != split:
                    raise UserError(
                        f"Probe task {task.name!r}: {index.url(number)} of {split!r} is in {where[shard.sha256]!r} too. A score on "
                        "clips that were trained on means nothing: check the task's folders."
                    )


def _data_fingerprint(index: ShardIndex) -> str:
    # Tars without an index carry no checksum: their size and time of change stand for it.
    states = []
    for number, shard in enumerate(index.shards):
        if not shard.sha256:
            filesystem, path = fsspec.url_to_fs(index.url(number))
            states.append(str(filesystem.ukey(path)))
    return digest([index.fingerprint(), states]) if states else index.fingerprint()


@dataclass(frozen=True)
class _Clip:
    key: str
    label: str
    waveform: Tensor  # [S]


def _embed(encoder: FrameEncoder, index: ShardIndex, task: ProbeTask, settings: EmbedSettings) -> Embeddings:
    pool, skipped = POOLINGS[pooling_of(encoder, settings)], Counter[str]()
    padded = getattr(encoder, "padding", "none") == "30s"
    rows: list[Tensor] = []
    clips: list[_Clip] = []
    with _progress(settings.quiet) as bar:
        line = bar.add_task(f"{task.name} · {index.root.rstrip('/').rpartition('/')[2]}", total=index.samples)
        accepted = _accepted(index, task, settings, skipped, lambda: bar.advance(line))
        for window in _windows(accepted, settings.batch_seconds, padded):
            pooled: dict[int, Tensor] = {}
            for batch in _batches(window, settings.batch_seconds, padded):
                frames = encoder.encode([window[i].waveform for i in batch], SAMPLE_RATE_HZ)
                pooled.update(zip(batch, (pool(clip.float()).cpu() for clip in frames), strict=True))
            rows += [pooled[i] for i in range(len(window))]
            clips += [_Clip(clip.key, clip.label, torch.empty(0)) for clip in window]
    _check_refused(index, skipped, settings)
    features = torch.stack(rows) if rows else torch.empty(0, 0)
    _check_finite(features, clips, index)
    return Embeddings(features, tuple(clip.label for clip in clips), tuple(clip.key for clip in clips), dict(skipped))


def _accepted(
    index: ShardIndex, task: ProbeTask, settings: EmbedSettings, skipped: Counter[str], advance: Callable[[], None]
) -> Iterator[_Clip]:
    """Yield the task's clips in shard order, decoded ahead of the encoder by a pool of threads."""

    def taken() -> Iterator[tuple[str, str, bytes]]:
        for item in iter_samples(index, settings.limits):
            advance()
            if isinstance(item, Refusal):
                skipped[str(item.reason)] += 1
            elif (label := _label_of(item, task, skipped)) is not None:
                yield f"{item.shard.rpartition('/')[2]}:{item.key}", label, item.audio

    pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="decode")
    ahead: deque[tuple[str, str, Future[Tensor]]] = deque()
    source = taken()
    try:
        while True:
            while len(ahead) < LOOKAHEAD_CLIPS and (item := next(source, None)) is not None:
                ahead.append((item[0], item[1], pool.submit(load_waveform, item[2], settings.limits)))
            if not ahead:
                return
            key, label, future = ahead.popleft()
            try:
                yield _Clip(key, label, future.result())
            except SampleRefused as refused:
                skipped[str(refused.reason)] += 1
    finally:
        pool.shutdown(cancel_futures=True)


def _label_of(sample: Sample, task: ProbeTask, skipped: Counter[str]) -> str | None:
    if any(_value(sample.annotation, name) not in wanted for name, wanted in task.select.items()):
        skipped[NOT_SELECTED] += 1
        return None
    label = _value(sample.annotation, task.label)
    if label is None:
        skipped[str(Reason.NO_LABEL)] += 1
    return label


def _value(annotation: Annotation, name: str) -> str | None:
    value = annotation.extra.get(name) if name not in annotation.__dataclass_fields__ else getattr(annotation, name)
    if isinstance(value, list):
        if len(value) > 1:
            raise UserError(
                f"A clip has {len(value)} values in {name!r} ({', '.join(map(str, value))}); this metric needs one class."
            )
        value = value[0] if value else None
    return None if value in (None, "") else str(value)


def _cost_seconds(clip: _Clip, padded: bool) -> float:
    return WINDOW_SECONDS if padded else len(clip.waveform) / SAMPLE_RATE_HZ


def _windows(clips: Iterator[_Clip], batch_seconds: float, padded: bool) -> Iterator[list[_Clip]]:
    window, seconds = [], 0.0
    for clip in clips:
        window.append(clip)
        seconds += _cost_seconds(clip, padded)
        if seconds >= WINDOW_BATCHES * batch_seconds:
            yield window
            window, seconds = [], 0.0
    if window:
        yield window


def _batches(window: list[_Clip], batch_seconds: float, padded: bool) -> Iterator[list[int]]:
    """Cut a window into lists of positions of at most `batch_seconds`, clips of like length together."""
    batch, seconds = [], 0.0
    for i in sorted(range(len(window)), key=lambda i: len(window[i].waveform)):
        cost = _cost_seconds(window[i], padded)
        if batch and seconds + cost > batch_seconds:
            yield batch
            batch, seconds = [], 0.0
        batch.append(i)
        seconds += cost
    if batch:
        yield batch


def _check_refused(index: ShardIndex, skipped: Counter[str], settings: EmbedSettings) -> None:
    broken = {reason: count for reason, count in skipped.items() if reason not in LEFT_OUT}
    if not broken:
        return
    listed = ", ".join(f"{count} × {reason}" for reason, count in sorted(broken.items()))
    if sum(broken.values()) > settings.max_refused_share * max(index.samples, 1) or str(Reason.BAD_TAR) in broken:
        raise UserError(
            f"{index.root}: {sum(broken.values())} of {index.samples} samples cannot be used ({listed}); at most "
            f"{settings.max_refused_share:.0%} may be left out of a probe. See them: whisper-aut data inspect {index.root}"
        )
    log.warning("%s: %s left out of the probe.", index.root, listed)


def _check_finite(features: Tensor, clips: list[_Clip], index: ShardIndex) -> None:
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist() if len(features) else []
    if bad:
        raise UserError(
            f"The encoder gave frames that are not finite for {len(bad)} of {len(clips)} clips of {index.root}, first "
            f"{clips[bad[0]].key!r}. Its weights may be damaged, or half precision overflows: try float32 or bfloat16."
        )


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("embed {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)
