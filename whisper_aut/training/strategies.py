"""Lightning strategies by name, all with the same checkpoint format.

All strategies write and read the checkpoints of `training.checkpoint`, so a run can be resumed
with another strategy, ZeRO stage or number of ranks. A small subclass runs DeepSpeed on CPU ranks
over gloo, so that the real engine can be tested without a GPU.
"""

import atexit
import copy
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import SUPPORTED_NODES, register_dataclass

from whisper_aut.config import StrategySettings
from whisper_aut.errors import UserError
from whisper_aut.models.encoder import Frames
from whisper_aut.models.losses import DecoderLoss
from whisper_aut.training.checkpoint import (
    CheckpointWriter,
    DeepSpeedState,
    Manifest,
    ModelState,
    StateShard,
    read_optimizer_state,
    read_state,
    read_weights,
    shard_like,
    write_error_message,
)

log = logging.getLogger(__name__)

NO_BFLOAT16 = (
    "This GPU does not support bfloat16, so hardware.precision=auto trains in float32. "
    "hardware.precision=16-mixed is faster on it and may need a lower optim.lr."
)


def build_strategy(
    settings: StrategySettings,
    *,
    ranks: int,
    clips_per_step: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
    async_checkpoints: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Strategy:
    """Return the Lightning strategy of a config.

    Args:
        settings: The strategy and its options. DeepSpeed's override those implied by the name.
        ranks: World size.
        clips_per_step: Number of clips in an optimizer step, recorded in checkpoints.
        accelerator: Lightning's accelerator.
        precision: Lightning's precision, which FSDP implements itself.
        async_checkpoints: Write checkpoints in the background.
        warn: Called with messages about learning rates that differ from the checkpoint, and about
            options that DeepSpeed did not read.

    Raises:
        UserError: If offloading is requested without a GPU.
    """
    timeout = timedelta(minutes=settings.timeout_minutes)
    strategy: Any
    if settings.zero_stage:
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        if settings.offload and not on_gpu:
            raise UserError(
                f"strategy.name={settings.name} moves the optimizer state from the GPU to the CPU, "
                "but this run uses no GPU."
            )
        if not on_gpu:
            # Without this, DeepSpeed uses a GPU if there is one.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        strategy = (DeepSpeed if on_gpu else CPUDeepSpeed)(
            settings.deepspeed,
            stage=settings.zero_stage,
            offload_optimizer=settings.offload,
            timeout=timeout,
        )
    elif settings.name == "fsdp":
        strategy = FSDP(torch.bfloat16 if precision == "bf16-mixed" else None, ranks, timeout)
    elif settings.name == "ddp" or ranks > 1:
        # With bucket views, gradients are in memory only once.
        strategy = DDP(timeout=timeout, gradient_as_bucket_view=True)
    else:
        strategy = SingleDevice(_single_device(accelerator))
    strategy.config_name, strategy.clips_per_step = settings.name, clips_per_step
    strategy.timeout, strategy.warn = timeout, warn
    strategy.background = Background() if async_checkpoints else None
    atexit.unregister(_destroy_process_groups)
    atexit.register(_destroy_process_groups)
    return strategy


def resolve_precision(precision: str, accelerator: str) -> tuple[str, str]:
    """Return the precision to use on this machine, and a hint for the user (may be empty).

    `auto` is `bf16-mixed` on a CUDA device that supports bfloat16, else `32-true`.
    """
    if precision != "auto":
        return precision, ""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true", ""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed", ""
    return "32-true", NO_BFLOAT16


class Background:
    """Runs one function at a time in a thread. `wait` raises the exception that it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the previous work, raising its exception if it failed, and start new work."""
        self.wait()
        # A daemon thread, so that the interpreter does not wait for it after a second Ctrl-C.
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="background", daemon=True
        )
        self._thread.start()
        atexit.register(self._end_process)

    def wait(self) -> None:
        """Wait until the work is done. If it failed, raise its exception, once."""
        if self._thread:
            self._thread.join()
            self._thread = None
            atexit.unregister(self._end_process)
        error, self._error = self._error, None
        if error:
            raise error

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # `wait` raises it in the main thread
            self._error = error

    def _end_process(self) -> None:
        """End the process at exit if the work is still running, as after a second Ctrl-C.

        If a thread is inside C++ code (PyTorch, gloo, safetensors), a normal exit aborts with
        "terminate called without an active exception".
        """
        if self.busy:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


