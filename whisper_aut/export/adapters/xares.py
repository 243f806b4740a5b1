"""Run an encoder in X-ARES.

Usage: `WHISPER_AUT_ENCODER=DIR python -m xares.run whisper_aut/export/adapters/xares.py TASKS…`.

X-ARES pads the clips of a batch with zeros, passes no lengths, and averages all frames that it
gets. This adapter therefore encodes each clip without its trailing zeros and fills the frames
after its end with the clip's mean frame. The average over all frames then equals the average over
the clip's own, whatever else is in the batch.
"""

# X-ARES looks in the module for the one name that ends in "Encoder". No other name here may end so.

import os

import torch
from torch import Tensor, nn

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.audio.logmel import HOP_SAMPLES
from whisper_aut.errors import UserError
from whisper_aut.inference import encoder as inference
from whisper_aut.models import encoder as packed

PATH_VARIABLE, PADDING_VARIABLE = "WHISPER_AUT_ENCODER", "WHISPER_AUT_PADDING"
HOP_MS = 1000 * HOP_SAMPLES * packed.CONV_STRIDE // SAMPLE_RATE_HZ


class WhisperAutEncoder(nn.Module):
    """The encoder class that X-ARES instantiates, without arguments.

    The environment variable `WHISPER_AUT_PADDING` sets the padding mode, `none` or `30s`. By
    default the encoder runs as it was trained.

    Args:
        path: A directory, a run, or a hub id. Defaults to the environment variable
            `WHISPER_AUT_ENCODER`.

    Raises:
        UserError: If neither gives a path, or if there is no usable encoder at it.
    """

    sampling_rate = SAMPLE_RATE_HZ
    hop_size_in_ms = HOP_MS

    def __init__(self, path: str = ""):
        super().__init__()
        path = path or os.environ.get(PATH_VARIABLE, "")
        if not path:
            raise UserError(f"Set {PATH_VARIABLE}=DIR to the encoder that X-ARES should run.")
        padding = os.environ.get(PADDING_VARIABLE)
        with torch.device("cpu"):  # XARES-LLM builds the encoder on the meta device to reload it
            self.inner = inference.load_encoder(path, padding=padding)  # pyright: ignore[reportArgumentType]
        self.output_dim = self.inner.width

    @torch.inference_mode()
    def forward(self, audio: Tensor) -> Tensor:
        """Encode a zero-padded batch.

        Args:
            audio: `[B, S]` or `[S]` at 16 kHz.

        Returns:
            `[B, T, D]`, a frame every 20 ms, on the device of the audio.
        """
        audio = audio[None] if audio.ndim == 1 else audio
        clips = [clip[: max(_length(clip), HOP_SAMPLES)] for clip in audio.float().cpu()]
        frames = self.inner.encode(clips, SAMPLE_RATE_HZ)
        count = packed.encoder_frames(-(-audio.shape[1] // HOP_SAMPLES))
        return torch.stack([_filled(clip, count) for clip in frames]).to(audio.device)


def _length(clip: Tensor) -> int:
    """Return the number of samples of a clip `[S]` without its trailing zeros."""
    nonzero = clip.nonzero()
    return int(nonzero[-1]) + 1 if len(nonzero) else 0


def _filled(frames: Tensor, count: int) -> Tensor:
    """Pad frames `[T, D]` with their mean to `[count, D]`."""
    return torch.cat([frames[:count], frames.mean(0).expand(max(count - len(frames), 0), -1)])
