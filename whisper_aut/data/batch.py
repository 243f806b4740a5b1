"""Clips → one batch, packed end to end without padding.

In: per clip a log-mel or its waveform, tokens and facts. Out: a `Batch` whose tensors hold all clips one after another, with every
clip's length beside them. Next: `data.features` where there are waveforms; `model.encoder` reads the mel, a decoder the targets.
Shapes, here and everywhere: B clips, S samples, M mel bins, F mel frames (10 ms), T encoder frames (20 ms), L text tokens, D width,
V vocabulary; ΣF is a sum over the clips of a batch. Lengths are plain integers on the host, so that nothing waits for a device to
read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whisper_aut.data.reader import Refusal
from whisper_aut.data.sampler import Cursor

TENSORS = ("tokens", "supervised", "places")  # of `Targets`; the rest are numbers


@dataclass(frozen=True)
class TokenTarget:
    """One clip's text as its decoder wants it.

    Attributes:
        tokens: `[L]` the whole sequence, from the first prompt token to the end token.
        supervised: `[L]` bool, the tokens that the decoder must predict.
        prompt_length: how many of the tokens are given at generation; the answer follows them.
        text: what it should write then.
        task: what it is asked to do, by which metrics are kept apart.
        unknown_language: the clip's language where its decoder has no token for it, else empty.
    """

    tokens: Tensor
    supervised: Tensor
    prompt_length: int
    text: str = ""
    task: str = ""
    unknown_language: str = ""


@dataclass
class Targets:
    """The token targets of a batch.

    Attributes:
        tokens, supervised: `[ΣL]`.
        places: `[N]` where the supervised tokens lie; found on the host, so that no device has to count them.
        lengths, prompt_lengths, counts: per clip all tokens, those given at generation, those supervised.
    """

    tokens: Tensor
    supervised: Tensor
    places: Tensor
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def pack(cls, targets: Sequence[TokenTarget]) -> "Targets":
        supervised = (
            torch.cat([target.supervised for target in targets])
            if targets
            else torch.zeros(0, dtype=torch.bool)
        )
        return cls(
            tokens=torch.cat([target.tokens for target in targets])
            if targets
            else torch.zeros(0, dtype=torch.long),
            supervised=supervised,
            places=supervised.nonzero()[:, 0],
            lengths=tuple(len(target.tokens) for target in targets),
            prompt_lengths=tuple(target.prompt_length for target in targets),
            counts=tuple(int(target.supervised.sum()) for target in targets),
        )

    def prompts(self) -> list[Tensor]:
        """Return each clip's prompt tokens, the answer cut off."""
        parts = self.tokens.split(self.lengths)
        return [part[:length] for part, length in zip(parts, self.prompt_lengths, strict=True)]

    def to(self, device: torch.device) -> "Targets":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> "Targets":
        return replace(self, **{name: getattr(self, name).pin_memory() for name in TENSORS})


@dataclass
class Waveforms:
    """Clips whose log-mel is made on the training device.

    Attributes:
        bits: `[ΣS]` int32, the bits of float32 samples: half-precision plugins round every float on its way to the device.
        samples: S per clip.
        positions: of the clips in the order, by which SpecAugment draws; None for clips that nothing is done to.
    """

    bits: Tensor
    samples: tuple[int, ...]
    positions: tuple[int | None, ...]

    @classmethod
    def pack(cls, waveforms: Sequence[Tensor], positions: Sequence[int | None]) -> "Waveforms":
        bits = torch.cat([waveform.float() for waveform in waveforms]).view(torch.int32)
        return cls(bits, tuple(len(waveform) for waveform in waveforms), tuple(positions))

    def clips(self) -> tuple[Tensor, ...]:
        """Return each clip, `[S]` float32."""
        return self.bits.view(torch.float32).split(self.samples)

    def to(self, device: torch.device) -> "Waveforms":
        return replace(self, bits=self.bits.to(device, non_blocking=True))

    def pin_memory(self) -> "Waveforms":
        return replace(self, bits=self.bits.pin_memory())


@dataclass
class Batch:
    """What one step sees. Not frozen, nor is what it holds: Lightning's half-precision and DeepSpeed plugins fill in a copy.

    Attributes:
        mel: `[ΣF', M]` float32; F' counts a clip's valid frames and the silence after them (`data.logmel`). `[0, M]` while the batch
            has waveforms instead.
        mel_lengths: F per clip, valid frames only.
        targets: the tokens to learn.
        texts, tasks, domains, keys, sources: per clip, for metrics, the ledger and people.
        refusals: samples that stood in this batch's places of the order and were refused.
        behind: where the order stands when every rank has had its batch; what a resume begins from.
        supervised_in_step: supervised tokens of all micro-batches of this rank's optimiser step, which normalise its loss.
        waveforms: what `data.features` makes the mel from; None once it is there.
        unknown_languages: of the clips whose decoder has no token for their language.
    """

    mel: Tensor
    mel_lengths: tuple[int, ...]
    targets: Targets
    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    domains: tuple[str, ...]
    keys: tuple[str, ...]
    sources: tuple[str, ...]
    refusals: tuple[Refusal, ...] = ()
    behind: Cursor = Cursor()  # noqa: RUF009 — immutable
    supervised_in_step: int = 0
    waveforms: Waveforms | None = None
    unknown_languages: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.mel_lengths)

    @property
    def supervised(self) -> int:
        return sum(self.targets.counts)

    @property
    def audio_seconds(self) -> float:
        return sum(self.mel_lengths) / 100

    def to(self, device: torch.device) -> "Batch":
        waveforms = self.waveforms and self.waveforms.to(device)
        return replace(
            self,
            mel=self.mel.to(device, non_blocking=True),
            targets=self.targets.to(device),
            waveforms=waveforms,
        )

    def pin_memory(self) -> "Batch":
        waveforms = self.waveforms and self.waveforms.pin_memory()
        return replace(
            self, mel=self.mel.pin_memory(), targets=self.targets.pin_memory(), waveforms=waveforms
        )


@dataclass(frozen=True)
class Example:
    """One clip, ready to be packed.

    Attributes:
        audio: its log-mel `[F', M]`, or its waveform `[S]` where features are made on the device.
        mel_length: F, valid frames.
        position: see `Waveforms.positions`.
    """

    audio: Tensor
    mel_length: int
    target: TokenTarget
    domain: str
    key: str
    source: str
    position: int | None = None


def pack(
    examples: Sequence[Example],
    refusals: Sequence[Refusal],
    num_mel_bins: int,
    behind: Cursor = Cursor(),  # noqa: B008 — immutable
) -> Batch:
    """Lay examples end to end. Without any (all refused) the batch is empty, yet still one step of the schedule."""
    audio = [example.audio for example in examples]
    heard = bool(audio) and audio[0].ndim == 1
    return Batch(
        mel=torch.cat(audio) if audio and not heard else torch.zeros(0, num_mel_bins),
        mel_lengths=tuple(example.mel_length for example in examples),
        targets=Targets.pack([example.target for example in examples]),
        texts=tuple(example.target.text for example in examples),
        tasks=tuple(example.target.task for example in examples),
        domains=tuple(example.domain for example in examples),
        keys=tuple(example.key for example in examples),
        sources=tuple(example.source for example in examples),
        refusals=tuple(refusals),
        behind=behind,
        waveforms=Waveforms.pack(audio, [example.position for example in examples])
        if heard
        else None,
        unknown_languages=tuple(
            example.target.unknown_language
            for example in examples
            if example.target.unknown_language
        ),
    )
