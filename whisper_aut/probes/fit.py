"""Rounds → scores: settings are chosen on validation clips only, and each test part is scored once per seed.

For each round, all inner folds and candidate settings are problems of one batched fit. A candidate is as good as its mean validation
score over the inner folds (ties: the lower loss there). The probe that is tested is fitted again, with what was chosen, on the full
training split, or on training and validation split. Choosing knows no seeds: a seed decides batch order and starting weights of the
tested probe, and each seed's probe is trained by itself, so that its score does not depend on the other seeds of a run.
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
HELD_OUT_SHARE = 0.2  # of the training clips, where a task has no validation split
MAX_INNER_FOLDS = (
    4  # validation folds per test fold: all of a 5-fold task, the next four of a 10-fold one
)


@dataclass(frozen=True)
class Round:
    """One test part and the clips that a probe of it may learn from.

    Attributes:
        number: which round of the task this is.
        pool: the clips to learn from.
        parts: `[B]`, the validation part that a clip of the pool belongs to; -1 where it is none's.
        train: `[B]`, whether the clip is in the training split; in folds all are.
        validate: the parts that settings are chosen on; none means that a share of the training clips is held out.
        test: read once a seed.
    """

    number: int
    pool: Embeddings
    parts: np.ndarray
    train: np.ndarray
    validate: tuple[int, ...]
    test: Embeddings


@dataclass(frozen=True)
class Trial:
    """Clips of a pool to fit on and others to validate on, `[B]` masks."""

    fit: np.ndarray
    valid: np.ndarray


def rounds_of(parts: dict[str, Embeddings], task: ProbeTask) -> list[Round]:
    """Return the rounds of a task: one for splits, one per fold for folds."""
    if task.split.scheme == "folds":
        return fold_rounds(list(parts.values()))
    return [split_round(parts)]


def split_round(splits: dict[str, Embeddings]) -> Round:
    """Return the one round of a task with a train, a valid (perhaps empty) and a test split."""
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
    """Return one round per fold: it is the test part, the others are the pool."""
    rounds = []
    for number, test in enumerate(folds):
        order = [(number + step) % len(folds) for step in range(1, len(folds))]
        others = [folds[i] for i in order]
        parts = np.repeat(np.arange(len(others)), [len(fold) for fold in others])
        # With two folds there is no fold left to validate on beside the one to train on.
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
    """Return what settings are chosen by: one trial per validation part, or a fifth of every class of the training clips held out.

    Args:
        strata: `[B]`, the class of each clip of the pool; all alike where clips have more than one.
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
    """Return `[B]`, the clips that the tested probe is fitted on: all training clips, and with `train+valid` the validation split."""
    return round.train if final_fit == "train" else np.ones(len(round.pool), dtype=bool)


def stratified(
    labels: np.ndarray, share: float, rng: np.random.Generator, leave_one: bool = False
) -> np.ndarray:
    """Draw a share of every class without replacement, at least one clip of each; return sorted positions.

    `leave_one`: never draw the last clip of a class.
    """
    drawn = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(members)))
        drawn.append(members[: min(count, len(members) - 1) if leave_one else count])
    return np.sort(np.concatenate(drawn))


def check_rounds(rounds: Sequence[Round], name: str) -> None:
    """Refuse rounds that no probe can be fitted or tested on.

    Raises:
        UserError: no clips to learn from or to test on.
    """
    for one in rounds:
        for where, part in (("train", one.pool), ("test", one.test)):
            if not len(part) or (where == "train" and not one.train.any()):
                skipped = (
                    ", ".join(f"{count} {reason}" for reason, count in part.skipped.items())
                    or "no samples at all"
                )
                raise UserError(
                    f"Probe task {name!r} has no clips in {where!r} ({skipped}). Check its folders, label and select."
                )


def _mask(positions: np.ndarray, length: int) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    mask[positions] = True
    return mask


Setting = dict[str, float]  # what a probe is trained with, by name: a penalty, a learning rate
ONE_THREAD_FLOPS = (
    4e9  # a step: below it threads cost more than they bring, on a busy machine up to 30 times more
)

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class FittedProbes:
    """J probes that were fitted together.

    Attributes:
        scores: features of I items → `[I, J, C]`.
        epochs: how many each was trained for; none where nothing trains by epochs.
    """

    scores: Callable[[Tensor], Tensor]
    epochs: Sequence[int] = ()


class OneBatch:
    """A loader of one batch that is there already: a `DataLoader` would copy it and warn of missing workers."""

    def __init__(self, batch: tuple[Tensor, ...]):
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield self.batch

    def __len__(self) -> int:
        return 1


