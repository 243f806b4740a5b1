"""The LightningModule that trains an encoder with any `Decoder`.

The loss is normalised by the supervised tokens of the whole optimizer step. Validation reports
metrics per domain and per task.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore, CharErrorRate, WordErrorRate
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.data.annotation import DOMAINS, Annotation
from whisper_aut.data.batch import Batch, Example, collate
from whisper_aut.data.targets import MetricName, TextCodec
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.models.decoders.base import Decoder
from whisper_aut.models.encoder import Frames, PackedEncoder
from whisper_aut.models.losses import DecoderLoss


class AnswerMetrics(nn.Module):
    """Metrics of generated text, for several tasks.

    Args:
        metrics: the kind of metric of each task. Other tasks are ignored.
    """

    def __init__(self, metrics: Mapping[str, MetricName]):
        super().__init__()
        self.kinds = dict(metrics)
        self.clips = nn.ModuleDict({task: SumMetric() for task in metrics})
        self.figures = nn.ModuleDict({task: _figures(kind) for task, kind in metrics.items()})
        self.normalize = BasicTextNormalizer()

    def update(self, task: str, generated: str, reference: str) -> None:
        """Add one clip. It is ignored if its reference is empty after normalisation."""
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
        """Return the metrics of every task that any rank saw, as `METRIC_TASK` → value.

        All ranks must call this together.
        """
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
            *(metric for part in self.figures.values() for metric in part.values()),  # pyright: ignore[reportCallIssue]
        ]:
            metric.reset()  # pyright: ignore[reportCallIssue]

    def _tags(self, text: str) -> set[str]:
        return {tag for part in text.split(",") if (tag := self.normalize(part).strip())}


@contextmanager
def unseen_parts_allowed() -> Iterator[None]:
    """Suppress torchmetrics' warning about metrics that are computed before any update.

    Every rank must compute all metrics, including those it has no data for.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before the ``update`` method.*")
        yield


def tag_f1(found: set[str], true: set[str]) -> float:
    """Return the F1 score of two sets of tags; 1 if both are empty."""
    return 2 * len(found & true) / (len(found) + len(true)) if found or true else 1.0


def _figures(kind: MetricName) -> nn.ModuleDict:
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


OptimizerFactory = Callable[[nn.Module, nn.Module], Any]
# Length and text of the clip that a rank without clips runs on.
SILENT_MEL_FRAMES, ONE_LETTER = 100, Annotation(text="a", instruction="a", answer="a", label="a")


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
        return torch.stack(
            [
                self.nll.sum(),
                self.correct.sum().to(self.nll.dtype),
                self.nll.new_full((), len(self.nll)),
            ]
        )

    def non_finite(self) -> list[tuple[str, str]]:
        """Return source and key of the clips whose loss is not finite."""
        finite = [bool(nll.isfinite().all()) for nll in self.nll.split(self.counts)]
        return [clip for clip, sound in zip(self.clips, finite, strict=True) if not sound]


