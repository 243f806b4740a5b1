"""The LightningModule that trains an encoder with any `Decoder`.

The loss is normalised by the supervised tokens of the whole optimizer step, or by their weight.
Validation reports metrics per domain and per task.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.data.annotation import DOMAINS, Annotation
from whisper_aut.data.batch import Batch, Example, collate
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.models.decoders.base import Decoder
from whisper_aut.models.distillation import Distillation
from whisper_aut.models.encoder import Frames, PackedEncoder
from whisper_aut.models.losses import DecoderLoss
from whisper_aut.models.metrics import AnswerMetrics, LossMetrics

OptimizerFactory = Callable[[nn.Module, nn.Module], Any]
ONE_LETTER = Annotation(text="a", instruction="a", answer="a", label="a")  # see `_silent_batch`


@dataclass(frozen=True)
class MicroBatchResult:
    """Results of a micro-batch with N supervised tokens, kept until the end of the optimizer step.

    Attributes:
        clips: source and key of each clip.
        nll: `[N]` negative log-likelihood of each supervised token.
        correct: `[N]` bool, whether the most likely token was the target.
        counts: number of supervised tokens per clip.
    """

    clips: tuple[tuple[str, str], ...]
    nll: Tensor
    correct: Tensor
    counts: tuple[int, ...]

    def sums(self) -> Tensor:
        """Return the sum of the losses, the number of correct tokens, and N, as `[3]`."""
        tokens = self.nll.new_full((), len(self.nll))
        return torch.stack([self.nll.sum(), self.correct.sum().to(self.nll.dtype), tokens])

    def non_finite(self) -> list[tuple[str, str]]:
        """Return source and key of the clips whose loss is not finite."""
        losses = zip(self.clips, self.nll.split(self.counts), strict=True)
        return [clip for clip, nll in losses if not nll.isfinite().all()]


class AudioTextModule(lightning.LightningModule):
    """Trains an encoder and a decoder.

    Args:
        encoder: maps packed clips to frames.
        decoder: any `Decoder`.
        codec: the decoder's codec, which converts generated tokens to text.
        make_optimizer: `(encoder, decoder)` → the return value of `configure_optimizers`.
        generate_clips: number of clips per task and domain for which validation generates text.
        generate_tokens: maximum number of tokens to generate per clip.
        encoder_after_step: train only the decoder before this optimizer step; the encoder gets no
            gradients until then.
        distillation: keeps the encoder close to the pretrained one, see `models.distillation`.
        domains: the domains of the clips.

    Raises:
        TypeError: `decoder` does not implement `Decoder`.
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
        encoder_after_step: int = 0,
        distillation: Distillation | None = None,
        domains: Sequence[str] = DOMAINS,
    ):
        super().__init__()
        if not isinstance(decoder, Decoder):
            raise TypeError(
                f"{type(decoder).__name__} lacks loss, generate or trainable_parameters"
            )
        self.encoder, self.decoder, self.codec = encoder, decoder, codec
        self.make_optimizer = make_optimizer
        self.generate_clips, self.generate_tokens = generate_clips, generate_tokens
        self.encoder_after_step = encoder_after_step
        self.distillation = distillation
        self.domains = tuple(domains)
        self.loss_metrics = LossMetrics((*domains, *codec.metrics))
        self.answer_metrics = AnswerMetrics(codec.metrics)
        self.generated: list[dict[str, str]] = []  # texts of the last validation
        self.micro_batches: list[MicroBatchResult] = []  # of the current optimizer step
        # Moving average of the trained weights by name, float32; empty without one.
        self.average: dict[str, Tensor] = {}
        self._step_weight: Tensor | float = 1.0
        self.step_loss = torch.tensor(torch.nan)  # of the last optimizer step, per token
        self._silence: Batch | None = None
        self.weights_on_first_rank = False  # the others get them in `configure_model`

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            raise RuntimeError("This module was built without an optimizer.")
        return self.make_optimizer(self.encoder, self.decoder)

    def configure_model(self) -> None:
        """Let the strategy share and shard the weights, before the optimizer is made."""
        if self.weights_on_first_rank:
            self.trainer.strategy.broadcast_weights(self)  # pyright: ignore
            self.weights_on_first_rank = False
        if (shard := getattr(self.trainer.strategy, "shard", None)) is not None:
            shard(self)

    def forward(self, batch: Batch) -> tuple[Frames, DecoderLoss]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            frames = self.encode(batch)
        loss = self.decoder.loss(frames.values, frames.lengths, batch.targets)
        weights = batch.targets.label_weights(loss.token_nll.device)
        if weights is not None and self.global_step == 0:
            expected = (weights * loss.token_nll).sum()
            if (loss.total.detach() - expected).abs() > 0.01 * expected:
                name = type(self.decoder).__name__
                raise UserError(
                    f"{name} ignores targets.label_weights, which `loss` of the config needs."
                )
        if self.distillation and self.training and self.encoder_learns:
            distance = self.distillation(batch, frames)
            if distance is not None:
                self.log("train/distillation", distance.detach(), batch_size=1)
                loss = replace(loss, total=loss.total + self.distillation.weight * distance)
        return frames, loss

    def encode(self, batch: Batch) -> Frames:
        """Return the frames of a batch for the decoder."""
        layers = getattr(self.decoder, "encoder_layers", ())
        keep_states = bool(layers) or (self.distillation is not None and self.training)
        frames = self.encoder(batch.mel, batch.mel_lengths, keep_states, batch.padded)
        return frames.of_layers(layers)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ranks, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:  # a collective: ranks without clips take part too
            self._step_weight, self.micro_batches = self._sum_step_weight(batch, ranks), []
        # Every rank must run the same graph in every micro-batch. ZeRO reduces gradients in the
        # order in which they arrive, and ZeRO-3 gathers weights layer by layer. If ranks differed,
        # gradients would be mixed up or the ranks would deadlock.
        _, loss = self(batch if len(batch) else self._silent_batch())
        total = loss.total
        zero_3 = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        if not self.encoder_learns and not zero_3:
            total = total + self._zero_with_gradients()
        if len(batch):
            clips = tuple(zip(batch.sources, batch.keys, strict=True))
            nll, counts = loss.token_nll.detach().float(), tuple(loss.counts)
            self.micro_batches.append(MicroBatchResult(clips, nll, loss.correct, counts))
        if (batch_idx + 1) % accumulate == 0:
            self._log_step(ranks)
        if not len(batch):
            return total * 0.0
        # Gradients are averaged over ranks and micro-batches. Undo both, so that the loss is the
        # weighted mean over all tokens of the step, however they are distributed.
        # DeepSpeed averages over micro-batches once more than Lightning.
        if self.trainer.strategy.handles_gradient_accumulation:
            accumulate **= 2
        return total * (ranks * accumulate / self._step_weight)

    def _log_step(self, ranks: int) -> None:
        """Log loss and accuracy of the optimizer step, over all ranks and micro-batches."""
        # Under 16-bit precisions, the default type of the forward pass is not float32.
        zeros = torch.zeros(3, dtype=torch.float32, device=self.device)  # a rank may have no clips
        sums = torch.stack([zeros, *(result.sums() for result in self.micro_batches)]).sum(0)
        if ranks > 1:
            torch.distributed.all_reduce(sums)
        loss, correct, tokens = sums
        tokens = tokens.clamp(min=1.0)
        self.step_loss = loss / tokens
        self.log("train/loss", self.step_loss, batch_size=1)
        self.log("train/accuracy", correct / tokens, batch_size=1)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the moving average of the weights, if there is one, instead of the weights."""
        own = {}
        for name, parameter in self.named_parameters():
            if name in self.average:
                own[parameter] = parameter.detach().clone()
                parameter.data.copy_(self.average[name])
        try:
            yield
        finally:
            for parameter, value in own.items():
                parameter.data.copy_(value)

    @property
    def encoder_learns(self) -> bool:
        return self.global_step >= self.encoder_after_step or not self.encoder_after_step

    def on_validation_epoch_start(self) -> None:
        self.generated = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch):
            return
        # Not `self(batch)`: ZeRO-3 hooks into it with a collective, and a rank may have no clips.
        frames, loss = self.forward(batch)
        nll, correct = loss.token_nll.split(loss.counts), loss.correct.split(loss.counts)
        for groups, clip_nll, clip_correct in zip(
            zip(batch.domains, batch.tasks, strict=True), nll, correct, strict=True
        ):
            for group in groups:
                self.loss_metrics.update(group, clip_nll, clip_correct)
        self._generate_texts(batch, frames)

    def on_validation_epoch_end(self) -> None:
        losses = []
        for group, values in self.loss_metrics.compute().items():
            prefix = "valid" if group in self.domains else "tasks"
            losses += [values["loss"]] if group in self.domains else []
            for name, value in values.items():
                self.log(f"{prefix}/{name}_{group}", value, sync_dist=True)
        if losses:
            self.log("valid/loss", torch.stack(losses).mean(), prog_bar=True, sync_dist=True)
        for task, values in self.answer_metrics.compute().items():
            for name, value in values.items():
                self.log(f"tasks/{name}_{task}", value, prog_bar=name == "wer", sync_dist=True)
        self.loss_metrics.reset()
        self.answer_metrics.reset()

    def _generate_texts(self, batch: Batch, frames: Frames) -> None:
        """Generate text for the first clips of each task and domain, always the same clips."""
        generated = Counter((entry["domain"], entry["task"]) for entry in self.generated)
        chosen = []
        for i, kind in enumerate(zip(batch.domains, batch.tasks, strict=True)):
            if generated[kind] < self.generate_clips:
                generated[kind] += 1
                chosen.append(i)
        if not chosen:
            return
        prompts, clips = batch.targets.prompts(), frames.values.split(frames.lengths)
        answers = self.decoder.generate(
            torch.cat([clips[i] for i in chosen]),
            [frames.lengths[i] for i in chosen],
            [prompts[i] for i in chosen],
            self.generate_tokens,
        )
        for i, tokens in zip(chosen, answers, strict=True):
            text = self.codec.decode(tokens)
            entry = {"domain": batch.domains[i], "task": batch.tasks[i], "key": batch.keys[i]}
            entry |= {"source": batch.sources[i], "reference": batch.texts[i]}
            self.generated.append(entry | {"generated": text})
            self.answer_metrics.update(batch.tasks[i], text, batch.references[i])

    def _sum_step_weight(self, batch: Batch, ranks: int) -> Tensor | float:
        """Return the weight of the supervised tokens of the optimizer step, over all ranks."""
        if ranks == 1:
            return batch.step_weight or 1.0
        # Half-precision plugins change the default dtype, which could not hold the sum. `full`
        # writes it on the device, where `tensor` would wait for a copy.
        weight = torch.full((), batch.step_weight, dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(weight)
        return torch.where(weight > 0, weight, 1.0)

    def _zero_with_gradients(self) -> Tensor:
        """Return a zero whose gradient with respect to every trained parameter is zero."""
        zeros = [p.flatten()[:1].sum() * 0.0 for p in self.parameters() if p.requires_grad]
        return sum(zeros, torch.zeros((), device=self.device))

    def _silent_batch(self) -> Batch:
        """Return a batch with one second of silence and one letter, for ranks without clips."""
        if self._silence is None:
            try:
                target = self.codec.encode(ONE_LETTER, DOMAINS[0], 0)
            except SkipSample as error:
                raise UserError(
                    "A rank without clips runs on a text of one letter, which the decoder's codec "
                    f"rejects ({error}). Raise decoder.max_tokens."
                ) from None
            mel_length, bins = 100, self.encoder.num_mel_bins
            silence = torch.zeros(frames_with_context(mel_length), bins)
            example = Example(silence, mel_length, target, DOMAINS[0], "", "")
            self._silence = collate([example], [], bins).to(self.device)
        return self._silence
