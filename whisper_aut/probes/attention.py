"""The probe that learns where to listen: attention pooling over a clip's frames, learned with the linear head (Okabe et al. 2018).

In: every frame of every clip, `[T, D]`. Out: class scores `[B, J, C]`. A query gives each frame of a clip a weight, a softmax over the
clip's own frames; at the start all frames weigh the same, which is the mean. Frames stay in their files (`probes.frames`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.descent import DescentProbe
from whisper_aut.probes.fitting import FittedProbes, Setting, fit
from whisper_aut.probes.frames import Frames
from whisper_aut.probes.items import items_of
from whisper_aut.probes.metrics import ANSWERS
from whisper_aut.probes.selection import ClassLearner

ATTENTION_VERSION = 2
CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
)
BATCH_CLIPS = 64
MAX_ACTIVATIONS = 1 << 26


class AttentionProbe(DescentProbe):
    """J linear probes, each on the frames that a query of its own weighs, trained as one; clips are given by number, `[B]`.

    Args:
        frames: clip numbers → frames.
        settings: each problem's learning `rate` and `decay` of query and linear weights.
        seed: decides the order of batches; all weights start at zero.
    """

    def __init__(self, frames: Frames, classes: int, settings: Sequence[Setting], seed: int = 0):
        count, width = len(settings), len(frames.mean)
        values = {
            "query": torch.zeros(count, width),
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        super().__init__(
            values, partial(_scores, frames), ("query", "weight"), settings, seed, BATCH_CLIPS
        )


@dataclass(frozen=True)
class AttentionFitter:
    """Fits attention probes on clips that are given by number."""

    frames: Frames
    numbers: Tensor
    answers: Tensor
    classes: int
    device: str
    block: int

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], valid: Tensor | None, seed: int
    ) -> FittedProbes:
        probe = AttentionProbe(self.frames, self.classes, settings, seed)
        batch = self._batch(rows) + (() if valid is None else self._batch(valid))
        fit(probe, batch, self.device)
        probe = probe.to(self.device)
        return FittedProbes(lambda numbers: probe(numbers).detach(), probe.epochs)

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        used = rows.any(1)
        parts = self.numbers[used], self.answers[used], rows[used].float()
        return tuple(part.to(self.device) for part in parts)  # pyright: ignore[reportReturnType]


def attention_learner(
    pool: Embeddings,
    train: np.ndarray,
    test: Embeddings,
    metric: str,
    classes: Sequence[str],
    device: str,
) -> ClassLearner:
    """Return a learner on the frames of a round, standardised by those of the training split."""
    taken = np.concatenate([train, np.zeros(len(test), dtype=bool)])
    frames = Frames([*pool.frames, *test.frames], taken, device)
    numbers = torch.arange(len(pool) + len(test)).split([len(pool), len(test)])
    items, tested = (
        items_of(replace(part, features=own), ANSWERS[metric], classes)
        for part, own in zip((pool, test), numbers, strict=True)
    )
    longest, width = int(frames.lengths.max()), len(frames.mean)
    block = max(1, MAX_ACTIVATIONS // (BATCH_CLIPS * (longest + width) + 8 * width * len(classes)))
    fitter = AttentionFitter(frames, items.features, items.answers, len(classes), device, block)
    return ClassLearner(items, tested, tuple(classes), metric, fitter)


def _scores(frames: Frames, values: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
    return torch.cat([_weighed(values, *frames(some)) for some in numbers.split(BATCH_CLIPS)])


def _weighed(values: Mapping[str, Tensor], padded: Tensor, lengths: Tensor) -> Tensor:
    """Frames `[b, T, D]` of clips with these lengths `[b]` → class scores `[b, J, C]`."""
    steps = torch.arange(padded.shape[1], device=padded.device)
    logits = torch.einsum("btd,jd->bjt", padded, values["query"])
    weights = logits.masked_fill(steps >= lengths[:, None, None], -torch.inf).softmax(2)
    return torch.einsum("bjd,jdc->bjc", weights @ padded, values["weight"]) + values["bias"]
