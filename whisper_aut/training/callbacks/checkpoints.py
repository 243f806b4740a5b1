"""Saves checkpoints at whole optimizer steps, and keeps the last few and the best.

The links `last.ckpt` and `best.ckpt` point to the newest checkpoint and to the one with the lowest
`valid/loss`. A checkpoint is always written before the validation of its step, so stopping a run
during validation loses nothing.
"""

import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning

from whisper_aut.training.checkpoint import BEST, LAST, checkpoint_name, checkpoints_in, point_to

JUDGED_BY = "valid/loss"
SUPERSEDED = ".superseded-"  # prefix of checkpoints later than the one the run was resumed from


class RollingCheckpoints(lightning.Callback):
    """Saves every N steps, before every validation, and at the last step.

    Args:
        folder: Folder of the checkpoints.
        every_steps: Optimizer steps between two checkpoints.
        valid_every_steps: Optimizer steps between two validations.
        keep: Number of newest checkpoints to keep, in addition to the best one.
        warn: Called with a message when later checkpoints are set aside.
        paused: Context in which the run saves, or waits for a checkpoint to be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_steps: int,
        valid_every_steps: int,
        keep: int,
        warn: Callable[[str], None] = lambda _: None,
        paused: Callable[[lightning.Trainer], AbstractContextManager[None]] = lambda _: (
            nullcontext()
        ),
    ):
        self.warn, self.paused = warn, paused
        self.folder, self.every_steps, self.valid_every_steps, self.keep = (
            folder,
            every_steps,
            valid_every_steps,
            keep,
        )
        self.best_loss, self.best_step = math.inf, 0
        self.validated_step = -1  # the last step that this process validated
        # The last step that this process saved. An older checkpoint of a step is overwritten.
        self._saved = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self._set_aside_after(trainer.global_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = (
            step % self.every_steps == 0
            or step % self.valid_every_steps == 0
            or step == trainer.max_steps
        )
        if whole_step and due:
            self.save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Update the best checkpoint. The module reduces the loss, so all ranks have the same."""
        loss, step = trainer.callback_metrics.get(JUDGED_BY), trainer.global_step
        self.validated_step = step
        self.settle(trainer)
        if trainer.sanity_checking or loss is None or not float(loss) < self.best_loss:
            return
        self.best_loss, self.best_step = float(loss), step
        path = self.folder / checkpoint_name(step)
        if trainer.is_global_zero and path.exists():
            point_to(self.folder / BEST, path)
            self._prune(path)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Validate the last step if that was not due: its metrics are the metrics of the run."""
        if (
            self.validated_step != trainer.global_step
            and trainer.num_val_batches != []
            and not trainer.sanity_checking
        ):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self.settle(trainer)

    def save(self, trainer: lightning.Trainer) -> Path:
        """Save this step unless it is saved already, and delete checkpoints not to be kept.

        With asynchronous checkpoints, writing may continue until `settle` returns.

        Returns:
            The path of the checkpoint.
        """
        path = self.folder / checkpoint_name(trainer.global_step)
        if self._saved != trainer.global_step:
            with self.paused(trainer):
                # False: save the full state, not only the weights.
                trainer.save_checkpoint(path, False, partial(self._written, path))
            self._saved = trainer.global_step
        return path

    def settle(self, trainer: lightning.Trainer) -> None:
        """Wait until the last checkpoint is on disk; see `NamedCheckpoints.wait_for_checkpoint`."""
        with self.paused(trainer):
            trainer.strategy.wait_for_checkpoint()  # pyright: ignore[reportAttributeAccessIssue]

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]

    def _written(self, path: Path) -> None:
        """Called on rank 0 when a checkpoint is complete."""
        point_to(self.folder / LAST, path)
        self._prune(path)

    def _prune(self, written: Path) -> None:
        kept = {self.folder / checkpoint_name(self.best_step), written}
        kept |= set(checkpoints_in(self.folder)[-self.keep :])
        for path in set(checkpoints_in(self.folder)) - kept:
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps than the one the run was resumed from.

        Otherwise, they would be found as the newest checkpoints of the run.
        """
        later = [path for path in checkpoints_in(self.folder) if path.name > checkpoint_name(step)]
        if not later:
            return
        for path in later:
            aside = path.with_name(SUPERSEDED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        for path in sorted(self.folder.glob(f"{SUPERSEDED}*"))[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        for link, target in (
            (LAST, checkpoint_name(step)),
            (BEST, checkpoint_name(self.best_step)),
        ):
            if (self.folder / target).exists():
                point_to(self.folder / link, self.folder / target)
            else:
                (self.folder / link).unlink(missing_ok=True)
        self.warn(
            f"{', '.join(path.name for path in later)} in {self.folder} are of later steps than "
            f"{step}, from which the run goes on. "
            f"They are named {SUPERSEDED}step-… now and may be deleted."
        )
