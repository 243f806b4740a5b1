"""Splits or folds → rounds of one test part each, and which clips of the rest settings are chosen and the probe is fitted on.

Folds are nested: a test fold is scored by a probe whose settings were chosen on validation folds among the others, so no clip that is
reported has a say in anything. Splits and folds stay as they were published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings
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
