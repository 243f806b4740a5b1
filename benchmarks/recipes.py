"""One optimiser step, twice: this project's, and the Hugging Face recipe's, on the same weights,
clips and texts.

In: waveforms and texts as tokens. Out: two objects whose `step()` computes features, encoder,
decoder, loss, backward, clipping and AdamW, and returns the mean loss before the update. The
Hugging Face side is what `Seq2SeqTrainer` computes with the data collator of the Whisper
fine-tuning guide: features padded to 30 s, labels padded to the longest, logits of every position,
and the optimiser that `Seq2SeqTrainingArguments` picks by default, which is the fused AdamW.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.config import OptimSettings
from whisper_aut.data.batch import Targets, TokenTarget
from whisper_aut.models.decoders.whisper import WhisperDecoder
from whisper_aut.models.encoder import PackedEncoder, Padding
from whisper_aut.models.losses import DecoderLoss
from whisper_aut.training.optim import parameter_groups

LEARNING_RATE, WEIGHT_DECAY, GRADIENT_CLIP = 1e-5, 0.01, 1.0
IGNORED = -100  # what the collator writes where a label is padding


@dataclass(frozen=True)
class Clips:
    """Waveforms `[S]` at 16 kHz, and each clip's tokens `[L]` with start and end token."""

    waveforms: list[Tensor]
    tokens: list[Tensor]

    @classmethod
    def noise(
        cls, seconds: Sequence[float], labels: int, vocabulary: int = 50_000, seed: int = 0
    ) -> "Clips":
        """Noise of given lengths, each with N labels: a start token (an input), then random."""
        generator = torch.Generator().manual_seed(seed)
        waveforms = [
            torch.randn(round(16_000 * length), generator=generator) * 0.1 for length in seconds
        ]
        return cls(
            waveforms,
            [torch.randint(vocabulary, (labels + 1,), generator=generator) for _ in seconds],
        )


def whisper_tiny(seed: int = 0) -> WhisperForConditionalGeneration:
    """The shape of openai/whisper-tiny with random weights."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "d_model": 384,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 1536,
        "decoder_ffn_dim": 1536,
    }
    heads: dict[str, Any] = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
    return WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **heads, vocab_size=51_865, num_mel_bins=80)
    ).train()


class PackedStep:
    """This project's step."""

    def __init__(
        self, model: WhisperForConditionalGeneration, clips: Clips, padding: Padding = "none"
    ):
        model = copy.deepcopy(model)
        self.clips, self.logmel = clips, LogMel(model.config.num_mel_bins)
        self.encoder = PackedEncoder(model.model.encoder, padding).train()
        self.decoder = WhisperDecoder(model.model.decoder, end_token=50_257).train()
        optim = OptimSettings(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        groups = parameter_groups(self.encoder, self.decoder, optim)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

    def loss(self) -> Tensor:
        loss = self._summed(self.clips.waveforms, self.clips.tokens)
        return loss.total / sum(loss.counts)

    def alone(self, number: int) -> tuple[Tensor, int]:
        """Return one clip's summed loss, and its labels, as if it were all there is."""
        loss = self._summed([self.clips.waveforms[number]], [self.clips.tokens[number]])
        return loss.total, sum(loss.counts)

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _summed(self, waveforms: Sequence[Tensor], tokens: Sequence[Tensor]) -> DecoderLoss:
        mel = torch.cat([self.logmel(waveform) for waveform in waveforms])
        frames = self.encoder(mel, [mel_frames(len(waveform)) for waveform in waveforms])
        return self.decoder.loss(
            frames.values, frames.lengths, Targets.pack([_target(clip) for clip in tokens])
        )


class HuggingFaceStep:
    """The recipe's step.

    Args:
        labels_to: pad labels to this many positions instead of to the longest.
        extract_once: compute the features once, as if workers did it in time.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        clips: Clips,
        labels_to: int = 0,
        extract_once: bool = False,
    ):
        self.model = copy.deepcopy(model)
        self.extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        self.arrays = [waveform.numpy() for waveform in clips.waveforms]
        longest = max(labels_to, *(len(tokens) - 1 for tokens in clips.tokens))
        self.inputs = torch.stack(
            [pad(tokens[:-1], (0, longest + 1 - len(tokens))) for tokens in clips.tokens]
        )
        self.labels = torch.stack(
            [
                pad(tokens[1:], (0, longest + 1 - len(tokens)), value=IGNORED)
                for tokens in clips.tokens
            ]
        )
        self.inputs, self.labels = self.inputs.to(model.device), self.labels.to(model.device)
        self.features = self._extract() if extract_once else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    def loss(self) -> Tensor:
        features = self._extract() if self.features is None else self.features
        return self.model(
            input_features=features, decoder_input_ids=self.inputs, labels=self.labels
        ).loss

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _extract(self) -> Tensor:
        extracted = self.extractor(self.arrays, sampling_rate=16_000, return_tensors="pt")
        return extracted.input_features.to(self.model.device)


def _target(tokens: Tensor) -> TokenTarget:
    supervised = torch.ones(len(tokens), dtype=torch.bool)
    supervised[0] = False
    return TokenTarget(tokens, supervised, 1)
