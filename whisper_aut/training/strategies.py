"""Lightning strategies by name, all with the same checkpoint format, and the table of devices.

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
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch.optim.lr_scheduler import LambdaLR

from whisper_aut.data.sampler import Cursor
from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import (
    CheckpointWriter,
    DeepSpeedState,
    Manifest,
    NamedState,
    PlainState,
    full_disk_message,
    read_optimizer_state,
    read_state,
    read_weights,
)


class Background:
    """Runs one function at a time in a thread. `wait` raises the exception that it raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the previous work, raising its exception if it failed, and start new work."""
        self.wait()
        # A daemon thread, so that the interpreter does not wait for it after a second Ctrl-C.
        self._thread = threading.Thread(
            target=self._do, args=(work,), name="background", daemon=True
        )
        self._thread.start()
        atexit.register(self._end_process)

    def wait(self) -> None:
        """Wait until the work is done. If it failed, raise its exception, once."""
        if self._thread:
            self._thread.join()
            self._thread = None
            atexit.unregister(self._end_process)
        problem, self._problem = self._problem, None
        if problem:
            raise problem

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as problem:  # `wait` raises it in the main thread
            self._problem = problem

    def _end_process(self) -> None:
        """End the process at exit if the work is still running, as after a second Ctrl-C.

        If a thread is inside C++ code (PyTorch, gloo, safetensors), a normal exit aborts with
        "terminate called without an active exception".
        """
        if self.busy:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


log = logging.getLogger(__name__)

OFFLOAD = "_offload"
DEEPSPEED = "deepspeed_stage_"


def build_strategy(
    name: str,
    *,
    timeout_minutes: float,
    ranks: int,
    clips_per_step: int = 0,
    accelerator: str = "auto",
    skip_to: Cursor | None = None,
    async_checkpoints: bool = False,
    deepspeed_options: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Strategy:
    """Return a Lightning strategy by name.

    Args:
        name: `auto`, `ddp`, or `deepspeed_stage_1|2|3`, the latter two also with `_offload`.
        timeout_minutes: How long a rank waits for the others before the job fails.
        ranks: Number of ranks of the job.
        clips_per_step: Number of clips in an optimizer step, recorded in checkpoints.
        accelerator: Lightning's accelerator name.
        skip_to: Position in the data to resume from, in place of the checkpoint's own.
        async_checkpoints: Write checkpoints in the background.
        deepspeed_options: Options for DeepSpeed's config. They override those implied by `name`.
        warn: Called with a message if the learning rates of a checkpoint differ from the config's,
            or if DeepSpeed did not read an option.

    Raises:
        UserError: If offloading is requested without a GPU.
    """
    timeout = timedelta(minutes=timeout_minutes)
    strategy: Any
    if name.startswith(DEEPSPEED):
        offload = name.endswith(OFFLOAD)
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        if offload and not on_gpu:
            raise UserError(
                f"strategy.name={name} moves optimiser state from the GPU to the CPU, and no "
                "GPU is used here."
            )
        stage = int(name.removeprefix(DEEPSPEED).removesuffix(OFFLOAD))
        if not on_gpu:
            # Without this, DeepSpeed uses a GPU if there is one.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        kind = _DeepSpeed if on_gpu else _CPUDeepSpeed
        strategy = kind(
            deepspeed_options or {}, stage=stage, offload_optimizer=offload, timeout=timeout
        )
    elif name == "ddp" or ranks > 1:
        # With bucket views, gradients are in memory only once.
        strategy = _DDP(timeout=timeout, gradient_as_bucket_view=True)
    else:
        strategy = _SingleDevice(_one_device(accelerator))
    strategy.word, strategy.clips_per_step, strategy.skip_to = name, clips_per_step, skip_to
    strategy.background, strategy.timeout, strategy.warn = (
        Background() if async_checkpoints else None,
        timeout,
        warn,
    )
    atexit.unregister(_destroy_process_groups)
    atexit.register(_destroy_process_groups)
    return strategy


def _destroy_process_groups() -> None:
    """Destroy process groups before the interpreter exits. Lightning does so only for NCCL.

    The threads of gloo may still hold the tensors of the last collective. Freeing them while the
    interpreter exits aborts with "terminate called without an active exception".
    """
    if dist.is_initialized():
        dist.destroy_process_group()


class NamedCheckpoints:
    """Mixin for strategies: checkpoints by parameter name, which all ranks write together."""

    word, clips_per_step = "", 0
    skip_to: Cursor | None = None
    background: Background | None = None
    warn: Callable[[str], None] = staticmethod(lambda _: None)
    timeout = timedelta(minutes=30)
    # The process group of the background threads; training uses the default group meanwhile.
    _writers: Any = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint directory.

        Must be called on all ranks. If one rank cannot write, all ranks raise. With `background`,
        this only copies the state, and errors in writing are raised by the next call or by
        `wait_for_checkpoint`.

        Args:
            checkpoint: State of Lightning's loops, callbacks and schedules.
            filepath: Path of the directory.
            storage_options: Called without arguments on rank 0 when the checkpoint is complete.

        Raises:
            UserError: If the disk is full or the directory cannot be written.
        """
        strategy: Any = self
        self.wait_for_checkpoint()
        draft = CheckpointWriter(
            Path(strategy.broadcast(str(filepath))), strategy.global_rank, strategy.world_size
        )
        named = self._named_state().collect(draft.rank, draft.ranks)
        state = {
            key: value
            for key, value in checkpoint.items()
            if key not in ("state_dict", "optimizer_states")
        }
        state |= {
            "extra": named.extra,
            "accumulate": strategy.lightning_module.trainer.accumulate_grad_batches,
        }
        state |= self._own_state()
        manifest = Manifest(
            step=checkpoint["global_step"],
            clips_per_step=self.clips_per_step,
            written_by={
                "strategy": self.word,
                "ranks": draft.ranks,
                "precision": str(strategy.precision_plugin.precision),
            },
            files={},
            aliases=named.aliases,
        )
        if self.background is None:
            self._write(draft, named, state, manifest, storage_options)
            return
        if draft.ranks > 1 and self._writers is None:
            self._writers = dist.new_group(backend="gloo", timeout=self.timeout)
        state = copy.deepcopy(state)
        self.background.start(lambda: self._write(draft, named, state, manifest, storage_options))

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: If it could not be written.
        """
        if self.background:
            self.background.wait()

    def teardown(self) -> None:
        """Wait for the last checkpoint and tear down, also after an error.

        After a second Ctrl-C, this does not wait.
        """
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

    def _write(
        self,
        draft: CheckpointWriter,
        named: NamedState,
        state: dict[str, Any],
        manifest: Manifest,
        then: Any,
    ) -> None:
        first = draft.rank == 0
        self._together(draft, lambda: draft.begin() if first else None)
        written = self._together(draft, lambda: draft.write_tensors(named.weights, named.moments))
        manifest = replace(
            manifest, files={name: facts for share in written for name, facts in share.items()}
        )
        self._together(draft, lambda: draft.finish(state, manifest) if first else None)
        if first and then:
            then()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read everything but the tensors, which the two `load_*_state_dict` methods read later."""
        strategy: Any = self
        path = Path(strategy.broadcast(str(checkpoint_path)))
        state = read_state(path)
        trainer = strategy.lightning_module.trainer
        _count_in_micro_batches_of(state, trainer.accumulate_grad_batches)
        _validate_first(state, trainer.val_check_interval)
        for loader in state["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
            if self.skip_to:
                loader |= self.skip_to._asdict()
        return state | {"path": str(path), "state_dict": {}, "optimizer_states": []}

    def remove_checkpoint(self, filepath: Any) -> None:
        raise RuntimeError("checkpoints are removed by training.callbacks.checkpoints")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` collects a part of it on each rank

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._named_state().fill_weights(read_weights(Path(checkpoint["path"])))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        strategy: Any = self
        self._named_state().fill_optimizer(read_optimizer_state(Path(checkpoint["path"])))
        own = [config.scheduler for config in strategy.lr_scheduler_configs]
        for optimizer, schedule, state in zip(
            strategy.optimizers, own, checkpoint["lr_schedulers"], strict=True
        ):
            before, rates = state["_last_lr"], _take_rates_of(schedule, state)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            if rates != before:
                self.warn(
                    f"The learning rate was {_span(before)} in the checkpoint; by this config "
                    f"it goes on at {_span(rates)}."
                )

    def _named_state(self) -> PlainState:
        strategy: Any = self
        return PlainState(
            strategy.lightning_module, strategy.optimizers[0] if strategy.optimizers else None
        )

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _together(self, draft: CheckpointWriter, work: Any) -> list[Any]:
        """Run `work` on every rank and return all results. If one rank fails, all ranks raise."""
        given, problem = None, ""
        try:
            given = work()
        except OSError as error:
            problem = full_disk_message(draft.path, error)
        results: list[Any] = [None] * draft.ranks
        if draft.ranks > 1:
            dist.all_gather_object(results, (given, problem), group=self._writers)
        else:
            results = [(given, problem)]
        if problems := [problem for _, problem in results if problem]:
            if not draft.rank:
                draft.discard()
            raise UserError(problems[0])
        return [given for given, _ in results]


class _SingleDevice(NamedCheckpoints, SingleDeviceStrategy):
    pass


class _DDP(NamedCheckpoints, DDPStrategy):
    pass


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


class _DeepSpeed(NamedCheckpoints, DeepSpeedStrategy):
    def __init__(self, options: Mapping[str, Any], **arguments: Any):
        super().__init__(**arguments)
        self._options = options
        self._whole_model = ExitStack()
        self._frozen: dict[str, torch.Tensor] = {}

    def _format_config(self) -> None:
        """Merge the user's options into Lightning's, which accepts a config or arguments only."""
        super()._format_config()
        sums: dict[str, Any] = {}
        if str(self.precision_plugin.precision).startswith("bf16"):
            # In bfloat16, a sum over micro-batches loses addends below 0.4 % of it.
            sums = {"data_types": {"grad_accum_dtype": "fp32"}}
        merged = OmegaConf.merge(self.config or {}, sums, dict(self._options))
        self.config = _ReadKeys(OmegaConf.to_container(merged))  # pyright: ignore

    def init_deepspeed(self) -> None:
        """Start the engine.

        Raises:
            UserError: If DeepSpeed rejects an option.
        """
        from deepspeed.runtime.config import DeepSpeedConfigError

        # The engine rounds frozen weights too, and keeps no float32 copy of them.
        self._frozen = self._frozen or {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.lightning_module.state_dict(keep_vars=True).items()  # pyright: ignore
            if isinstance(value, torch.nn.Parameter) and not value.requires_grad
        }
        try:
            super().init_deepspeed()
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"strategy.deepspeed, rejected by DeepSpeed: {error}") from None
        read = self.config.read if isinstance(self.config, _ReadKeys) else set()
        if unread := sorted(self._options.keys() - read):
            self.warn(
                f"strategy.deepspeed: DeepSpeed has not read {', '.join(unread)}; is it a typo?"
            )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        state = super().load_checkpoint(checkpoint_path, weights_only)
        scale: Any = getattr(self.deepspeed_engine.optimizer, "loss_scaler", None)
        for name, value in state.get("loss_scale", {}).items():
            setattr(scale, name, value)
        return state

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def on_validation_start(self) -> None:
        """Gather the full model on each rank under ZeRO-3.

        In validation, ranks generate texts of different lengths, so they cannot gather layers
        together.
        """
        if self.zero_stage_3 and self.deepspeed_engine.optimizer is not None:
            from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

            self._whole_model.enter_context(unwrap_model_for_generation(self.deepspeed_engine))

    def on_validation_end(self) -> None:
        self._whole_model.close()

    def _named_state(self) -> PlainState:
        module: Any = self.lightning_module
        return DeepSpeedState(module, self.deepspeed_engine, self._frozen)

    def _own_state(self) -> dict[str, Any]:
        scale = getattr(self.deepspeed_engine.optimizer, "loss_scaler", None)
        plain = (int, float, bool)
        return {
            "loss_scale": {
                name: value for name, value in vars(scale).items() if isinstance(value, plain)
            }
            if scale
            else {}
        }


class _CPUDeepSpeed(_DeepSpeed):
    """DeepSpeed's engine on CPU ranks: `DeepSpeedStrategy` without Lightning's checks for CUDA."""

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


def _one_device(accelerator: str) -> torch.device:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps", 0)
    return torch.device("cpu")


def _take_rates_of(schedule: LambdaLR, state: dict[str, Any]) -> list[float]:
    """Replace the learning rates in a schedule's saved state by this config's, and return them."""
    factors = [factor(state["last_epoch"]) for factor in schedule.lr_lambdas]
    rates = [float(base) * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    state |= {"base_lrs": schedule.base_lrs, "_last_lr": rates}
    return rates


def _span(rates: Sequence[float]) -> str:
    lowest, highest = f"{min(rates):.4g}", f"{max(rates):.4g}"
    return highest if lowest == highest else f"{lowest} to {highest}"


def _count_in_micro_batches_of(state: dict[str, Any], accumulate: int) -> None:
    """Convert the loop's counts of micro-batches to this run's gradient accumulation.

    It changes if the number of ranks changes and the clips in a step stay the same.
    """
    before = state["accumulate"]
    for counts in (
        state["loops"]["fit_loop"]["epoch_loop.batch_progress"][part]
        for part in ("total", "current")
    ):
        if before != accumulate:
            done = counts["ready"] // before * accumulate
            # 1 if the checkpoint was written in a hook of the batch, else 0.
            open_batches = counts["ready"] - counts["completed"]
            counts |= {
                "ready": done,
                "started": done,
                "processed": done,
                "completed": done - open_batches,
            }


def _validate_first(state: dict[str, Any], every_micro_batches: int) -> None:
    """Make a resumed run begin with the validation if one was due at the checkpoint's step.

    Checkpoints are written before the validation of their step, which may never have finished.
    """
    loops = state["loops"]["fit_loop"]
    if loops["epoch_loop.batch_progress"]["total"]["ready"] % every_micro_batches:
        return
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation["current"] |= dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    # Lightning takes this for a validation that stopped in its first batch, and starts it over.
    validation["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    # Lightning counts the step again after that validation.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


NO_BFLOAT16 = (
    "This GPU does not compute in bfloat16, so hardware.precision=auto trains in float32. "
    "hardware.precision=16-mixed is faster on it and may need a lower optim.lr."
)


@dataclass(frozen=True)
class Accelerator:
    """Specifications of a device.

    Attributes:
        name: Name for display.
        part: Substring of `torch.cuda.get_device_name`.
        memory_gib: Memory in GiB.
        half_tflops: Peak TFLOP/s in 16 bits.
        single_tflops: Peak TFLOP/s in float32, computed as TF32.
        terabytes_per_second: Memory bandwidth.
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
    """Return the peak FLOP/s of a device, or None if it is not in the table.

    Args:
        device_name: From `torch.cuda.get_device_name`.
        precision: Lightning's precision.
    """
    return next(
        (device.peak_flops(precision) for device in ACCELERATORS if device.part in device_name),
        None,
    )


def resolve_precision(precision: str, accelerator: str) -> tuple[str, str]:
    """Return the precision to use on this machine, and a hint for the user (may be empty).

    Args:
        precision: Lightning's precision, or `auto`: `bf16-mixed` on a CUDA device that supports
            bfloat16, else `32-true`.
        accelerator: Lightning's accelerator name.
    """
    if precision != "auto":
        return precision, ""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true", ""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed", ""
    return "32-true", NO_BFLOAT16
