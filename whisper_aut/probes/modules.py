"""Probes as LightningModules. Each module trains J heads as one batch: the inner folds and
candidate settings of a split, or a single head for the test part.

The linear probe is a multinomial (or multi-label) logistic regression with an L2 penalty, fitted
to convergence (Alain & Bengio 2016). Its objective is that of scikit-learn with C = 1 / penalty.
Ten epochs of a minibatch optimizer would leave it under-trained, and the ranking would then
reflect the optimizer rather than the encoder. The problem is convex, with one optimum and no
random start, so it is fitted once for all seeds. The other probes are trained by Adam until their
validation loss stops improving.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.onednn import product
from whisper_aut.probes.datasets import BATCH_FRAMES, ClassDataset, PrincipalAxes, Standardizer
from whisper_aut.probes.embed import FeatureKind
from whisper_aut.probes.metrics import Answer
from whisper_aut.probes.optim import HeadLoader, fit, minimise

Candidate = dict[str, float]  # hyperparameters of a head, such as penalty or learning rate
Candidates = Sequence[Candidate]


def class_losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the losses `[I, J]` of class scores `[I, J, C]`.

    The loss is cross-entropy for classes `[I]`, or the sum of C binary cross-entropies for
    targets `[I, C]`.
    """
    if targets.ndim == 2:
        each_head = targets[:, None].to(scores.dtype).expand_as(scores)
        return F.binary_cross_entropy_with_logits(scores, each_head, reduction="none").sum(2)
    items, heads, _ = scores.shape
    repeated = targets.repeat_interleave(heads)
    return F.cross_entropy(scores.flatten(0, 1), repeated, reduction="none").view(items, heads)


def masked_means(losses: Tensor, mask: Tensor) -> Tensor:
    """Average losses `[b, J]` over the items of each head. The mean is 0 for a head without items
    in this batch.
    """
    return (losses * mask).sum(0) / mask.sum(0).clamp(min=1)


class Probe(LightningModule):
    """Base of all probes: J heads that are trained and applied as one batch.

    To add a kind of probe, write a subclass and add it to `probes.fit.PROBES`.

    Attributes:
        title: name in tables.
        answers: the kinds of answer that it can give.
        features: what it sees of a clip, see `FeatureSpec.kind`.
        candidates: the settings to select from on validation clips.
        version: increased whenever a change affects scores.
        seeded: whether it is trained by epochs, with initial weights or batch order from a seed.
            Other probes have a unique solution and are fitted once.
        dataset: makes the dataset of a split.
    """

    title: ClassVar[str]
    answers: ClassVar[tuple[Answer, ...]] = ("class", "classes")
    features: ClassVar[FeatureKind] = "pooled"
    candidates: ClassVar[Candidates]
    version: ClassVar[int]
    seeded: ClassVar[bool] = True
    dataset: ClassVar[Callable[..., Any]] = ClassDataset

    @classmethod
    def max_heads(cls, dataset: Any) -> int:
        """Return the number of heads that fit in memory at once."""
        raise NotImplementedError

    @classmethod
    def train_heads(
        cls, dataset: Any, candidates: Candidates, mask: Tensor, valid: Tensor | None, seed: int
    ) -> Self:
        """Train one head per candidate.

        Args:
            dataset: the dataset of a split.
            candidates: setting of each head.
            mask: `[I, J]`, the items that each head is trained on.
            valid: `[I, J]`, the items that each head is validated on; None for a final fit.
            seed: decides initial weights and the order of batches.
        """
        raise NotImplementedError


PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
MAX_SCORES = 1 << 22  # floats in one [I, J, C] block
MAX_WEIGHTS = 1 << 24  # floats in one [J, C, R] block, of which L-BFGS keeps about twenty
ROUGH_TOLERANCE = 1e-3  # for optima that only rank penalties, or that the next fit starts from
APPROACH = (1000.0, 100.0, 10.0)  # factors of the penalty on the way to a final fit
MAX_APPROACH = 10.0  # largest penalty on the way: its optimum is quickly found from zero
PATH_FLOPS = 1e9  # per step of all heads: above it, following a path of penalties is faster

# The last two optima of a path: penalties and weights.
PenaltyPath = deque[tuple[float, Tensor]]


