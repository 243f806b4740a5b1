"""A trained encoder for its users: waveforms in, frames out.

In: a hub id or directory in Hugging Face's Whisper format, and audio at any rate. Out: one `[T, D]` tensor a clip, its valid frames
only. Next: pooling, probes, a language model. `whisper_aut.load_encoder` is this module's function.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from whisper_aut.data.logmel import MAX_SAMPLES, LogMel, mel_frames
from whisper_aut.data.waveform import SAMPLE_RATE_HZ, to_mono_16k
from whisper_aut.errors import UserError
from whisper_aut.model.encoder import PADDINGS, PackedEncoder, Padding
from whisper_aut.model.start import Start, load_whisper_encoder


class AudioEncoder(nn.Module):
    """Log-mel features and a packed encoder, in eval mode.

    Args:
        encoder: the encoder to run.
    """

    def __init__(self, encoder: PackedEncoder):
        super().__init__()
        self.encoder = encoder
        self.logmel = LogMel(encoder.num_mel_bins)
        self.eval()

    @property
    def width(self) -> int:
        """D, the width of a frame."""
        return self.encoder.width

    @property
    def padding(self) -> str:
        return self.encoder.padding

    @property
    def layers(self) -> int:
        """How many layers the encoder has."""
        return len(self.encoder.whisper.layers)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[np.ndarray | Tensor], sample_rate_hz: int, layers: Sequence[int] = ()) -> list[Tensor]:
        """Encode clips of up to 30 s, each `[S]` or `[S, channels]`, of one sampling rate.

        Args:
            layers: give these hidden states in place of the output, numbered as Hugging Face numbers them: 0 is what enters the
                first layer, the last one is the output.

        Returns:
            Per clip its valid frames `[T, D]` (20 ms each), or `[layers, T, D]`, float32 on the CPU.

        Raises:
            ValueError: a clip is empty, not finite, or longer than 30 s.
        """
        clips = [_checked(waveform, number, sample_rate_hz) for number, waveform in enumerate(waveforms)]
        if not clips:
            return []
        device = next(self.parameters()).device
        mel = torch.cat([self.logmel(clip.to(device)) for clip in clips])
        lengths = [mel_frames(len(clip)) for clip in clips]
        if not layers:
            return [clip.float().cpu() for clip in self.encoder(mel, lengths).valid()]
        with hidden_states(self.encoder) as states:
            frames = self.encoder(mel, lengths)
        states.append(frames.values)
        per_layer = [replace(frames, values=states[layer]).valid() for layer in layers]
        return [torch.stack(clip).float().cpu() for clip in zip(*per_layer, strict=True)]

    def fingerprint(self) -> str:
        """Return a hash of the weights and the padding: what decides the frames."""
        digest = hashlib.sha256(self.padding.encode())
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@contextmanager
def hidden_states(encoder: PackedEncoder) -> Iterator[list[Tensor]]:
    """Collect what enters each layer, packed `[ΣT, D]`, while the encoder runs: the input of its first norm."""
    states: list[Tensor] = []
    hooks = [
        layer.self_attn_layer_norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))  # pyright: ignore[reportAttributeAccessIssue]
        for layer in encoder.whisper.layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def load_encoder(
    path_or_hub_id: str,
    *,
    padding: Padding = "none",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str = "",
    random_init: bool = False,
    seed: int = 0,
) -> AudioEncoder:
    """Load the encoder of a Whisper checkpoint: one exported here, or any of the hub's.

    Args:
        path_or_hub_id: a directory in Hugging Face's format, or a hub id such as `openai/whisper-tiny`.
        padding: `none` runs clips at their own length, as encoders trained here expect; `30s` computes what Hugging Face computes.
        device, dtype: where and in which precision it runs.
        revision: branch, tag or commit on the hub.
        random_init: keep the architecture and draw new weights by `seed`: the encoder that has learned nothing.
        seed: of those weights.

    Raises:
        UserError: nothing usable at the path, or an unknown padding.
    """
    if padding not in PADDINGS:
        raise UserError(f"padding must be one of {', '.join(PADDINGS)}, not {padding!r}.")
    if random_init:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            whisper = Start(path_or_hub_id, revision, random_init=True).encoder
    else:
        whisper = load_whisper_encoder(path_or_hub_id, revision)
    return AudioEncoder(PackedEncoder(whisper, padding).to(device=device, dtype=dtype)).to(device)


def _checked(waveform: np.ndarray | Tensor, number: int, sample_rate_hz: int) -> Tensor:
    samples = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    if samples.ndim not in (1, 2) or not len(samples):
        raise ValueError(f"clip {number}: expected [S] or [S, channels] with samples, got shape {samples.shape}")
    if samples.dtype.kind in "iu":
        raise ValueError(f"clip {number}: samples are {samples.dtype}; give floats between -1 and 1")
    if not np.isfinite(samples).all():
        raise ValueError(f"clip {number}: NaN or infinite samples")
    mono = to_mono_16k(samples.astype(np.float32, copy=False), sample_rate_hz)
    if len(mono) > MAX_SAMPLES:
        raise ValueError(f"clip {number}: {len(mono) / SAMPLE_RATE_HZ:.2f} s; the encoder takes up to 30 s at a time")
    return mono
