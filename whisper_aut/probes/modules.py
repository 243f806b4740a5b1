"""Trained probes: linear, MLP, attention pooling, and weighted layers. J problems are fitted
together as one.

The linear probe is a multinomial (or multi-label) logistic regression with an L2 penalty, fitted
to convergence (Alain & Bengio 2016). Its objective is that of scikit-learn with C = 1 / penalty.
Ten epochs of a minibatch optimizer would leave it under-trained, and the ranking would then
reflect the optimizer rather than the encoder. The problem is convex, with one optimum and no
random start, so it is fitted once for all seeds.

The inner folds and penalties of one test part are J columns of one wide matrix product. The
other probes are trained by `descend`.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.onednn import product
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.fit import (
    ClassLearner,
    FittedProbes,
    Items,
    Setting,
    class_losses,
    fit,
    items_of,
)
from whisper_aut.probes.frames import Frames
from whisper_aut.probes.metrics import ANSWERS

MEMORY = 8
SUFFICIENT_DECREASE = 1e-4
MAX_HALVINGS = 10
LEAVE_SHARE = 0.2  # drop converged problems from the batch once they exceed this fraction of it
CALM_STEPS = 2  # consecutive steps below the tolerance until a problem has converged

# (weights [j, P], problem indices [j]) → objectives [j], gradients [j, P]
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def minimise(objective: Objective, start: Tensor, *, max_steps: int, tolerance: float) -> Tensor:
    """Minimise J separate objectives with L-BFGS until none falls by more than a relative
    `tolerance` per step.

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
        if done.float().mean() > LEAVE_SHARE:
            result[state.problems[done]] = state.weight[done]
            state.keep(~done)
    result[state.problems] = state.weight
    return result


