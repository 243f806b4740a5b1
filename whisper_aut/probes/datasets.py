"""What probes are trained and tested on: the splits of a task, and clips as items with targets.

The items of a dataset are those of the pool (training and validation clips) followed by those of
the test part. A mask `[I, J]` marks the items that each of J heads is trained or validated on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.metrics import ANSWERS, Answer, class_metric

HELD_OUT_FRACTION = 0.2  # of the training clips, for tasks without a validation split
# Validation folds per test fold: all of a 5-fold task, the next four of a 10-fold task.
MAX_INNER_FOLDS = 4
JACKKNIFE_BUNDLES = 100
BATCH_ITEMS, BATCH_FRAMES = 4096, 64  # items per validation or test step; clips with their frames


@dataclass(frozen=True)
class Split:
    """One test part of a task and the clips that its probes may be trained on.

    Attributes:
        number: index of the split; 0 for tasks without folds.
        pool: the clips to train and validate on.
        parts: `[B]`, the validation part of each clip in the pool; -1 for none.
        train: `[B]`, whether a clip is in the training split. With folds, all are.
        valid_parts: the parts that candidates are selected on. If empty, a fraction of the
            training clips is held out.
        test: the test clips, scored once per seed.
    """

    number: int
    pool: Embeddings
    parts: np.ndarray
    train: np.ndarray
    valid_parts: tuple[int, ...]
    test: Embeddings


class InnerFold(NamedTuple):
    """Clips of a pool to train on and clips to validate on, as masks `[B]`."""

    train: np.ndarray
    valid: np.ndarray


def train_valid_test(splits: dict[str, Embeddings]) -> Split:
    """Return the split of a task with `train`, `valid` (possibly empty) and `test`."""
    train, valid = splits["train"], splits["valid"]
    parts = np.repeat([-1, 0], [len(train), len(valid)])
    valid_parts = (0,) if len(valid) else ()
    pool = Embeddings.join([train, valid])
    return Split(0, pool, parts, parts < 0, valid_parts, splits["test"])


def cross_validation(folds: Sequence[Embeddings]) -> list[Split]:
    """Return one split per fold, with that fold as the test part and the others as the pool."""
    splits = []
    for number, test in enumerate(folds):
        others = [folds[(number + step) % len(folds)] for step in range(1, len(folds))]
        parts = np.repeat(np.arange(len(others)), [len(fold) for fold in others])
        # With two folds, the only other fold is needed for training.
        valid = tuple(range(min(len(others), MAX_INNER_FOLDS))) if len(others) > 1 else ()
        everything = np.ones(len(parts), dtype=bool)
        splits.append(Split(number, Embeddings.join(others), parts, everything, valid, test))
    return splits


def inner_folds(split: Split, classes: np.ndarray) -> list[InnerFold]:
    """Return the folds that candidates are selected on: one per validation part, or a single one
    that holds out a fifth of each class of the training clips.

    Args:
        split: the split.
        classes: `[B]`, the class of each clip in the pool; all equal if clips have several.
    """
    if split.valid_parts:
        return [
            InnerFold(split.train & (split.parts != part), split.parts == part)
            for part in split.valid_parts
        ]
    clips, rng = np.flatnonzero(split.train), np.random.default_rng(split.number)
    held_out = np.zeros(len(classes), dtype=bool)
    held_out[clips[stratified(classes[clips], HELD_OUT_FRACTION, rng)]] = True
    return [InnerFold(split.train & ~held_out, held_out)]


def stratified(classes: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a fraction of every class: at least one clip, but never all. Returns sorted indices."""
    drawn = []
    for name in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == name))
        count = max(1, round(fraction * len(members)))
        drawn.append(members[: min(count, len(members) - 1)])
    return np.sort(np.concatenate(drawn))


