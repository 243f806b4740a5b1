"""An encoder class as X-ARES's checker and runner want it: no arguments, a batch in, frames of a true 20 ms hop out.

In: `[B, S]` at 16 kHz, short clips of a batch filled up with zeros, as X-ARES does. Out: `[B, T, D]`. Next: X-ARES, which is
told of this file: `WHISPER_AUT_ENCODER=DIR python -m xares.run whisper_aut/export/adapters/xares.py TASKS…`.

X-ARES knows no lengths and averages whatever frames it gets. Each clip is therefore heard without the zeros behind it, and the
frames behind its end are its own mean: X-ARES's mean over all frames is then the mean over the clip's, which no neighbour in
the batch can change. X-ARES looks a module for the one name that ends in Encoder, so nothing else here may.
"""

import os

import torch
from torch import Tensor, nn

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.audio.logmel import HOP_SAMPLES
from whisper_aut.errors import UserError
from whisper_aut.models import encoder as packed
from whisper_aut.models import pretrained

PATH_VARIABLE, PADDING_VARIABLE = "WHISPER_AUT_ENCODER", "WHISPER_AUT_PADDING"
HOP_MS = 1000 * HOP_SAMPLES * packed.CONV_STRIDE // SAMPLE_RATE_HZ


class WhisperAutEncoder(nn.Module):
    """What X-ARES instantiates.

    Args:
        path: a directory, run or hub id; by default what `WHISPER_AUT_ENCODER` names. `WHISPER_AUT_PADDING` may say `none` or
            `30s`; by default the encoder runs as it was trained.

    Raises:
        UserError: no path by either way, or nothing usable at it.
    """

    sampling_rate = SAMPLE_RATE_HZ
    hop_size_in_ms = HOP_MS

    def __init__(self, path: str = ""):
        super().__init__()
        path = path or os.environ.get(PATH_VARIABLE, "")
        if not path:
            raise UserError(
                f"X-ARES takes no arguments for an encoder: name it in the environment, {PATH_VARIABLE}=DIR."
            )
        self.inner = pretrained.load_encoder(path, padding=os.environ.get(PADDING_VARIABLE))  # pyright: ignore[reportArgumentType]
        self.output_dim = self.inner.width

    @torch.inference_mode()
    def forward(self, audio: Tensor) -> Tensor:
        """`[B, S]` or `[S]` → `[B, T, D]`, on the device of the audio."""
        audio = audio[None] if audio.ndim == 1 else audio
        clips = [clip[: max(_length(clip), HOP_SAMPLES)] for clip in audio.float().cpu()]
        frames = self.inner.encode(clips, SAMPLE_RATE_HZ)
        count = packed.encoder_frames(-(-audio.shape[1] // HOP_SAMPLES))
        return torch.stack([_filled(clip, count) for clip in frames]).to(audio.device)


def _length(clip: Tensor) -> int:
    """Return S of a clip `[S']` without the zeros behind it."""
    heard = clip.nonzero()
    return int(heard[-1]) + 1 if len(heard) else 0


def _filled(frames: Tensor, count: int) -> Tensor:
    """`[T, D]` → `[count, D]`, the mean frame behind the last."""
    return torch.cat([frames[:count], frames.mean(0).expand(max(count - len(frames), 0), -1)])
