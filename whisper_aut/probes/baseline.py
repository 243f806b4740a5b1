"""The floor that an encoder has to beat: mean and deviation of log-mel features, with nothing learned in them.

In: waveforms. Out: `[F, M]` log-mel frames, valid ones only, pooled by mean and deviation. Next: `probes.suite` takes it for one
more encoder. On ESC-10 this floor is higher than what a randomly initialised Whisper, or X-ARES's score of one, reaches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from whisper_aut.data.logmel import LogMel, mel_frames
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, to_mono_16k

BASELINE_NAME = "log-mel statistics"
BASELINE_VERSION = 1


class LogMelBaseline:
    """An "encoder" whose frames are the log-mel frames themselves."""

    pooling = "mean_std"

    def __init__(self, num_mel_bins: int = 80):
        self.width = num_mel_bins
        self._log_mel = LogMel(num_mel_bins)

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor | np.ndarray], sample_rate_hz: int) -> list[Tensor]:
        """Return one `[F, M]` per waveform `[S]`; frames that only see the silence after a clip are not among them."""
        frames = []
        for waveform in waveforms:
            samples = torch.as_tensor(waveform)
            if sample_rate_hz != SAMPLE_RATE_HZ:
                samples = to_mono_16k(samples.numpy(), sample_rate_hz)
            frames.append(self._log_mel(samples)[: mel_frames(len(samples))])
        return frames

    def fingerprint(self) -> str:
        return f"log-mel-{BASELINE_VERSION}-{self.width}"
