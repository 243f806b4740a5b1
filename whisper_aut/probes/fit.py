"""Fit and score the rounds of a task: settings are chosen on validation clips only, and each
test part is scored once per seed.

In each round, all inner folds and candidate settings are problems of one batched fit. The best
candidate has the highest mean validation score over the inner folds, or the lower loss among
equals. The final probe is fitted again with the chosen setting, on the full training split or on
training and validation split. Seeds play no part in the choice: they decide batch order and
initial weights of the final probe. Each seed's probe is trained by itself, so that its score
does not depend on the other seeds of a run.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.metrics import ANSWERS, Answer, class_metric
from whisper_aut.probes.tasks import ProbeTask

FinalFit = Literal["train", "train+valid"]
HELD_OUT_SHARE = 0.2  # fraction of the training clips, for tasks without a validation split
# Validation folds per test fold: all of a 5-fold task, the next four of a 10-fold task.
MAX_INNER_FOLDS = 4


@dataclass(frozen=True)
class Round:
    """One test part and the clips that its probe may be trained on.

    Attributes:
        number: index of the round.
        pool: the clips to train and validate on.
        parts: `[B]`, index of the validation part of each clip in the pool; -1 for none.
        train: `[B]`, whether a clip is in the training split. With folds, all are.
        validate: the parts that settings are chosen on. If empty, a fraction of the training
            clips is held out.
        test: the test clips, scored once per seed.
    """

    number: int
    pool: Embeddings
    parts: np.ndarray
    train: np.ndarray
    validate: tuple[int, ...]
    test: Embeddings


@dataclass(frozen=True)
class Trial:
    """Clips of a pool to fit on and clips to validate on, as masks `[B]`."""

    fit: np.ndarray
    valid: np.ndarray


def rounds_of(parts: dict[str, Embeddings], task: ProbeTask) -> list[Round]:
    """Return the rounds of a task: one for splits, or one per fold."""
    if task.split.scheme == "folds":
        return fold_rounds(list(parts.values()))
    return [split_round(parts)]


def split_round(splits: dict[str, Embeddings]) -> Round:
    """Return the round of a task with a train, a valid (possibly empty) and a test split."""
    train, valid = splits["train"], splits["valid"]
    parts = np.repeat([-1, 0], [len(train), len(valid)])
    return Round(
        0,
        Embeddings.join([train, valid]),
        parts,
        parts < 0,
        (0,) if len(valid) else (),
        splits["test"],
    )


def fold_rounds(folds: Sequence[Embeddings]) -> list[Round]:
    """Return one round per fold, with that fold as the test part and the others as the pool."""
    rounds = []
    for number, test in enumerate(folds):
        order = [(number + step) % len(folds) for step in range(1, len(folds))]
        others = [folds[i] for i in order]
        parts = np.repeat(np.arange(len(others)), [len(fold) for fold in others])
        # With two folds, the only other fold is needed for training.
        validate = tuple(range(min(len(others), MAX_INNER_FOLDS))) if len(others) > 1 else ()
        rounds.append(
            Round(
                number,
                Embeddings.join(others),
                parts,
                np.ones(len(parts), dtype=bool),
                validate,
                test,
            )
        )
    return rounds


def trials(round: Round, strata: np.ndarray) -> list[Trial]:
    """Return the trials that settings are chosen by: one per validation part, or a single one
    that holds out a fifth of each class of the training clips.

    Args:
        round: the round.
        strata: `[B]`, the class of each clip in the pool; all equal if clips have several
            classes.
    """
    if round.validate:
        return [
            Trial(round.train & (round.parts != part), round.parts == part)
            for part in round.validate
        ]
    clips = np.flatnonzero(round.train)
    rng = np.random.default_rng(round.number)
    drawn = stratified(strata[clips], HELD_OUT_SHARE, rng, leave_one=True)
    held_out = _mask(clips[drawn], len(strata))
    return [Trial(round.train & ~held_out, held_out)]


def final_clips(round: Round, final_fit: FinalFit) -> np.ndarray:
    """Return `[B]`, a mask of the clips that the final probe is fitted on: the training clips,
    or with `train+valid` all clips.
    """
    return round.train if final_fit == "train" else np.ones(len(round.pool), dtype=bool)


def stratified(
    labels: np.ndarray, share: float, rng: np.random.Generator, leave_one: bool = False
) -> np.ndarray:
    """Draw a fraction of every class without replacement, at least one clip each.

    Args:
        labels: class of each clip.
        share: the fraction.
        rng: random number generator.
        leave_one: never draw all clips of a class.

    Returns:
        Sorted indices of the drawn clips.
    """
    drawn = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(members)))
        drawn.append(members[: min(count, len(members) - 1) if leave_one else count])
    return np.sort(np.concatenate(drawn))


def check_rounds(rounds: Sequence[Round], name: str) -> None:
    """Check that every round has clips to train on and to test on.

    Raises:
        UserError: if there are none.
    """
    for one in rounds:
        for where, part in (("train", one.pool), ("test", one.test)):
            if not len(part) or (where == "train" and not one.train.any()):
                skipped = (
                    ", ".join(f"{count} {reason}" for reason, count in part.skipped.items())
                    or "no samples at all"
                )
                raise UserError(
                    f"Probe task {name!r} has no clips in {where!r} ({skipped}). Check its "
                    "folders, label and select."
                )


def _mask(positions: np.ndarray, length: int) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    mask[positions] = True
    return mask


Setting = dict[str, float]  # hyperparameters of a probe, such as penalty or learning rate
# FLOPs per step below which several threads are slower than one, up to 30 times on a busy machine.
ONE_THREAD_FLOPS = 4e9

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class FittedProbes:
    """J probes that were fitted together.

    Attributes:
        scores: features of I items → class scores `[I, J, C]`.
        epochs: number of epochs of each probe. Empty for probes that are not trained by epochs.
    """

    scores: Callable[[Tensor], Tensor]
    epochs: Sequence[int] = ()


class OneBatch:
    """A loader with a single batch that is already in memory. A `DataLoader` would copy it and
    warn about missing workers.
    """

    def __init__(self, batch: tuple[Tensor, ...]):
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield self.batch

    def __len__(self) -> int:
        return 1


# In a validation hook, parameters created in inference mode would silently never train.
@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    probe: LightningModule, batch: tuple[Tensor, ...], device: str = "cpu", epochs: int = 1
) -> None:
    """Fit a probe on one full batch.

    Args:
        probe: the probe, fitted in place and left in eval mode.
        batch: the batch.
        device: `cpu`, `cuda` or `cuda:N`.
        epochs: how often the batch is passed to the probe.
    """
    accelerator, _, number = device.partition(":")
    sizes = [parameter.numel() for parameter in probe.parameters()]
    step_flops = 4 * len(batch[0]) * max(sizes)
    assert not any(parameter.is_inference() for parameter in probe.parameters()), (
        "a probe made in inference mode never trains"
    )
    with _quiet_trainer(), threads(1 if step_flops < ONE_THREAD_FLOPS else THREADS):
        trainer = Trainer(
            accelerator=accelerator, devices=[int(number)] if number else 1, max_epochs=epochs,
            barebones=True,
            # One process, even inside a run started by torchrun or Slurm.
            plugins=[LightningEnvironment()],
        )  # fmt: skip
        trainer.fit(probe, OneBatch(batch))
    probe.eval()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` threads within the block; None keeps the current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Mute Lightning's messages about devices and missing loops, which every fit would repeat."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def class_losses(scores: Tensor, answers: Tensor) -> Tensor:
    """Return the losses `[I, J]` of class scores `[I, J, C]`.

    The loss is cross-entropy for classes `[I]`, or the sum of C binary cross-entropies for
    answers `[I, C]`.
    """
    items, problems, _ = scores.shape
    if answers.ndim == 2:
        wanted = answers[:, None].to(scores.dtype).expand_as(scores)
        return F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").sum(2)
    each = F.cross_entropy(
        scores.flatten(0, 1), answers.repeat_interleave(problems), reduction="none"
    )
    return each.view(items, problems)


@dataclass(frozen=True)
class Items:
    """The items of a pool or a test part: its clips, or their segments.

    Attributes:
        features: features, `[I, …, D]`.
        answers: classes `[I]`, or `[I, C]` of 0 and 1.
        owner: `[I]`, index of the clip of each item.
        groups: `[B]`, group number of each clip.
    """

    features: Tensor
    answers: Tensor
    owner: Tensor
    groups: np.ndarray

    @property
    def clips(self) -> int:
        """Number of clips, B."""
        return len(self.groups)

    def of(self, clips: np.ndarray) -> Tensor:
        """Return `[I]`, whether an item belongs to a clip marked by the mask `clips` `[B]`."""
        return torch.from_numpy(clips).to(self.owner.device)[self.owner]

    def to(self, device: str) -> "Items":
        """Move the tensors to a device."""
        return Items(
            self.features.to(device), self.answers.to(device), self.owner.to(device), self.groups
        )


def items_of(
    part: Embeddings, answer: Answer, classes: Sequence[str], segment_seconds: float = 0.0
) -> Items:
    """Convert embeddings and labels into items. Events are converted into classes per segment of
    `segment_seconds`.
    """
    if answer == "class":
        number = {name: code for code, name in enumerate(classes)}
        answers = torch.tensor([number[label] for label in part.labels], dtype=torch.long)
    elif answer == "classes":
        answers = (
            torch.stack([_marks(label, classes) for label in part.labels])
            if len(part)
            else torch.zeros(0, len(classes))
        )
    else:
        rolls = [
            _roll(label, classes, length, segment_seconds)
            for label, length in zip(part.labels, part.lengths, strict=True)
        ]
        answers = torch.cat(rolls) if rolls else torch.zeros(0, len(classes))
    owner = (
        torch.arange(len(part)).repeat_interleave(torch.tensor(part.lengths))
        if part.lengths
        else torch.arange(len(part))
    )
    return Items(part.features, answers, owner, part.group_numbers())


def class_names(rounds: Sequence[Round], answer: Answer, name: str) -> list[str]:
    """Check the classes of all rounds, and return the sorted classes that are trained or tested
    on.

    Raises:
        UserError: if there is a single class, a class that is validated or tested on but not
            trained on, or too few clips to choose settings.
    """
    if answer in ("captions", "text"):
        return []
    found: set[str] = set()
    for one in rounds:
        known = _classes(
            [label for label, taken in zip(one.pool.labels, one.train, strict=True) if taken],
            answer,
        )
        if len(known) < (2 if answer == "class" else 1):
            raise UserError(
                f"Probe task {name!r} has a single class in 'train', "
                f"{next(iter(known), 'none')!r}: there is nothing to tell apart."
            )
        valid = [
            label for label, taken in zip(one.pool.labels, one.train, strict=True) if not taken
        ]
        for split, labels in (("valid", valid), ("test", one.test.labels)):
            unknown = sorted(_classes(labels, answer) - known)
            if unknown and answer == "class":
                raise UserError(
                    f"Probe task {name!r} has {len(unknown)} classes in {split!r} that 'train' "
                    f"lacks: {', '.join(unknown[:8])}. "
                    "Check that label and split fields are the right ones."
                )
        if answer == "class" and not one.validate and len(known) == int(one.train.sum()):
            raise UserError(
                f"Probe task {name!r} has one clip per class and no validation split: no penalty "
                "can be chosen."
            )
        found |= known
    for one in rounds if answer != "class" else ():
        found |= _classes(one.test.labels, answer)
    return sorted(found)


def strata(round: Round, answer: Answer) -> np.ndarray:
    """Return `[B]`, the class by which the clips of a pool are stratified."""
    if answer != "class":
        return np.zeros(len(round.pool), dtype=int)
    return np.unique(np.array(round.pool.labels), return_inverse=True)[1]


def _classes(labels: Sequence, answer: Answer) -> set[str]:
    if answer == "class":
        return set(labels)
    if answer == "classes":
        return {name for label in labels for name in label}
    return {name for label in labels for _, _, name in label}


def _marks(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    present = set(names)
    return torch.tensor([float(name in present) for name in classes])


def _roll(
    events: Sequence, classes: Sequence[str], segments: int, segment_seconds: float
) -> Tensor:
    """Return `[segments, C]`: 1 for every segment that an event `(start, end, class)` overlaps.
    Events of other classes are ignored.
    """
    roll = torch.zeros(segments, len(classes))
    number = {name: code for code, name in enumerate(classes)}
    for start, end, name in (event for event in events if event[2] in number):
        # The tolerance of 1e-6 is for rounding: 0.3 / 0.1 is slightly below 3, and an event that
        # ends at a border does not overlap the next segment.
        first, last = floor(start / segment_seconds + 1e-6), ceil(end / segment_seconds - 1e-6)
        roll[first : max(last, first + 1), number[name]] = 1.0
    return roll


JACKKNIFE_GROUPS = 100


@dataclass(frozen=True)
class Validation:
    """Result of a setting on validation clips: score, loss, and the best number of epochs if the
    probe trains by epochs.
    """

    score: float
    loss: float
    epochs: int | None = None


@dataclass(frozen=True)
class Judgement:
    """The score of a probe on the test clips, and what it is computed from.

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


