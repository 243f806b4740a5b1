"""Encoders as probes see them: the interface, the log-mel baseline, choice of layers, and cost."""

import platform
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from whisper_aut.audio.decode import SAMPLE_RATE_HZ, to_mono_16k
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import encode_in_batches

BASELINE_NAME = "log-mel statistics"
BASELINE_VERSION = 1
HOP_SECONDS = (5, 10)  # AST and CLAP take pieces of 10 s, so not more
CLIP_SECONDS = 10
CPU_CLIPS, GPU_CLIPS = 2, 16  # per batch
TIMED_PASSES = 2  # the fastest counts


class FrameEncoder(Protocol):
    """Interface of an encoder to probe, such as `inference.encoder.AudioEncoder`.

    Optional attributes: `layers` (the number of layers, if `encode` can return single layers),
    `padding` (the padding mode), `pooling` (overrides the pooling of the run), and
    `selected_layers` (overrides the layers of the run).
    """

    def encode(
        self,
        waveforms: Sequence[Tensor],
        sample_rate_hz: int,
        /,
        layers: Sequence[int] = (),
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> list[Tensor]:
        """Return the valid frames `[T, D]` of each waveform `[S]`, or `[layers, T, D]` of the given
        layers, where layer 0 is the input of the first layer.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash of everything that the encoder's output depends on."""
        ...


class LogMelBaseline:
    """An "encoder" whose frames are log-mel frames, pooled by mean and standard deviation."""

    pooling = "mean_std"

    def __init__(self, num_mel_bins: int = 80):
        self.width = num_mel_bins
        self._log_mel = LogMel(num_mel_bins)

    @torch.no_grad()
    def encode(
        self,
        waveforms: Sequence[Tensor | np.ndarray],
        sample_rate_hz: int,
        layers: Sequence[int] = (),
        *,
        batch_seconds: float = BATCH_SECONDS,
    ) -> list[Tensor]:
        """Return the frames `[F, M]` of each waveform `[S]`, without those after its end."""
        samples = [torch.as_tensor(waveform) for waveform in waveforms]
        if sample_rate_hz != SAMPLE_RATE_HZ:
            samples = [to_mono_16k(clip.numpy(), sample_rate_hz) for clip in samples]
        return encode_in_batches(self._encode, samples, batch_seconds=batch_seconds)

    def _encode(self, waveforms: list[Tensor]) -> list[Tensor]:
        return [self._log_mel(clip)[: mel_frames(len(clip))] for clip in waveforms]

    def fingerprint(self) -> str:
        return f"log-mel-{BASELINE_VERSION}-{self.width}"


def select_layers(encoder: FrameEncoder, layers: Sequence[int]) -> FrameEncoder:
    """Return an encoder with the same weights, of which probes see these layers, side by side."""
    view: Any = copy(encoder)
    view.selected_layers = tuple(layers)
    return view


def layer_indices(encoder: FrameEncoder) -> list[int]:
    """Return the indices of all layers, from 0, the input of the first one.

    Raises:
        UserError: the encoder returns no single layers.
    """
    layers = getattr(encoder, "layers", -1)
    if layers < 0:
        raise UserError(
            f"{type(encoder).__name__} returns no single layers: probe its output, with a kind of "
            "probe that needs no layers."
        )
    return list(range(layers + 1))


def noise(seconds: float) -> Tensor:
    """Return quiet noise `[S]`, always the same, to measure encoders with."""
    generator = torch.Generator().manual_seed(0)
    return 0.01 * torch.randn(round(seconds * SAMPLE_RATE_HZ), generator=generator)


def hop_seconds_of(encoder: FrameEncoder) -> float:
    """Return the frame hop of an encoder in seconds, from the frames that 5 s more of noise give.

    A single length is not enough: convolutions without padding lose frames at the ends of a clip.

    Raises:
        UserError: a longer clip does not give more frames.
    """
    short, long = (len(encoder.encode([noise(s)], SAMPLE_RATE_HZ)[0]) for s in HOP_SECONDS)
    if long <= short:
        raise UserError(
            f"{type(encoder).__name__} gives {short} frames for {HOP_SECONDS[0]} s and {long} for "
            f"{HOP_SECONDS[1]} s of audio: it has no frame rate, so it cannot be scored on "
            "segments."
        )
    return (HOP_SECONDS[1] - HOP_SECONDS[0]) / (long - short)


@dataclass(frozen=True)
class EncoderCost:
    """The cost of an encoder, measured on clips of 10 s.

    Attributes:
        fingerprint: hash of the encoder.
        parameters: number of parameters; 0 without any.
        width: size of a frame, D.
        frames_per_second: frame rate; None if the number of frames does not grow with a clip.
        gflops_per_second: billions of operations per second of audio, forward pass: matrix
            products, convolutions and attention at two operations per multiply-add.
        ms_per_second: milliseconds per second of audio, from waveform to frames.
        machine: what it was timed on.
    """

    fingerprint: str
    parameters: int
    width: int
    frames_per_second: float | None
    gflops_per_second: float
    ms_per_second: float
    machine: str


def measure_cost(encoder: FrameEncoder, fingerprint: str) -> EncoderCost:
    """Encode a batch of clips of 10 s, and count and time it."""
    parameters = list(encoder.parameters()) if isinstance(encoder, torch.nn.Module) else []
    device = parameters[0].device if parameters else torch.device("cpu")
    on_gpu = device.type == "cuda"
    clips = [noise(CLIP_SECONDS)] * (GPU_CLIPS if on_gpu else CPU_CLIPS)
    seconds = CLIP_SECONDS * len(clips)
    # In inference mode, the hooks of the counter fail on parameters that need a gradient.
    trained = [
        parameter.requires_grad_(False) for parameter in parameters if parameter.requires_grad
    ]
    with FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter:
        frames = encoder.encode(clips, SAMPLE_RATE_HZ)[0]
    for parameter in trained:
        parameter.requires_grad_(True)
    passes = []
    for _ in range(TIMED_PASSES):
        start = time.perf_counter()
        encoder.encode(clips, SAMPLE_RATE_HZ)  # the frames are on the CPU when it returns
        passes.append(time.perf_counter() - start)
    try:
        frame_rate = 1 / hop_seconds_of(encoder)
    except UserError:
        frame_rate = None
    threads = torch.get_num_threads()
    cpu = f"CPU ({platform.machine()}), {threads} thread{'s' * (threads > 1)}"
    return EncoderCost(
        fingerprint,
        sum(parameter.numel() for parameter in parameters),
        frames.shape[-1],
        frame_rate,
        counter.get_total_flops() / seconds / 1e9,
        1000 * min(passes) / seconds,
        torch.cuda.get_device_name(device) if on_gpu else cpu,
    )


def _uncounted() -> dict[Any, Any]:
    """Return FLOP formulas of the operations that PyTorch's counter leaves out on CPUs."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def linear(features: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * torch.Size(features).numel() * weight[0]

    found: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found[torch.ops.mkldnn._linear_pointwise] = linear
    return found
