"""The clips of an index that sound most like a clip, by the cosine between their embeddings.

In: `Vectors` and audio files. Out: names with their similarities. Next: a terminal, or the demo's page. Exact search: one product over all
clips, which for a million of 1,280 numbers takes about a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import Vectors
from whisper_aut.models.encoder import Padding
from whisper_aut.models.pretrained import AudioEncoder, load_encoder


@dataclass(frozen=True)
class Neighbour:
    """A clip of the index and the cosine of its embedding with the query's, -1 … 1."""

    name: str
    similarity: float


class SearchIndex:
    """Embeddings ready for search.

    Args:
        vectors: pooled ones.

    Raises:
        UserError: frames in place of pooled vectors.
    """

    def __init__(self, vectors: Vectors):
        if vectors.lengths:
            raise UserError(
                "The index holds frames; search needs one vector a clip. Embed again without --frames."
            )
        self.names, self.origin = vectors.names, vectors.origin
        self.units = normalize(vectors.values.flatten(1), dim=1)

    def __len__(self) -> int:
        return len(self.names)

    def open_encoder(self, *, path: str = "", device: str = "cpu", dtype: str = "") -> AudioEncoder:
        """Load the encoder that made the index.

        Args:
            path: where it is now, if it was moved.
            dtype: the precision it runs in; by default the index's. Another one changes similarities
                in their third digit or so.

        Raises:
            UserError: it is not there, or its weights are others.
        """
        name, origin = path or self.origin.encoder, self.origin
        padding = cast(Padding, origin.padding)
        encoder = load_encoder(name, padding=padding, device=device, dtype=origin.dtype)
        if encoder.fingerprint() != origin.fingerprint:
            raise UserError(
                f"{name} is not the encoder that made the index: its weights are others. "
                "Embed the clips again, or name the right one with --encoder."
            )
        if dtype in ("", origin.dtype):
            return encoder
        return load_encoder(name, padding=padding, device=device, dtype=dtype)

    def embed(
        self,
        encoder: AudioEncoder,
        files: Sequence[str | Path],
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> Tensor:
        """Embed files as the index was: `[B, …, D]`."""
        origin = self.origin
        return encoder.embed(
            list(files), pooling=origin.pooling, layers=origin.layers, batch_seconds=batch_seconds
        )

    def nearest(self, vector: Tensor, k: int = 5) -> list[Neighbour]:
        """Return the k clips whose embeddings are most like `vector` `[…, D]`, the nearest first.

        Examples:
            >>> from whisper_aut.inference.encoder import Origin
            >>> index = SearchIndex(Vectors(("up", "right"), (1.0, 1.0), torch.eye(2), Origin("", "")))
            >>> index.nearest(torch.tensor([3.0, 4.0]), k=1)
            [Neighbour(name='right', similarity=0.8)]
        """
        if k < 1:
            raise UserError(f"k must be at least 1, not {k}.")
        similarities = self.units @ normalize(vector.flatten(), dim=0)
        best = torch.topk(similarities, min(k, len(self)))
        return [
            Neighbour(self.names[place], round(value, 4))
            for place, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
