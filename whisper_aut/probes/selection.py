"""Rounds × seeds → scores: settings chosen on validation clips only, each test part read once a seed.

In: a round and a learner for it. Out: one `SeedRun` per seed. Next: `probes.suite`. For each round, the trials of all
seeds, inner folds and candidate settings are problems of one batched fit; a candidate's worth is its mean validation score over the
inner folds (ties: the lower loss there); the probe that is tested is fitted anew, with what was chosen, on all of the seed's clips.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.probes.fitting import Setting
from whisper_aut.probes.items import Items
from whisper_aut.probes.metrics import class_metric
from whisper_aut.probes.rounds import Draw, Round, draw

JACKKNIFE_GROUPS = 100


@dataclass(frozen=True)
class Judgement:
    """A probe's score on some clips, its loss there, and the units of which the score is the mean.

    Attributes:
        units: `[U]`: for a score that is a mean over clips, what each adds to it; otherwise what groups of clips would, see
            `jackknife`. They are what two encoders are compared by.
        predicted: `[B]` the class given to each clip, where a clip has one; otherwise empty.
    """

    score: float
    loss: float
    units: np.ndarray
    predicted: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))


@dataclass(frozen=True)
class SeedRun:
    """One seed on one task.

    Attributes:
        scores, settings, valid_scores: per round (test part): the score, the setting chosen, its score on validation.
        units, predicted: per test part, see `Judgement`.
    """

    seed: int
    scores: tuple[float, ...]
    settings: tuple[Setting, ...]
    valid_scores: tuple[float | None, ...]
    units: tuple[np.ndarray, ...]
    predicted: tuple[np.ndarray, ...] = ()


class Fitted(Protocol):
    """Probes that were fitted together."""

    def on_pool(self, clips: np.ndarray, problem: int) -> Judgement:
        """Judge one of them on the clips that a mask over the pool marks."""
        ...

    def on_test(self, problem: int) -> Judgement:
        """Judge one of them on the test part."""
        ...


class Learner(Protocol):
    """A probe kind on one round: fits any number of problems, each with clips `[B]` and a setting of its own."""

    @property
    def block(self) -> int:
        """How many problems fit into memory at once."""
        ...

    def fit(
        self, clips: Sequence[np.ndarray], settings: Sequence[Setting], thorough: bool
    ) -> Fitted: ...


def score_round(
    learner: Learner,
    round: Round,
    strata: np.ndarray,
    candidates: Sequence[Setting],
    seeds: Sequence[int],
) -> list[SeedRun]:
    """Choose settings and score the test part, once per seed."""
    draws = [draw(round, strata, seed) for seed in seeds]
    scores, losses = _trials(learner, draws, candidates)
    chosen = [
        int(np.lexsort((loss, -score))[0]) for score, loss in zip(scores, losses, strict=True)
    ]
    runs = []
    for first in range(0, len(seeds), learner.block):
        span = range(first, min(first + learner.block, len(seeds)))
        fitted = learner.fit(
            [draws[s].final for s in span], [candidates[chosen[s]] for s in span], thorough=True
        )
        for problem, s in enumerate(span):
            test, valid = fitted.on_test(problem), scores[s, chosen[s]]
            valid_score = None if np.isnan(valid) else shortened(valid)
            parts = (
                (shortened(test.score),),
                (candidates[chosen[s]],),
                (valid_score,),
                (test.units,),
                (test.predicted,),
            )
            runs.append(SeedRun(seeds[s], *parts))
    return runs


def join_rounds(rounds: Sequence[Sequence[SeedRun]]) -> list[SeedRun]:
    """Put the rounds of each seed side by side."""
    return [
        SeedRun(
            runs[0].seed,
            *(
                tuple(value for run in runs for value in getattr(run, name))
                for name in ("scores", "settings", "valid_scores", "units", "predicted")
            ),
        )
        for runs in zip(*rounds, strict=True)
    ]


def shortened(score: float) -> float:
    """Cut digits that float32 does not hold."""
    return round(float(score), 6)


def jackknife(score: Callable[[np.ndarray], float], clips: int) -> np.ndarray:
    """Return pseudo-values `[U]` of a score that is no mean over clips (F1, mean average precision).

    Each of up to `JACKKNIFE_GROUPS` groups is left out once: U · all − (U − 1) · all but it. They scatter as the score does, so
    that paired tests may treat them as clips are treated (Tukey's pseudo-values; Efron & Tibshirani, chapter 11). They are moved
    until their mean is the score: their own mean corrects the score for a bias that rare classes make larger than the score.

    Args:
        score: of the clips that a mask `[B]` marks.
    """
    groups = np.arange(clips) % min(JACKKNIFE_GROUPS, clips)
    count = int(groups.max()) + 1
    whole = score(np.ones(clips, dtype=bool))
    if count == 1:
        return np.array([whole])
    without = np.array([score(groups != group) for group in range(count)])
    return whole + (count - 1) * (without.mean() - without)


def _trials(
    learner: Learner, draws: Sequence[Draw], candidates: Sequence[Setting]
) -> tuple[np.ndarray, np.ndarray]:
    """Return validation scores and losses, `[seeds, candidates]`, each a mean over the seed's trials."""
    shape = (len(draws), len(draws[0].trials), len(candidates))
    scores, losses = np.zeros(shape), np.zeros(shape)
    if len(candidates) == 1:  # nothing to choose, nothing to try
        return np.full(shape, np.nan).mean(1), losses.mean(1)
    for block in _blocks(shape, learner.block):
        fitted = learner.fit(
            [draws[s].trials[t][0] for s, t, _ in block],
            [candidates[c] for _, _, c in block],
            thorough=False,
        )
        for problem, (s, t, c) in enumerate(block):
            judged = fitted.on_pool(draws[s].trials[t][1], problem)
            scores[s, t, c], losses[s, t, c] = judged.score, judged.loss
    # A validation clip or two decides nothing: scores that differ in rounding only are ties, and the loss breaks them.
    return scores.mean(1).round(9), losses.mean(1)


def _blocks(shape: tuple[int, int, int], most: int) -> list[list[tuple[int, int, int]]]:
    """Lay out (seed, trial, candidate) in blocks of at most `most`.

    Trials of one number leave the same fold out, in every seed: such a block is fitted without that fold's items. Where all trials
    fit into one block, one is less work than several.
    """
    seeds, trials, candidates = (range(count) for count in shape)
    blocks: list[list[tuple[int, int, int]]] = [[]]
    for trial in trials:
        problems = [(seed, trial, candidate) for seed in seeds for candidate in candidates]
        for first in range(0, len(problems), most):
            chunk = problems[first : first + most]
            if len(blocks[-1]) + len(chunk) > most:
                blocks.append([])
            blocks[-1] += chunk
    return [block for block in blocks if block]


Fitter = Callable[[Tensor, Sequence[Setting], bool], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class ClassLearner:
    """A learner for every kind whose probes give class scores: `fitter(rows [I, J], settings, thorough)` → features → `[I, J, C]`."""

    pool: Items
    test: Items
    classes: int
    metric: str
    fitter: Fitter
    block: int

    def fit(
        self, clips: Sequence[np.ndarray], settings: Sequence[Setting], thorough: bool
    ) -> "FittedClasses":
        rows = torch.stack([self.pool.of(mask).cpu() for mask in clips], 1)
        return FittedClasses(self, self.fitter(rows, settings, thorough))


class FittedClasses:
    """Class probes that were fitted together; the test items are not looked at before they are asked for."""

    def __init__(self, learner: ClassLearner, scorer: Callable[[Tensor], Tensor]):
        self.learner, self.scorer = learner, scorer
        self._pool: Tensor | None = None
        self._test: Tensor | None = None

    def on_pool(self, clips: np.ndarray, problem: int) -> Judgement:
        if self._pool is None:
            self._pool = self.scorer(self.learner.pool.features).cpu()
        own = self.learner.pool.of(clips).cpu()
        score, loss = self._judge(self._pool[own, problem], self.learner.pool.answers[own])
        return Judgement(score, loss, np.empty(0))

    def on_test(self, problem: int) -> Judgement:
        if self._test is None:
            self._test = self.scorer(self.learner.test.features).cpu()
        test, scores = self.learner.test, self._test[:, problem]
        score, loss = self._judge(scores, test.answers)
        if test.answers.ndim == 1:
            predicted = scores.argmax(1)
            return Judgement(
                score, loss, (predicted == test.answers).double().numpy(), predicted.numpy()
            )
        without = jackknife(
            lambda clips: self._judge(scores[test.of(clips)], test.answers[test.of(clips)])[0],
            test.clips,
        )
        return Judgement(score, loss, without)

    def _judge(self, scores: Tensor, answers: Tensor) -> tuple[float, float]:
        score = class_metric(self.learner.metric, self.learner.classes, scores, answers)
        loss = (
            F.cross_entropy(scores, answers)
            if answers.ndim == 1
            else F.binary_cross_entropy_with_logits(scores, answers)
        )
        return score, float(loss)
