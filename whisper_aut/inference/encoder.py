"""Embed audio files, folders and shards, and read and write the embeddings.

A clip that cannot be used is skipped and its reason is kept; it does not stop the others. Probes
embed with `probes.embed` instead, because they also need labels, splits and a cache.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whisper_aut.audio.decode import (
    AUDIO_SUFFIXES,
    LONG_CLIPS,
    SAMPLE_RATE_HZ,
    ClipLimits,
    load_file,
    load_waveform,
)
from whisper_aut.audio.windows import BATCH_SECONDS, pooling_named
from whisper_aut.data.reader import SkippedSample, decoded_ahead, iter_samples
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.models.pretrained import DECODERS, AudioEncoder

SUFFIXES = (".safetensors", ".npz", ".parquet")
VECTORS_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """How embeddings were made, so that more embeddings can be made to compare with them.

    Attributes:
        encoder: The path or hub id from which the encoder was loaded.
        fingerprint: The hash of the encoder's weights, padding mode and dtype.
        padding: The encoder's padding mode.
        pooling: How frames were pooled; empty if the frames themselves were kept.
        layers: The layers whose outputs were kept; empty for the encoder's output.
        dtype: The name of the encoder's precision.
    """

    encoder: str
    fingerprint: str
    padding: str = "none"
    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    dtype: str = "fp32"


@dataclass(frozen=True)
class Vectors:
    """The embeddings of some clips.

    Attributes:
        names: The name of each clip.
        seconds: The duration of each clip.
        values: float32 `[B, D]` or `[B, layers, D]`. If frames were kept, the frames of all
            clips, concatenated to `[ΣT, D]` or `[ΣT, layers, D]`.
        origin: How the embeddings were made.
        lengths: The number of frames of each clip if frames were kept, otherwise empty.
        refused: The reason for each clip that was skipped, by name.
    """

    names: tuple[str, ...]
    seconds: tuple[float, ...]
    values: Tensor
    origin: Origin
    lengths: tuple[int, ...] = ()
    refused: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def frames(self) -> list[Tensor]:
        """Return the frames of each clip, `[T, D]` or `[T, layers, D]`, if frames were kept."""
        edges = np.cumsum([0, *self.lengths]).tolist()
        return [self.values[start:end] for start, end in pairwise(edges)]

    def save(self, path: Path) -> None:
        """Write the embeddings atomically, in the format of the path's suffix.

        Raises:
            UserError: If the suffix is not one of `SUFFIXES`, if frames are saved as parquet, if
                pyarrow is needed and missing, or if the file cannot be written.
        """
        check_suffix(path, frames=bool(self.lengths))
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[path.suffix](self, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot write {path}: {error}.") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Vectors":
        """Read a file that `save` wrote.

        Raises:
            UserError: If the file is missing, damaged, or not written by `save`.
        """
        if not path.is_file():
            raise UserError(
                f"There is no file {path}. Make one: whisper-aut embed ENCODER FOLDER --out {path}"
            )
        check_suffix(path)
        try:
            return _READERS[path.suffix](path)
        except (
            SafetensorError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            BadZipFile,
        ) as error:
            raise UserError(
                f"{path} holds no embeddings of whisper-aut, or is damaged ({error}). Embed again."
            ) from None

    def facts(self) -> dict[str, Any]:
        """Return the metadata that is saved with the embeddings."""
        return {
            "version": VECTORS_VERSION,
            "origin": asdict(self.origin),
            "refused": self.refused or {},
        }


def check_suffix(path: Path, *, frames: bool = False) -> None:
    """Check that embeddings can be saved to a path of this suffix, before any clip is encoded.

    Args:
        path: The file to write.
        frames: Whether frames are to be saved rather than pooled vectors.

    Raises:
        UserError: If the suffix is not one of `SUFFIXES`, if frames are to be saved as parquet,
            or if pyarrow is needed and missing.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: embeddings are kept in files that end in {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        if frames:
            raise UserError(
                "A parquet table holds one vector a clip. Keep frames in .safetensors or .npz."
            )
        _pyarrow()


def _origin(facts: dict[str, Any]) -> Origin:
    if facts["version"] != VECTORS_VERSION:
        raise ValueError(f"version {facts['version']}, this release reads {VECTORS_VERSION}")
    values = facts["origin"]
    return Origin(**values | {"layers": tuple(values["layers"])})


def _of(
    names: Sequence[str],
    seconds: Sequence[float],
    values: Tensor,
    lengths: Sequence[int],
    facts: dict[str, Any],
) -> Vectors:
    if not len(names) == len(seconds) == (len(lengths) or len(values)) or (
        lengths and sum(lengths) != len(values)
    ):
        raise ValueError("names and rows differ in number")
    return Vectors(
        tuple(names), tuple(seconds), values, _origin(facts), tuple(lengths), facts["refused"]
    )


def _write_safetensors(vectors: Vectors, path: Path) -> None:
    tensors = {"frames" if vectors.lengths else "embeddings": vectors.values.contiguous()}
    if vectors.lengths:
        tensors["lengths"] = torch.tensor(vectors.lengths)
    texts = {"names": vectors.names, "seconds": vectors.seconds, "facts": vectors.facts()}
    save_file(
        tensors,
        path,
        metadata={name: json.dumps(value, ensure_ascii=False) for name, value in texts.items()},
    )


def _read_safetensors(path: Path) -> Vectors:
    with safe_open(path, framework="pt") as file:
        texts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        kept = file.keys()
        values = file.get_tensor("frames" if "frames" in kept else "embeddings")
        lengths = file.get_tensor("lengths").tolist() if "lengths" in kept else ()
    return _of(texts["names"], texts["seconds"], values, lengths, texts["facts"])


def _write_npz(vectors: Vectors, path: Path) -> None:
    arrays = {
        "frames" if vectors.lengths else "embeddings": vectors.values.numpy(),
        "names": np.array(vectors.names, dtype=np.str_),
        "seconds": np.array(vectors.seconds),
        "facts": np.array(json.dumps(vectors.facts(), ensure_ascii=False)),
    }
    if vectors.lengths:
        arrays["lengths"] = np.array(vectors.lengths)
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


def _read_npz(path: Path) -> Vectors:
    with np.load(path, allow_pickle=False) as file:
        values = torch.from_numpy(file["frames"] if "frames" in file else file["embeddings"])
        lengths = file["lengths"].tolist() if "lengths" in file else ()
        return _of(
            file["names"].tolist(),
            file["seconds"].tolist(),
            values,
            lengths,
            json.loads(str(file["facts"])),
        )


def _write_parquet(vectors: Vectors, path: Path) -> None:
    arrow, parquet = _pyarrow()
    flat = vectors.values.flatten(1)
    column = arrow.FixedSizeListArray.from_arrays(
        arrow.array(flat.flatten().numpy()), flat.shape[1]
    )
    table = arrow.table(
        {"name": list(vectors.names), "seconds": list(vectors.seconds), "embedding": column}
    )
    facts = vectors.facts() | {"shape": list(vectors.values.shape[1:])}
    parquet.write_table(
        table.replace_schema_metadata({"whisper_aut": json.dumps(facts, ensure_ascii=False)}), path
    )


def _read_parquet(path: Path) -> Vectors:
    _, parquet = _pyarrow()
    table = parquet.read_table(path)
    facts = json.loads(table.schema.metadata[b"whisper_aut"])
    column = table["embedding"].combine_chunks().flatten()
    values = torch.from_numpy(column.to_numpy().reshape(-1, *facts["shape"]).copy())
    return _of(table["name"].to_pylist(), table["seconds"].to_pylist(), values, (), facts)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow: pip install 'whisper-aut[parquet]'. "
            "Or write .safetensors or .npz."
        ) from None
    return pyarrow, pyarrow.parquet


