"""Seeded random weights that leave PyTorch's generators unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator inside the block, and restore it afterwards.

    `torch.manual_seed` would also reseed the generators of all GPUs, which a running training may
    use for dropout.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
