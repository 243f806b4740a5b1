"""Retrieval probe: clips and captions are mapped into one space and scored by recall@1 in both
directions.

The text side is the simplest that can be learned without a language model: each word has a
vector, a caption is their mean, and both are trained with a linear map of the audio by the
contrastive loss of CLIP (Radford et al. 2021). This measures the audio encoder: a strong text
encoder would add knowledge that the audio encoder does not have. Words that are not in the
training captions are ignored.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.fit import Judgement, Setting, Trial, Validation, fit
from whisper_aut.probes.metrics import CrossRecall, recall_credit
from whisper_aut.probes.modules import Values, batch_size, descend, epochs_of

RETRIEVAL_VERSION = 2
SHARED_WIDTH = 128
BATCH_CLIPS = 256
CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
)


class RetrievalProbe(LightningModule):
    """J pairs of linear maps into a shared space of width E: audio `[D, E]`, words `[V, E]`, and
    a learned logit scale.

    Args:
        width: D.
        words: size of the vocabulary, V.
        settings: `rate` (learning rate) and `decay` of each problem, and `epochs` once chosen.
        seed: decides initial weights, the order of batches, and which caption of a clip a step
            uses.
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
        self.seed, self.chosen_epochs = seed, epochs_of(settings)
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.decays = torch.tensor([setting["decay"] for setting in settings])
        self.epochs: list[int] = []

    def forward(self, features: Tensor, bags: Tensor) -> Tensor:
        """Return cosines `[J, B, N]` of clips `[B, D]` and captions `[N, V]`."""
        return _cosines(dict(self.values), features, bags)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Train on one batch that holds all clips.

        Args:
            batch: `features` `[B, D]`, `bags` `[N, V]`, `first` `[B]` and `count` `[B]` (index
                of each clip's first caption, and their number), and `rows` `[B, J]`, the clips
                to train on. Optionally followed by `[B, J]`, the clips to validate on.
            batch_idx: unused.
        """
        (features, bags, first, count, rows), valid = batch[:5], batch[5:]
        decays, generator = self.decays.to(rows.device), torch.Generator().manual_seed(self.seed)
        used = torch.nonzero(rows.any(1))[:, 0]

        def objectives(values: Values, chosen: Tensor) -> Tensor:
            clips = used[chosen.to(used.device)]
            drawn = torch.rand(len(clips), generator=generator).to(count.device)
            captions = first[clips] + (drawn * count[clips]).long()
            own = rows[clips].T > 0  # [J, b]
            losses = _contrast(values, features[clips], bags[captions], own)
            squares = values["audio"].square().sum((1, 2)) + values["words"].square().sum((1, 2))
            return (losses * own).sum(1) / own.sum(1).clamp(min=1) + 0.5 * decays * squares

        def validate(values: Values) -> Tensor:
            clips = torch.nonzero(valid[0].any(1))[:, 0]
            own = valid[0][clips].T > 0
            losses = _contrast(values, features[clips], bags[first[clips]], own)
            return (losses * own).sum(1) / own.sum(1)

        trained, self.epochs = descend(
            objectives, dict(self.values), self.rates.to(rows.device), len(used), seed=self.seed,
            batch_items=batch_size(len(used), BATCH_CLIPS), epochs=self.chosen_epochs,
            validate=validate if valid else None,
        )  # fmt: skip
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """Lightning's optimizers are not used: one training step runs `descend` to its end."""


@dataclass(frozen=True)
class Captions:
    """The captions of some clips as bags of words.

    Attributes:
        bags: word frequencies `[N, V]`; each row sums to one, or is zero if no word is known.
        owner: `[N]`, index of the clip of each caption.
    """

    bags: Tensor
    owner: Tensor

    @classmethod
    def of(cls, labels: Sequence[Sequence[str]], vocabulary: dict[str, int]) -> "Captions":
        """Convert captions per clip to bags of words over a vocabulary (word → index)."""
        bags = [_bag(caption, vocabulary) for captions in labels for caption in captions]
        owner = torch.arange(len(labels)).repeat_interleave(
            torch.tensor([len(captions) for captions in labels])
        )
        return cls(torch.stack(bags), owner)

    def among(self, clips: Tensor) -> "Captions":
        """Keep the captions of the clips marked by the mask `clips` `[B]`, and renumber these
        clips.
        """
        kept, number = clips[self.owner], clips.long().cumsum(0) - 1
        return Captions(self.bags[kept], number[self.owner[kept]])


class RetrievalLearner:
    """Fits retrieval probes on one round."""

    block = 4  # problems at once; each has a vector per word

    def __init__(self, pool: Embeddings, train: np.ndarray, test: Embeddings, device: str):
        taken = torch.from_numpy(train)
        mean, deviation = (
            pool.features[taken].mean(0),
            pool.features[taken].std(0, correction=0).clamp_min(1e-6),
        )
        self.pool, self.tested = (
            (pool.features - mean) / deviation,
            (test.features - mean) / deviation,
        )
        words = Counter(
            word
            for label, own in zip(pool.labels, train, strict=True)
            if own
            for text in label
            for word in _words(text)
        )
        self.vocabulary = {word: number for number, word in enumerate(sorted(words))}
        self.pool_captions, self.test_captions = (
            Captions.of(part.labels, self.vocabulary) for part in (pool, test)
        )
        self.test_texts = [text for label in test.labels for text in label]
        self.device = device

    def validate(self, trials: Sequence[Trial], settings: Sequence[Setting]) -> list[Validation]:
        probe = self._fit([trial.fit for trial in trials], settings, 0, [t.valid for t in trials])
        found = []
        for problem, (trial, epochs) in enumerate(zip(trials, probe.epochs, strict=True)):
            own = torch.from_numpy(trial.valid)
            captions = self.pool_captions.among(own)
            cosines = probe(self.pool[own], captions.bags)[problem]
            loss = F.cross_entropy(cosines.T / 0.07, captions.owner)
            found.append(Validation(_recall(cosines, captions.owner), float(loss), epochs))
        return found

    def test(self, clips: np.ndarray, setting: Setting, seed: int) -> Judgement:
        probe, captions = self._fit([clips], [setting], seed), self.test_captions
        cosines = probe(self.tested, captions.bags)[0]
        return Judgement(
            _recall(cosines, captions.owner),
            recall_credit(cosines, captions.owner).mean(1).numpy(),
            tuple(self.test_texts[nearest] for nearest in cosines.argmax(1).tolist()),
        )

    def _fit(
        self, clips: Sequence[np.ndarray], settings: Sequence[Setting], seed: int,
        valid: Sequence[np.ndarray] = (),
    ) -> RetrievalProbe:  # fmt: skip
        probe = RetrievalProbe(self.pool.shape[1], len(self.vocabulary), settings, seed)
        count = torch.bincount(self.pool_captions.owner, minlength=len(self.pool))
        first = count.cumsum(0) - count
        rows = [
            torch.from_numpy(np.stack(masks, 1)).float() for masks in (clips, valid) if len(masks)
        ]
        batch = (self.pool, self.pool_captions.bags, first, count, *rows)
        fit(probe, tuple(part.to(self.device) for part in batch), self.device)
        return probe.cpu()


def _recall(cosines: Tensor, owner: Tensor) -> float:
    metric = CrossRecall()
    metric.update(cosines, owner)
    return float(metric.compute())


def _contrast(values: Mapping[str, Tensor], features: Tensor, bags: Tensor, own: Tensor) -> Tensor:
    """Return contrastive losses `[J, b]` of clips `[b, D]` and one caption each `[b, V]`, among
    the clips of each problem, marked by `own` `[J, b]`.
    """
    logits = _cosines(values, features, bags) * values["sharpness"].exp()[:, None, None]
    logits = logits.masked_fill(~(own[:, None] & own[:, :, None]), -1e4)
    return logits.logsumexp(1) + logits.logsumexp(2) - 2 * logits.diagonal(dim1=1, dim2=2)


def _cosines(values: Mapping[str, Tensor], features: Tensor, bags: Tensor) -> Tensor:
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
