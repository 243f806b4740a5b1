"""The linear probe: J multinomial (or multi-label) logistic regressions with an L2 penalty, fitted to convergence as one problem.

In: items `[I, D]`, for each of J problems the items it may train on and its penalty. Out: class scores `[I, J, C]`. Next:
`probes.selection` chooses among them. The objective is scikit-learn's with C = 1 / penalty (Alain & Bengio 2016 for the probe): ten
epochs of a minibatch optimiser leave a probe under-trained, and then rank optimisers, not encoders.

Seeds, inner folds and penalties of one test part are J columns of one wide product. A convex probe has no random start, so a seed
does not restart it: seed s draws a stratified 90 % of the training clips. The spread over seeds says how far a score hangs on which
clips were trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.fitting import Setting, class_losses, fit
from whisper_aut.probes.items import Items
from whisper_aut.probes.lbfgs import minimise

LINEAR_VERSION = 2  # raise it when anything here changes a score
PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
CANDIDATES: tuple[Setting, ...] = tuple({"penalty": penalty} for penalty in PENALTIES)
MAX_SCORES = 1 << 24  # floats in one [I, J, C] block: what two cores work through fastest
MAX_WEIGHTS = 1 << 24  # floats in one [R, J, C] block, of which L-BFGS keeps about twenty


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
        deviation = torch.where(deviation > 1e-7 * mean.abs().clamp_min(1e-6), deviation, 1.0)  # constant features stay put
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
    number. `weight` is kept in units in which the curvature is about 1; its last row is the bias, which carries no penalty.

    Args:
        variances: `[R]`, of the features that the probe is given.
        penalties: one per problem.
        items: how many items each problem is fitted on; one number for all, or one per problem.
        multilabel: any number of classes an item, each a logistic regression of its own.
    """

    penalties: Tensor
    scale: Tensor

    def __init__(
        self, variances: Tensor, classes: int, penalties: Sequence[float], items: int | Sequence[int], *,
        multilabel: bool = False, max_steps: int = 200, tolerance: float = 1e-7,
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.max_steps, self.tolerance = max_steps, tolerance
        self.register_buffer("penalties", torch.tensor(penalties) / torch.tensor(items))  # [J]
        steepness = 0.25 if multilabel else 1 / classes  # of the loss, where all classes are still alike
        curvature = steepness * variances[:, None] + self.penalties + 1e-12
        bias = torch.full((1, len(penalties)), steepness)
        self.register_buffer("scale", torch.cat([curvature, bias]).rsqrt()[:, :, None])  # [R + 1, J, 1]
        self.weight = nn.Parameter(torch.zeros(len(variances) + 1, len(penalties), classes), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """`[I, R]` → class scores `[I, J, C]`."""
        return _scores(self.weight * self.scale, features)

    def objectives(self, features: Tensor, answers: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the `[J]` objectives on features `[I, R]` and answers; `rows` `[I, J]` marks each problem's own items."""
        return self._objectives(self.weight, torch.arange(self.weight.shape[1]), features, answers, rows)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        best = minimise(
            lambda weight, problems: self._objectives(weight, problems, *batch),
            self.weight, max_steps=self.max_steps, tolerance=self.tolerance,
        )  # fmt: skip
        self.weight.copy_(best)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `minimise` to its end."""

    def _objectives(
        self, weight: Tensor, problems: Tensor, features: Tensor, answers: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        weight = weight * self.scale[:, problems]
        losses = class_losses(_scores(weight, features), answers)
        if rows is None:
            means = losses.mean(0)
        else:
            own = rows[:, problems]
            means = (losses * own).sum(0) / own.sum(0)
        return means + 0.5 * self.penalties[problems] * weight[:-1].square().sum((0, 2))


@dataclass(frozen=True)
class LinearFitter:
    """Fits linear probes on one pool: `fitter(rows, settings, thorough)` gives a function from features to class scores."""

    pool: Items
    basis: Basis
    rotated: Tensor  # [I, R]
    classes: int
    device: str

    @classmethod
    def on(cls, pool: Items, sampled: Tensor, classes: int, device: str) -> "LinearFitter":
        """Prepare a pool; statistics are taken from the items `sampled` `[I]`, those that are trained on."""
        basis = Basis.fit(pool.features[sampled], pool.features[~sampled])
        return cls(pool.to(device), basis, basis(pool.features).to(device), classes, device)

    @property
    def block(self) -> int:
        """How many problems are fitted at once."""
        items, rank = self.rotated.shape
        return max(1, min(MAX_SCORES // (items * self.classes), MAX_WEIGHTS // (rank * self.classes)))

    def __call__(self, rows: Tensor, settings: Sequence[Setting], thorough: bool) -> Callable[[Tensor], Tensor]:
        """Fit one probe per column of `rows` `[I, J]`."""
        used = rows.any(1)
        rows, features, answers = rows[used], self.rotated[used.to(self.device)], self.pool.answers[used.to(self.device)]
        # A path of penalties only ranks them: 60 steps bring every loss to within a few thousandths of its optimum.
        effort = {"max_steps": 300, "tolerance": 1e-7} if thorough else {"max_steps": 60, "tolerance": 1e-5}
        probe = LinearProbe(
            self.basis.variances, self.classes, [setting["penalty"] for setting in settings], rows.sum(0).tolist(),
            multilabel=answers.ndim == 2, **effort,
        )  # fmt: skip
        fit(probe, (features, answers, rows.float().to(self.device)), self.device)
        probe = probe.to(self.device)
        return lambda features: probe(self.basis(features.cpu()).to(self.device)).detach()


def _scores(weight: Tensor, features: Tensor) -> Tensor:
    return torch.addmm(weight[-1].flatten(), features, weight[:-1].flatten(1)).unflatten(1, weight.shape[1:])
