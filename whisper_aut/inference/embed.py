"""Embed files, folders and shards, and save the embeddings as safetensors or parquet."""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whisper_aut.audio.decode import (
    AUDIO_SUFFIXES,
    LONG_CLIPS,
    SAMPLE_RATE_HZ,
    load_file,
    load_waveform,
)
from whisper_aut.audio.windows import BATCH_SECONDS, get_pooling
from whisper_aut.data.reader import SkippedSample, prefetch_decoded
from whisper_aut.data.shards import INDEX_NAME, iter_samples, open_index
from whisper_aut.errors import SkipSample, UserError, require
from whisper_aut.inference.encoder import DECODE_THREADS, AudioEncoder
from whisper_aut.utils import atomic_path, parse_json


@dataclass(frozen=True)
class Origin:
    """How embeddings were made, so that more embeddings can be made to compare with them.

    Attributes:
        encoder: path or hub id of the encoder.
        fingerprint: hash of the encoder's weights, padding mode and dtype.
        pooling: pooling of the frames; None if the frames themselves were kept.
        layers: layers that were kept; empty for the encoder's output.
        dtype: precision of the encoder, a key of `DTYPES`.
    """

    encoder: str
    fingerprint: str
    padding: str = "none"
    pooling: str | None = "mean"
    layers: tuple[int, ...] = ()
    dtype: str = "fp32"


