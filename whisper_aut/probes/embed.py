"""Embed the clips of a task: stream its shards, encode them in batches, pool, and cache the
result.

Files are cached per shard folder under a hash of encoder, data and settings, so tasks and folds
that share folders share the work, and stale files are never read. An interrupted run resumes
after the last part it wrote.
"""

import inspect
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from whisper_aut.audio.decode import LONG_CLIPS, SAMPLE_RATE_HZ, ClipLimits, to_mono_16k
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.audio.windows import (
    BATCH_SECONDS,
    batches_by_seconds,
    cut_windows,
    get_pooling,
    join_windows,
)
from whisper_aut.data.shards import ShardIndex, open_index
from whisper_aut.errors import Problems, SkipReason, UserError
from whisper_aut.probes.cache import (
    LEFT_OUT,
    WHOLE,
    Clip,
    ClipReader,
    Embeddings,
    PartialEmbeddings,
    Share,
    cache_path,
    digest,
    read_embeddings,
    write_embeddings,
)
from whisper_aut.probes.kinds import KINDS, kind_for
from whisper_aut.probes.tasks import ProbeTask


@dataclass(frozen=True)
class View:
    """What is kept of a clip. Every attribute is part of the embedding's identity.

    Attributes:
        name: `pooled` (one vector), `layers` (one vector per layer), `segments`, or `frames`.
        pooling: a key of `POOLINGS`.
        layers: layer indices, where 0 is the input of the first layer. Empty for the encoder's
            output.
        segment_seconds: length of a segment, for `segments`.
    """

    name: str = "pooled"
    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    segment_seconds: float = 0.0

    def __post_init__(self) -> None:
        get_pooling(self.pooling)

    def __call__(self, frames: Tensor, frame_seconds: float) -> Tensor:
        """Reduce frames `[T, D]` or `[layers, T, D]` to `[D']`, `[layers, D']`, `[segments, D']`
        or `[T, D]`, depending on `name`.
        """
        pool = get_pooling(self.pooling)
        if self.name == "layers":
            return pool(frames)
        frames = frames.transpose(0, 1).flatten(1) if frames.ndim == 3 else frames
        if self.name == "frames":
            return frames
        if self.name == "segments":
            borders = segment_borders(len(frames), frame_seconds, self.segment_seconds)
            return torch.stack([pool(frames[start:end]) for start, end in borders])
        return pool(frames)


def segment_borders(
    frames: int, frame_seconds: float, segment_seconds: float
) -> list[tuple[int, int]]:
    """Return `(first, stop)` frame indices of each segment of a clip with `frames` frames.
    `stop` is exclusive and no segment is empty.
    """
    count = max(1, ceil(frames * frame_seconds / segment_seconds - 1e-6))
    edges = [min(int(i * segment_seconds / frame_seconds + 1e-6), frames) for i in range(count)] + [
        frames
    ]
    return [
        (min(start, frames - 1), max(end, min(start, frames - 1) + 1))
        for start, end in pairwise(edges)
    ]


EMBED_VERSION = 4  # increase whenever a change here affects embeddings
WINDOW_BATCHES = 8  # clips are sorted by length within this many batches
PART_SECONDS = 60.0  # an interrupted run loses about this much work at most
PART_BYTES = 1 << 28  # write a part once this many bytes of embeddings are in memory

log = logging.getLogger(__name__)


class FrameEncoder(Protocol):
    """Interface of an encoder to probe, such as `models.pretrained.AudioEncoder` or
    `LogMelBaseline`.

    Optional features:

    - An attribute `pooling` overrides the pooling of the run.
    - If `encode` has a parameter `layers`, it returns `[layers, T, D]` for those layers. Layer 0
      is the input of the first layer, and the attribute `layers` is the index of the last.
    - If `encode` has a parameter `batch_seconds`, infinity is passed, so that all given clips
      run as one batch.
    """

    def encode(self, waveforms: Sequence[Tensor], sample_rate_hz: int, /) -> list[Tensor]:
        """Return the valid frames `[T, D]` of each waveform `[S]`."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that the encoder's output depends on."""
        ...


