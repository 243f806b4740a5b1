"""Metrics of probe tasks, based on those of torchmetrics. All are in 0 … 1, higher is better. The
losses of many heads are here too.

The name of a metric determines the kind of answer that a task needs.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multilabel_average_precision,
    multilabel_f1_score,
)
from torchmetrics.functional.text import word_error_rate

Answer = Literal["class", "classes", "events", "captions", "text"]
ANSWERS: dict[str, Answer] = {
    "accuracy": "class",
    "mAP": "classes",
    "segment_f1_macro": "events",
    "segment_f1_micro": "events",
    "recall@1": "captions",
    "word_accuracy": "text",
}
# Called with `[B, C]` scores, `[B]` classes or `[B, C]` targets of 0 and 1, and C.
CLASS_METRICS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "accuracy": partial(multiclass_accuracy, average="micro", validate_args=False),
    "mAP": partial(multilabel_average_precision, average="macro", validate_args=False),
    "segment_f1_macro": partial(multilabel_f1_score, average="macro", validate_args=False),
    "segment_f1_micro": partial(multilabel_f1_score, average="micro", validate_args=False),
}


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


def class_metric(metric: str, classes: int, scores: Tensor, targets: Tensor) -> float:
    """Score class scores (logits) `[B, C]` against classes `[B]`, or targets `[B, C]` of 0 and 1.

    Mean average precision only covers classes that at least one of these clips has, since it is
    undefined for the others.
    """
    if metric == "mAP":
        present = targets.any(0)
        classes = int(present.sum())
        if not classes:
            return 0.0
        # Ranks in 0 … 1 keep order and ties. A sigmoid would create ties among large scores.
        ranks = rankdata(scores[:, present].cpu(), "dense", axis=0) / len(scores)
        scores, targets = torch.from_numpy(ranks), targets[:, present].cpu()
    elif targets.ndim == 2:
        scores = scores.sigmoid()
    return float(CLASS_METRICS[metric](scores, targets.long(), classes))


def recall(similarity: Tensor, owner: Tensor) -> float:
    """Return the recall@1 between B clips and N captions, averaged over both directions.

    A clip counts if its nearest caption is one of its own, a caption if its nearest clip is its
    own.

    Args:
        similarity: cosines `[B, N]`.
        owner: `[N]`, the clip that each caption describes.
    """
    return float(recall_credit(similarity, owner).mean(0).mean())


def text_metric(texts: list[str], transcripts: list[str]) -> float:
    """Return max(0, 1 − word error rate), as X-ARES and UniWhisper report for recognised speech."""
    return float((1 - word_error_rate(texts, transcripts)).clamp(min=0))


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
