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

from whisper_aut.models.dense import add_product, product

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
    if torch.is_autocast_enabled(
        hidden.device.type
    ):  # custom functions run outside autocast: take its dtype explicitly
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if (
        not torch.is_grad_enabled()
    ):  # which the function below is not told: it would compute gradients for nobody
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)  # pyright: ignore[reportReturnType]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        buffer = hidden.new_empty(
            min(chunk, len(hidden)), len(weight)
        )  # one for all chunks: fresh memory is slow memory
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = product(hidden[part], weight, out=buffer[: len(hidden[part])]).float()
            nll[part], correct[part], grad_logits = _softmax_gradient(logits, labels[part])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad_logits, weight.T)
            if wants_weight:
                grad_weight = _accumulated(grad_weight, grad_logits, hidden[part])
            del logits, grad_logits  # before the next chunk's are made
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # Not saved as tensors of the graph: they are handed over once, without the copy that would protect them.
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        ctx.mark_non_differentiable(nll, correct)
        return nll.sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were taken already; compute it again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _softmax_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits `[N, V]` in place into their gradient; return the loss `[N]`, whether the best token is right, the gradient.

    Written out, as `max` serves the prediction and the stability of the sum at once, and nothing of size `[N, V]` is made anew.
    """
    best, guess = logits.max(-1, keepdim=True)
    wanted = logits.gather(-1, labels[:, None])
    probabilities = logits.sub_(best).exp_()
    total = probabilities.sum(-1, keepdim=True)
    nll = total.log() + best - wanted
    gradient = probabilities.div_(total)
    gradient.scatter_add_(-1, labels[:, None], torch.full_like(wanted, -1.0))
    return nll[:, 0], guess[:, 0] == labels, gradient


def _accumulated(total: Tensor | None, grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """Add a chunk's gradient of the output embedding; in float32, as a bfloat16 sum over many chunks would lose the small ones."""
    if total is None:
        return product(grad_logits.T, hidden.T).float()
    if hidden.dtype == torch.float32:
        return add_product(total, grad_logits.T, hidden.T)
    return total.add_(grad_logits.T @ hidden)
