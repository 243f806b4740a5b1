"""Waveforms of a batch → its log-mel, on the device that trains.

In: a `Batch` of waveforms that lies on the device. Out: the same batch with its mel, in float32 whatever the training precision, and
masked by SpecAugment with the numbers that a data worker would have drawn. Next: `model.encoder`. Used by `data.module` where
`data.features` is `device`; otherwise the workers make the mel, as `data.example` does.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from whisper_aut.data.augment import Augment
from whisper_aut.data.logmel import LogMel, mel_frames
from whisper_aut.data.pack import Batch


@dataclass
class DeviceFeatures:
    """Makes log-mels where the batch lies.

    Args:
        logmel: the features of the encoder.
        augment: masks the clips that have a position.
    """

    logmel: LogMel
    augment: Augment | None = None

    def __post_init__(self) -> None:
        self.logmel = deepcopy(
            self.logmel
        )  # it follows the device; the one given stays with the workers

    def __call__(self, batch: Batch) -> Batch:
        if batch.waveforms is None:
            return batch
        logmel = self.logmel.to(batch.waveforms.bits.device)
        clips = []
        for waveform, position in zip(
            batch.waveforms.clips(), batch.waveforms.positions, strict=True
        ):
            mel = logmel(waveform)
            if self.augment and position is not None:
                mel = self.augment.mel(mel, mel_frames(len(waveform)), position)
            clips.append(mel)
        return replace(batch, mel=torch.cat(clips), waveforms=None)
