"""What stops a run, or skips one of its steps.

Contains the callbacks for signals, non-finite gradients, loss spikes and the end of the data, the
checks of disk space, devices and compilers, and the messages for failures of the machine.
"""

import errno
import math
import os
import re
import shutil
import signal
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from whisper_aut.data.ledger import Ledger
from whisper_aut.data.reader import SkippedSample
from whisper_aut.data.sampler import Cursor
from whisper_aut.errors import Interrupted, Preempted, SkipReason, UserError
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.checkpoint import (
    FULL_DISK,
    existing_parent,
    full_disk_message,
    read_state,
)

CTRL_C, PREEMPTION = 1, 2


class CleanStop(lightning.Callback):
    """Saves a checkpoint and ends the run when any of its processes receives a stop signal.

    A second Ctrl-C ends the run at once.

    Args:
        checkpoints: Saves the checkpoint.

    Raises:
        Interrupted: After Ctrl-C.
        Preempted: After SIGTERM or SIGUSR1.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, checkpoints: RollingCheckpoints):
        self.checkpoints = checkpoints
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        # Replaces Lightning's handlers, which are set before this hook. Its SIGTERM handler ends
        # the run without saving, and it calls a collective inside the handler, which hangs if only
        # one rank receives the signal.
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole_step and (asked := self._asked_anywhere(trainer, module)):
            figures = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("train/")
            }
            # Lightning would log this step after this hook, which raises.
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step - 1)
            self._end(trainer, asked)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and (asked := self._asked_anywhere(trainer, module)):
            self._end(trainer, asked)  # the step was saved before its validation

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _end(self, trainer: lightning.Trainer, asked: int) -> None:
        saved = self.checkpoints.save(trainer)
        self.checkpoints.settle(trainer)
        kind = Preempted if asked >= PREEMPTION else Interrupted
        raise kind(f"stopped after step {trainer.global_step}; saved {saved}")

    def _asked_anywhere(self, trainer: lightning.Trainer, module: Any) -> int:
        """Return the most urgent signal of any rank, the same value on all ranks."""
        mine = 0 if self._asked is None else CTRL_C if self._asked == signal.SIGINT else PREEMPTION
        return highest(trainer, module, mine)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)


def highest(trainer: lightning.Trainer, module: Any, value: float) -> int:
    """Return the maximum of a small integer over all ranks. Must be called on all ranks."""
    if trainer.world_size == 1:
        return int(value)
    flag = torch.full((), float(value), device=module.device)
    return int(trainer.strategy.reduce(flag, reduce_op="max"))  # pyright: ignore[reportArgumentType]


# Number of last losses that spikes are compared with, and how many are needed to detect one.
SPIKE_WINDOW, SPIKE_HISTORY = 100, 20
MAD_TO_DEVIATION = 1.4826  # ratio of standard deviation to MAD in a normal distribution
# Lower bound on the deviation, as a fraction of the median. On a plateau, the deviation is so small
# that noise would count as spikes.
LEAST_DEVIATION = 0.02


class Rewind(Exception):
    """Raised after a loss spike, to resume from an earlier checkpoint and skip the data read since.

    Attributes:
        cursor: Position in the data after the step that spiked.
    """

    def __init__(self, cursor: Cursor, message: str):
        super().__init__(message)
        self.cursor = cursor


class Guard(lightning.Callback):
    """Skips optimizer steps with non-finite gradients, clips gradients, and detects loss spikes.

    Logs `train/loss`, `train/accuracy`, `train/grad_norm` and `train/skipped_steps` of whole steps.

    Gradients are summed over ranks before this callback sees them, so one bad clip makes the norm
    non-finite on all ranks, and all skip the step. The ranks then agree whether any of them can
    name a clip with a non-finite loss. DeepSpeed's engine skips such steps itself; they are only
    counted and reported here. The learning rate schedule advances in any case.

    Args:
        ledger: Ledger of this rank. The clips that caused a skipped step are written to it.
        max_bad_steps: Number of skipped steps in a row that stops the run.
        gradient_clip: Maximum gradient norm; 0 turns clipping off. DeepSpeed clips itself.
        spike_factor: Number of robust deviations above the running median at which a loss is a
            spike; 0 turns detection off.
        rewind: Raise `Rewind` after a spike. Otherwise, only warn.
        warn: Called with a message about each skipped step and each spike.

    Raises:
        UserError: After `max_bad_steps` skipped steps in a row.
        Rewind: After a spike, with `rewind`.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        max_bad_steps: int,
        gradient_clip: float = 0.0,
        spike_factor: float = 0.0,
        rewind: bool = False,
        warn: Callable[[str], None] = lambda _: None,
    ):
        self.ledger, self.max_bad_steps, self.gradient_clip, self.warn = (
            ledger,
            max_bad_steps,
            gradient_clip,
            warn,
        )
        self.spikes = SpikeDetector(spike_factor) if spike_factor else None
        self.rewind = rewind
        self.skipped = self.streak = 0
        self._norm, self._bad = math.nan, False
        # Metrics of the last step, which Lightning discards in a validation.
        self.figures: dict[str, Any] = {}

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: Any, optimizer: Any
    ) -> None:
        if _engine(trainer) is not None:
            return
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = (
            torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if parameters
            else torch.zeros(())
        )
        self._norm = float(norm)
        self._bad = not math.isfinite(self._norm)
        if self._bad:
            # Without gradients, the optimizer changes neither weights nor state, and applies no
            # weight decay.
            for parameter in parameters:
                parameter.grad = None
        elif self.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip, norm)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if (engine := _engine(trainer)) is not None:
            norm: Any = engine.get_global_grad_norm()
            self._norm, self._bad = (
                math.nan if norm is None else float(norm),
                not engine.was_step_applied(),
            )
        loss, accuracy = module.step_metrics()
        self.figures = {
            "train/loss": loss,
            "train/accuracy": accuracy,
            "train/grad_norm": self._norm,
        }
        for name, value in self.figures.items():
            module.log(name, value, prog_bar=name == "train/loss", batch_size=1)
        if self._bad:
            self._count_bad(trainer, module)
            return
        self.streak = 0
        if self.spikes and (usual := self.spikes.judge(float(loss))):
            self._answer_spike(trainer.global_step, float(loss), usual, batch.next_cursor)

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "streak": self.streak,
            "losses": list(self.spikes.losses) if self.spikes else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.streak = state["skipped"], state["streak"]
        if self.spikes:
            self.spikes.losses.extend(state["losses"])

    def _count_bad(self, trainer: lightning.Trainer, module: Any) -> None:
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        module.log("train/skipped_steps", float(self.skipped), prog_bar=True, batch_size=1)
        step = trainer.global_step
        reason, named = (
            SkipReason.NON_FINITE_LOSS,
            [clip for seen in module.seen for clip in seen.non_finite()],
        )
        if not highest(trainer, module, bool(named)):
            reason, named = (
                SkipReason.NON_FINITE_GRADIENT,
                [clip for seen in module.seen for clip in seen.clips],
            )
        for source, key in named:
            self.ledger.note(SkippedSample(source, key, reason, f"step {step} was left out"))
        files = "ledger.jsonl" if trainer.world_size == 1 else "ledger*.jsonl"
        where = f" {self.ledger.path.with_name(files)} names the clips." if self.ledger.path else ""
        self.warn(f"Step {step} was left out on all ranks: its gradient is not finite.{where}")
        if self.streak >= self.max_bad_steps:
            raise UserError(
                f"{self.streak} steps in a row had a gradient that is not finite, up to step "
                f"{step}; the weights are as they were "
                f"before them.{where} Lower optim.lr or raise optim.warmup_steps, use "
                "bf16-mixed in place of 16-mixed, look at "
                "those clips, or raise trainer.max_bad_steps. --resume auto goes on from the "
                "last checkpoint."
            )

    def _answer_spike(self, step: int, loss: float, usual: float, next_cursor: Cursor) -> None:
        message = f"The loss spiked to {loss:.4g} at step {step}, where {usual:.4g} was usual."
        if self.rewind:
            raise Rewind(next_cursor, message)
        self.warn(message)