class LinearProbe(Probe):
    """J independent logistic regressions fitted as one batched problem.

    The objective of each is that of scikit-learn on its own items, summed loss + penalty / 2 ·
    |weight|², divided by the number of items. With targets `[I, C]`, there is one binary logistic
    regression per class. Heads with the same items and decreasing penalties form a path: each
    starts from an extrapolation of the two before it. `minimise` works in units in which the
    curvature at the start is about 1.

    Args:
        width: number of features, R. They should be standardised.
        classes: number of classes, C.
        candidates: the `penalty` of each head.
        variances: variances of the features, `[R]`. Defaults to ones.
        max_steps: largest number of steps per call of `minimise`.
        tolerance: relative tolerance of the last call.
        approach: factors applied one after another to the penalties on the way to their own
            values. Heads then do not start from each other.
    """

    title = "linear probes"
    candidates = tuple({"penalty": penalty} for penalty in PENALTIES)
    version = 5
    seeded = False
    dataset = partial(ClassDataset, fit_transform=PrincipalAxes)

    def __init__(
        self,
        width: int,
        classes: int,
        candidates: Candidates = ({"penalty": 1.0},),
        *,
        variances: Tensor | None = None,
        max_steps: int = 300,
        tolerance: float = 1e-5,
        approach: Sequence[float] = APPROACH,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.max_steps, self.tolerance, self.approach = max_steps, tolerance, approach
        self.penalties = torch.tensor([candidate["penalty"] for candidate in candidates])
        self.variances: Tensor
        variances = torch.ones(width) if variances is None else variances
        self.register_buffer("variances", torch.cat([variances, torch.ones(1)]))  # bias last
        self.weight = nn.Parameter(
            torch.zeros(len(candidates), classes, width + 1), requires_grad=False
        )

    @classmethod
    def max_heads(cls, dataset: ClassDataset) -> int:
        classes, rank = len(dataset.classes), dataset.features.shape[1]
        by_scores = MAX_SCORES // (dataset.pool_items * classes)
        return max(1, min(by_scores, MAX_WEIGHTS // (rank * classes)))

    @classmethod
    def train_heads(
        cls, dataset: Any, candidates: Candidates, mask: Tensor, valid: Tensor | None, seed: int
    ) -> Self:
        # A coarse tolerance is enough to rank penalties. Tolerances are relative to the loss,
        # since its optimum is tiny where classes are separable.
        rough = {"max_steps": 60, "tolerance": ROUGH_TOLERANCE, "approach": ()}
        axes = dataset.transform
        assert isinstance(axes, PrincipalAxes)
        probe = cls(
            len(axes.variances),
            len(dataset.classes),
            candidates,
            variances=axes.variances,
            **({} if valid is None else rough),
        )
        fit(probe, HeadLoader(dataset, mask, None), device=dataset.device)
        return probe

    def forward(self, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, R]`."""
        return _linear_scores(self.weight, _with_ones(features))

    def objectives(self, features: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the objectives `[J]` on features `[I, R]` and targets `[I]` or `[I, C]`.

        `mask` `[I, J]` marks the items of each head; None for all items.
        """
        weights, penalties = self._item_weights(features, mask)
        return self._evaluate(self.weight, penalties, _with_ones(features), targets, weights)[0]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Fit all heads to convergence on a batch of all items: features `[I, R]`, targets, and
        optionally the mask `[I, J]` of the items of each head.
        """
        features, targets = batch[:2]
        mask = batch[2] if len(batch) > 2 else None
        (weights, penalties), wide = self._item_weights(features, mask), _with_ones(features)
        heads = range(len(self.weight))
        path_of_head = heads if self.approach else _number_columns(mask, len(heads))
        paths: dict[int, PenaltyPath] = defaultdict(lambda: deque(maxlen=2))
        for level, factor, tolerance in self._levels(len(features)):
            numbers, raised = level.tolist(), (self.penalties[level] * factor).tolist()
            start = [
                _extrapolate(paths[path_of_head[head]], penalty, self.weight[head])
                for head, penalty in zip(numbers, raised, strict=True)
            ]
            optima = self._minimise(
                torch.stack(start), level, penalties, factor, tolerance, wide, targets, weights
            )
            self.weight[level] = optima
            for head, penalty, optimum in zip(numbers, raised, optima, strict=True):
                path = paths[path_of_head[head]]
                if not path or path[-1][0] > penalty:
                    path.append((penalty, optimum))

    def configure_optimizers(self) -> None:
        """Lightning's optimizers are not used: one training step runs `minimise` to its end."""

    def _levels(self, items: int) -> list[tuple[Tensor, float, float]]:
        """Return the sequence of calls to `minimise`: heads, factor of their penalties, tolerance.

        The largest penalties come first. If the cost of a step is mostly overhead, all heads run
        at once.
        """
        everything = torch.arange(len(self.weight))
        if 4 * items * self.weight.numel() < PATH_FLOPS:
            return [(everything, 1.0, self.tolerance)]
        if self.approach:
            low = [
                (torch.nonzero(self.penalties * factor <= MAX_APPROACH)[:, 0], factor)
                for factor in self.approach
            ]
            return [
                *((level, factor, ROUGH_TOLERANCE) for level, factor in low if len(level)),
                (everything, 1.0, self.tolerance),
            ]
        return [
            (torch.nonzero(self.penalties == penalty)[:, 0], 1.0, self.tolerance)
            for penalty in self.penalties.unique().flip(0)
        ]

    def _minimise(
        self,
        start: Tensor,
        level: Tensor,
        penalties: Tensor,
        factor: float,
        tolerance: float,
        features: Tensor,
        targets: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the optima `[j, C, R + 1]` of the heads of a level."""
        level = level.to(start.device)
        raised = penalties[level] * factor
        # Inverse square root of the curvature along each axis at the start.
        scores = _linear_scores(start, features)
        probabilities = scores.sigmoid() if targets.ndim == 2 else scores.softmax(2)
        variances = probabilities * (1 - probabilities)
        steepness = torch.einsum("ijc,ij->jc", variances, weights[:, level])
        curvature = steepness.clamp(min=1e-8)[:, :, None] * self.variances
        curvature = curvature + raised[:, None, None] * self._penalised()
        scale = (curvature + 1e-12).rsqrt()

        def objective(weight: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
            own = scale[heads]
            values, gradients = self._evaluate(
                weight.view_as(own) * own,
                raised[heads],
                features,
                targets,
                weights[:, level[heads]],
            )
            return values, (gradients * own).flatten(1)

        found = minimise(
            objective, (start / scale).flatten(1), max_steps=self.max_steps, tolerance=tolerance
        )
        return found.view_as(scale) * scale

    def _evaluate(
        self, weight: Tensor, penalties: Tensor, features: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return objectives `[j]` and gradients `[j, C, R + 1]`, with items weighted by `[I, j]`.

        The gradient is written out by hand to avoid the memory of an autograd graph.
        """
        scores = _linear_scores(weight, features)
        if targets.ndim == 2:
            marks = targets[:, None].to(scores.dtype)
            losses = (F.softplus(scores) - scores * marks).sum(2)
            slopes = (scores.sigmoid_() - marks) * weights[:, :, None]
        else:
            index = targets[:, None, None].expand(-1, len(weight), 1)
            slopes = scores.log_softmax(2)
            losses = -slopes.gather(2, index)[:, :, 0]
            # Probabilities below exp(-30) have no effect on the gradient, but as denormal
            # numbers they would slow down every following product.
            slopes = slopes.clamp_(min=-30).exp_().mul_(weights[:, :, None])
            slopes.scatter_add_(2, index, -weights[:, :, None])
        pull = penalties[:, None, None] * self._penalised() * weight
        gradients = product(slopes.flatten(1).T, features.T).view_as(weight) + pull
        penalty = 0.5 * (pull * weight).sum((1, 2), dtype=torch.double)
        return (losses * weights).sum(0, dtype=torch.double) + penalty, gradients

    def _item_weights(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weight of each item in each head, `[I, J]`, and the penalties `[J]` for a mean
        instead of a sum of losses.
        """
        if mask is None:
            mask = torch.ones(len(features), len(self.weight), device=features.device)
        items = mask.sum(0)
        return mask / items, self.penalties.to(items.device) / items

    def _penalised(self) -> Tensor:
        """Return `[R + 1]`: 1 for features, 0 for the bias."""
        penalised = torch.ones_like(self.variances)
        penalised[-1] = 0
        return penalised


class FrameProbe(LinearProbe):
    """Logistic regressions on the mean frame of each segment, which has any number of classes."""

    title = "linear probes of segments"
    answers = ("events",)
    features = "segments"


def _with_ones(features: Tensor) -> Tensor:
    """Append a feature that is always 1, whose weight is the bias: `[I, R]` → `[I, R + 1]`."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def _linear_scores(weight: Tensor, features: Tensor) -> Tensor:
    """Weights `[j, C, R + 1]` and features `[I, R + 1]` → scores `[I, j, C]`."""
    return product(features, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])


def _extrapolate(path: PenaltyPath, penalty: float, otherwise: Tensor) -> Tensor:
    """Extrapolate a path to the next penalty, linearly in the logarithm of the penalty."""
    if len(path) < 2:
        return path[-1][1] if path else otherwise
    (penalty_1, weight_1), (penalty_2, weight_2) = path
    penalty = max(penalty, 1e-12 * penalty_2)  # a penalty of zero has no logarithm
    stride = math.log(penalty_2 / penalty) / math.log(penalty_1 / penalty_2)
    # The path is curved, so never extrapolate further than the previous distance.
    return weight_2 + min(stride, 1) * (weight_2 - weight_1)


def _number_columns(mask: Tensor | None, heads: int) -> list[int]:
    """Number the columns of a mask `[I, J]`: equal columns get equal numbers."""
    if mask is None:
        return [0] * heads
    numbers: dict[bytes, int] = {}
    columns = mask.T.bool().cpu().numpy()
    return [numbers.setdefault(column.tobytes(), len(numbers)) for column in columns]


Weights = dict[str, Tensor]
MIN_IMPROVEMENT = 5e-3  # of the validation loss, as a fraction of it
MIN_BATCH_ITEMS, MIN_STEPS = 32, 16


class AdamProbe(Probe):
    """Base of the probes that are trained by Adam, with early stopping for each head.

    A head stops when its validation loss has not improved by a fraction of `MIN_IMPROVEMENT` for
    `patience` epochs, and keeps the weights of its best epoch. Without validation batches, it is
    trained for the given number of epochs. Learning rates follow one cosine schedule over
    `max_epochs` in both cases, so that epoch n uses the same learning rates either way.

    Each head has a learning rate of its own: its weights are `initial + rate · offset`, and Adam,
    which steps by about its learning rate whatever the size of the gradient, trains `offset` with
    a learning rate of 1.

    Args:
        initial: initial weights, each `[J, …]`.
        candidates: `rate` (learning rate) and optionally `decay` of each head: half the squared
            norm of the weights named in `decayed`, times `decay`, is added to its loss.
    """

    max_epochs: ClassVar[int] = 200
    patience: ClassVar[int] = 10
    max_batch_items: ClassVar[int] = 1024
    valid_batch_items: ClassVar[int | None] = 4096
    decayed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, initial: Weights, candidates: Candidates):
        super().__init__()
        self.initial = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in initial.items()}
        )
        self.offsets = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros_like(value)) for name, value in initial.items()}
        )
        self.rates: Tensor
        self.decays: Tensor
        self.register_buffer("rates", torch.tensor([one["rate"] for one in candidates]))
        self.register_buffer("decays", torch.tensor([one.get("decay", 0.0) for one in candidates]))
        self.best = {name: torch.zeros_like(value) for name, value in initial.items()}
        self.best_loss = torch.full((len(candidates),), torch.inf)
        self.best_epoch = torch.zeros(len(candidates), dtype=torch.long)
        self.stopped = torch.zeros(len(candidates), dtype=torch.bool)
        self.valid_losses: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def build(cls, dataset: Any, candidates: Candidates, seed: int) -> Self:
        """Return untrained heads for a dataset."""
        raise NotImplementedError

    @classmethod
    def train_heads(
        cls, dataset: Any, candidates: Candidates, mask: Tensor, valid: Tensor | None, seed: int
    ) -> Self:
        probe = cls.build(dataset, candidates, seed)
        size = batch_size(int(mask.any(1).sum()), cls.max_batch_items)
        batches = HeadLoader(dataset, mask, size, seed)
        valid_batches = None
        if valid is not None:
            valid_batches = HeadLoader(dataset, valid, cls.valid_batch_items)
        epochs = int(candidates[0].get("epochs", cls.max_epochs))
        fit(probe, batches, valid_batches, device=dataset.device, max_epochs=epochs)
        return probe

    @property
    def weights(self) -> Weights:
        """The weights of all heads, each `[J, …]`."""
        return {
            name: value + self.rates.view(-1, *[1] * (value.ndim - 1)) * self.offsets[name]
            for name, value in self.initial.items()
        }

    @property
    def epochs(self) -> list[int]:
        """The best number of epochs of each head."""
        return self.best_epoch.clamp(min=1).tolist()

    def apply_heads(self, weights: Weights, *inputs: Tensor) -> Tensor:
        """Return the scores of all heads, with a dimension of size J."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.apply_heads(self.weights, *inputs)

    def losses(self, weights: Weights, *batch: Tensor) -> Tensor:
        """Return the losses `[b, J]` of a batch: inputs, targets and mask."""
        *inputs, targets, _ = batch
        return class_losses(self.apply_heads(weights, *inputs), targets)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        weights = self.weights
        loss = masked_means(self.losses(weights, *batch), batch[-1])
        if self.decayed:
            squares = [weights[name].square().flatten(1).sum(1) for name in self.decayed]
            loss = loss + 0.5 * self.decays * torch.stack(squares).sum(0)
        self.log("train/loss", loss.mean())
        return loss.sum()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.valid_losses.append((self.losses(self.weights, *batch), batch[-1]))

    def on_validation_epoch_end(self) -> None:
        losses, mask = (torch.cat(parts) for parts in zip(*self.valid_losses, strict=True))
        self.valid_losses.clear()
        loss, epoch = masked_means(losses, mask).cpu(), self.current_epoch + 1
        self.log("valid/loss", loss.mean())
        better = ~self.stopped & (loss < self.best_loss * (1 - MIN_IMPROVEMENT))
        for name, offset in self.offsets.items():
            self.best[name] = self.best[name].to(offset.device)
            self.best[name][better] = offset.detach()[better]
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_epoch[better] = epoch
        # A stopped head stays stopped while the others continue.
        self.stopped |= epoch - self.best_epoch >= self.patience
        self.trainer.should_stop = bool(self.stopped.all())

    def on_train_end(self) -> None:
        if self.trainer.val_dataloaders is None:
            return
        for name, offset in self.offsets.items():
            offset.data.copy_(self.best[name])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.offsets.values(), lr=1.0)
        steps = int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_epochs * steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def batch_size(items: int, most: int) -> int:
    """Return the number of items per step: an epoch has at least `MIN_STEPS` steps, unless that
    would need fewer than `MIN_BATCH_ITEMS` items per step.
    """
    return min(most, max(MIN_BATCH_ITEMS, items // MIN_STEPS))


HIDDEN = 256
MAX_ACTIVATIONS = 1 << 26


class MLPProbe(AdamProbe):
    """J networks with one hidden layer, D → H → C.

    Args:
        width: D.
        classes: C.
        candidates: `rate` (learning rate) and `decay` of each network.
        seed: decides initial weights. All networks have the same, so that only their candidates
            differ.
        hidden: H.
    """

    title = "one hidden layer"
    candidates = tuple(
        {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
    )
    version = 2
    dataset = partial(ClassDataset, fit_transform=Standardizer)
    decayed = ("first", "second")

    def __init__(
        self,
        width: int,
        classes: int,
        candidates: Candidates = ({"rate": 1e-3, "decay": 1e-3},),
        seed: int = 0,
        hidden: int = HIDDEN,
    ):
        generator, heads = torch.Generator().manual_seed(seed), len(candidates)
        first = torch.randn(width, hidden, generator=generator)
        second = torch.randn(hidden, classes, generator=generator)
        initial = {
            "first": (first * (2 / width) ** 0.5).repeat(heads, 1, 1),
            "first_bias": torch.zeros(heads, hidden),
            "second": (second * hidden**-0.5).repeat(heads, 1, 1),
            "second_bias": torch.zeros(heads, classes),
        }
        super().__init__(initial, candidates)

    @classmethod
    def max_heads(cls, dataset: ClassDataset) -> int:
        width = dataset.features.shape[1]
        return max(1, MAX_ACTIVATIONS // (HIDDEN * (dataset.pool_items + 8 * width)))

    @classmethod
    def build(cls, dataset: ClassDataset, candidates: Candidates, seed: int) -> Self:
        return cls(dataset.features.shape[1], len(dataset.classes), candidates, seed)

    def apply_heads(self, weights: Weights, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, D]`."""
        heads, width, hidden = weights["first"].shape
        wide = weights["first"].transpose(0, 1).reshape(width, heads * hidden)
        inner = (features @ wide).unflatten(1, (heads, hidden)) + weights["first_bias"]
        scores = torch.einsum("ijh,jhc->ijc", inner.relu(), weights["second"])
        return scores + weights["second_bias"]


class LayerWeightedProbe(AdamProbe):
    """J linear probes, each on its own weighted sum of layers. All weights start at zero.

    Args:
        layers: number of layers, L.
        width: D.
        classes: C.
        candidates: `rate` (learning rate) and `decay` of the linear weights of each head.
    """

    title = "linear probes over weighted layers"
    features = "layers"
    candidates = tuple(
        {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
    )
    version = 2
    dataset = partial(ClassDataset, fit_transform=Standardizer)
    decayed = ("weight",)

    def __init__(
        self,
        layers: int,
        width: int,
        classes: int,
        candidates: Candidates = ({"rate": 1e-2, "decay": 1e-2},),
    ):
        heads = len(candidates)
        initial = {
            "layers": torch.zeros(heads, layers),  # before the softmax: equal weights
            "weight": torch.zeros(heads, width, classes),
            "bias": torch.zeros(heads, classes),
        }
        super().__init__(initial, candidates)

    @classmethod
    def max_heads(cls, dataset: ClassDataset) -> int:
        _, layers, width = dataset.features.shape
        size = dataset.pool_items * width + 8 * width * len(dataset.classes) + layers
        return max(1, MAX_ACTIVATIONS // size)

    @classmethod
    def build(cls, dataset: ClassDataset, candidates: Candidates, seed: int) -> Self:
        _, layers, width = dataset.features.shape
        return cls(layers, width, len(dataset.classes), candidates)

    def layer_weights(self) -> Tensor:
        """Return the weight of each layer, `[J, L]`, which sum to one."""
        return self.weights["layers"].softmax(1)

    def apply_heads(self, weights: Weights, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, L, D]`."""
        mixed = torch.einsum("ild,jl->jid", features, weights["layers"].softmax(1))
        return (mixed @ weights["weight"] + weights["bias"][:, None]).transpose(0, 1)


class AttentionProbe(AdamProbe):
    """J linear probes on attention-pooled frames, each with its own query. All weights start at
    zero.

    Args:
        width: D.
        classes: C.
        candidates: `rate` (learning rate) and `decay` of query and linear weights of each head.
    """

    title = "linear probes under attention pooling"
    features = "frames"
    candidates = LayerWeightedProbe.candidates
    version = 2
    max_batch_items = BATCH_FRAMES
    valid_batch_items = BATCH_FRAMES
    decayed = ("query", "weight")

    def __init__(
        self, width: int, classes: int, candidates: Candidates = ({"rate": 1e-2, "decay": 1e-2},)
    ):
        heads = len(candidates)
        initial = {
            "query": torch.zeros(heads, width),
            "weight": torch.zeros(heads, width, classes),
            "bias": torch.zeros(heads, classes),
        }
        super().__init__(initial, candidates)

    @classmethod
    def max_heads(cls, dataset: ClassDataset) -> int:
        assert dataset.frames
        longest, width = int(dataset.frames.lengths.max()), dataset.frames.width
        size = BATCH_FRAMES * (longest + width) + 8 * width * len(dataset.classes)
        return max(1, MAX_ACTIVATIONS // size)

    @classmethod
    def build(cls, dataset: ClassDataset, candidates: Candidates, seed: int) -> Self:
        assert dataset.frames
        return cls(dataset.frames.width, len(dataset.classes), candidates)

    def apply_heads(self, weights: Weights, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return class scores `[b, J, C]` of padded frames `[b, T, D]` and their lengths `[b]`."""
        steps = torch.arange(frames.shape[1], device=frames.device)
        logits = torch.einsum("btd,jd->bjt", frames, weights["query"])
        attention = logits.masked_fill(steps >= lengths[:, None, None], -torch.inf).softmax(2)
        scores = torch.einsum("bjd,jdc->bjc", attention @ frames, weights["weight"])
        return scores + weights["bias"]
