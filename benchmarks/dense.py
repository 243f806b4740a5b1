"""Linear layers through the library that the processor likes best, against `nn.Linear`: forward and
backward in float32.

Where `whisper_aut.onednn` leaves the choice to PyTorch, on processors other than AMD's, both sides
are the same.
"""

import copy
from collections.abc import Iterator

import torch
from pairs import Row, compare, main
from torch import Tensor, nn
from torch.testing import assert_close

from whisper_aut.onednn import mkl_is_slow, use_onednn

ROWS = {250: "5 s", 4_000: "80 s"}  # encoder frames of 20 ms
LAYERS = {"tiny": (384, 1536), "large-v3": (1280, 5120)}


def cases(runs: int) -> Iterator[Row]:
    print(f"oneDNN is taken: {mkl_is_slow()}")
    for shape, (width, inner) in LAYERS.items():
        theirs = nn.Sequential(nn.Linear(width, inner), nn.Linear(inner, width))
        ours = copy.deepcopy(theirs)
        use_onednn(ours)
        for rows, length in ROWS.items():
            states = torch.randn(rows, width)
            yield compare(
                f"feed-forward of {shape}, {rows} frames ({length})",
                lambda ours=ours, states=states: _step(ours, states),
                lambda theirs=theirs, states=states: _step(theirs, states),
                against="nn.Linear",
                check=lambda mine, other: assert_close(mine, other, rtol=1e-4, atol=1e-4),
                runs=runs,
                steps=True,
            )


def _step(layers: nn.Module, states: Tensor) -> list[Tensor]:
    """Return the output and all gradients."""
    states = states.clone().requires_grad_()
    layers.zero_grad()
    out = layers(states)
    (out / out.numel()).sum().backward()
    return [
        out,
        *(value.grad for value in (states, *layers.parameters()) if value.grad is not None),
    ]


if __name__ == "__main__":
    main(cases, "Linear layers, float32 on a CPU")
