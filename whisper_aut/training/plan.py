"""Forecasts the parameters, memory, FLOPs and time of a training step from sizes alone.

A forward and backward pass runs on PyTorch's fake tensors, which have shapes but no memory, while
kernels and live bytes are counted. The decoder comes from the `build_meta` of its registry entry.
ZeRO's memory per rank follows Rajbhandari et al. 2020, arXiv 1910.02054, section 3.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.audio.logmel import WINDOW_SECONDS, frames_with_context
from whisper_aut.config import ModelSettings, Settings
from whisper_aut.data.batch import Targets
from whisper_aut.data.settings import DataSettings
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import PackedEncoder, Padding, add_lora, encoder_frames
from whisper_aut.models.flops import encoder_flops
from whisper_aut.models.pretrained import load_whisper_config, whisper_config_of_size
from whisper_aut.models.tiny import WHISPER_SPECIAL_TOKENS
from whisper_aut.training.checkpoint import MOMENT_BYTES
from whisper_aut.training.factory import open_sources, read_policy, select_sources, source_weights

GIBIBYTE = 2**30
# Bytes that clipping and a fused AdamW read and write per float32 parameter: 8 for the gradient
# norm, which `Guard` and Lightning compute, 8 for scaling the gradient, 28 for the update.
UPDATE_BYTES = 44
PRODUCT_EFFICIENCY = 0.6  # fraction of peak FLOP/s that matrix products reach
MEMORY_EFFICIENCY = 0.8  # fraction of peak bandwidth that all other kernels reach
LAUNCH_SECONDS = 10e-6  # per kernel, without compilation; dominates in small models
RESERVED_GIB = 2.0  # CUDA context, cuBLAS, communication buffers, fragmentation
# Audio-seconds per second of one core, from FLAC in tars to packed log-mels: 1,670 to 1,780 on an
# AMD EPYC (the part `worker` of benchmarks/gpu_check.sh).
CORE_AUDIO_SECONDS = 1_700
# What a forecast assumes when the training shards cannot be read. FLAC is 16 kHz mono.
ASSUMED_CLIP_SECONDS, ASSUMED_TOKENS, FLAC_BYTES_PER_SECOND = 10.0, 32, 19_000
STAGES = ("one device or ddp", "ZeRO-1", "ZeRO-2 or FSDP", "ZeRO-3")
Compute = Literal["float32", "autocast", "bfloat16"]

_ATEN: Any = torch.ops.aten
_FLOPS: dict[Any, Any] = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v)
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}
# Operators that compute nothing.
_EMPTY = {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty}
# Operators that read only those parts of a table that they return.
_GATHER = {_ATEN.embedding, _ATEN.gather, _ATEN.index, _ATEN.index_select}


class Accelerator(NamedTuple):
    """Specifications of a device. `part` is contained in `torch.cuda.get_device_name`.

    TFLOP/s are peaks: in 16 bits, and in float32 computed as TF32.
    """

    name: str
    part: str
    memory_gib: float
    half_tflops: float
    single_tflops: float
    terabytes_per_second: float

    def peak_flops(self, precision: str) -> float:
        """Return the peak FLOP/s in one of Lightning's precisions."""
        return 1e12 * (self.single_tflops if precision.startswith("32") else self.half_tflops)


