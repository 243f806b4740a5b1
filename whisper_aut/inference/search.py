"""Find the clips that sound most like a clip, by the cosine similarity of their embeddings.

The search is exact: one matrix product over all clips, which takes about a second for a million
embeddings of 1,280 values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.errors import UserError
from whisper_aut.inference.embed import Vectors
from whisper_aut.inference.encoder import AudioEncoder, load_encoder
from whisper_aut.models.encoder import Padding


@dataclass(frozen=True)
class Neighbour:
    """A clip of the index, and the cosine similarity of its embedding to the query's, -1 to 1."""

    name: str
    similarity: float


class SearchIndex:
    """Embeddings in memory, `[B, D]` or `[B, layers, D]`, normalised for search.

    Raises:
        UserError: they are frames rather than pooled embeddings.
    """

    def __init__(self, vectors: Vectors):
        if vectors.lengths:
            raise UserError(
                "The index contains frames, but search needs one vector per clip. Embed the clips "
                "again without --frames."
            )
        self.names, self.origin = vectors.names, vectors.origin
        self.units = normalize(vectors.values.flatten(1), dim=1)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def main_directions(self) -> Tensor:
        """The two directions of largest variance of the clips (PCA), `[D, 2]`. A single clip has
        none, so one is 0.
        """
        centred = self.units - self.units.mean(0)
        return pad(torch.linalg.svd(centred, full_matrices=False).Vh, (0, 0, 0, 1))[:2].T

    def open_encoder(self, *, path: str = "", device: str = "cpu", dtype: str = "") -> AudioEncoder:
        """Load the encoder that made the index.

        Args:
            path: where the encoder is now, if it was moved.
            dtype: the precision to run in. Defaults to the index's. Another one changes
                similarities in about the third digit.

        Raises:
            UserError: there is no encoder, or its weights differ from those of the index.
        """
        name, origin = path or self.origin.encoder, self.origin
        padding = cast(Padding, origin.padding)
        encoder = load_encoder(name, padding=padding, device=device, dtype=origin.dtype)
        if encoder.fingerprint() != origin.fingerprint:
            raise UserError(
                f"{name} is not the encoder that made the index: its weights are different. Embed "
                "the clips again, or name the right encoder with --encoder."
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
        """Embed files the way the index was made, as `[B, D]` or `[B, layers, D]`."""
        return encoder.embed(
            files,
            pooling=self.origin.pooling or "mean",
            layers=self.origin.layers,
            batch_seconds=batch_seconds,
        )

    def nearest(self, vector: Tensor, k: int = 5) -> list[Neighbour]:
        """Return the `k` clips whose embeddings are most similar to a vector, nearest first.

        Args:
            vector: an embedding, `[D]` or `[layers, D]`, as `embed` returns for one clip.

        Examples:
            >>> from whisper_aut.inference.embed import Origin
            >>> index = SearchIndex(
            ...     Vectors(("up", "right"), (1.0, 1.0), torch.eye(2), Origin("", ""))
            ... )
            >>> index.nearest(torch.tensor([3.0, 4.0]), k=1)
            [Neighbour(name='right', similarity=0.8)]
        """
        if k < 1:
            raise UserError(f"k must be at least 1, not {k}.")
        similarities = self.units @ normalize(vector.flatten(), dim=0)
        best = torch.topk(similarities, min(k, len(self)))
        return [
            Neighbour(self.names[index], round(value, 4))
            for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
