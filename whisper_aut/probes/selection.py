"""Rounds → scores: settings are chosen on validation clips only, and each test part is scored once per seed.

For each round, all inner folds and candidate settings are problems of one batched fit. A candidate is as good as its mean validation
score over the inner folds (ties: the lower loss there). The probe that is tested is fitted again, with what was chosen, on the full
training split, or on training and validation split. Choosing knows no seeds: a seed decides batch order and starting weights of the
tested probe, and each seed's probe is trained by itself, so that its score does not depend on the other seeds of a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.probes.fitting import FittedProbes, Setting
from whisper_aut.probes.items import Items
from whisper_aut.probes.metrics import ANSWERS, class_metric
from whisper_aut.probes.rounds import FinalFit, Round, Trial, final_clips, trials

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
