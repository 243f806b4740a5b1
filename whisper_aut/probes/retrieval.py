"""The retrieval probe: clips and captions brought into one space, scored by recall@1 in both directions.

In: one vector a clip, and its captions. Out: how often the nearest caption, or clip, is the right one. Next: `probes.selection`. The text
side is the simplest that can be learned without a language model of its own: a bag of words, each word a vector, trained together with
a linear map of the audio by the contrastive loss of CLIP (Radford et al. 2021). What is measured is thus the audio's share: a strong
text encoder would bring in knowledge that the encoder does not have. Words that were never trained on say nothing.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.descent import descend
from whisper_aut.probes.fitting import Setting, fit
from whisper_aut.probes.metrics import CrossRecall, recall_credit
from whisper_aut.probes.selection import Judgement

RETRIEVAL_VERSION = 1
SHARED_WIDTH = 128
BATCH_CLIPS = 256
CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
)


class RetrievalProbe(LightningModule):
    """J pairs of maps into a shared space: audio `[D, E]`, words `[V, E]`, and a learned sharpness.

    Args:
        settings: each problem's learning `rate` and `decay`.
    """

    def __init__(self, width: int, words: int, settings: Sequence[Setting], seed: int = 0):
        super().__init__()
        self.automatic_optimization = False
        generator, count = torch.Generator().manual_seed(seed), len(settings)
        audio = torch.randn(width, SHARED_WIDTH, generator=generator) * width**-0.5
        text = torch.randn(words, SHARED_WIDTH, generator=generator) * SHARED_WIDTH**-0.5
        values = {
            "audio": audio.repeat(count, 1, 1),
            "words": text.repeat(count, 1, 1),
            "sharpness": torch.full((count,), float(np.log(1 / 0.07))),
        }
        self.values = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        )
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.decays = torch.tensor([setting["decay"] for setting in settings])

    def forward(self, features: Tensor, bags: Tensor) -> Tensor:
        """Clips `[B, D]` and captions `[N, V]` → cosines `[J, B, N]`."""
        return _cosines(dict(self.values), features, bags)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """`features [B, D]`, `bags [N, V]`, `first [B]` and `count [B]` of each clip's captions, `rows [B, J]`."""
        features, bags, first, count, rows = batch
        decays, generator = self.decays.to(features.device), torch.Generator().manual_seed(0)

        def objectives(values: dict[str, Tensor], chosen: Tensor) -> Tensor:
            place = (
                torch.rand(len(chosen), generator=generator).to(count.device) * count[chosen]
            ).long()
            logits = (
                _cosines(values, features[chosen], bags[first[chosen] + place])
                * values["sharpness"].exp()[:, None, None]
            )
            own = rows[chosen].T > 0  # [J, b]
            logits = logits.masked_fill(~(own[:, None] & own[:, :, None]), -1e4)
            right = logits.diagonal(dim1=1, dim2=2)
            losses = logits.logsumexp(1) + logits.logsumexp(2) - 2 * right
            squares = values["audio"].square().sum((1, 2)) + values["words"].square().sum((1, 2))
            return (losses * own).sum(1) / own.sum(1).clamp(min=1) + 0.5 * decays * squares

        rates = self.rates.to(features.device)
        trained = descend(
            objectives, dict(self.values), rates, len(features), batch_items=BATCH_CLIPS
        )
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class Captions:
    """The captions of some clips as bags of words: `bags` `[N, V]` of shares, `owner` `[N]` the clip of each."""

    bags: Tensor
    owner: Tensor

    @classmethod
    def of(cls, labels: Sequence[Sequence[str]], vocabulary: dict[str, int]) -> "Captions":
        bags = [_bag(caption, vocabulary) for captions in labels for caption in captions]
        owner = torch.arange(len(labels)).repeat_interleave(
            torch.tensor([len(captions) for captions in labels])
        )
        return cls(torch.stack(bags), owner)

    def among(self, clips: Tensor) -> "Captions":
        """Keep the captions of the clips that a mask `[B]` marks, numbering those anew."""
        kept, number = clips[self.owner], clips.long().cumsum(0) - 1
        return Captions(self.bags[kept], number[self.owner[kept]])


class RetrievalLearner:
    """Fits retrieval probes on one round."""

    block = 4  # problems; each holds a vector for every word

    def __init__(self, pool: Embeddings, sampled: np.ndarray, test: Embeddings, device: str):
        taken = torch.from_numpy(sampled)
        mean, deviation = (
            pool.features[taken].mean(0),
            pool.features[taken].std(0, correction=0).clamp_min(1e-6),
        )
        self.pool, self.test = (
            (pool.features - mean) / deviation,
            (test.features - mean) / deviation,
        )
        words = Counter(
            word
            for label, own in zip(pool.labels, sampled, strict=True)
            if own
            for text in label
            for word in _words(text)
        )
        self.vocabulary = {word: number for number, word in enumerate(sorted(words))}
        self.pool_captions, self.test_captions = (
            Captions.of(part.labels, self.vocabulary) for part in (pool, test)
        )
        self.device = device

    def fit(
        self, clips: Sequence[np.ndarray], settings: Sequence[Setting], thorough: bool
    ) -> "FittedRetrieval":
        rows = torch.from_numpy(np.stack(clips, 1))
        probe = RetrievalProbe(self.pool.shape[1], len(self.vocabulary), settings)
        count = torch.bincount(self.pool_captions.owner, minlength=len(self.pool))
        first = count.cumsum(0) - count
        batch = (self.pool, self.pool_captions.bags, first, count, rows.float())
        fit(probe, tuple(part.to(self.device) for part in batch), self.device)
        return FittedRetrieval(self, probe.cpu())


class FittedRetrieval:
    """Retrieval probes that were fitted together."""

    def __init__(self, learner: RetrievalLearner, probe: RetrievalProbe):
        self.learner, self.probe = learner, probe

    def on_pool(self, clips: np.ndarray, problem: int) -> Judgement:
        own = torch.from_numpy(clips)
        return self._judge(self.learner.pool[own], self.learner.pool_captions.among(own), problem)

    def on_test(self, problem: int) -> Judgement:
        return self._judge(self.learner.test, self.learner.test_captions, problem)

    def _judge(self, features: Tensor, captions: Captions, problem: int) -> Judgement:
        cosines = self.probe(features, captions.bags)[problem]
        metric = CrossRecall()
        metric.update(cosines, captions.owner)
        loss = F.cross_entropy(cosines.T / 0.07, captions.owner)
        return Judgement(
            float(metric.compute()),
            float(loss),
            recall_credit(cosines, captions.owner).mean(1).numpy(),
        )


def _cosines(values: dict[str, Tensor], features: Tensor, bags: Tensor) -> Tensor:
    audio = F.normalize(features @ values["audio"], dim=-1)
    text = F.normalize(bags @ values["words"], dim=-1)
    return audio @ text.transpose(1, 2)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _bag(text: str, vocabulary: dict[str, int]) -> Tensor:
    known = [vocabulary[word] for word in _words(text) if word in vocabulary]
    bag = torch.zeros(len(vocabulary))
    return bag.index_add(
        0, torch.tensor(known, dtype=torch.long), torch.full((len(known),), 1 / max(1, len(known)))
    )
