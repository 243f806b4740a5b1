"""Probes as LightningModules. Each module trains J heads as one batch, such as the inner folds and
candidate settings of a split; J is 1 for a single probe. I is the number of items (clips, or their
segments), C that of classes, and R that of the principal axes of the features.

The linear probe is a multinomial (or multi-label) logistic regression with an L2 penalty, fitted
to convergence (Alain & Bengio 2016). Its objective is that of scikit-learn with C = 1 / penalty.
Ten epochs of a minibatch optimizer would leave it under-trained, and the ranking would reflect the
optimizer instead of the encoder. The problem is convex, with a single optimum, so it is fitted once
for all seeds. The other probes are trained by Adam until their validation loss stops improving,
except for nearest neighbours, which are not trained.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.datamodule import (
    CaptionDataModule,
    ClassDataModule,
    HeadResult,
    PrincipalAxes,
    Standardizer,
    TranscriptDataModule,
)
from whisper_aut.probes.embed import FeatureKind
from whisper_aut.probes.logistic import (
    APPROACH,
    ROUGH_TOLERANCE,
    PenaltyPath,
    extrapolate,
    linear_scores,
    logistic_losses,
    penalty_levels,
    unit_scale,
    with_ones,
)
from whisper_aut.probes.metrics import (
    Answer,
    class_losses,
    class_metric,
    masked_means,
    recall,
    text_metric,
)
from whisper_aut.probes.optim import BatchedLBFGS, HeadAdam

Candidate = dict[str, float]  # hyperparameters of a head, such as penalty or learning rate
Candidates = Sequence[Candidate]

BATCH_FRAMES = 64  # clips per batch of frames


class Probe(LightningModule):
    """J heads that are trained and applied as one batch.

    To add a kind, write a subclass with a `forward` that returns class scores `[I, J, C]`, and add
    it to `probes.fit.PROBES`. A subclass of `AdamProbe` needs no training code.

    Args:
        width: size of a feature vector or frame: D, or R if `transform` reduces it.
        outputs: number of classes C, or of words; for transcripts, the characters.
        candidates: setting of each head. By default, one head with the setting `default`.
        metric: a key of `ANSWERS`.
        seed: decides initial weights, unless they are zero.

    Attributes:
        title: name in tables.
        answers: the kinds of answer that it supports.
        features: its input from a clip, see `FeatureSpec.kind`.
        candidates: the settings to select from on validation clips.
        default: the setting of a head if none is given.
        version: increased whenever a change affects scores.
        seeded: whether it is trained by epochs, with initial weights or batch order from a seed.
            Other probes have a unique solution and are fitted once.
        data_module: makes the batches of a split.
        transform: fitted on features of the training items and of other items, and applied to all.
        batch_items, valid_batch_items: largest number of items per batch; None for all.
        max_epochs: number of epochs, or the largest with early stopping.
        results: the result of each head on the items of the last `Trainer.test`.
    """

    title: ClassVar[str]
    answers: ClassVar[tuple[Answer, ...]] = ("class", "classes")
    features: ClassVar[FeatureKind] = "pooled"
    candidates: ClassVar[Candidates]
    default: ClassVar[Candidate]
    version: ClassVar[int]
    seeded: ClassVar[bool] = False
    data_module: ClassVar[Callable[..., Any]] = ClassDataModule
    transform: ClassVar[Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]] | None] = None
    batch_items: ClassVar[int | None] = None
    valid_batch_items: ClassVar[int | None] = 4096
    max_epochs: ClassVar[int] = 1

    def __init__(
        self,
        width: int,
        outputs: Any,
        candidates: Candidates = (),
        *,
        metric: str = "accuracy",
        seed: int = 0,
    ):
        super().__init__()
        self.width, self.outputs, self.metric, self.seed = width, outputs, metric, seed
        self.settings = tuple(candidates) or (self.default,)
        self.steps: list[tuple[Any, ...]] = []  # outputs of the steps of an epoch
        self.results: list[HeadResult] = []

    @classmethod
    def for_data(
        cls, data: Any, candidates: Candidates = (), *, selecting: bool = False, **options: Any
    ) -> Self:
        """Return untrained heads for a data module, one per candidate.

        Args:
            data: see `data_module`.
            candidates: setting of each head.
            selecting: whether the heads are only trained to be ranked.
            options: other arguments of the class.
        """
        return cls(data.width, data.outputs, candidates, metric=data.metric, **options)

    @classmethod
    def max_heads(cls, data: Any) -> int:
        """Return the number of heads that fit in memory at once."""
        return 8

    def losses(self, *batch: Any) -> Tensor:
        """Return the losses `[b, J]` of a batch: inputs, targets and mask."""
        *inputs, targets, _ = batch
        return class_losses(self(*inputs), targets)

    def validation_step(self, batch: tuple[Any, ...], batch_idx: int) -> None:
        self.steps.append((self.losses(*batch), batch[-1]))

    def on_validation_epoch_end(self) -> None:
        losses, mask = (torch.cat(parts) for parts in zip(*self.steps, strict=True))
        self.steps.clear()
        self.valid_losses = masked_means(losses, mask)
        self.log("valid/loss", self.valid_losses.mean())

    def test_step(self, batch: tuple[Any, ...], batch_idx: int) -> None:
        *inputs, targets, mask = batch
        self.steps.append((self(*inputs), targets, mask))

    def on_test_epoch_end(self) -> None:
        self.results = self.score_heads()
        self.steps.clear()
        scores = torch.tensor([head.score for head in self.results])
        self.log(f"test/{self.metric}", scores.mean())

    def score_heads(self) -> list[HeadResult]:
        """Return the result of each head on its own items of the last test steps."""
        scores, targets, mask = (torch.cat(parts).cpu() for parts in zip(*self.steps, strict=True))
        results = []
        for head, own in enumerate(mask.bool().T):
            outputs, answers = scores[own, head], targets[own]
            score = class_metric(self.metric, self.outputs, outputs, answers)
            if answers.ndim == 1:
                loss = F.cross_entropy(outputs, answers)
            else:
                loss = F.binary_cross_entropy_with_logits(outputs, answers)
            results.append(HeadResult(score, float(loss), outputs, answers))
        return results


PENALTIES = tuple(10.0**exponent for exponent in range(-2, 5))
MAX_SCORES = 1 << 22  # floats in one [I, J, C] block
MAX_WEIGHTS = 1 << 24  # floats in one [J, C, R] block, of which L-BFGS keeps about twenty


class LinearProbe(Probe):
    """J independent logistic regressions fitted as one batched problem.

    The objective of each is that of scikit-learn on its own items, summed loss + penalty / 2 ·
    |weight|², divided by the number of items. With targets `[I, C]`, there is one binary logistic
    regression per class. Heads with the same items and decreasing penalties form a path: each
    starts from an extrapolation of the two before it. All items must be in one batch, on which
    a single training step runs L-BFGS to its end.

    Args:
        width, outputs, candidates, options: see `Probe`. A candidate has a `penalty`.
        variances: variances of the features, `[R]`. Defaults to ones.
        max_steps: largest number of iterations for each of the penalties on the way.
        tolerance: relative tolerance at the last penalty.
        approach: factors applied one after another to the penalties on the way to their own
            values. Heads then do not start from each other.
    """

    title = "linear probes"
    candidates = tuple({"penalty": penalty} for penalty in PENALTIES)
    default: ClassVar[Candidate] = {"penalty": 1.0}
    version = 5
    transform = PrincipalAxes

    def __init__(
        self,
        width: int,
        outputs: int,
        candidates: Candidates = (),
        *,
        variances: Tensor | None = None,
        max_steps: int = 300,
        tolerance: float = 1e-5,
        approach: Sequence[float] = APPROACH,
        **options: Any,
    ):
        super().__init__(width, outputs, candidates, **options)
        self.automatic_optimization = False
        self.max_steps, self.tolerance, self.approach = max_steps, tolerance, approach
        self.penalties = torch.tensor([setting["penalty"] for setting in self.settings])
        self.variances: Tensor
        variances = torch.ones(width) if variances is None else variances
        self.register_buffer("variances", torch.cat([variances, torch.ones(1)]))  # bias last
        self.weight = nn.Parameter(
            torch.zeros(len(self.settings), outputs, width + 1), requires_grad=False
        )

    @classmethod
    def max_heads(cls, data: ClassDataModule) -> int:
        by_scores = MAX_SCORES // (data.pool_items * data.outputs)
        # The width is 0 if all features are constant.
        return max(1, min(by_scores, MAX_WEIGHTS // max(1, data.width * data.outputs)))

    @classmethod
    def for_data(
        cls, data: Any, candidates: Candidates = (), *, selecting: bool = False, **options: Any
    ) -> Self:
        options["variances"] = data.transform.variances
        if selecting:
            # A coarse tolerance is enough to rank penalties. Tolerances are relative to the loss,
            # since its optimum is tiny where classes are separable.
            options |= {"max_steps": 60, "tolerance": ROUGH_TOLERANCE, "approach": ()}
        return super().for_data(data, candidates, **options)

    def forward(self, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, R]`."""
        return linear_scores(self.weight, with_ones(features))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Fit all heads to convergence on features `[I, R]`, targets, and the mask `[I, J]` of the
        items of each head.
        """
        features, targets, mask = batch
        features, items = with_ones(features), mask.sum(0)
        item_weights, penalties = mask / items, self.penalties.to(items.device) / items
        path_of_head = range(len(self.weight))
        if not self.approach:  # heads with the same items have the same number
            path_of_head = torch.unique(mask, dim=1, return_inverse=True)[1].tolist()
        paths: dict[int, PenaltyPath] = defaultdict(lambda: deque(maxlen=2))
        optimizer: Any = self.optimizers()
        scale = torch.empty_like(self.weight)
        flops = 4 * len(features) * self.weight.numel()
        levels = penalty_levels(self.penalties, self.approach, self.tolerance, flops)
        for level, factor, tolerance in levels:
            numbers, raised = level.tolist(), (self.penalties[level] * factor).tolist()
            start = [
                extrapolate(paths[path_of_head[head]], penalty, self.weight[head])
                for head, penalty in zip(numbers, raised, strict=True)
            ]
            level = level.to(features.device)
            self.weight[level] = torch.stack(start)
            problem = features, targets, item_weights[:, level]
            weight, raised_penalties = self.weight[level], penalties * factor
            scale[level] = unit_scale(weight, raised_penalties[level], *problem, self.variances)
            self.weight[level] /= scale[level]

            def closure(penalties: Tensor = raised_penalties) -> tuple[Tensor, Tensor]:
                own, units = optimizer.heads, scale[optimizer.heads]
                problem = penalties[own], features, targets, item_weights[:, own]
                losses, gradients = logistic_losses(optimizer.trial * units, *problem)
                return losses, gradients.mul_(units)

            optimizer.step(closure, heads=level, tolerance=tolerance)
            self.weight[level] *= scale[level]
            for head, penalty in zip(numbers, raised, strict=True):
                path = paths[path_of_head[head]]
                if not path or path[-1][0] > penalty:
                    path.append((penalty, self.weight[head].clone()))

    def configure_optimizers(self) -> BatchedLBFGS:
        return BatchedLBFGS(self.weight, self.max_steps)


class FrameProbe(LinearProbe):
    """Logistic regressions on the mean frame of each segment, which has any number of classes."""

    title = "linear probes of segments"
    answers = ("events",)
    features = "segments"


NEIGHBOURS = (1, 3, 5, 10, 20)
TEMPERATURES = (0.02, 0.07, 1.0)
MAX_SIMILARITIES = 1 << 26  # floats in one block of cosines


class KNNProbe(Probe):
    """J votes of cosine neighbours. Training only stores the items.

    Features of each clip are scaled to unit length, so that similarity is a cosine. Votes are
    weighted by exp(cosine / temperature) (Wu et al. 2018, section 3.4). X-ARES scales its training
    features across clips, not within each clip, so its similarities are not cosines.

    A candidate has `k` (neighbours) and a `temperature`.
    """

    title = "nearest neighbours"
    answers = ("class",)
    candidates = tuple(
        {"k": k, "temperature": t} for k in NEIGHBOURS for t in TEMPERATURES if k > 1 or t == 1.0
    )
    default: ClassVar[Candidate] = {"k": 10, "temperature": 0.07}
    version = 1

    def __init__(self, width: int, outputs: int, candidates: Candidates = (), **options: Any):
        super().__init__(width, outputs, candidates, **options)
        self.automatic_optimization = False
        self.neighbours: Tensor
        self.targets: Tensor
        self.mask: Tensor
        self.register_buffer("neighbours", torch.empty(0, width))
        self.register_buffer("targets", torch.empty(0, dtype=torch.long))
        self.register_buffer("mask", torch.empty(0, len(self.settings), dtype=torch.bool))

    @classmethod
    def max_heads(cls, data: ClassDataModule) -> int:
        return max(1, MAX_SIMILARITIES // (data.pool_items * data.outputs))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Store features `[I, D]`, classes `[I]`, and the neighbours `[I, J]` of each head."""
        features, self.targets, mask = batch
        self.neighbours, self.mask = F.normalize(features, dim=1), mask.bool()

    def configure_optimizers(self) -> None:
        """Nothing is optimized."""

    def forward(self, features: Tensor) -> Tensor:
        """Return log probabilities `[Q, J, C]` of features `[Q, D]`."""
        block = max(1, MAX_SIMILARITIES // max(1, len(self.neighbours)))
        return torch.cat([self._votes(some) for some in features.split(block)])

    def _votes(self, features: Tensor) -> Tensor:
        cosines = F.normalize(features, dim=1) @ self.neighbours.T
        largest_k = max(int(setting["k"]) for setting in self.settings)
        columns, last = [], None
        for own, setting in zip(self.mask.T, self.settings, strict=True):
            # Consecutive candidates of a fold share their neighbours.
            if last is None or not torch.equal(own, last):
                kept, last = cosines[:, own], own
                found, indices = kept.topk(min(largest_k, kept.shape[1]), dim=1)
                classes = self.targets[own][indices]
            k = int(setting["k"])
            votes = torch.zeros(len(features), self.outputs, device=features.device)
            weights = (found[:, :k] / setting["temperature"]).softmax(1)
            votes.scatter_add_(1, classes[:, :k], weights)
            columns.append(votes.clamp_min(1e-9).log())
        return torch.stack(columns, 1)


MIN_IMPROVEMENT = 5e-3  # of the validation loss, as a fraction of it


class AdamProbe(Probe):
    """Base of the probes that are trained by Adam, with early stopping for each head.

    A head stops when its validation loss has not improved by a fraction of `MIN_IMPROVEMENT` for
    `patience` epochs, and keeps the weights of its best epoch. Without validation batches, it is
    trained for the given number of epochs. Learning rates follow one cosine schedule over
    `max_epochs` in both cases, so that epoch n uses the same learning rates either way.

    Each parameter is `[J, …]`. The candidate of a head has a learning rate, `rate`, and optionally
    `decay`: half the squared norm of the parameters named in `decayed`, times `decay`, is added to
    its loss.
    """

    seeded = True
    batch_items = 1024
    max_epochs = 200
    patience: ClassVar[int] = 10
    decayed: ClassVar[tuple[str, ...]] = ()

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        loss = masked_means(self.losses(*batch), batch[-1])
        self.log("train/loss", loss.mean())
        return loss.sum()

    def configure_optimizers(self) -> Any:
        rates, decays = (
            torch.tensor([setting.get(key, 0.0) for setting in self.settings], device=self.device)
            for key in ("rate", "decay")
        )
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "decay": decays}]
        for name, parameter in self.named_parameters():
            groups[name in self.decayed]["params"].append(parameter)
        optimizer = HeadAdam(groups, rates)
        steps = int(self.trainer.estimated_stepping_batches) // (self.trainer.max_epochs or 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_epochs * steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_start(self) -> None:
        self.best = {name: value.detach().clone() for name, value in self.named_parameters()}
        self.best_loss = torch.full((len(self.settings),), torch.inf, device=self.device)
        self.best_epoch, self.validated = torch.zeros_like(self.best_loss, dtype=torch.long), False

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        loss, epoch, self.validated = self.valid_losses, self.current_epoch + 1, True
        # A stopped head stays stopped while the others continue.
        running = epoch - 1 - self.best_epoch < self.patience
        better = running & (loss < self.best_loss * (1 - MIN_IMPROVEMENT))
        for name, value in self.named_parameters():
            self.best[name][better] = value.detach()[better]
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_epoch[better] = epoch
        self.trainer.should_stop = bool((epoch - self.best_epoch >= self.patience).all())

    def on_train_end(self) -> None:
        if self.validated:
            for name, value in self.named_parameters():
                value.data.copy_(self.best[name])

    @property
    def epochs(self) -> list[int]:
        """The best number of epochs of each head."""
        return self.best_epoch.clamp(min=1).tolist()


