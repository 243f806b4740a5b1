"""What every decoder is: a way from encoder frames to a loss on text, and to text.

In: the packed frames of a batch, their lengths and the batch's `Targets`. Out: a `DecoderLoss`, or generated tokens. Next:
`model.module` binds an encoder and any decoder. A decoder comes with a `TextCodec`, its way from annotations to tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from whisper_aut.data.batch import Targets
from whisper_aut.models.losses import DecoderLoss


@runtime_checkable
class Decoder(Protocol):
    """A text decoder that learns from an audio encoder and teaches it. It is an `nn.Module` as well.

    Two more are used where a decoder has them: `flops(lengths, targets)`, the work of a training step, by the meters; `identity`, a
    dictionary that the run's `environment.json` records.
    """

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        """Return the summed loss over the supervised tokens.

        Args:
            frames: `[ΣT, D]`; each clip's text sees that clip's frames only.
            lengths: T per clip.
            targets: the packed tokens of the same clips.
        """
        ...

    def generate(
        self,
        frames: Tensor,
        lengths: Sequence[int],
        prompts: Sequence[Tensor],
        max_new_tokens: int = 64,
    ) -> list[list[int]]:
        """Return per clip the tokens that greedy decoding appends to its prompt, the end token left out."""
        ...

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Yield the decoder's own parameters that training may change."""
        ...
