"""Whisper's encoder on the frames that clips have, without the 30-second tax.

In: packed log-mel `[ΣF', M]` and valid lengths F. Out: `Frames`, packed `[ΣT, D]` with lengths. Next: a decoder, or pooling. The
weights, their names and the arithmetic are Hugging Face's `WhisperEncoder`; what differs is the layout: clips lie end to end,
projections and feed-forward run over all of them at once, attention stays inside each, positions restart at each.

Two paddings, one set of weights: `none` runs each clip at its own length, and a clip's frames are the same alone and in any batch;
`30s` extends every clip with silence to Whisper's window and computes what Hugging Face computes, to a relative error of 1e-5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu
from torch.utils.checkpoint import checkpoint
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.audio.logmel import MAX_MEL_FRAMES, frames_with_context, silence_level
from whisper_aut.errors import UserError
from whisper_aut.models.attention import Segments, clip_attention, sent
from whisper_aut.models.dense import speed_up_products

Padding = Literal["none", "30s"]
PADDINGS = ("none", "30s")
TRAINED_PADDING = "trained_padding"  # the key under which an exported config.json says it
RELEASED_PADDING: Padding = "30s"  # of checkpoints without that key: every released Whisper
CONV_STRIDE = 2
FRAME_SECONDS = 0.02
FLOAT16_MARGIN = 1_000  # Whisper's own: float16 activations are kept this far from infinity


@dataclass(frozen=True)
class Frames:
    """Encoder frames of a batch.

    Attributes:
        values: `[ΣT, D]`.
        lengths: T per clip, what a decoder attends to: the clip's own frames, or 1,500 in `30s` mode.
        valid_lengths: T per clip that hold the clip itself: what pooling may average.
    """

    values: Tensor
    lengths: tuple[int, ...]
    valid_lengths: tuple[int, ...]

    def valid(self) -> list[Tensor]:
        """Return each clip's own frames, `[T, D]`."""
        clips = self.values.split(self.lengths)
        return [clip[:length] for clip, length in zip(clips, self.valid_lengths, strict=True)]


def longest_clip_seconds(config: WhisperConfig) -> float:
    """Return how long a clip may be for the positions that an encoder has: 30 for a released Whisper's 1,500."""
    return config.max_source_positions * FRAME_SECONDS


def too_long(config: WhisperConfig, padding: Padding, clip_seconds: float) -> str:
    """Say that clips of this length, padding included, do not fit an encoder's positions, and how long clips may be."""
    longest = longest_clip_seconds(config)
    way = (
        "Padding to 30s does not fit; choose padding none, which runs clips at their own length"
        if padding == "30s"
        else f"Clips may be at most {longest:g} s long; in training, set data.max_seconds={longest:g} to skip longer ones"
    )
    return (
        f"This encoder has {config.max_source_positions} positions (max_source_positions in its config.json), which reach {longest:g} s; "
        f"{clip_seconds:g} s do not fit. {way}."
    )