@torch.inference_mode(
    False
)  # within a validation hook, parameters made in inference mode would silently never train
@torch.enable_grad()
def fit(
    probe: LightningModule, batch: tuple[Tensor, ...], device: str = "cpu", epochs: int = 1
) -> None:
    """Fit a probe on one full batch, `epochs` times over."""
    accelerator, _, number = device.partition(":")
    sizes = [parameter.numel() for parameter in probe.parameters()]
    step_flops = 4 * len(batch[0]) * max(sizes)
    assert not any(parameter.is_inference() for parameter in probe.parameters()), (
        "a probe made in inference mode never trains"
    )
    with _quiet_trainer(), threads(1 if step_flops < ONE_THREAD_FLOPS else THREADS):
        trainer = Trainer(
            accelerator=accelerator, devices=[int(number)] if number else 1, max_epochs=epochs, barebones=True,
            plugins=[LightningEnvironment()],  # alone, even inside a run that torchrun or Slurm started
        )  # fmt: skip
        trainer.fit(probe, OneBatch(batch))
    probe.eval()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; None leaves their number alone."""
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


def class_losses(scores: Tensor, answers: Tensor) -> Tensor:
    """Return `[I, J]` losses of `[I, J, C]` scores: cross-entropy of `[I]` classes, or the sum of C binary ones of `[I, C]` answers."""
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
    """What a probe sees of a pool or of a test part.

    Attributes:
        features: `[I, …, D]`.
        answers: `[I]` classes, or `[I, C]` of 0 and 1.
        owner: `[I]`, the number of the clip that the item belongs to.
        groups: `[B]`, the number of each clip's group.
    """

    features: Tensor
    answers: Tensor
    owner: Tensor
    groups: np.ndarray

    @property
    def clips(self) -> int:
        """B."""
        return len(self.groups)

    def of(self, clips: np.ndarray) -> Tensor:
        """Return `[I]`, whether an item belongs to one of the clips that the mask `[B]` marks."""
        return torch.from_numpy(clips).to(self.owner.device)[self.owner]

    def to(self, device: str) -> "Items":
        return Items(
            self.features.to(device), self.answers.to(device), self.owner.to(device), self.groups
        )


def items_of(
    part: Embeddings, answer: Answer, classes: Sequence[str], segment_seconds: float = 0.0
) -> Items:
    """Turn embeddings and labels into items; events are laid out over segments of `segment_seconds`."""
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
    """Return the classes that are trained or tested on, in order, once all rounds have been found fit to probe.

    Raises:
        UserError: a single class, a class that is only validated or tested on, or too few clips to choose settings by.
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
                f"Probe task {name!r} has a single class in 'train', {next(iter(known), 'none')!r}: there is nothing to tell apart."
            )
        valid = [
            label for label, taken in zip(one.pool.labels, one.train, strict=True) if not taken
        ]
        for split, labels in (("valid", valid), ("test", one.test.labels)):
            unknown = sorted(_classes(labels, answer) - known)
            if unknown and answer == "class":
                raise UserError(
                    f"Probe task {name!r} has {len(unknown)} classes in {split!r} that 'train' lacks: {', '.join(unknown[:8])}. "
                    "Check that label and split fields are the right ones."
                )
        if answer == "class" and not one.validate and len(known) == int(one.train.sum()):
            raise UserError(
                f"Probe task {name!r} has one clip per class and no validation split: no penalty can be chosen."
            )
        found |= known
    for one in rounds if answer != "class" else ():
        found |= _classes(one.test.labels, answer)
    return sorted(found)


def strata(round: Round, answer: Answer) -> np.ndarray:
    """Return `[B]`: by what the clips of a pool are drawn in proportion."""
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
    """Mark, `[segments, C]`, every segment that an event `(start, end, class)` touches; a class that is only validated on is no class."""
    roll = torch.zeros(segments, len(classes))
    number = {name: code for code, name in enumerate(classes)}
    for start, end, name in (event for event in events if event[2] in number):
        # A millionth of slack: 0.3 / 0.1 is a little below 3, and an event that ends at a border does not touch what follows.
        first, last = floor(start / segment_seconds + 1e-6), ceil(end / segment_seconds - 1e-6)
        roll[first : max(last, first + 1), number[name]] = 1.0
    return roll


JACKKNIFE_GROUPS = 100


@dataclass(frozen=True)
class Validation:
    """A setting on validation clips: score, loss, and for probes that train by epochs the best number of them."""

    score: float
    loss: float
    epochs: int | None = None


