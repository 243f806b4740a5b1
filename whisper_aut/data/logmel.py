"""Waveform → log-mel spectrogram, Whisper's own features without Whisper's padding.

In: one clip `[S]` at 16 kHz. Out: `[F', M]` with F' = F valid frames (10 ms each) plus up to two frames of the silence that
follows. Next: `data.pack`. Source: Radford et al. 2022, section 2.2; equal to `transformers.WhisperFeatureExtractor` on every
frame. The two extra frames are what the encoder's convolutions see past a clip's end when it lies in 30 s of silence: with
them the last encoder frame is the one that padding would have given.
"""

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from whisper_aut.data.waveform import SAMPLE_RATE_HZ

WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
WINDOW_SECONDS = 30
MAX_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE_HZ
MAX_MEL_FRAMES = MAX_SAMPLES // HOP_SAMPLES
CONTEXT_FRAMES = 2
BLOCK_FRAMES = 500  # the spectrum of a block stays in the cache: 3 to 20 times faster than one transform of everything
LOG_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0  # decades below a clip's own maximum


def mel_frames(samples: int) -> int:
    """F: how many mel frames hold a clip of S samples, the last one begun but perhaps not filled."""
    return -(-samples // HOP_SAMPLES)


def frames_with_context(mel_length: int) -> int:
    """F': the valid frames and the silence after them, within Whisper's window."""
    return min(mel_length + CONTEXT_FRAMES, MAX_MEL_FRAMES)


class LogMel(nn.Module):
    """Log-mel features of one clip, computed in float32 whatever the training precision.

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
    @torch.autocast("cpu", enabled=False)
    def forward(self, waveform: Tensor) -> Tensor:
        """Return `[F', M]` for a waveform `[S]` of at most 30 s.

        Raises:
            ValueError: empty, more than one channel, or longer than Whisper's window.
        """
        if waveform.ndim != 1 or not 0 < len(waveform) <= MAX_SAMPLES:
            raise ValueError(f"expected 1 to {MAX_SAMPLES} samples of one channel, got shape {tuple(waveform.shape)}")
        frames = frames_with_context(mel_frames(len(waveform)))
        padded = _pad_as_centred(waveform.float(), frames)
        windows = padded.unfold(0, WINDOW_SAMPLES, HOP_SAMPLES)
        mel = torch.empty(frames, self.num_mel_bins, device=waveform.device)
        windowed = torch.empty(min(BLOCK_FRAMES, frames), WINDOW_SAMPLES, device=waveform.device)
        for start in range(0, frames, BLOCK_FRAMES):
            block = windows[start : start + BLOCK_FRAMES]
            spectrum = torch.fft.rfft(torch.mul(block, self.window, out=windowed[: len(block)]))
            # re² + im² spares the square root of abs(), which squaring would only undo.
            parts = torch.view_as_real(spectrum).square_()
            torch.mm(parts[..., 0] + parts[..., 1], self.filters, out=mel[start : start + BLOCK_FRAMES])
        log_mel = mel.clamp_(min=LOG_FLOOR).log10_()
        floor = log_mel.max() - DYNAMIC_RANGE  # the clip's own maximum: features never depend on a neighbour
        return torch.maximum(log_mel, floor).add_(4.0).div_(4.0)


def silence_level(mel: Tensor) -> Tensor:
    """The value that a silent frame has in a clip's log-mel `[F', M]`: the floor of its dynamic range."""
    return (mel.max() - DYNAMIC_RANGE / 4.0).clamp(min=(torch.tensor(LOG_FLOOR).log10().item() + 4.0) / 4.0)


def _pad_as_centred(waveform: Tensor, frames: int) -> Tensor:
    """Lay out the samples that `frames` centred windows see when the clip starts a 30 s recording of silence.

    `torch.stft(center=True)` mirrors the recording at both its ends. The start is always the clip's; the far end is the
    clip's only where it reaches into the last half window of the 30 s.
    """
    half = WINDOW_SAMPLES // 2
    needed = (frames - 1) * HOP_SAMPLES + half
    recording = nn.functional.pad(waveform, (0, max(0, min(needed, MAX_SAMPLES) - len(waveform), half + 1 - len(waveform))))
    mirrored_start = recording[1 : half + 1].flip(0)
    mirrored_end = (
        recording[MAX_SAMPLES - 1 - (needed - MAX_SAMPLES) : MAX_SAMPLES - 1].flip(0) if needed > MAX_SAMPLES else recording[:0]
    )
    return torch.cat([mirrored_start, recording, mirrored_end])[: needed + half]
