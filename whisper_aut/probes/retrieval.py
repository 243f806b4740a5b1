"""Retrieval probe: clips and captions are mapped into one space and scored by recall@1 in both
directions.

The text side is the simplest that can be learned without a language model: each word has a
vector, a caption is their mean, and both are trained with a linear map of the audio by the
contrastive loss of CLIP (Radford et al. 2021). This measures the audio encoder: a strong text
encoder would add knowledge that the audio encoder does not have. Words that are not in the
training captions are ignored.
"""

import re
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.probes.datasets import ProbeDataset, Split, SplitResult, Standardizer
from whisper_aut.probes.metrics import CrossRecall, recall_credit
from whisper_aut.probes.modules import AdamProbe, Candidates, Weights

SHARED_WIDTH = 128


class CaptionDataset(ProbeDataset):
    """Clips with one or more captions each, as bags of words.

    The bag of a caption has the frequency of each word of the vocabulary; it sums to one, or is
    zero if no word is known.
    """

    def __init__(self, split: Split, device: str = "cpu"):
        self.device = device
        pool, test = split.pool, split.test
        standardize = Standardizer(pool.features[torch.from_numpy(split.train)])
        self.features, self.test_features = (
            standardize(part.features).to(device) for part in (pool, test)
        )
        words = {
            word
            for captions, own in zip(pool.labels, split.train, strict=True)
            if own
            for caption in captions
            for word in _words(caption)
        }
        self.vocabulary = {word: number for number, word in enumerate(sorted(words))}
        self.bags, self.owners = self._bags(pool.labels)
        self.counts = torch.bincount(self.owners, minlength=len(pool))
        self.first = self.counts.cumsum(0) - self.counts
        self.test_bags, self.test_owners = self._bags(test.labels)
        self.test_captions = [caption for captions in test.labels for caption in captions]

    def _bags(self, labels: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Return a bag of words per caption, `[N, V]`, and the index of its clip, `[N]`."""
        captions = [(clip, caption) for clip, own in enumerate(labels) for caption in own]
        bags = torch.zeros(len(captions), len(self.vocabulary))
        for bag, (_, caption) in zip(bags, captions, strict=True):
            known = [self.vocabulary[word] for word in _words(caption) if word in self.vocabulary]
            frequencies = torch.full((len(known),), 1 / max(1, len(known)))
            bag.index_add_(0, torch.tensor(known, dtype=torch.long), frequencies)
        owners = torch.tensor([clip for clip, _ in captions], dtype=torch.long)
        return bags.to(self.device), owners.to(self.device)

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return the features and one caption of some clips: the first, or a drawn one."""
        clips = items.to(self.device)
        captions = self.first[clips]
        if generator is not None:
            drawn = torch.rand(len(clips), generator=generator).to(self.device)
            captions = captions + (drawn * self.counts[clips]).long()
        return self.features[clips], self.bags[captions]

    @torch.no_grad()
    def validate(self, probe: "RetrievalProbe", valid: Tensor) -> list[tuple[float, float]]:
        found = []
        for head, own in enumerate(valid.T.to(self.device)):
            captions = own[self.owners]
            owners = (own.long().cumsum(0) - 1)[self.owners[captions]]  # among the head's clips
            cosines = probe(self.features[own], self.bags[captions])[head]
            loss = F.cross_entropy(cosines.T / 0.07, owners)
            found.append((_recall(cosines, owners), float(loss)))
        return found

    @torch.no_grad()
    def test(self, probe: "RetrievalProbe") -> SplitResult:
        cosines, owners = probe(self.test_features, self.test_bags)[0], self.test_owners
        return SplitResult(
            _recall(cosines, owners),
            recall_credit(cosines, owners).mean(1).cpu().numpy(),
            tuple(self.test_captions[nearest] for nearest in cosines.argmax(1).tolist()),
        )


def _recall(cosines: Tensor, owners: Tensor) -> float:
    metric = CrossRecall().to(cosines.device)
    metric.update(cosines, owners)
    return float(metric.compute())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class RetrievalProbe(AdamProbe):
    """J pairs of linear maps into a shared space of width E: audio `[D, E]`, words `[V, E]`, and
    a learned logit scale.

    Args:
        width: D.
        words: size of the vocabulary, V.
        candidates: `rate` (learning rate) and `decay` of each pair.
        seed: decides initial weights.
    """

    title = "audio-text retrieval"
    answers = ("captions",)
    candidates = tuple(
        {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
    )
    version = 2
    dataset = CaptionDataset
    max_batch_items = 256
    valid_batch_items = None  # captions of other clips in the batch are the negatives
    decayed = ("audio", "words")

    def __init__(
        self,
        width: int,
        words: int,
        candidates: Candidates = ({"rate": 1e-3, "decay": 1e-3},),
        seed: int = 0,
    ):
        generator, heads = torch.Generator().manual_seed(seed), len(candidates)
        audio = torch.randn(width, SHARED_WIDTH, generator=generator) * width**-0.5
        text = torch.randn(words, SHARED_WIDTH, generator=generator) * SHARED_WIDTH**-0.5
        initial = {
            "audio": audio.repeat(heads, 1, 1),
            "words": text.repeat(heads, 1, 1),
            "scale": torch.full((heads,), float(np.log(1 / 0.07))),
        }
        super().__init__(initial, candidates)

    @classmethod
    def max_heads(cls, dataset: CaptionDataset) -> int:
        return 4  # each has a vector per word

    @classmethod
    def build(cls, dataset: CaptionDataset, candidates: Candidates, seed: int) -> Self:
        return cls(dataset.features.shape[1], len(dataset.vocabulary), candidates, seed)

    def apply_heads(self, weights: Weights, features: Tensor, bags: Tensor) -> Tensor:
        """Return cosines `[J, B, N]` of clips `[B, D]` and captions `[N, V]`."""
        audio = F.normalize(features @ weights["audio"], dim=-1)
        text = F.normalize(bags @ weights["words"], dim=-1)
        return audio @ text.transpose(1, 2)

    def losses(self, weights: Weights, *batch: Tensor) -> Tensor:
        """Return contrastive losses `[b, J]` of clips `[b, D]` and one caption each `[b, V]`, among
        the clips of each head.
        """
        features, bags, mask = batch
        own = mask.T > 0
        logits = self.apply_heads(weights, features, bags) * weights["scale"].exp()[:, None, None]
        logits = logits.masked_fill(~(own[:, None] & own[:, :, None]), -1e4)
        both = logits.logsumexp(1) + logits.logsumexp(2) - 2 * logits.diagonal(dim1=1, dim2=2)
        return both.T
