"""Transcription probe: a linear CTC head on frames, scored by max(0, 1 − word error rate).

The head has no language model and is decoded greedily, so it measures what the frames alone
contain (Graves et al. 2006 for the loss). X-ARES trains an adapter to a frozen language model
instead, so its numbers are not comparable. Frames stay in their cache files (`probes.frames`).
"""

from collections.abc import Mapping, Sequence

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.fit import Judgement, Setting, Trial, Validation, fit, jackknife
from whisper_aut.probes.frames import Frames
from whisper_aut.probes.metrics import text_metric
from whisper_aut.probes.modules import Values, batch_size, descend, epochs_of, masked_means

TRANSCRIPTION_VERSION = 2
BLANK = 0
BATCH_CLIPS = 64
MAX_EPOCHS, PATIENCE = 100, 5  # low, as every epoch reads the frames again
CANDIDATES: tuple[Setting, ...] = tuple({"rate": rate} for rate in (1e-3, 3e-3, 1e-2))


class TranscriptionProbe(LightningModule):
    """J linear CTC heads from frames to characters and a blank, trained as one. Clips are given
    by index.

    Args:
        frames: clip indices → frames.
        spelled: character codes of each transcript.
        symbols: number of symbols V, including the blank.
        settings: `rate` (learning rate) of each problem, and `epochs` once chosen.
        seed: decides the order of batches. All weights start at zero.
    """

    def __init__(
        self, frames: Frames, spelled: Sequence[Tensor], symbols: int,
        settings: Sequence[Setting], seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.frames, self.spelled = frames, spelled
        width = len(frames.mean)
        values = {
            "weight": torch.zeros(len(settings), width, symbols),
            "bias": torch.zeros(len(settings), symbols),
        }
        self.values = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
        )
        self.seed, self.chosen_epochs = seed, epochs_of(settings)
        self.rates = torch.tensor([setting["rate"] for setting in settings])
        self.epochs: list[int] = []

    def forward(self, frames: Tensor, problem: int) -> Tensor:
        """Map frames `[…, T, D]` to logits `[…, T, V]` with one of the heads."""
        return frames @ self.values["weight"][problem] + self.values["bias"][problem]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Train on one batch that marks clips.

        Args:
            batch: `rows` `[B, J]`, the clips to train on, optionally followed by `[B, J]`, the
                clips to validate on.
            batch_idx: unused.
        """
        rows, valid = batch[0], batch[1:]
        used = torch.nonzero(rows.any(1))[:, 0]

        def objectives(values: Values, chosen: Tensor) -> Tensor:
            numbers = used[chosen.to(used.device)]
            return masked_means(self._losses(values, numbers), rows[numbers])

        def validate(values: Values) -> Tensor:
            numbers = torch.nonzero(valid[0].any(1))[:, 0]
            losses = [self._losses(values, some) for some in numbers.split(BATCH_CLIPS)]
            return masked_means(torch.cat(losses), valid[0][numbers])

        trained, self.epochs = descend(
            objectives, dict(self.values), self.rates.to(rows.device), len(used), seed=self.seed,
            batch_items=batch_size(len(used), BATCH_CLIPS), epochs=self.chosen_epochs,
            validate=validate if valid else None,
            max_epochs=MAX_EPOCHS, patience=PATIENCE,
        )  # fmt: skip
        for name, value in trained.items():
            self.values[name].copy_(value)

    def configure_optimizers(self) -> None:
        """Lightning's optimizers are not used: one training step runs `descend` to its end."""

    def _losses(self, values: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
        """Return the CTC losses per character, `[b, J]`, of the clips with indices `[b]`."""
        padded, lengths = self.frames(numbers)
        scores = torch.einsum("btd,jdv->tjbv", padded, values["weight"])
        scores = (scores + values["bias"][:, None]).log_softmax(-1).flatten(1, 2)  # [T, J · b, V]
        problems, spelled = len(self.rates), [self.spelled[i] for i in numbers.tolist()]
        letters = torch.tensor([len(text) for text in spelled])
        losses = F.ctc_loss(
            scores,
            torch.cat(spelled * problems).to(padded.device),
            lengths.cpu().repeat(problems),
            letters.repeat(problems),
            reduction="none",
            zero_infinity=True,
        )
        return (losses.view(problems, -1) / letters.clamp(min=1).to(padded.device)).T


class TranscriptionLearner:
    """Fits transcription probes on one round."""

    block = 8

    def __init__(self, pool: Embeddings, train: np.ndarray, test: Embeddings, device: str):
        taken = np.concatenate([train, np.zeros(len(test), dtype=bool)])
        self.frames = Frames([*pool.frames, *test.frames], taken, device)
        self.texts, self.test_texts = (
            [_plain(text) for text in part.labels] for part in (pool, test)
        )
        found = {
            letter for text, own in zip(self.texts, train, strict=True) if own for letter in text
        }
        self.letters = ["", *sorted(found)]
        number = {letter: code for code, letter in enumerate(self.letters)}
        self.spelled = [
            torch.tensor([number[letter] for letter in text if letter in number], dtype=torch.long)
            for text in self.texts
        ]
        self.test_groups = test.group_numbers()
        self.device = device

    def validate(self, trials: Sequence[Trial], settings: Sequence[Setting]) -> list[Validation]:
        probe = self._fit([trial.fit for trial in trials], settings, 0, [t.valid for t in trials])
        found = []
        for problem, (trial, epochs) in enumerate(zip(trials, probe.epochs, strict=True)):
            chosen = np.flatnonzero(trial.valid)
            texts = self._read(probe, chosen, problem)
            score = text_metric(texts, [self.texts[i] for i in chosen])
            found.append(Validation(score, 0.0, epochs))
        return found

    def test(self, clips: np.ndarray, setting: Setting, seed: int) -> Judgement:
        probe, wanted = self._fit([clips], [setting], seed), self.test_texts
        texts = self._read(probe, len(self.texts) + np.arange(len(wanted)), 0)
        words = np.array([len(text.split()) for text in wanted], dtype=float)
        # Errors are counted per clip, so that the error rate of any subset of clips follows from
        # sums.
        errors = np.array(
            [_errors(text, transcript) for text, transcript in zip(texts, wanted, strict=True)],
            dtype=float,
        )
        units = jackknife(
            lambda clips: max(0.0, 1 - errors[clips].sum() / max(1.0, words[clips].sum())),
            self.test_groups,
        )
        return Judgement(text_metric(texts, wanted), units, tuple(texts))

    def _fit(
        self, clips: Sequence[np.ndarray], settings: Sequence[Setting], seed: int,
        valid: Sequence[np.ndarray] = (),
    ) -> TranscriptionProbe:  # fmt: skip
        probe = TranscriptionProbe(self.frames, self.spelled, len(self.letters), settings, seed)
        rows = [
            torch.from_numpy(np.stack(masks, 1)).float() for masks in (clips, valid) if len(masks)
        ]
        fit(probe, tuple(part.to(self.device) for part in rows), self.device)
        return probe.to(self.device)

    def _read(self, probe: TranscriptionProbe, numbers: np.ndarray, problem: int) -> list[str]:
        """Decode clips greedily with one of the heads."""
        texts = []
        for number in torch.from_numpy(numbers).split(1):
            codes = probe(self.frames(number)[0][0], problem).argmax(-1).unique_consecutive()
            texts.append("".join(self.letters[code] for code in codes.tolist() if code != BLANK))
        return texts


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