@dataclass(frozen=True)
class SeedRun:
    """The results of one seed on one task.

    Attributes:
        seed: None for a probe without a random start.
        scores: score of each round (test part).
        settings: chosen setting of each round.
        valid_scores: validation score of each chosen setting; None if there was nothing to
            choose.
        units, predicted, probabilities: per round, see `Judgement`.
    """

    seed: int | None
    scores: tuple[float, ...]
    settings: tuple[Setting, ...]
    valid_scores: tuple[float | None, ...]
    units: tuple[np.ndarray, ...]
    predicted: tuple[tuple[Any, ...], ...] = ()
    probabilities: tuple[tuple[Any, ...], ...] = ()


class Learner(Protocol):
    """A probe kind, bound to one round."""

    @property
    def block(self) -> int:
        """Number of problems that fit in memory at once."""
        ...

    def validate(self, trials: Sequence[Trial], settings: Sequence[Setting]) -> list[Validation]:
        """Fit one probe per trial and setting, together, and score each on its validation clips."""
        ...

    def test(self, clips: np.ndarray, setting: Setting, seed: int) -> Judgement:
        """Fit one probe on the clips marked by the mask `clips` `[B]`, and score it on the test
        part.
        """
        ...


def score_round(
    learner: Learner,
    round: Round,
    strata: np.ndarray,
    candidates: Sequence[Setting],
    seeds: Sequence[int | None],
    final_fit: FinalFit,
    by_epochs: bool,
) -> list[SeedRun]:
    """Choose a setting and score the test part, once per seed.

    Args:
        learner: a probe kind, bound to the round.
        round: the round.
        strata: `[B]`, the class of each clip in the pool; all equal if clips have several
            classes.
        candidates: settings to choose from.
        seeds: seeds of the final probe.
        final_fit: what the final probe is fitted on.
        by_epochs: whether the probe trains by epochs. Their number is then chosen on validation
            clips, even for a single candidate.
    """
    setting, valid_score = candidates[0], None
    if len(candidates) > 1 or by_epochs:
        setting, valid_score = _choose(learner, trials(round, strata), candidates)
    clips, runs = final_clips(round, final_fit), []
    for seed in seeds:
        test = learner.test(clips, setting, seed or 0)
        score = shortened(test.score)
        made_of = (test.units,), (test.predicted,), (test.probabilities,)
        runs.append(SeedRun(seed, (score,), (setting,), (valid_score,), *made_of))
    return runs


