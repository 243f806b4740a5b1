"""Splits of a task: which clips probes are trained, validated and tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from whisper_aut.errors import UserError
from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.metrics import Answer
from whisper_aut.probes.tasks import ProbeTask

HELD_OUT_FRACTION = 0.2  # of the training clips, for tasks without a validation split
# Validation folds per test fold: all of a 5-fold task, the next four of a 10-fold task.
MAX_INNER_FOLDS = 4


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


def inner_folds(split: Split, answer: Answer) -> list[InnerFold]:
    """Return the folds that candidates are selected on: one per validation part, or a single one
    that holds out a fifth of the training clips, of each class if clips have one class each. If no
    group of the training clips is tested on, whole groups are held out.
    """
    if split.valid_parts:
        return [
            InnerFold(split.train & (split.parts != part), split.parts == part)
            for part in split.valid_parts
        ]
    classes = np.zeros(len(split.pool), dtype=int)
    if answer == "class":
        classes = np.unique(np.array(split.pool.labels), return_inverse=True)[1]
    clips, rng = np.flatnonzero(split.train), np.random.default_rng(split.number)
    groups, drawn = split.pool.group_numbers()[clips], np.array([], dtype=int)
    if any(split.pool.groups) and not {*split.pool.groups} & {*split.test.groups} - {""}:
        drawn = whole_groups(classes[clips], groups, HELD_OUT_FRACTION, rng)
    if not len(drawn):
        drawn = stratified(classes[clips], HELD_OUT_FRACTION, rng)
    held_out = np.zeros(len(classes), dtype=bool)
    held_out[clips[drawn]] = True
    return [InnerFold(split.train & ~held_out, held_out)]


def whole_groups(
    classes: np.ndarray, groups: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw groups with about a fraction of the clips, but never all clips of a class nor more than
    half of all clips.

    Returns:
        Sorted indices of clips. Empty if no group can be drawn.
    """
    drawn, left = np.zeros(len(classes), dtype=bool), np.bincount(classes)
    for group in rng.permutation(np.unique(groups)):
        members = groups == group
        taken = np.bincount(classes[members], minlength=len(left))
        small = taken.sum() + drawn.sum() <= len(classes) / 2
        if small and ((taken == 0) | (taken < left)).all():
            drawn, left = drawn | members, left - taken
        if drawn.sum() >= fraction * len(classes):
            break
    return np.flatnonzero(drawn)


def stratified(classes: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a fraction of every class: at least one clip, but never all. Returns sorted indices."""
    drawn = []
    for name in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == name))
        count = max(1, round(fraction * len(members)))
        drawn.append(members[: min(count, len(members) - 1)])
    return np.sort(np.concatenate(drawn))


def few_shot(split: Split, shots: int, seed: int) -> Split | None:
    """Keep `shots` training clips of each class, and no validation clips. None if a class has
    fewer.

    Clips are drawn at random; draws of one seed are nested. Needs one class and one vector per
    clip.
    """
    clips = np.flatnonzero(split.train)
    clips = np.random.default_rng([seed, split.number]).permutation(clips)
    labels = np.array(split.pool.labels)[clips]
    chosen = [clips[labels == name][:shots] for name in np.unique(labels)]
    if min(map(len, chosen), default=0) < shots:
        return None
    kept, pool = np.sort(np.concatenate(chosen)).tolist(), split.pool
    drawn = Embeddings(
        pool.features[kept],
        tuple(pool.labels[i] for i in kept),
        tuple(pool.keys[i] for i in kept),
        groups=tuple(pool.groups[i] for i in kept if pool.groups),
    )
    count = len(kept)
    # A part without clips: there is nothing to select, so nothing may be held out either.
    return Split(split.number, drawn, np.full(count, -1), np.ones(count, bool), (0,), split.test)


def splits_of(parts: dict[str, Embeddings], task: ProbeTask) -> list[Split]:
    """Return the splits of a task: one per fold, or a single one."""
    return cross_validation(list(parts.values())) if task.folded else [train_valid_test(parts)]


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
                    "select; whisper-aut data inspect FOLDER lists the fields of the samples."
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
