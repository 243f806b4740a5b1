"""The probe over all layers: a softmax weight for each, learned with the linear head (SUPERB, Yang et al. 2021).

In: items `[I, layers, D]`. Out: class scores `[I, J, C]`. Next: `probes.selection`. Each layer is standardised by itself, so that a
layer of large numbers has no larger say.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from whisper_aut.probes.descent import DescentFitter, DescentProbe
from whisper_aut.probes.fitting import Setting
from whisper_aut.probes.items import Items

LAYERS_VERSION = 2
CANDIDATES: tuple[Setting, ...] = tuple(
    {"rate": rate, "decay": decay} for rate in (1e-3, 1e-2) for decay in (1e-3, 1e-2, 1e-1)
)
MAX_ACTIVATIONS = 1 << 26


class LayerWeightedProbe(DescentProbe):
    """J linear probes, each on its own mixture of layers, trained as one.

    Args:
        settings: each problem's learning `rate` and `decay` of the linear weights.
        seed: decides the order of batches; all weights start at zero.
    """

    def __init__(
        self, layers: int, width: int, classes: int, settings: Sequence[Setting], seed: int = 0
    ):
        count = len(settings)
        values = {
            "shares": torch.zeros(count, layers),  # before the softmax: all layers alike
            "weight": torch.zeros(count, width, classes),
            "bias": torch.zeros(count, classes),
        }
        super().__init__(values, _scores, ("weight",), settings, seed)

    def shares(self) -> Tensor:
        """Return what each layer counts, `[J, layers]`, summing to one."""
        return self.values["shares"].softmax(1)


def layer_fitter(pool: Items, train: Tensor, classes: int, device: str) -> DescentFitter:
    """Return what fits layer-weighted probes on one pool, standardised by the items `train`."""
    items, layers, width = pool.features.shape
    block = max(1, MAX_ACTIVATIONS // (items * width + 8 * width * classes + layers))
    return DescentFitter.on(
        pool,
        train,
        device,
        probe=partial(LayerWeightedProbe, layers, width, classes),
        block=block,
    )


def _scores(values: Mapping[str, Tensor], features: Tensor) -> Tensor:
    mixed = torch.einsum("ild,jl->jid", features, values["shares"].softmax(1))
    return (mixed @ values["weight"] + values["bias"][:, None]).transpose(0, 1)
