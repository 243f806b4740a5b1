"""Distillation to the starting encoder: keep its frames on chosen domains while others are learned.

The teacher is a frozen copy of the pretrained encoder that runs on the same packed clips. The
distance of a frame is 1 − cos(student, teacher) + |student − teacher|² / |teacher|². DistilHuBERT
(arXiv 2110.01900) and USAD (arXiv 2506.18843) have an L1 term in place of the squared one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.data.batch import Batch
from whisper_aut.models.encoder import Frames, PackedEncoder


class Distillation:
    """Measures how far the encoder in training is from its teacher.

    The teacher is no submodule: it is neither trained nor saved, and no strategy partitions it.

    Args:
        teacher: the encoder at the start of the training.
        weight: of the distance, relative to the decoder's loss.
        layers: the hidden states to compare, numbered as in Hugging Face: 0 is the input of the
            first layer. The number of layers stands for the output.
        domains: only clips of these domains are compared.
    """

    def __init__(
        self, teacher: PackedEncoder, weight: float, layers: Sequence[int], domains: Sequence[str]
    ):
        self.teacher, self.weight = teacher.eval().requires_grad_(False), weight
        self.layers, self.domains = tuple(layers), frozenset(domains)

    def compared(self, batch: Batch) -> list[int]:
        """Return the indices of the clips that are compared."""
        return [i for i, domain in enumerate(batch.domains) if domain in self.domains]

    def __call__(self, batch: Batch, frames: Frames) -> Tensor | None:
        """Return the mean distance of each compared clip, times the weight of its tokens, summed.

        A clip thus has the weight that it has in the decoder's loss. `frames` are the encoder's
        output for the batch, with its states. None if the batch has no clip of the domains.
        """
        chosen = self.compared(batch)
        if not chosen:
            return None
        mel = batch.mel.split([frames_with_context(length) for length in batch.mel_lengths])
        # Under autocast, weights and hidden states are float32; under DeepSpeed, both are 16-bit.
        self.teacher.to(device=frames.values.device, dtype=frames.states[0].dtype)
        with torch.no_grad():
            taught = self.teacher(
                torch.cat([mel[i] for i in chosen]),
                [batch.mel_lengths[i] for i in chosen],
                keep_states=True,
                padded=[batch.padded[i] for i in chosen],
            )
        total = torch.zeros((), dtype=torch.float32, device=frames.values.device)
        weights = batch.targets.clip_weights()
        for layer in self.layers:
            students = frames.states[layer].split(frames.lengths)
            teachers = taught.states[layer].split(taught.lengths)
            for i, target in zip(chosen, teachers, strict=True):
                valid = frames.valid_lengths[i]
                distance = frame_distance(students[i][:valid], target[:valid]).mean()
                total = total + distance * (weights[i] / len(self.layers))
        return total


def frame_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance of each frame, `[T]`: cosine distance plus relative squared distance."""
    student, teacher = student.float(), teacher.float()
    cosine = torch.cosine_similarity(student, teacher, dim=-1)
    squares = (student - teacher).square().sum(-1) / teacher.square().sum(-1)
    return 1 - cosine + squares