class SpikeDetector:
    """Detects losses that are more than `factor` robust deviations (MAD) above the median.

    Args:
        factor: Number of deviations.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def judge(self, loss: float) -> float | None:
        """Return the median of the previous losses if this loss is a spike.

        Otherwise, add it to the history and return None.
        """
        if len(self.losses) >= SPIKE_HISTORY:
            median = statistics.median(self.losses)
            deviation = MAD_TO_DEVIATION * statistics.median(
                abs(before - median) for before in self.losses
            )
            if loss > median + self.factor * max(deviation, LEAST_DEVIATION * abs(median)):
                return median
        self.losses.append(loss)
        return None


def _engine(trainer: lightning.Trainer) -> Any:
    """Return the DeepSpeed engine of the run, or None under other strategies."""
    return getattr(trainer.strategy, "deepspeed_engine", None)


# Number of empty epochs in a row that ends a run. A single one is normal if a run is resumed after
# the last batch of an epoch.
EMPTY_EPOCHS = 2


class StopOnDataEnd(lightning.Callback):
    """Stops training after `EMPTY_EPOCHS` epochs without a batch.

    All ranks have the same number of batches, so they stop together.

    Args:
        checkpoints: Saves the last checkpoint.
        warn: Called with a message when training stops.
    """

    def __init__(self, checkpoints: RollingCheckpoints, warn: Callable[[str], None]):
        self.checkpoints, self.warn = checkpoints, warn
        self._batches = self._empty = 0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._empty = 0 if self._batches else self._empty + 1
        self._batches = 0
        if self._empty == EMPTY_EPOCHS:
            self.warn(
                f"The training data ended after step {trainer.global_step} of "
                f"{trainer.max_steps} planned; the run ends there."
            )
            self.checkpoints.save(trainer)
            trainer.should_stop = True


@dataclass(frozen=True)
class LoaderState:
    """State of the training loader in a checkpoint.

    Attributes:
        state: State dict of the loader.
        step: Number of completed optimizer steps.
    """

    state: dict[str, Any]
    step: int


def loader_state(checkpoint: Path) -> LoaderState | None:
    """Return the loader state of a checkpoint, or None if it has none. Does not read weights.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    content = read_state(checkpoint)
    states = _loaders(content)
    return LoaderState(states[0], int(content["global_step"])) if states else None