@dataclass(frozen=True)
class Judgement:
    """A probe's score on the test clips, and what it is made of.

    Attributes:
        units: `[U]`: for a score that is a mean over clips, what each adds to it; otherwise what groups of clips would, see
            `jackknife`. They are what two encoders are compared by.
        predicted: per clip the class, the classes, the events, the nearest caption or the transcript.
        probabilities: per clip that of the class or of each class predicted; empty where there are none.
    """

    score: float
    units: np.ndarray
    predicted: tuple[Any, ...]
    probabilities: tuple[Any, ...] = ()


@dataclass(frozen=True)
class SeedRun:
    """One seed on one task.

    Attributes:
        seed: None for a probe without a random start.
        scores, settings, valid_scores: per round (test part): the score, the setting chosen, its score on validation.
        units, predicted, probabilities: per test part, see `Judgement`.
    """

    seed: int | None
    scores: tuple[float, ...]
    settings: tuple[Setting, ...]
    valid_scores: tuple[float | None, ...]
    units: tuple[np.ndarray, ...]
    predicted: tuple[tuple[Any, ...], ...] = ()
    probabilities: tuple[tuple[Any, ...], ...] = ()


class Learner(Protocol):
    """A probe kind on one round."""

    @property
    def block(self) -> int:
        """How many problems fit into memory at once."""
        ...

    def validate(self, trials: Sequence[Trial], settings: Sequence[Setting]) -> list[Validation]:
        """Fit one probe per trial and setting, together, and judge each on its validation clips."""
        ...

    def test(self, clips: np.ndarray, setting: Setting, seed: int) -> Judgement:
        """Fit one probe on the clips of the pool that a mask `[B]` marks, and judge it on the test part."""
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
        strata: `[B]`, the class of each clip of the pool; all alike where clips have more than one.
        by_epochs: the probe trains by epochs, of which validation chooses the number, also for a single candidate.
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
    """Return the candidate with the best mean validation score, with the number of epochs where there is one, and that score."""
    shape = len(inner), len(candidates)
    scores, losses, epochs = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for block in _blocks(*shape, learner.block):
        found = learner.validate([inner[t] for t, _ in block], [candidates[c] for _, c in block])
        for (t, c), one in zip(block, found, strict=True):
            scores[t, c], losses[t, c], epochs[t, c] = one.score, one.loss, one.epochs or 0
    # A validation clip or two decides nothing: scores that differ in rounding only are ties, and the loss breaks them.
    means = scores.mean(0).round(9)
    best = int(np.lexsort((losses.mean(0), -means))[0])
    chosen = dict(candidates[best])
    if epochs[:, best].all():
        chosen["epochs"] = round(epochs[:, best].mean())
    return chosen, shortened(means[best])


def _blocks(trials: int, candidates: int, most: int) -> list[list[tuple[int, int]]]:
    """Lay out (trial, candidate) in blocks of at most `most`.

    The problems of one trial leave the same fold out: such a block is fitted without that fold's items. Where all trials fit into one
    block, one is less work than several.
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
    """Collect the rounds of each seed."""
    names = ("scores", "settings", "valid_scores", "units", "predicted", "probabilities")
    return [
        SeedRun(
            runs[0].seed,
            *(tuple(value for run in runs for value in getattr(run, name)) for name in names),
        )
        for runs in zip(*rounds, strict=True)
    ]


def shortened(score: float) -> float:
    """Cut digits that float32 does not hold."""
    return round(float(score), 6)


def jackknife(score: Callable[[np.ndarray], float], groups: np.ndarray) -> np.ndarray:
    """Return pseudo-values `[U]` of a score that is no mean over clips (F1, mean average precision).

    Each of up to `JACKKNIFE_GROUPS` bundles of groups is left out once: U · all − (U − 1) · all but it. They scatter as the score
    does, so that paired tests may treat them as clips are treated (Tukey's pseudo-values; Efron & Tibshirani, chapter 11). They are
    moved until their mean is the score: their own mean corrects the score for a bias that rare classes make larger than the score.

    Args:
        score: of the clips that a mask `[B]` marks.
        groups: `[B]`, the number of each clip's group, from 0 on; groups are left out whole.
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
    def block(self) -> int: ...

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        """Fit J probes together.

        Args:
            rows: `[I, J]`, the items that each is fitted on.
            valid: `[I, J]`, the items by which probes that train by epochs are stopped; None for a final fit.
        """
        ...


@dataclass(frozen=True)
class ClassLearner:
    """A learner for every kind whose probes give class scores.

    Attributes:
        segment_seconds: of the items of a task with events.
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
        """Return for each clip its events (start, end, class): runs of segments with a class above one half."""
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
