"""Embeddings as a file that others read: safetensors, npz or parquet, with the names of the clips and how they were made.

In: `Vectors`. Out: one file, and back. Next: `export.search`, or the user's own tools: `safetensors`, `numpy` and `pyarrow` open
them without this package.

safetensors and npz hold `embeddings` `[B, …, D]`, or `frames` `[ΣT, D]` with `lengths` `[B]`; names, seconds and facts are JSON in the
metadata of the first and arrays of the second. A parquet table has the columns `name`, `seconds`, `embedding`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whisper_aut.errors import UserError

SUFFIXES = (".safetensors", ".npz", ".parquet")
VECTORS_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """How embeddings were made: all that it takes to make one more that can be compared with them.

    Attributes:
        encoder: the path or hub id it was loaded from; `fingerprint` is the hash of its weights, padding and dtype.
        pooling: of frames; empty where the frames themselves were kept.
        layers: none for the encoder's output.
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
        values: float32 `[B, D]` or `[B, layers, D]`; with `lengths` the frames of all clips, `[ΣT, D]` or `[ΣT, layers, D]`.
        refused: clips that could not be used, and why.
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
        """Return each clip's frames, where frames were kept."""
        edges = np.cumsum([0, *self.lengths]).tolist()
        return [self.values[start:end] for start, end in pairwise(edges)]

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it.

        Raises:
            UserError: another ending than `SUFFIXES`, no pyarrow for parquet, or a folder that cannot be written to.
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
            UserError: nothing there, or no embeddings of ours.
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
        """Return what stands beside the numbers."""
        return {
            "version": VECTORS_VERSION,
            "origin": asdict(self.origin),
            "refused": self.refused or {},
        }


def check_suffix(path: Path, *, frames: bool = False) -> None:
    """Refuse a file that could not be written, before anything is encoded.

    Raises:
        UserError: see `Vectors.save`.
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
            "Parquet needs pyarrow: pip install 'whisper-aut[parquet]'. Or write .safetensors or .npz."
        ) from None
    return pyarrow, pyarrow.parquet


_WRITERS = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz, ".parquet": _read_parquet}
