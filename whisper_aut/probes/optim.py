"""Optimizers for the heads of a probe: each head, a row of parameters `[J, …]`, is a problem of its
own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = 0.9, 0.999
EPSILON = 1e-8  # added to the denominator, as a fraction of the learning rate


class HeadAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) with a learning rate and an L2 penalty for each head.

    The group option `lr` is a factor of all learning rates, which a scheduler may change.

    Args:
        params: parameters `[J, …]`, or groups of them. `decay` `[J]` of a group is the weight of
            half the squared norm that is added to the loss of each head.
        rates: the learning rate of each head, `[J]`.
    """

    def __init__(self, params: Iterable[Any], rates: Tensor):
        super().__init__(params, {"lr": 1.0, "decay": None})
        self.rates, self.steps = rates, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        beta_1, beta_2 = BETAS
        correction_1, correction_2 = 1 - beta_1**self.steps, 1 - beta_2**self.steps
        for group in self.param_groups:
            for parameter in group["params"]:
                shape = (-1, *[1] * (parameter.ndim - 1))
                rates, gradient = self.rates.view(shape), parameter.grad
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                if group["decay"] is not None:
                    gradient = gradient.addcmul(parameter, group["decay"].view(shape))
                state["mean"].lerp_(gradient, 1 - beta_1)
                state["square"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
                deviation = (state["square"] / correction_2).sqrt_().add_(EPSILON / rates)
                step = rates * (group["lr"] / correction_1)
                parameter.addcmul_(state["mean"] / deviation, step, value=-1)
        return loss


MEMORY = 8
SUFFICIENT_DECREASE = 1e-4
MAX_HALVINGS = 10
DROP_FRACTION = 0.2  # drop converged heads from the batch once they exceed this fraction of it
CALM_STEPS = 2  # consecutive steps below the tolerance until a head has converged
Closure = Callable[[], tuple[Tensor, Tensor]]  # returns losses [j] and gradients [j, …]


class BatchedLBFGS(torch.optim.Optimizer):
    """L-BFGS for many separate problems, each with a line search of its own.

    Like `torch.optim.LBFGS`, `step` calls its closure many times. Before each call, it sets
    `heads`, the indices `[j]` of the heads to evaluate, and `trial`, their weights `[j, …]`. The
    closure returns their losses `[j]` and gradients `[j, …]`. Losses must be positive, convex, and
    scaled so that the negative gradient is a sensible first step.

    Args:
        weight: the parameter, `[J, …]`.
        max_steps: largest number of iterations of a step.
    """

    def __init__(self, weight: nn.Parameter, max_steps: int = 300):
        super().__init__([weight], {"max_steps": max_steps})
        self.heads, self.trial = torch.arange(len(weight), device=weight.device), weight.detach()

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Closure, heads: Tensor, tolerance: float
    ) -> None:
        """Minimise the losses of some heads.

        Args:
            closure: see the class.
            heads: indices of the heads, `[j]`.
            tolerance: a head has converged after `CALM_STEPS` consecutive iterations with a
                smaller relative decrease.
        """
        (group,) = self.param_groups
        (weight,) = group["params"]

        def evaluate(trial: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
            self.trial, self.heads = trial.unflatten(1, weight.shape[1:]), chosen
            losses, gradients = closure()
            return losses, gradients.flatten(1)

        rows, heads = weight.flatten(1), heads.to(weight.device)
        running = _LBFGSState(evaluate, rows[heads], heads)
        for _ in range(group["max_steps"]):
            running.step(tolerance)
            done = running.calm >= CALM_STEPS
            if done.all():
                break
            if done.float().mean() > DROP_FRACTION:
                rows[running.heads[done]] = running.weight[done]
                running.keep(~done)
        rows[running.heads] = running.weight


class _LBFGSState:
    """The heads that have not converged yet.

    `history` is `[j, 2 · MEMORY + 1, P]`: steps, the changes of the gradient over them, and the
    current gradient. `products` holds their inner products. Unused slots are zero.
    """

    def __init__(
        self, evaluate: Callable[..., tuple[Tensor, Tensor]], weight: Tensor, heads: Tensor
    ):
        self.evaluate, self.weight, self.heads = evaluate, weight, heads
        self.value, gradient = evaluate(weight, heads)
        self.calm = torch.zeros(len(heads), dtype=torch.long, device=weight.device)
        size = 2 * MEMORY + 1
        self.history = weight.new_zeros(len(heads), size, weight.shape[1])
        self.products = torch.zeros(
            len(heads), size, size, dtype=torch.double, device=weight.device
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
        for name in ("heads", "value", "calm", "weight", "history", "products"):
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
        """Halve each head's step until its loss decreases enough. A head whose loss would still
        rise stays where it is.
        """
        weight = self.weight + direction
        value, gradient = self.evaluate(weight, self.heads)
        length = torch.ones_like(slope)
        for _ in range(MAX_HALVINGS):
            # The negation also marks NaN.
            short = ~(value <= self.value + SUFFICIENT_DECREASE * length * slope)
            if not short.any():
                return weight, value, gradient
            length[short] *= 0.5
            step = length[short, None].to(weight.dtype) * direction[short]
            weight[short] = self.weight[short] + step
            value[short], gradient[short] = self.evaluate(weight[short], self.heads[short])
        short = ~(value <= self.value)
        weight[short], value[short] = self.weight[short], self.value[short]
        gradient[short] = self.history[short, -1]
        return weight, value, gradient