@dataclass(frozen=True)
class Vectors:
    """The embeddings of some clips.

    Attributes:
        names, seconds: name and duration of each clip.
        values: float32 `[B, D]` or `[B, layers, D]`. If frames were kept, the frames of all
            clips, concatenated to `[ΣT, D]` or `[ΣT, layers, D]`.
        origin: how the embeddings were made.
        lengths: T of each clip if frames were kept, otherwise empty.
        skipped: name of each skipped clip → the reason.
    """

    names: tuple[str, ...]
    seconds: tuple[float, ...]
    values: Tensor
    origin: Origin
    lengths: tuple[int, ...] = ()
    skipped: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def frames(self) -> list[Tensor]:
        """Return the frames of each clip, `[T, D]` or `[T, layers, D]`, if frames were kept."""
        return list(self.values.split(list(self.lengths)))

    def save(self, path: Path) -> None:
        """Write the embeddings atomically, as safetensors or parquet, by the suffix of `path`.

        Raises:
            UserError: see `check_suffix`; or the file cannot be written.
        """
        check_suffix(path, frames=bool(self.lengths))
        with atomic_path(path) as partial_path:
            if path.suffix == ".parquet":
                self._write_parquet(partial_path)
            else:
                self._write_safetensors(partial_path)

    @classmethod
    def load(cls, path: Path) -> "Vectors":
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or not written by `save`.
        """
        if not path.is_file():
            raise UserError(
                f"There is no file {path}. Make one: whisper-aut embed ENCODER FOLDER --out {path}"
            )
        check_suffix(path)
        read = cls._read_parquet if path.suffix == ".parquet" else cls._read_safetensors
        try:
            return read(path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or holds no embeddings of whisper-aut ({error}). Run "
                "whisper-aut embed again."
            ) from None

    def _write_safetensors(self, path: Path) -> None:
        tensors = {"frames" if self.lengths else "embeddings": self.values.contiguous()}
        if self.lengths:
            tensors["lengths"] = torch.tensor(self.lengths)
        metadata = self._metadata() | {"names": self.names, "seconds": self.seconds}
        texts = {name: json.dumps(value) for name, value in metadata.items()}
        try:
            save_file(tensors, path, metadata=texts)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    @classmethod
    def _read_safetensors(cls, path: Path) -> "Vectors":
        with safe_open(path, framework="pt") as file:
            metadata = {name: parse_json(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        lengths = tuple(tensors["lengths"].tolist()) if "lengths" in tensors else ()
        values = tensors["frames" if "lengths" in tensors else "embeddings"]
        return cls._checked(metadata["names"], metadata["seconds"], values, metadata, lengths)

    def _write_parquet(self, path: Path) -> None:
        arrow, parquet = _import_pyarrow()
        flat = self.values.flatten(1)
        column = arrow.FixedSizeListArray.from_arrays(
            arrow.array(flat.flatten().numpy()), flat.shape[1]
        )
        names = [name.encode(errors="backslashreplace").decode() for name in self.names]
        columns = {"name": names, "seconds": list(self.seconds), "embedding": column}
        metadata = self._metadata() | {"shape": list(self.values.shape[1:])}
        text = json.dumps(metadata)
        table = arrow.table(columns).replace_schema_metadata({"whisper_aut": text})
        parquet.write_table(table, path)

    @classmethod
    def _read_parquet(cls, path: Path) -> "Vectors":
        _, parquet = _import_pyarrow()
        table = parquet.read_table(path)
        metadata = parse_json(table.schema.metadata[b"whisper_aut"])
        column = table["embedding"].combine_chunks().flatten()
        values = torch.from_numpy(column.to_numpy().reshape(-1, *metadata.pop("shape")).copy())
        return cls._checked(
            table["name"].to_pylist(), table["seconds"].to_pylist(), values, metadata
        )

    def _metadata(self) -> dict[str, Any]:
        return {"origin": asdict(self.origin), "skipped": self.skipped or {}}

    @classmethod
    def _checked(
        cls,
        names: list[str],
        seconds: list[float],
        values: Tensor,
        metadata: dict[str, Any],
        lengths: tuple[int, ...] = (),
    ) -> "Vectors":
        rows = len(lengths or values)
        if not len(names) == len(seconds) == rows or (lengths and sum(lengths) != len(values)):
            raise ValueError("the numbers of names and rows differ")
        origin = metadata["origin"]
        origin = Origin(**origin | {"layers": tuple(origin["layers"])})
        return cls(tuple(names), tuple(seconds), values, origin, lengths, metadata["skipped"])


def check_suffix(path: Path, *, frames: bool = False) -> None:
    """Check, before any clip is encoded, that vectors or `frames` can be saved to such a file.

    Raises:
        UserError: the suffix is neither `.safetensors` nor `.parquet`, frames are to be saved as
            parquet, or pyarrow is needed and missing.
    """
    if path.suffix not in (".safetensors", ".parquet"):
        raise UserError(f"{path}: embeddings are stored in .safetensors or .parquet files.")
    if path.suffix == ".parquet":
        if frames:
            raise UserError("A parquet table has one vector per clip: save frames as .safetensors.")
        _import_pyarrow()


def _import_pyarrow() -> tuple[Any, Any]:
    require("pyarrow")
    import pyarrow
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


# A clip to decode: its name, and its file, its bytes in a shard, or why it is skipped.
_Source: TypeAlias = tuple[str, Path | bytes | SkipSample]


def embed_paths(
    encoder: AudioEncoder,
    paths: Sequence[str],
    *,
    name: str,
    pooling: str | None = "mean",
    layers: Sequence[int] = (),
    batch_seconds: float = BATCH_SECONDS,
    on_clip: Callable[[], object] = lambda: None,
) -> Vectors:
    """Embed every clip in some files, folders and shards.

    A clip that cannot be used is skipped, and its reason is kept in the result.

    Args:
        paths: audio files, folders that contain audio files at any depth, tars, or folders or URLs
            of shards.
        name: path or hub id of the encoder, saved in the result's origin.
        pooling: `mean` or `mean_std`, or None to keep the frames.
        layers, batch_seconds: see `AudioEncoder.encode`.
        on_clip: called once per clip, usable or not.

    Raises:
        UserError: there is no audio at a path, or no clip can be used.

    Examples:
        >>> encoder = load_encoder("runs/aut_tiny/latest")
        >>> embed_paths(encoder, ["clip.wav"], name="mine").names
        ('clip.wav',)
    """
    # Without pooling, frames come first: `[T, D]` or `[T, L, D]`.
    pool = get_pooling(pooling) if pooling else lambda frames: frames.movedim(-2, 0)
    names, seconds, rows = [], [], []
    skipped: dict[str, str] = {}
    sources = (source for path in paths for source in _sources(path))
    for group in _decoded_groups(sources, batch_seconds, skipped, on_clip):
        clip_names, waveforms = zip(*group, strict=True)
        encoded = encoder.encode(waveforms, SAMPLE_RATE_HZ, layers, batch_seconds=batch_seconds)
        rows += [pool(frames) for frames in encoded]
        names += clip_names
        seconds += [len(waveform) / SAMPLE_RATE_HZ for waveform in waveforms]
    if not rows:
        reasons = sorted({reason.partition(":")[0] for reason in skipped.values()})
        raise UserError(f"No clip of {', '.join(paths)} can be used: {', '.join(reasons)}.")
    lengths = () if pooling else tuple(len(row) for row in rows)
    values = torch.cat(rows) if lengths else torch.stack(rows)
    origin = Origin(
        name, encoder.fingerprint(), encoder.padding, pooling, tuple(layers), encoder.dtype
    )
    return Vectors(tuple(names), tuple(seconds), values, origin, lengths, skipped)


def count_clips(paths: Sequence[str]) -> int:
    """Return the number of clips at some paths, including unusable ones, without decoding any.

    Raises:
        UserError: there is no audio at a path.
    """
    return sum(
        open_index(path).samples if is_shards(path) else len(_audio_files(path)) for path in paths
    )


def _decoded_groups(
    sources: Iterator[_Source],
    batch_seconds: float,
    skipped: dict[str, str],
    on_clip: Callable[[], object],
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield names and waveforms of clips in groups of at most `batch_seconds`."""
    group, seconds = [], 0.0
    for (name, _), waveform in prefetch_decoded(sources, _decode, _encoded_bytes, DECODE_THREADS):
        on_clip()
        if isinstance(waveform, SkipSample):
            skipped[name] = str(waveform)
            continue
        length = len(waveform) / SAMPLE_RATE_HZ
        if group and seconds + length > batch_seconds:
            yield group
            group, seconds = [], 0.0
        group.append((name, waveform))
        seconds += length
    if group:
        yield group


