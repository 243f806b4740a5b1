"""The probe that learns where to listen: attention pooling over a clip's frames, learned with the linear head (Okabe et al. 2018).

In: every frame of every clip, `[T, D]`. Out: class scores `[B, J, C]`. Next: `probes.selection`. A query gives each frame of a clip a
weight; at the start all weigh alike, which is the mean. Weights are a softmax over the clip's own frames. All frames are held in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.descent import DescentProbe
from whisper_aut.probes.fitting import Setting, fit
from whisper_aut.probes.items import items_of
from whisper_aut.probes.metrics import ANSWERS
from whisper_aut.probes.selection import ClassLearner

ATTENTION_VERSION = 1
CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
)
BATCH_CLIPS = 64
MAX_ACTIVATIONS = 1 << 26


class AttentionProbe(DescentProbe):
    """J linear probes, each behind a query of its own, trained as one; clips are given as spans `[B, 2]` of `frames`.

    Args:
        frames: `[ΣT, D]`; a span is the first frame of a clip and how many it has.
        settings: each problem's learning `rate` and `decay` of query and linear weights.
    """

    def __init__(self, frames: Tensor, classes: int, settings: Sequence[Setting]):
        count, width = len(settings), frames.shape[1]
        values = {
            "query": torch.zeros(count, width),
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        super().__init__(
            values, partial(_scores, frames), ("query", "weight"), settings, BATCH_CLIPS
        )


@dataclass(frozen=True)
class AttentionFitter:
    """Fits attention probes: `fitter(rows, settings, thorough)` gives a function from spans `[B, 2]` to class scores."""

    frames: Tensor
    spans: Tensor
    answers: Tensor
    classes: int
    device: str

    def __call__(
        self, rows: Tensor, settings: Sequence[Setting], thorough: bool
    ) -> partial[Tensor]:
        used = rows.any(1)
        probe = AttentionProbe(self.frames, self.classes, settings)
        batch = self.spans[used], self.answers[used], rows[used].float()
        fit(probe, tuple(part.to(self.device) for part in batch), self.device)
        return partial(_in_batches, probe.to(self.device))


def attention_learner(
    pool: Embeddings,
    sampled: np.ndarray,
    test: Embeddings,
    metric: str,
    classes: Sequence[str],
    device: str,
) -> ClassLearner:
    """Return a learner on the frames of a round, standardised by those of the pool's sampled clips."""
    taken = torch.from_numpy(np.repeat(sampled, pool.lengths))
    mean, deviation = (
        pool.features[taken].mean(0),
        pool.features[taken].std(0, correction=0).clamp_min(1e-6),
    )
    frames = ((torch.cat([pool.features, test.features]) - mean) / deviation).to(device)
    spans = _spans([*pool.lengths, *test.lengths]).split([len(pool), len(test)])
    parts = (
        replace(part, features=span, lengths=())
        for part, span in zip((pool, test), spans, strict=True)
    )
    items, asked = (items_of(part, ANSWERS[metric], classes) for part in parts)
    longest, width = max(pool.lengths), frames.shape[1]
    block = max(1, MAX_ACTIVATIONS // (BATCH_CLIPS * (longest + width) + 8 * width * len(classes)))
    fitter = AttentionFitter(frames, items.features, items.answers, len(classes), device)
    return ClassLearner(items, asked, len(classes), metric, fitter, block)


def _spans(lengths: Sequence[int]) -> Tensor:
    counts = torch.tensor(lengths)
    return torch.stack([counts.cumsum(0) - counts, counts], 1)


def _in_batches(probe: AttentionProbe, spans: Tensor) -> Tensor:
    return torch.cat([probe(batch).detach() for batch in spans.split(BATCH_CLIPS)])


def _scores(frames: Tensor, values: Mapping[str, Tensor], spans: Tensor) -> Tensor:
    first, lengths = spans.to(frames.device).T
    steps = torch.arange(int(lengths.max()), device=frames.device)
    padded = frames[(first[:, None] + steps).clamp(max=len(frames) - 1)]  # [b, T, D]
    logits = torch.einsum("btd,jd->bjt", padded, values["query"])
    weights = logits.masked_fill(steps >= lengths[:, None, None], -torch.inf).softmax(2)
    return torch.einsum("bjd,jdc->bjc", weights @ padded, values["weight"]) + values["bias"]
