"""A run told before it starts: parameters, memory, work, time, and what would fit where.

In: the sizes of a model as a `WhisperConfig`, its decoder's sketch, and the batch. Out: a `StepCost`. Next: `training.forecast`.
Nothing is loaded: the step itself runs, forward and backward, on PyTorch's fake tensors, which have shapes and no memory, while its
operations and its live bytes are counted. A decoder joins by its registry entry's `sketch`. ZeRO's shares: Rajbhandari et al. 2020,
arXiv 1910.02054, section 3.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.data.logmel import frames_with_context
from whisper_aut.data.pack import Targets
from whisper_aut.model.encoder import PackedEncoder, Padding

GIBIBYTE = 2**30
ADAM_BYTES = 8  # two float32 moments a parameter
STAGES = ("one device or ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3")
_ATEN: Any = torch.ops.aten
ATTENTION_ON_CPU = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
        sdpa_flop_count(q, k, v)
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


@dataclass(frozen=True)
class StepShape:
    """What a step of one device holds: F and L of each clip of a micro-batch, and how the model runs it."""

    mel_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    padding: Padding = "none"
    half_precision: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class StepCost:
    """What a micro-batch costs one device.

    Attributes:
        encoder, decoder, trainable: parameters.
        flops: forward and backward, recomputation included.
        operations: kernels that are launched.
        live_bytes: at the worst moment of the step, beside weights and gradients: activations and what operations need for
            themselves.
    """

    encoder: int
    decoder: int
    trainable: int
    flops: float
    operations: int
    live_bytes: int

    @property
    def parameters(self) -> int:
        return self.encoder + self.decoder


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, until the tensors die; real and fake tensors alike."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leave out tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        return out

    def _meet(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def step_cost(
    config: WhisperConfig, sketch: Callable[[WhisperConfig, bool], nn.Module], shape: StepShape
) -> StepCost:
    """Run one micro-batch on tensors without memory and count.

    Args:
        config: of the start checkpoint.
        sketch: `(config, gradient_checkpointing)` → decoder without weights.
        shape: the micro-batch.
    """
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU)
    with FakeTensorMode():
        encoder = PackedEncoder(
            WhisperEncoder(config), shape.padding, shape.gradient_checkpointing
        ).train()
        decoder: Any = sketch(config, shape.gradient_checkpointing).train()
        parameters = [*encoder.parameters(), *decoder.parameters()]
        trainable = [
            *(p for p in encoder.parameters() if p.requires_grad),
            *decoder.trainable_parameters(),
        ]
        live = LiveBytes()
        # One after the other: the counter's own hooks would keep alive what gradient checkpointing lets go.
        with counter:
            _step(encoder, decoder, shape)
        gradients = _forget_gradients(trainable)
        live.ignore([*parameters, *encoder.buffers(), *decoder.buffers()])
        with live:
            _step(encoder, decoder, shape)
    return StepCost(
        encoder=sum(p.numel() for p in encoder.parameters()),
        decoder=sum(p.numel() for p in decoder.parameters()),
        trainable=sum(p.numel() for p in trainable),
        flops=float(counter.get_total_flops()),
        operations=live.operations,
        live_bytes=max(0, live.peak - gradients),
    )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def device_memory(
    cost: StepCost, *, stage: int, ranks: int, half_weights: bool, offload: bool = False
) -> DeviceMemory:
    """Return what one of `ranks` devices holds.

    Args:
        stage: 0 for one device or ddp, else ZeRO's.
        half_weights: weights and gradients in two bytes with a float32 master copy beside the moments, as DeepSpeed keeps them
            for half precision; else all in four.
        offload: the optimiser's state lies in the host's memory.
    """
    size = 2 if half_weights else 4
    states = ADAM_BYTES + (4 if half_weights else 0)
    return DeviceMemory(
        weights=cost.parameters * size / (ranks if stage >= 3 else 1),
        gradients=cost.trainable * size / (ranks if stage >= 2 else 1),
        optimizer=0.0 if offload else cost.trainable * states / (ranks if stage >= 1 else 1),
        activations=float(cost.live_bytes),
    )


def _step(encoder: PackedEncoder, decoder: Any, shape: StepShape) -> None:
    mel = torch.empty(sum(map(frames_with_context, shape.mel_lengths)), encoder.num_mel_bins)
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.half_precision):
        frames = encoder(mel, shape.mel_lengths)
        loss = decoder.loss(frames.values, frames.lengths, _targets(shape.text_lengths)).total
    loss.backward()


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> int:
    """Drop the gradients and return the bytes that they took."""
    size = sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    return size


def _targets(lengths: Sequence[int]) -> Targets:
    """Texts of given lengths of which all but the first token are supervised, made without reading a tensor's values."""
    total, starts = sum(lengths), [sum(lengths[:number]) for number in range(len(lengths))]
    places = [place for place in range(total) if place not in set(starts)]
    return Targets(
        tokens=torch.zeros(total, dtype=torch.long),
        supervised=torch.ones(total, dtype=torch.bool),
        places=torch.zeros(len(places), dtype=torch.long),
        lengths=tuple(lengths),
        prompt_lengths=(1,) * len(lengths),
        counts=tuple(length - 1 for length in lengths),
    )
