"""Batches: the clips of a micro-batch, packed end to end without padding.

Shapes, here and in all other modules: B clips, S samples, M mel bins, F mel frames (10 ms), T
encoder frames (20 ms), L text tokens, D width, V vocabulary; ΣF is a sum over the clips of a batch.
Lengths are plain integers on the host, so reading them never waits for the device.

The classes of a batch are not frozen: Lightning's half-precision and DeepSpeed plugins copy a batch
and assign its fields.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from whisper_aut.data.reader import SkippedSample
from whisper_aut.data.sampler import Cursor


class DeviceData:
    """A dataclass whose tensors move together, also those of the `DeviceData` in it."""

    def to(self, device: torch.device) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        changes = {}
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = function(value)
            elif isinstance(value, DeviceData):
                changes[field.name] = value._map(function)
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class TokenTarget:
    """The token sequence of one clip for its decoder."""

    tokens: Tensor  # `[L]`, from the first prompt token to the end token
    supervised: Tensor  # `[L]` bool, label mask: the tokens that the decoder must predict
    prompt_length: int  # tokens that are given at generation; the answer follows
    text: str = ""  # reference text of the answer
    task: str = ""  # metrics are computed per task
    unknown_language: str = ""  # of the clip, if the decoder has no token for it
    references: tuple[str, ...] = ()  # all right answers, for metrics; empty if `text` is the only
    weight: float = 1.0  # of each supervised token in the loss


@dataclass
class Targets(DeviceData):
    """The token targets of a batch.

    Attributes:
        tokens, supervised: `[ΣL]`; see `TokenTarget`.
        label_indices: `[N]`, indices of the N supervised tokens. They are computed on the host;
            on the device, `nonzero` would force a synchronisation.
        lengths, prompt_lengths, counts: number of tokens, of prompt tokens, and of supervised
            tokens of each clip.
        weights: for each clip, the weight of each of its supervised tokens in the loss. Empty if
            all are 1.
    """

    tokens: Tensor
    supervised: Tensor
    label_indices: Tensor
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    counts: tuple[int, ...]
    weights: tuple[float, ...] = ()

    @classmethod
    def pack(cls, targets: Sequence[TokenTarget]) -> "Targets":
        """Concatenate the targets of the clips."""
        no_tokens = torch.zeros(0, dtype=torch.long)
        supervised = torch.cat([no_tokens.bool(), *(target.supervised for target in targets)])
        return cls(
            tokens=torch.cat([no_tokens, *(target.tokens for target in targets)]),
            supervised=supervised,
            label_indices=supervised.nonzero()[:, 0],
            lengths=tuple(len(target.tokens) for target in targets),
            prompt_lengths=tuple(target.prompt_length for target in targets),
            counts=tuple(int(target.supervised.sum()) for target in targets),
            weights=tuple(target.weight for target in targets),
        )

    def label_weights(self, device: torch.device) -> Tensor | None:
        """Return the weight of each supervised token, `[N]` float32, or None if all are 1."""
        if set(self.weights) <= {1.0}:
            return None
        weights = torch.tensor(self.weights, dtype=torch.float32)
        weights = weights.repeat_interleave(torch.tensor(self.counts))
        return weights.to(device, non_blocking=True)

    def clip_weights(self) -> list[float]:
        """Return the total weight of each clip's supervised tokens."""
        weights = self.weights or [1.0] * len(self.counts)
        return [count * weight for count, weight in zip(self.counts, weights, strict=True)]

    def prompts(self) -> list[Tensor]:
        """Return the prompt tokens of each clip, `[L]`, without the answer."""
        parts = self.tokens.split(self.lengths)
        return [part[:length] for part, length in zip(parts, self.prompt_lengths, strict=True)]


@dataclass
class Waveforms(DeviceData):
    """Clips whose log-mel is computed on the training device.

    Attributes:
        bits: `[ΣS]` int32, the bits of the float32 samples. Lightning's half-precision plugins
            convert every float tensor that they move to the device, and would round the samples.
        samples: S of each clip.
        positions: position of each clip in the order, which seeds SpecAugment; None for clips that
            are not augmented.
    """

    bits: Tensor
    samples: tuple[int, ...]
    positions: tuple[int | None, ...]

    @classmethod
    def pack(cls, waveforms: Sequence[Tensor], positions: Sequence[int | None]) -> "Waveforms":
        """Concatenate waveforms `[S]`."""
        bits = torch.cat([waveform.float() for waveform in waveforms]).view(torch.int32)
        return cls(bits, tuple(len(waveform) for waveform in waveforms), tuple(positions))

    def clips(self) -> tuple[Tensor, ...]:
        """Return the clips, each `[S]` float32."""
        return self.bits.view(torch.float32).split(self.samples)