def _choose(
    learner: Learner, inner: Sequence[Trial], candidates: Sequence[Setting]
) -> tuple[Setting, float]:
    """Return the candidate with the best mean validation score, and that score. If it trains by
    epochs, `epochs` is the mean of its trials.
    """
    shape = len(inner), len(candidates)
    scores, losses, epochs = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for block in _blocks(*shape, learner.block):
        found = learner.validate([inner[t] for t, _ in block], [candidates[c] for _, c in block])
        for (t, c), one in zip(block, found, strict=True):
            scores[t, c], losses[t, c], epochs[t, c] = one.score, one.loss, one.epochs or 0
    # Scores that differ only by rounding are ties, which the loss breaks.
    means = scores.mean(0).round(9)
    best = int(np.lexsort((losses.mean(0), -means))[0])
    chosen = dict(candidates[best])
    if epochs[:, best].all():
        chosen["epochs"] = round(epochs[:, best].mean())
    return chosen, shortened(means[best])


def _blocks(trials: int, candidates: int, most: int) -> list[list[tuple[int, int]]]:
    """Split (trial, candidate) pairs into blocks of at most `most`, keeping the pairs of a trial
    together.

    The problems of one trial leave out the same fold, so such a block is fitted without that
    fold's items. If all trials fit into one block, one block is cheaper than several.
    """
    blocks: list[list[tuple[int, int]]] = [[]]
    for trial in range(trials):
        problems = [(trial, candidate) for candidate in range(candidates)]
        for first in range(0, len(problems), most):
            chunk = problems[first : first + most]
            if len(blocks[-1]) + len(chunk) > most:
                blocks.append([])
            blocks[-1] += chunk
    return [block for block in blocks if block]


