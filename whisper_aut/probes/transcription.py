"""Transcription probe: a linear CTC head on frames, scored by max(0, 1 − word error rate).

The head has no language model and is decoded greedily, so it measures what the frames alone
contain (Graves et al. 2006 for the loss). X-ARES trains an adapter to a frozen language model
instead, so its numbers are not comparable. Frames stay in their cache files.
"""

from typing import Self

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.probes.datasets import (
    BATCH_FRAMES,
    Frames,
    ProbeDataset,
    Split,
    SplitResult,
    jackknife,
)
from whisper_aut.probes.metrics import text_metric
from whisper_aut.probes.modules import AdamProbe, Candidates, Weights

BLANK = 0


class TranscriptDataset(ProbeDataset):
    """Frames of clips and their transcripts as characters, without case and punctuation."""

    def __init__(self, split: Split, device: str = "cpu"):
        self.device = device
        pool, test = split.pool, split.test
        self.pool_items = len(pool)
        train = np.concatenate([split.train, np.zeros(len(test), dtype=bool)])
        self.frames = Frames([*pool.frames, *test.frames], train, device)
        self.texts = [_normalised(text) for text in (*pool.labels, *test.labels)]
        trained = [text for text, own in zip(self.texts, train, strict=True) if own]
        self.letters = ["", *sorted(set().union(*trained))]
        number = {letter: code for code, letter in enumerate(self.letters)}
        self.codes = [
            torch.tensor([number[letter] for letter in text if letter in number], dtype=torch.long)
            for text in self.texts
        ]
        self.test_groups = test.group_numbers()

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return padded frames `[b, T, D]`, their lengths `[b]`, the characters of all transcripts
        `[ΣL]`, and their number in each, `[b]`.
        """
        codes = [self.codes[i] for i in items.tolist()]
        counts = torch.tensor([len(text) for text in codes])
        return *self.frames(items), torch.cat(codes).to(self.device), counts

    def validate(self, probe: "CTCProbe", valid: Tensor) -> list[tuple[float, float]]:
        found = []
        for head, own in enumerate(valid.T):
            items = torch.nonzero(own)[:, 0]
            texts = self._decode(probe, items, head)
            found.append((text_metric(texts, [self.texts[i] for i in items.tolist()]), 0.0))
        return found

    def test(self, probe: "CTCProbe") -> SplitResult:
        texts = self._decode(probe, torch.arange(self.pool_items, len(self.texts)), 0)
        transcripts = self.texts[self.pool_items :]
        # Counted per clip, so that the error rate of any subset of clips follows from sums.
        words = np.array([len(text.split()) for text in transcripts], dtype=float)
        pairs = zip(texts, transcripts, strict=True)
        errors = np.array([_word_errors(text, transcript) for text, transcript in pairs], float)
        units = jackknife(
            lambda clips: max(0.0, 1 - errors[clips].sum() / max(1.0, words[clips].sum())),
            self.test_groups,
        )
        return SplitResult(text_metric(texts, transcripts), units, tuple(texts))

    @torch.no_grad()
    def _decode(self, probe: "CTCProbe", items: Tensor, head: int) -> list[str]:
        """Decode clips greedily with one of the heads."""
        texts = []
        for item in items.split(1):
            codes = probe(self.frames(item)[0])[0, head].argmax(-1).unique_consecutive()
            texts.append("".join(self.letters[code] for code in codes.tolist() if code != BLANK))
        return texts


def _normalised(text: str) -> str:
    letters = (c if c.isalnum() or c == "'" else " " for c in text.lower())
    return " ".join("".join(letters).split())


def _word_errors(text: str, transcript: str) -> int:
    if not transcript:
        return len(text.split())
    found = jiwer.process_words(transcript, text)
    return found.substitutions + found.deletions + found.insertions


class CTCProbe(AdamProbe):
    """J linear CTC heads from frames to characters and a blank. All weights start at zero.

    Args:
        width: D.
        symbols: number of characters, including the blank, V.
        candidates: `rate` (learning rate) of each head.
    """

    title = "CTC heads"
    answers = ("text",)
    features = "frames"
    candidates = tuple({"rate": rate} for rate in (1e-3, 3e-3, 1e-2))
    version = 2
    dataset = TranscriptDataset
    max_epochs, patience = 100, 5  # low, as every epoch reads the frames again
    max_batch_items = BATCH_FRAMES
    valid_batch_items = BATCH_FRAMES

    def __init__(self, width: int, symbols: int, candidates: Candidates = ({"rate": 3e-3},)):
        heads = len(candidates)
        initial = {
            "weight": torch.zeros(heads, width, symbols),
            "bias": torch.zeros(heads, symbols),
        }
        super().__init__(initial, candidates)

    @classmethod
    def max_heads(cls, dataset: TranscriptDataset) -> int:
        return 8

    @classmethod
    def build(cls, dataset: TranscriptDataset, candidates: Candidates, seed: int) -> Self:
        return cls(dataset.frames.width, len(dataset.letters), candidates)

    def apply_heads(self, weights: Weights, frames: Tensor) -> Tensor:
        """Return logits `[b, J, T, V]` of frames `[b, T, D]`."""
        scores = torch.einsum("btd,jdv->bjtv", frames, weights["weight"])
        return scores + weights["bias"][:, None]

    def losses(self, weights: Weights, *batch: Tensor) -> Tensor:
        """Return the CTC losses per character, `[b, J]`."""
        frames, lengths, codes, counts, _ = batch
        heads = len(self.rates)
        scores = self.apply_heads(weights, frames).log_softmax(-1)
        scores = scores.permute(2, 1, 0, 3).flatten(1, 2)  # [T, J · b, V]
        losses = F.ctc_loss(
            scores,
            codes.repeat(heads),
            lengths.cpu().repeat(heads),
            counts.cpu().repeat(heads),
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        return (losses.view(heads, -1) / counts.clamp(min=1).to(losses.device)).T