@dataclass
class Batch(DeviceData):
    """One micro-batch of one rank.

    Attributes:
        mel: `[ΣF', M]` float32. F' counts the valid frames of a clip and the silence after them
            (`whisper_aut.audio.logmel`). `[0, M]` while the batch has waveforms instead.
        mel_lengths: F of each clip, valid frames only.
        targets: the token targets.
        texts, tasks, domains, keys, sources: one string per clip, for metrics and the ledger.
        references: all reference texts of each clip, for metrics.
        skipped: samples at this batch's positions of the order that were skipped.
        next_cursor: cursor after the micro-batches of all ranks in this step. A resumed run starts
            there.
        step_weight: total weight of the supervised tokens in all micro-batches of this rank's
            optimizer step, by which the loss is normalised; their number if all weights are 1.
        waveforms: the clips if the mel is not computed yet, else None.
        unknown_languages: languages of the clips whose decoder has no token for them.
        cut_sources: sources of the clips of which only a part is used, because they are too long.
        padded: for each clip, whether an encoder with padding `none` pads it to 30 s all the same.
    """

    mel: Tensor
    mel_lengths: tuple[int, ...]
    targets: Targets
    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    keys: tuple[str, ...]
    sources: tuple[str, ...]
    skipped: tuple[SkippedSample, ...] = ()
    next_cursor: Cursor = Cursor()  # noqa: RUF009 — immutable
    step_weight: float = 0.0
    waveforms: Waveforms | None = None
    unknown_languages: tuple[str, ...] = ()
    references: tuple[tuple[str, ...], ...] = ()
    cut_sources: tuple[str, ...] = ()
    padded: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.mel_lengths)

    @property
    def audio_seconds(self) -> float:
        """Seconds of audio, from the valid mel frames."""
        return sum(self.mel_lengths) / 100


@dataclass(frozen=True)
class Example:
    """One clip, ready to be packed."""

    audio: Tensor  # log-mel `[F', M]`, or waveform `[S]` if features are computed on the device
    mel_length: int  # F, valid frames
    target: TokenTarget
    domain: str
    key: str
    source: str
    position: int | None = None  # see `Waveforms.positions`
    is_cut: bool = False  # whether it is a part of a longer clip
    is_padded: bool = False  # see `Batch.padded`


def collate(
    examples: Sequence[Example],
    skipped: Sequence[SkippedSample],
    num_mel_bins: int,
    next_cursor: Cursor = Cursor(),  # noqa: B008 — immutable
) -> Batch:
    """Concatenate examples to a batch. Either all have a log-mel or all have a waveform.

    If all samples were skipped, the batch is empty but still counts as a step of the schedule.
    """
    audio = [example.audio for example in examples]
    targets = [example.target for example in examples]
    mel, waveforms = torch.zeros(0, num_mel_bins), None
    if audio and audio[0].ndim == 1:
        waveforms = Waveforms.pack(audio, [example.position for example in examples])
    elif audio:
        mel = torch.cat(audio)
    return Batch(
        mel=mel,
        mel_lengths=tuple(example.mel_length for example in examples),
        targets=Targets.pack(targets),
        texts=tuple(target.text for target in targets),
        tasks=tuple(target.task for target in targets),
        domains=tuple(example.domain for example in examples),
        keys=tuple(example.key for example in examples),
        sources=tuple(example.source for example in examples),
        skipped=tuple(skipped),
        next_cursor=next_cursor,
        waveforms=waveforms,
        unknown_languages=tuple(
            target.unknown_language for target in targets if target.unknown_language
        ),
        references=tuple(target.references or (target.text,) for target in targets),
        cut_sources=tuple(example.source for example in examples if example.is_cut),
        padded=tuple(example.is_padded for example in examples),
    )
