"""Cross-entropy over a large vocabulary without the matrix of all logits.

In: hidden states of the supervised positions `[N, D]`, the output embedding `[V, D]`, labels `[N]`. Out: the summed loss with its
gradients, and per position the negative log-likelihood and whether the best token was the right one. Next: a decoder returns
it as `DecoderLoss`, `model.module` normalises it. Logits exist for `chunk` positions at a time; gradients are taken in the same
pass (the idea of Liger's fused loss, Hsu et al. 2024, arXiv 2410.10989), so nothing of size `[N, V]` is ever kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_POSITIONS = 512


@dataclass(frozen=True)
class DecoderLoss:
    """What a decoder says of a batch.

    Attributes:
        total: sum of the negative log-likelihoods in nats, differentiable.
        token_nll: `[N]` per supervised token, detached, in the order of the packed targets.
        correct: `[N]` bool, the likeliest token was the target.
        counts: supervised tokens per clip.
    """

    total: Tensor
    token_nll: Tensor
    correct: Tensor
    counts: tuple[int, ...]


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK_POSITIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy of `hidden @ weight.T` against `labels`, in chunks.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`.
        labels: `[N]`.
        chunk: positions whose logits exist at one time.

    Returns:
        The differentiable sum (float32), the detached loss per position `[N]`, and whether each prediction is right `[N]`.
    """
    if torch.is_autocast_enabled(hidden.device.type):  # custom functions run outside autocast: take its dtype explicitly
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)  # pyright: ignore[reportReturnType]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks add up in float32: a bfloat16 sum over many chunks would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.T).float()
            correct[part] = logits.argmax(-1) == labels[part]
            log_probs = logits.sub_(logits.logsumexp(-1, keepdim=True))
            nll[part] = -log_probs.gather(-1, labels[part, None])[:, 0]
            if wants_hidden or wants_weight:
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(-1, labels[part, None], torch.full_like(labels[part, None], -1, dtype=torch.float32))
                grad_logits = grad_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll, correct)
        return nll.sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
