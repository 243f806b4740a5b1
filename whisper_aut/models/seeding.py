"""Random weights from a seed, without a trace in any of PyTorch's generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from `seed` inside the block and restore the CPU's generator afterwards.

    `torch.manual_seed` would reseed the generators of all GPUs too, where a training may be drawing
    its dropout from them.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
