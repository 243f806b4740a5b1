"""The probe with one hidden layer: what an encoder holds that no plane separates.

In: items `[I, D]`. Out: class scores `[I, J, C]`. Next: `probes.selection`, which chooses learning rate and decay on validation clips.
All seeds, inner folds, rates and decays are one batch of networks. Features are standardised by the clips that are trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.descent import descend, masked_means
from whisper_aut.probes.fitting import Setting, class_losses, fit
from whisper_aut.probes.items import Items

MLP_VERSION = 1
HIDDEN = 256
CANDIDATES: tuple[Setting, ...] = tuple({"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2))
MAX_ACTIVATIONS = 1 << 26


class MLPProbe(LightningModule):
    """J networks D → H → C, trained as one.

    Args:
        settings: each problem's learning `rate` and `decay` (half the squared weights, times this, is added to its loss).
    """

    def __init__(self, width: int, classes: int, settings: Sequence[Setting], hidden: int = HIDDEN, seed: int = 0):
        super().__init__()
        self.automatic_optimization = False
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randn(width, hidden, generator=generator), torch.randn(hidden, classes, generator=generator)
        count = len(settings)  # all start alike, so that settings are compared and not starts
        values = {
            "first": (first * (2 / width) ** 0.5).repeat(count, 1, 1),
            "first_bias": torch.zeros(count, hidden),
            "second": (second * hidden**-0.5).repeat(count, 1, 1),
            "second_bias": torch.zeros(count, classes),
        }
        self.values = nn.ParameterDict({name: nn.Parameter(value, requires_grad=False) for name, value in values.items()})
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.decays = torch.tensor([setting["decay"] for setting in settings])

    def forward(self, features: Tensor) -> Tensor:
        """`[I, D]` → `[I, J, C]`."""
        return _scores(dict(self.values), features)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        features, answers, rows = batch
        decays = self.decays.to(features.device)

        def objectives(values: dict[str, Tensor], chosen: Tensor) -> Tensor:
            losses = class_losses(_scores(values, features[chosen]), answers[chosen])
            squares = values["first"].square().sum((1, 2)) + values["second"].square().sum((1, 2))
            return masked_means(losses, rows[chosen]) + 0.5 * decays * squares

        trained = descend(objectives, dict(self.values), self.rates.to(features.device), len(features))
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class MLPFitter:
    """Fits networks on one pool: `fitter(rows, settings, thorough)` gives a function from features to class scores."""

    pool: Items
    mean: Tensor
    deviation: Tensor
    classes: int
    device: str

    @classmethod
    def on(cls, pool: Items, sampled: Tensor, classes: int, device: str) -> "MLPFitter":
        mean, deviation = pool.features[sampled].mean(0), pool.features[sampled].std(0, correction=0).clamp_min(1e-6)
        return cls(pool, mean, deviation, classes, device)

    @property
    def block(self) -> int:
        items, width = len(self.pool.features), self.pool.features.shape[-1]
        return max(1, MAX_ACTIVATIONS // (HIDDEN * (items + 8 * width)))

    def __call__(self, rows: Tensor, settings: Sequence[Setting], thorough: bool) -> Callable[[Tensor], Tensor]:
        used = rows.any(1)
        probe = MLPProbe(self.pool.features.shape[-1], self.classes, settings)
        features = self._standard(self.pool.features[used]).to(self.device)
        fit(probe, (features, self.pool.answers[used].to(self.device), rows[used].float().to(self.device)), self.device)
        probe = probe.to(self.device)
        return lambda features: probe(self._standard(features).to(self.device)).detach()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


def _scores(values: dict[str, Tensor], features: Tensor) -> Tensor:
    problems, width, hidden = values["first"].shape
    wide = values["first"].transpose(0, 1).reshape(width, problems * hidden)
    inner = torch.relu((features @ wide).unflatten(1, (problems, hidden)) + values["first_bias"])
    return torch.einsum("ijh,jhc->ijc", inner, values["second"]) + values["second_bias"]
