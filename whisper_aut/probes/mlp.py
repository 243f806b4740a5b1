"""The probe with one hidden layer: what an encoder holds that no plane separates.

In: items `[I, D]`. Out: class scores `[I, J, C]`. Next: `probes.selection`, which chooses learning rate and decay on validation clips.
All inner folds, rates and decays are one batch of networks. Features are standardised by the training split.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from whisper_aut.probes.descent import DescentFitter, DescentProbe
from whisper_aut.probes.fitting import Setting
from whisper_aut.probes.items import Items

MLP_VERSION = 2
HIDDEN = 256
CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-4, 1e-3, 1e-2)
)
MAX_ACTIVATIONS = 1 << 26


class MLPProbe(DescentProbe):
    """J networks D → H → C, trained as one.

    Args:
        settings: each problem's learning `rate` and `decay` (half the squared weights, times this, is added to its loss).
        seed: decides the starting weights and the order of batches.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        settings: Sequence[Setting],
        seed: int = 0,
        hidden: int = HIDDEN,
    ):
        generator = torch.Generator().manual_seed(seed)
        first, second = (
            torch.randn(width, hidden, generator=generator),
            torch.randn(hidden, classes, generator=generator),
        )
        count = len(settings)  # all start alike, so that settings are compared and not starts
        values = {
            "first": (first * (2 / width) ** 0.5).repeat(count, 1, 1),
            "first_bias": torch.zeros(count, hidden),
            "second": (second * hidden**-0.5).repeat(count, 1, 1),
            "second_bias": torch.zeros(count, classes),
        }
        super().__init__(values, _scores, ("first", "second"), settings, seed)


def mlp_fitter(pool: Items, train: Tensor, classes: int, device: str) -> DescentFitter:
    """Return what fits networks on one pool, standardised by the items `train`."""
    items, width = pool.features.shape
    block = max(1, MAX_ACTIVATIONS // (HIDDEN * (items + 8 * width)))
    return DescentFitter.on(
        pool, train, device, probe=partial(MLPProbe, width, classes), block=block
    )


def _scores(values: Mapping[str, Tensor], features: Tensor) -> Tensor:
    problems, width, hidden = values["first"].shape
    wide = values["first"].transpose(0, 1).reshape(width, problems * hidden)
    inner = torch.relu((features @ wide).unflatten(1, (problems, hidden)) + values["first_bias"])
    return torch.einsum("ijh,jhc->ijc", inner, values["second"]) + values["second_bias"]
