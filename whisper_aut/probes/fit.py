"""Select, train and test probes on the splits of a task.

In each split, all inner folds and candidate settings are heads of one batched fit. The best
candidate has the highest mean validation score over the inner folds, or the lower loss among
equals. The final probe is trained again with it, on the full training split or on training and
validation split, and the test part is scored once per seed. Seeds play no part in the selection:
they decide batch order and initial weights of the final probe, each of which is trained by itself,
so that its score does not depend on the other seeds of a run.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from whisper_aut.errors import UserError
from whisper_aut.probes.metrics import ANSWERS, Answer
from whisper_aut.probes.modules import (
    AttentionProbe,
    Candidate,
    Candidates,
    CTCProbe,
    FrameProbe,
    KNNProbe,
    LayerWeightedProbe,
    LinearProbe,
    MLPProbe,
    Probe,
    RetrievalProbe,
)
from whisper_aut.probes.splits import (
    InnerFold,
    Split,
    check_splits,
    class_names,
    few_shot,
    inner_folds,
)
from whisper_aut.probes.tasks import ProbeTask

# FLOPs per step below which several threads are slower than one, up to 30 times on a busy machine.
ONE_THREAD_FLOPS = 4e9

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


@dataclass(frozen=True)
class SeedRun:
    """The results of one seed on one task, with one value per split (test part).

    Attributes:
        seed: None for a probe without a random start.
        candidates: the selected setting, with `epochs` if the probe trains by epochs.
        valid_scores: the validation score of each setting; None if there was nothing to select.
        scores, units, predicted, probabilities: see `SplitResult`.
        layer_weights: learned weights of the layers, `[L]`; empty if the probe learns none.
    """

    seed: int | None
    candidates: tuple[Candidate, ...]
    valid_scores: tuple[float | None, ...]
    scores: tuple[float, ...]
    units: tuple[np.ndarray, ...]
    predicted: tuple[tuple[Any, ...], ...]
    probabilities: tuple[tuple[Any, ...], ...]
    layer_weights: tuple[tuple[float, ...], ...] = ()


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
        metric: a key of `ANSWERS`.
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
    # One thread, for thousands of small products. `train_heads` uses more for large steps.
    with threads(1), _quiet_lightning():
        for split in splits:
            data = probe.data_module(split, probe, device=device, **targets)
            options = candidates or probe.candidates
            candidate, valid_score = options[0], None
            if len(options) > 1 or probe.seeded:  # the number of epochs is selected too
                folds = inner_folds(split, answer)
                candidate, valid_score = select_candidate(probe, data, folds, options)
            everything = np.ones(len(split.pool), dtype=bool)
            trained_on = split.train if final_fit == "train" else everything
            for seed in own_seeds:
                data.assign([trained_on], seed=seed or 0)
                heads = probe.for_data(data, [candidate], seed=seed or 0)
                trainer = train_heads(heads, data)
                trainer.test(heads, data, verbose=False)
                result = data.result(heads.results[0])
                score = _as_float32(result.score)
                layers = getattr(heads, "layer_weights", torch.empty(1, 0).clone)()[0].tolist()
                row = (candidate, valid_score, score, *result[1:], tuple(layers))
                results[seed].append(row)
    return [SeedRun(seed, *zip(*listed, strict=True)) for seed, listed in results.items()]


def few_shot_splits(
    splits: Sequence[Split], shots: int, *, kind: str, seeds: Sequence[int], **options: Any
) -> list[SeedRun]:
    """Score probes that are trained on `shots` clips of each class, drawn by each seed.

    There are no validation clips to select on, so the default setting of the kind, which must train
    without epochs, is used (Perez et al. 2021, True Few-Shot Learning). No runs if a class has
    fewer clips. `options` are other arguments of `probe_splits`.
    """
    runs = []
    for seed in seeds:
        drawn = [few_shot(split, shots, seed) for split in splits]
        found = [split for split in drawn if split]
        if len(found) < len(splits):
            return []
        (run,) = probe_splits(found, kind=kind, candidates=[PROBES[kind].default], **options)
        runs.append(replace(run, seed=seed))
    return runs


def select_candidate(
    probe: type[Probe], data: Any, folds: Sequence[InnerFold], candidates: Candidates
) -> tuple[Candidate, float]:
    """Return the candidate with the best mean validation score, and that score. If it trains by
    epochs, `epochs` is the mean over the folds.
    """
    shape = len(folds), len(candidates)
    scores, losses, epochs = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for numbers in _head_batches(*shape, probe.max_heads(data)):
        train, valid = ([folds[fold][part] for fold, _ in numbers] for part in (0, 1))
        data.assign(train, valid)
        heads: Any = probe.for_data(data, [candidates[c] for _, c in numbers], selecting=True)
        trainer = train_heads(heads, data)
        trainer.test(heads, data.val_dataloader(), verbose=False)
        for i, result in enumerate(heads.results):
            scores[numbers[i]], losses[numbers[i]] = result.score, result.loss
            if probe.seeded:
                epochs[numbers[i]] = heads.epochs[i]
    # Scores that differ only by rounding are ties, which the loss breaks.
    means = scores.mean(0).round(9)
    best = int(np.lexsort((losses.mean(0), -means))[0])
    candidate = dict(candidates[best])
    if probe.seeded:
        candidate["epochs"] = round(epochs[:, best].mean())
    return candidate, _as_float32(means[best])


def train_heads(heads: Probe, data: Any) -> Trainer:
    """Train the heads of a probe, and return the trainer, which tests them."""
    accelerator, _, number = data.device.partition(":")
    trainer = Trainer(
        accelerator=accelerator,
        devices=[int(number)] if number else 1,
        max_epochs=int(heads.settings[0].get("epochs", heads.max_epochs)),
        limit_val_batches=1.0 if heads.seeded else 0,  # other probes do not stop early
        barebones=True,
        inference_mode=False,  # weights that are kept from a validation epoch are trained on
        # One process, even inside a run started by torchrun or Slurm.
        plugins=[LightningEnvironment()],
    )
    largest = max((parameter.numel() for parameter in heads.parameters()), default=0)
    items = int(data.train.any(1).sum())
    with threads(1 if 4 * items * largest < ONE_THREAD_FLOPS else default_threads()):
        trainer.fit(heads, data)
    return trainer


def default_threads() -> int:
    """Return the first number of OpenMP's variable, which may be a list, or the number of cores."""
    return int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0] or os.cpu_count() or 1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
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
