"""How two peers judge an encoder, reproduced with their flaws so that figures can be set beside theirs; nothing here is good practice.

In: embeddings of a task's parts. Out: `SeedRun`s. Next: `probes.protocols` offers them as `xares` and `maeb`. Read from X-ARES 0.1.3
(https://github.com/jimbozhang/xares) and MTEB 2.26 (https://github.com/embeddings-benchmark/mteb); our seed s is theirs, 42, plus s.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from math import cos, pi

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor, nn

from whisper_aut.probes.fitting import threads
from whisper_aut.probes.items import Items, items_of
from whisper_aut.probes.metrics import class_metric
from whisper_aut.probes.rounds import Round
from whisper_aut.probes.selection import SeedRun, jackknife, shortened
from whisper_aut.probes.tasks import ProbeTask

THEIR_SEED = 42
XARES_RATE, XARES_LAST_RATE = 1e-3, 1e-4
XARES_NEIGHBOURS, XARES_TEMPERATURE = 10, 0.07
MAEB_CLIPS_PER_CLASS, MAEB_FOLDS, MAEB_EXPERIMENTS, MAEB_ITERATIONS = 8, 5, 10, 100


def xares_runs(
    rounds: Sequence[Round],
    task: ProbeTask,
    classes: Sequence[str],
    kind: str,
    seeds: Sequence[int],
) -> list[SeedRun]:
    """X-ARES: the task's epochs of Adam on normalised features, the best epoch by the score that is reported; or its nearest neighbours."""
    answer, metric, found = task.answer, task.metric, []
    for seed in seeds:
        scores, units = [], []
        for one in rounds:
            test = items_of(one.test, answer, classes)
            # Folds are validated on the fold that is tested; splits without a validation split on the test split.
            own_valid = bool((~one.sampled).any())
            pool = items_of(one.pool, answer, classes)
            train = _only(pool, pool.of(one.sampled))
            valid = _only(pool, ~pool.of(one.sampled)) if own_valid else test
            with threads(1):
                predicted = _xares_neighbours(train, test, len(classes)) if kind == "knn" else _xares_mlp(
                    train, valid, test, task, len(classes), THEIR_SEED + seed
                )  # fmt: skip
            scores.append(shortened(_xares_metric(metric, len(classes), predicted, test.answers)))
            units.append(_units(predicted, test, metric, len(classes)))
        count = len(scores)
        found.append(SeedRun(seed, tuple(scores), ({},) * count, (None,) * count, tuple(units)))
    return found


def _xares_mlp(
    train: Items, valid: Items, test: Items, task: ProbeTask, classes: int, seed: int
) -> Tensor:
    """A linear layer behind a LayerNorm, called MLP there; return its scores of the test items at the best epoch."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        width = train.features.shape[1]
        model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        optimiser = torch.optim.Adam(model.parameters(), lr=XARES_RATE)
        best, kept = -1.0, torch.zeros(len(test.features), classes)
        for epoch in range(task.xares.epochs):
            share = (1 + cos(pi * epoch / task.xares.epochs)) / 2
            optimiser.param_groups[0]["lr"] = (
                XARES_LAST_RATE + (XARES_RATE - XARES_LAST_RATE) * share
            )
            for batch in torch.randperm(len(train.features)).split(task.xares.batch_clips):
                optimiser.zero_grad()
                _loss(model(train.features[batch]), train.answers[batch]).backward()
                optimiser.step()
            with torch.no_grad():
                score = _xares_metric(task.metric, classes, model(valid.features), valid.answers)
                if score > best:
                    best, kept = score, model(test.features)
    return kept


def _xares_neighbours(train: Items, test: Items, classes: int) -> Tensor:
    """Training features are scaled to unit length across samples, feature by feature; test features sample by sample."""
    likeness = F.normalize(test.features, dim=1) @ F.normalize(train.features.T, dim=1)
    nearest, positions = likeness.topk(min(XARES_NEIGHBOURS, len(train.features)), dim=1)
    votes = torch.zeros(len(test.features), classes)
    return votes.scatter_add_(1, train.answers[positions], (nearest / XARES_TEMPERATURE).softmax(1))


def maeb_runs(
    rounds: Sequence[Round], classes: Sequence[str], seeds: Sequence[int]
) -> list[SeedRun]:
    """MAEB: logistic regression on raw features of eight clips a class; clips of official folds are shuffled across them."""
    found = []
    for seed in seeds:
        if len(rounds) > 1:
            everything = [items_of(one.test, "class", classes) for one in rounds]
            features = torch.cat([part.features for part in everything]).numpy()
            answers = torch.cat([part.answers for part in everything]).numpy()
            folds = KFold(MAEB_FOLDS, shuffle=True, random_state=THEIR_SEED + seed).split(features)
            trials = [(features[a], answers[a], features[b], answers[b], b) for a, b in folds]
        else:
            one = rounds[0]
            pool, test = items_of(one.pool, "class", classes), items_of(one.test, "class", classes)
            train = _only(pool, pool.of(one.sampled))
            parts = [
                part.numpy()
                for part in (train.features, train.answers, test.features, test.answers)
            ]
            trials = [(*parts, np.arange(len(test.answers)))] * MAEB_EXPERIMENTS
        found.append(_maeb_run(trials, seed))
    return found


def _maeb_run(trials: Sequence[tuple], seed: int) -> SeedRun:
    order: list[int] | None = None
    scores, total = [], max(int(trial[4].max()) for trial in trials) + 1
    right, times = np.zeros(total), np.zeros(total)
    for features, answers, tested, wanted, clips in trials:
        order = list(range(len(answers))) if order is None else order
        order = [i for i in order if i < len(answers)] + list(range(len(order), len(answers)))
        np.random.RandomState(THEIR_SEED + seed).shuffle(order)
        chosen = _eight_each(order, answers)
        model = LogisticRegression(max_iter=MAEB_ITERATIONS, random_state=THEIR_SEED + seed)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a hundred steps on raw features are often too few: their choice
            credit = model.fit(features[chosen], answers[chosen]).predict(tested) == wanted
        scores.append(shortened(float(credit.mean())))
        right[clips] += credit
        times[clips] += 1
    count = len(scores)
    return SeedRun(seed, tuple(scores), ({},) * count, (None,) * count, (right / times,))


def _eight_each(order: Sequence[int], answers: np.ndarray) -> list[int]:
    taken: Counter[int] = Counter()
    chosen = []
    for i in order:
        if taken[answers[i]] < MAEB_CLIPS_PER_CLASS:
            taken[answers[i]] += 1
            chosen.append(i)
    return chosen


def _only(items: Items, kept: Tensor) -> Items:
    return Items(items.features[kept], items.answers[kept], items.owner[kept], items.clips)


def _loss(scores: Tensor, answers: Tensor) -> Tensor:
    return (
        F.cross_entropy(scores, answers)
        if answers.ndim == 1
        else F.binary_cross_entropy_with_logits(scores, answers)
    )


def _xares_metric(metric: str, classes: int, scores: Tensor, answers: Tensor) -> float:
    """Ours, but for mean average precision, in which a class that no clip has counts nothing there."""
    value = class_metric(metric, classes, scores, answers)
    return value * float(answers.any(0).double().mean()) if metric == "mAP" else value


def _units(scores: Tensor, test: Items, metric: str, classes: int) -> np.ndarray:
    if test.answers.ndim == 1:
        return (scores.argmax(1) == test.answers).double().numpy()
    return jackknife(
        lambda clips: _xares_metric(
            metric, classes, scores[test.of(clips)], test.answers[test.of(clips)]
        ),
        test.clips,
    )