HIDDEN = 256
MAX_ACTIVATIONS = 1 << 26


class MLPProbe(AdamProbe):
    """J networks with one hidden layer, D → H → C. All have the same initial weights, so that only
    their candidates differ.
    """

    title = "one hidden layer"
    candidates = tuple({"rate": r, "decay": d} for r in (1e-3, 1e-2) for d in (1e-4, 1e-3, 1e-2))
    default: ClassVar[Candidate] = {"rate": 1e-3, "decay": 1e-3}
    version = 2
    transform = Standardizer
    decayed = ("first", "second")

    def __init__(self, width: int, outputs: int, candidates: Candidates = (), **options: Any):
        super().__init__(width, outputs, candidates, **options)
        generator, heads = torch.Generator().manual_seed(self.seed), len(self.settings)
        first = torch.randn(width, HIDDEN, generator=generator) * (2 / width) ** 0.5
        second = torch.randn(HIDDEN, outputs, generator=generator) * HIDDEN**-0.5
        self.first = nn.Parameter(first.repeat(heads, 1, 1))
        self.first_bias = nn.Parameter(torch.zeros(heads, HIDDEN))
        self.second = nn.Parameter(second.repeat(heads, 1, 1))
        self.second_bias = nn.Parameter(torch.zeros(heads, outputs))

    @classmethod
    def max_heads(cls, data: ClassDataModule) -> int:
        return max(1, MAX_ACTIVATIONS // (HIDDEN * (data.pool_items + 8 * data.width)))

    def forward(self, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, D]`."""
        wide = self.first.transpose(0, 1).flatten(1)  # [D, J · H]
        inner = (features @ wide).unflatten(1, self.first_bias.shape) + self.first_bias
        return torch.einsum("ijh,jhc->ijc", inner.relu(), self.second) + self.second_bias


class LayerWeightedProbe(AdamProbe):
    """J linear probes, each on its own weighted sum of the L layers. All weights start at zero."""

    title = "linear probes over weighted layers"
    features = "layers"
    candidates = tuple({"rate": r, "decay": d} for r in (1e-3, 1e-2) for d in (1e-3, 1e-2, 1e-1))
    default: ClassVar[Candidate] = {"rate": 1e-2, "decay": 1e-2}
    version = 2
    transform = Standardizer
    decayed = ("weight",)

    def __init__(
        self, width: int, outputs: int, candidates: Candidates = (), *, layers: int, **options: Any
    ):
        super().__init__(width, outputs, candidates, **options)
        heads = len(self.settings)
        self.layers = nn.Parameter(torch.zeros(heads, layers))  # before the softmax
        self.weight = nn.Parameter(torch.zeros(heads, width, outputs))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))

    @classmethod
    def max_heads(cls, data: ClassDataModule) -> int:
        width, layers = data.width, data.features.shape[1]
        size = data.pool_items * width + 8 * width * data.outputs + layers
        return max(1, MAX_ACTIVATIONS // size)

    @classmethod
    def for_data(cls, data: Any, candidates: Candidates = (), **options: Any) -> Self:
        return super().for_data(data, candidates, layers=data.features.shape[1], **options)

    def layer_weights(self) -> Tensor:
        """Return the weight of each layer, `[J, L]`, which sum to one."""
        return self.layers.softmax(1)

    def forward(self, features: Tensor) -> Tensor:
        """Return class scores `[I, J, C]` of features `[I, L, D]`."""
        mixed = torch.einsum("ild,jl->jid", features, self.layer_weights())
        return (mixed @ self.weight + self.bias[:, None]).transpose(0, 1)


class AttentionProbe(AdamProbe):
    """J linear probes on attention-pooled frames, each with its own query. All weights start at
    zero.
    """

    title = "linear probes under attention pooling"
    features = "frames"
    candidates = LayerWeightedProbe.candidates
    default: ClassVar[Candidate] = LayerWeightedProbe.default
    version = 2
    batch_items = BATCH_FRAMES
    valid_batch_items = BATCH_FRAMES
    decayed = ("query", "weight")

    def __init__(self, width: int, outputs: int, candidates: Candidates = (), **options: Any):
        super().__init__(width, outputs, candidates, **options)
        heads = len(self.settings)
        self.query = nn.Parameter(torch.zeros(heads, width))
        self.weight = nn.Parameter(torch.zeros(heads, width, outputs))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))

    @classmethod
    def max_heads(cls, data: ClassDataModule) -> int:
        assert data.frames
        size = BATCH_FRAMES * (int(data.frames.lengths.max()) + data.width)
        return max(1, MAX_ACTIVATIONS // (size + 8 * data.width * data.outputs))

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return class scores `[b, J, C]` of padded frames `[b, T, D]` and their lengths `[b]`."""
        steps = torch.arange(frames.shape[1], device=frames.device)
        logits = torch.einsum("btd,jd->bjt", frames, self.query)
        attention = logits.masked_fill(steps >= lengths[:, None, None], -torch.inf).softmax(2)
        return torch.einsum("bjd,jdc->bjc", attention @ frames, self.weight) + self.bias


SHARED_WIDTH = 128


class RetrievalProbe(AdamProbe):
    """J pairs of linear maps into a space shared by clips and captions, scored by recall@1 in both
    directions.

    The text side is the simplest that can be learned without a language model: each of V words
    has a vector, a caption is their mean, and both are trained with the map of the audio, and a
    logit scale, by the contrastive loss of CLIP (Radford et al. 2021). This measures the audio
    encoder: a strong text encoder would add knowledge that the audio encoder does not have.
    """

    title = "audio-text retrieval"
    answers = ("captions",)
    candidates = MLPProbe.candidates
    default: ClassVar[Candidate] = MLPProbe.default
    version = 3
    data_module = CaptionDataModule
    transform = Standardizer
    batch_items = 256
    valid_batch_items = None  # captions of other clips in the batch are the negatives
    decayed = ("audio", "words")

    def __init__(self, width: int, outputs: int, candidates: Candidates = (), **options: Any):
        super().__init__(width, outputs, candidates, **options)
        generator, heads = torch.Generator().manual_seed(self.seed), len(self.settings)
        audio = torch.randn(width, SHARED_WIDTH, generator=generator) * width**-0.5
        text = torch.randn(outputs, SHARED_WIDTH, generator=generator) * SHARED_WIDTH**-0.5
        self.audio = nn.Parameter(audio.repeat(heads, 1, 1))
        self.words = nn.Parameter(text.repeat(heads, 1, 1))
        self.scale = nn.Parameter(torch.full((heads,), math.log(1 / 0.07)))

    @classmethod
    def max_heads(cls, data: CaptionDataModule) -> int:
        return 4  # each has a vector per word

    def forward(self, features: Tensor, bags: Tensor) -> Tensor:
        """Return cosines `[J, B, N]` of clips `[B, D]` and captions `[N, V]`."""
        audio = F.normalize(features @ self.audio, dim=-1)
        text = F.normalize(bags @ self.words, dim=-1)
        return audio @ text.transpose(1, 2)

    def losses(self, *batch: Any) -> Tensor:
        """Return contrastive losses `[b, J]` of clips `[b, D]` and one caption each `[b, V]`, among
        the clips of each head.
        """
        features, bags, mask = batch
        own = mask.T > 0
        logits = self(features, bags) * self.scale.exp()[:, None, None]
        logits = logits.masked_fill(~(own[:, None] & own[:, :, None]), -1e4)
        both = logits.logsumexp(1) + logits.logsumexp(2) - 2 * logits.diagonal(dim1=1, dim2=2)
        return both.T

    def validation_step(self, batch: tuple[Any, ...], batch_idx: int) -> None:
        features, bags, owners, mask = batch
        first = torch.searchsorted(owners, torch.arange(len(features), device=owners.device))
        super().validation_step((features, bags[first], mask), batch_idx)

    def score_heads(self) -> list[HeadResult]:
        ((all_cosines, all_owners, mask),) = self.steps
        results = []
        for head, own in enumerate(mask.bool().T):
            captions = own[all_owners]
            owners = (own.long().cumsum(0) - 1)[all_owners[captions]]  # among the head's clips
            cosines = all_cosines[head][own][:, captions]
            loss = float(F.cross_entropy(cosines.T / 0.07, owners))
            results.append(HeadResult(recall(cosines, owners), loss, cosines.cpu(), owners.cpu()))
        return results


class CTCProbe(AdamProbe):
    """J linear CTC heads from frames to characters and a blank, scored by max(0, 1 − word error
    rate). All weights start at zero.

    A head has no language model and is decoded greedily, so it measures what the frames alone
    contain (Graves et al. 2006 for the loss). X-ARES trains an adapter to a frozen language model
    instead, so its numbers are not comparable.
    """

    title = "CTC heads"
    answers = ("text",)
    features = "frames"
    candidates = tuple({"rate": rate} for rate in (1e-3, 3e-3, 1e-2))
    default: ClassVar[Candidate] = {"rate": 3e-3}
    version = 3
    data_module = TranscriptDataModule
    max_epochs, patience = 100, 5  # low, as every epoch reads the frames again
    batch_items = BATCH_FRAMES
    valid_batch_items = BATCH_FRAMES

    def __init__(
        self, width: int, outputs: Sequence[str], candidates: Candidates = (), **options: Any
    ):
        super().__init__(width, outputs, candidates, **options)
        heads = len(self.settings)
        self.weight = nn.Parameter(torch.zeros(heads, width, len(outputs)))
        self.bias = nn.Parameter(torch.zeros(heads, len(outputs)))

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits `[b, J, T, V]` of frames `[b, T, D]`."""
        return torch.einsum("btd,jdv->bjtv", frames, self.weight) + self.bias[:, None]

    def losses(self, *batch: Any) -> Tensor:
        """Return the CTC losses per character, `[b, J]`."""
        frames, lengths, codes, counts, _, _ = batch
        heads = len(self.settings)
        scores = self(frames).log_softmax(-1).permute(2, 1, 0, 3).flatten(1, 2)  # [T, J · b, V]
        losses = F.ctc_loss(
            scores,
            codes.repeat(heads),
            lengths.cpu().repeat(heads),
            counts.cpu().repeat(heads),
            reduction="none",
            zero_infinity=True,
        )
        return (losses.view(heads, -1) / counts.clamp(min=1)).T

    def test_step(self, batch: tuple[Any, ...], batch_idx: int) -> None:
        frames, lengths, _, _, transcripts, mask = batch
        codes, texts = self(frames).argmax(-1).cpu(), []  # [b, J, T]
        for clip, length in zip(codes, lengths.tolist(), strict=True):
            merged = [head.unique_consecutive().tolist() for head in clip[:, :length]]
            # The text of a blank is empty.
            texts.append(["".join(self.outputs[code] for code in head) for head in merged])
        self.steps.append((texts, transcripts, mask.bool().tolist()))

    def score_heads(self) -> list[HeadResult]:
        clips = [clip for step in self.steps for clip in zip(*step, strict=True)]
        results = []
        for head in range(len(self.settings)):
            own = [(texts[head], transcript) for texts, transcript, used in clips if used[head]]
            texts, transcripts = (list(part) for part in zip(*own, strict=True))
            results.append(HeadResult(text_metric(texts, transcripts), 0.0, texts, transcripts))
        return results