_WRITERS = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz, ".parquet": _read_parquet}


@dataclass(frozen=True)
class _Source:
    """A clip to decode: a file, the bytes of a shard member, or the reason why it was skipped."""

    name: str
    content: Path | bytes | SkipSample

    def load(self, limits: ClipLimits) -> Tensor:
        if isinstance(self.content, SkipSample):
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
    """Options of `embed_paths`.

    Attributes:
        pooling: How frames are pooled; empty to keep the frames.
        layers: The layers whose outputs to keep; empty for the encoder's output.
        batch_seconds: Seconds of audio in a batch. Memory use grows with it.
        workers: The number of decoding threads.
        limits: The clips to accept.
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
    """Embed every clip in some files, folders and shards.

    Args:
        encoder: The encoder.
        paths: Audio files, folders that contain audio files at any depth, tars, or folders or
            URLs of shards.
        name: The path or hub id from which the encoder was loaded, saved in the result's origin.
        options: What to keep, and how to run.
        advance: Called once per clip, usable or not.

    Raises:
        UserError: If there is no audio at a path, or if no clip can be used.

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
    """Return the number of clips at some paths, including unusable ones, without decoding any.

    Raises:
        UserError: If there is no audio at a path.
    """
    return sum(
        open_index(path).samples if _is_shards(path) else len(_files(path)) for path in paths
    )


def summary(refused: dict[str, str]) -> str:
    """Return a text that counts skipped clips by reason, from `Vectors.refused`."""
    counts = Counter(reason.partition(":")[0] for reason in refused.values())
    return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())


def _frames_first(frames: Tensor) -> Tensor:
    """Return `[T, D]` unchanged, and `[layers, T, D]` as `[T, layers, D]`."""
    return frames if frames.ndim == 2 else frames.transpose(0, 1)


def _groups(
    sources: Iterator[_Source],
    options: EmbedOptions,
    refused: dict[str, str],
    advance: Callable[[], object],
) -> Iterator[list[tuple[_Source, Tensor]]]:
    """Yield groups of decoded clips of at most `batch_seconds`; add the others to `refused`."""
    group, seconds = [], 0.0
    for source, waveform in decoded_ahead(
        sources, lambda source: source.load(options.limits), _Source.size, options.workers
    ):
        advance()
        if isinstance(waveform, SkipSample):
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
        if isinstance(item, SkippedSample):
            yield _Source(f"{item.source}:{item.key}", SkipSample(item.reason, item.detail))
        else:
            yield _Source(f"{item.shard}:{item.key}", item.audio)


def _files(path: str) -> list[Path]:
    """Return a file, or the sorted audio files in a folder at any depth.

    Symbolic links to folders are followed; hidden files and folders are ignored.
    """
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