def encoder_frames(mel_length: int) -> int:
    """T: encoder frames (20 ms) of a clip with F valid mel frames."""
    return -(-mel_length // CONV_STRIDE)


class PackedEncoder(nn.Module):
    """Runs a Hugging Face `WhisperEncoder` on packed clips.

    Args:
        whisper: the encoder whose modules and weights are used; its parameters stay where they are.
        padding: `none` or `30s`.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing its activations.
        compile: let `torch.compile` fuse what lies between attentions. Sizes are symbolic: all layers and all
            batches share two compilations for training, before and after attention, and two for evaluation.
    """

    def __init__(
        self,
        whisper: WhisperEncoder,
        padding: Padding = "none",
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        self.whisper = whisper
        self.padding: Padding = padding
        self.gradient_checkpointing = gradient_checkpointing
        self._halves = _HALVES
        if compile:
            before_attention, after_attention = _HALVES
            self._halves = (
                torch.compile(before_attention, dynamic=True),
                torch.compile(after_attention, dynamic=True),
            )
        # Whisper's positions are fixed sinusoids; transformers leaves them trainable when it loads a checkpoint.
        whisper.embed_positions.requires_grad_(False)
        speed_up_products(whisper)

    @property
    def width(self) -> int:
        return self.whisper.config.d_model

    @property
    def num_mel_bins(self) -> int:
        return self.whisper.config.num_mel_bins

    def forward(self, mel: Tensor, mel_lengths: Sequence[int]) -> Frames:
        """Encode packed clips.

        Args:
            mel: `[ΣF', M]`, each clip with its silence context as `data.logmel` lays it out.
            mel_lengths: F per clip.
        """
        valid = tuple(encoder_frames(length) for length in mel_lengths)
        if self.padding == "30s":
            mel = _pad_with_silence(mel, mel_lengths)
            mel_lengths = (MAX_MEL_FRAMES,) * len(valid)
        lengths = tuple(encoder_frames(length) for length in mel_lengths)
        if max(lengths) > self.whisper.config.max_source_positions:
            raise UserError(too_long(self.whisper.config, self.padding, max(mel_lengths) / 100))
        hidden = self._embed(mel, mel_lengths)
        segments = Segments.of(lengths, lengths, hidden.device)
        for layer in self.whisper.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(self._layer, layer, hidden, segments, use_reentrant=False)
            else:
                hidden = self._layer(layer, hidden, segments)  # pyright: ignore[reportArgumentType]
        return Frames(self.whisper.layer_norm(hidden), lengths, valid)

    def _layer(self, layer: Any, hidden: Tensor, segments: Segments) -> Tensor:
        """One transformer layer on packed clips `[ΣT, D]`, in the order of `WhisperEncoderLayer.forward`."""
        before_attention, after_attention = self._halves
        attention = layer.self_attn
        p = attention.dropout if attention.training else 0.0
        q, k, v = before_attention(layer, hidden)
        attended = clip_attention(q, k, v, segments, dropout=p)
        return after_attention(layer, hidden, attended)

    def _embed(self, mel: Tensor, mel_lengths: Sequence[int]) -> Tensor:
        """Convolve and add positions: `[ΣF', M]` → `[ΣT, D]`.

        Clips are spread out with zeros between them, starting at even frames, so that one convolution over the whole batch
        sees at each clip's edges exactly what it would see alone.
        """
        whisper = self.whisper
        if len(set(mel_lengths)) == 1:
            return self._embed_equal(mel, len(mel_lengths), encoder_frames(mel_lengths[0]))
        layout = _Spread.of(mel_lengths)
        mel_index, frame_index, positions = (sent(index, mel.device) for index in layout.indices())
        spread = mel.new_zeros(layout.width, mel.shape[1]).index_copy(0, mel_index, mel)
        inside = spread.new_zeros(layout.width).index_fill(0, mel_index, 1.0)
        weight_dtype = whisper.conv1.weight.dtype
        hidden = gelu(whisper.conv1(spread.T[None].to(weight_dtype)))
        hidden = gelu(whisper.conv2(hidden * inside.to(hidden.dtype)))[0].T
        hidden = hidden.index_select(0, frame_index) + whisper.embed_positions(positions)
        return dropout(hidden, p=whisper.dropout, training=self.training)

    def _embed_equal(self, mel: Tensor, clips: int, frames: int) -> Tensor:
        """The same where all clips are equally long: a plain batch, whose convolutions pad each clip by themselves."""
        whisper = self.whisper
        batch = mel.unflatten(0, (clips, -1)).transpose(1, 2).to(whisper.conv1.weight.dtype)
        hidden = gelu(whisper.conv2(gelu(whisper.conv1(batch)))).transpose(1, 2)[:, :frames]
        # The modules of the other way, called in its order: under ZeRO-3 each call gathers weights, on all ranks together.
        positions = whisper.embed_positions(torch.arange(frames, device=mel.device))
        hidden = (hidden + positions).contiguous()  # once, not in every layer
        return dropout(hidden.flatten(0, 1), p=whisper.dropout, training=self.training)


@dataclass(frozen=True)
class _Spread:
    """Where clips lie when they are spread out for the convolutions."""

    starts: tuple[int, ...]
    mel_lengths: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, mel_lengths: Sequence[int]) -> "_Spread":
        starts, position = [], CONV_STRIDE
        for length in mel_lengths:
            starts.append(position)
            after = (
                position + frames_with_context(length) + 1
            )  # at least one zero frame, then the next even place
            position = after + after % CONV_STRIDE
        return cls(tuple(starts), tuple(mel_lengths), position)

    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return where mel frames go `[ΣF']`, where encoder frames are found `[ΣT]`, and their positions `[ΣT]`."""
        clips = list(zip(self.starts, self.mel_lengths, strict=True))
        mel = [torch.arange(start, start + frames_with_context(length)) for start, length in clips]
        positions = [torch.arange(encoder_frames(length)) for _, length in clips]
        frames = [
            start // CONV_STRIDE + place for (start, _), place in zip(clips, positions, strict=True)
        ]
        return torch.cat(mel), torch.cat(frames), torch.cat(positions)


def _pad_with_silence(mel: Tensor, mel_lengths: Sequence[int]) -> Tensor:
    """Extend every clip to Whisper's 3,000 mel frames: `[ΣF', M]` → `[B · 3000, M]`."""
    clips = mel.split([frames_with_context(length) for length in mel_lengths])
    padded = []
    for clip in clips:
        level = silence_level(clip).to(clip.dtype)
        missing = MAX_MEL_FRAMES - len(clip)
        padded.append(torch.cat([clip, level.expand(missing, clip.shape[1])]) if missing else clip)
    return torch.cat(padded)


def _before_attention(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, `[ΣT, H, d]`."""
    normed = layer.self_attn_layer_norm(hidden)
    return _projected(layer.self_attn, normed, normed)


def _after_attention(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """Finish a layer: `[ΣT, D]` and the attended values `[ΣT, H, d]` → `[ΣT, D]`."""
    attended = layer.self_attn.out_proj(attended.flatten(-2))
    hidden = hidden + dropout(attended, p=layer.dropout, training=layer.training)
    hidden = hidden + packed_feed_forward(layer, layer.final_layer_norm(hidden))
    if hidden.dtype == torch.float16:
        bound = torch.finfo(torch.float16).max - FLOAT16_MARGIN
        hidden = hidden.clamp(-bound, bound)
    return hidden


_HALVES: tuple[Callable[..., Any], Callable[..., Any]] = (_before_attention, _after_attention)


def packed_attention(
    attention: Any, queries: Tensor, keys: Tensor, segments: Segments, *, causal: bool = False
) -> Tensor:
    """A Hugging Face `WhisperAttention` on packed clips: `[ΣLq, D]` and `[ΣLk, D]` → `[ΣLq, D]`."""
    p = attention.dropout if attention.training else 0.0
    attended = clip_attention(
        *_projected(attention, queries, keys), segments, causal=causal, dropout=p
    )
    return attention.out_proj(attended.flatten(-2))


def _projected(attention: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of a `WhisperAttention`, `[ΣL, H, d]` each."""
    heads = (attention.num_heads, attention.head_dim)
    q, k, v = attention.q_proj(queries), attention.k_proj(keys), attention.v_proj(keys)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


def packed_feed_forward(layer: Any, normed: Tensor) -> Tensor:
    """The feed-forward half of a Whisper layer, dropouts included: `[N, D]` → `[N, D]`."""
    hidden = layer.activation_fn(layer.fc1(normed))
    hidden = dropout(hidden, p=layer.activation_dropout, training=layer.training)
    return dropout(layer.fc2(hidden), p=layer.dropout, training=layer.training)