class _State:
    """L-BFGS state of the problems that are still running.

    `history` is `[j, 2 · MEMORY + 1, P]`: steps, the changes of the gradient over them, and the
    current gradient. `products` holds their inner products. Unused slots are zero.
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
        uphill = slope >= 0  # from rounding errors close to the optimum
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
        """Keep only the marked problems."""
        for name in ("problems", "value", "calm", "weight", "history", "products"):
            setattr(self, name, getattr(self, name)[running])

    def _note(self, slots: list[int], vectors: Tensor) -> None:
        """Store vectors `[j, n, P]` in n slots of the history."""
        self.history[:, slots] = vectors
        # This order of operands is three times as fast as the other.
        products = torch.bmm(vectors, self.history.mT).double()
        self.products[:, slots] = products
        self.products[:, :, slots] = products.mT

    def _shares(self) -> Tensor:
        """Return the coefficients `[j, 2 · MEMORY + 1]` of the search direction in terms of
        `history`.

        This is the two-loop recursion for minus the inverse Hessian times the gradient.
        """
        products, taken = self.products, []
        shares = products.new_zeros(products.shape[:2])
        shares[:, -1] = -1
        order = [step % MEMORY for step in range(max(0, self.steps - MEMORY), self.steps)]
        # Inner product of step and gradient change for each pair; pairs near zero are ignored.
        curvature = products.diagonal(MEMORY, 1, 2)[:, :MEMORY]
        inverse = torch.where(curvature > 1e-20, 1 / curvature.clamp(min=1e-20), 0.0)
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


LINEAR_VERSION = 5  # increase whenever a change here affects a score
PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
LINEAR_CANDIDATES: tuple[Setting, ...] = tuple({"penalty": penalty} for penalty in PENALTIES)
MAX_SCORES = 1 << 22  # floats in one [I, J, C] block
MAX_WEIGHTS = 1 << 24  # floats in one [J, C, R] block, of which L-BFGS keeps about twenty
ROUGH_TOLERANCE = 1e-3  # for optima that only rank penalties, or that the next fit starts from
APPROACH = (1000.0, 100.0, 10.0)  # factors of the penalty on the way to a final fit
MAX_APPROACH = 10.0  # largest penalty on the way: its optimum is quickly found from zero
PATH_FLOPS = 1e9  # per step of all problems: above it, following a path of penalties is faster

# The last two optima of a path: penalties and weights.
Ends = deque[tuple[float, Tensor]]


@dataclass(frozen=True)
class Basis:
    """Maps features `[B, D]` to their standardised principal components `[B, R]`.

    Mean and deviation are those of the training clips. The rotation changes neither the penalty
    nor the optimum, since L2 is invariant to rotations and optimal weights lie in the span of
    the data. It makes the problem well conditioned, which saves four fifths of the L-BFGS steps.
    """

    mean: Tensor  # [D]
    deviation: Tensor  # [D]
    axes: Tensor  # [D, R]
    variances: Tensor  # [R]

    @classmethod
    def fit(cls, train: Tensor, others: Tensor) -> "Basis":
        """Compute statistics from `train` `[B, D]`. `others` (validation clips) only extend the
        span of the axes.
        """
        mean, deviation = train.mean(0), train.std(0, correction=0)
        # Constant features are not scaled.
        deviation = torch.where(deviation > 1e-7 * mean.abs().clamp_min(1e-6), deviation, 1.0)
        rows = ((torch.cat([train, others]) - mean) / deviation).double()
        if len(rows) < rows.shape[1]:
            values, vectors = torch.linalg.eigh(rows @ rows.T)
            kept = values > values[-1] * 1e-9
            axes = rows.T @ (vectors[:, kept] / values[kept].sqrt())
        else:
            values, axes = torch.linalg.eigh(rows.T @ rows)
            kept = values > values[-1] * 1e-9
            axes = axes[:, kept]
        return cls(mean, deviation, axes.float(), (values[kept] / len(rows)).float())

    def __call__(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.deviation) @ self.axes


class LinearProbe(LightningModule):
    """J independent logistic regressions trained as one batched problem.

    The objective of each is that of scikit-learn on its own items, summed loss + penalty / 2 ·
    |weight|², divided by the number of items. Problems with the same items and decreasing
    penalties form a path: each starts from an extrapolation of the two before it. `minimise`
    works in units in which the curvature at the start is about 1.

    Args:
        variances: variances of the features, `[R]`.
        classes: number of classes.
        penalties: one per problem.
        items: number of items each problem is fitted on: one number for all, or one per problem.
        multilabel: any number of classes per item, with one binary logistic regression per
            class.
        max_steps: largest number of steps per call of `minimise`.
        tolerance: relative tolerance of the last call.
        approach: factors applied one after another to the penalties on the way to their own
            values. Problems then do not start from each other.
    """

    penalties: Tensor
    variances: Tensor

    def __init__(
        self, variances: Tensor, classes: int, penalties: Sequence[float],
        items: int | Sequence[int], *,
        multilabel: bool = False, max_steps: int = 300, tolerance: float = 1e-6,
        approach: Sequence[float] = (),
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.multilabel, self.max_steps, self.tolerance, self.approach = (
            multilabel,
            max_steps,
            tolerance,
            approach,
        )
        # [J], as given. A path is ordered by these.
        self.grades = torch.tensor(penalties)
        # [J], scaled for a mean instead of a sum of losses.
        self.register_buffer("penalties", self.grades / torch.tensor(items))
        # [R + 1], with the bias last.
        self.register_buffer("variances", torch.cat([variances, torch.ones(1)]))
        self.weight = nn.Parameter(
            torch.zeros(len(penalties), classes, len(variances) + 1), requires_grad=False
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, R]`."""
        return _linear_scores(self.weight, _with_ones(features))

    def objectives(self, features: Tensor, answers: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the objectives `[J]` on features `[I, R]` and their answers.

        Args:
            features: features `[I, R]`.
            answers: classes `[I]`, or `[I, C]` of 0 and 1.
            rows: `[I, J]`, marks the items of each problem; None for all items.
        """
        return self._evaluate(
            self.weight, self.penalties, _with_ones(features), answers, self._shares(features, rows)
        )[0]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Fit all problems on one batch that holds all items.

        Args:
            batch: features `[I, R]` and answers, optionally followed by `rows` `[I, J]`, which
                marks the items of each problem.
            batch_idx: unused.
        """
        features, answers = batch[:2]
        rows = batch[2] if len(batch) > 2 else None
        shares, wide = self._shares(features, rows), _with_ones(features)
        paths = range(len(self.weight)) if self.approach else _alike(rows, len(self.weight))
        passed: dict[int, Ends] = defaultdict(lambda: deque(maxlen=2))
        for level, raised, tolerance in self._levels(len(features)):
            numbers, grades = level.tolist(), (self.grades[level] * raised).tolist()
            start = [
                _expected(passed[paths[n]], grade, self.weight[n])
                for n, grade in zip(numbers, grades, strict=True)
            ]
            ends = self._minimise(
                torch.stack(start),
                level,
                self.penalties[level] * raised,
                tolerance,
                wide,
                answers,
                shares,
            )
            self.weight[level] = ends
            for number, grade, end in zip(numbers, grades, ends, strict=True):
                path = passed[paths[number]]
                if not path or path[-1][0] > grade:
                    path.append((grade, end))

    def configure_optimizers(self) -> None:
        """Lightning's optimizers are not used: one training step runs `minimise` to its end."""

    def _levels(self, items: int) -> list[tuple[Tensor, float, float]]:
        """Return the sequence of calls to `minimise`: problems, factor of their penalties,
        tolerance.

        The largest penalties come first. If the cost of a step is mostly overhead, all problems
        run at once.
        """
        everything = torch.arange(len(self.weight))
        if 4 * items * self.weight.numel() < PATH_FLOPS:
            return [(everything, 1.0, self.tolerance)]
        if self.approach:
            low = [
                (torch.nonzero(self.grades * raised <= MAX_APPROACH)[:, 0], raised)
                for raised in self.approach
            ]
            return [
                *((level, raised, ROUGH_TOLERANCE) for level, raised in low if len(level)),
                (everything, 1.0, self.tolerance),
            ]
        levels = [
            torch.nonzero(self.grades == grade)[:, 0] for grade in self.grades.unique().flip(0)
        ]
        return [(level, 1.0, self.tolerance) for level in levels]

    def _minimise(
        self,
        start: Tensor,
        level: Tensor,
        penalties: Tensor,
        tolerance: float,
        features: Tensor,
        answers: Tensor,
        shares: Tensor,
    ) -> Tensor:
        level = level.to(start.device)
        scale = self._scale(start, penalties, features, shares[:, level])

        def objective(weight: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
            own, weights = scale[problems], shares[:, level[problems]]
            values, gradients = self._evaluate(
                weight.view_as(own) * own, penalties[problems], features, answers, weights
            )
            return values, (gradients * own).flatten(1)

        found = minimise(
            objective, (start / scale).flatten(1), max_steps=self.max_steps, tolerance=tolerance
        )
        return found.view_as(scale) * scale

    def _scale(self, start: Tensor, penalties: Tensor, features: Tensor, shares: Tensor) -> Tensor:
        """Return `[j, C, R + 1]`: the inverse square root of the curvature along each axis at
        the start.
        """
        scores = _linear_scores(start, features)
        chances = scores.sigmoid() if self.multilabel else scores.softmax(2)
        steepness = torch.einsum("ijc,ij->jc", chances * (1 - chances), shares).clamp(min=1e-8)
        curvature = (
            steepness[:, :, None] * self.variances + penalties[:, None, None] * self._penalised()
        )
        return (curvature + 1e-12).rsqrt()

    def _evaluate(
        self, weight: Tensor, penalties: Tensor, features: Tensor, answers: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return objectives `[j]` and gradients `[j, C, R + 1]`.

        The gradient is written out by hand to avoid the memory of an autograd graph.

        Args:
            shares: weight of each item in each problem, `[I, j]`.
        """
        scores = _linear_scores(weight, features)
        if answers.ndim == 2:
            wanted = answers[:, None].to(scores.dtype)
            losses = (F.softplus(scores) - scores * wanted).sum(2)
            slopes = (scores.sigmoid_() - wanted) * shares[:, :, None]
        else:
            place = answers[:, None, None].expand(-1, len(weight), 1)
            slopes = scores.log_softmax(2)
            losses = -slopes.gather(2, place)[:, :, 0]
            # Probabilities below exp(-30) have no effect on the gradient, but as denormal
            # numbers they would slow down every following product.
            slopes = (
                slopes.clamp_(min=-30)
                .exp_()
                .mul_(shares[:, :, None])
                .scatter_add_(2, place, -shares[:, :, None])
            )
        pull = penalties[:, None, None] * self._penalised() * weight
        gradients = product(slopes.flatten(1).T, features.T).view_as(weight) + pull
        return (losses * shares).sum(0, dtype=torch.double) + 0.5 * (pull * weight).sum(
            (1, 2), dtype=torch.double
        ), gradients

    def _shares(self, features: Tensor, rows: Tensor | None) -> Tensor:
        """Return the weight of each item in each problem, `[I, J]`."""
        rows = (
            torch.ones(len(features), len(self.weight), device=features.device)
            if rows is None
            else rows
        )
        return rows / rows.sum(0)

    def _penalised(self) -> Tensor:
        """Return `[R + 1]`: 1 for features, 0 for the bias."""
        penalised = torch.ones_like(self.variances)
        penalised[-1] = 0
        return penalised


@dataclass(frozen=True)
class LinearFitter:
    """Fits linear probes on one pool."""

    pool: Items
    basis: Basis
    rotated: Tensor  # [I, R]
    classes: int
    device: str

    @classmethod
    def on(cls, pool: Items, train: Tensor, classes: int, device: str) -> "LinearFitter":
        """Prepare a pool. Statistics are those of the items marked by `train` `[I]`, the
        training split.
        """
        basis = Basis.fit(pool.features[train], pool.features[~train])
        return cls(pool.to(device), basis, basis(pool.features).to(device), classes, device)

    @property
    def block(self) -> int:
        """Number of problems that are fitted at once."""
        items, rank = self.rotated.shape
        return max(
            1, min(MAX_SCORES // (items * self.classes), MAX_WEIGHTS // (rank * self.classes))
        )

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        """Fit one probe per column of `rows` `[I, J]`.

        With `valid`, probes only serve to rank penalties, so the tolerance is coarse. Otherwise
        they are fitted to convergence.
        """
        used = rows.any(1)
        rows, features, answers = (
            rows[used],
            self.rotated[used.to(self.device)],
            self.pool.answers[used.to(self.device)],
        )
        # A coarse tolerance is enough to rank penalties. Tolerances are relative to the loss,
        # since its optimum is tiny where classes are separable.
        effort = (
            {"max_steps": 300, "tolerance": 1e-5, "approach": APPROACH}
            if valid is None
            else {"max_steps": 60, "tolerance": ROUGH_TOLERANCE}
        )
        probe = LinearProbe(
            self.basis.variances, self.classes, [setting["penalty"] for setting in settings],
            rows.sum(0).tolist(), multilabel=answers.ndim == 2, **effort,
        )  # fmt: skip
        fit(probe, (features, answers, rows.float().to(self.device)), self.device)
        probe = probe.to(self.device)
        return FittedProbes(
            lambda features: probe(self.basis(features.cpu()).to(self.device)).detach()
        )


def _with_ones(features: Tensor) -> Tensor:
    """Append a feature that is always 1, whose weight is the bias: `[I, R]` → `[I, R + 1]`."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def _linear_scores(weight: Tensor, features: Tensor) -> Tensor:
    """Weights `[j, C, R + 1]` and features `[I, R + 1]` → scores `[I, j, C]`."""
    return product(features, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])


def _expected(path: Ends, penalty: float, otherwise: Tensor) -> Tensor:
    """Extrapolate a path to the next penalty, linearly in the logarithm of the penalty."""
    if len(path) < 2:
        return path[-1][1] if path else otherwise
    (before, one), (last, other) = path
    following = max(penalty, 1e-12 * last)  # a penalty of zero has no logarithm
    stride = math.log(last / following) / math.log(before / last)
    # The path is curved, so never extrapolate further than the previous distance.
    return other + min(stride, 1) * (other - one)


def _alike(rows: Tensor | None, problems: int) -> list[int]:
    """Number the columns of `rows` `[I, J]`: equal columns get equal numbers. Without `rows`,
    all are equal.
    """
    if rows is None:
        return [0] * problems
    numbers: dict[bytes, int] = {}
    return [
        numbers.setdefault(column.tobytes(), len(numbers)) for column in rows.T.bool().cpu().numpy()
    ]


Values = dict[str, Tensor]
MAX_EPOCHS = 200
PATIENCE = 10  # epochs without improvement after which training stops
MIN_IMPROVEMENT = 5e-3  # of the validation loss, as a fraction of it
MAX_BATCH_ITEMS, MIN_BATCH_ITEMS, MIN_STEPS = 1024, 32, 16
VALID_ITEMS = 4096  # items per validation step


def descend(
    objectives: Callable[[Values, Tensor], Tensor], start: Mapping[str, Tensor], rates: Tensor,
    items: int, *, batch_items: int,
    seed: int = 0, epochs: int | None = None, validate: Callable[[Values], Tensor] | None = None,
    max_epochs: int = MAX_EPOCHS,
    patience: int = PATIENCE,
) -> tuple[Values, list[int]]:  # fmt: skip
    """Train J problems with Adam, and return their values `[J, …]` and the number of epochs of
    each.

    Training runs for `epochs` epochs, or until `validate` stops improving, in which case each
    problem keeps the values of its best epoch. Learning rates follow one cosine schedule over
    `max_epochs` in both cases, so that epoch n uses the same learning rates either way.

    Args:
        objectives: (values, indices of the items of a step `[b]`) → objectives `[J]`.
        start: initial values, each `[J, …]`.
        rates: learning rates `[J]`.
        items: number of items. An epoch covers all of them in an order that `seed` decides.
        batch_items: number of items per step.
        seed: seed of the order of items.
        epochs: number of epochs; None for early stopping.
        validate: values → validation losses `[J]`, called after each epoch.
        max_epochs: largest number of epochs, and length of the learning rate schedule.
        patience: a problem stops after this many epochs without a relative improvement of
            `MIN_IMPROVEMENT`.
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
        # A stopped problem stays stopped while the others continue.
        stopped |= epoch - best_epoch >= patience
        if stopped.all():
            break
    if validate is not None:
        return best, best_epoch.clamp(min=1).tolist()
    values = {name: value.detach() for name, value in _values(start, away, rates).items()}
    return values, [epochs or max_epochs] * len(rates)


def batch_size(items: int, most: int = MAX_BATCH_ITEMS) -> int:
    """Return the number of items per step: an epoch has at least `MIN_STEPS` steps, unless that
    would need fewer than `MIN_BATCH_ITEMS` items per step.
    """
    return min(most, max(MIN_BATCH_ITEMS, items // MIN_STEPS))


def epochs_of(settings: Sequence[Setting]) -> int | None:
    """Return the number of epochs in the settings, as chosen by validation; None if they have
    none.
    """
    epochs = settings[0].get("epochs")
    return None if epochs is None else int(epochs)


def masked_means(losses: Tensor, rows: Tensor) -> Tensor:
    """Average losses `[b, J]` over the items of each problem, marked by `rows` `[b, J]`. The
    mean is 0 for a problem without items in this batch.
    """
    return (losses * rows).sum(0) / rows.sum(0).clamp(min=1)


def _values(start: Mapping[str, Tensor], away: Mapping[str, Tensor], rates: Tensor) -> Values:
    return {
        name: value + rates.view(-1, *[1] * (value.ndim - 1)) * away[name]
        for name, value in start.items()
    }


class DescentProbe(LightningModule):
    """J networks that give class scores, trained as one.

    Args:
        values: the parameters, each `[J, …]`.
        scores: (values, features of I items) → class scores `[I, J, C]`.
        decayed: names of the values with weight decay: half their squared norm, times a
            problem's `decay`, is added to its loss.
        settings: `rate` (learning rate) and `decay` of each problem, and `epochs` once chosen.
        seed: decides the order of batches.
        max_batch_items: largest number of items per step.
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
        """Return class scores `[I, J, C]` of the features of I items."""
        return self.scores(dict(self.values), features)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Train on one batch that holds all items.

        Args:
            batch: features, answers and `rows` `[I, J]` of the items to train on, optionally
                followed by the same for the items to validate on.
            batch_idx: unused.
        """
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
            objectives, dict(self.values), self.rates.to(rows.device), len(features),
            seed=self.seed,
            batch_items=batch_size(len(features), self.max_batch_items), epochs=self.chosen_epochs,
            validate=validate if valid else None,
        )  # fmt: skip
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """Lightning's optimizers are not used: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class DescentFitter:
    """Fits networks on one pool.

    Attributes:
        pool: the items.
        mean, deviation: statistics of the training split's features, by which all features are
            standardised.
        device: where probes are fitted.
        probe: (settings, seed) → initialised networks.
        block: number of networks that fit in memory together.
    """

    pool: Items
    mean: Tensor
    deviation: Tensor
    device: str
    probe: Callable[[Sequence[Setting], int], DescentProbe]
    block: int

    @classmethod
    def on(cls, pool: Items, train: Tensor, device: str, **parts: Any) -> "DescentFitter":
        """Prepare a pool. Statistics are those of the items marked by `train` `[I]`."""
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


MLP_VERSION = 2
HIDDEN = 256
MLP_CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
)
MAX_ACTIVATIONS = 1 << 26


class MLPProbe(DescentProbe):
    """J networks with one hidden layer, D → H → C, trained as one.

    Args:
        width: D.
        classes: C.
        settings: `rate` (learning rate) and `decay` of each problem. Half the squared weights,
            times `decay`, is added to its loss.
        seed: decides initial weights and the order of batches.
        hidden: H.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        settings: Sequence[Setting],
        seed: int = 0,
        hidden: int = HIDDEN,
    ):
        generator = torch.Generator().manual_seed(seed)
        first, second = (
            torch.randn(width, hidden, generator=generator),
            torch.randn(hidden, classes, generator=generator),
        )
        # All problems have the same initial weights, so that only their settings differ.
        count = len(settings)
        values = {
            "first": (first * (2 / width) ** 0.5).repeat(count, 1, 1),
            "first_bias": torch.zeros(count, hidden),
            "second": (second * hidden**-0.5).repeat(count, 1, 1),
            "second_bias": torch.zeros(count, classes),
        }
        super().__init__(values, _mlp_scores, ("first", "second"), settings, seed)


def mlp_fitter(pool: Items, train: Tensor, classes: int, device: str) -> DescentFitter:
    """Return a fitter of MLPs on one pool, with features standardised by the items marked by
    `train`.
    """
    items, width = pool.features.shape
    block = max(1, MAX_ACTIVATIONS // (HIDDEN * (items + 8 * width)))
    return DescentFitter.on(
        pool, train, device, probe=partial(MLPProbe, width, classes), block=block
    )


def _mlp_scores(values: Mapping[str, Tensor], features: Tensor) -> Tensor:
    problems, width, hidden = values["first"].shape
    wide = values["first"].transpose(0, 1).reshape(width, problems * hidden)
    inner = torch.relu((features @ wide).unflatten(1, (problems, hidden)) + values["first_bias"])
    return torch.einsum("ijh,jhc->ijc", inner, values["second"]) + values["second_bias"]


ATTENTION_VERSION = 2
ATTENTION_CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
)
BATCH_CLIPS = 64


class AttentionProbe(DescentProbe):
    """J linear probes on attention-pooled frames, each with its own query, trained as one. Clips
    are given by index, `[B]`.

    Args:
        frames: clip indices → frames.
        classes: C.
        settings: `rate` (learning rate) and `decay` of query and linear weights, per problem.
        seed: decides the order of batches. All weights start at zero.
    """

    def __init__(self, frames: Frames, classes: int, settings: Sequence[Setting], seed: int = 0):
        count, width = len(settings), len(frames.mean)
        values = {
            "query": torch.zeros(count, width),
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        super().__init__(
            values,
            partial(_attention_scores, frames),
            ("query", "weight"),
            settings,
            seed,
            BATCH_CLIPS,
        )


@dataclass(frozen=True)
class AttentionFitter:
    """Fits attention probes on clips given by index."""

    frames: Frames
    numbers: Tensor
    answers: Tensor
    classes: int
    device: str
    block: int

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        probe = AttentionProbe(self.frames, self.classes, settings, seed)
        batch = self._batch(rows) + (() if valid is None else self._batch(valid))
        fit(probe, batch, self.device)
        probe = probe.to(self.device)
        return FittedProbes(lambda numbers: probe(numbers).detach(), probe.epochs)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        used = rows.any(1)
        parts = self.numbers[used], self.answers[used], rows[used].float()
        return tuple(part.to(self.device) for part in parts)  # pyright: ignore[reportReturnType]


def attention_learner(
    pool: Embeddings,
    train: np.ndarray,
    test: Embeddings,
    metric: str,
    classes: Sequence[str],
    device: str,
) -> ClassLearner:
    """Return a learner on the frames of a round, standardised by those of the training split."""
    taken = np.concatenate([train, np.zeros(len(test), dtype=bool)])
    frames = Frames([*pool.frames, *test.frames], taken, device)
    numbers = torch.arange(len(pool) + len(test)).split([len(pool), len(test)])
    items, tested = (
        items_of(replace(part, features=own), ANSWERS[metric], classes)
        for part, own in zip((pool, test), numbers, strict=True)
    )
    longest, width = int(frames.lengths.max()), len(frames.mean)
    block = max(1, MAX_ACTIVATIONS // (BATCH_CLIPS * (longest + width) + 8 * width * len(classes)))
    fitter = AttentionFitter(frames, items.features, items.answers, len(classes), device, block)
    return ClassLearner(items, tested, tuple(classes), metric, fitter)


def _attention_scores(frames: Frames, values: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
    return torch.cat([_weighed(values, *frames(some)) for some in numbers.split(BATCH_CLIPS)])


def _weighed(values: Mapping[str, Tensor], padded: Tensor, lengths: Tensor) -> Tensor:
    """Padded frames `[b, T, D]` and their lengths `[b]` → class scores `[b, J, C]`."""
    steps = torch.arange(padded.shape[1], device=padded.device)
    logits = torch.einsum("btd,jd->bjt", padded, values["query"])
    weights = logits.masked_fill(steps >= lengths[:, None, None], -torch.inf).softmax(2)
    return torch.einsum("bjd,jdc->bjc", weights @ padded, values["weight"]) + values["bias"]


LAYERS_VERSION = 2
LAYERS_CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
)


class LayerWeightedProbe(DescentProbe):
    """J linear probes, each on its own weighted sum of layers, trained as one.

    Args:
        layers: number of layers.
        width: D.
        classes: C.
        settings: `rate` (learning rate) and `decay` of the linear weights, per problem.
        seed: decides the order of batches. All weights start at zero.
    """

    def __init__(
        self, layers: int, width: int, classes: int, settings: Sequence[Setting], seed: int = 0
    ):
        count = len(settings)
        values = {
            "shares": torch.zeros(count, layers),  # before the softmax: equal weights
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        super().__init__(values, _layers_scores, ("weight",), settings, seed)

    def shares(self) -> Tensor:
        """Return the weight of each layer, `[J, layers]`, which sum to one."""
        return self.values["shares"].softmax(1)


def layer_fitter(pool: Items, train: Tensor, classes: int, device: str) -> DescentFitter:
    """Return a fitter of layer-weighted probes on one pool, with features standardised by the
    items marked by `train`.
    """
    items, layers, width = pool.features.shape
    block = max(1, MAX_ACTIVATIONS // (items * width + 8 * width * classes + layers))
    return DescentFitter.on(
        pool,
        train,
        device,
        probe=partial(LayerWeightedProbe, layers, width, classes),
        block=block,
    )


def _layers_scores(values: Mapping[str, Tensor], features: Tensor) -> Tensor:
    mixed = torch.einsum("ild,jl->jid", features, values["shares"].softmax(1))
    return (mixed @ values["weight"] + values["bias"][:, None]).transpose(0, 1)