class SplitResult(NamedTuple):
    """The score of a probe on the test clips of a split, and what it is computed from.

    Attributes:
        score: the score.
        units: `[U]`. If the score is a mean over clips, the contribution of each; otherwise the
            pseudo-values of groups of clips, see `jackknife`. Encoders are compared by these.
        predicted: per clip, the class, the classes, the events, the nearest caption or the
            transcript.
        probabilities: per clip, the probability of each predicted class. Empty if the probe
            gives none.
    """

    score: float
    units: np.ndarray
    predicted: tuple[Any, ...]
    probabilities: tuple[Any, ...] = ()


class ProbeDataset:
    """The items of one split, and how predictions for them are scored. By default, an item is a
    clip.
    """

    device: str = "cpu"

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return the inputs and targets of some items, on the device of the dataset.

        With a generator (in training), targets may be drawn.
        """
        raise NotImplementedError

    def mask(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Convert masks over clips of the pool, each `[B]`, to a mask over items, `[I, J]`."""
        return torch.from_numpy(np.stack(clips, 1))

    def validate(self, probe: Any, valid: Tensor) -> list[tuple[float, float]]:
        """Return score and loss of each head on its validation items, marked by `[I, J]`."""
        raise NotImplementedError

    def test(self, probe: Any) -> SplitResult:
        """Return the result of a probe with a single head on the test part."""
        raise NotImplementedError


class Standardizer:
    """Standardises features by mean and deviation of the training items `[I, …, D]`."""

    def __init__(self, train: Tensor, others: Tensor | None = None):
        self.mean = train.mean(0)
        self.deviation = train.std(0, correction=0).clamp_min(1e-6)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


class PrincipalAxes:
    """Maps features `[B, D]` to their standardised principal components `[B, R]`.

    Mean and deviation are those of the training items; other items (validation) only extend the
    span of the axes. The rotation changes neither the penalty nor the optimum of a linear probe,
    since L2 is invariant to rotations and optimal weights are in the span of the data. It makes
    the problem well conditioned, which saves four fifths of the L-BFGS steps.
    """

    def __init__(self, train: Tensor, others: Tensor):
        self.mean, deviation = train.mean(0), train.std(0, correction=0)
        # Constant features are not scaled.
        constant = deviation <= 1e-7 * self.mean.abs().clamp_min(1e-6)
        self.deviation = torch.where(constant, 1.0, deviation)
        rows = ((torch.cat([train, others]) - self.mean) / self.deviation).double()
        if len(rows) < rows.shape[1]:
            values, vectors = torch.linalg.eigh(rows @ rows.T)
            kept = values > values[-1] * 1e-9
            axes = rows.T @ (vectors[:, kept] / values[kept].sqrt())
        else:
            values, axes = torch.linalg.eigh(rows.T @ rows)
            kept = values > values[-1] * 1e-9
            axes = axes[:, kept]
        self.axes = axes.float()  # [D, R]
        self.variances = (values[kept] / len(rows)).float()  # [R]

    def __call__(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.deviation) @ self.axes


