"""Cross-entropy over a large vocabulary without storing the logits of all positions.

Logits exist for `chunk` positions at a time, and gradients are computed in the same pass, so no
tensor of size `[N, V]` is ever stored. The idea is from Liger's fused loss (Hsu et al. 2024, arXiv
2410.10989).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from whisper_aut.data.batch import Targets
from whisper_aut.models.attention import cast_for_products
from whisper_aut.onednn import product

CHUNK_POSITIONS = 512


@dataclass(frozen=True)
class DecoderLoss:
    """The loss of a decoder on a batch with N supervised tokens.

    Attributes:
        total: sum of the negative log-likelihoods in nats, each times the weight of its token
            (`Targets.label_weights`), differentiable.
        token_nll: `[N]` negative log-likelihood of each supervised token, detached, in the order
            of the packed targets.
        correct: `[N]` bool, whether the most likely token was the target.
        counts: number of supervised tokens per clip.
    """

    total: Tensor
    token_nll: Tensor
    correct: Tensor
    counts: tuple[int, ...]


def token_loss(states: Tensor, weight: Tensor, targets: Targets) -> DecoderLoss:
    """Return the loss of the supervised tokens, from the states `[N, D]` that predict them."""
    labels, weights = targets.tokens[targets.label_indices], targets.label_weights(states.device)
    total, nll, correct = chunked_cross_entropy(states, weight, labels, label_weights=weights)
    return DecoderLoss(total, nll, correct, targets.counts)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int = CHUNK_POSITIONS,
    label_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the cross-entropy of `hidden @ weight.T` with `labels`, in chunks.

    Gradients are computed in the forward pass, so `backward` can run only once.

    Args:
        hidden: hidden states of the supervised positions `[N, D]`.
        weight: output embedding `[V, D]`.
        labels: target tokens `[N]`.
        chunk: number of positions whose logits exist at the same time.
        label_weights: weight of each position in the sum `[N]`, float32. None for 1.

    Returns:
        The differentiable sum (float32), the detached unweighted loss per position `[N]`, and
        whether the most likely token is the target `[N]`.
    """
    # Custom functions run outside autocast, so cast to its dtype here.
    hidden, weight = cast_for_products(hidden), cast_for_products(weight)
    # The function below does not know whether gradients are enabled and would compute them anyway.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, label_weights)  # pyright: ignore[reportReturnType]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        label_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # The sum over chunks is float32: a bfloat16 sum would lose small gradients.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        # One buffer for all chunks, because allocating new memory for each is slow.
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = product(hidden[part], weight, out=buffer[: len(hidden[part])]).float()
            nll[part], correct[part], grad_logits = _softmax_gradient(logits, labels[part])
            if label_weights is not None:
                grad_logits.mul_(label_weights[part, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(grad_logits, weight.T)
            if grad_weight is not None and hidden.dtype == torch.float32:
                # Unlike `addmm_`, this is counted by `torch.utils.flop_counter`.
                torch.addmm(grad_weight, grad_logits.T, hidden[part], out=grad_weight)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
            del logits, grad_logits  # free them before the next chunk allocates its own
        # Not saved with `save_for_backward`: backward scales them in place and returns them once,
        # without a copy.
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        ctx.mark_non_differentiable(nll, correct)
        return (nll if label_weights is None else nll * label_weights).sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("The gradients of this loss have been used; compute it again.")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _softmax_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite logits `[N, V]` with their gradient.

    This is not `log_softmax`, so that one `max` gives the prediction as well as the stable sum, and
    no other tensor of size `[N, V]` is allocated.

    Returns:
        The loss `[N]`, whether the most likely token is the target `[N]`, and the gradient.
    """
    best, predicted = logits.max(-1, keepdim=True)
    target = logits.gather(-1, labels[:, None])
    probabilities = logits.sub_(best).exp_()
    total = probabilities.sum(-1, keepdim=True)
    nll = total.log() + best - target
    gradient = probabilities.div_(total)
    gradient.scatter_add_(-1, labels[:, None], torch.full_like(target, -1.0))
    return nll[:, 0], predicted[:, 0] == labels, gradient
