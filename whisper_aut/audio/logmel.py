"""Log-mel spectrograms: Whisper's features without its padding to 30 s.

A clip has F valid frames of 10 ms. Its features `[F', M]` add up to two frames of the silence that
would follow it in a padded window. The encoder's convolutions see these two frames, so the last
encoder frame equals the one of a padded clip. Every frame equals that of
`transformers.WhisperFeatureExtractor`. Source: Radford et al. 2022, section 2.2.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from whisper_aut.audio.decode import SAMPLE_RATE_HZ

WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
WINDOW_SECONDS = 30
MAX_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE_HZ
MAX_MEL_FRAMES = MAX_SAMPLES // HOP_SAMPLES
CONTEXT_FRAMES = 2
# Maximum frames per FFT call on the CPU. The memory of one block fits into the cache; that of a
# whole clip does not.
BLOCK_FRAMES = 512
LOG_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0  # decades below the maximum of a clip
LOWEST_MEL = (math.log10(LOG_FLOOR) + 4.0) / 4.0


def mel_frames(samples: int) -> int:
    """Return F, the number of mel frames of a clip of S samples; the last one may be incomplete."""
    return -(-samples // HOP_SAMPLES)


def frames_with_context(mel_length: int) -> int:
    """Return F', the valid frames and the silence after them, at most Whisper's window."""
    return min(mel_length + CONTEXT_FRAMES, MAX_MEL_FRAMES)


class LogMel(nn.Module):
    """Log-mel features of one clip, computed in float32 at any training precision.

    Args:
        num_mel_bins: M; 80 up to whisper-large-v2, 128 for large-v3.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, num_mel_bins: int):
        super().__init__()
        self.num_mel_bins = num_mel_bins
        filters = mel_filter_bank(
            num_frequency_bins=1 + WINDOW_SAMPLES // 2,
            num_mel_filters=num_mel_bins,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE_HZ / 2,
            sampling_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW_SAMPLES), persistent=False)

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        """Return `[F', M]` for a waveform `[S]` of at most 30 s.

        Raises:
            ValueError: the waveform is empty, not one-dimensional, or longer than 30 s.
        """
        if waveform.ndim != 1 or not 0 < len(waveform) <= MAX_SAMPLES:
            raise ValueError(
                f"expected 1 to {MAX_SAMPLES} samples of one channel, "
                f"got shape {tuple(waveform.shape)}"
            )
        with _full_precision(waveform.device):
            return self._features(waveform.float())

    def _features(self, waveform: Tensor) -> Tensor:
        frames = frames_with_context(mel_frames(len(waveform)))
        windows = _pad_as_centred(waveform, frames).unfold(0, WINDOW_SAMPLES, HOP_SAMPLES)
        mel = waveform.new_empty(frames, self.num_mel_bins)
        # On other devices, the number of calls dominates the cost.
        blocks = -(-frames // BLOCK_FRAMES) if waveform.device.type == "cpu" else 1
        # Blocks have equal size: a last block of two frames would cost as many calls as the others.
        size = -(-frames // blocks)
        windowed = windows.new_empty(size, WINDOW_SAMPLES)
        power = windows.new_empty(size, len(self.filters))
        for start in range(0, frames, size):
            block = windows[start : start + size]
            spectrum = torch.fft.rfft(torch.mul(block, self.window, out=windowed[: len(block)]))
            # re² + im² avoids the square root of abs(), which would be squared again.
            parts = torch.view_as_real(spectrum).square_()
            torch.add(parts[..., 0], parts[..., 1], out=power[: len(block)])
            torch.mm(power[: len(block)], self.filters, out=mel[start : start + size])
        mel.clamp_(min=LOG_FLOOR).log10_()
        # The maximum is that of the clip, so features do not depend on other clips of the batch.
        floor = mel.max() - DYNAMIC_RANGE
        return mel.clamp_(min=floor).add_(4.0).mul_(0.25)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Turn off autocast and TF32, so that matrix products are computed in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def silence_level(mel: Tensor) -> Tensor:
    """Return the value of a silent frame in a clip's log-mel `[F', M]`, the floor of its range."""
    return (mel.max() - DYNAMIC_RANGE / 4.0).clamp(min=LOWEST_MEL)


def _pad_as_centred(waveform: Tensor, frames: int) -> Tensor:
    """Return the samples that `frames` centred windows see of a clip padded with silence to 30 s.

    `torch.stft(center=True)` mirrors the padded recording at both ends. At the start, this mirrors
    the clip. At the end, it mirrors silence, unless the clip reaches into the last half window of
    the 30 s.
    """
    half, samples = WINDOW_SAMPLES // 2, len(waveform)
    reach = (frames - 1) * HOP_SAMPLES + half  # end of the last window in the recording
    padded = waveform.new_empty(half + reach)
    there = min(samples, reach)
    padded[half : half + there] = waveform[:there]
    padded[half + there :] = 0.0
    start = waveform[1 : half + 1]
    padded[half - len(start) : half] = start.flip(0)
    # If the clip is shorter than the mirrored part, the silence after it is mirrored too.
    padded[: half - len(start)] = 0.0
    if reach > MAX_SAMPLES:
        beyond = reach - MAX_SAMPLES
        mirrored = padded[half + MAX_SAMPLES - 1 - beyond : half + MAX_SAMPLES - 1].flip(0)
        padded[half + MAX_SAMPLES :] = mirrored
    return padded
