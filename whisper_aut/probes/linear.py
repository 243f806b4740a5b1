"""The linear probe: J multinomial (or multi-label) logistic regressions with an L2 penalty, fitted to convergence as one problem.

In: items `[I, D]`, for each of J problems the items it may train on and its penalty. Out: class scores `[I, J, C]`. Next:
`probes.selection` chooses among them. The objective is scikit-learn's with C = 1 / penalty (Alain & Bengio 2016 for the probe): ten
epochs of a minibatch optimiser leave a probe under-trained, and then rank optimisers, not encoders.

Inner folds and penalties of one test part are J columns of one wide product. A convex problem has one optimum and no random start, so
seeds do not apply: it is fitted once, and its uncertainty is that of the test clips.
"""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.model.dense import product
from whisper_aut.probes.fitting import FittedProbes, Setting, fit
from whisper_aut.probes.items import Items
from whisper_aut.probes.lbfgs import minimise

LINEAR_VERSION = 5  # raise it when anything here changes a score
PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
CANDIDATES: tuple[Setting, ...] = tuple({"penalty": penalty} for penalty in PENALTIES)
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
        return _scores(self.weight, _with_ones(features))

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
        scores = _scores(start, features)
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
        scores = _scores(weight, features)
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


def _scores(weight: Tensor, features: Tensor) -> Tensor:
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
