"""Embeddings and their labels → tensors that a probe trains on: items, the answers to them, and which clip each belongs to.

In: `Embeddings` with labels of any kind of answer. Out: `Items`. Next: the probe kinds. An item is a clip, or,
for events, a segment of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.metrics import Answer
from whisper_aut.probes.rounds import Round


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
