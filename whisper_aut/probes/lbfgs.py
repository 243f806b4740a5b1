"""Many convex problems minimised side by side: L-BFGS with a history, a step and an end of its own for each.

In: a start `[J, P]` of J problems of P numbers each and a function that gives their J objectives and gradients. Out: the J optima,
`[J, P]`. Used by `probes.linear`. PyTorch's L-BFGS would take J problems for one: its line search is held up by the hardest, and its
history mixes them. Here all that problems share is the product that evaluates them; one that has converged leaves it.

A step reads the history twice, once for its inner products and once for their combination; the two-loop recursion itself runs
on a few coefficients a problem. Sources: Nocedal & Wright, Numerical Optimization, algorithms 3.1 and 7.4; Chen et al. 2014,
Large-scale L-BFGS using MapReduce, for the recursion on inner products.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 8
SUFFICIENT_DECREASE = 1e-4
MAX_HALVINGS = 10
LEAVE_SHARE = 0.2  # converged problems are dropped from the product once they are this share of it
CALM_STEPS = 2  # steps in a row that must bring less than the tolerance

Objective = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # (weights [j, P], which problems [j]) → objectives [j], gradients [j, P]


def minimise(objective: Objective, start: Tensor, *, max_steps: int, tolerance: float) -> Tensor:
    """Minimise J separate objectives until none falls by more than a share `tolerance` of itself in a step.

    The objectives must be positive, convex and scaled so that a step of the gradient's own length is a sensible first one.
    """
    result = start.detach().clone()
    state = _State(objective, result.clone(), torch.arange(len(start), device=start.device))
    for _ in range(max_steps):
        state.step(tolerance)
        done = state.calm >= CALM_STEPS
        if done.all():
            break
        if done.float().mean() > LEAVE_SHARE:
            result[state.problems[done]] = state.weight[done]
            state.keep(~done)
    result[state.problems] = state.weight
    return result


class _State:
    """Where the problems that are still running stand.

    `history` is `[j, 2 · MEMORY + 1, P]`: steps, the changes of gradient that they brought, and the gradient; `products` are
    their inner products. A slot that is still empty is all zeros.
    """

    def __init__(self, objective: Objective, weight: Tensor, problems: Tensor):
        self.objective, self.weight, self.problems = objective, weight, problems
        self.value, gradient = objective(weight, problems)
        self.calm = torch.zeros(len(problems), dtype=torch.long, device=weight.device)
        self.history = weight.new_zeros(len(problems), 2 * MEMORY + 1, weight.shape[1])
        self.products = torch.zeros(
            len(problems), 2 * MEMORY + 1, 2 * MEMORY + 1, dtype=torch.double, device=weight.device
        )
        self.steps = 0
        self._note([2 * MEMORY], gradient[:, None])

    def step(self, tolerance: float) -> None:
        shares = self._shares()
        slope = (self.products[:, -1] * shares).sum(1)
        uphill = slope >= 0  # rounding, close to the optimum
        if uphill.any():
            shares[uphill] = 0
            shares[uphill, -1] = -1
            slope = torch.where(uphill, -self.products[:, -1, -1], slope)
        direction = torch.bmm(shares[:, None].to(self.history.dtype), self.history)[:, 0]
        weight, value, gradient = self._search(direction, slope)
        slot = self.steps % MEMORY
        changes = torch.stack([weight - self.weight, gradient - self.history[:, -1], gradient], 1)
        self._note([slot, MEMORY + slot, 2 * MEMORY], changes)
        self.calm = torch.where(self.value - value <= tolerance * self.value, self.calm + 1, 0)
        self.weight, self.value, self.steps = weight, value, self.steps + 1

    def keep(self, running: Tensor) -> None:
        """Go on with some of the problems only."""
        for name in ("problems", "value", "calm", "weight", "history", "products"):
            setattr(self, name, getattr(self, name)[running])

    def _note(self, slots: list[int], vectors: Tensor) -> None:
        """Put vectors `[j, n, P]` into n slots of the history."""
        self.history[:, slots] = vectors
        products = torch.bmm(
            vectors, self.history.mT
        ).double()  # this way round three times as fast as the other
        self.products[:, slots] = products
        self.products[:, :, slots] = products.mT

    def _shares(self) -> Tensor:
        """The two-loop recursion for minus the inverse curvature times the gradient: its shares `[j, 2 · MEMORY + 1]` of the history."""
        products, taken = self.products, []
        shares = products.new_zeros(products.shape[:2])
        shares[:, -1] = -1
        order = [step % MEMORY for step in range(max(0, self.steps - MEMORY), self.steps)]
        curvature = products.diagonal(MEMORY, 1, 2)[:, :MEMORY]  # step · change, of each pair
        inverse = torch.where(
            curvature > 1e-20, 1 / curvature.clamp(min=1e-20), 0.0
        )  # zero: this pair says nothing
        for slot in reversed(order):
            share = inverse[:, slot] * (products[:, slot] * shares).sum(1)
            shares[:, MEMORY + slot] -= share
            taken.append(share)
        if order:
            slot = order[-1]
            square = products[:, MEMORY + slot, MEMORY + slot].clamp(min=1e-20)
            shares *= torch.where(inverse[:, slot] > 0, curvature[:, slot] / square, 1.0)[:, None]
        for slot, share in zip(order, reversed(taken), strict=True):
            shares[:, slot] += share - inverse[:, slot] * (products[:, MEMORY + slot] * shares).sum(
                1
            )
        return shares

    def _search(self, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Halve each problem's step until its objective falls enough; a problem that finds no such step stays where it is."""
        weight = self.weight + direction
        value, gradient = self.objective(weight, self.problems)
        length = torch.ones_like(slope)
        for _ in range(MAX_HALVINGS):
            short = ~(
                value <= self.value + SUFFICIENT_DECREASE * length * slope
            )  # also where it is not a number
            if not short.any():
                return weight, value, gradient
            length[short] *= 0.5
            weight[short] = (
                self.weight[short] + length[short, None].to(weight.dtype) * direction[short]
            )
            value[short], gradient[short] = self.objective(weight[short], self.problems[short])
        short = ~(value <= self.value)
        weight[short], value[short], gradient[short] = (
            self.weight[short],
            self.value[short],
            self.history[short, -1],
        )
        return weight, value, gradient
