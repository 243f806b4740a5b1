"""Validation metrics: loss and accuracy per group of clips, and metrics of generated texts."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore, CharErrorRate, WordErrorRate
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from whisper_aut.data.targets import MetricName

TEXT_METRICS: dict[MetricName, dict[str, Any]] = {
    "words": {"wer": WordErrorRate, "cer": CharErrorRate},
    "exact": {"exact": MeanMetric},
    "tags": {"f1": MeanMetric, "exact": MeanMetric},
    "caption": {"rouge": MeanMetric, "bleu": BLEUScore},
}


class GroupMetrics(nn.Module):
    """Metrics of several groups of clips, by name, synchronised over ranks."""

    def __init__(self, metrics: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.clips: Any = nn.ModuleDict({group: SumMetric() for group in metrics})
        self.metrics: Any = nn.ModuleDict(
            {
                group: nn.ModuleDict({name: make() for name, make in makers.items()})
                for group, makers in metrics.items()
            }
        )

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the metrics of every group that any rank saw, by group and name.

        All ranks must call this together.
        """
        computed = {}
        with warnings.catch_warnings():
            # Every rank must compute all metrics, including those it has no data for.
            warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
            for group, metrics in self.metrics.items():
                clips = self.clips[group].compute()
                values = {name: metric.compute() for name, metric in metrics.items()}
                if clips > 0:
                    computed[group] = values
        return computed

    def reset(self) -> None:
        for group, metrics in self.metrics.items():
            for metric in (self.clips[group], *metrics.values()):
                metric.reset()


class LossMetrics(GroupMetrics):
    """Mean loss and accuracy over the supervised tokens of each group."""

    def __init__(self, groups: Iterable[str]):
        loss = partial(MeanMetric, nan_strategy="disable")  # others leave out tokens without a loss
        super().__init__({group: {"loss": loss, "accuracy": MeanMetric} for group in groups})

    def update(self, group: str, nll: Tensor, correct: Tensor) -> None:
        """Add one clip: the loss of each token `[N]`, and whether it was predicted `[N]`."""
        self.clips[group].update(1)
        self.metrics[group]["loss"].update(nll)
        self.metrics[group]["accuracy"].update(correct.float())


class AnswerMetrics(GroupMetrics):
    """Metrics of generated texts for several tasks.

    Args:
        tasks: the kind of metric of each task. Other tasks are ignored.
    """

    def __init__(self, tasks: Mapping[str, MetricName]):
        super().__init__({task: TEXT_METRICS[kind] for task, kind in tasks.items()})
        self.kinds = dict(tasks)
        self.normalize = BasicTextNormalizer()

    def update(self, task: str, generated: str, references: Sequence[str]) -> None:
        """Add one clip. It is ignored if its references are empty after normalisation.

        Error rates compare with the first reference, other metrics with the closest one, and BLEU
        with all of them.
        """
        if task not in self.kinds:
            return
        text = self.normalize(generated).strip()
        expected = [found for one in references if (found := self.normalize(one).strip())]
        if not expected:
            return
        self.clips[task].update(1)
        tags, expected_tags = self._tags(generated), [self._tags(one) for one in references]
        for name, metric in self.metrics[task].items():
            if name == "exact":
                equal = tags in expected_tags if self.kinds[task] == "tags" else text in expected
                metric.update(float(equal))
            elif name == "f1":
                metric.update(max(tag_f1(tags, one) for one in expected_tags))
            elif name == "rouge":
                metric.update(max(_rouge_l(text, one) for one in expected))
            elif name == "bleu":
                metric.update([text], [expected])
            else:
                metric.update([text], expected[:1])

    def _tags(self, text: str) -> set[str]:
        parts = text.replace(";", ",").split(",")
        return {tag for part in parts if (tag := self.normalize(part).strip())}


def tag_f1(found: set[str], expected: set[str]) -> float:
    """Return the F1 score of two sets of tags; 1 if both are empty."""
    total = len(found) + len(expected)
    return 2 * len(found & expected) / total if total else 1.0


def _rouge_l(text: str, expected: str) -> Tensor:
    if not text:
        return torch.tensor(0.0)
    return rouge_score(text, expected, rouge_keys="rougeL")["rougeL_fmeasure"]
