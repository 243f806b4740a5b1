"""Select, train and test probes on the splits of a task.

In each split, all inner folds and candidate settings are heads of one batched fit. The best
candidate has the highest mean validation score over the inner folds, or the lower loss among
equals. The final probe is trained again with it, on the full training split or on training and
validation split, and the test part is scored once per seed. Seeds play no part in the selection:
they decide batch order and initial weights of the final probe, each of which is trained by itself,
so that its score does not depend on the other seeds of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from whisper_aut.errors import UserError
from whisper_aut.probes.datasets import (
    InnerFold,
    Split,
    cross_validation,
    inner_folds,
    train_valid_test,
)
from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.knn import KNNProbe
from whisper_aut.probes.metrics import ANSWERS, Answer
from whisper_aut.probes.modules import (
    AttentionProbe,
    Candidate,
    FrameProbe,
    LayerWeightedProbe,
    LinearProbe,
    MLPProbe,
    Probe,
)
from whisper_aut.probes.optim import threads
from whisper_aut.probes.retrieval import RetrievalProbe
from whisper_aut.probes.tasks import ProbeTask
from whisper_aut.probes.transcription import CTCProbe

FinalFit = Literal["train", "train+valid"]

# Kind of probe → module. The first that gives a task's kind of answer is its default.
PROBES: dict[str, type[Probe]] = {
    "linear": LinearProbe,
    "knn": KNNProbe,
    "mlp": MLPProbe,
    "layers": LayerWeightedProbe,
    "attention": AttentionProbe,
    "frame": FrameProbe,
    "retrieval": RetrievalProbe,
    "transcription": CTCProbe,
}


def default_kind(answer: Answer) -> str:
    """Return the default kind of probe for a kind of answer."""
    return next(kind for kind, probe in PROBES.items() if answer in probe.answers)


def kind_for(kind: str, task: ProbeTask) -> str:
    """Return the kind of probe for a task: `kind` if given, else the task's own, else the default
    for its metric.

    Raises:
        UserError: there is no such kind, or it cannot answer the task.
    """
    chosen = kind or task.kind or default_kind(task.answer)
    if chosen not in PROBES:
        raise UserError(f"There is no probe kind {chosen!r}. There are: {', '.join(PROBES)}.")
    if task.answer not in PROBES[chosen].answers:
        able = [name for name, probe in PROBES.items() if task.answer in probe.answers]
        raise UserError(
            f"Probe task {task.name!r} is scored by {task.metric}, which a {chosen} probe does "
            f"not support. Use one of: {', '.join(able)}."
        )
    return chosen


def splits_of(parts: dict[str, Embeddings], task: ProbeTask) -> list[Split]:
    """Return the splits of a task: one per fold, or a single one."""
    return cross_validation(list(parts.values())) if task.folded else [train_valid_test(parts)]


@dataclass(frozen=True)
class SeedRun:
    """The results of one seed on one task, with one value per split (test part).

    Attributes:
        seed: None for a probe without a random start.
        candidates: the selected setting, with `epochs` if the probe trains by epochs.
        valid_scores: the validation score of each setting; None if there was nothing to select.
        scores, units, predicted, probabilities: see `SplitResult`.
    """

    seed: int | None
    candidates: tuple[Candidate, ...]
    valid_scores: tuple[float | None, ...]
    scores: tuple[float, ...]
    units: tuple[np.ndarray, ...]
    predicted: tuple[tuple[Any, ...], ...]
    probabilities: tuple[tuple[Any, ...], ...]


# In a validation hook, tensors created in inference mode could not be trained on.
@torch.inference_mode(False)
@torch.enable_grad()
def probe_splits(
    splits: Sequence[Split],
    *,
    metric: str = "accuracy",
    kind: str = "",
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    candidates: Sequence[Candidate] = (),
    segment_seconds: float = 0.0,
    device: str = "cpu",
    name: str = "task",
    final_fit: FinalFit = "train",
) -> list[SeedRun]:
    """Score the splits of one task: once per seed, or once if the kind does not use seeds.

    Args:
        splits: the splits.
        metric: a key of `METRICS`.
        kind: a key of `PROBES`. Empty for the default of the metric.
        seeds: seeds of the final probes.
        candidates: settings to select from, instead of the kind's own.
        segment_seconds: segment length, for tasks with events.
        device: where probes are trained.
        name: name of the task, for error messages.
        final_fit: what the final probe is trained on. With folds, always all other folds.

    Raises:
        UserError: a split is empty, there is a single class, or a class is tested but never
            trained on.
    """
    answer = ANSWERS[metric]
    check_splits(splits, name)
    targets: dict[str, Any] = {}
    if classes := class_names(splits, answer, name):
        targets = {"metric": metric, "classes": classes, "segment_seconds": segment_seconds}
    probe = PROBES[kind or default_kind(answer)]
    own_seeds = list(seeds) if probe.seeded else [None]
    results: dict[int | None, list[tuple[Any, ...]]] = {seed: [] for seed in own_seeds}
    # One thread, for thousands of small products. `fit` uses more if a step is large enough.
    with threads(1):
        for split in splits:
            dataset = probe.dataset(split, device=device, **targets)
            options = candidates or probe.candidates
            candidate, valid_score = options[0], None
            if len(options) > 1 or probe.seeded:  # the number of epochs is selected too
                labels = np.zeros(len(split.pool), dtype=int)
                if answer == "class":
                    labels = np.unique(np.array(split.pool.labels), return_inverse=True)[1]
                folds = inner_folds(split, labels)
                candidate, valid_score = select_candidate(probe, dataset, folds, options)
            everything = np.ones(len(split.pool), dtype=bool)
            mask = dataset.mask([split.train if final_fit == "train" else everything])
            for seed in own_seeds:
                trained = probe.train_heads(dataset, [candidate], mask, None, seed or 0)
                result = dataset.test(trained)
                score = _as_float32(result.score)
                results[seed].append((candidate, valid_score, score, *result[1:]))
    return [SeedRun(seed, *zip(*listed, strict=True)) for seed, listed in results.items()]


def select_candidate(
    probe: type[Probe], dataset: Any, folds: Sequence[InnerFold], candidates: Sequence[Candidate]
) -> tuple[Candidate, float]:
    """Return the candidate with the best mean validation score, and that score. If it trains by
    epochs, `epochs` is the mean over the folds.
    """
    shape = len(folds), len(candidates)
    scores, losses, epochs = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for heads in _head_batches(*shape, probe.max_heads(dataset)):
        mask, valid = (dataset.mask([folds[fold][part] for fold, _ in heads]) for part in (0, 1))
        trained: Any = probe.train_heads(dataset, [candidates[c] for _, c in heads], mask, valid, 0)
        for i, (score, loss) in enumerate(dataset.validate(trained, valid)):
            scores[heads[i]], losses[heads[i]] = score, loss
            if probe.seeded:
                epochs[heads[i]] = trained.epochs[i]
    # Scores that differ only by rounding are ties, which the loss breaks.
    means = scores.mean(0).round(9)
    best = int(np.lexsort((losses.mean(0), -means))[0])
    candidate = dict(candidates[best])
    if probe.seeded:
        candidate["epochs"] = round(epochs[:, best].mean())
    return candidate, _as_float32(means[best])


def _head_batches(folds: int, candidates: int, most: int) -> list[list[tuple[int, int]]]:
    """Split (fold, candidate) pairs into batches of at most `most`, keeping the pairs of a fold
    together.

    The heads of one fold leave out the same items, so such a batch is trained without them. If
    all heads fit into one batch, one batch is cheaper than several.
    """
    batches: list[list[tuple[int, int]]] = [[]]
    for fold in range(folds):
        heads = [(fold, candidate) for candidate in range(candidates)]
        for first in range(0, len(heads), most):
            chunk = heads[first : first + most]
            if len(batches[-1]) + len(chunk) > most:
                batches.append([])
            batches[-1] += chunk
    return [batch for batch in batches if batch]


def _as_float32(score: float) -> float:
    """Drop digits beyond float32 precision."""
    return round(float(score), 6)


def check_splits(splits: Sequence[Split], name: str) -> None:
    """Check that every split has clips to train on and to test on.

    Raises:
        UserError: there are none.
    """
    for split in splits:
        for where, part in (("train", split.pool), ("test", split.test)):
            if not len(part) or (where == "train" and not split.train.any()):
                counts = [f"{count} {reason}" for reason, count in part.skipped.items()]
                raise UserError(
                    f"Probe task {name!r} has no clips in {where!r} "
                    f"({', '.join(counts) or 'no samples at all'}). Check its folders, label and "
                    "select."
                )


def class_names(splits: Sequence[Split], answer: Answer, name: str) -> list[str]:
    """Check the classes of all splits, and return the sorted classes that are trained or tested on.

    Raises:
        UserError: there is a single class, a class that is validated or tested on but not trained
            on, or too few clips to select candidates.
    """
    if answer in ("captions", "text"):
        return []
    found: set[str] = set()
    for split in splits:
        pool = list(zip(split.pool.labels, split.train, strict=True))
        known = classes_of([label for label, train in pool if train], answer)
        if len(known) < (2 if answer == "class" else 1):
            raise UserError(
                f"Probe task {name!r} has a single class in 'train', "
                f"{next(iter(known), 'none')!r}: there is nothing to tell apart."
            )
        if answer != "class":
            found |= known | classes_of(split.test.labels, answer)
            continue
        valid = [label for label, train in pool if not train]
        for part, labels in (("valid", valid), ("test", split.test.labels)):
            unknown = sorted(set(labels) - known)
            if unknown:
                raise UserError(
                    f"Probe task {name!r} has {len(unknown)} classes in {part!r} that 'train' "
                    f"lacks: {', '.join(unknown[:8])}. Check that label and split fields are the "
                    "right ones."
                )
        if not split.valid_parts and len(known) == int(split.train.sum()):
            raise UserError(
                f"Probe task {name!r} has one clip per class and no validation split: no setting "
                "can be selected."
            )
        found |= known
    return sorted(found)


def classes_of(labels: Sequence[Any], answer: Answer) -> set[str]:
    """Return the classes in the labels of some clips."""
    if answer == "class":
        return set(labels)
    if answer == "classes":
        return {name for label in labels for name in label}
    return {name for label in labels for _, _, name in label}
