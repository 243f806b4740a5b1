"""The LightningModule that binds an encoder to whichever decoder teaches it.

In: `Batch`es. Out: a loss normalised by the tokens of the whole optimiser step, and per-domain metrics in validation. Next:
`training.train` fits it, `export` takes the encoder out. It knows the decoder protocol and no decoder.
"""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.text import CharErrorRate, WordErrorRate
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from whisper_aut.corpora.annotation import DOMAINS
from whisper_aut.data.pack import Batch
from whisper_aut.data.text import TextCodec
from whisper_aut.model.decoders.protocol import Decoder
from whisper_aut.model.encoder import Frames, PackedEncoder
from whisper_aut.model.loss import DecoderLoss

OptimizerFactory = Callable[[nn.Module, nn.Module], Any]


class AudioTextModule(lightning.LightningModule):
    """Encoder + decoder → loss.

    Args:
        encoder: packed clips → frames.
        decoder: any `Decoder`.
        codec: its way from tokens to text.
        make_optimizer: `(encoder, decoder)` → what `configure_optimizers` returns.
        generate_clips: clips per domain for which validation writes text.
        generate_tokens: the longest text it writes.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        decoder: nn.Module,
        codec: TextCodec,
        make_optimizer: OptimizerFactory | None = None,
        *,
        generate_clips: int = 4,
        generate_tokens: int = 64,
    ):
        super().__init__()
        if not isinstance(decoder, Decoder):
            raise TypeError(f"{type(decoder).__name__} lacks loss, generate or trainable_parameters")
        self.encoder, self.decoder, self.codec = encoder, decoder, codec
        self.make_optimizer = make_optimizer
        self.generate_clips, self.generate_tokens = generate_clips, generate_tokens
        self.nll = nn.ModuleDict({domain: MeanMetric() for domain in DOMAINS})
        self.accuracy = nn.ModuleDict({domain: MeanMetric() for domain in DOMAINS})
        self.clips = nn.ModuleDict({domain: SumMetric() for domain in DOMAINS})
        self.word_errors, self.character_errors = WordErrorRate(), CharErrorRate()
        self.normalize = BasicTextNormalizer()
        self.generated: list[dict[str, str]] = []

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            raise RuntimeError("this module was built without an optimiser")
        return self.make_optimizer(self.encoder, self.decoder)

    def forward(self, batch: Batch) -> tuple[Frames, DecoderLoss]:
        frames = self.encoder(batch.mel, batch.mel_lengths)
        return frames, self.decoder.loss(frames.values, frames.lengths, batch.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ranks, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        tokens = self._step_tokens(batch, ranks)  # first: all ranks take part in it, those without a clip too
        if not len(batch):  # every sample of this rank's share was refused; the step still counts for all ranks
            return self._nothing_to_learn()
        _, loss = self(batch)
        mean = loss.total.detach() / max(1, sum(loss.counts))
        self.log("train/loss", mean, prog_bar=True, batch_size=max(1, sum(loss.counts)))
        self.log("train/accuracy", loss.correct.float().mean(), batch_size=max(1, sum(loss.counts)))
        # Ranks average their gradients and micro-batches are averaged too; undoing both leaves the sum over the tokens of the
        # whole step divided by their number, whatever the split.
        return loss.total * (ranks * accumulate / tokens)

    def on_validation_epoch_start(self) -> None:
        self.generated = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch):
            return
        frames, loss = self(batch)
        per_clip = zip(batch.domains, loss.token_nll.split(loss.counts), loss.correct.split(loss.counts), strict=True)
        for domain, nll, correct in per_clip:
            self.nll[domain].update(nll)  # pyright: ignore[reportCallIssue]
            self.accuracy[domain].update(correct.float())  # pyright: ignore[reportCallIssue]
            self.clips[domain].update(1)  # pyright: ignore[reportCallIssue]
        self._write_some(batch, frames)

    def on_validation_epoch_end(self) -> None:
        losses = []
        for domain in DOMAINS:
            clips = self.clips[domain].compute()  # pyright: ignore[reportCallIssue]
            if clips > 0:
                losses.append(self.nll[domain].compute())  # pyright: ignore[reportCallIssue]
                self.log(f"valid/loss_{domain}", losses[-1])
                self.log(f"valid/accuracy_{domain}", self.accuracy[domain].compute())  # pyright: ignore[reportCallIssue]
        if losses:
            self.log("valid/loss", torch.stack(losses).mean(), prog_bar=True)
        if self.word_errors.total > 0:
            self.log("valid/wer_speech", self.word_errors.compute(), prog_bar=True)
            self.log("valid/cer_speech", self.character_errors.compute())
        for metric in [
            *self.nll.values(),
            *self.accuracy.values(),
            *self.clips.values(),
            self.word_errors,
            self.character_errors,
        ]:
            metric.reset()  # pyright: ignore[reportCallIssue]

    def _write_some(self, batch: Batch, frames: Frames) -> None:
        """Generate text for the first clips of each domain, the same ones every time."""
        written = [sum(entry["domain"] == domain for entry in self.generated) for domain in DOMAINS]
        room: dict[str, int] = dict(zip(DOMAINS, (self.generate_clips - count for count in written), strict=True))
        prompts, clips = batch.targets.prompts(), frames.values.split(frames.lengths)
        for i, domain in enumerate(batch.domains):
            if room[domain] <= 0:
                continue
            room[domain] -= 1
            tokens = self.decoder.generate(clips[i], [frames.lengths[i]], [prompts[i]], self.generate_tokens)[0]
            text = self.codec.decode(tokens)
            self.generated.append({"domain": domain, "key": batch.keys[i], "reference": batch.texts[i], "generated": text})
            if domain == "speech" and (reference := self.normalize(batch.texts[i])):
                self.word_errors.update(self.normalize(text), reference)
                self.character_errors.update(self.normalize(text), reference)

    def _step_tokens(self, batch: Batch, ranks: int) -> Tensor | int:
        if ranks == 1:
            return max(1, batch.supervised_in_step)
        tokens = torch.tensor(float(batch.supervised_in_step), device=self.device)
        return self.trainer.strategy.reduce(tokens, reduce_op="sum").clamp(min=1.0)  # pyright: ignore[reportReturnType]

    def _nothing_to_learn(self) -> Tensor:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum((p.flatten()[:1].sum() * 0.0 for p in parameters), torch.zeros((), device=self.device))
