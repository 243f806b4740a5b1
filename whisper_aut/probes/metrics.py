"""Metrics of probe tasks: those of torchmetrics, and two based on them. All are in 0 … 1, higher
is better. The losses of many heads are here too.

The name of a metric determines the kind of answer that a task needs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from torchmetrics.text import WordErrorRate

Answer = Literal["class", "classes", "events", "captions", "text"]


class WordAccuracy(WordErrorRate):
    """max(0, 1 − word error rate) of texts and transcripts, as X-ARES and UniWhisper report for
    speech recognition.
    """

    def compute(self) -> Tensor:
        return (1 - super().compute()).clamp(min=0)


class CrossRecall(Metric):
    """Recall@1 between B clips and N captions, averaged over both directions.

    Update with `similarity` `[B, N]` and `owner` `[N]`: caption n describes clip `owner[n]`. A
    clip counts if its nearest caption is one of its own, a caption if its nearest clip is its own.
    """

    hits: list[Tensor]
    full_state_update = False

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("hits", default=[], dist_reduce_fx="cat")

    def update(self, similarity: Tensor, owner: Tensor) -> None:
        self.hits.append(recall_credit(similarity, owner).mean(0, keepdim=True))

    def compute(self) -> Tensor:
        return torch.cat(self.hits).mean(0).mean()


def recall_credit(similarity: Tensor, owner: Tensor) -> Tensor:
    """Return `[B, 2]`: for each clip, whether its nearest caption is its own, and the fraction
    of its captions whose nearest clip it is.
    """
    clips = torch.arange(len(similarity), device=owner.device)
    to_text = owner[similarity.argmax(1)] == clips
    found = (similarity.argmax(0) == owner).double()
    counts = torch.bincount(owner, minlength=len(clips)).clamp(min=1)
    to_audio = torch.zeros_like(clips, dtype=torch.double).index_add(0, owner, found) / counts
    return torch.stack([to_text.double(), to_audio], 1)


# They do not sync: rank 0 of a job computes scores while the other ranks wait or have exited.
OPTIONS: dict[str, Any] = {"validate_args": False, "sync_on_compute": False}
# Name → constructor of the metric for C classes. Class metrics are updated with `[B, C]` scores and
# `[B]` classes or `[B, C]` targets of 0 and 1.
METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": partial(MulticlassAccuracy, average="micro", **OPTIONS),
    "mAP": partial(MultilabelAveragePrecision, average="macro", **OPTIONS),
    "segment_f1_macro": partial(MultilabelF1Score, average="macro", **OPTIONS),
    "segment_f1_micro": partial(MultilabelF1Score, average="micro", **OPTIONS),
    "recall@1": lambda classes: CrossRecall(),
    "word_accuracy": lambda classes: WordAccuracy(sync_on_compute=False),
}
ANSWERS: dict[str, Answer] = {
    "accuracy": "class",
    "mAP": "classes",
    "segment_f1_macro": "events",
    "segment_f1_micro": "events",
    "recall@1": "captions",
    "word_accuracy": "text",
}


def class_metric(metric: str, classes: int, scores: Tensor, targets: Tensor) -> float:
    """Score class scores (logits) `[B, C]` against classes `[B]`, or targets `[B, C]` of 0 and 1.

    Mean average precision only covers classes that at least one of these clips has, since it is
    undefined for the others.
    """
    if metric == "mAP":
        present = targets.any(0)
        scores, targets = _ranks(scores[:, present]), targets[:, present]
        classes = int(present.sum())
        if not classes:
            return 0.0
    elif targets.ndim == 2:
        scores = scores.sigmoid()
    made = METRICS[metric](classes).to(scores.device)
    made.update(scores, targets.long())
    return float(made.compute())


def recall(similarity: Tensor, owner: Tensor) -> float:
    """Score cosines of clips and captions, see `CrossRecall`."""
    made = METRICS["recall@1"](0).to(similarity.device)
    made.update(similarity, owner)
    return float(made.compute())


def text_metric(texts: Sequence[str], transcripts: Sequence[str]) -> float:
    """Score recognised texts against transcripts."""
    made = METRICS["word_accuracy"](0)
    made.update(list(texts), list(transcripts))
    return float(made.compute())


def _ranks(scores: Tensor) -> Tensor:
    """Map the scores of each class to ranks in 0 … 1, keeping order and ties. A sigmoid would
    create ties among large scores.
    """
    ordered, clips = scores.sort(dim=0)
    rises = torch.zeros_like(ordered, dtype=torch.double)
    rises[1:] = ordered[1:] > ordered[:-1]
    return torch.zeros_like(rises).scatter_(0, clips, rises.cumsum(0) / len(scores))


def class_losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the losses `[I, J]` of class scores `[I, J, C]`.

    The loss is cross-entropy for classes `[I]`, or the sum of C binary cross-entropies for
    targets `[I, C]`.
    """
    if targets.ndim == 2:
        each_head = targets[:, None].to(scores.dtype).expand_as(scores)
        return F.binary_cross_entropy_with_logits(scores, each_head, reduction="none").sum(2)
    items, heads, _ = scores.shape
    repeated = targets.repeat_interleave(heads)
    return F.cross_entropy(scores.flatten(0, 1), repeated, reduction="none").view(items, heads)


def masked_means(losses: Tensor, mask: Tensor) -> Tensor:
    """Average losses `[b, J]` over the items of each head. The mean is 0 for a head without items
    in this batch.
    """
    return (losses * mask).sum(0) / mask.sum(0).clamp(min=1)
