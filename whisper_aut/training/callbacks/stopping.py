"""Guard rails around the optimiser: a step whose gradient is not finite is left out on all ranks, and who caused it is written down.

In: gradients, and the per-token losses that the module keeps of each step. Out: clipped gradients, skipped steps, lines in the ledger;
`train/loss`, `train/accuracy`, `train/grad_norm` and `train/skipped_steps` of whole steps in the log; `UserError` after too many bad steps
in a row; `Rewind` where a spike of the loss asks for it. Next: `training.train` goes on from an earlier checkpoint after a `Rewind`.

Gradients are summed over ranks before this looks, so one bad clip makes the norm non-finite on all; ranks then tell each other whether
one of them can name it.
Under DeepSpeed the engine itself leaves such a step out; here that is only counted and explained. The schedule moves on in any case.
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
from whisper_aut.data.reader import Refusal
from whisper_aut.data.sampler import Cursor
from whisper_aut.errors import Interrupted, Preempted, Reason, UserError
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.checkpoint import (
    FULL_DISK,
    existing_parent,
    full_disk_message,
    read_state,
)

CTRL_C, PREEMPTION = 1, 2


class CleanStop(lightning.Callback):
    """Saves a checkpoint and ends the run when a process of it is asked to stop. A second Ctrl-C ends it at once.

    Args:
        checkpoints: saves.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, checkpoints: RollingCheckpoints):
        self.checkpoints = checkpoints
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        # In place of Lightning's own handlers, which are set before this hook: that of SIGTERM calls a collective from within the
        # handler, which hangs where one rank alone gets the signal, and ends the run without saving.
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
            for logger in trainer.loggers:  # Lightning would have logged this step behind this hook
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
            self._end(trainer, asked)  # the step was saved before it is validated

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
        """Return what the most urgent signal of any rank was, the same on all of them."""
        mine = 0 if self._asked is None else CTRL_C if self._asked == signal.SIGINT else PREEMPTION
        return highest(trainer, module, mine)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)


def highest(trainer: lightning.Trainer, module: Any, value: float) -> int:
    """Return the largest of a small whole number over the ranks; all of them call it together."""
    if trainer.world_size == 1:
        return int(value)
    flag = torch.full((), float(value), device=module.device)
    return int(trainer.strategy.reduce(flag, reduce_op="max"))  # pyright: ignore[reportArgumentType]


SPIKE_WINDOW, SPIKE_HISTORY = (
    100,
    20,
)  # steps that are looked back on, and how many of them a judgement needs
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.02  # of the median: a plateau must not turn noise into spikes


class Rewind(Exception):
    """The loss has spiked; the run is to go on from an earlier checkpoint, behind the data read so far.

    Attributes:
        cursor: where the data stands behind the step that spiked.
    """

    def __init__(self, cursor: Cursor, message: str):
        super().__init__(message)
        self.cursor = cursor


class Guard(lightning.Callback):
    """Leaves out steps that would spoil the weights.

    Args:
        ledger: of this rank; the clips behind a bad step are written there.
        max_bad_steps: so many in a row stop the run.
        gradient_clip: gradients of a larger norm are scaled down to it, by the norm that is looked at anyway; 0 does not. DeepSpeed clips
            by itself.
        spike_factor: a loss so many robust deviations above the running median is a spike; 0 does not look.
        rewind: answer a spike with `Rewind` and not with a warning alone.
        warn: told what happened, in a sentence.
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
        self.figures: dict[
            str, Any
        ] = {}  # of the last step; Lightning forgets them over a validation

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
        if (
            self._bad
        ):  # without gradients the optimiser does nothing: no update, no decay, no moment
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
        loss, accuracy = module.step_figures()
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
            self._answer_spike(trainer.global_step, float(loss), usual, batch.behind)

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
            Reason.NON_FINITE_LOSS,
            [clip for seen in module.seen for clip in seen.non_finite()],
        )
        if not highest(trainer, module, bool(named)):
            reason, named = (
                Reason.NON_FINITE_GRADIENT,
                [clip for seen in module.seen for clip in seen.clips],
            )
        for source, key in named:
            self.ledger.note(Refusal(source, key, reason, f"step {step} was left out"))
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

    def _answer_spike(self, step: int, loss: float, usual: float, behind: Cursor) -> None:
        message = f"The loss spiked to {loss:.4g} at step {step}, where {usual:.4g} was usual."
        if self.rewind:
            raise Rewind(behind, message)
        self.warn(message)


class SpikeDetector:
    """Says whether a loss stands out from those before it: above the median by `factor` robust deviations (MAD)."""

    def __init__(self, factor: float):
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def judge(self, loss: float) -> float | None:
        """Return the usual loss where this one is a spike; else take it into the history."""
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


EMPTY_EPOCHS = (
    2  # in a row; a run that goes on behind the last batch of an epoch may begin with one
)


class Exhaustion(lightning.Callback):
    """Stops training when epochs stay empty. All ranks have equally many batches, so they stop together.

    Args:
        checkpoints: saves.
        warn: told what happened, in a sentence.
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
    """Where the training loader stood, and after how many optimiser steps."""

    state: dict[str, Any]
    step: int


def loader_state(checkpoint: Path) -> LoaderState | None:
    """Read a checkpoint's loader state; the weights stay on the disk. None where it has none."""
    content = read_state(checkpoint)
    states = _loaders(content)
    return LoaderState(states[0], int(content["global_step"])) if states else None


class AnotherWorld(lightning.Callback):
    """Begins Lightning's epoch anew where the checkpoint was written by other ranks or with another accumulation."""

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
        # Lightning counts a batch as completed after the hooks that write checkpoints, and makes up for it on restart.
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


BYTES_OF_STATE = 12  # float32 weight and two moments of a trained parameter
LOST_RANK = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|connection refused|timed out|timeout"
    r"|peer|gloo|nccl|socket",
    re.I,
)
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """Return about what one checkpoint takes: weights and moments of what is trained, weights of what is stored beside."""
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return BYTES_OF_STATE * trained


def check_room(folder: Path, one_checkpoint: int, kept: int) -> str:
    """Check that a run can write where it is to write; return a warning where room may run out later, or nothing.

    Args:
        folder: the run directory.
        one_checkpoint: bytes.
        kept: checkpoints that stay at a time; one more is being written.

    Raises:
        UserError: the folder cannot be written, or two checkpoints do not fit.
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
    """Check that a device of the kind that a config asks for is there.

    Raises:
        UserError: none is.
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
    """Check that `model.compile` can be had.

    Raises:
        UserError: no compiler, or ZeRO-3, which fetches a layer's weights while the layer runs.
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
def explained(folder: Path, ranks: int) -> Iterator[None]:
    """Turn what the machine did to a run into words.

    Raises:
        UserError: memory or disk ran out, another rank is gone, or Lightning cannot use the devices as the config wants.
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
