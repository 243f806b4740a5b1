"""Ends a run whose data ends before its planned steps do; Lightning would begin one empty epoch after another.

In: epochs in which no batch came. Out: a last checkpoint, a line for people, and the end of training. Next: `training.train` closes the
run as at its last step.
"""

from collections.abc import Callable
from typing import Any

import lightning

from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints

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
                f"The training data ended after step {trainer.global_step} of {trainer.max_steps} planned; the run ends there."
            )
            self.checkpoints.save(trainer)
            trainer.should_stop = True
