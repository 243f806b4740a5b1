"""Many convex problems minimised side by side: L-BFGS with a history, a step and an end of its own for each.

In: a start `[R, J, C]` of J problems and a function that gives their J objectives. Out: the J optima, `[R, J, C]`. Used by `probes.linear`.
PyTorch's L-BFGS would take J problems for one: its line search is held up by the hardest, and its history mixes them. Here all that
problems share is the product that evaluates them; one that has converged leaves it. Source: Nocedal & Wright, Numerical
Optimization, algorithms 3.1 and 7.4.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 8
SUFFICIENT_DECREASE = 1e-4
MAX_HALVINGS = 10
LEAVE_SHARE = 0.2  # converged problems are dropped from the product once they are this share of it
CALM_STEPS = 2  # steps in a row that must bring less than the tolerance

Objective = Callable[[Tensor, Tensor], Tensor]  # (weights [R, j, C], which problems [j]) → objectives [j]


def minimise(objective: Objective, start: Tensor, *, max_steps: int, tolerance: float) -> Tensor:
    """Minimise J separate objectives until none falls by more than `tolerance` a step.

    The objectives must be convex and scaled so that a step of the gradient's own length is a sensible first one.
    """
    result = start.detach().clone()
    state = _State(objective, result.clone(), torch.arange(start.shape[1], device=start.device))
    for _ in range(max_steps):
        state.step(tolerance)
        done = state.calm >= CALM_STEPS
        if done.all():
            break
        if done.float().mean() > LEAVE_SHARE:
            result[:, state.problems[done]] = state.weight[:, done]
            state.keep(~done)
    result[:, state.problems] = state.weight
    return result


class _State:
    """Where the problems that are still running stand."""

    def __init__(self, objective: Objective, weight: Tensor, problems: Tensor):
        self.objective, self.weight, self.problems = objective, weight, problems
        self.value, self.gradient = self._evaluate(weight, problems)
        self.calm = torch.zeros(len(problems), dtype=torch.long, device=weight.device)
        self.history: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # step [R, j, C], change of gradient [R, j, C], 1 / their product [j]

    def step(self, tolerance: float) -> None:
        direction = self._direction()
        slope = _dot(self.gradient, direction)
        uphill = slope >= 0  # rounding, close to the optimum
        if uphill.any():
            direction = torch.where(uphill[:, None], -self.gradient, direction)
            slope = torch.where(uphill, -_dot(self.gradient, self.gradient), slope)
        weight, value, gradient = self._search(direction, slope)
        step, change = weight - self.weight, gradient - self.gradient
        product = _dot(step, change)
        inverse = torch.where(product > 1e-20, 1 / product.clamp(min=1e-20), 0.0)  # zero: this pair says nothing
        self.history = [*self.history[1 - MEMORY :], (step, change, inverse)]
        self.calm = torch.where(self.value - value <= tolerance, self.calm + 1, 0)
        self.weight, self.value, self.gradient = weight, value, gradient

    def keep(self, running: Tensor) -> None:
        """Go on with some of the problems only."""
        self.problems, self.value, self.calm = self.problems[running], self.value[running], self.calm[running]
        self.weight, self.gradient = self.weight[:, running], self.gradient[:, running]
        self.history = [(step[:, running], change[:, running], inverse[running]) for step, change, inverse in self.history]

    def _direction(self) -> Tensor:
        """The two-loop recursion: minus the inverse curvature times the gradient."""
        direction, shares = -self.gradient, []
        for step, change, inverse in reversed(self.history):
            share = inverse * _dot(step, direction)
            direction = direction - share[:, None] * change
            shares.append(share)
        if self.history:
            step, change, inverse = self.history[-1]
            known = inverse > 0
            length = torch.where(known, 1 / (inverse.clamp(min=1e-20) * _dot(change, change).clamp(min=1e-20)), 1.0)
            direction = direction * length[:, None]
        for (step, change, inverse), share in zip(self.history, reversed(shares), strict=True):
            direction = direction + (share - inverse * _dot(change, direction))[:, None] * step
        return direction

    def _search(self, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Halve each problem's step until its objective falls enough; a problem that finds no such step stays where it is."""
        weight = self.weight + direction
        value, gradient = self._evaluate(weight, self.problems)
        length = torch.ones_like(slope)
        for _ in range(MAX_HALVINGS):
            short = ~(value <= self.value + SUFFICIENT_DECREASE * length * slope)  # also where it is not a number
            if not short.any():
                return weight, value, gradient
            length[short] *= 0.5
            weight[:, short] = self.weight[:, short] + length[short, None] * direction[:, short]
            value[short], gradient[:, short] = self._evaluate(weight[:, short], self.problems[short])
        short = ~(value <= self.value)
        weight[:, short], value[short], gradient[:, short] = self.weight[:, short], self.value[short], self.gradient[:, short]
        return weight, value, gradient

    def _evaluate(self, weight: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            values = self.objective(leaf, problems)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner products per problem: `[R, j, C]` twice → `[j]`."""
    return (one * other).sum(0).sum(1)  # along memory, which einsum is not: four times faster
