"""The nearest-neighbour probe: nothing is trained, a clip is given the classes of the clips most like it.

In: items `[I, D]`. Out: class scores `[I, J, C]`, one problem per set of training clips and (k, temperature). Next: `probes.selection`,
which chooses k and temperature on validation clips. Every sample is scaled to unit length, so that the likeness is a cosine
(Wu et al. 2018, section 3.4, for the weighting by exp(cosine / temperature)); scaling features across samples is X-ARES's mistake.
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
    """Cosine neighbours among `[I, D]` training items of classes `[I]`."""

    def __init__(self, features: Tensor, answers: Tensor, classes: int):
        self.features, self.answers, self.classes = F.normalize(features, dim=1), answers, classes

    def cosines(self, features: Tensor) -> Tensor:
        """`[Q, D]` → `[Q, I]`."""
        return F.normalize(features, dim=1) @ self.features.T

    def nearest(self, cosines: Tensor, allowed: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return cosines and classes, both `[Q, k]`, of the nearest items that are `allowed` `[I]`, the nearest first."""
        kept = cosines[:, allowed]
        found, positions = kept.topk(min(k, kept.shape[1]), dim=1)
        return found, self.answers[allowed][positions]

    def vote(self, cosines: Tensor, answers: Tensor, temperature: float) -> Tensor:
        """Return log shares of the votes, `[Q, C]`, of neighbours `[Q, k]`."""
        votes = torch.zeros(len(cosines), self.classes, device=cosines.device)
        votes.scatter_add_(1, answers, (cosines / temperature).softmax(1))
        return votes.clamp_min(1e-9).log()


@dataclass(frozen=True)
class KNNFitter:
    """Holds one pool, in which each column of `rows` marks the neighbours that count."""

    pool: Items
    classes: int

    @classmethod
    def on(cls, pool: Items, train: Tensor, classes: int, device: str) -> "KNNFitter":
        return cls(pool.to(device), classes)

    @property
    def block(self) -> int:
        """All problems share one product of cosines."""
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
                    if (
                        found is None or last is None or not torch.equal(own, last)
                    ):  # candidates share their neighbours
                        found, last = probe.nearest(cosines, own, most), own
                    k = int(setting["k"])
                    columns.append(
                        probe.vote(found[0][:, :k], found[1][:, :k], setting["temperature"])
                    )
                parts.append(torch.stack(columns, 1))
            return torch.cat(parts)

        return FittedProbes(scores)
