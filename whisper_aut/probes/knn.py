"""Nearest-neighbour probe: without training, a clip is predicted to have the classes of its most
similar training clips.

Features of each clip are scaled to unit length, so that similarity is a cosine. Votes are
weighted by exp(cosine / temperature) (Wu et al. 2018, section 3.4). X-ARES scales features
across samples instead, which is a mistake.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.probes.fit import FittedProbes, Items, Setting

KNN_VERSION = 1
NEIGHBOURS = (1, 3, 5, 10, 20)
TEMPERATURES = (0.02, 0.07, 1.0)
CANDIDATES: tuple[Setting, ...] = tuple(
    {"k": k, "temperature": t} for k in NEIGHBOURS for t in TEMPERATURES if k > 1 or t == 1.0
)
MAX_SIMILARITIES = 1 << 26  # floats in one block of cosines


class KNNProbe:
    """Cosine neighbours among training items `[I, D]` with classes `[I]`."""

    def __init__(self, features: Tensor, answers: Tensor, classes: int):
        self.features, self.answers, self.classes = F.normalize(features, dim=1), answers, classes

    def cosines(self, features: Tensor) -> Tensor:
        """Return the cosines `[Q, I]` of features `[Q, D]` with the training items."""
        return F.normalize(features, dim=1) @ self.features.T

    def nearest(self, cosines: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return cosines and classes, both `[Q, k]`, of the nearest items among those marked by
        `allowed` `[I]`, in order of decreasing cosine.
        """
        kept = cosines[:, allowed]
        found, positions = kept.topk(min(k, kept.shape[1]), dim=1)
        return found, self.answers[allowed][positions]

    def vote(self, cosines: Tensor, answers: Tensor, temperature: float) -> Tensor:
        """Return the log probabilities `[Q, C]` from the votes of neighbours `[Q, k]`."""
        votes = torch.zeros(len(cosines), self.classes, device=cosines.device)
        votes.scatter_add_(1, answers, (cosines / temperature).softmax(1))
        return votes.clamp_min(1e-9).log()


@dataclass(frozen=True)
class KNNFitter:
    """Holds one pool. Each column of `rows` marks the items that may be neighbours."""

    pool: Items
    classes: int

    @classmethod
    def on(cls, pool: Items, train: Tensor, classes: int, device: str) -> "KNNFitter":
        return cls(pool.to(device), classes)

    @property
    def block(self) -> int:
        """Number of problems at once. All share one matrix product of cosines."""
        return max(1, MAX_SIMILARITIES // (len(self.pool.features) * self.classes))

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        probe = KNNProbe(self.pool.features, self.pool.answers, self.classes)
        most = max(int(setting["k"]) for setting in settings)

        def scores(features: Tensor) -> Tensor:
            parts = []
            for chunk in features.to(self.pool.features.device).split(
                max(1, MAX_SIMILARITIES // len(self.pool.features))
            ):
                cosines, columns, found, last = probe.cosines(chunk), [], None, None
                for own, setting in zip(rows.T.to(cosines.device), settings, strict=True):
                    # Consecutive candidates of a trial share their neighbours.
                    if found is None or last is None or not torch.equal(own, last):
                        found, last = probe.nearest(cosines, own, most), own
                    k = int(setting["k"])
                    columns.append(
                        probe.vote(found[0][:, :k], found[1][:, :k], setting["temperature"])
                    )
                parts.append(torch.stack(columns, 1))
            return torch.cat(parts)

        return FittedProbes(scores)
