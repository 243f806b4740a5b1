"""FLOPs of a training step, computed from model sizes and the lengths of the packed clips.

Matrix products, convolutions and attention count, at two operations per multiply-add as in
`torch.utils.flop_counter`. Recomputation by flash attention never does, and that of layers by
gradient checkpointing only on request: model FLOPs utilisation (MFU) measures useful work, hardware
FLOPs utilisation (HFU) what the device computes (PaLM, Chowdhery et al. 2022, appendix B).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

# Matrix products per training step, relative to the forward pass: the gradient of the input and
# that of the weights each cost one more.
TRAINED_PRODUCTS, FROZEN_PRODUCTS = 3, 2
FIRST_PRODUCTS = 2  # the input is data and gets no gradient
KERNEL = 3  # kernel size of both encoder convolutions


def encoder_flops(
    config: Any,
    mel_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    trained: bool = True,
    recomputed: bool = False,
    frozen_weights: bool = False,
) -> float:
    """Return the FLOPs of a training step of the encoder.

    Args:
        config: a `WhisperConfig`.
        mel_lengths: F per clip, as the convolutions see it.
        lengths: T per clip.
        trained: whether the encoder is trained. If not, only its forward pass is counted.
        recomputed: count the forward pass of the layers of a trained encoder twice, up to their
            last product, where PyTorch's recomputation stops.
        frozen_weights: only low-rank updates are trained. Their own products do not count.
    """
    width, frames = config.d_model, sum(lengths)
    first, products = (FIRST_PRODUCTS, TRAINED_PRODUCTS) if trained else (1, 1)
    again = recomputed and trained
    frozen = frozen_weights and trained
    layer, last = (
        8 * width**2 + 4 * width * config.encoder_ffn_dim,
        2 * width * config.encoder_ffn_dim,
    )
    linear = frames * ((products - frozen) * layer + again * (layer - last))
    first, others = (1, 1) if frozen else (first, products)
    convolutions = (
        first * 2 * KERNEL * config.num_mel_bins * width * sum(mel_lengths)
        + others * 2 * KERNEL * width**2 * frames
    )
    attention = (products + again) * 4 * width * sum(length**2 for length in lengths)
    return convolutions + config.encoder_layers * (linear + attention)


def whisper_decoder_flops(
    config: Any,
    lengths: Sequence[int],
    text_lengths: Sequence[int],
    supervised: int,
    *,
    through_frames: bool = True,
    recomputed: bool = False,
) -> float:
    """Return the FLOPs of a training step of Whisper's decoder.

    Args:
        config: a `WhisperConfig`.
        lengths: T per clip.
        text_lengths: L per clip.
        supervised: number of tokens with logits.
        through_frames: whether gradients flow back to the encoder.
        recomputed: count the forward pass of the layers twice, as in `encoder_flops`.
    """
    width, tokens, frames = config.d_model, sum(text_lengths), sum(lengths)
    products = TRAINED_PRODUCTS + recomputed
    last = 2 * width * config.decoder_ffn_dim
    linear = tokens * (products * (12 * width**2 + 2 * last) - recomputed * last)
    keys = (products if through_frames else products - 1) * frames * 4 * width**2
    pairs = sum(text**2 + text * clip for text, clip in zip(text_lengths, lengths, strict=True))
    attention = products * 4 * width * pairs
    logits = TRAINED_PRODUCTS * 2 * width * config.vocab_size * supervised
    return config.decoder_layers * (linear + keys + attention) + logits


def language_model_flops(
    model: Any, lengths: Sequence[int], supervised: int, *, recomputed: bool = False
) -> float:
    """Return the FLOPs of a training step through a causal language model.

    Args:
        model: a model of `transformers`. All its linear layers count at every position, except the
            output layer, which counts at supervised positions only. Inputs always get gradients;
            weights only if they are trained, LoRA's included.
        lengths: positions per chat, audio included.
        supervised: number of positions with logits.
        recomputed: count the forward pass of the layers twice, as in `encoder_flops`.
    """
    config = model.config
    linear = sum(map(_products, _linear_layers(model.base_model)))
    for layer in model.base_model.modules():
        if recomputed and isinstance(layer, GradientCheckpointingLayer):
            linear += sum(part.weight.numel() for part in _linear_layers(layer)[:-1])
    heads = getattr(config, "num_attention_heads", 0)  # Mamba has none
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    pairs = sum(length**2 for length in lengths)
    products = TRAINED_PRODUCTS + recomputed
    attention = products * 4 * width * config.num_hidden_layers * pairs
    logits = 2 * _products(model.get_output_embeddings()) * supervised
    return 2 * linear * sum(lengths) + logits + attention


def _products(layer: nn.Linear | Conv1D) -> int:
    """Return multiply-adds per position, forward and backward, for inputs that need a gradient."""
    products = TRAINED_PRODUCTS if layer.weight.requires_grad else FROZEN_PRODUCTS
    return products * layer.weight.numel()


def _linear_layers(model: nn.Module) -> list[nn.Linear | Conv1D]:
    return [layer for layer in model.modules() if isinstance(layer, (nn.Linear, Conv1D))]
