"""Whisper's encoder on packed clips of any length up to 30 s.

Weights, their names and the arithmetic are those of Hugging Face's `WhisperEncoder`. Clips are
packed end to end: projections and feed-forward layers run over all frames at once, attention stays
within each clip, and positions restart at each clip.

There are two padding modes for the same weights. With `none`, each clip runs at its own length, and
its frames do not depend on the rest of the batch. With `30s`, each clip is extended with silence to
Whisper's window; the result equals Hugging Face's to a relative error of 1e-5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import WhisperConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.audio.logmel import MAX_MEL_FRAMES, frames_with_context, silence_level
from whisper_aut.errors import UserError, require
from whisper_aut.models.attention import (
    Segments,
    cast_for_products,
    clip_attention,
    compile_layer,
    draws_random_numbers,
    upload,
)

Padding = Literal["none", "30s"]
PADDINGS = ("none", "30s")
# Keys in an exported config.json: the padding mode of the training, and the fraction of clips that
# were padded to 30 s all the same.
TRAINED_PADDING, TRAINED_PAD_TO_30S = "trained_padding", "trained_pad_to_30s"
# Padding mode of checkpoints without that key, such as all of OpenAI's.
RELEASED_PADDING: Padding = "30s"
CONV_STRIDE = 2
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FRAME_SECONDS = 0.02


@dataclass(frozen=True)
class Frames:
    """Encoder frames of a batch.

    Attributes:
        values: `[ΣT, D]`.
        lengths: T per clip that a decoder attends to: the clip's own frames, or 1,500 with `30s`.
        valid_lengths: T per clip without padding. Pooling averages only these frames.
        states: on request, the input of each layer `[ΣT, D]`, and the output.
    """

    values: Tensor
    lengths: tuple[int, ...]
    valid_lengths: tuple[int, ...]
    states: tuple[Tensor, ...] = ()

    def of_layers(self, layers: Sequence[int]) -> "Frames":
        """Return the same frames with the states of n layers as values, `[ΣT, n, D]`, if any."""
        chosen = [self.states[layer] for layer in layers]
        return replace(self, values=torch.stack(chosen, dim=1)) if chosen else self

    def valid(self) -> list[Tensor]:
        """Return the frames of each clip without padding, `[T, D]`."""
        clips = self.values.split(self.lengths)
        return [clip[:length] for clip, length in zip(clips, self.valid_lengths, strict=True)]


def max_clip_seconds(config: WhisperConfig) -> float:
    """Return the longest clip that fits an encoder's positions: 30 s for Whisper's usual 1,500."""
    return config.max_source_positions * FRAME_SECONDS


def clip_too_long_message(config: WhisperConfig, padding: Padding, clip_seconds: float) -> str:
    """Return an error message for clips, padding included, that exceed an encoder's positions."""
    longest = max_clip_seconds(config)
    advice = (
        "Use padding none (in training, without model.pad_to_30s), which runs clips at their own "
        "length."
        if padding == "30s"
        else f"For training, set data.max_seconds={longest:g} to skip longer clips."
    )
    return (
        f"Clips of {clip_seconds:g} s, padding included, do not fit this encoder: its "
        f"{config.max_source_positions} positions (max_source_positions in config.json) are "
        f"{longest:g} s. {advice}"
    )


