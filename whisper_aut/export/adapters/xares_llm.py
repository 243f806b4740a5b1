"""Run an encoder in XARES-LLM (https://github.com/xiaomi-research/xares-llm).

Usage: `python -m xares_llm.run whisper_aut/export/adapters/xares_llm.py TRAIN EVAL --model_args
'{"path": "DIR"}'`.

XARES-LLM passes a mask with each zero-padded batch and expects a mask of the frames. Its own
Whisper wrapper computes the number of frames as if both convolutions had a stride of two, and so
keeps the first half of every clip's frames. This adapter keeps all frames, one every 20 ms.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.audio.logmel import HOP_SAMPLES
from whisper_aut.export.adapters import xares


# XARES-LLM looks in the module for the one name that ends in "Encoder".
class WhisperAutEncoder(xares.WhisperAutEncoder):
    """The encoder class that XARES-LLM instantiates with `--model_args`.

    The path may also be in the environment variable `WHISPER_AUT_ENCODER`, and the padding mode,
    `none` or `30s`, in `WHISPER_AUT_PADDING`. By default the encoder runs as it was trained.
    """

    @torch.no_grad()
    def forward(
        self, audio: Tensor, audio_attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode a zero-padded batch.

        Args:
            audio: `[B, S]` or `[S]` at 16 kHz.
            audio_attention_mask: `[B, S]`, 1 for the samples of each clip. By default, clips have
                no padding.

        Returns:
            Frames `[B, T, D]`, one every 20 ms, and their mask `[B, T]`.
        """
        audio = audio[None] if audio.ndim == 1 else audio
        samples = [audio.shape[1]] * len(audio)
        if audio_attention_mask is not None:
            samples = audio_attention_mask.sum(-1).tolist()
        clips = [
            clip[: max(int(length), HOP_SAMPLES)]
            for clip, length in zip(audio.float().cpu(), samples, strict=True)
        ]
        frames = self.inner.encode(clips, SAMPLE_RATE_HZ)
        masks = [torch.ones(len(clip), dtype=torch.long) for clip in frames]
        # Copies, because a projector cannot be trained on tensors made in inference mode.
        return (
            pad_sequence(frames, batch_first=True).to(audio.device),
            pad_sequence(masks, batch_first=True).to(audio.device),
        )
