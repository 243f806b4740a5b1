"""Many logistic regressions with an L2 penalty as one problem: losses, units, and the order of
their penalties.

Weights are `[j, C, R + 1]` and features `[I, R + 1]`, whose last column is 1 for the bias. Targets
are classes `[I]`, or 0 and 1 for each class `[I, C]`.
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_aut.onednn import product

ROUGH_TOLERANCE = 1e-3  # for optima that only rank penalties, or that the next fit starts from
APPROACH = (1000.0, 100.0, 10.0)  # factors of the penalty on the way to a final fit
MAX_APPROACH = 10.0  # largest penalty on the way: its optimum is quickly found from zero
PATH_FLOPS = 1e9  # per step of all heads: above it, following a path of penalties is faster

# The last two optima of a path: penalties and weights.
PenaltyPath = deque[tuple[float, Tensor]]


def with_ones(features: Tensor) -> Tensor:
    """Append a feature that is always 1, whose weight is the bias: `[I, R]` → `[I, R + 1]`."""
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def linear_scores(weight: Tensor, features: Tensor) -> Tensor:
    """Weights `[j, C, R + 1]` and features `[I, R + 1]` → scores `[I, j, C]`."""
    return product(features, weight.flatten(0, 1)).unflatten(1, weight.shape[:2])


def logistic_losses(
    weight: Tensor, penalties: Tensor, features: Tensor, targets: Tensor, item_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the penalised losses `[j]` of logistic regressions, and their gradients.

    The gradient is written out by hand to avoid the memory of an autograd graph.

    Args:
        weight, features, targets: see above. The bias is not penalised.
        penalties: `[j]`.
        item_weights: weight of each item in each head, `[I, j]`.
    """
    scores = linear_scores(weight, features)
    if targets.ndim == 2:
        marks = targets[:, None].to(scores.dtype)
        losses = (F.softplus(scores) - scores * marks).sum(2)
        slopes = (scores.sigmoid_() - marks) * item_weights[:, :, None]
    else:
        index = targets[:, None, None].expand(-1, len(weight), 1)
        slopes = scores.log_softmax(2)
        losses = -slopes.gather(2, index)[:, :, 0]
        # Probabilities below exp(-30) have no effect on the gradient, but as denormal numbers
        # they would slow down every following product.
        slopes = slopes.clamp_(min=-30).exp_().mul_(item_weights[:, :, None])
        slopes.scatter_add_(2, index, -item_weights[:, :, None])
    pull = penalties[:, None, None] * weight
    pull[:, :, -1] = 0
    gradients = product(slopes.flatten(1).T, features.T).view_as(weight) + pull
    penalty = 0.5 * (pull * weight).sum((1, 2), dtype=torch.double)
    return (losses * item_weights).sum(0, dtype=torch.double) + penalty, gradients


def unit_scale(
    weight: Tensor,
    penalties: Tensor,
    features: Tensor,
    targets: Tensor,
    item_weights: Tensor,
    variances: Tensor,
) -> Tensor:
    """Return the units of weights in which the curvature of the losses is about 1 along each axis:
    its inverse square root at the given weights.

    Args:
        weight, penalties, features, targets, item_weights: see `logistic_losses`.
        variances: variances of the features, `[R + 1]`.
    """
    scores = linear_scores(weight, features)
    probabilities = scores.sigmoid() if targets.ndim == 2 else scores.softmax(2)
    steepness = torch.einsum("ijc,ij->jc", probabilities * (1 - probabilities), item_weights)
    curvature = steepness.clamp(min=1e-8)[:, :, None] * variances
    curvature[:, :, :-1] += penalties[:, None, None]
    return (curvature + 1e-12).rsqrt()


def penalty_levels(
    penalties: Tensor, approach: Sequence[float], tolerance: float, flops: float
) -> list[tuple[Tensor, float, float]]:
    """Return which heads to fit one after another: their indices, a factor of their penalties, and
    a tolerance.

    Args:
        penalties: the penalty of each head, `[J]`.
        approach: factors of the penalties on the way to their own values. If there are none, the
            largest penalties come first.
        tolerance: the tolerance at the penalties themselves.
        flops: the cost of a step of all heads. If it is mostly overhead, all heads run at once.
    """
    everything = torch.arange(len(penalties))
    if flops < PATH_FLOPS:
        return [(everything, 1.0, tolerance)]
    if not approach:
        found = penalties.unique().flip(0)
        return [(torch.nonzero(penalties == one)[:, 0], 1.0, tolerance) for one in found]
    low = [(torch.nonzero(penalties * f <= MAX_APPROACH)[:, 0], f) for f in approach]
    way = [(level, factor, ROUGH_TOLERANCE) for level, factor in low if len(level)]
    return [*way, (everything, 1.0, tolerance)]


def extrapolate(path: PenaltyPath, penalty: float, otherwise: Tensor) -> Tensor:
    """Extrapolate a path to the next penalty, linearly in the logarithm of the penalty."""
    if len(path) < 2:
        return path[-1][1] if path else otherwise
    (penalty_1, weight_1), (penalty_2, weight_2) = path
    penalty = max(penalty, 1e-12 * penalty_2)  # a penalty of zero has no logarithm
    stride = math.log(penalty_2 / penalty) / math.log(penalty_1 / penalty_2)
    # The path is curved, so never extrapolate further than the previous distance.
    return weight_2 + min(stride, 1) * (weight_2 - weight_1)