class ElasticResume(lightning.Callback):
    """Restarts Lightning's epoch if the number of ranks or the accumulation has changed."""

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        states = _loaders(checkpoint)
        if not states or states[0]["world"] == [
            trainer.world_size,
            trainer.accumulate_grad_batches,
        ]:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # Lightning counts a batch as completed only after the hooks that write checkpoints, and
        # corrects the count on restart.
        uncounted = progress["total"]["processed"] - progress["total"]["completed"]
        progress["current"] = dict.fromkeys(progress["current"], 0) | {"completed": -uncounted}
        progress["is_last_batch"] = False


def _loaders(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        checkpoint.get("loops", {})
        .get("fit_loop", {})
        .get("state_dict", {})
        .get("combined_loader", [])
    )


BYTES_OF_STATE = 12  # per trained parameter: a float32 weight and two float32 moments
LOST_RANK = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|connection refused|timed out|timeout"
    r"|peer|gloo|nccl|socket",
    re.I,
)
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """Return the approximate size of a checkpoint in bytes.

    Counts the weights and optimizer state of trained parameters. Frozen weights are not counted.
    """
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return BYTES_OF_STATE * trained


def check_disk_space(folder: Path, one_checkpoint: int, kept: int) -> str:
    """Check that a folder is writable and has room for checkpoints.

    Args:
        folder: The run directory, or a folder above it. It need not exist.
        one_checkpoint: Size of a checkpoint in bytes.
        kept: Number of checkpoints that are kept. One more may be being written.

    Returns:
        A warning if the disk may fill up later, else an empty string.

    Raises:
        UserError: If the folder is not writable, or two checkpoints do not fit.
    """
    place = existing_parent(folder)
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot write to {place}: {error.strerror}. Set runs=FOLDER to write elsewhere."
        ) from None
    free, size = shutil.disk_usage(place).free, one_checkpoint / 2**30
    if free < 2 * one_checkpoint:
        raise UserError(
            f"{place} has {free / 2**30:.1f} GiB free, and a checkpoint takes about {size:.1f} "
            "GiB; the one before stays until the "
            "next is whole, so twice that is needed. Make room, or set runs=FOLDER to write "
            "elsewhere."
        )
    if free < (kept + 1) * one_checkpoint:
        return (
            f"{place} has {free / 2**30:.1f} GiB free, and {kept + 1} checkpoints of {size:.1f} "
            "GiB may lie there at a time: "
            "lower trainer.keep_checkpoints or make room."
        )
    return ""