def _decode(source: _Source) -> Tensor:
    content = source[1]
    if isinstance(content, SkipSample):
        raise content
    if isinstance(content, Path):
        return load_file(content, LONG_CLIPS)
    return load_waveform(content, LONG_CLIPS)


def _encoded_bytes(source: _Source) -> int:
    return len(source[1]) if isinstance(source[1], bytes) else 0


def is_shards(path: str) -> bool:
    """Return whether a path is a tar, a pattern of tars, a URL, or a folder that holds tars."""
    if path.endswith(".tar") or "://" in path:
        return True
    folder = Path(path)
    return folder.is_dir() and ((folder / INDEX_NAME).is_file() or any(folder.glob("*.tar")))


def _sources(path: str) -> Iterator[_Source]:
    if not is_shards(path):
        yield from ((str(file), file) for file in _audio_files(path))
        return
    for item in iter_samples(open_index(path), LONG_CLIPS):
        if isinstance(item, SkippedSample):
            yield f"{item.shard}:{item.key}", SkipSample(item.reason, item.detail)
        else:
            yield f"{item.shard}:{item.key}", item.audio


def _audio_files(path: str) -> list[Path]:
    """Return a file, or the sorted audio files in a folder at any depth.

    Symbolic links to folders are followed; hidden files and folders are ignored.
    """
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f"There is no file or folder {path}.")
        return [Path(path)]
    found = glob.iglob(os.path.join(glob.escape(path), "**", "*"), recursive=True)
    files = sorted(
        Path(name)
        for name in found
        if name.rpartition(".")[2].lower() in AUDIO_SUFFIXES and os.path.isfile(name)
    )
    if not files:
        raise UserError(f"{path} has no shards and no audio files ({', '.join(AUDIO_SUFFIXES)}).")
    return files
