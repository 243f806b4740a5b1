"""The interface that `models.module` expects of a decoder.

Each decoder comes with a `TextCodec`, which converts annotations to tokens and back to text.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from whisper_aut.data.batch import Targets
from whisper_aut.models.losses import DecoderLoss


@runtime_checkable
class Decoder(Protocol):
    """A text decoder for training an audio encoder. It must also be an `nn.Module`.

    Some members are optional: `flops(lengths, targets, *, through_frames=True)` returns the FLOPs
    of a training step for the throughput metrics, in which gradients flow back to the frames or do
    not, `compile_layers()` compiles layers for `model.compile`, and `identity` is a dictionary
    written to the run's `environment.json`. With `encoder_layers`, a list of n hidden states
    (`Frames.states`), frames are `[ΣT, n, D]`.
    """

    def loss(self, frames: Tensor, lengths: Sequence[int], targets: Targets) -> DecoderLoss:
        """Return the summed loss over the supervised tokens.

        Args:
            frames: encoder frames `[ΣT, D]`. The text of a clip attends to that clip's frames only.
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
        """Decode each clip greedily.

        Args:
            frames, lengths: see `loss`.
            prompts: prompt tokens `[L]` of each clip.
            max_new_tokens: maximum number of tokens to generate per clip.

        Returns:
            The new tokens of each clip, without its prompt and the end token.
        """
        ...

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Return the decoder's parameters that are trained."""
        ...
