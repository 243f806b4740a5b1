"""Comparisons of encoder frames at the value range of released models."""

from typing import Any

import numpy as np
import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder


@torch.no_grad()
def enlarge(encoder: WhisperEncoder) -> None:
    """Give a random encoder values of whisper-base's size: hundreds within, about 24 in its frames.

    Random weights keep values near 1, where rounding hides: absolute tolerances that hold on them
    fail on released ones.
    """
    for layer in encoder.layers:
        attention: Any = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        for linear in (*projections, layer.fc1, layer.fc2):
            linear.weight *= (
                50 / linear.in_features**0.5
            )  # a deviation of 0.02 → one that keeps size
    first: Any = encoder.layers[0]
    first.fc2.weight[0] *= 200  # one channel carries most of the power, as in released encoders
    encoder.layer_norm.weight *= 10
    encoder.layer_norm.weight[0] = 24 / encoder.config.d_model**0.5


def assert_frames_close(
    actual: torch.Tensor | np.ndarray, expected: torch.Tensor, relative: float = 1e-5
) -> None:
    """Compare frames `[…, D]` by what the docs claim: the norm of the difference over their norm.

    A single value may be off by ten times that fraction of the largest.
    """
    difference = torch.as_tensor(actual) - expected
    assert difference.norm() <= relative * expected.norm()
    assert difference.abs().max() <= 10 * relative * expected.abs().max()
