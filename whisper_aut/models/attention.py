"""Attention within each clip of a packed batch.

On CUDA GPUs from Ampere on, in half precision, one variable-length flash-attention kernel handles
the whole batch. Elsewhere, and before PyTorch 2.11, consecutive clips of equal length share one
call of PyTorch's SDPA.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Segments:
    """Clip boundaries in a packed batch, computed once and used by all layers.

    Attributes:
        runs: consecutive clips of equal lengths, as (Lq, Lk, number of clips).
        cu_seqlens_q, cu_seqlens_k: `[B + 1]` int32 cumulative lengths on the GPU. None on devices
            without flash attention.
        max_seqlen_q, max_seqlen_k: longest lengths in the batch.
    """

    runs: tuple[tuple[int, int, int], ...]
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(
        cls, query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device
    ) -> "Segments":
        pairs = list(zip(query_lengths, key_lengths, strict=True))
        runs = tuple((query, key, len(list(run))) for (query, key), run in groupby(pairs))
        cu_seqlens_q = cu_seqlens_k = None
        if _has_flash(device):
            cu_seqlens_q = _cumulative(query_lengths, device)
            cu_seqlens_k = (
                cu_seqlens_q if query_lengths is key_lengths else _cumulative(key_lengths, device)
            )
        return cls(runs, cu_seqlens_q, cu_seqlens_k, max(query_lengths), max(key_lengths))


def clip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend from each clip's queries to the same clip's keys only.

    Args:
        query: `[ΣLq, H, d]`, unscaled.
        key, value: `[ΣLk, H, d]`, or fewer heads, each for a group of consecutive query heads.
            Attention runs in the dtype of the values. Queries and keys are cast to it, because
            under autocast query and key norms may return float32.
        segments: the clip boundaries.
        causal: let a query see only keys up to its own position. Needs equal query and key lengths.
        dropout: dropout probability of the attention weights.
        scale: factor of the query-key products. None means d^-1/2.

    Returns:
        `[ΣLq, H, d]`.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.dtype in HALF and not dropout and segments.cu_seqlens_q is not None:
        attended: Any = varlen_attn(  # pyright: ignore[reportOptionalCall]
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_k,  # pyright: ignore[reportArgumentType]
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            window_size=(-1, 0) if causal else (-1, -1),
            scale=scale,
        )
        return attended
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return _sdpa_by_length(query, key, value, segments, causal, dropout, scale)


@cache
def _has_flash(device: torch.device) -> bool:
    if device.type != "cuda" or varlen_attn is None:
        return False
    has_windows = "window_size" in inspect.signature(varlen_attn).parameters  # from PyTorch 2.11 on
    return has_windows and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere


def use_flash_attention_3() -> bool:
    """Let PyTorch use the kernels of FlashAttention-3 (arXiv 2407.08608) in this process.

    They need a Hopper GPU and the package `flash_attn_3`, which is built from source. Without them,
    nothing changes. Returns whether they are used.
    """
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None or find_spec("flash_attn_interface") is None:
        return False
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        activate("FA3")
    except (ImportError, OSError, RuntimeError) as error:  # built for another PyTorch or CUDA
        log.warning("FlashAttention-3 cannot be used: %s", str(error).splitlines()[0])
        return False
    return True


def compile_layer(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile the function that runs one layer on packed clips, if it has no dropout.

    Sizes are symbolic and flash attention is one operator, so all layers and batches share one
    graph. Attention by SDPA would be compiled again for the lengths of every batch: without flash
    attention, the function runs as it is.

    Args:
        function: takes hidden states as its first tensor, and `Segments`.
    """
    compiled = torch.compile(function, dynamic=True)

    def run(*arguments: Any, **options: Any) -> Tensor:
        given = (*arguments, *options.values())
        hidden = next(value for value in given if isinstance(value, Tensor))
        segments = next((value for value in given if isinstance(value, Segments)), None)
        flash = segments is not None and segments.cu_seqlens_q is not None
        if flash and cast_for_products(hidden[:0]).dtype in HALF:
            return compiled(*arguments, **options)
        return function(*arguments, **options)

    return run


def cast_for_products(hidden: Tensor) -> Tensor:
    """Cast to the dtype of autocast, if it is on.

    Otherwise, each linear layer that reads a tensor would cast it again and keep its own copy.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def draws_random_numbers(model: Any) -> bool:
    """Return whether a model of transformers has dropout.

    If not, layers that are recomputed in the backward pass need no states of random generators,
    which the host would read from the GPU.
    """
    in_config = any("drop" in name and rate for name, rate in model.config.to_dict().items())
    return in_config or any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return upload(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to the device while the host goes on.

    A copy from memory that is not pinned may wait until the device has finished its queue.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _sdpa_by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    causal: bool,
    dropout: float,
    scale: float | None,
) -> Tensor:
    # Move heads to the front before splitting. A single clip then costs one SDPA call and nothing
    # else; in small models such overhead dominates.
    query_runs = _cut(query, [lq * clips for lq, _, clips in segments.runs])
    key_sizes = [lk * clips for _, lk, clips in segments.runs]
    key_runs, value_runs = _cut(key, key_sizes), _cut(value, key_sizes)
    attended = []
    for q, k, v, (_, _, clips) in zip(query_runs, key_runs, value_runs, segments.runs, strict=True):
        if clips > 1:
            q, k, v = (
                x.squeeze(0).unflatten(1, (clips, -1)).transpose(0, 1) for x in (q, k, v)
            )  # [clips, H, L, d]
        out = scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout, scale=scale
        ).transpose(1, 2)
        attended.append(out.squeeze(0) if clips == 1 else out.flatten(0, 1))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _cut(packed: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split `[ΣL, H, d]` into pieces `[1, H, L, d]`."""
    heads_first = packed.transpose(0, 1)[None]
    # A single piece is not split: the backward pass of a split makes a copy.
    return heads_first.split(list(sizes), dim=2) if len(sizes) > 1 else (heads_first,)
