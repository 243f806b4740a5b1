"""FLOPs of a training step, computed from model sizes and the lengths of the packed clips.

Matrix products, convolutions and attention count, at two operations per multiply-add as in
`torch.utils.flop_counter`. Recomputation by gradient checkpointing or flash attention does not, so
that utilisation measures useful work (PaLM, Chowdhery et al. 2022, appendix B).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

# Matrix products per training step, relative to the forward pass.
PRODUCT = 3  # forward pass, gradient of the input, gradient of the weights
FIRST_PRODUCT = 2  # the input is data and gets no gradient
FROZEN_PRODUCT = 2  # the weights get no gradient
KERNEL = 3  # kernel size of both encoder convolutions


def encoder_flops(
    config: Any, mel_lengths: Sequence[int], lengths: Sequence[int], *, trained: bool = True
) -> float:
    """Return the FLOPs of a training step of the encoder.

    Args:
        config: a `WhisperConfig`.
        mel_lengths: F per clip, as the convolutions see it.
        lengths: T per clip.
        trained: whether the encoder is trained. If not, only its forward pass is counted.
    """
    width, frames = config.d_model, sum(lengths)
    first, product = (FIRST_PRODUCT, PRODUCT) if trained else (1, 1)
    stem = (
        first * 2 * KERNEL * config.num_mel_bins * width * sum(mel_lengths)
        + product * 2 * KERNEL * width**2 * frames
    )
    products = product * frames * (8 * width**2 + 4 * width * config.encoder_ffn_dim)
    attention = product * 4 * width * sum(length**2 for length in lengths)
    return stem + config.encoder_layers * (products + attention)


def whisper_decoder_flops(
    config: Any,
    lengths: Sequence[int],
    text_lengths: Sequence[int],
    supervised: int,
    *,
    through_frames: bool = True,
) -> float:
    """Return the FLOPs of a training step of Whisper's decoder.

    Args:
        config: a `WhisperConfig`.
        lengths: T per clip.
        text_lengths: L per clip.
        supervised: number of tokens with logits.
        through_frames: whether gradients flow back to the encoder.
    """
    width, tokens, frames = config.d_model, sum(text_lengths), sum(lengths)
    per_token = PRODUCT * tokens * (12 * width**2 + 4 * width * config.decoder_ffn_dim)
    keys = (PRODUCT if through_frames else FIRST_PRODUCT) * frames * 4 * width**2
    pairs = sum(own**2 + own * across for own, across in zip(text_lengths, lengths, strict=True))
    layer = per_token + keys + PRODUCT * 4 * width * pairs
    return config.decoder_layers * layer + PRODUCT * 2 * width * config.vocab_size * supervised


def language_model_flops(model: Any, lengths: Sequence[int], supervised: int) -> float:
    """Return the FLOPs of a training step through a causal language model.

    Args:
        model: a model of `transformers`. All its linear layers count at every position, except the
            output layer, which counts at supervised positions only. Inputs always get gradients;
            weights only if they are trained, LoRA's included.
        lengths: positions per chat, audio included.
        supervised: number of positions with logits.
    """
    config, head = model.config, model.get_output_embeddings()
    linear = sum(
        _products(m) for m in model.base_model.modules() if isinstance(m, (nn.Linear, Conv1D))
    )
    heads = getattr(config, "num_attention_heads", 0)  # Mamba has none
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = (
        PRODUCT * 4 * width * config.num_hidden_layers * sum(length**2 for length in lengths)
    )
    return 2 * (linear * sum(lengths) + _products(head) * supervised) + attention


def _products(layer: nn.Linear | Conv1D) -> int:
    """Return multiply-adds per position, forward and backward, for inputs that need a gradient."""
    return (PRODUCT if layer.weight.requires_grad else FROZEN_PRODUCT) * layer.weight.numel()