@dataclass(frozen=True)
class EmbedSettings:
    """How clips are embedded. The fields after `limits` do not affect the embeddings.

    Attributes:
        pooling: a key of `POOLINGS`.
        layers: layer indices of the encoder, where 0 is the input of the first layer. Empty for
            its output.
        limits: which clips are decoded.
        batch_seconds: seconds of audio encoded at once. Memory grows with it.
        workers: number of decoding threads.
        max_skipped_fraction: fraction of a folder's clips above which broken audio is an error.
        quiet: show no progress bar.
    """

    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    limits: ClipLimits = field(default_factory=lambda: LONG_CLIPS)
    batch_seconds: float = BATCH_SECONDS
    workers: int = min(8, os.cpu_count() or 1)
    max_skipped_fraction: float = 0.02
    quiet: bool = False

    def __post_init__(self) -> None:
        get_pooling(self.pooling)


def embed_task(
    encoder: FrameEncoder,
    task: ProbeTask,
    root: str | Path | None,
    cache: str | Path,
    settings: EmbedSettings | None = None,
    fingerprint: str | None = None,
    view: str = "pooled",
    share: Share = WHOLE,
) -> dict[str, Embeddings]:
    """Return the embeddings of each part of a task, from the cache where possible.

    Args:
        encoder: the encoder to run.
        task: the task.
        root: replaces `{root}` in the task's folders.
        cache: folder for embeddings.
        settings: how clips are embedded.
        fingerprint: the encoder's fingerprint, if already computed: hashing gigabytes of weights
            takes seconds.
        view: what the probe needs of a clip, see `View.name`.
        share: which samples of every folder to embed. Folders that are already cached are
            returned whole.

    Raises:
        UserError: if shards are missing, too many clips are broken, or frames are not finite.
    """
    settings, fingerprint = settings or EmbedSettings(), fingerprint or encoder.fingerprint()
    problems = Problems()
    indexes = open_parts(task, root, problems)
    problems.raise_if_any(f"Probe task {task.name!r}")
    seen = view_of(encoder, settings, view, task)
    return {
        part: Embeddings.join(
            [
                _embed_folder(encoder, fingerprint, index, task, cache, settings, seen, share)
                for index in listed
            ]
        )
        for part, listed in indexes.items()
    }


def open_parts(
    task: ProbeTask, root: str | Path | None, problems: Problems
) -> dict[str, list[ShardIndex]]:
    """Return the shard indexes of each part of a task.

    Args:
        task: the task.
        root: replaces `{root}` in the task's folders.
        problems: collects missing shards, and tars that are in two parts.
    """
    indexes: dict[str, list[ShardIndex]] = {part: [] for part in task.parts}
    for part, listed in indexes.items():
        with problems.gather():
            folders = task.folders(part, root)
            for folder in folders:
                with problems.gather():
                    listed.append(open_index(folder))
    with problems.gather():
        _check_disjoint(indexes, task)
    return indexes


def folder_identity(
    fingerprint: str, view: View, index: ShardIndex, task: ProbeTask, settings: EmbedSettings
) -> dict[str, Any]:
    """Return everything that the embeddings of a folder depend on."""
    return {
        "version": EMBED_VERSION,
        "encoder": fingerprint,
        "data": _data_fingerprint(index),
        "view": {**asdict(view), "layers": list(view.layers)},
        "label": [
            task.answer,
            task.label,
            task.separator,
            *(task.event if task.answer == "events" else ()),
        ],
        "group": [task.group, task.group_pattern],
        "select": {name: sorted(values) for name, values in task.select.items()},
        "crop_seconds": task.crop_seconds,
        "limits": asdict(settings.limits),
    }


def view_of(encoder: FrameEncoder, settings: EmbedSettings, name: str, task: ProbeTask) -> View:
    """Return what to keep of a clip. The encoder's own pooling overrides that of the run, and a
    view of layers keeps all layers unless the settings name some.

    Raises:
        UserError: if layers are requested that the encoder does not have or does not expose.
    """
    layers = settings.layers
    if (name == "layers" or layers) and "layers" not in inspect.signature(
        encoder.encode
    ).parameters:
        raise UserError(
            f"{type(encoder).__name__} gives no single layers: probe its output, with a kind that "
            "needs no layers."
        )
    highest = getattr(encoder, "layers", None)
    if highest is not None and any(not 0 <= layer <= highest for layer in layers):
        raise UserError(
            f"The encoder has layers 0 (what enters the first) to {highest}; asked for: "
            f"{', '.join(map(str, layers))}."
        )
    if name == "layers" and not layers:
        layers = tuple(range(encoder.layers + 1))  # pyright: ignore[reportAttributeAccessIssue]
    pooling = getattr(encoder, "pooling", settings.pooling)
    return View(name, pooling, layers, task.segment_seconds if name == "segments" else 0.0)