def join_rounds(rounds: Sequence[Sequence[SeedRun]]) -> list[SeedRun]:
    """Join the rounds of each seed."""
    names = ("scores", "settings", "valid_scores", "units", "predicted", "probabilities")
    return [
        SeedRun(
            runs[0].seed,
            *(tuple(value for run in runs for value in getattr(run, name)) for name in names),
        )
        for runs in zip(*rounds, strict=True)
    ]


def shortened(score: float) -> float:
    """Drop digits beyond float32 precision."""
    return round(float(score), 6)


def jackknife(score: Callable[[np.ndarray], float], groups: np.ndarray) -> np.ndarray:
    """Return pseudo-values `[U]` of a score that is not a mean over clips (F1, mean average
    precision).

    Each of up to `JACKKNIFE_GROUPS` bundles of groups is left out once: U · score(all) − (U − 1)
    · score(all but the bundle). Pseudo-values vary like the score, so paired tests can treat
    them like clips (Tukey's pseudo-values; Efron & Tibshirani, chapter 11). They are shifted so
    that their mean is the score. Their own mean would correct the score for a bias, which rare
    classes make larger than the score.

    Args:
        score: score of the clips marked by a mask `[B]`.
        groups: `[B]`, group number of each clip, from 0. Groups are left out whole.
    """
    clips = len(groups)
    groups = groups % min(JACKKNIFE_GROUPS, int(groups.max()) + 1)
    count = int(groups.max()) + 1
    whole = score(np.ones(clips, dtype=bool))
    if count == 1:
        return np.array([whole])
    without = np.array([score(groups != group) for group in range(count)])
    return whole + (count - 1) * (without.mean() - without)


