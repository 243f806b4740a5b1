"""Adapters that map encoder frames to the embeddings of a language model.

Packed frames `[ΣT, D]` become packed embeddings `[ΣT', W]`, with T' = ⌈T / hop⌉ per clip and W the
width of the language model. To add an adapter, write a class and add it to `ADAPTERS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import AfterValidator, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from whisper_aut.errors import nearest
from whisper_aut.models.attention import upload


def _check_adapter(name: str) -> str:
    if name not in ADAPTERS:
        known = ", ".join(ADAPTERS)
        raise ValueError(
            f"there is no adapter {name!r}.{nearest(name, ADAPTERS)} The adapters are {known}"
        )
    return name


@dataclass
class AdapterOptions:
    """Which adapter to build, and its sizes.

    Attributes:
        name: `stack`, `conv` or `linear`.
        frames: number of encoder frames (20 ms each) per embedding: 4 for 80 ms, 5 for 100 ms.
        hidden: width between the two linear layers. 0 means twice the language model's width.
            `linear` has one layer only.
        layers: encoder layers to fuse, see `LayerFusion`. Empty for the encoder's output alone.
    """

    name: Annotated[str, AfterValidator(_check_adapter)] = "stack"
    frames: PositiveInt = 4
    hidden: NonNegativeInt = 0
    layers: list[NonNegativeInt] = field(default_factory=list)


def windows(
    frames: Tensor, lengths: Sequence[int], size: int, hop: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Gather a window of `size` frames every `hop` frames, separately in each clip.

    A window that is larger than `hop` is centred on its hop. Windows never reach into the next
    clip: frames outside the clip are zero.

    Args:
        frames: `[ΣT, D]`, with T frames per clip in `lengths`.

    Returns:
        The windows `[ΣT', size · D]`, and T' per clip.
    """
    counts = tuple(-(-length // hop) for length in lengths)
    lead = (size - hop) // 2
    indices, start = [], 0
    outside = len(frames)  # index of the zero frame that is appended below
    for length, count in zip(lengths, counts, strict=True):
        own = torch.arange(count)[:, None] * hop + torch.arange(size)[None] - lead
        indices.append(torch.where((own >= 0) & (own < length), own + start, outside))
        start += length
    padded = torch.cat([frames, frames.new_zeros(1, frames.shape[1])])
    index = upload(torch.cat(indices).flatten(), frames.device)
    return padded.index_select(0, index).view(-1, size * frames.shape[1]), counts


class LayerFusion(nn.Module):
    """Adds up hidden states of an encoder, each normalised, with softmax weights that are learned.

    As in ELMo (arXiv 1802.05365) and SUPERB (arXiv 2105.01051). All weights are equal at first.
    """

    def __init__(self, layers: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers))

    def forward(self, states: Tensor) -> Tensor:
        """Map `[ΣT, n, D]` to `[ΣT, D]`."""
        normed = layer_norm(states, states.shape[-1:])
        return torch.einsum("n,tnd->td", self.scores.softmax(0).to(normed.dtype), normed)


class StackAdapter(nn.Module):
    """Normalises frames, stacks `hop` of them, and maps the stack through two linear layers.

    The weights of the output norm start at `scale`, so that the outputs are as large as the
    language model's own token embeddings.

    Args:
        width: width D of the encoder.
        out_width: width W of the language model.
        hop: frames per embedding.
        hidden: width between the two linear layers.
        scale: root mean square of the language model's token embeddings.
    """

    overlap = 1  # window size in hops

    def __init__(self, width: int, out_width: int, hop: int, hidden: int, scale: float):
        super().__init__()
        self.hop = hop
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(self.overlap * hop * width, hidden), nn.GELU(), nn.Linear(hidden, out_width)
        )
        self.norm_out = nn.RMSNorm(out_width)
        nn.init.constant_(self.norm_out.weight, scale)

    def forward(self, frames: Tensor, lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Map `[ΣT, D]` to `[ΣT', W]` and return T' per clip."""
        stacked, counts = windows(self.norm_in(frames), lengths, self.overlap * self.hop, self.hop)
        return self.norm_out(self.layers(stacked)), counts


class ConvAdapter(StackAdapter):
    """A `StackAdapter` whose first layer is a convolution with kernel 2 · `hop` and stride `hop`.

    The convolution is computed as a matrix product over gathered windows.
    """

    overlap = 2


class LinearAdapter(StackAdapter):
    """One linear layer on `hop` stacked frames, without norms: XARES-LLM's projector at hop 1."""

    def __init__(self, width: int, out_width: int, hop: int, hidden: int, scale: float):
        nn.Module.__init__(self)
        self.hop = hop
        self.norm_in = self.norm_out = nn.Identity()
        self.layers = nn.Sequential(nn.Linear(hop * width, out_width))


ADAPTERS: dict[str, type[StackAdapter]] = {
    "stack": StackAdapter,
    "conv": ConvAdapter,
    "linear": LinearAdapter,
}


@torch.no_grad()
def embedding_scale(embed: nn.Embedding) -> float:
    """Return the root mean square of a language model's token embeddings.

    It is measured on the outputs of the layer and not on its weights, because Gemma's embedding
    layer multiplies its weights by √W.
    """
    tokens = torch.arange(embed.num_embeddings, device=embed.weight.device)
    squares = [embed(some).double().square().sum() for some in tokens.split(4096)]
    return float(torch.stack(squares).sum() / embed.weight.numel()) ** 0.5


def build_adapter(
    options: AdapterOptions, width: int, out_width: int, scale: float
) -> StackAdapter:
    """Build an adapter from width D of an encoder to width W of a language model.

    Args:
        scale: root mean square of the language model's embeddings, see `embedding_scale`.
    """
    return ADAPTERS[options.name](
        width, out_width, options.frames, options.hidden or 2 * out_width, scale
    )