def frame_seconds(encoder: FrameEncoder) -> float:
    """Return the frame hop of an encoder in seconds, measured on one second of noise."""
    noise = torch.randn(SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(0)) * 0.01
    return 1 / len(encoder.encode([noise], SAMPLE_RATE_HZ)[0])


def _embed_folder(
    encoder: FrameEncoder, fingerprint: str, index: ShardIndex, task: ProbeTask, cache: str | Path,
    settings: EmbedSettings,
    view: View, share: Share,
) -> Embeddings:  # fmt: skip
    identity = folder_identity(fingerprint, view, index, task, settings)
    found = read_embeddings(cache, identity)
    if found is None and share != WHOLE:
        identity = share.identity(identity)
        found = read_embeddings(cache, identity)
    if found is None:
        partial = PartialEmbeddings(cache, identity)
        found = _embed(encoder, index, task, settings, view, partial, share)
        write_embeddings(cache, identity, found)
        partial.remove()
        # Read back, so that frames are memory-mapped instead of held in memory.
        found = read_embeddings(cache, identity) or found
    return found


def _check_disjoint(indexes: dict[str, list[ShardIndex]], task: ProbeTask) -> None:
    """Reject splits that share a tar with the same bytes, whatever its folder is called."""
    where: dict[str, str] = {}
    for split, listed in indexes.items():
        for index in listed:
            for number, shard in enumerate(index.shards):
                # Without a checksum, at least the same file is recognised.
                name = shard.sha256 or index.url(number)
                if where.setdefault(name, split) != split:
                    raise UserError(
                        f"Probe task {task.name!r}: {index.url(number)} of {split!r} is in "
                        f"{where[name]!r} too. A score on "
                        "clips that were trained on means nothing: check the task's folders."
                    )


def _data_fingerprint(index: ShardIndex) -> str:
    # Tars without an index have no checksum: use their size and modification time instead.
    states = []
    for number, shard in enumerate(index.shards):
        if not shard.sha256:
            filesystem, path = fsspec.url_to_fs(index.url(number))
            states.append(str(filesystem.ukey(path)))
    return digest([index.fingerprint(), states]) if states else index.fingerprint()


def _embed(
    encoder: FrameEncoder, index: ShardIndex, task: ProbeTask, settings: EmbedSettings, view: View,
    partial: PartialEmbeddings,
    share: Share,
) -> Embeddings:  # fmt: skip
    done, seen = partial.read()
    first, stop = share.bounds(index.samples)
    hop = frame_seconds(encoder) if view.name == "segments" else 0.0
    rows, clips, written = [], [], time.monotonic()
    with _progress(settings.quiet) as bar:
        total, begun = (stop or index.samples) - first, max(0, seen - first)
        line = bar.add_task(
            f"{task.name} · {index.root.rstrip('/').rpartition('/')[2]}",
            total=total,
            completed=begun,
        )
        skip = max(seen, first)
        reader = ClipReader(
            index,
            task,
            settings.limits,
            settings.workers,
            skip,
            lambda: bar.advance(line),
            stop,
        )
        for window in _windows(reader, settings.batch_seconds, _padded(encoder)):
            rows += _encode(encoder, [clip.waveform for clip in window], settings, view, hop)
            clips += [replace(clip, waveform=torch.empty(0)) for clip in window]
            held = sum(row.nbytes for row in rows)
            if held > PART_BYTES or time.monotonic() - written > PART_SECONDS:
                left_out = Counter(done.skipped) + Counter(reader.skipped(clips[-1].seen))
                partial.write(_collect(rows, clips, view, index), clips[-1].seen, left_out)
                rows, clips, written = [], [], time.monotonic()
    skipped = Counter(done.skipped) + Counter(reader.skipped())
    check_refused(index, skipped, settings)
    parts = [_collect(rows, clips, view, index)]
    if (written_parts := partial.written) > 0:
        parts.insert(0, partial.read()[0])
        if partial.written < written_parts:
            raise UserError(
                f"Embeddings in {partial.path.parent} cannot be read back. Start again."
            )
    return replace(Embeddings.join(parts), skipped=dict(skipped))


