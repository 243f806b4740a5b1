"""Export an encoder as one float32 ONNX graph that maps a waveform to frames.

The graph takes `waveform` `[S]` at 16 kHz, from `MIN_SAMPLES` to 30 s, and returns `frames`
`[T, D]`, one every 20 ms. It includes the log-mel and removes the padding, so it runs without
PyTorch and without a feature extractor. Frames equal the encoder's to a relative error of 1e-5
(the norm of the difference over the norm of the frames).
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
    silence_level,
)
from whisper_aut.errors import require
from whisper_aut.models.encoder import CONV_STRIDE, Padding

GRAPH = "encoder.onnx"
OPSET = 18
# 25 ms. The reflect padding of half a window needs enough samples to mirror.
MIN_SAMPLES = WINDOW_SAMPLES
EXAMPLE_SAMPLES = 3 * 16_000 + 77


class WaveformEncoder(nn.Module):
    """Log-mel and encoder for one clip, in a form that `torch.export` can trace.

    Unlike `PackedEncoder` it has no packing and no loops over blocks, and every shape is a
    function of S.

    Args:
        whisper: The encoder whose layers and weights are used.
        padding: The padding mode, `none` or `30s`, as in `PackedEncoder`.
    """

    spectrum: Tensor
    filters: Tensor

    def __init__(self, whisper: WhisperEncoder, padding: Padding):
        super().__init__()
        self.whisper, self.padding = whisper, padding
        logmel = LogMel(whisper.config.num_mel_bins)
        # The spectrum is a convolution with windowed sines and cosines: every ONNX runtime has
        # convolutions, while few have a Fourier transform.
        bins = torch.arange(len(logmel.filters), dtype=torch.float64)
        angle = 2 * pi / WINDOW_SAMPLES * bins[:, None] * torch.arange(WINDOW_SAMPLES)
        window = torch.hann_window(WINDOW_SAMPLES, dtype=torch.float64)
        waves = torch.cat([angle.cos() * window, angle.sin() * window])[:, None]
        self.register_buffer("spectrum", waves.float())
        self.register_buffer("filters", logmel.filters.T.contiguous())

    def forward(self, waveform: Tensor) -> Tensor:
        """Encode a waveform `[S]` at 16 kHz into its valid frames `[T, D]`."""
        samples = waveform.shape[0]
        valid = (samples + HOP_SAMPLES - 1) // HOP_SAMPLES
        mel = self._log_mel(waveform, torch.sym_min(valid + CONTEXT_FRAMES, MAX_MEL_FRAMES))
        if self.padding == "30s":
            silence = silence_level(mel).expand(mel.shape[0], MAX_MEL_FRAMES)
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
        """Return the log-mel `[M, frames]` of a waveform `[S]`, as `audio.logmel` computes it.

        The clip is filled with zeros to 30 s, then reflect-padded at both ends.
        """
        half = WINDOW_SAMPLES // 2
        recording = torch.cat([waveform, waveform.new_zeros(MAX_SAMPLES)])[:MAX_SAMPLES]
        padded = torch.cat(
            [recording[1 : half + 1].flip(0), recording, recording[-half - 1 : -1].flip(0)]
        )
        used = padded[: (frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES]
        real, imaginary = conv1d(used[None, None], self.spectrum, stride=HOP_SAMPLES)[0].chunk(2)
        mel = (self.filters @ (real.square() + imaginary.square())).clamp(min=LOG_FLOOR).log10()
        return (torch.maximum(mel, mel.max() - DYNAMIC_RANGE) + 4.0) * 0.25


def write_onnx(whisper: WhisperEncoder, padding: Padding, out: Path) -> Path:
    """Write `encoder.onnx` into a folder, and return its path.

    The encoder is converted to float32 in place. The padding mode is built into the graph.

    Raises:
        UserError: The packages that write ONNX are not installed.
    """
    require("onnx", "onnxscript")
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
    """Apply a transformer layer to `[T, D]`, in the order of `WhisperEncoderLayer.forward`."""
    attention = layer.self_attn
    normed = layer.self_attn_layer_norm(hidden)
    heads = (attention.num_heads, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (project(normed).unflatten(-1, heads).transpose(0, 1) for project in projections)
    # PyTorch's fused attention checks shapes in ways that fail for a graph of dynamic length.
    attended = torch.softmax(q @ k.transpose(-1, -2) * attention.scaling, dim=-1) @ v
    hidden = hidden + attention.out_proj(attended.transpose(0, 1).flatten(-2))
    return hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))


@contextlib.contextmanager
def _quiet():
    """Silence the exporter's progress and its optimisation warnings. Real problems still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