def encoder_frames(mel_length: int) -> int:
    """Return T, the number of encoder frames (20 ms) of a clip with F valid mel frames."""
    return -(-mel_length // CONV_STRIDE)


class PackedEncoder(nn.Module):
    """Runs a Hugging Face `WhisperEncoder` on packed clips.

    Args:
        whisper: the encoder to run. Its modules and parameters are used directly, without a copy.
        padding: `none` or `30s`.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing its
            activations.
    """

    def __init__(
        self,
        whisper: WhisperEncoder,
        padding: Padding = "none",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.whisper = whisper
        self.padding: Padding = padding
        self.gradient_checkpointing = gradient_checkpointing
        self._has_dropout = draws_random_numbers(whisper)
        self._layer: Any = _encoder_layer
        # Whisper's positions are fixed sinusoids, but transformers leaves them trainable when it
        # loads a checkpoint.
        whisper.embed_positions.requires_grad_(False)

    def compile_layers(self) -> None:
        """Run layers through `torch.compile`; see `attention.compile_layer`."""
        if not self._has_dropout:
            self._layer = compile_layer(_encoder_layer)

    @property
    def width(self) -> int:
        return self.whisper.config.d_model

    @property
    def num_mel_bins(self) -> int:
        return self.whisper.config.num_mel_bins

    def forward(
        self,
        mel: Tensor,
        mel_lengths: Sequence[int],
        keep_states: bool = False,
        padded: Sequence[bool] = (),
    ) -> Frames:
        """Encode packed clips.

        Args:
            mel: `[ΣF', M]`, each clip followed by its silence context, as in `audio.logmel`.
            mel_lengths: valid frames F per clip.
            keep_states: return `Frames.states`.
            padded: for each clip, whether to pad it to 30 s even if `padding` is `none`. Empty: no.

        Returns:
            The frames of all clips, packed `[ΣT, D]`.

        Raises:
            UserError: a clip, padding included, is too long for the encoder's positions.
        """
        valid = tuple(encoder_frames(length) for length in mel_lengths)
        if self.padding == "30s" or any(padded):
            mel, mel_lengths = _pad_with_silence(mel, mel_lengths, self.padded_clips(valid, padded))
        lengths = tuple(encoder_frames(length) for length in mel_lengths)
        if max(lengths) > self.whisper.config.max_source_positions:
            raise UserError(
                clip_too_long_message(self.whisper.config, self.padding, max(mel_lengths) / 100)
            )
        hidden = self._embed(mel, mel_lengths)
        segments = Segments.of(lengths, lengths, hidden.device)
        states: list[Any] = []
        for layer in self.whisper.layers:
            states += [hidden] if keep_states else []
            run: Any = getattr(layer, "packed", None) or partial(self.run_layer, layer)
            hidden = run(hidden, segments)
        output = self.whisper.layer_norm(hidden)
        states += [output] if keep_states else []
        return Frames(output, lengths, valid, tuple(states))

    def padded_clips(self, clips: Sequence[Any], padded: Sequence[bool]) -> Sequence[bool]:
        """Return whether each clip is padded to 30 s; `padded` is that of `forward`."""
        return [True] * len(clips) if self.padding == "30s" else padded or [False] * len(clips)

    def run_layer(self, layer: Any, hidden: Tensor, segments: Segments) -> Tensor:
        """Run one layer on packed clips, `[ΣT, D]`. FSDP wraps this as the layer's `packed`."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(  # pyright: ignore[reportReturnType]
                *(self._layer, layer, hidden, segments),
                use_reentrant=False,
                preserve_rng_state=self._has_dropout,
            )
        return self._layer(layer, hidden, segments)

    def _embed(self, mel: Tensor, mel_lengths: Sequence[int]) -> Tensor:
        """Apply the convolutions and add positions: `[ΣF', M]` → `[ΣT, D]`.

        Clips are spaced out with zeros between them, each starting at an even frame. One
        convolution over the whole batch then gives each clip the same result as if it were alone.
        """
        whisper = self.whisper
        if len(set(mel_lengths)) == 1:
            return self._embed_equal(mel, len(mel_lengths), encoder_frames(mel_lengths[0]))
        width, *indices = _spaced_layout(mel_lengths)
        mel_index, frame_index, positions = (upload(index, mel.device) for index in indices)
        spaced = mel.new_zeros(width, mel.shape[1]).index_copy(0, mel_index, mel)
        inside = mel.new_zeros(width).index_fill(0, mel_index, 1.0)
        hidden = gelu(whisper.conv1(spaced.T[None].to(whisper.conv1.weight.dtype)))
        hidden = gelu(whisper.conv2(hidden * inside.to(hidden.dtype)))[0].T
        hidden = hidden.index_select(0, frame_index) + whisper.embed_positions(positions)
        return dropout(hidden, p=whisper.dropout, training=self.training)

    def _embed_equal(self, mel: Tensor, clips: int, frames: int) -> Tensor:
        """Do the same as `_embed` for clips of equal length, as a plain batch `[B, M, F']`."""
        whisper = self.whisper
        batch = mel.unflatten(0, (clips, -1)).transpose(1, 2).to(whisper.conv1.weight.dtype)
        hidden = gelu(whisper.conv2(gelu(whisper.conv1(batch)))).transpose(1, 2)[:, :frames]
        # Call the same modules in the same order as `_embed`: under ZeRO-3 each call gathers
        # weights, and all ranks must take part.
        positions = whisper.embed_positions(torch.arange(frames, device=mel.device))
        hidden = (hidden + positions).contiguous()  # once here instead of in every layer
        return dropout(hidden.flatten(0, 1), p=whisper.dropout, training=self.training)


class OwnLengthEncoder(WhisperEncoder):
    """A `WhisperEncoder` for models of transformers that runs clips at their own length.

    Assign it to the model's `encoder`. It takes what `WhisperFeatureExtractor` returns with
    `return_attention_mask=True`. Frames after a shorter clip of a batch are zeros. Whisper's
    decoder and classification head do not mask them: give these models one clip at a time.

    Args:
        whisper: the encoder to replace. The weights are shared.

    Examples:
        >>> from transformers import AutoModel
        >>> folder = "runs/aut_tiny/latest/export/encoder"
        >>> encoder = OwnLengthEncoder(AutoModel.from_pretrained(folder).encoder)
    """

    def __init__(self, whisper: WhisperEncoder):
        super().__init__(whisper.config)
        self.load_state_dict(whisper.state_dict(), assign=True)
        self.train(whisper.training)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_features: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Encode features `[B, M, F]` with the mask `[B, F]` of valid mel frames, or of samples.

        Returns:
            `last_hidden_state`, `[B, T, D]`, with T of the longest clip.

        Raises:
            ValueError: the mask is missing, or the features have no silence after a clip.
        """
        if attention_mask is None:
            raise ValueError(
                "OwnLengthEncoder needs the attention_mask of the clips. Call the feature "
                "extractor with return_attention_mask=True."
            )
        # The feature extractor counts samples instead of frames if only its config asks for masks.
        stride = attention_mask.shape[1] // input_features.shape[2]
        lengths = attention_mask[:, ::stride].sum(1).tolist()
        clips = [
            features[:, : frames_with_context(length)].T
            for features, length in zip(input_features, lengths, strict=True)
        ]
        if sum(map(len, clips)) < sum(map(frames_with_context, lengths)):
            raise ValueError(
                "OwnLengthEncoder needs the silence after each clip. Call the feature extractor "
                "with its default padding, to 30 s."
            )
        frames = PackedEncoder(self)(torch.cat(clips), lengths).valid()
        padded: Any = pad_sequence(frames, batch_first=True)
        return BaseModelOutput(last_hidden_state=padded)


def add_lora(encoder: PackedEncoder, rank: int, alpha: int) -> None:
    """Freeze an encoder and add trainable low-rank updates to the linear layers of its blocks.

    A layer then computes W x + alpha / rank · B A x (Hu et al. 2021, arXiv 2106.09685).
    """
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model

    encoder.requires_grad_(False)
    options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_LAYERS)
    inject_adapter_in_model(options, encoder.whisper)
    encoder.register_buffer("lora_scale", torch.tensor(alpha / rank))  # for `merge_lora`


def merge_lora(weights: dict[str, Any], prefix: str = "encoder.") -> dict[str, Any]:
    """Return the state dict of a module with the updates of `add_lora`, if any, in the weights.

    The names of the encoder's weights begin with `prefix`.
    """
    scale = weights.get(f"{prefix}lora_scale")
    if scale is None:
        return weights
    merged = {}
    for name, value in weights.items():
        layer = name.removesuffix("base_layer.weight")
        if layer != name:
            low, high = (weights[f"{layer}lora_{part}.default.weight"] for part in "AB")
            value = value + scale * high @ low
        if not name.startswith(prefix) or not (".lora_" in name or name.endswith("lora_scale")):
            merged[name.replace(".base_layer.", ".")] = value
    return merged


def _spaced_layout(mel_lengths: Sequence[int]) -> tuple[int, Tensor, Tensor, Tensor]:
    """Space clips out for the convolutions, each starting at an even frame after a zero frame.

    Returns:
        The total number of mel frames, the index of each mel frame `[ΣF']`, the index of each
        encoder frame `[ΣT]` after the convolutions, and its position in the clip `[ΣT]`.
    """
    start, mel_index, frame_index, positions = CONV_STRIDE, [], [], []
    for length in mel_lengths:
        end = start + frames_with_context(length)
        mel_index.append(torch.arange(start, end))
        positions.append(torch.arange(encoder_frames(length)))
        frame_index.append(start // CONV_STRIDE + positions[-1])
        start = end + 1 + (end + 1) % CONV_STRIDE
    return start, torch.cat(mel_index), torch.cat(frame_index), torch.cat(positions)


def _pad_with_silence(
    mel: Tensor, mel_lengths: Sequence[int], padded: Sequence[bool]
) -> tuple[Tensor, tuple[int, ...]]:
    """Pad chosen clips with silence to Whisper's 3,000 mel frames; return `[ΣF', M]` and each F."""
    clips = list(mel.split([frames_with_context(length) for length in mel_lengths]))
    lengths = list(mel_lengths)
    for index, clip in enumerate(clips):
        missing = MAX_MEL_FRAMES - len(clip)
        if padded[index] and missing:
            level = silence_level(clip).to(clip.dtype)
            clips[index] = torch.cat([clip, level.expand(missing, clip.shape[1])])
        lengths[index] = MAX_MEL_FRAMES if padded[index] else lengths[index]
    return torch.cat(clips), tuple(lengths)


def _encoder_layer(layer: Any, hidden: Tensor, segments: Segments) -> Tensor:
    """Run one layer on packed clips `[ΣT, D]`, in the order of `WhisperEncoderLayer.forward`."""
    normed = layer.self_attn_layer_norm(hidden)
    attended = packed_attention(layer.self_attn, normed, normed, segments)
    hidden = hidden + dropout(attended, p=layer.dropout, training=layer.training)
    hidden = hidden + packed_feed_forward(layer, layer.final_layer_norm(hidden))
    if hidden.dtype == torch.float16:  # as in Hugging Face's Whisper
        bound = torch.finfo(torch.float16).max - 1_000
        hidden = hidden.clamp(-bound, bound)
    return hidden


def packed_attention(
    attention: Any, queries: Tensor, keys: Tensor, segments: Segments, *, causal: bool = False
) -> Tensor:
    """Run a Hugging Face `WhisperAttention` on packed clips: `[ΣLq, D]` and `[ΣLk, D]`."""
    own = queries is keys
    queries = cast_for_products(queries)
    keys = queries if own else cast_for_products(keys)
    heads = (attention.num_heads, attention.head_dim)
    q, k, v = (
        layer(hidden).unflatten(-1, heads)
        for layer, hidden in (
            (attention.q_proj, queries),
            (attention.k_proj, keys),
            (attention.v_proj, keys),
        )
    )
    p = attention.dropout if attention.training else 0.0
    attended = clip_attention(q, k, v, segments, causal=causal, dropout=p)
    return attention.out_proj(attended.flatten(-2))


def packed_feed_forward(layer: Any, normed: Tensor) -> Tensor:
    """Run the feed-forward part of a Whisper layer, with its dropouts: `[N, D]` → `[N, D]`."""
    hidden = layer.activation_fn(layer.fc1(normed))
    hidden = dropout(hidden, p=layer.activation_dropout, training=layer.training)
    return dropout(layer.fc2(hidden), p=layer.dropout, training=layer.training)
