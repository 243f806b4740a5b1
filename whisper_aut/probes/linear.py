"""Embeddings → a linear probe's score on the test split, chosen on the validation split only.

In: `[B, D]` embeddings of the three splits. Out: one `ProbeResult` per seed. Next: `probes.suite`. Multinomial logistic
regression with an L2 penalty, fitted to convergence (Alain & Bengio 2016; the objective is scikit-learn's with
C = 1 / penalty): ten epochs of a minibatch optimiser leave a probe under-trained, and then rank optimisers, not encoders.

A convex probe has no random start, so a seed does not restart it: seed s draws a stratified 90 % of the training clips, without
replacement. The spread over seeds says how far a score hangs on which clips were trained on. The test split is read once a seed.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.tasks import METRICS

LINEAR_VERSION = 1  # raise it when anything here changes a score
PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
TRAIN_SHARE = 0.9
HELD_OUT_SHARE = 0.2  # of the training clips, where a task has no validation split
ONE_THREAD_FLOPS = 5e8  # a step: below it threads cost more than they bring, on a busy machine up to 30 times more
MAX_SCORES = 1 << 26  # floats in one [B, P, C] block; a longer path is fitted in pieces


@dataclass(frozen=True)
class ProbeResult:
    """One seed: the test score, the penalty chosen, its score on validation, and which test clips were right, `[B]`."""

    seed: int
    score: float
    penalty: float
    valid_score: float
    correct: np.ndarray


@dataclass(frozen=True)
class Basis:
    """Standardised features in their principal axes: `[B, D]` → `[B, R]`.

    Mean and deviation are the training split's. The rotation changes neither the penalty nor the optimum, since L2 is
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
    """P independent logistic regressions, one per penalty, trained as one batched problem.

    The objective of each is scikit-learn's over its B clips: cross-entropy summed + penalty / 2 · |weight|², here divided by
    B. Their sum is separable, so each reaches its own optimum. `weight` is kept in units in which the curvature is about 1.

    Args:
        variances: `[R]`, of the features that the probe is given.
        clips: how many clips it is fitted on.
    """

    def __init__(
        self, variances: Tensor, classes: int, penalties: Sequence[float], clips: int, *, metric: str = "accuracy",
        max_steps: int = 200, tolerance: float = 1e-7,
    ):  # fmt: skip
        super().__init__()
        self.max_steps, self.tolerance = max_steps, tolerance
        self.penalties: Tensor
        self.scale: Tensor
        self.register_buffer("penalties", torch.tensor(penalties) / clips)  # [P]
        curvature = variances[:, None] / classes + self.penalties + 1e-12
        self.register_buffer("scale", curvature.rsqrt()[:, :, None])  # [R, P, 1]
        self.weight = nn.Parameter(torch.zeros(len(variances), len(penalties), classes))
        self.bias = nn.Parameter(torch.zeros(len(penalties), classes))
        self.metrics = nn.ModuleList(METRICS[metric](classes) for _ in penalties)
        self.losses = torch.zeros(len(penalties))  # [P], mean cross-entropy on the clips last evaluated
        self.predictions = torch.zeros(0, len(penalties))  # [B, P], of the clips last evaluated

    def forward(self, features: Tensor) -> Tensor:
        """`[B, R]` → class scores `[B, P, C]`."""
        return (features @ (self.weight * self.scale).flatten(1)).unflatten(1, self.bias.shape) + self.bias

    def objectives(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the `[P]` objectives on features `[B, R]` and classes `[B]`."""
        squares = (self.weight * self.scale).square().sum((0, 2))
        return self._cross_entropy(self(features), labels) + 0.5 * self.penalties * squares

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.objectives(*batch).sum()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        features, labels = batch
        scores = self(features)
        self.losses, self.predictions = self._cross_entropy(scores, labels), scores.argmax(2)
        for number, metric in enumerate(self.metrics):
            metric.update(scores[:, number], labels)  # pyright: ignore[reportCallIssue]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            self.parameters(), max_iter=self.max_steps, tolerance_grad=1e-7, tolerance_change=self.tolerance,
            history_size=10, line_search_fn="strong_wolfe",
        )  # fmt: skip

    def scores(self) -> Tensor:
        """Return the metric per penalty, `[P]`, of the clips last evaluated."""
        return torch.stack([metric.compute() for metric in self.metrics])  # pyright: ignore[reportCallIssue]

    @staticmethod
    def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
        clips, penalties, _ = scores.shape
        each = F.cross_entropy(scores.flatten(0, 1), labels.repeat_interleave(penalties), reduction="none")
        return each.view(clips, penalties).mean(0)


Split = tuple[Tensor, Tensor]  # features [B, R], classes [B]


@torch.inference_mode(False)  # within a validation hook, parameters made in inference mode would silently never train
@torch.enable_grad()
def probe_linear(
    splits: dict[str, Embeddings], *, metric: str = "accuracy", seeds: Sequence[int] = (0, 1, 2, 3, 4),
    penalties: Sequence[float] = PENALTIES, device: str = "cpu", name: str = "task",
) -> list[ProbeResult]:  # fmt: skip
    """Score embeddings of `{"train", "valid", "test"}`, once per seed.

    For each seed: draw the training clips, fit the path of penalties, choose the best on validation (ties: the lower
    cross-entropy there), refit on training + validation clips with it, read the test split.

    Raises:
        UserError: an empty split, a single class, or a class that is tested but never trained on.
    """
    classes = class_names(splits, name)
    codes = {split: _codes(part.labels, classes) for split, part in splits.items()}
    train, valid = splits["train"].features, splits["valid"].features
    basis = Basis.fit(train, valid if len(valid) else train[:0])
    data = {
        split: (basis(part.features).to(device) if len(part) else torch.zeros(0, len(basis.variances)), codes[split].to(device))
        for split, part in splits.items()
    }
    return [_one_seed(data, basis.variances, len(classes), metric, seed, penalties, device) for seed in seeds]


def _one_seed(
    data: dict[str, Split], variances: Tensor, classes: int, metric: str, seed: int, penalties: Sequence[float], device: str
) -> ProbeResult:
    rng = np.random.default_rng(seed)
    everything = data["train"][1].cpu().numpy()
    drawn = stratified(everything, TRAIN_SHARE, rng)
    kept, valid = drawn, data["valid"]
    if not len(valid[1]):
        held_out = drawn[stratified(everything[drawn], HELD_OUT_SHARE, rng, leave_one=True)]
        kept, valid = np.setdiff1d(drawn, held_out), _rows(data["train"], held_out)
    train = _rows(data["train"], kept)
    scores, losses = [], []
    block = max(1, MAX_SCORES // (len(train[1]) * classes))
    for first in range(0, len(penalties), block):
        # The path only ranks penalties: 60 steps bring every loss to within a few thousandths of its optimum.
        path = LinearProbe(
            variances, classes, penalties[first : first + block], len(train[1]), metric=metric, max_steps=60, tolerance=1e-5
        )
        fit(path, train, device, valid)
        scores.append(path.scores().cpu())
        losses.append(path.losses.cpu())
    score, loss = torch.cat(scores), torch.cat(losses)
    best = int(np.lexsort((loss.numpy(), -score.numpy()))[0])
    joined = torch.cat([train[0], valid[0]]), torch.cat([train[1], valid[1]])
    final = LinearProbe(variances, classes, [penalties[best]], len(joined[1]), metric=metric)
    fit(final, joined, device, data["test"])
    correct = (final.predictions[:, 0] == data["test"][1]).cpu().numpy()
    return ProbeResult(seed, round(float(final.scores()[0]), 6), penalties[best], round(float(score[best]), 6), correct)


def fit(probe: LinearProbe, train: Split, device: str = "cpu", evaluate: Split | None = None) -> None:
    """Fit a probe on one full batch, then evaluate it on another split, whose `scores()` and `losses` it keeps."""
    accelerator, _, number = device.partition(":")
    step_flops = 4 * len(train[1]) * probe.weight.numel()
    assert not probe.weight.is_inference(), "a probe made in inference mode is never trained"
    with _quiet_trainer(), _threads(1 if step_flops < ONE_THREAD_FLOPS else None):
        trainer = Trainer(
            accelerator=accelerator, devices=[int(number)] if number else 1, max_epochs=1, barebones=True,
            plugins=[LightningEnvironment()],  # alone, even inside a run that torchrun or Slurm started
        )  # fmt: skip
        trainer.fit(probe, OneBatch(train))
        if evaluate is not None:
            trainer.test(probe, OneBatch(evaluate), verbose=False)


class OneBatch:
    """A loader of one batch that is there already: a `DataLoader` would copy it and warn of missing workers."""

    def __init__(self, batch: Split):
        self.batch = batch

    def __iter__(self) -> Iterator[Split]:
        yield self.batch

    def __len__(self) -> int:
        return 1


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Mute Lightning's notices about devices, bare runs and loops that are not there: every fit makes a trainer."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def stratified(labels: np.ndarray, share: float, rng: np.random.Generator, leave_one: bool = False) -> np.ndarray:
    """Draw a share of every class without replacement, at least one clip of each; return sorted positions.

    `leave_one`: never draw the last clip of a class.
    """
    drawn = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(members)))
        drawn.append(members[: min(count, len(members) - 1) if leave_one else count])
    return np.sort(np.concatenate(drawn))


def class_names(splits: dict[str, Embeddings], name: str) -> list[str]:
    """Return the training classes in order, once the splits have been found fit to probe."""
    for split in ("train", "test"):
        if not len(splits[split]):
            skipped = ", ".join(f"{count} {reason}" for reason, count in splits[split].skipped.items()) or "no samples at all"
            raise UserError(f"Probe task {name!r} has no clips in {split!r} ({skipped}). Check its folders, label and select.")
    known = set(splits["train"].labels)
    if len(known) < 2:
        raise UserError(f"Probe task {name!r} has a single class in 'train', {known.pop()!r}: there is nothing to tell apart.")
    for split in ("valid", "test"):
        unknown = sorted(set(splits[split].labels) - known)
        if unknown:
            raise UserError(
                f"Probe task {name!r} has {len(unknown)} classes in {split!r} that 'train' lacks: {', '.join(unknown[:8])}. "
                "Check that label and split fields are the right ones."
            )
    if not len(splits["valid"]) and len(known) == len(splits["train"]):
        raise UserError(f"Probe task {name!r} has one clip per class and no validation split: no penalty can be chosen.")
    return sorted(known)


def _codes(labels: Sequence[str], classes: list[str]) -> Tensor:
    number = {name: code for code, name in enumerate(classes)}
    return torch.tensor([number[label] for label in labels], dtype=torch.long)


def _rows(split: Split, positions: np.ndarray) -> Split:
    chosen = torch.from_numpy(positions).to(split[1].device)
    return split[0][chosen], split[1][chosen]