def _encode(
    encoder: FrameEncoder, waveforms: list[Tensor], settings: EmbedSettings, view: View, hop: float
) -> list[Tensor]:
    """Cut clips into windows, encode these in batches of similar length, join and pool them."""
    cut = [cut_windows(waveform) for waveform in waveforms]
    flat = [(i, j) for i, listed in enumerate(cut) for j in range(len(listed))]
    frames: dict[tuple[int, int], Tensor] = {}
    options: dict[str, Any] = {"layers": view.layers} if view.layers else {}
    if "batch_seconds" in inspect.signature(encoder.encode).parameters:
        options["batch_seconds"] = math.inf  # batches are made below
    lengths = [len(cut[i][j]) for i, j in flat]
    for batch in _batches(lengths, settings.batch_seconds, _padded(encoder)):
        encoded = encoder.encode(
            [cut[i][j] for i, j in (flat[b] for b in batch)], SAMPLE_RATE_HZ, **options
        )
        frames.update(
            zip((flat[b] for b in batch), (clip.float() for clip in encoded), strict=True)
        )
    joined = (
        join_windows([frames[i, j] for j in range(len(listed))]) for i, listed in enumerate(cut)
    )
    return [view(clip, hop).cpu() for clip in joined]


def _collect(rows: list[Tensor], clips: list[Clip], view: View, index: ShardIndex) -> Embeddings:
    _check_finite([bool(row.isfinite().all()) for row in rows], clips, index)
    features, lengths = torch.empty(0, 0), ()
    if view.name == "segments" and rows:
        features, lengths = torch.cat(rows), tuple(len(row) for row in rows)
    elif view.name != "frames" and rows:
        features = torch.stack(rows)
    return Embeddings(
        features,
        tuple(clip.label for clip in clips),
        tuple(clip.key for clip in clips),
        {},
        lengths,
        tuple(rows) if view.name == "frames" else (),
        tuple(clip.group for clip in clips),
    )


def _padded(encoder: FrameEncoder) -> bool:
    return getattr(encoder, "padding", "none") == "30s"


def _windows(reader: ClipReader, batch_seconds: float, padded: bool) -> Iterator[list[Clip]]:
    """Group clips into windows of about `WINDOW_BATCHES` batches, within which they are sorted."""
    window, seconds = [], 0.0
    for clip in reader:
        if seconds >= WINDOW_BATCHES * batch_seconds:
            yield window
            window, seconds = [], 0.0
        window.append(clip)
        seconds += WINDOW_SECONDS if padded else len(clip.waveform) / SAMPLE_RATE_HZ
    if window:
        yield window


