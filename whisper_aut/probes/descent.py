"""Small networks trained together by Adam: each with its own learning rate, for as many epochs as validation asks for.

`descend` trains J problems as one, since Adam's step does not depend on the scale of a gradient: a problem that moves rate · φ instead
of θ takes steps of its own size. `DescentProbe` and `DescentFitter` are what the kinds share that answer with classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.fitting import FittedProbes, Setting, class_losses, fit
from whisper_aut.probes.items import Items

Values = dict[str, Tensor]
MAX_EPOCHS = 200
PATIENCE = 10  # epochs without an improvement after which training stops
MIN_IMPROVEMENT = 5e-3  # of the validation loss, as a fraction of it
MAX_BATCH_ITEMS, MIN_BATCH_ITEMS, MIN_STEPS = 1024, 32, 16
VALID_ITEMS = 4096  # items of a validation step


def descend(
    objectives: Callable[[Values, Tensor], Tensor], start: Mapping[str, Tensor], rates: Tensor, items: int, *, batch_items: int,
    seed: int = 0, epochs: int | None = None, validate: Callable[[Values], Tensor] | None = None, max_epochs: int = MAX_EPOCHS,
    patience: int = PATIENCE,
) -> tuple[Values, list[int]]:  # fmt: skip
    """Train J problems, and return their values `[J, …]` and the epochs that each was trained for.

    Either for `epochs` epochs, or until `validate` stops improving: each problem then keeps the values of its best epoch. Rates fall
    along one cosine over `max_epochs` in both cases, so that n epochs are the same n epochs.

    Args:
        objectives: (values, items of the step `[b]`) → `[J]`.
        items: how many there are; an epoch goes over all of them in an order that `seed` decides.
        validate: values → validation losses `[J]`, called after each epoch.
        patience: epochs without an improvement of `MIN_IMPROVEMENT` after which a problem stops.
    """
    generator = torch.Generator().manual_seed(seed)
    away = {name: torch.zeros_like(value).requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(away.values(), lr=1.0)
    steps = -(-items // batch_items)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_epochs * steps)
    best = {name: value.clone() for name, value in start.items()}
    best_loss = torch.full((len(rates),), torch.inf)
    best_epoch = torch.zeros(len(rates), dtype=torch.long)
    stopped = torch.zeros(len(rates), dtype=torch.bool)
    for epoch in range(1, (epochs or max_epochs) + 1):
        for chosen in torch.randperm(items, generator=generator).split(batch_items):
            optimizer.zero_grad()
            objectives(_values(start, away, rates), chosen).sum().backward()
            optimizer.step()
            schedule.step()
        if validate is None:
            continue
        with torch.no_grad():
            values = _values(start, away, rates)
            loss = validate(values).cpu()
        better = ~stopped & (loss < best_loss * (1 - MIN_IMPROVEMENT))
        for name, value in values.items():
            best[name][better] = value[better]
        best_loss = torch.where(better, loss, best_loss)
        best_epoch[better] = epoch
        stopped |= epoch - best_epoch >= patience  # for good, however long other problems go on
        if stopped.all():
            break
    if validate is not None:
        return best, best_epoch.clamp(min=1).tolist()
    values = {name: value.detach() for name, value in _values(start, away, rates).items()}
    return values, [epochs or max_epochs] * len(rates)


def batch_size(items: int, most: int = MAX_BATCH_ITEMS) -> int:
    """Return how many items a step sees: an epoch has at least `MIN_STEPS` steps, of `MIN_BATCH_ITEMS` or more."""
    return min(most, max(MIN_BATCH_ITEMS, items // MIN_STEPS))


def epochs_of(settings: Sequence[Setting]) -> int | None:
    """Return the number of epochs that settings name, which validation chose; None where they name none."""
    epochs = settings[0].get("epochs")
    return None if epochs is None else int(epochs)


def masked_means(losses: Tensor, rows: Tensor) -> Tensor:
    """Average `[b, J]` losses over the items `[b, J]` of each problem; a problem without any in this batch rests."""
    return (losses * rows).sum(0) / rows.sum(0).clamp(min=1)


def _values(start: Mapping[str, Tensor], away: Mapping[str, Tensor], rates: Tensor) -> Values:
    return {
        name: value + rates.view(-1, *[1] * (value.ndim - 1)) * away[name]
        for name, value in start.items()
    }


class DescentProbe(LightningModule):
    """J networks that give class scores, trained as one.

    Args:
        values: what is trained, each `[J, …]`.
        scores: (values, features of I items) → `[I, J, C]`.
        decayed: names of the values whose half squared norm, times a problem's `decay`, is added to its loss.
        settings: each problem's learning `rate` and `decay`, and `epochs` once they are chosen.
        seed: decides the order of batches.
        max_batch_items: the most items that a step sees.
    """

    def __init__(
        self,
        values: Values,
        scores: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        decayed: Sequence[str],
        settings: Sequence[Setting],
        seed: int = 0,
        max_batch_items: int = MAX_BATCH_ITEMS,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.values = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        )
        self.scores, self.decayed = scores, tuple(decayed)
        self.seed, self.max_batch_items, self.chosen_epochs = (
            seed,
            max_batch_items,
            epochs_of(settings),
        )
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.decays = torch.tensor([setting["decay"] for setting in settings])
        self.epochs: list[int] = []

    def forward(self, features: Tensor) -> Tensor:
        """Features of I items → `[I, J, C]`."""
        return self.scores(dict(self.values), features)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Features, answers and `rows` `[I, J]` of the items to train on; then the same of those to validate on, if there are any."""
        (features, answers, rows), valid = batch[:3], batch[3:]
        decays = self.decays.to(rows.device)

        def objectives(values: Values, chosen: Tensor) -> Tensor:
            losses = class_losses(self.scores(values, features[chosen]), answers[chosen])
            squares = torch.stack(
                [values[name].square().flatten(1).sum(1) for name in self.decayed]
            ).sum(0)
            return masked_means(losses, rows[chosen]) + 0.5 * decays * squares

        def validate(values: Values) -> Tensor:
            losses = [
                class_losses(self.scores(values, some), wanted)
                for some, wanted in zip(
                    *(part.split(VALID_ITEMS) for part in valid[:2]), strict=True
                )
            ]
            return masked_means(torch.cat(losses), valid[2])

        trained, self.epochs = descend(
            objectives, dict(self.values), self.rates.to(rows.device), len(features), seed=self.seed,
            batch_items=batch_size(len(features), self.max_batch_items), epochs=self.chosen_epochs,
            validate=validate if valid else None,
        )  # fmt: skip
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class DescentFitter:
    """Fits networks on one pool.

    Attributes:
        mean, deviation: of the features of the training split, by which all are standardised.
        probe: (settings, seed) → the networks, at their start.
        block: how many of them fit in memory together.
    """

    pool: Items
    mean: Tensor
    deviation: Tensor
    device: str
    probe: Callable[[Sequence[Setting], int], DescentProbe]
    block: int

    @classmethod
    def on(cls, pool: Items, train: Tensor, device: str, **parts: Any) -> "DescentFitter":
        """Prepare a pool; statistics are taken from the items `train` `[I]`."""
        mean, deviation = (
            pool.features[train].mean(0),
            pool.features[train].std(0, correction=0).clamp_min(1e-6),
        )
        return cls(pool, mean, deviation, device, **parts)

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        probe = self.probe(settings, seed)
        batch = self._batch(rows) + (() if valid is None else self._batch(valid))
        fit(probe, batch, self.device)
        probe = probe.to(self.device)
        return FittedProbes(
            lambda features: probe(self._standard(features).to(self.device)).detach(), probe.epochs
        )

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        used = rows.any(1)
        parts = (
            self._standard(self.pool.features[used]),
            self.pool.answers[used],
            rows[used].float(),
        )
        return tuple(part.to(self.device) for part in parts)  # pyright: ignore[reportReturnType]

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation
