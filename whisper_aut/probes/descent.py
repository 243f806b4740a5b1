"""Many small networks trained side by side by Adam, each with a learning rate of its own.

In: starting values `[J, …]` of J problems, their rates `[J]`, a function that gives their J objectives on some items. Out: the trained
values. Used by the probe kinds that are not convex. One optimiser serves all: Adam's step does not depend on the scale of a gradient, so
a problem that moves rate · φ instead of θ takes steps of its own size.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

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
    return {name: value + rates.view(-1, *[1] * (value.ndim - 1)) * away[name] for name, value in start.items()}


def masked_means(losses: Tensor, rows: Tensor) -> Tensor:
    """Average `[b, J]` losses over the items `[b, J]` of each problem; a problem without any in this batch rests."""
    return (losses * rows).sum(0) / rows.sum(0).clamp(min=1)
