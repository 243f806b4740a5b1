"""Attention that stays inside each clip of a packed batch.

In: queries `[ΣLq, H, d]` and keys, values `[ΣLk, H, d]` of clips laid end to end, with their lengths. Out: `[ΣLq, H, d]`. Used by
`model.encoder` and the packed Whisper decoder. On CUDA in half precision one variable-length flash-attention kernel takes the
whole batch; elsewhere runs of clips with equal lengths share one call of PyTorch's SDPA.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention


def clip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from each clip's queries to the same clip's keys only.

    Args:
        query: `[ΣLq, H, d]`, not yet scaled.
        key, value: `[ΣLk, H, d]`.
        causal: a query sees the keys up to its own position; needs equal query and key lengths.
        dropout: probability with which attention weights are dropped.

    Returns:
        `[ΣLq, H, d]`.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _varlen_attention(query, key, value, query_lengths, key_lengths, causal)
    return _sdpa_by_length(query, key, value, query_lengths, key_lengths, causal, dropout)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int], causal: bool
) -> Tensor:
    return varlen_attn(
        query,
        key,
        value,
        _boundaries(query_lengths, query.device),
        _boundaries(key_lengths, query.device),
        max(query_lengths),
        max(key_lengths),
        window_size=(-1, 0) if causal else (-1, -1),
    )  # pyright: ignore[reportReturnType]


def _boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    sums = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=sums[1:])
    return sums.pin_memory().to(device, non_blocking=True)


def _sdpa_by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    causal: bool,
    dropout: float,
) -> Tensor:
    runs = [(lengths, len(list(run))) for lengths, run in groupby(zip(query_lengths, key_lengths, strict=True))]
    query_runs = query.split([lengths[0] * clips for lengths, clips in runs])
    key_runs = key.split([lengths[1] * clips for lengths, clips in runs])
    value_runs = value.split([lengths[1] * clips for lengths, clips in runs])
    attended = []
    for q, k, v, (_, clips) in zip(query_runs, key_runs, value_runs, runs, strict=True):
        q, k, v = (x.unflatten(0, (clips, -1)).transpose(1, 2) for x in (q, k, v))  # [clips, H, L, d]
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        attended.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)