# The first match is used, so a longer `part` comes before any that it contains.
ACCELERATORS = (
    Accelerator("H200 141 GB", "H200", 140.0, 989.0, 494.5, 4.8),
    Accelerator("H100 PCIe 80 GB", "H100 PCIe", 79.0, 756.0, 378.0, 2.0),
    Accelerator("H100 NVL 94 GB", "H100 NVL", 93.0, 835.0, 417.5, 3.9),
    Accelerator("H100 80 GB", "H100", 79.0, 989.0, 494.5, 3.35),
    Accelerator("A100 80 GB", "A100", 79.0, 312.0, 156.0, 2.039),
    Accelerator("A100 40 GB", "A100", 39.0, 312.0, 156.0, 1.555),
    Accelerator("RTX 4090 24 GB", "RTX 4090", 23.5, 165.2, 82.6, 1.008),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device by `torch.cuda.get_device_name`, or None if unknown."""
    known = (device for device in ACCELERATORS if device.part in device_name)
    return next((device.peak_flops(precision) for device in known), None)


@dataclass(frozen=True)
class StepShape:
    """Sizes of a micro-batch on one device, and how the model computes it.

    `mel_lengths` are the mel frames F of each clip, `text_lengths` its tokens L. The first `padded`
    clips are padded to 30 s with padding none too. `compute` is `float32`; `autocast`, which is
    bfloat16 autocast over float32 weights; or `bfloat16`, a model in bfloat16 as under DeepSpeed.
    `lora_rank` is that of the encoder, 0 for none.
    """

    mel_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    padding: Padding = "none"
    padded: int = 0
    compute: Compute = "float32"
    gradient_checkpointing: bool = False
    train_encoder: bool = True
    lora_rank: int = 0


@dataclass(frozen=True)
class StepCost:
    """Cost of a micro-batch on one device.

    Attributes:
        encoder, decoder, trainable: Numbers of parameters.
        model_flops: Useful FLOPs of the forward and backward pass: every product counts once, and
            only for the clips' own frames and tokens. `flops` also includes padding and what
            gradient checkpointing and attention recompute.
        kernels: (FLOPs, bytes read and written, number of launches) of each kind of kernel.
        activation_bytes: Peak bytes of activations and temporary buffers, without weights and
            gradients.
        peak_bytes: Peak bytes of the same plus the gradients that exist by then, for a step that
            begins without gradients.
        in_half: Number of parameters in 16 bits where all others are in float32, as in a frozen
            language model with `decoder.dtype=bfloat16`.
    """

    encoder: int
    decoder: int
    trainable: int
    model_flops: float
    kernels: tuple[tuple[float, int, int], ...]
    activation_bytes: int
    peak_bytes: int
    in_half: int = 0

    @property
    def parameters(self) -> int:
        return self.encoder + self.decoder

    @property
    def flops(self) -> float:
        """All FLOPs that the device computes, as hardware utilisation counts them."""
        return sum(flops * count for flops, _, count in self.kernels)

    @property
    def launches(self) -> int:
        return sum(count for *_, count in self.kernels)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the time of all kernels, each limited by either compute or memory bandwidth."""
        return sum(
            max(flops / flops_per_second, moved / bytes_per_second) * count
            for flops, moved, count in self.kernels
        )


def step_cost(
    config: WhisperConfig, build_meta: Callable[[WhisperConfig, bool], nn.Module], shape: StepShape
) -> StepCost:
    """Return the cost of a micro-batch, measured on fake tensors.

    `build_meta` builds a decoder without weights from `(config, gradient_checkpointing)`.
    """
    with FakeTensorMode(), _modules_stay():
        encoder = PackedEncoder(
            WhisperEncoder(config), shape.padding, shape.gradient_checkpointing
        ).train()
        encoder.requires_grad_(shape.train_encoder)
        if shape.lora_rank:
            add_lora(encoder, shape.lora_rank, shape.lora_rank)
        encoder.whisper.embed_positions.requires_grad_(False)
        decoder: Any = build_meta(config, shape.gradient_checkpointing).train()
        modules = nn.ModuleList([encoder, decoder])
        tensors = [*modules.parameters(), *modules.buffers()]
        trainable = [p for p in modules.parameters() if p.requires_grad]
        half = shape.compute == "bfloat16"
        dtype = torch.bfloat16 if half else torch.float32
        for tensor in filter(torch.is_floating_point, tensors if half else trainable):
            tensor.data = tensor.data.to(dtype)
        in_half = 0 if half else sum(p.numel() for p in modules.parameters() if p.itemsize == 2)
        counter = StepCounter(tensors)
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(counter.set_gradient_apart)
        lengths = [encoder_frames(length) for length in shape.mel_lengths]
        targets = placeholder_targets(shape.text_lengths)
        mel_frames = sum(map(frames_with_context, shape.mel_lengths))
        mel = torch.empty(mel_frames, encoder.num_mel_bins, dtype=dtype)
        with counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=shape.compute == "autocast"):
                padded = [index < shape.padded for index in range(len(lengths))]
                layers = getattr(decoder, "encoder_layers", ())
                frames = encoder(mel, shape.mel_lengths, bool(layers), padded).of_layers(layers)
                loss = decoder.loss(frames.values, frames.lengths, targets).total
            loss.backward()
        useful = encoder_flops(
            *(config, shape.mel_lengths, lengths),
            trained=shape.train_encoder,
            frozen_weights=shape.lora_rank > 0,
        )
        useful += decoder.flops(lengths, targets, through_frames=shape.train_encoder)
    return StepCost(
        encoder=sum(p.numel() for p in encoder.parameters()),
        decoder=sum(p.numel() for p in decoder.parameters()),
        trainable=sum(p.numel() for p in trainable),
        model_flops=useful,
        kernels=tuple((*work, count) for work, count in counter.kernels.items()),
        activation_bytes=counter.peak,
        peak_bytes=counter.peak_with_gradients,
        in_half=in_half,
    )


