"""Nearest-neighbour probe: without training, a clip is predicted to have the class of its most
similar training clips.

Features of each clip are scaled to unit length, so that similarity is a cosine. Votes are
weighted by exp(cosine / temperature) (Wu et al. 2018, section 3.4). X-ARES scales features
across samples instead, which is a mistake.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.probes.datasets import ClassDataset
from whisper_aut.probes.modules import Candidates, Probe

NEIGHBOURS = (1, 3, 5, 10, 20)
TEMPERATURES = (0.02, 0.07, 1.0)
MAX_SIMILARITIES = 1 << 26  # floats in one block of cosines


class KNNProbe(Probe):
    """J votes of cosine neighbours among the same items. There is nothing to train.

    Args:
        features: features of the items, `[I, D]`.
        targets: their classes, `[I]`.
        classes: number of classes, C.
        candidates: `k` (neighbours) and `temperature` of each head.
        mask: `[I, J]`, the items that are neighbours in each head. Defaults to all.
    """

    title = "nearest neighbours"
    answers = ("class",)
    candidates = tuple(
        {"k": k, "temperature": t} for k in NEIGHBOURS for t in TEMPERATURES if k > 1 or t == 1.0
    )
    version = 1
    seeded = False

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        classes: int,
        candidates: Candidates = ({"k": 10, "temperature": 0.07},),
        mask: Tensor | None = None,
    ):
        super().__init__()
        self.neighbours, self.targets, self.classes = F.normalize(features, dim=1), targets, classes
        self.settings = candidates
        everything = torch.ones(len(features), len(candidates), dtype=torch.bool)
        self.mask = (everything if mask is None else mask).to(features.device)

    @classmethod
    def max_heads(cls, dataset: ClassDataset) -> int:
        return max(1, MAX_SIMILARITIES // (dataset.pool_items * len(dataset.classes)))

    @classmethod
    def train_heads(
        cls, dataset: Any, candidates: Candidates, mask: Tensor, valid: Tensor | None, seed: int
    ) -> Self:
        pool = slice(dataset.pool_items)
        features, targets = dataset.features[pool], dataset.targets[pool]
        return cls(features, targets, len(dataset.classes), candidates, mask[pool])

    def forward(self, features: Tensor) -> Tensor:
        """Return log probabilities `[Q, J, C]` of features `[Q, D]`."""
        block = max(1, MAX_SIMILARITIES // len(self.neighbours))
        return torch.cat([self._votes(some) for some in features.split(block)])

    def _votes(self, features: Tensor) -> Tensor:
        cosines, largest_k = F.normalize(features, dim=1) @ self.neighbours.T, 0
        largest_k = max(int(setting["k"]) for setting in self.settings)
        columns, found, last = [], None, None
        for own, setting in zip(self.mask.T, self.settings, strict=True):
            # Consecutive candidates of a fold share their neighbours.
            if found is None or last is None or not torch.equal(own, last):
                kept, last = cosines[:, own], own
                found, indices = kept.topk(min(largest_k, kept.shape[1]), dim=1)
                classes = self.targets[own][indices]
            k = int(setting["k"])
            votes = torch.zeros(len(features), self.classes, device=features.device)
            weights = (found[:, :k] / setting["temperature"]).softmax(1)
            votes.scatter_add_(1, classes[:, :k], weights)
            columns.append(votes.clamp_min(1e-9).log())
        return torch.stack(columns, 1)
