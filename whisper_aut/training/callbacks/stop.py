"""A clean stop: the first Ctrl-C or SIGTERM ends the run behind the current step, with a checkpoint."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning

from whisper_aut.errors import Interrupted


class CleanStop(lightning.Callback):
    """Saves a checkpoint and ends the run when the process is asked to stop. A second Ctrl-C ends it at once.

    Args:
        checkpoint: where to save.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or not trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            return
        trainer.save_checkpoint(self.checkpoint, False)  # the whole state, not the weights alone
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        for logger in trainer.loggers:  # Lightning would have logged this step behind this hook
            logger.log_metrics(figures, step=trainer.global_step - 1)
        raise Interrupted(f"stopped after step {trainer.global_step}; saved {self.checkpoint}")

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)
