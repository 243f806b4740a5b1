"""What stops a run or skips one of its steps: signals, bad gradients, loss spikes, end of data."""

import math
import signal
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from whisper_aut.config import TrainerSettings
from whisper_aut.data.dataset import Ledger
from whisper_aut.data.reader import SkippedSample
from whisper_aut.data.sampler import Cursor
from whisper_aut.errors import Interrupted, Preempted, SkipReason, UserError
from whisper_aut.training.callbacks import ends_logged_step, ends_step
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints

CTRL_C, PREEMPTION = 1, 2
# A single empty epoch is normal if a run is resumed after the last batch of an epoch.
EMPTY_EPOCHS = 2
# Number of last losses that spikes are compared with, and how many are needed to detect one.
SPIKE_WINDOW, SPIKE_HISTORY = 100, 20
MAD_TO_DEVIATION = 1.4826  # ratio of standard deviation to MAD in a normal distribution
# Lower bound on the deviation, as a fraction of the median. On a plateau, the deviation is so small
# that noise would count as spikes.
MIN_DEVIATION = 0.02


class CleanStop(lightning.Callback):
    """Saves a checkpoint and ends the run when any of its processes receives a stop signal.

    A second Ctrl-C ends the run at once.

    Lightning's own handlers end the run without saving, may leave ranks waiting for each other
    (https://github.com/Lightning-AI/pytorch-lightning/issues/20806), and write Slurm's checkpoints
    inside the handler (https://github.com/Lightning-AI/pytorch-lightning/issues/21406).

    Raises:
        Interrupted: After Ctrl-C.
        Preempted: After SIGTERM or SIGUSR1.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, checkpoints: RollingCheckpoints):
        self.checkpoints = checkpoints
        self._received = 0  # CTRL_C or PREEMPTION
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        # Lightning sets its handlers before this hook.
        self._previous_handlers = {
            number: signal.signal(number, self._handle) for number in self.SIGNALS
        }

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and (received := max_over_ranks(trainer, self._received)):
            # Lightning would log this step after this hook, which raises.
            metrics = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("train/")
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step - 1)
            self._stop(trainer, received)

    def on_validation_batch_start(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.state.fn == "fit" and (received := max_over_ranks(trainer, self._received)):
            self._stop(trainer, received)  # the step was saved before its validation

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = CTRL_C if number == signal.SIGINT else PREEMPTION

    def _stop(self, trainer: lightning.Trainer, received: int) -> None:
        path = self.checkpoints.save(trainer)
        self.checkpoints.wait(trainer)
        kind = Preempted if received == PREEMPTION else Interrupted
        raise kind(f"stopped after step {trainer.global_step}; saved {path}")


class StopOnDataEnd(lightning.Callback):
    """Saves a checkpoint and stops training after `EMPTY_EPOCHS` epochs without a batch.

    All ranks have the same number of batches, so they stop together.
    """

    def __init__(self, checkpoints: RollingCheckpoints, warn: Callable[[str], None]):
        self.checkpoints, self.warn = checkpoints, warn
        self._batches = self._empty_epochs = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._batches += 1

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._empty_epochs = 0 if self._batches else self._empty_epochs + 1
        self._batches = 0
        if self._empty_epochs == EMPTY_EPOCHS:
            self.warn(
                f"The training data ended after step {trainer.global_step} of "
                f"{trainer.max_steps}, so training ends here."
            )
            self.checkpoints.save(trainer)
            trainer.should_stop = True


class Rewind(Exception):
    """Raised after a loss spike, to resume from an earlier checkpoint and skip the data read since.

    `cursor` is the position in the data after the step that spiked.
    """

    def __init__(self, cursor: Cursor, message: str):
        super().__init__(message)
        self.cursor = cursor


@dataclass(frozen=True)
class UnreadStep:
    """An optimizer step whose results the host has not read from the device yet.

    `norm` is that of the gradient, `loss` the module's; either may be a scalar on the device.
    `is_skipped` says whether DeepSpeed skipped the step; None if a norm that is not finite does.
    """

    number: int
    norm: Any
    loss: Any
    is_skipped: bool | None
    cursor: Cursor
    micro_batches: Sequence[Any]


class Guard(lightning.Callback):
    """Skips optimizer steps with non-finite gradients, and detects loss spikes.

    Logs `train/grad_norm` and `train/skipped_steps`; the module logs `train/loss`.

    Gradients are summed over ranks before this callback sees them, so one bad clip makes the norm
    non-finite on all ranks, and all skip the step. The ranks then agree whether any of them can
    name a clip with a non-finite loss. DeepSpeed's engine skips such steps itself; they are only
    counted and reported here. The learning rate schedule advances in any case.

    The optimizer, which must be fused, skips a step on the device. The host reads norms and losses
    only at logged steps and before checkpoints, so that it does not wait for the device in between.
    Checkpoints and messages are the same as if it read every step.

    Args:
        ledger: Ledger of this rank. The clips that caused a skipped step are written to it.
        settings: Its `max_bad_steps`, `spike_factor` and `on_spike` are used.
        warn: Called with a message about each skipped step and each spike.

    Raises:
        UserError: After `max_bad_steps` skipped steps in a row.
        Rewind: After a spike, with `on_spike=rewind`.
    """

    def __init__(self, ledger: Ledger, settings: TrainerSettings, warn: Callable[[str], None]):
        self.ledger, self.max_bad_steps, self.warn = ledger, settings.max_bad_steps, warn
        self.spikes = SpikeDetector(settings.spike_factor) if settings.spike_factor else None
        self.rewind = settings.on_spike == "rewind"
        self.skipped = self.streak = 0  # skipped steps of the run, and those in a row
        self._norm: Any = math.nan
        self._unread: list[UnreadStep] = []
        # Metrics of the last step, which Lightning discards in a validation.
        self.last_metrics: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Measure the gradient norm before Lightning clips, and skip the step if it is not finite.

        `found_inf` is what a gradient scaler sets. With 1, the kernel of the optimizer changes
        neither weights nor state, and applies no weight decay.
        """
        if _engine(trainer) is not None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None]
        )
        if isinstance(self._norm, DTensor):  # a part of it on each rank
            self._norm = self._norm.full_tensor()
        optimizer.found_inf = self._norm.isfinite().logical_not().float()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        norm, is_skipped = self._norm, None
        if (engine := _engine(trainer)) is not None:
            norm, is_skipped = engine.get_global_grad_norm(), not engine.was_step_applied()
            norm = math.nan if norm is None else norm
        loss = module.step_loss if self.spikes else None
        cursor = batch.next_cursor if self.rewind else Cursor()
        self._unread.append(
            UnreadStep(trainer.global_step, norm, loss, is_skipped, cursor, module.micro_batches)
        )
        if ends_logged_step(trainer, batch_idx):
            self.read(trainer)

    def read(self, trainer: Any) -> None:
        """Read the results of the steps since the last call. Must be called on all ranks."""
        steps, self._unread = self._unread, []
        if not steps:
            return
        module = trainer.lightning_module
        norms = [float(step.norm) for step in steps]
        module.log("train/grad_norm", norms[-1], batch_size=1)
        for step, norm in zip(steps, norms, strict=True):
            is_bad = step.is_skipped
            if is_bad or (is_bad is None and not math.isfinite(norm)):
                self._count_bad_step(trainer, step)
            else:
                self.streak = 0
                self._check_spike(step)
        if self.skipped:
            module.log("train/skipped_steps", float(self.skipped), batch_size=1)
        self.last_metrics = {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/")
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "streak": self.streak,
            "losses": list(self.spikes.losses) if self.spikes else [],
            "last_metrics": {name: float(value) for name, value in self.last_metrics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.streak = state["skipped"], state["streak"]
        self.last_metrics = state["last_metrics"]
        if self.spikes:
            self.spikes.losses.extend(state["losses"])

    def _check_spike(self, step: UnreadStep) -> None:
        if self.spikes is None:
            return
        loss = float(step.loss)
        median = self.spikes.median_before_spike(loss)
        if median is None:
            return
        message = (
            f"The loss spiked to {loss:.4g} at step {step.number}; its median before was "
            f"{median:.4g}."
        )
        if self.rewind:
            raise Rewind(step.cursor, message)
        self.warn(message)

    def _count_bad_step(self, trainer: Any, unread: UnreadStep) -> None:
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        step, reason = unread.number, SkipReason.NON_FINITE_LOSS
        clips = [clip for result in unread.micro_batches for clip in result.non_finite()]
        if not max_over_ranks(trainer, bool(clips)):
            reason = SkipReason.NON_FINITE_GRADIENT
            clips = [clip for result in unread.micro_batches for clip in result.clips]
        for source, key in clips:
            self.ledger.note(SkippedSample(source, key, reason, f"step {step} was skipped"))
        files = "ledger.jsonl" if trainer.world_size == 1 else "ledger*.jsonl"
        where = f" {self.ledger.path.with_name(files)} lists its clips." if self.ledger.path else ""
        self.warn(f"Step {step} was skipped on all ranks: its gradient is not finite.{where}")
        if self.streak >= self.max_bad_steps:
            raise UserError(
                f"{self.streak} steps in a row, up to step {step}, had a gradient that is not "
                f"finite. They did not change the weights.{where} Lower optim.lr, raise "
                "optim.warmup_steps, use bf16-mixed instead of 16-mixed, check those clips, or "
                "raise trainer.max_bad_steps. Then continue from the last checkpoint with "
                "--resume auto."
            )


class SpikeDetector:
    """Detects losses that are more than `factor` robust deviations (MAD) above the median."""

    def __init__(self, factor: float):
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def median_before_spike(self, loss: float) -> float | None:
        """Return the median of the previous losses if this loss is a spike.

        Otherwise, add it to the history and return None.
        """
        if len(self.losses) >= SPIKE_HISTORY:
            median = statistics.median(self.losses)
            mad = statistics.median(abs(previous - median) for previous in self.losses)
            deviation = max(MAD_TO_DEVIATION * mad, MIN_DEVIATION * abs(median))
            if loss > median + self.factor * deviation:
                return median
        self.losses.append(loss)
        return None


def max_over_ranks(trainer: Any, value: int) -> int:
    """Return the maximum of an integer over all ranks. Must be called on all ranks.

    The hosts exchange it, so no rank waits for its device.
    """
    if trainer.world_size == 1:
        return int(value)
    maximum = torch.tensor(int(value), device="cpu")
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=trainer.strategy.host_group)
    return int(maximum)


def _engine(trainer: lightning.Trainer) -> Any:
    """Return the DeepSpeed engine of the run, or None under other strategies."""
    return getattr(trainer.strategy, "deepspeed_engine", None)
