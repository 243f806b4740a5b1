"""The transcription probe: a linear CTC head over frames, reported as max(0, 1 − word error rate).

In: every frame of every clip, `[T, D]`, and transcripts. Out: texts, read off greedily, and their score. Next: `probes.selection`. The head
knows no language: what it writes is what frames hold by themselves (Graves et al. 2006 for the loss). X-ARES puts a frozen language
model behind an adapter instead; figures of the two are not comparable. All frames are held in memory.
"""

from collections.abc import Sequence

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.descent import descend
from whisper_aut.probes.fitting import Setting, fit
from whisper_aut.probes.metrics import text_metric
from whisper_aut.probes.selection import Judgement, jackknife

TRANSCRIPTION_VERSION = 1
BLANK = 0
BATCH_CLIPS = 64
EPOCHS, MIN_STEPS = 20, 300
CANDIDATES: tuple[Setting, ...] = tuple({"rate": rate} for rate in (1e-3, 3e-3, 1e-2))


class TranscriptionProbe(LightningModule):
    """J linear heads from a frame to the characters and a blank, trained as one.

    Args:
        symbols: V, the blank included.
        settings: each problem's learning `rate`.
    """

    def __init__(self, width: int, symbols: int, settings: Sequence[Setting]):
        super().__init__()
        self.automatic_optimization = False
        values = {
            "weight": torch.zeros(len(settings), width, symbols),
            "bias": torch.zeros(len(settings), symbols),
        }
        self.values = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        )
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.lengths: tuple[int, ...] = ()
        self.spelled: list[Tensor] = []

    def forward(self, frames: Tensor) -> Tensor:
        """`[…, T, D]` → `[J, …, T, V]`."""
        return _scores(dict(self.values), frames)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """`frames [ΣT, D]` of the clips whose `lengths` and `spelled` transcripts are set, `rows [B, J]`."""
        packed, rows = batch
        clips = packed.split(self.lengths)

        def objectives(values: dict[str, Tensor], chosen: Tensor) -> Tensor:
            picked = chosen.tolist()
            padded = pad_sequence([clips[i] for i in picked], batch_first=True)
            scores = (
                _scores(values, padded).log_softmax(-1).flatten(0, 1).transpose(0, 1)
            )  # [T, J · b, V]
            problems = len(rows[0])
            targets = torch.cat([self.spelled[i] for i in picked] * problems).to(packed.device)
            frame_counts = torch.tensor([self.lengths[i] for i in picked] * problems)
            letters = torch.tensor([len(self.spelled[i]) for i in picked] * problems)
            losses = F.ctc_loss(
                scores, targets, frame_counts, letters, reduction="none", zero_infinity=True
            )
            own = rows[chosen].T
            per_letter = losses.view(problems, -1) / letters.view(problems, -1).clamp(min=1).to(
                packed.device
            )
            return (per_letter * own).sum(1) / own.sum(1).clamp(min=1)

        steps = max(MIN_STEPS, EPOCHS * len(clips) // BATCH_CLIPS)
        rates = self.rates.to(packed.device)
        trained = descend(
            objectives, dict(self.values), rates, len(clips), steps=steps, batch_items=BATCH_CLIPS
        )
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """None of Lightning's: one training step runs `descend` to its end."""


class TranscriptionLearner:
    """Fits transcription probes on one round."""

    block = 8

    def __init__(self, pool: Embeddings, sampled: np.ndarray, test: Embeddings, device: str):
        taken = torch.from_numpy(np.repeat(sampled, pool.lengths))
        mean, deviation = (
            pool.features[taken].mean(0),
            pool.features[taken].std(0, correction=0).clamp_min(1e-6),
        )
        self.pool, self.test = (
            (pool.features - mean) / deviation,
            (test.features - mean) / deviation,
        )
        self.lengths, self.test_lengths = pool.lengths, test.lengths
        self.texts, self.test_texts = (
            [_plain(text) for text in part.labels] for part in (pool, test)
        )
        letters = sorted(
            {
                letter
                for text, own in zip(self.texts, sampled, strict=True)
                if own
                for letter in text
            }
        )
        self.letters = ["", *letters]
        number = {letter: code for code, letter in enumerate(self.letters)}
        self.spelled = [
            torch.tensor([number[letter] for letter in text if letter in number], dtype=torch.long)
            for text in self.texts
        ]
        self.device = device

    def fit(
        self, clips: Sequence[np.ndarray], settings: Sequence[Setting], thorough: bool
    ) -> "FittedTranscription":
        used = np.flatnonzero(np.any(clips, axis=0))
        frames = self.pool.split(self.lengths)
        probe = TranscriptionProbe(self.pool.shape[1], len(self.letters), settings)
        probe.lengths, probe.spelled = (
            tuple(self.lengths[i] for i in used),
            [self.spelled[i] for i in used],
        )
        rows = torch.from_numpy(np.stack(clips, 1)[used]).float()
        fit(
            probe,
            (torch.cat([frames[i] for i in used]).to(self.device), rows.to(self.device)),
            self.device,
        )
        return FittedTranscription(self, probe.cpu())


class FittedTranscription:
    """Transcription probes that were fitted together."""

    def __init__(self, learner: TranscriptionLearner, probe: TranscriptionProbe):
        self.learner, self.probe = learner, probe

    def on_pool(self, clips: np.ndarray, problem: int) -> Judgement:
        chosen, frames = np.flatnonzero(clips), self.learner.pool.split(self.learner.lengths)
        texts = [self._read(frames[i], problem) for i in chosen]
        return Judgement(
            text_metric(texts, [self.learner.texts[i] for i in chosen]), 0.0, np.empty(0)
        )

    def on_test(self, problem: int) -> Judgement:
        wanted = self.learner.test_texts
        texts = [
            self._read(clip, problem) for clip in self.learner.test.split(self.learner.test_lengths)
        ]
        words = np.array([len(text.split()) for text in wanted], dtype=float)
        # A clip's own rate, unclamped, times its words is the errors it adds to the whole.
        errors = np.array(
            [_errors(text, transcript) for text, transcript in zip(texts, wanted, strict=True)],
            dtype=float,
        )
        units = jackknife(
            lambda clips: max(0.0, 1 - errors[clips].sum() / max(1.0, words[clips].sum())),
            len(wanted),
        )
        return Judgement(text_metric(texts, wanted), 0.0, units)

    def _read(self, frames: Tensor, problem: int) -> str:
        best = self.probe(frames)[problem].argmax(-1).unique_consecutive()
        return "".join(self.learner.letters[code] for code in best.tolist() if code != BLANK)


def _scores(values: dict[str, Tensor], frames: Tensor) -> Tensor:
    spread = [1] * (frames.ndim - 2)
    weight = values["weight"].view(len(values["weight"]), *spread, *values["weight"].shape[1:])
    return frames @ weight + values["bias"].view(len(weight), *spread, 1, -1)


def _plain(text: str) -> str:
    return " ".join(
        "".join(
            letter if letter.isalnum() or letter == "'" else " " for letter in text.lower()
        ).split()
    )


def _errors(text: str, transcript: str) -> int:
    if not transcript:
        return len(text.split())
    found = jiwer.process_words(transcript, text)
    return found.substitutions + found.deletions + found.insertions