class Fitter(Protocol):
    """Fits class probes on the items of one pool."""

    @property
    def block(self) -> int:
        """Number of problems that fit in memory at once."""
        ...

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        """Fit J probes together.

        Args:
            rows: `[I, J]`, marks the items that each probe is fitted on.
            settings: setting of each probe.
            valid: `[I, J]`, marks the items used for early stopping; None for a final fit.
            seed: decides batch order and initial weights.
        """
        ...


@dataclass(frozen=True)
class ClassLearner:
    """A learner for every probe kind that gives class scores.

    Attributes:
        pool: items to train and validate on.
        tested: items of the test part.
        classes: class names.
        metric: a key of `METRICS`.
        fitter: fits the probes.
        segment_seconds: segment length, for tasks with events.
    """

    pool: Items
    tested: Items
    classes: tuple[str, ...]
    metric: str
    fitter: Fitter
    segment_seconds: float = 0.0

    @property
    def block(self) -> int:
        return self.fitter.block

    def validate(self, trials: Sequence[Trial], settings: Sequence[Setting]) -> list[Validation]:
        rows, valid = (
            torch.stack([self.pool.of(mask).cpu() for mask in masks], 1)
            for masks in zip(*((trial.fit, trial.valid) for trial in trials), strict=True)
        )
        fitted = self.fitter(rows, settings, valid, 0)
        used = valid.any(1)
        scores = fitted.scores(self.pool.features[used]).cpu()
        answers, found = self.pool.answers[used], []
        for problem, own in enumerate(valid[used].T):
            score, loss = self._judge(scores[own, problem], answers[own])
            found.append(Validation(score, loss, fitted.epochs[problem] if fitted.epochs else None))
        return found

    def test(self, clips: np.ndarray, setting: Setting, seed: int) -> Judgement:
        rows = self.pool.of(clips).cpu()[:, None]
        scores = self.fitter(rows, [setting], None, seed).scores(self.tested.features).cpu()[:, 0]
        answers = self.tested.answers
        score, _ = self._judge(scores, answers)
        if answers.ndim == 1:
            highest, predicted = scores.softmax(1).max(1)
            return Judgement(
                score,
                (predicted == answers).double().numpy(),
                tuple(self.classes[code] for code in predicted.tolist()),
                tuple(_rounded(highest)),
            )

        def without(clips: np.ndarray) -> float:
            own = self.tested.of(clips)
            return self._judge(scores[own], answers[own])[0]

        units, probabilities = jackknife(without, self.tested.groups), scores.sigmoid()
        if ANSWERS[self.metric] == "events":
            return Judgement(score, units, self._events(probabilities))
        marked = [torch.nonzero(row > 0.5)[:, 0] for row in probabilities]
        return Judgement(
            score,
            units,
            tuple(tuple(self.classes[code] for code in codes.tolist()) for codes in marked),
            tuple(
                tuple(_rounded(row[codes]))
                for row, codes in zip(probabilities, marked, strict=True)
            ),
        )

    def _events(self, probabilities: Tensor) -> tuple[Any, ...]:
        """Return the events (start, end, class) of each clip: runs of segments with a
        probability above 0.5.
        """
        found: list[list[tuple[float, float, str]]] = [[] for _ in range(self.tested.clips)]
        for clip in range(self.tested.clips):
            marks = (probabilities[self.tested.owner == clip] > 0.5).int().numpy()
            edges = np.diff(np.pad(marks, ((1, 1), (0, 0))), axis=0)
            for code, name in enumerate(self.classes):
                bounds = zip(
                    *(np.flatnonzero(edges[:, code] == turn) for turn in (1, -1)), strict=True
                )
                for first, last in bounds:
                    span = (round(float(edge * self.segment_seconds), 3) for edge in (first, last))
                    found[clip].append((*span, name))  # pyright: ignore[reportArgumentType]
        return tuple(tuple(sorted(events)) for events in found)

    def _judge(self, scores: Tensor, answers: Tensor) -> tuple[float, float]:
        score = class_metric(self.metric, len(self.classes), scores, answers)
        loss = (
            F.cross_entropy(scores, answers)
            if answers.ndim == 1
            else F.binary_cross_entropy_with_logits(scores, answers)
        )
        return score, float(loss)


def _rounded(probabilities: Tensor) -> list[float]:
    return [round(value, 4) for value in probabilities.tolist()]