class NamedCheckpoints:
    """Mixin for strategies: checkpoints by parameter name, which all ranks write together.

    Methods that use attributes of the strategy declare `self` as `Any`.
    """

    config_name, clips_per_step = "", 0
    background: Background | None = None
    warn: Callable[[str], None] = staticmethod(lambda _: None)
    timeout = timedelta(minutes=30)
    # The process group of the background threads; training uses the default group meanwhile.
    _writers: Any = None
    _hosts: Any = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def host_group(self) -> Any:
        """The process group for values on the host, over gloo. None means the default group."""
        if self._hosts is None and dist.get_backend() != "gloo":
            self._hosts = dist.new_group(backend="gloo", timeout=self.timeout)
        return self._hosts

    def broadcast_weights(self: Any, module: Any) -> None:
        """Move the weights of a module to the device, and give all ranks those of rank 0.

        Only rank 0 reads them from disk. Otherwise, every rank of a node would have a copy in main
        memory, and every rank would read from the file system.
        """
        device = self.root_device
        teacher = [module.distillation.teacher] if module.distillation else []
        for part in (module, *teacher):
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.to(device)
                dist.broadcast(tensor.data, src=0)
        names = getattr(module.decoder, "from_first_rank", ())
        values = self.broadcast([getattr(module.decoder, name) for name in names])
        for name, value in zip(names, values, strict=True):
            setattr(module.decoder, name, value)
        weights = dict(module.named_parameters())
        module.average = {name: weights[name].detach().clone() for name in module.average}

    def save_checkpoint(
        self: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint directory. Must be called on all ranks; if one cannot write, all
        raise.

        With `background`, this only copies the state, and errors in writing are raised by the next
        call or by `wait_for_checkpoint`.

        Args:
            checkpoint: State of Lightning's loops, callbacks and schedules.
            filepath: Path of the directory.
            storage_options: Called without arguments on rank 0 when the checkpoint is complete.

        Raises:
            UserError: If the disk is full or the directory cannot be written.
        """
        self.wait_for_checkpoint()
        path = Path(self.broadcast(str(filepath)))
        writer = CheckpointWriter(path, self.global_rank, self.world_size)
        shard = self.model_state().collect(writer.rank, writer.ranks)
        tensors = ("state_dict", "optimizer_states")
        state = {key: value for key, value in checkpoint.items() if key not in tensors}
        state |= {"extra": shard.extra, **self._extra_state()}
        manifest = Manifest(
            step=checkpoint["global_step"],
            clips_per_step=self.clips_per_step,
            written_by={
                "strategy": self.config_name,
                "ranks": writer.ranks,
                "precision": str(self.precision_plugin.precision),
            },
            files={},
            aliases=shard.aliases,
        )
        if self.background is None:
            self._write(writer, shard, state, manifest, storage_options)
            return
        if writer.ranks > 1 and self._writers is None:
            self._writers = dist.new_group(backend="gloo", timeout=self.timeout)
        state = copy.deepcopy(state)
        self.background.start(lambda: self._write(writer, shard, state, manifest, storage_options))

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on disk, or raise the error in writing it."""
        if self.background:
            self.background.wait()

    def load_checkpoint(
        self: Any, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read everything but the tensors, which the two `load_*_state_dict` methods read later."""
        path = Path(self.broadcast(str(checkpoint_path)))
        return read_state(path) | {"path": str(path), "state_dict": {}, "optimizer_states": []}

    def load_model_state_dict(
        self: Any, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        path, module = Path(checkpoint["path"]), self.lightning_module
        weights, buffers = read_weights(path), dict(module.named_buffers())
        saved, own = (float(found.get("encoder.lora_scale", 0)) for found in (weights, buffers))
        if saved and own and saved != own:  # exports read the scale from the checkpoint
            raise UserError(
                "model.lora_alpha: the checkpoint was trained with lora_alpha / lora_rank = "
                f"{saved:g}, but this config has {own:g}. Resume with the value of its run."
            )
        self.model_state().load_weights(weights)
        if module.average:  # without one in the checkpoint, it begins at its weights
            stored = read_weights(path, averaged=True)
            weights = dict(module.named_parameters())
            module.average = {
                name: shard_like(stored[name].float(), weights[name]) for name in module.average
            }

    def load_optimizer_state_dict(self: Any, checkpoint: Mapping[str, Any]) -> None:
        self.model_state().load_optimizer_state(read_optimizer_state(Path(checkpoint["path"])))
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        for optimizer, scheduler, state in zip(
            self.optimizers, schedulers, checkpoint["lr_schedulers"], strict=True
        ):
            saved, lrs = state["_last_lr"], _use_config_lrs(scheduler, state)
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            if lrs != saved:
                self.warn(
                    f"The learning rate was {_format_range(saved)} in the checkpoint; this config "
                    f"sets it to {_format_range(lrs)}."
                )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` collects a part of it on each rank

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        """Wait for the last checkpoint, except after a second Ctrl-C, and tear down."""
        try:
            if not isinstance(sys.exception(), KeyboardInterrupt):
                self.wait_for_checkpoint()
        except Exception as error:
            # After successful training, `wait_for_checkpoint` has raised it already. Raising it
            # here would hide the error that ends the run.
            log.warning(
                "The last checkpoint was not written: %s",
                error,
                exc_info=not isinstance(error, UserError),
            )
        if self._writers is not None and not (self.background and self.background.busy):
            dist.destroy_process_group(self._writers)
            self._writers = None
        super().teardown()  # pyright: ignore[reportAttributeAccessIssue]

    def model_state(self: Any) -> ModelState:
        optimizers = self.optimizers
        return ModelState(self.lightning_module, optimizers[0] if optimizers else None)

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _write(
        self,
        writer: CheckpointWriter,
        shard: StateShard,
        state: dict[str, Any],
        manifest: Manifest,
        on_written: Callable[[], None] | None,
    ) -> None:
        first = writer.rank == 0
        self._on_all_ranks(writer, lambda: writer.begin() if first else None)
        written = self._on_all_ranks(writer, lambda: writer.write_tensors(shard))
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}
        complete = replace(manifest, files=files)
        self._on_all_ranks(writer, lambda: writer.finish(state, complete) if first else None)
        if first and on_written:
            on_written()

    def _on_all_ranks(self, writer: CheckpointWriter, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank and return all results. If one rank fails, all ranks raise."""
        result, problem = None, ""
        try:
            result = work()
        except OSError as error:
            problem = write_error_message(writer.path, error)
        outcomes: list[Any] = [(result, problem)]
        if writer.ranks > 1:
            outcomes = [None] * writer.ranks
            dist.all_gather_object(outcomes, (result, problem), group=self._writers)
        if problems := [problem for _, problem in outcomes if problem]:
            if writer.rank == 0:
                writer.discard()
            raise UserError(problems[0])
        return [result for result, _ in outcomes]


class SingleDevice(NamedCheckpoints, SingleDeviceStrategy):
    pass


class DDP(NamedCheckpoints, DDPStrategy):
    pass


class FSDP(NamedCheckpoints, ModelParallelStrategy):
    """PyTorch's FSDP2: float32 weights, gradients and optimizer state are sharded over the ranks.

    Each layer is gathered before its forward pass and kept until its backward pass, after which its
    gradients are summed in float32. This is what ZeRO-2 shards, and all three overlap with the
    computation. See Zhao et al. 2023, arXiv 2304.11277, and `torch.distributed.fsdp.fully_shard`.

    Args:
        compute_dtype: The dtype in which layers are gathered and computed. None for float32.
        ranks: World size.
        timeout: How long a rank waits for the others.
    """

    def __init__(self, compute_dtype: torch.dtype | None, ranks: int, timeout: timedelta):
        super().__init__(ranks, 1, save_distributed_checkpoint=False, timeout=timeout)
        self.compute_dtype = compute_dtype

    def shard(self, module: Any) -> None:
        """Shard the layers of a module, and then the rest. Frozen language models stay whole."""
        if isinstance(module, FSDPModule):  # validation after training
            return
        policy = MixedPrecisionPolicy(
            self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        whole = {weight for weight in module.decoder.parameters() if not weight.requires_grad}
        for weight in whole:
            weight.data = weight.data.to(self.compute_dtype or weight.dtype)
        options: Any = {"mesh": self.device_mesh["data_parallel"], "mp_policy": policy}
        options |= {"ignored_params": whole, "reshard_after_forward": False}
        for owner in (module.encoder, module.decoder):
            lists = (child for child in owner.modules() if isinstance(child, torch.nn.ModuleList))
            layers: Any = next(lists, ())
            for layer in layers:
                if hasattr(owner, "run_layer"):
                    layer.packed = partial(owner.run_layer, layer)
                if any(weight not in whole for weight in layer.parameters()):
                    fully_shard(layer, **options)
                    if hasattr(layer, "packed"):
                        register_fsdp_forward_method(layer, "packed")
        fully_shard(module, **options)
        weights = dict(module.named_parameters())
        module.average = {
            name: shard_like(value, weights[name]) for name, value in module.average.items()
        }
        # FSDP starts the backward pass of the module from its outputs, and looks for them here.
        for kind in (Frames, DecoderLoss):
            if kind not in SUPPORTED_NODES:
                register_dataclass(kind)

    def on_validation_start(self) -> None:
        """Gather the whole model, because ranks generate texts of different lengths."""
        root: Any = self.model
        fully_shard.state(root)._lazy_init()  # finds the root, if no step has run yet
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.unshard()

    def on_validation_end(self) -> None:
        for module in self.model.modules():  # pyright: ignore[reportOptionalMemberAccess]
            if isinstance(module, FSDPModule):
                module.reshard()


class DeepSpeed(NamedCheckpoints, DeepSpeedStrategy):
    """`DeepSpeedStrategy` with any of DeepSpeed's options and named checkpoints."""

    def __init__(self, options: Mapping[str, Any], **arguments: Any):
        super().__init__(**arguments)
        self._options = options
        self._gathered_model = ExitStack()
        self._frozen: dict[str, torch.Tensor] = {}

    def _format_config(self) -> None:
        """Merge the user's options into Lightning's.

        `DeepSpeedStrategy.__init__` takes either a whole config or arguments, not both.
        """
        super()._format_config()
        accumulation: dict[str, Any] = {}
        if str(self.precision_plugin.precision).startswith("bf16"):
            # In bfloat16, a sum over micro-batches loses addends below 0.4 % of it.
            accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
        merged = OmegaConf.merge(self.config or {}, accumulation, dict(self._options))
        self.config = _ReadKeys(OmegaConf.to_container(merged))  # pyright: ignore

    def init_deepspeed(self) -> None:
        from deepspeed.runtime.config import DeepSpeedConfigError

        # Lightning would convert log-mels on the host, which takes them out of pinned memory. The
        # encoder casts them on the device.
        self.precision_plugin.convert_input = lambda data: data
        # The engine rounds frozen weights too, and keeps no float32 copy of them.
        self._frozen = self._frozen or {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.lightning_module.state_dict(keep_vars=True).items()  # pyright: ignore
            if isinstance(value, torch.nn.Parameter) and not value.requires_grad
        }
        try:
            super().init_deepspeed()
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"DeepSpeed rejects an option of strategy.deepspeed: {error}") from None
        read = self.config.read if isinstance(self.config, _ReadKeys) else set()
        if unread := sorted(self._options.keys() - read):
            self.warn(
                f"DeepSpeed did not read these options of strategy.deepspeed: {', '.join(unread)}. "
                "Check the spelling."
            )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        state = super().load_checkpoint(checkpoint_path, weights_only)
        scaler: Any = getattr(self.deepspeed_engine.optimizer, "loss_scaler", None)
        for name, value in state.get("loss_scale", {}).items():
            setattr(scaler, name, value)
        return state

    def on_validation_start(self) -> None:
        """Gather the full model on each rank under ZeRO-3.

        In validation, ranks generate texts of different lengths, so they cannot gather layers
        together.
        """
        if self.zero_stage_3 and self.deepspeed_engine.optimizer is not None:
            from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

            self._gathered_model.enter_context(unwrap_model_for_generation(self.deepspeed_engine))

    def on_validation_end(self) -> None:
        self._gathered_model.close()

    def model_state(self) -> ModelState:
        module: Any = self.lightning_module
        return DeepSpeedState(module, self.deepspeed_engine, self._frozen)

    def _extra_state(self) -> dict[str, Any]:
        scaler = getattr(self.deepspeed_engine.optimizer, "loss_scaler", None)
        values = vars(scaler) if scaler else {}
        plain = {key: value for key, value in values.items() if isinstance(value, int | float)}
        return {"loss_scale": plain}


class CPUDeepSpeed(DeepSpeed):
    """DeepSpeed's engine on CPU ranks, without the checks for CUDA in `DeepSpeedStrategy`."""

    def __init__(self, options: Mapping[str, Any], **arguments: Any):
        super().__init__(options, process_group_backend="gloo", **arguments)

    def setup_environment(self) -> None:
        # Skips DeepSpeedStrategy's own method, which only checks for CUDA.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        # DeepSpeed needs the index of the device, which plain "cpu" does not have.
        return torch.device("cpu", 0)


class _ReadKeys(dict[str, Any]):
    """A dict that records which keys were read, because DeepSpeed ignores unknown keys."""

    def __init__(self, values: Any):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _use_config_lrs(scheduler: LambdaLR, state: dict[str, Any]) -> list[float]:
    """Replace all but the step in a scheduler's saved state by this config's.

    Returns the learning rates. Their number may differ from that of the saved ones.
    """
    factors = [factor(state["last_epoch"]) for factor in scheduler.lr_lambdas]
    lrs = [float(lr) * factor for lr, factor in zip(scheduler.base_lrs, factors, strict=True)]
    steps = {name: state[name] for name in ("last_epoch", "_step_count")}
    state |= scheduler.state_dict() | steps | {"_last_lr": lrs}
    return lrs


def _format_range(values: Sequence[float]) -> str:
    lowest, highest = f"{min(values):.4g}", f"{max(values):.4g}"
    return highest if lowest == highest else f"{lowest} to {highest}"


def _single_device(accelerator: str) -> torch.device:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps", 0)
    return torch.device("cpu")


def _destroy_process_groups() -> None:
    """Destroy process groups before the interpreter exits. Lightning does so only for NCCL.

    The threads of gloo may still hold tensors. Freeing them while the interpreter exits aborts with
    "terminate called without an active exception" (https://github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