def check_accelerator(accelerator: str) -> None:
    """Check that a device of the requested kind is available.

    Args:
        accelerator: Lightning's accelerator name.

    Raises:
        UserError: If there is none.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(accelerator, True):
        raise UserError(
            f"hardware.accelerator={accelerator}, and PyTorch sees no such device here. "
            "hardware=cpu runs on the CPU, hardware=auto on "
            "what is there; whisper-aut doctor looks at drivers and devices."
        )


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None."""
    named = os.environ.get("CXX")
    return next(
        (
            path
            for name in (named, "c++", "g++", "clang++")
            if name and (path := shutil.which(name))
        ),
        None,
    )


def check_compilable(strategy: str) -> None:
    """Check that `model.compile` can be used.

    Args:
        strategy: Strategy name of the config.

    Raises:
        UserError: If there is no compiler, or under ZeRO-3, which fetches the weights of a layer
            while the layer runs.
    """
    if "stage_3" in strategy:
        raise UserError(
            f"model.compile does not go with strategy.name={strategy}: compiled layers cannot "
            "fetch their weights."
        )
    if find_compiler() is None:
        raise UserError(
            "model.compile=true needs a C++ compiler, such as g++ or what CXX names. Install "
            "one, or leave it false."
        )


@contextmanager
def explain_errors(folder: Path, ranks: int) -> Iterator[None]:
    """Convert failures of the machine into messages that say what to do.

    Args:
        folder: The run directory.
        ranks: Number of ranks.

    Raises:
        UserError: If GPU memory or disk space ran out, another rank failed, or Lightning cannot use
            the devices as configured.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(
            "This machine cannot run the config as hardware and strategy ask: "
            f"{' '.join(str(error).split())}"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"The GPU's memory is not enough: {str(error).splitlines()[0]}\n"
            "Lower data.batch_clips or data.batch_seconds and raise trainer.accumulate, set "
            "model.gradient_checkpointing=true, or pick a "
            "higher ZeRO stage."
        ) from None
    except OSError as error:
        if error.errno in FULL_DISK | UNWRITABLE:
            raise UserError(full_disk_message(Path(error.filename or folder), error)) from None
        raise
    except RuntimeError as error:
        if ranks > 1 and LOST_RANK.search(str(error)):
            raise UserError(
                f"Another rank is gone or does not answer: {str(error).splitlines()[0][:300]}\n"
                "The job ends here. The logs of the other ranks say why; --resume auto goes on "
                "from the last checkpoint."
            ) from error
        raise
