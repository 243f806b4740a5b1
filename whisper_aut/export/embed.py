"""Files, folders and shards → embeddings: decode ahead, encode in packed batches, pool.

In: an `AudioEncoder` and paths. Out: `Vectors`. Next: `export.vectors` writes them, `export.search` looks into them. A file that
cannot be used is refused with its reason and counted; it never stops the rest. Probes have their own way (`probes.embed`): they need
labels, splits and a cache.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from whisper_aut.corpora.audio import AUDIO_SUFFIXES, LONG_CLIPS, ClipLimits
from whisper_aut.corpora.shards import INDEX_NAME, open_index
from whisper_aut.data.ahead import decoded_ahead
from whisper_aut.data.sample import Refusal, iter_samples
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, load_file, load_waveform
from whisper_aut.errors import SampleRefused, UserError
from whisper_aut.export.vectors import Origin, Vectors
from whisper_aut.model.pretrained import DECODERS, AudioEncoder
from whisper_aut.model.windows import BATCH_SECONDS, pooling_named


@dataclass(frozen=True)
class _Source:
    """A clip to be read: a file, the bytes of a shard's member, or what was refused before it could be decoded."""

    name: str
    content: Path | bytes | SampleRefused

    def load(self, limits: ClipLimits) -> Tensor:
        if isinstance(self.content, SampleRefused):
            raise self.content
        return (
            load_file(self.content, limits)
            if isinstance(self.content, Path)
            else load_waveform(self.content, limits)
        )

    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else 0


@dataclass(frozen=True)
class EmbedOptions:
    """What is kept of a clip, and how fast.

    Attributes:
        pooling: empty to keep the frames.
        batch_seconds: audio that runs at once; the memory that encoding takes grows with it.
        workers: decoding threads.
    """

    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    batch_seconds: float = BATCH_SECONDS
    workers: int = DECODERS
    limits: ClipLimits = field(default_factory=lambda: LONG_CLIPS)


def embed_paths(
    encoder: AudioEncoder,
    paths: Sequence[str],
    *,
    name: str,
    options: EmbedOptions | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Vectors:
    """Embed every clip that the paths name.

    Args:
        paths: audio files, folders of them (whatever their depth), folders or URLs of shards, tars.
        name: what the encoder was loaded from; it stands in the result.
        advance: called for each clip that has been dealt with.

    Raises:
        UserError: a path with no audio at it, or not one clip that can be used.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest")
        >>> embed_paths(encoder, ["clip.wav"], name="mine").names
        ('clip.wav',)
    """
    options = options or EmbedOptions()
    pool = pooling_named(options.pooling) if options.pooling else _frames_first
    names, seconds, rows = [], [], []
    refused: dict[str, str] = {}
    sources = (source for path in paths for source in _sources(path, options.limits))
    for group in _groups(sources, options, refused, advance):
        waveforms = [waveform for _, waveform in group]
        encoded = encoder.encode(
            waveforms, SAMPLE_RATE_HZ, options.layers, batch_seconds=options.batch_seconds
        )
        rows += [pool(frames) for frames in encoded]
        names += [source.name for source, _ in group]
        seconds += [len(waveform) / SAMPLE_RATE_HZ for waveform in waveforms]
    if not rows:
        raise UserError(f"Not one clip of {', '.join(paths)} could be used: {summary(refused)}.")
    lengths = () if options.pooling else tuple(len(row) for row in rows)
    values = torch.cat(rows) if lengths else torch.stack(rows)
    origin = Origin(
        name,
        encoder.fingerprint(),
        encoder.padding,
        options.pooling,
        options.layers,
        encoder.dtype,
    )
    return Vectors(tuple(names), tuple(seconds), values, origin, lengths, refused)


def count_clips(paths: Sequence[str]) -> int:
    """Return how many clips the paths name, refused ones included, without decoding any.

    Raises:
        UserError: a path with no audio at it.
    """
    return sum(
        open_index(path).samples if _is_shards(path) else len(_files(path)) for path in paths
    )


def summary(refused: dict[str, str]) -> str:
    """Say how many clips were refused, by reason."""
    counts = Counter(reason.partition(":")[0] for reason in refused.values())
    return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())


def _frames_first(frames: Tensor) -> Tensor:
    """`[T, D]` as it is, `[layers, T, D]` → `[T, layers, D]`."""
    return frames if frames.ndim == 2 else frames.transpose(0, 1)


def _groups(
    sources: Iterator[_Source],
    options: EmbedOptions,
    refused: dict[str, str],
    advance: Callable[[], object],
) -> Iterator[list[tuple[_Source, Tensor]]]:
    """Collect decoded clips into groups of a batch's seconds; what cannot be decoded goes to `refused`."""
    group, seconds = [], 0.0
    for source, waveform in decoded_ahead(
        sources, lambda source: source.load(options.limits), _Source.size, options.workers
    ):
        advance()
        if isinstance(waveform, SampleRefused):
            refused[source.name] = str(waveform)
            continue
        length = len(waveform) / SAMPLE_RATE_HZ
        if group and seconds + length > options.batch_seconds:
            yield group
            group, seconds = [], 0.0
        group.append((source, waveform))
        seconds += length
    if group:
        yield group


def _is_shards(path: str) -> bool:
    """Whether a path names shards: a tar, a pattern of tars, a URL, or a folder that holds tars."""
    if path.endswith(".tar") or "://" in path:
        return True
    folder = Path(path)
    return folder.is_dir() and ((folder / INDEX_NAME).is_file() or any(folder.glob("*.tar")))


def _sources(path: str, limits: ClipLimits) -> Iterator[_Source]:
    if not _is_shards(path):
        yield from (_Source(str(file), file) for file in _files(path))
        return
    for item in iter_samples(open_index(path), limits):
        if isinstance(item, Refusal):
            yield _Source(f"{item.source}:{item.key}", SampleRefused(item.reason, item.detail))
        else:
            yield _Source(f"{item.shard}:{item.key}", item.audio)


def _files(path: str) -> list[Path]:
    """Return a file, or the audio files below a folder in order, links to folders included and hidden ones not."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"There is no file or folder {path}.")
        return [Path(path)]
    below = glob.iglob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
    files = sorted(
        Path(name)
        for name in below
        if name.rpartition(".")[2].lower() in AUDIO_SUFFIXES and os.path.isfile(name)
    )
    if not files:
        raise UserError(f"{path} holds no shards and no audio files ({', '.join(AUDIO_SUFFIXES)}).")
    return files
