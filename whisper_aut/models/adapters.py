"""Encoder frames → embeddings of a language model: fewer, wider, at its scale.

In: packed frames `[ΣT, D]` with lengths T. Out: packed embeddings `[ΣT', W]` with lengths T' = ⌈T / k⌉, W the language model's width. Next:
`model.decoders.causal_lm` puts them where the audio stands in the chat. A window never reaches into the neighbouring clip;
what it misses at a clip's end is zero. A third adapter is one class and one line of `ADAPTERS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whisper_aut.errors import UserError, nearest
from whisper_aut.models.attention import sent

EMBEDDINGS_AT_ONCE = 4096


@dataclass
class AdapterOptions:
    """An adapter by name.

    Attributes:
        name: `stack` or `conv`.
        frames: encoder frames (20 ms) that become one embedding: 4 for 80 ms, 5 for 100 ms.
        hidden: width between its two layers; 0 for twice the language model's.
    """

    name: str = "stack"
    frames: int = 4
    hidden: int = 0


def windows(
    frames: Tensor, lengths: Sequence[int], size: int, hop: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Gather windows of `size` frames every `hop` inside each clip: `[ΣT, D]` → `[ΣT', size · D]`, and T' per clip.

    Windows are centred on their hop where `size` exceeds it; frames outside the clip are zero.
    """
    counts = tuple(-(-length // hop) for length in lengths)
    lead = (size - hop) // 2
    places, start = [], 0
    outside = len(frames)  # index of one zero frame, appended below
    for length, count in zip(lengths, counts, strict=True):
        inside = torch.arange(count)[:, None] * hop + torch.arange(size)[None] - lead
        places.append(torch.where((inside >= 0) & (inside < length), inside + start, outside))
        start += length
    padded = torch.cat([frames, frames.new_zeros(1, frames.shape[1])])
    index = sent(torch.cat(places).flatten(), frames.device)
    return padded.index_select(0, index).view(-1, size * frames.shape[1]), counts


class StackAdapter(nn.Module):
    """Stacks `hop` frames and maps them through a norm and two layers; the output norm starts at the embeddings' own scale.

    Args:
        width: D, of the encoder.
        out_width: W, of the language model.
        hop: frames per embedding.
        hidden: width between the layers.
        scale: root mean square of the language model's token embeddings.
    """

    overlap = 1  # windows of `hop` frames, end to end

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
    """A convolution with kernel 2 · `hop` and stride `hop`, written as a product over gathered windows, and a second layer."""

    overlap = 2


ADAPTERS: dict[str, type[StackAdapter]] = {"stack": StackAdapter, "conv": ConvAdapter}


@torch.no_grad()
def embedding_scale(embed: nn.Embedding) -> float:
    """Return the root mean square of a language model's token embeddings: the size at which an adapter's output begins.

    Measured on what the layer returns: Gemma's multiplies its weights by √W.
    """
    tokens = torch.arange(embed.num_embeddings, device=embed.weight.device)
    squares = [embed(some).double().square().sum() for some in tokens.split(EMBEDDINGS_AT_ONCE)]
    return float(torch.stack(squares).sum() / embed.weight.numel()) ** 0.5


def build_adapter(
    options: AdapterOptions, width: int, out_width: int, scale: float
) -> StackAdapter:
    """Build the adapter between an encoder and a language model.

    Args:
        width: D, of the encoder.
        out_width: W, of the language model.
        scale: of its embeddings, see `embedding_scale`.

    Raises:
        UserError: no such adapter, or fewer than one frame an embedding.
    """
    if options.name not in ADAPTERS:
        hint = nearest(options.name, ADAPTERS)
        raise UserError(
            f"decoder.adapter.name: there is no adapter {options.name!r}.{hint} There are: {', '.join(ADAPTERS)}."
        )
    if options.frames < 1 or options.hidden < 0:
        raise UserError(
            f"decoder.adapter: frames must be at least 1 and hidden at least 0, got {options}."
        )
    return ADAPTERS[options.name](
        width, out_width, options.frames, options.hidden or 2 * out_width, scale
    )