class Frames:
    """Frames of many clips that stay in their cache files, and are read, standardised and padded
    per batch.

    Args:
        clips: memory-mapped frames `[T, D]`, as in `Embeddings.frames`.
        train: `[B]`, marks the clips used for mean and deviation.
        device: where batches are put.
    """

    def __init__(self, clips: Sequence[Tensor], train: np.ndarray, device: str = "cpu"):
        self.clips, self.device = clips, device
        self.lengths = torch.tensor([len(clip) for clip in clips])
        total = squares = torch.zeros(clips[0].shape[1], dtype=torch.double)
        for number in np.flatnonzero(train).tolist():
            clip = clips[number].double()
            total, squares = total + clip.sum(0), squares + clip.square().sum(0)
        count = int(self.lengths[torch.from_numpy(train)].sum())
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        self.mean, self.deviation = mean.float(), variance.sqrt().float().clamp_min(1e-6)

    @property
    def width(self) -> int:
        return len(self.mean)

    def __call__(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames of some clips, padded to `[b, T, D]`, and their lengths `[b]`."""
        padded = pad_sequence([self.clips[i] for i in items.tolist()], batch_first=True)
        standard = (padded - self.mean) / self.deviation
        return standard.to(self.device), self.lengths[items].to(self.device)


Transform = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


class ClassDataset(ProbeDataset):
    """Clips, or their segments, with one class or any number of classes each.

    Args:
        split: the split.
        metric: a key of `METRICS`.
        classes: the names of the classes.
        segment_seconds: segment length, for tasks with events.
        device: where batches are put.
        fit_transform: (features of the training items, features of other items) → transform of
            features, such as `Standardizer`. None to keep features as they are.
    """

    def __init__(
        self,
        split: Split,
        metric: str,
        classes: Sequence[str],
        segment_seconds: float = 0.0,
        device: str = "cpu",
        fit_transform: Transform | None = None,
    ):
        self.metric, self.classes, self.device = metric, tuple(classes), device
        self.segment_seconds = segment_seconds
        pool, test, answer = split.pool, split.test, ANSWERS[metric]
        clips = torch.arange(len(pool) + len(test))
        lengths = (*pool.lengths, *test.lengths)
        self.owners = clips.repeat_interleave(torch.tensor(lengths)) if lengths else clips
        self.pool_items, self.pool_clips = int((self.owners < len(pool)).sum()), len(pool)
        self.targets = torch.cat(
            [class_targets(part, answer, classes, segment_seconds) for part in (pool, test)]
        ).to(device)
        self.test_groups = test.group_numbers()
        if pool.frames:
            train = np.concatenate([split.train, np.zeros(len(test), dtype=bool)])
            self.frames = Frames([*pool.frames, *test.frames], train, device)
            return
        self.frames = self.transform = None
        features = [pool.features, test.features]
        if fit_transform is not None:
            train = self.mask([split.train])[: self.pool_items, 0]
            self.transform = fit_transform(pool.features[train], pool.features[~train])
            features = [self.transform(part) for part in features]
        self.features = torch.cat(features).to(device)

    def inputs(self, items: Tensor) -> tuple[Tensor, ...]:
        """Return features `[b, …]`, or frames `[b, T, D]` and lengths `[b]`."""
        return self.frames(items) if self.frames else (self.features[items.to(self.device)],)

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return *self.inputs(items), self.targets[items.to(self.device)]

    def mask(self, clips: Sequence[np.ndarray]) -> Tensor:
        marked = torch.from_numpy(np.stack(clips, 1))
        mask = torch.zeros(len(self.owners), marked.shape[1], dtype=torch.bool)
        mask[: self.pool_items] = marked[self.owners[: self.pool_items]]
        return mask

    def scores(self, probe: Any, items: Tensor) -> Tensor:
        """Return the class scores `[b, J, C]` of some items."""
        size = BATCH_FRAMES if self.frames else BATCH_ITEMS
        with torch.no_grad():
            return torch.cat([probe(*self.inputs(some)).cpu() for some in items.split(size)])

    def validate(self, probe: Any, valid: Tensor) -> list[tuple[float, float]]:
        items = torch.nonzero(valid.any(1))[:, 0]
        scores, targets = self.scores(probe, items), self.targets.cpu()[items]
        return [
            (self._score(scores[own, head], targets[own]), _loss(scores[own, head], targets[own]))
            for head, own in enumerate(valid[items].T)
        ]

    def test(self, probe: Any) -> SplitResult:
        items = torch.arange(self.pool_items, len(self.owners))
        scores, targets = self.scores(probe, items)[:, 0], self.targets.cpu()[items]
        score = self._score(scores, targets)
        if targets.ndim == 1:
            highest, predicted = scores.softmax(1).max(1)
            right = (predicted == targets).double().numpy()
            names = tuple(self.classes[code] for code in predicted.tolist())
            return SplitResult(score, right, names, tuple(_rounded(highest)))
        owners, probabilities = self.owners[items] - self.pool_clips, scores.sigmoid()

        def score_of(clips: np.ndarray) -> float:
            own = torch.from_numpy(clips)[owners]
            return self._score(scores[own], targets[own])

        units = jackknife(score_of, self.test_groups)
        if ANSWERS[self.metric] == "events":
            return SplitResult(score, units, self._events(probabilities, owners))
        marked = [torch.nonzero(row > 0.5)[:, 0] for row in probabilities]
        return SplitResult(
            score,
            units,
            tuple(tuple(self.classes[code] for code in codes.tolist()) for codes in marked),
            tuple(
                tuple(_rounded(row[codes]))
                for row, codes in zip(probabilities, marked, strict=True)
            ),
        )

    def _score(self, scores: Tensor, targets: Tensor) -> float:
        return class_metric(self.metric, len(self.classes), scores, targets)

    def _events(self, probabilities: Tensor, owners: Tensor) -> tuple[Any, ...]:
        """Return the events (start, end, class) of each clip: runs of segments with a probability
        above 0.5.
        """
        found = []
        for clip in range(len(self.test_groups)):
            marks = (probabilities[owners == clip] > 0.5).int().numpy()
            edges = np.diff(np.pad(marks, ((1, 1), (0, 0))), axis=0)
            events = []
            for code, name in enumerate(self.classes):
                starts, ends = (np.flatnonzero(edges[:, code] == sign) for sign in (1, -1))
                for start, end in self.segment_seconds * np.stack([starts, ends], 1):
                    events.append((round(float(start), 3), round(float(end), 3), name))
            found.append(tuple(sorted(events)))
        return tuple(found)


def _loss(scores: Tensor, targets: Tensor) -> float:
    if targets.ndim == 1:
        return float(F.cross_entropy(scores, targets))
    return float(F.binary_cross_entropy_with_logits(scores, targets))


def _rounded(probabilities: Tensor) -> list[float]:
    return [round(value, 4) for value in probabilities.tolist()]


def class_targets(
    part: Embeddings, answer: Answer, classes: Sequence[str], segment_seconds: float = 0.0
) -> Tensor:
    """Return classes `[I]`, or `[I, C]` of 0 and 1 if an item has any number of classes. Events
    are converted to the classes of each segment.
    """
    number = {name: code for code, name in enumerate(classes)}
    if answer == "class":
        return torch.tensor([number[label] for label in part.labels], dtype=torch.long)
    if answer == "classes":
        targets = torch.zeros(len(part), len(classes))
        for clip, names in enumerate(part.labels):
            targets[clip, [number[name] for name in names if name in number]] = 1.0
        return targets
    rolls = []
    for events, segments in zip(part.labels, part.lengths, strict=True):
        roll = torch.zeros(segments, len(classes))
        for start, end, name in (event for event in events if event[2] in number):
            # The tolerance of 1e-6 is for rounding: 0.3 / 0.1 is slightly below 3, and an event
            # that ends at a border does not overlap the next segment.
            first = floor(start / segment_seconds + 1e-6)
            last = ceil(end / segment_seconds - 1e-6)
            roll[first : max(last, first + 1), number[name]] = 1.0
        rolls.append(roll)
    return torch.cat([torch.zeros(0, len(classes)), *rolls])


def jackknife(score: Callable[[np.ndarray], float], groups: np.ndarray) -> np.ndarray:
    """Return pseudo-values `[U]` of a score that is not a mean over clips (F1, mean average
    precision).

    Each of up to `JACKKNIFE_BUNDLES` bundles of groups is left out once: U · score(all) − (U − 1)
    · score(all but the bundle). Pseudo-values vary like the score, so paired tests can treat
    them like clips (Tukey's pseudo-values; Efron & Tibshirani, chapter 11). They are shifted so
    that their mean is the score. Their own mean would correct the score for a bias, which rare
    classes make larger than the score.

    Args:
        score: score of the clips marked by a mask `[B]`.
        groups: `[B]`, group number of each clip, from 0. Groups are left out whole.
    """
    bundles = groups % min(JACKKNIFE_BUNDLES, int(groups.max()) + 1)
    count = int(bundles.max()) + 1
    whole = score(np.ones(len(groups), dtype=bool))
    if count == 1:
        return np.array([whole])
    without = np.array([score(bundles != bundle) for bundle in range(count)])
    return whole + (count - 1) * (without.mean() - without)