@contextmanager
def _modules_stay() -> Iterator[None]:
    """Let `Module.to`, which fails for fake tensors, do nothing. Adding LoRA calls it."""
    move = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.to = move


class StepCounter(TorchDispatchMode):
    """Counts the kernels of a step and the bytes of all live tensors that they create.

    Works with real and fake tensors. The bytes of the tensors in `present` are not counted.
    """

    def __init__(self, present: Sequence[Tensor] = ()):
        super().__init__()
        self.kernels: Counter[tuple[float, int]] = Counter()
        self.now = self.gradients = self.peak = self.peak_with_gradients = 0
        self._known: dict[int, Any] = {}
        for storage in (tensor.untyped_storage() for tensor in present):
            self._known[id(storage)] = storage

    def set_gradient_apart(self, parameter: Tensor) -> None:
        """Count a complete gradient as a gradient, no longer as an activation."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self._forget(id(storage), storage.nbytes())
        self._known[id(storage)] = storage
        self.gradients += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not outputs:  # `prim.device` and the like, which run on the host
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {id(tensor.untyped_storage()) for tensor in inputs}
        is_view = all(id(tensor.untyped_storage()) in given for tensor in outputs)
        operator = func._overloadpacket
        if operator not in _EMPTY and (func._schema.is_mutable or not is_view):
            flops = _FLOPS[operator](*args, **kwargs, out_val=out) if operator in _FLOPS else 0
            written = sum(tensor.nbytes for tensor in outputs)
            sizes = [tensor.nbytes for tensor in inputs]
            read = sum(min(size, written) if operator in _GATHER else size for size in sizes)
            self.kernels[flops, written + read] += 1
        for tensor in outputs:
            self._track(tensor.untyped_storage())
        # The backward pass sums gradients in place. With fake tensors it allocates a new tensor
        # for the sum, which must not raise the peak.
        if func is not _ATEN.add.Tensor or torch.is_grad_enabled():
            self.peak = max(self.peak, self.now)
            self.peak_with_gradients = max(self.peak_with_gradients, self.now + self.gradients)
        return out

    def _track(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class DeviceMemory(NamedTuple):
    """Peak memory of one device during a step, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def placeholder_targets(lengths: Sequence[int]) -> Targets:
    """Return packed targets of these lengths, with every token but the first supervised.

    This does not read the values of tensors, which fake tensors do not have.
    """
    count = sum(lengths) - len(lengths)
    return Targets(
        tokens=torch.zeros(sum(lengths), dtype=torch.long),
        supervised=torch.ones(sum(lengths), dtype=torch.bool),
        label_indices=torch.ones(count, dtype=torch.long),
        lengths=tuple(lengths),
        prompt_lengths=(1,) * len(lengths),
        counts=tuple(length - 1 for length in lengths),
    )


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run.

    Attributes:
        cost_of: Returns the cost of a micro-batch for (model in bfloat16, gradient checkpointing).
        stage: Configured ZeRO stage; 0 for none.
        offload: Whether the optimizer state is in host memory.
        checkpointing: Whether to recompute activations; `auto` on devices that need it.
        precision: Lightning's precision. 16 bits mean autocast, or a model in bfloat16 under
            DeepSpeed.
        micro_batches: Micro-batches in an optimizer step.
        steps: Optimizer steps of the run; None if unknown.
        step_audio_seconds: Seconds of audio on one device in an optimizer step.
        bytes_per_audio_second: Bytes in the shards for a second of audio.
        assumptions: What was assumed because neither the config nor the shards say it.
        average_ranks: Number of ranks over which a moving average of the trained weights is
            sharded; 0 without one. It counts as optimizer state.
    """

    cost_of: Callable[[bool, bool], StepCost]
    ranks: int
    stage: int
    offload: bool
    precision: str
    checkpointing: bool | Literal["auto"]
    micro_batches: int
    steps: int | None
    step_audio_seconds: float
    bytes_per_audio_second: float
    assumptions: tuple[str, ...] = ()
    average_ranks: int = 0

    @property
    def cost(self) -> StepCost:
        return self.cost_of(self._half_weights(self.stage), self.checkpointing is True)

    def recomputes(self, memory_gib: float) -> bool:
        """Return whether activations are recomputed on a device with this memory."""
        if self.checkpointing != "auto":
            return self.checkpointing
        needed = self.memory(self.stage, checkpointing=False).total / GIBIBYTE
        return needed + RESERVED_GIB > memory_gib

    def cost_on(self, device: Accelerator) -> StepCost:
        """Return the cost of a micro-batch on a device."""
        recomputes = self.recomputes(device.memory_gib)
        return self.cost_of(self._half_weights(self.stage), recomputes)

    def memory(self, stage: int, checkpointing: bool) -> DeviceMemory:
        """Return the peak memory of a device with this ZeRO stage and checkpointing.

        As in DeepSpeed, gradients of 16-bit weights are summed in float32, and the optimizer state
        includes a float32 copy of the weights.
        """
        half, ranks = self._half_weights(stage), self.ranks
        cost, size = self.cost_of(half, checkpointing), 2 if half else 4
        states = MOMENT_BYTES + (4 if half else 0)
        on_host = self.offload and stage > 0  # the optimizer state and the summed gradients
        gradients = cost.trainable * 4 / (ranks if stage >= 2 else 1)
        # The gradient buckets of DDP and ZeRO are kept between steps.
        lasting = stage > 0 or ranks > 1 or self.micro_batches > 1
        average = cost.trainable * 4 / self.average_ranks if self.average_ranks else 0.0
        optimizer = cost.trainable * states / (ranks if stage >= 1 else 1)
        return DeviceMemory(
            weights=(cost.parameters * size - 2 * cost.in_half) / (ranks if stage >= 3 else 1),
            gradients=0.0 if on_host else gradients,
            optimizer=average + (0.0 if on_host else optimizer),
            activations=float(
                cost.activation_bytes if lasting else max(0.0, cost.peak_bytes - gradients)
            ),
        )

    def step_seconds(self, device: Accelerator) -> float:
        """Return the estimated seconds of an optimizer step, without communication."""
        cost, moved = self.cost_on(device), MEMORY_EFFICIENCY * 1e12 * device.terabytes_per_second
        kernels = cost.seconds(PRODUCT_EFFICIENCY * device.peak_flops(self.precision), moved)
        updated = cost.trainable / (self.ranks if self.stage else 1)
        update = 0.0 if self.offload else updated * UPDATE_BYTES / moved
        return self.micro_batches * max(kernels, cost.launches * LAUNCH_SECONDS) + update

    def utilisation(self, device: Accelerator) -> tuple[float, float]:
        """Return two fractions of peak FLOP/s: of useful FLOPs (MFU) and of all FLOPs."""
        peak = self.step_seconds(device) * device.peak_flops(self.precision) / self.micro_batches
        cost = self.cost_on(device)
        return cost.model_flops / peak, cost.flops / peak

    def fits(self, device: Accelerator, memory: DeviceMemory) -> bool:
        return memory.total / GIBIBYTE + RESERVED_GIB <= device.memory_gib

    def what_fits(self, device: Accelerator) -> str:
        """Return the smallest change with which the run fits in the device's memory.

        Tries gradient checkpointing first, then higher ZeRO stages.
        """
        recomputes = self.recomputes(device.memory_gib)
        if self.fits(device, self.memory(self.stage, recomputes)):
            by_itself = recomputes and self.checkpointing == "auto"
            return "fits with gradient checkpointing" if by_itself else "fits as it is"
        for stage in range(self.stage, len(STAGES) if self.ranks > 1 else self.stage + 1):
            for checkpointing, extra in ((False, ""), (True, " + gradient checkpointing")):
                if self.fits(device, self.memory(stage, checkpointing)):
                    return STAGES[stage] + extra
        return "too large: lower data.batch_clips" + ("" if self.ranks > 1 else " or add devices")

    def _half_weights(self, stage: int) -> bool:
        return stage > 0 and not self.precision.startswith("32")


def build_forecast(settings: Settings, config: WhisperConfig) -> Forecast:
    """Forecast the cost of a run. Reads the shard indexes if they exist, and nothing else.

    Raises:
        UserError: If the decoder has no `build_meta`, or no clip of a training source is left.
    """
    entry, options = check_decoder(settings.decoder)
    build_meta = entry.build_meta
    if build_meta is None:
        raise UserError(
            f"Runs with the decoder {settings.decoder['name']!r} cannot be planned: its registry "
            "entry has no `build_meta`."
        )
    data, hardware, trainer = settings.data, settings.hardware, settings.trainer
    stored, assumptions = stored_audio(data)
    ranks = (hardware.devices if isinstance(hardware.devices, int) else 1) * hardware.nodes
    precision = hardware.precision
    if precision == "auto":  # every device in the table supports bfloat16
        precision = "32-true" if hardware.accelerator == "cpu" else "bf16-mixed"
    batch_clips, pads = data.batch_clips, settings.model.pad_to_30s
    if data.batch_seconds:
        mean_seconds = stored.clip_seconds + pads * (WINDOW_SECONDS - stored.clip_seconds)
        batch_clips = max(1, round(data.batch_seconds / mean_seconds))

    @cache
    def cost_of(half_weights: bool, checkpointing: bool) -> StepCost:
        autocast = not precision.startswith("32")
        shape = StepShape(
            mel_lengths=(max(1, round(100 * stored.clip_seconds)),) * batch_clips,
            text_lengths=(ASSUMED_TOKENS,) * batch_clips,
            padding=settings.model.padding,
            padded=math.ceil(pads * batch_clips),
            compute="bfloat16" if half_weights else "autocast" if autocast else "float32",
            gradient_checkpointing=checkpointing,
            train_encoder=not settings.model.freeze_encoder,
            lora_rank=settings.model.lora_rank,
        )
        return step_cost(
            config, lambda config, checkpointing: build_meta(config, options, checkpointing), shape
        )

    clips = data.samples_per_epoch or stored.clips
    steps_per_epoch = clips // (batch_clips * ranks * trainer.accumulate)
    limits = (trainer.max_epochs * steps_per_epoch, trainer.max_steps)
    assumptions += (f"{ASSUMED_TOKENS} text tokens per clip, all clips of the mean length",)
    if pads:
        assumptions += (f"{math.ceil(pads * batch_clips)} of {batch_clips} clips padded to 30 s",)
    if settings.strategy.offload:
        assumptions += ("updating the weights on the host takes no time",)
    sharded = settings.strategy.name == "fsdp"
    return Forecast(
        cost_of=cost_of,
        ranks=ranks,
        stage=2 if sharded else settings.strategy.zero_stage,
        offload=settings.strategy.offload,
        precision=precision,
        checkpointing=settings.model.gradient_checkpointing,
        micro_batches=trainer.accumulate,
        steps=min((steps for steps in limits if steps), default=None),
        step_audio_seconds=stored.clip_seconds * batch_clips * trainer.accumulate,
        bytes_per_audio_second=stored.bytes_per_second,
        assumptions=assumptions,
        average_ranks=(ranks if sharded else 1) if settings.optim.ema_decay else 0,
    )


def needs_checkpointing(settings: Settings) -> bool:
    """Return whether a run uses gradient checkpointing on this machine.

    With `auto`, it does on a GPU on which its forecast does not fit otherwise, or that has none.
    """
    chosen, hardware = settings.model.gradient_checkpointing, settings.hardware
    if chosen != "auto":
        return chosen
    if hardware.accelerator == "cpu" or not torch.cuda.is_available():
        return False
    try:
        forecast = build_forecast(settings, planned_config(settings.model))
    except UserError:
        return True
    return forecast.recomputes(torch.cuda.get_device_properties(0).total_memory / GIBIBYTE)


def planned_checkpoint_bytes(settings: Settings) -> int:
    """Return the approximate size of a checkpoint in bytes, or 0 if the run cannot be forecast."""
    try:
        cost = build_forecast(settings, planned_config(settings.model)).cost
    except UserError:
        return 0
    model, average = settings.model, 4 if settings.optim.ema_decay else 0
    frozen = cost.encoder if model.freeze_encoder or model.lora_rank else 0  # it is saved too
    return (4 + MOMENT_BYTES + average) * cost.trainable + 4 * frozen


class StoredAudio(NamedTuple):
    """Size of the training data: clips (0 if unknown), and means over the clips that are drawn."""

    clips: int
    clip_seconds: float
    bytes_per_second: float


def stored_audio(data: DataSettings) -> tuple[StoredAudio, tuple[str, ...]]:
    """Return the size of the training data, and the assumptions made if it cannot be read.

    Raises:
        UserError: If the config leaves no clip of a source.
    """
    try:
        sources = open_sources(data.train, read_policy(data))
    except UserError:
        sources = []
    indexes = [source.index for source in select_sources(data, sources)] if sources else []
    if not indexes or not all(index.samples and index.seconds for index in indexes):
        assumption = (
            f"clips of {ASSUMED_CLIP_SECONDS:g} s as 16 kHz FLAC, because the training shards "
            "cannot be read"
        )
        return StoredAudio(0, ASSUMED_CLIP_SECONDS, FLAC_BYTES_PER_SECOND), (assumption,)
    samples = [index.samples for index in indexes]
    by_mixture = data.mode == "mixture"
    weights = source_weights(data, indexes, {**data.domains}) if by_mixture else samples
    # Means are weighted by how often a source is drawn, not by its size.
    seconds = stored_bytes = 0.0
    for weight, index in zip(weights, indexes, strict=True):
        seconds += weight * index.seconds / index.samples
        stored_bytes += (
            weight
            * sum(shard.bytes for shard in index.shards)
            / sum(shard.samples for shard in index.shards)
        )
    return StoredAudio(sum(samples), seconds / sum(weights), stored_bytes / seconds), ()


def planned_config(model: ModelSettings) -> WhisperConfig:
    """Return the config of the model that a run starts from, without loading its weights."""
    if model.scratch is None:
        return load_whisper_config(model.path, model.revision)
    scratch = model.scratch
    # An upper bound: a tokenizer trained on few texts has fewer tokens.
    vocabulary = scratch.vocabulary + len(WHISPER_SPECIAL_TOKENS)
    sizes = (scratch.d_model, scratch.encoder_layers, scratch.decoder_layers, scratch.heads)
    return whisper_config_of_size(*sizes, scratch.num_mel_bins, vocabulary)


def forecast_tables(plan: Forecast) -> Iterator[Table | str]:
    """Yield the texts and tables of a forecast for the console."""
    cost, teraflop = plan.cost, plan.micro_batches / 1e12
    yield (
        f"Parameters: encoder {cost.encoder / 1e6:,.1f} M, decoder {cost.decoder / 1e6:,.1f} M, "
        f"trainable {cost.trainable / 1e6:,.1f} M"
    )
    yield (
        f"A step: {cost.model_flops * teraflop:,.3g} useful of {cost.flops * teraflop:,.3g} TFLOP "
        f"per device in {cost.launches * plan.micro_batches:,} kernels, "
        f"{plan.step_audio_seconds:,.0f} audio-seconds per device; {plan.ranks} devices, "
        f"{plan.micro_batches} micro-batches; "
        + (f"{plan.steps:,} steps" if plan.steps else "the number of steps is not known")
    )
    yield _memory_table(plan)
    yield _device_table(plan)
    yield (
        f"Times are estimates: matrix products at {PRODUCT_EFFICIENCY:.0%} of the peak, other "
        f"kernels at {MEMORY_EFFICIENCY:.0%} of the memory bandwidth, "
        f"{1e6 * LAUNCH_SECONDS:.0f} µs per launch; communication, validation and checkpoints are "
        "not counted. MFU counts useful FLOPs, utilisation also those that are recomputed."
    )
    yield from (f"Assumed: {assumption}" for assumption in plan.assumptions)


def _memory_table(plan: Forecast) -> Table:
    table = Table("", title_justify="left")
    table.title = f"GiB per device over {plan.ranks}, at the worst moment of a step"
    parts = ("weights", "gradients", "optimizer", "activations", "total", "with checkpointing")
    for column in parts:
        table.add_column(column, justify="right")
    for stage, name in enumerate(STAGES):
        memory = plan.memory(stage, checkpointing=False)
        checkpointed = plan.memory(stage, checkpointing=True)
        sizes = (*memory, memory.total, checkpointed.total)
        marked = Text(name, style="bold" if stage == plan.stage else "")
        table.add_row(marked, *(f"{size / GIBIBYTE:.2f}" for size in sizes))
    return table


def _device_table(plan: Forecast) -> Table:
    table = Table("device", "what fits", title=f"On {plan.ranks} of these", title_justify="left")
    speeds = ("step", "MFU", "utilisation", "whole run", "audio-s/s", "cores for data")
    for column in (*speeds, "reads MB/s"):
        table.add_column(column, justify="right")
    for device in ACCELERATORS:
        seconds = plan.step_seconds(device)
        audio = plan.ranks * plan.step_audio_seconds / seconds
        table.add_row(
            device.name,
            plan.what_fits(device),
            f"{seconds:.3g} s",
            *(f"{fraction:.0%}" for fraction in plan.utilisation(device)),
            str(timedelta(seconds=round(seconds * plan.steps))) if plan.steps else "?",
            f"{audio:,.0f}",
            f"{max(1, -(-audio // CORE_AUDIO_SECONDS)):,.0f}",
            f"{audio * plan.bytes_per_audio_second / 1e6:,.1f}",
        )
    return table
