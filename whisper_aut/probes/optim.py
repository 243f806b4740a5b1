"""How heads are trained: `fit` runs Lightning's Trainer on batches of a dataset, and `minimise` is
L-BFGS for the many independent problems of a linear probe.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import ceil

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from whisper_aut.probes.datasets import ProbeDataset

# FLOPs per step below which several threads are slower than one, up to 30 times on a busy machine.
ONE_THREAD_FLOPS = 4e9
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


# In a validation hook, parameters created in inference mode would silently never train.
@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    probe: LightningModule,
    batches: Iterable[tuple[Tensor, ...]],
    valid: Iterable[tuple[Tensor, ...]] | None = None,
    *,
    device: str = "cpu",
    max_epochs: int = 1,
) -> None:
    """Train a probe in place.

    Args:
        probe: the probe. It is left in eval mode.
        batches: a `HeadLoader`, or a `DataLoader` of inputs, targets and the mask `[b, J]` of the
            items of each head.
        valid: likewise, for early stopping.
        device: `cpu`, `cuda` or `cuda:N`.
        max_epochs: largest number of epochs.
    """
    accelerator, _, number = device.partition(":")
    count = THREADS
    if isinstance(batches, HeadLoader):
        largest = max(parameter.numel() for parameter in probe.parameters())
        count = 1 if 4 * len(batches.items) * largest < ONE_THREAD_FLOPS else THREADS
    assert not any(parameter.is_inference() for parameter in probe.parameters()), (
        "a probe made in inference mode never trains"
    )
    with _quiet_trainer(), threads(count):
        trainer = Trainer(
            accelerator=accelerator,
            devices=[int(number)] if number else 1,
            max_epochs=max_epochs,
            barebones=True,
            inference_mode=False,
            # One process, even inside a run started by torchrun or Slurm.
            plugins=[LightningEnvironment()],
        )
        trainer.fit(probe, batches, valid)
    probe.to(device).eval()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Mute Lightning's messages about devices and missing loops, which every fit would repeat."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class HeadLoader:
    """Batches of a dataset, each followed by the mask `[b, J]` of the heads.

    Args:
        dataset: the dataset.
        mask: `[I, J]`, the items of each head. Only items of at least one head are loaded.
        batch_items: number of items per batch; None for one batch of all items.
        seed: shuffles the items in every epoch, and decides what the dataset draws. None for the
            order of the dataset.
    """

    def __init__(
        self, dataset: ProbeDataset, mask: Tensor, batch_items: int | None, seed: int | None = None
    ):
        self.dataset, self.mask = dataset, mask.float()
        self.items = torch.nonzero(mask.any(1))[:, 0]
        self.batch_items = batch_items or len(self.items)
        self.order = self.draws = None
        if seed is not None:
            self.order, self.draws = (torch.Generator().manual_seed(seed) for _ in range(2))

    def __len__(self) -> int:
        return ceil(len(self.items) / self.batch_items)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        items = self.items
        if self.order is not None:
            items = items[torch.randperm(len(items), generator=self.order)]
        for chosen in items.split(self.batch_items):
            batch = self.dataset.batch(chosen, self.draws)
            yield *batch, self.mask[chosen].to(self.dataset.device)


MEMORY = 8
SUFFICIENT_DECREASE = 1e-4
MAX_HALVINGS = 10
DROP_FRACTION = 0.2  # drop converged problems from the batch once they exceed this fraction of it
CALM_STEPS = 2  # consecutive steps below the tolerance until a problem has converged

# (weights [j, P], problem indices [j]) → objectives [j], gradients [j, P]
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def minimise(objective: Objective, start: Tensor, *, max_steps: int, tolerance: float) -> Tensor:
    """Minimise J separate objectives until none falls by more than a relative `tolerance` per step.

    Args:
        objective: the objectives. They must be positive, convex, and scaled so that the negative
            gradient is a sensible first step.
        start: starting points `[J, P]`.
        max_steps: largest number of steps.
        tolerance: a problem has converged after `CALM_STEPS` consecutive steps with a smaller
            relative decrease.

    Returns:
        The minima, `[J, P]`.
    """
    result = start.detach().clone()
    state = _State(objective, result.clone(), torch.arange(len(start), device=start.device))
    for _ in range(max_steps):
        state.step(tolerance)
        done = state.calm >= CALM_STEPS
        if done.all():
            break
        if done.float().mean() > DROP_FRACTION:
            result[state.problems[done]] = state.weight[done]
            state.keep(~done)
    result[state.problems] = state.weight
    return result


class _State:
    """State of the problems that are still running.

    `history` is `[j, 2 · MEMORY + 1, P]`: steps, the changes of the gradient over them, and the
    current gradient. `products` holds their inner products. Unused slots are zero.
    """

    def __init__(self, objective: Objective, weight: Tensor, problems: Tensor):
        self.objective, self.weight, self.problems = objective, weight, problems
        self.value, gradient = objective(weight, problems)
        self.calm = torch.zeros(len(problems), dtype=torch.long, device=weight.device)
        size = 2 * MEMORY + 1
        self.history = weight.new_zeros(len(problems), size, weight.shape[1])
        self.products = torch.zeros(
            len(problems), size, size, dtype=torch.double, device=weight.device
        )
        self.steps = 0
        self._store([2 * MEMORY], gradient[:, None])

    def step(self, tolerance: float) -> None:
        coefficients = self._direction()
        slope = (self.products[:, -1] * coefficients).sum(1)
        uphill = slope >= 0  # from rounding errors close to the optimum
        if uphill.any():
            coefficients[uphill] = 0
            coefficients[uphill, -1] = -1
            slope = torch.where(uphill, -self.products[:, -1, -1], slope)
        direction = torch.bmm(coefficients[:, None].to(self.history.dtype), self.history)[:, 0]
        weight, value, gradient = self._line_search(direction, slope)
        slot = self.steps % MEMORY
        changes = torch.stack([weight - self.weight, gradient - self.history[:, -1], gradient], 1)
        self._store([slot, MEMORY + slot, 2 * MEMORY], changes)
        self.calm = torch.where(self.value - value <= tolerance * self.value, self.calm + 1, 0)
        self.weight, self.value, self.steps = weight, value, self.steps + 1

    def keep(self, running: Tensor) -> None:
        for name in ("problems", "value", "calm", "weight", "history", "products"):
            setattr(self, name, getattr(self, name)[running])

    def _store(self, slots: list[int], vectors: Tensor) -> None:
        """Store vectors `[j, n, P]` in n slots of the history."""
        self.history[:, slots] = vectors
        # This order of operands is three times as fast as the other.
        products = torch.bmm(vectors, self.history.mT).double()
        self.products[:, slots] = products
        self.products[:, :, slots] = products.mT

    def _direction(self) -> Tensor:
        """Return the search direction as coefficients `[j, 2 · MEMORY + 1]` of `history`: the
        two-loop recursion for minus the inverse Hessian times the gradient.
        """
        products, alphas = self.products, []
        found = products.new_zeros(products.shape[:2])
        found[:, -1] = -1
        order = [step % MEMORY for step in range(max(0, self.steps - MEMORY), self.steps)]
        # Inner product of step and gradient change for each pair; pairs near zero are ignored.
        curvature = products.diagonal(MEMORY, 1, 2)[:, :MEMORY]
        inverse = torch.where(curvature > 1e-20, 1 / curvature.clamp(min=1e-20), 0.0)
        for slot in reversed(order):
            alpha = inverse[:, slot] * (products[:, slot] * found).sum(1)
            found[:, MEMORY + slot] -= alpha
            alphas.append(alpha)
        if order:
            slot = order[-1]
            square = products[:, MEMORY + slot, MEMORY + slot].clamp(min=1e-20)
            found *= torch.where(inverse[:, slot] > 0, curvature[:, slot] / square, 1.0)[:, None]
        for slot, alpha in zip(order, reversed(alphas), strict=True):
            beta = inverse[:, slot] * (products[:, MEMORY + slot] * found).sum(1)
            found[:, slot] += alpha - beta
        return found

    def _line_search(self, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Halve each problem's step until its objective decreases enough. A problem whose
        objective would still rise stays where it is.
        """
        weight = self.weight + direction
        value, gradient = self.objective(weight, self.problems)
        length = torch.ones_like(slope)
        for _ in range(MAX_HALVINGS):
            # The negation also marks NaN.
            short = ~(value <= self.value + SUFFICIENT_DECREASE * length * slope)
            if not short.any():
                return weight, value, gradient
            length[short] *= 0.5
            step = length[short, None].to(weight.dtype) * direction[short]
            weight[short] = self.weight[short] + step
            value[short], gradient[short] = self.objective(weight[short], self.problems[short])
        short = ~(value <= self.value)
        weight[short], value[short] = self.weight[short], self.value[short]
        gradient[short] = self.history[short, -1]
        return weight, value, gradient