def _batches(lengths: list[int], batch_seconds: float, padded: bool) -> Iterator[list[int]]:
    """Return indices of waveforms in batches of at most `batch_seconds`, sorted by length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    seconds = [WINDOW_SECONDS if padded else lengths[i] / SAMPLE_RATE_HZ for i in order]
    for batch in batches_by_seconds(seconds, batch_seconds):
        yield [order[place] for place in batch]


def check_refused(index: ShardIndex, skipped: Mapping[str, int], settings: EmbedSettings) -> None:
    """Warn about the samples of a folder that could not be used.

    Raises:
        UserError: if too many samples are broken, or a tar is damaged.
    """
    broken = {reason: count for reason, count in skipped.items() if reason not in LEFT_OUT}
    if not broken:
        return
    listed = ", ".join(f"{count} × {reason}" for reason, count in sorted(broken.items()))
    if (
        sum(broken.values()) > settings.max_skipped_fraction * max(index.samples, 1)
        or str(SkipReason.BAD_TAR) in broken
    ):
        raise UserError(
            f"{index.root}: {sum(broken.values())} of {index.samples} samples cannot be used "
            f"({listed}); at most "
            f"{settings.max_skipped_fraction:.0%} may be left out of a probe. See them: "
            f"whisper-aut data inspect {index.root}"
        )
    log.warning("%s: %s left out of the probe.", index.root, listed)


def _check_finite(finite: list[bool], clips: list[Clip], index: ShardIndex) -> None:
    bad = [clip.key for clip, good in zip(clips, finite, strict=True) if not good]
    if bad:
        raise UserError(
            f"The encoder gave frames that are not finite for {len(bad)} of {len(clips)} clips of "
            f"{index.root}, first "
            f"{bad[0]!r}. Its weights may be damaged, or half precision overflows: try float32 or "
            "bfloat16."
        )


def _progress(quiet: bool) -> Progress:
    columns = (
        TextColumn("embed {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    )


BASELINE_NAME = "log-mel statistics"
BASELINE_VERSION = 1


class LogMelBaseline:
    """An "encoder" whose frames are log-mel frames, pooled by mean and standard deviation."""

    pooling = "mean_std"

    def __init__(self, num_mel_bins: int = 80):
        self.width = num_mel_bins
        self._log_mel = LogMel(num_mel_bins)

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor | np.ndarray], sample_rate_hz: int) -> list[Tensor]:
        """Return frames `[F, M]` per waveform `[S]`, without those that only cover the padding
        after a clip.
        """
        frames = []
        for waveform in waveforms:
            samples = torch.as_tensor(waveform)
            if sample_rate_hz != SAMPLE_RATE_HZ:
                samples = to_mono_16k(samples.numpy(), sample_rate_hz)
            frames.append(self._log_mel(samples)[: mel_frames(len(samples))])
        return frames

    def fingerprint(self) -> str:
        return f"log-mel-{BASELINE_VERSION}-{self.width}"


# A rank that exits is noticed at once. This timeout is for ranks that have more to embed.
PATIENCE = timedelta(hours=12)


def rank_share() -> Share:
    """Return the share of this process, from `RANK` and `WORLD_SIZE` as set by `torchrun`.
    Without these, the share is the whole.
    """
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@contextmanager
def joined_ranks(share: Share) -> Iterator[None]:
    """Join the process group of all ranks and always leave it, so that the other ranks notice an
    error.
    """
    if share == WHOLE:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class SharedEmbedding:
    """Embedding work that several ranks divide among themselves.

    Attributes:
        encoders, tasks, root, cache, embedding, kind: see `suite.run_suite`.
    """

    encoders: Mapping[str, FrameEncoder]
    tasks: Sequence[ProbeTask]
    root: str | Path | None
    cache: str | Path
    embedding: EmbedSettings
    kind: str

    def run(self, share: Share) -> None:
        """Embed the share of this rank, wait for the other ranks, and join all shares on rank 0.

        Must be called inside `joined_ranks`.

        Raises:
            UserError: as in `embed_task`, or if another rank is gone, or the ranks do not share
                a cache folder.
        """
        views = {task.name: KINDS[kind_for(self.kind, task)].view for task in self.tasks}
        fingerprints = {name: encoder.fingerprint() for name, encoder in self.encoders.items()}
        for name, encoder in self.encoders.items():
            for task in self.tasks:
                embed_task(
                    encoder,
                    task,
                    self.root,
                    self.cache,
                    self.embedding,
                    fingerprints[name],
                    views[task.name],
                    share,
                )
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError(
                f"Another rank is gone: {str(error).splitlines()[0][:300]}. Start again: shares "
                "are kept."
            ) from error
        if share.rank == 0:
            self._join(share.ranks, fingerprints, views)

    def _join(
        self,
        ranks: int,
        fingerprints: Mapping[str, str],
        views: Mapping[str, str],
    ) -> None:
        for name, encoder in self.encoders.items():
            for task in self.tasks:
                view = view_of(encoder, self.embedding, views[task.name], task)
                for index in (
                    open_index(folder)
                    for part in task.parts
                    for folder in task.folders(part, self.root)
                ):
                    identity = folder_identity(
                        fingerprints[name], view, index, task, self.embedding
                    )
                    join_shares(self.cache, identity, ranks, index, self.embedding)


def join_shares(
    cache: str | Path,
    identity: dict[str, object],
    ranks: int,
    index: ShardIndex,
    settings: EmbedSettings,
) -> None:
    """Concatenate the shares of a folder and store them under the folder's own identity, unless
    that is already cached.

    Raises:
        UserError: if a share is missing, or too many clips of the folder are broken.
    """
    if read_embeddings(cache, identity) is not None:
        return
    identities = [Share(rank, ranks).identity(identity) for rank in range(ranks)]
    found = [read_embeddings(cache, share) for share in identities]
    parts = [part for part in found if part is not None]
    if len(parts) < ranks:
        raise UserError(
            f"Rank {found.index(None)} left no embeddings of {index.root} in {cache}. All ranks "
            "must see one folder: put --out on a "
            "disk that they share."
        )
    joined = Embeddings.join(parts)
    check_refused(index, joined.skipped, settings)
    write_embeddings(cache, identity, joined)
    for share in identities:
        cache_path(cache, share).unlink(missing_ok=True)
