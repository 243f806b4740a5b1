"""What a decoder writes, measured by what its task is.

In: per clip a task, the generated text and the reference. Out: figures by name, the same on every rank. Next: `model.module` logs them
in validation, `evaluate` prints them. Texts are normalised as Whisper's evaluation does it (lower case, no punctuation) before they are
compared. CIDEr and SPIDEr are not here: the libraries for them need Java or do not install cleanly. Captions are measured by ROUGE-L
and BLEU-4 instead.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore, CharErrorRate, WordErrorRate
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from whisper_aut.data.text import Metric


class AnswerMetrics(nn.Module):
    """Collects generated texts of several tasks.

    Args:
        metrics: what each task is measured by; tasks that are not named are not measured.
    """

    def __init__(self, metrics: Mapping[str, Metric]):
        super().__init__()
        self.kinds = dict(metrics)
        self.clips = nn.ModuleDict({task: SumMetric() for task in metrics})
        self.figures = nn.ModuleDict({task: _figures(kind) for task, kind in metrics.items()})
        self.normalize = BasicTextNormalizer()

    def update(self, task: str, generated: str, reference: str) -> None:
        """Add one clip. A reference of which nothing is left after normalisation says nothing and is not counted."""
        if task not in self.kinds:
            return
        written, meant = self.normalize(generated).strip(), self.normalize(reference).strip()
        if not meant:
            return
        self.clips[task].update(1)  # pyright: ignore[reportCallIssue]
        tags = self._tags(generated), self._tags(reference)
        equal = tags[0] == tags[1] if self.kinds[task] == "tags" else written == meant
        for name, metric in self.figures[task].items():  # pyright: ignore[reportCallIssue]
            if name == "exact":
                metric.update(float(equal))
            elif name == "f1":
                metric.update(tag_f1(*tags))
            elif name == "rouge":
                metric.update(_rouge_l(written, meant))
            elif name == "bleu":
                metric.update([written], [[meant]])
            else:
                metric.update([written], [meant])

    def compute(self) -> dict[str, Tensor]:
        """Return `METRIC_TASK` → figure for every task that any rank saw; all ranks must call this together."""
        computed = {}
        with unseen_parts_allowed():
            for task, metrics in self.figures.items():
                clips = self.clips[task].compute()  # pyright: ignore[reportCallIssue]
                figures = {f"{name}_{task}": metric.compute() for name, metric in metrics.items()}  # pyright: ignore[reportCallIssue]
                if clips > 0:
                    computed |= figures
        return computed

    def reset(self) -> None:
        for metric in [
            *self.clips.values(),
            *(metric for part in self.figures.values() for metric in part.values()),
        ]:  # pyright: ignore
            metric.reset()  # pyright: ignore[reportCallIssue]

    def _tags(self, text: str) -> set[str]:
        return {tag for part in text.split(",") if (tag := self.normalize(part).strip())}


@contextmanager
def unseen_parts_allowed() -> Iterator[None]:
    """Compute metrics that saw nothing without a warning: every rank must compute all of them, whatever it saw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
        yield


def tag_f1(found: set[str], true: set[str]) -> float:
    """Return the harmonic mean of precision and recall of two sets of tags."""
    return 2 * len(found & true) / (len(found) + len(true)) if found or true else 1.0


def _figures(kind: Metric) -> nn.ModuleDict:
    makers = {
        "words": {"wer": WordErrorRate, "cer": CharErrorRate},
        "exact": {"exact": MeanMetric},
        "tags": {"f1": MeanMetric, "exact": MeanMetric},
        "caption": {"rouge": MeanMetric, "bleu": BLEUScore},
    }
    return nn.ModuleDict({name: make() for name, make in makers[kind].items()})


def _rouge_l(written: str, meant: str) -> Tensor:
    if not written:
        return torch.tensor(0.0)
    return rouge_score(written, meant, rouge_keys="rougeL")["rougeL_fmeasure"]
