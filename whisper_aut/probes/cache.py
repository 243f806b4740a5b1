"""Embeddings as a file: written once, read back only if they are what was asked for, and whole.

In: `Embeddings` of one shard folder and the identity they were made under. Out: a safetensors file named by the identity's hash.
Next: `probes.embed`. The file repeats the identity and carries a checksum; on any mismatch or damage it counts as absent.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whisper_aut.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """The clips of a folder or split: `features` is float32 `[B, D]`; `skipped` counts clips that are not among them."""

    features: Tensor
    labels: tuple[str, ...]
    keys: tuple[str, ...]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def join(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Put folders end to end into one split."""
        filled = [part.features for part in parts if len(part)]
        skipped = sum((Counter(part.skipped) for part in parts), Counter())
        return cls(
            torch.cat(filled) if filled else torch.empty(0, 0),
            tuple(label for part in parts for label in part.labels),
            tuple(key for part in parts for key in part.keys),
            dict(skipped),
        )


def digest(identity: Any) -> str:
    """Return the hash of a JSON-able object."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def cache_path(folder: str | Path, identity: dict[str, Any]) -> Path:
    """Return where embeddings of this identity lie."""
    return Path(folder) / f"{digest(identity)}.safetensors"


def read_embeddings(folder: str | Path, identity: dict[str, Any]) -> Embeddings | None:
    """Return what was stored under the identity, or None where there is nothing, or nothing whole."""
    path = cache_path(folder, identity)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            features = file.get_tensor("features")
        found = Embeddings(features, tuple(facts["labels"]), tuple(facts["keys"]), facts["skipped"])
        if facts["identity"] == identity and facts["sha256"] == _checksum(found):
            return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning("Cached embeddings %s are damaged; computing them again.", path.name)
    return None


def write_embeddings(folder: str | Path, identity: dict[str, Any], embeddings: Embeddings) -> None:
    """Store embeddings under a temporary name, then rename.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = cache_path(folder, identity)
    facts = {
        "identity": identity,
        "sha256": _checksum(embeddings),
        "labels": embeddings.labels,
        "keys": embeddings.keys,
        "skipped": embeddings.skipped,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": embeddings.features}, partial, metadata={"facts": json.dumps(facts, ensure_ascii=False)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write embeddings to {path.parent}: {error}. Name another cache folder.") from None


def _checksum(embeddings: Embeddings) -> str:
    names = json.dumps([embeddings.labels, embeddings.keys, embeddings.skipped])
    return hashlib.sha256(embeddings.features.numpy().tobytes() + names.encode()).hexdigest()
