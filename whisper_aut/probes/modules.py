"""The linear probe: J multinomial (or multi-label) logistic regressions with an L2 penalty, fitted to convergence as one problem.

In: items `[I, D]`, for each of J problems the items it may train on and its penalty. Out: class scores `[I, J, C]`. Next:
`probes.selection` chooses among them. The objective is scikit-learn's with C = 1 / penalty (Alain & Bengio 2016 for the probe): ten
epochs of a minibatch optimiser leave a probe under-trained, and then rank optimisers, not encoders.

Inner folds and penalties of one test part are J columns of one wide product. A convex problem has one optimum and no random start, so
seeds do not apply: it is fitted once, and its uncertainty is that of the test clips.
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

from whisper_aut.models.dense import product
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


LINEAR_VERSION = 5  # raise it when anything here changes a score
PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
LINEAR_CANDIDATES: tuple[Setting, ...] = tuple({"penalty": penalty} for penalty in PENALTIES)
MAX_SCORES = 1 << 22  # floats in one [I, J, C] block
MAX_WEIGHTS = 1 << 24  # floats in one [J, C, R] block, of which L-BFGS keeps about twenty
ROUGH_TOLERANCE = 1e-3  # where an end only ranks penalties, or is where the next begins
APPROACH = (1000.0, 100.0, 10.0)  # what the penalty of a final fit is multiplied by on the way
MAX_APPROACH = 10.0  # no penalty is raised above this one, whose optimum is soon found from nothing
PATH_FLOPS = 1e9  # a step of all problems at once: above it, one penalty after another pays

Ends = deque[
    tuple[float, Tensor]
]  # of a path so far, the last two: penalties, and the weights there


@dataclass(frozen=True)
class Basis:
    """Standardised features in their principal axes: `[B, D]` → `[B, R]`.

    Mean and deviation are the training clips'. The rotation changes neither the penalty nor the optimum, since L2 is
    blind to rotations and weights outside the span of the data are zero; it makes the problem well conditioned, which
    saves four fifths of the L-BFGS steps.
    """

    mean: Tensor  # [D]
    deviation: Tensor  # [D]
    axes: Tensor  # [D, R]
    variances: Tensor  # [R]

    @classmethod
    def fit(cls, train: Tensor, others: Tensor) -> "Basis":
        """Take statistics from `train` `[B, D]`; `others` (validation clips) only widen the span that weights may use."""
        mean, deviation = train.mean(0), train.std(0, correction=0)
        deviation = torch.where(
            deviation > 1e-7 * mean.abs().clamp_min(1e-6), deviation, 1.0
        )  # constant features stay put
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

    The objective of each is scikit-learn's over its own items: loss summed + penalty / 2 · |weight|², here divided by their
    number. Problems of the same items and falling penalties are a path: each starts where the two before it point to. What
    `minimise` sees is in units in which the curvature at its start is about 1.

    Args:
        variances: `[R]`, of the features that the probe is given.
        penalties: one per problem.
        items: how many items each problem is fitted on; one number for all, or one per problem.
        multilabel: any number of classes an item, each a logistic regression of its own.
        approach: what penalties are multiplied by, one after another, on the way to their own; no problem then starts from another.
    """

    penalties: Tensor
    variances: Tensor

    def __init__(
        self, variances: Tensor, classes: int, penalties: Sequence[float], items: int | Sequence[int], *,
        multilabel: bool = False, max_steps: int = 300, tolerance: float = 1e-6, approach: Sequence[float] = (),
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.multilabel, self.max_steps, self.tolerance, self.approach = (
            multilabel,
            max_steps,
            tolerance,
            approach,
        )
        self.grades = torch.tensor(penalties)  # [J] as they were given, by which a path goes
        self.register_buffer(
            "penalties", self.grades / torch.tensor(items)
        )  # [J] beside a mean loss
        self.register_buffer(
            "variances", torch.cat([variances, torch.ones(1)])
        )  # [R + 1], the last the bias's
        self.weight = nn.Parameter(
            torch.zeros(len(penalties), classes, len(variances) + 1), requires_grad=False
        )

    def forward(self, features: Tensor) -> Tensor:
        """`[I, R]` → class scores `[I, J, C]`."""
        return _linear_scores(self.weight, _with_ones(features))

    def objectives(self, features: Tensor, answers: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the `[J]` objectives on features `[I, R]` and answers; `rows` `[I, J]` marks each problem's own items."""
        return self._evaluate(
            self.weight, self.penalties, _with_ones(features), answers, self._shares(features, rows)
        )[0]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
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
        """None of Lightning's: one training step runs `minimise` to its end."""

    def _levels(self, items: int) -> list[tuple[Tensor, float, float]]:
        """Return what is minimised one after another: problems, what their penalties are multiplied by, to which tolerance.

        The largest penalties come first. Steps that cost little more than their overhead are better taken by all problems at once.
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
        """Return `[j, C, R + 1]`: one over the root of the curvature along each axis where the problems start."""
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
        """Return objectives `[j]` and gradients `[j, C, R + 1]`; written out, to spare the memory of a graph.

        Args:
            shares: `[I, j]`, what each item weighs in each problem.
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
            # Chances below exp(-30) pull at nothing, and as denormal numbers they slow every product after this.
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
        """Return `[I, J]`: what each item weighs in each problem."""
        rows = (
            torch.ones(len(features), len(self.weight), device=features.device)
            if rows is None
            else rows
        )
        return rows / rows.sum(0)

    def _penalised(self) -> Tensor:
        """Return `[R + 1]`: 1, and 0 for the bias."""
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
        """Prepare a pool; statistics are taken from the items `train` `[I]`, those of the training split."""
        basis = Basis.fit(pool.features[train], pool.features[~train])
        return cls(pool.to(device), basis, basis(pool.features).to(device), classes, device)

    @property
    def block(self) -> int:
        """How many problems are fitted at once."""
        items, rank = self.rotated.shape
        return max(
            1, min(MAX_SCORES // (items * self.classes), MAX_WEIGHTS // (rank * self.classes))
        )

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        """Fit one probe per column of `rows` `[I, J]`: roughly where `valid` clips will only rank penalties, else to convergence."""
        used = rows.any(1)
        rows, features, answers = (
            rows[used],
            self.rotated[used.to(self.device)],
            self.pool.answers[used.to(self.device)],
        )
        # A path of penalties only ranks them. Tolerances are shares of the loss: where classes part cleanly it is tiny at its optimum.
        effort = (
            {"max_steps": 300, "tolerance": 1e-5, "approach": APPROACH}
            if valid is None
            else {"max_steps": 60, "tolerance": ROUGH_TOLERANCE}
        )
        probe = LinearProbe(
            self.basis.variances, self.classes, [setting["penalty"] for setting in settings], rows.sum(0).tolist(),
            multilabel=answers.ndim == 2, **effort,
        )  # fmt: skip
        fit(probe, (features, answers, rows.float().to(self.device)), self.device)
        probe = probe.to(self.device)
        return FittedProbes(
            lambda features: probe(self.basis(features.cpu()).to(self.device)).detach()
        )


def _with_ones(features: Tensor) -> Tensor:
    """`[I, R]` → `[I, R + 1]`: a bias is the weight of a feature that is always 1."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def _linear_scores(weight: Tensor, features: Tensor) -> Tensor:
    """`[j, C, R + 1]` on `[I, R + 1]` → `[I, j, C]`."""
    return product(features, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])


def _expected(path: Ends, penalty: float, otherwise: Tensor) -> Tensor:
    """Return where a path should end next: on the line through its last two ends, by the logarithms of the penalties."""
    if len(path) < 2:
        return path[-1][1] if path else otherwise
    (before, one), (last, other) = path
    following = max(penalty, 1e-12 * last)  # no penalty at all has no logarithm
    stride = math.log(last / following) / math.log(before / last)
    return other + min(stride, 1) * (other - one)  # no further than the last time: the line bends


def _alike(rows: Tensor | None, problems: int) -> list[int]:
    """Number the columns of `rows` `[I, J]`: equal columns have equal numbers; without rows, all are equal."""
    if rows is None:
        return [0] * problems
    numbers: dict[bytes, int] = {}
    return [
        numbers.setdefault(column.tobytes(), len(numbers)) for column in rows.T.bool().cpu().numpy()
    ]


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


MLP_VERSION = 2
HIDDEN = 256
MLP_CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
)
MAX_ACTIVATIONS = 1 << 26


class MLPProbe(DescentProbe):
    """J networks D → H → C, trained as one.

    Args:
        settings: each problem's learning `rate` and `decay` (half the squared weights, times this, is added to its loss).
        seed: decides the starting weights and the order of batches.
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
        count = len(settings)  # all start alike, so that settings are compared and not starts
        values = {
            "first": (first * (2 / width) ** 0.5).repeat(count, 1, 1),
            "first_bias": torch.zeros(count, hidden),
            "second": (second * hidden**-0.5).repeat(count, 1, 1),
            "second_bias": torch.zeros(count, classes),
        }
        super().__init__(values, _mlp_scores, ("first", "second"), settings, seed)


def mlp_fitter(pool: Items, train: Tensor, classes: int, device: str) -> DescentFitter:
    """Return what fits networks on one pool, standardised by the items `train`."""
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
    """J linear probes, each on the frames that a query of its own weighs, trained as one; clips are given by number, `[B]`.

    Args:
        frames: clip numbers → frames.
        settings: each problem's learning `rate` and `decay` of query and linear weights.
        seed: decides the order of batches; all weights start at zero.
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
    """Fits attention probes on clips that are given by number."""

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
    """Frames `[b, T, D]` of clips with these lengths `[b]` → class scores `[b, J, C]`."""
    steps = torch.arange(padded.shape[1], device=padded.device)
    logits = torch.einsum("btd,jd->bjt", padded, values["query"])
    weights = logits.masked_fill(steps >= lengths[:, None, None], -torch.inf).softmax(2)
    return torch.einsum("bjd,jdc->bjc", weights @ padded, values["weight"]) + values["bias"]


LAYERS_VERSION = 2
LAYERS_CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
)


class LayerWeightedProbe(DescentProbe):
    """J linear probes, each on its own mixture of layers, trained as one.

    Args:
        settings: each problem's learning `rate` and `decay` of the linear weights.
        seed: decides the order of batches; all weights start at zero.
    """

    def __init__(
        self, layers: int, width: int, classes: int, settings: Sequence[Setting], seed: int = 0
    ):
        count = len(settings)
        values = {
            "shares": torch.zeros(count, layers),  # before the softmax: all layers alike
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        super().__init__(values, _layers_scores, ("weight",), settings, seed)

    def shares(self) -> Tensor:
        """Return what each layer counts, `[J, layers]`, summing to one."""
        return self.values["shares"].softmax(1)


def layer_fitter(pool: Items, train: Tensor, classes: int, device: str) -> DescentFitter:
    """Return what fits layer-weighted probes on one pool, standardised by the items `train`."""
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
