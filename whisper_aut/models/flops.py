"""The arithmetic of a step from its lengths alone: what packed clips cost, not what padding would.

In: a model's sizes and the lengths of a batch. Out: floating-point operations of forward and backward. Next: the meters of
`training.throughput`. Counted are matrix products, convolutions and attention, two operations a multiply-add, as
`torch.utils.flop_counter` does; what gradient checkpointing or flash attention compute again is not, so that a utilisation is of
useful work (the convention of PaLM, Chowdhery et al. 2022, appendix B).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

PRODUCT = 3  # forward, and in the backward pass the gradients of both factors
FIRST_PRODUCT = 2  # the input is data and needs no gradient
FROZEN_PRODUCT = 2  # the weights need none
KERNEL = 3  # of both convolutions


def encoder_flops(
    config: Any, mel_lengths: Sequence[int], lengths: Sequence[int], *, trained: bool = True
) -> float:
    """Return the FLOPs of a training step of the encoder.

    Args:
        config: a `WhisperConfig`.
        mel_lengths: F per clip, as convolved.
        lengths: T per clip.
        trained: whether it is; no gradient passes through one that is not.
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
        supervised: tokens with logits.
        through_frames: whether the encoder gets gradients.
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
        model: of `transformers`; its linear layers are counted, all of them run on every position but the last. The weights that
            are trained get gradients, among them LoRA's; inputs always do.
        lengths: positions per chat, audio included.
        supervised: positions with logits.
    """
    config, head = model.config, model.get_output_embeddings()
    linear = sum(
        _products(m) for m in model.base_model.modules() if isinstance(m, (nn.Linear, Conv1D))
    )
    heads = getattr(config, "num_attention_heads", 0)  # none in Mamba
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = (
        PRODUCT * 4 * width * config.num_hidden_layers * sum(length**2 for length in lengths)
    )
    return 2 * (linear * sum(lengths) + _products(head) * supervised) + attention


def _products(layer: nn.Linear | Conv1D) -> int:
    """Multiply-adds per position in forward and backward, where the input needs a gradient."""
    return (PRODUCT if layer.weight.requires_grad else FROZEN_PRODUCT) * layer.weight.numel()
