"""Many small networks trained side by side by Adam, each with a learning rate of its own.

In: starting values `[J, …]` of J problems, their rates `[J]`, a function that gives their J objectives on some items. Out: the trained
values. Used by the probe kinds that are not convex. One optimiser serves all: Adam's step does not depend on the scale of a gradient, so
a problem that moves rate · φ instead of θ takes steps of its own size. `DescentProbe` and `DescentFitter` are what such kinds share when
they answer with classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.fitting import Setting, class_losses, fit
from whisper_aut.probes.items import Items

Values = dict[str, Tensor]
STEPS = 300
BATCH_ITEMS = 1024


def descend(
    objectives: Callable[[Values, Tensor], Tensor], start: Mapping[str, Tensor], rates: Tensor, items: int, *, steps: int = STEPS,
    batch_items: int = BATCH_ITEMS, seed: int = 0,
) -> Values:  # fmt: skip
    """Run Adam with a cosine decay of the rates.

    Args:
        objectives: (values, items of the step `[b]`) → `[J]`.
        items: how many there are; steps go over them in shuffled batches.
    """
    generator = torch.Generator().manual_seed(seed)
    away = {name: torch.zeros_like(value).requires_grad_() for name, value in start.items()}
    optimiser = torch.optim.Adam(away.values(), lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.randperm(items, generator=generator)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(items, generator=generator)
        chosen, order = order[:batch_items], order[batch_items:]
        optimiser.zero_grad()
        objectives(_values(start, away, rates), chosen).sum().backward()
        optimiser.step()
        schedule.step()
    return {name: value.detach() for name, value in _values(start, away, rates).items()}


def _values(start: Mapping[str, Tensor], away: Mapping[str, Tensor], rates: Tensor) -> Values:
    return {
        name: value + rates.view(-1, *[1] * (value.ndim - 1)) * away[name]
        for name, value in start.items()
    }


def masked_means(losses: Tensor, rows: Tensor) -> Tensor:
    """Average `[b, J]` losses over the items `[b, J]` of each problem; a problem without any in this batch rests."""
    return (losses * rows).sum(0) / rows.sum(0).clamp(min=1)


class DescentProbe(LightningModule):
    """J networks that give class scores, trained as one.

    Args:
        values: what is trained, each `[J, …]`.
        scores: (values, features of I items) → `[I, J, C]`.
        decayed: names of the values whose half squared norm, times a problem's `decay`, is added to its loss.
        settings: each problem's learning `rate` and `decay`.
        batch_items: how many a step sees.
    """

    def __init__(
        self,
        values: Values,
        scores: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        decayed: Sequence[str],
        settings: Sequence[Setting],
        batch_items: int = BATCH_ITEMS,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.values = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        )
        self.scores, self.decayed, self.batch_items = scores, tuple(decayed), batch_items
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.decays = torch.tensor([setting["decay"] for setting in settings])

    def forward(self, features: Tensor) -> Tensor:
        """Features of I items → `[I, J, C]`."""
        return self.scores(dict(self.values), features)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        features, answers, rows = batch
        decays = self.decays.to(features.device)

        def objectives(values: Values, chosen: Tensor) -> Tensor:
            losses = class_losses(self.scores(values, features[chosen]), answers[chosen])
            squares = torch.stack(
                [values[name].square().flatten(1).sum(1) for name in self.decayed]
            ).sum(0)
            return masked_means(losses, rows[chosen]) + 0.5 * decays * squares

        rates = self.rates.to(features.device)
        trained = descend(
            objectives, dict(self.values), rates, len(features), batch_items=self.batch_items
        )
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class DescentFitter:
    """Fits networks on one pool: `fitter(rows, settings, thorough)` gives a function from features to class scores.

    Attributes:
        mean, deviation: of the features of the clips that are trained on, by which all are standardised.
        probe: settings → the networks, at their start.
        block: how many of them fit in memory side by side.
    """

    pool: Items
    mean: Tensor
    deviation: Tensor
    device: str
    probe: Callable[[Sequence[Setting]], DescentProbe]
    block: int

    @classmethod
    def on(cls, pool: Items, sampled: Tensor, device: str, **parts: Any) -> "DescentFitter":
        mean, deviation = (
            pool.features[sampled].mean(0),
            pool.features[sampled].std(0, correction=0).clamp_min(1e-6),
        )
        return cls(pool, mean, deviation, device, **parts)

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], thorough: bool
    ) -> Callable[[Tensor], Tensor]:
        used = rows.any(1)
        probe = self.probe(settings)
        features = self._standard(self.pool.features[used]).to(self.device)
        fit(
            probe,
            (features, self.pool.answers[used].to(self.device), rows[used].float().to(self.device)),
            self.device,
        )
        probe = probe.to(self.device)
        return lambda features: probe(self._standard(features).to(self.device)).detach()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation
