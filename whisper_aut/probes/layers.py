"""The probe over all layers: a softmax weight for each, learned with the linear head (SUPERB, Yang et al. 2021).

In: items `[I, layers, D]`. Out: class scores `[I, J, C]`. Next: `probes.selection`. Each layer is standardised by itself, so that a
layer of large numbers has no larger say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.descent import descend, masked_means
from whisper_aut.probes.fitting import Setting, class_losses, fit
from whisper_aut.probes.items import Items

LAYERS_VERSION = 1
CANDIDATES: tuple[Setting, ...] = tuple({"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1))
MAX_ACTIVATIONS = 1 << 26


class LayerWeightedProbe(LightningModule):
    """J linear probes, each on its own mixture of layers, trained as one.

    Args:
        settings: each problem's learning `rate` and `decay` of the linear weights.
    """

    def __init__(self, layers: int, width: int, classes: int, settings: Sequence[Setting]):
        super().__init__()
        self.automatic_optimization = False
        count = len(settings)
        values = {
            "shares": torch.zeros(count, layers),  # before the softmax: all layers alike
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        self.values = nn.ParameterDict({name: nn.Parameter(value, requires_grad=False) for name, value in values.items()})
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.decays = torch.tensor([setting["decay"] for setting in settings])

    def shares(self) -> Tensor:
        """Return what each layer counts, `[J, layers]`, summing to one."""
        return self.values["shares"].softmax(1)

    def forward(self, features: Tensor) -> Tensor:
        """`[I, layers, D]` → `[I, J, C]`."""
        return _scores(dict(self.values), features)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        features, answers, rows = batch
        decays = self.decays.to(features.device)

        def objectives(values: dict[str, Tensor], chosen: Tensor) -> Tensor:
            losses = class_losses(_scores(values, features[chosen]), answers[chosen])
            return masked_means(losses, rows[chosen]) + 0.5 * decays * values["weight"].square().sum((1, 2))

        trained = descend(objectives, dict(self.values), self.rates.to(features.device), len(features))
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class LayerFitter:
    """Fits layer-weighted probes on one pool: `fitter(rows, settings, thorough)` gives a function from features to class scores."""

    pool: Items
    mean: Tensor  # [layers, D]
    deviation: Tensor  # [layers, D]
    classes: int
    device: str

    @classmethod
    def on(cls, pool: Items, sampled: Tensor, classes: int, device: str) -> "LayerFitter":
        mean, deviation = pool.features[sampled].mean(0), pool.features[sampled].std(0, correction=0).clamp_min(1e-6)
        return cls(pool, mean, deviation, classes, device)

    @property
    def block(self) -> int:
        items, layers, width = self.pool.features.shape
        return max(1, MAX_ACTIVATIONS // (items * width + 8 * width * self.classes + layers))

    def __call__(self, rows: Tensor, settings: Sequence[Setting], thorough: bool) -> Callable[[Tensor], Tensor]:
        used = rows.any(1)
        _, layers, width = self.pool.features.shape
        probe = LayerWeightedProbe(layers, width, self.classes, settings)
        features = self._standard(self.pool.features[used]).to(self.device)
        fit(probe, (features, self.pool.answers[used].to(self.device), rows[used].float().to(self.device)), self.device)
        probe = probe.to(self.device)
        return lambda features: probe(self._standard(features).to(self.device)).detach()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


def _scores(values: dict[str, Tensor], features: Tensor) -> Tensor:
    mixed = torch.einsum("ild,jl->jid", features, values["shares"].softmax(1))
    return (mixed @ values["weight"] + values["bias"][:, None]).transpose(0, 1)
