"""Frames of many clips that stay in their cache files, and are read, standardised and padded per
batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Frames:
    """The frames `[T, D]` of B clips, standardised by those of the training clips.

    Args:
        clips: memory-mapped frames, as in `Embeddings.frames`.
        train: `[B]`, marks the clips used for mean and deviation.
        device: where batches are put.
    """

    def __init__(self, clips: Sequence[Tensor], train: np.ndarray, device: str = "cpu"):
        self.clips, self.device = clips, device
        self.lengths = torch.tensor([len(clip) for clip in clips])
        total = squares = torch.zeros(clips[0].shape[1], dtype=torch.double)
        for number in np.flatnonzero(train).tolist():
            clip = clips[number].double()
            total, squares = total + clip.sum(0), squares + clip.square().sum(0)
        count = int(self.lengths[torch.from_numpy(train)].sum())
        mean = total / count
        self.mean = mean.float()
        self.deviation = (
            (squares / count - mean.square()).clamp(min=0).sqrt().float().clamp_min(1e-6)
        )

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames of the clips with indices `[b]`, padded to `[b, T, D]`, and their
        lengths `[b]`.
        """
        numbers = numbers.cpu()
        padded = pad_sequence([self.clips[i] for i in numbers.tolist()], batch_first=True)
        standard = (padded - self.mean) / self.deviation
        return standard.to(self.device), self.lengths[numbers].to(self.device)
