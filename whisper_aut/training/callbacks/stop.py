"""A clean stop: Ctrl-C, SIGTERM or SIGUSR1 ends the run behind the current step, with a checkpoint, on all ranks together.

In: signals; SIGTERM and SIGUSR1 are how Slurm and clouds announce that a job will be taken away. Out: `Interrupted` or `Preempted`, which
the command line turns into its exit status. Next: `--resume auto`. It is enough that one rank gets the signal.
"""

import signal
from types import FrameType
from typing import Any

import lightning
import torch

from whisper_aut.errors import Interrupted, Preempted
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints

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