class AudioTextModule(lightning.LightningModule):
    """Trains an encoder and a decoder.

    Args:
        encoder: maps packed clips to frames.
        decoder: any `Decoder`.
        codec: the decoder's codec, which converts generated tokens to text.
        make_optimizer: `(encoder, decoder)` → the return value of `configure_optimizers`.
        generate_clips: number of clips per task for which validation generates text.
        generate_tokens: the most tokens to generate per clip.
        encoder_after_step: train only the decoder before this optimizer step; the encoder gets no
            gradients until then.

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
        # Validation metrics are grouped by domain and by task.
        parts = (*DOMAINS, *codec.metrics)
        self.nll = nn.ModuleDict({part: MeanMetric() for part in parts})
        self.accuracy = nn.ModuleDict({part: MeanMetric() for part in parts})
        self.clips = nn.ModuleDict({part: SumMetric() for part in parts})
        self.answers = AnswerMetrics(codec.metrics)
        self.generated: list[dict[str, str]] = []
        self.seen: list[MicroBatchResult] = []  # micro-batches of the current optimizer step
        self._tokens: Tensor | int = 1
        self._silence: Batch | None = None

    def configure_optimizers(self) -> Any:
        if self.make_optimizer is None:
            raise RuntimeError("this module was built without an optimiser")
        return self.make_optimizer(self.encoder, self.decoder)

    def forward(self, batch: Batch) -> tuple[Frames, DecoderLoss]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            frames = self.encoder(batch.mel, batch.mel_lengths)
        return frames, self.decoder.loss(frames.values, frames.lengths, batch.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ranks, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:  # a collective: ranks without clips take part too
            self._tokens, self.seen = self._step_tokens(batch, ranks), []
        # Every rank must run the same graph in every micro-batch. ZeRO reduces gradients in the
        # order in which they arrive, and ZeRO-3 gathers weights layer by layer. If ranks differed,
        # gradients would be mixed up or the ranks would deadlock.
        _, loss = self(batch if len(batch) else self._silent_clip())
        total = loss.total
        if not self.encoder_learns and not self._partitioned:
            total = total + self._zero_gradients()
        if not len(batch):
            return total * 0.0
        clips = tuple(zip(batch.sources, batch.keys, strict=True))
        self.seen.append(
            MicroBatchResult(
                clips, loss.token_nll.detach().float(), loss.correct, tuple(loss.counts)
            )
        )
        # Gradients are averaged over ranks and micro-batches. Undo both, so that the loss is the
        # sum over all tokens of the step divided by their number, however they are distributed.
        # DeepSpeed averages over micro-batches once more than Lightning.
        averaged = (
            accumulate**2 if self.trainer.strategy.handles_gradient_accumulation else accumulate
        )
        return total * (ranks * averaged / self._tokens)

    def step_metrics(self) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy of the optimizer step, over all ranks and micro-batches.

        All ranks must call this together.
        """
        sums = torch.stack(
            [torch.zeros(3, device=self.device), *(seen.sums() for seen in self.seen)]
        ).sum(0)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums[0] / sums[2].clamp(min=1.0), sums[1] / sums[2].clamp(min=1.0)

    @property
    def _partitioned(self) -> bool:
        return any(hasattr(parameter, "ds_id") for parameter in self.parameters())

    @property
    def encoder_learns(self) -> bool:
        return not self.encoder_after_step or self.global_step >= self.encoder_after_step

    def on_validation_epoch_start(self) -> None:
        self.generated = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch):
            return
        frames, loss = self(batch)
        clips = zip(
            batch.domains,
            batch.tasks,
            loss.token_nll.split(loss.counts),
            loss.correct.split(loss.counts),
            strict=True,
        )
        for domain, task, nll, correct in clips:
            for part in (domain, task):
                self.nll[part].update(nll)  # pyright: ignore[reportCallIssue]
                self.accuracy[part].update(correct.float())  # pyright: ignore[reportCallIssue]
                self.clips[part].update(1)  # pyright: ignore[reportCallIssue]
        self._write_some(batch, frames)

    def on_validation_epoch_end(self) -> None:
        losses = []
        for part in self.nll:
            group = "valid" if part in DOMAINS else "tasks"
            with unseen_parts_allowed():
                clips, nll, accuracy = (
                    metrics[part].compute()  # pyright: ignore[reportCallIssue]
                    for metrics in (self.clips, self.nll, self.accuracy)
                )
            if clips > 0:
                losses += [nll] if part in DOMAINS else []
                self.log(f"{group}/loss_{part}", nll, sync_dist=True)
                self.log(f"{group}/accuracy_{part}", accuracy, sync_dist=True)
        if losses:
            self.log("valid/loss", torch.stack(losses).mean(), prog_bar=True, sync_dist=True)
        for name, figure in self.answers.compute().items():
            self.log(f"tasks/{name}", figure, prog_bar=name.startswith("wer"), sync_dist=True)
        self.answers.reset()
        for metric in [*self.nll.values(), *self.accuracy.values(), *self.clips.values()]:
            metric.reset()  # pyright: ignore[reportCallIssue]

    def _write_some(self, batch: Batch, frames: Frames) -> None:
        """Generate text for the first clips of each task: the same clips in every validation."""
        written = Counter(entry["task"] for entry in self.generated)
        picked = []
        for i, task in enumerate(batch.tasks):
            if written[task] < self.generate_clips:
                written[task] += 1
                picked.append(i)
        if not picked:
            return
        prompts, clips = batch.targets.prompts(), frames.values.split(frames.lengths)
        answers = self.decoder.generate(
            torch.cat([clips[i] for i in picked]),
            [frames.lengths[i] for i in picked],
            [prompts[i] for i in picked],
            self.generate_tokens,
        )
        for i, tokens in zip(picked, answers, strict=True):
            text = self.codec.decode(tokens)
            entry = {"domain": batch.domains[i], "task": batch.tasks[i], "key": batch.keys[i]}
            self.generated.append({**entry, "reference": batch.texts[i], "generated": text})
            self.answers.update(batch.tasks[i], text, batch.texts[i])

    def _step_tokens(self, batch: Batch, ranks: int) -> Tensor | int:
        if ranks == 1:
            return max(1, batch.supervised_in_step)
        tokens = torch.full(
            (), float(batch.supervised_in_step), dtype=torch.float32, device=self.device
        )
        torch.distributed.all_reduce(tokens)
        return tokens.clamp(min=1.0)

    def _zero_gradients(self) -> Tensor:
        """Return a zero whose gradient with respect to every trained parameter is zero."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum(
            (p.flatten()[:1].sum() * 0.0 for p in parameters), torch.zeros((), device=self.device)
        )

    def _silent_clip(self) -> Batch:
        """Return a batch with a second of silence and a one-letter text, for ranks without clips.

        Raises:
            UserError: the codec rejects the text.
        """
        if self._silence is None:
            try:
                target = self.codec.encode(ONE_LETTER, DOMAINS[0], 0)
            except SkipSample as error:
                raise UserError(
                    "A rank without clips needs the tokens of some text, and the decoder's codec "
                    f"rejects a text of one letter ({error}). Raise decoder.max_tokens."
                ) from None
            bins = self.encoder.num_mel_bins
            silence = torch.zeros(frames_with_context(SILENT_MEL_FRAMES), bins)
            example = Example(silence, SILENT_MEL_FRAMES, target, DOMAINS[0], "", "")
            self._silence = collate([example], [], bins).to(self.device)
        return self._silence
