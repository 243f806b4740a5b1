"""An encoder as one ONNX graph: waveform in, frames out, at the length that the clip has.

In: an encoder and its padding. Out: `encoder.onnx`, float32. Next: onnxruntime on whatever device it knows. The graph holds log-mel,
encoder and the removal of padding, so that a caller needs neither PyTorch nor a feature extractor: `waveform` `[S]` at 16 kHz, from
`MIN_SAMPLES` to 30 s, gives `frames` `[T, D]`, one every 20 ms. They equal the encoder's to a relative error of 1e-5: the norm of
the difference over the norm of the frames. The spectrum is a convolution with windowed sines and cosines, which every runtime has,
where Fourier transforms are rare.
"""

import contextlib
import io
import logging
import warnings
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, gelu
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.audio.logmel import (
    CONTEXT_FRAMES,
    DYNAMIC_RANGE,
    HOP_SAMPLES,
    LOG_FLOOR,
    MAX_MEL_FRAMES,
    MAX_SAMPLES,
    WINDOW_SAMPLES,
    LogMel,
)
from whisper_aut.errors import UserError
from whisper_aut.models.encoder import CONV_STRIDE, Padding

GRAPH = "encoder.onnx"
OPSET = 18
MIN_SAMPLES = WINDOW_SAMPLES  # 25 ms: below, a window would mirror more than there is
EXAMPLE_SAMPLES = 3 * 16_000 + 77


class WaveformEncoder(nn.Module):
    """Log-mel and encoder of one clip, written so that it can be traced: no packing, no loops over blocks, shapes as functions of S.

    Args:
        whisper: whose weights and layers are used.
        padding: `none` or `30s`, as in `PackedEncoder`.
    """

    spectrum: Tensor
    filters: Tensor

    def __init__(self, whisper: WhisperEncoder, padding: Padding):
        super().__init__()
        self.whisper, self.padding = whisper, padding
        logmel = LogMel(whisper.config.num_mel_bins)
        angle = (
            2
            * pi
            * torch.arange(len(logmel.filters)).double()[:, None]
            * torch.arange(WINDOW_SAMPLES)
            / WINDOW_SAMPLES
        )
        window = torch.hann_window(WINDOW_SAMPLES, dtype=torch.float64)
        waves = torch.cat([angle.cos() * window, angle.sin() * window])[:, None]
        self.register_buffer("spectrum", waves.float())
        self.register_buffer("filters", logmel.filters.T.contiguous())

    def forward(self, waveform: Tensor) -> Tensor:
        """`[S]` → `[T, D]`."""
        samples = waveform.shape[0]
        valid = (samples + HOP_SAMPLES - 1) // HOP_SAMPLES
        mel = self._log_mel(waveform, torch.sym_min(valid + CONTEXT_FRAMES, MAX_MEL_FRAMES))
        if self.padding == "30s":
            silence = (mel.max() - DYNAMIC_RANGE / 4.0).expand(mel.shape[0], MAX_MEL_FRAMES)
            mel = torch.cat([mel, silence], 1)[:, :MAX_MEL_FRAMES]
        hidden = gelu(self.whisper.conv1(mel[None]))
        hidden = gelu(self.whisper.conv2(hidden))[0].T
        frames = (valid + CONV_STRIDE - 1) // CONV_STRIDE
        if self.padding == "none":
            hidden = hidden[:frames]
        hidden = hidden + self.whisper.embed_positions.weight[: hidden.shape[0]]
        for layer in self.whisper.layers:
            hidden = _layer(layer, hidden)
        return self.whisper.layer_norm(hidden)[:frames]

    def _log_mel(self, waveform: Tensor, frames: Any) -> Tensor:
        """`[S]` → `[M, F']`, as `data.logmel` computes it: mirrored at the start, and at the end of the 30 s."""
        half = WINDOW_SAMPLES // 2
        recording = torch.cat([waveform, waveform.new_zeros(MAX_SAMPLES)])[:MAX_SAMPLES]
        padded = torch.cat(
            [recording[1 : half + 1].flip(0), recording, recording[-half - 1 : -1].flip(0)]
        )
        seen = padded[: (frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES]
        real, imaginary = conv1d(seen[None, None], self.spectrum, stride=HOP_SAMPLES)[0].chunk(2)
        mel = (self.filters @ (real.square() + imaginary.square())).clamp(min=LOG_FLOOR).log10()
        return (torch.maximum(mel, mel.max() - DYNAMIC_RANGE) + 4.0) * 0.25


def write_onnx(whisper: WhisperEncoder, padding: Padding, out: Path) -> Path:
    """Write `encoder.onnx` into a folder; return its path.

    Raises:
        UserError: the packages that write ONNX are not installed.
    """
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UserError("ONNX needs its packages: pip install 'whisper-aut[onnx]'.") from None
    encoder = WaveformEncoder(whisper.float(), padding).eval()
    samples = torch.export.Dim("samples", min=MIN_SAMPLES, max=MAX_SAMPLES)
    out.mkdir(parents=True, exist_ok=True)
    with _quiet():
        program = torch.onnx.export(
            encoder,
            (torch.randn(EXAMPLE_SAMPLES) * 0.1,),
            dynamo=True,
            input_names=["waveform"],
            output_names=["frames"],
            dynamic_shapes={"waveform": {0: samples}},
            opset_version=OPSET,
        )
    assert program is not None
    program.save(out / GRAPH)
    return out / GRAPH


def _layer(layer: Any, hidden: Tensor) -> Tensor:
    """One transformer layer on `[T, D]`, in the order of `WhisperEncoderLayer.forward`."""
    attention = layer.self_attn
    normed = layer.self_attn_layer_norm(hidden)
    heads = (attention.num_heads, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (project(normed).unflatten(-1, heads).transpose(0, 1) for project in projections)
    # Written out: PyTorch's fused attention asks of shapes what a graph of any length cannot answer.
    attended = torch.softmax(q @ k.transpose(-1, -2) * attention.scaling, dim=-1) @ v
    hidden = hidden + attention.out_proj(attended.transpose(0, 1).flatten(-2))
    return hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))


@contextlib.contextmanager
def _quiet():
    """The exporter prints its progress and warns of what it optimises away; what matters raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
