"""Saves checkpoints at whole optimizer steps, keeps the last few and the best, averages weights."""

import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from torch.optim.swa_utils import get_ema_multi_avg_fn

from whisper_aut.config import TrainerSettings
from whisper_aut.data.sampler import Cursor
from whisper_aut.training.callbacks import ends_step
from whisper_aut.training.checkpoint import (
    BEST,
    LAST,
    checkpoint_name,
    checkpoints_in,
    local_tensor,
    point_link,
)
from whisper_aut.utils import read_json, write_json

MONITORED, BEST_LOSS = "valid/loss", "best.json"
SUPERSEDED = ".superseded-"  # prefix of checkpoints later than the one the run was resumed from


class RollingCheckpoints(Checkpoint):
    """Saves every N steps, before every validation, and at the last step, which is validated too.

    The links `last.ckpt` and `best.ckpt` point to the newest checkpoint and to the one with the
    lowest `valid/loss`. A checkpoint is always written before the validation of its step, so
    stopping a run during validation loses nothing. `ModelCheckpoint` writes either every N steps or
    after a validation (https://github.com/Lightning-AI/pytorch-lightning/issues/14431).

    Args:
        folder: Folder of the checkpoints.
        settings: When to save and validate, and how many of the newest checkpoints to keep.
        warn: Called with a message when later checkpoints are renamed.
        skip_to: Position in the data to resume from, in place of the checkpoint's own.
        before_save: Called before the state of the run is collected. May raise.
        paused: Context in which the run saves, or waits for a checkpoint to be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrainerSettings,
        *,
        skip_to: Cursor | None = None,
        warn: Callable[[str], None] = lambda _: None,
        before_save: Callable[[Any], None] = lambda _: None,
        paused: Callable[[Any], AbstractContextManager[None]] = lambda _: nullcontext(),
    ):
        self.folder, self.settings, self.warn, self.paused = folder, settings, warn, paused
        self.skip_to, self.before_save = skip_to, before_save
        self.best_loss, self.best_step = math.inf, 0
        self.validated_step = -1  # the last step that this process validated
        # The last step that this process saved. An older checkpoint of a step is overwritten.
        self._saved_step = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            # The last step of a run may have been the best, which its own checkpoint does not know.
            found = read_json(self.folder / BEST_LOSS, default={"best_step": -1})
            if found["best_step"] == trainer.global_step:
                self.load_state_dict(found)
            elif found["best_step"] > trainer.global_step:
                (self.folder / BEST_LOSS).unlink()
            self._rename_later(trainer.global_step)

    def on_fit_end(self, trainer: lightning.Trainer, module: Any) -> None:
        # Training does not start if the run was resumed at its last step.
        self.on_train_start(trainer, module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        self.save_if_due(trainer)
        if trainer.global_step == trainer.max_steps:
            # Lightning validates before it stops early, so the metrics of the run are those of its
            # last step.
            trainer.should_stop = True

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Update the best checkpoint. The module reduces the loss, so all ranks have the same."""
        loss, step = trainer.callback_metrics.get(MONITORED), trainer.global_step
        self.validated_step = step
        self.wait(trainer)
        if loss is None or not float(loss) < self.best_loss:
            return
        self.best_loss, self.best_step = float(loss), step
        path = self.folder / checkpoint_name(step)
        if trainer.is_global_zero and path.exists():
            point_link(self.folder / BEST, path)
            write_json(self.folder / BEST_LOSS, self.state_dict())
            self._prune(path)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.wait(trainer)

    def save_if_due(self, trainer: lightning.Trainer) -> None:
        settings = self.settings
        due = (settings.checkpoint_every_steps, settings.valid_every_steps, trainer.max_steps)
        if any(trainer.global_step % steps == 0 for steps in due):
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> Path:
        """Save this step unless it is saved already, and delete old checkpoints.

        With asynchronous checkpoints, writing may continue until `wait` returns.

        Returns:
            The path of the checkpoint.
        """
        path = self.folder / checkpoint_name(trainer.global_step)
        if self._saved_step != trainer.global_step:
            self.before_save(trainer)
            with self.paused(trainer):
                trainer.save_checkpoint(path, storage_options=partial(self._on_written, path))
            self._saved_step = trainer.global_step
        return path

    def wait(self, trainer: Any) -> None:
        """Wait until the last checkpoint is on disk; see `NamedCheckpoints.wait_for_checkpoint`."""
        with self.paused(trainer):
            trainer.strategy.wait_for_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Derive the counters of Lightning's loops from the optimizer step of the checkpoint.

        Lightning restores the counters of micro-batches as they were in the hook that saved, which
        is wrong for another number of ranks or accumulated micro-batches. Its `reset` and `advance`
        in `lightning/pytorch/loops/training_epoch_loop.py` tell from them what remains to be done.
        Here they say that the step is complete and an epoch begins: `TrainLoader` knows the
        position in the data (https://github.com/Lightning-AI/pytorch-lightning/issues/18780).

        Checkpoints are written before the validation of their step, so if one was due, it comes
        first. A validation that stopped in its first batch is repeated.
        """
        step, fit_loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        batches_done = step * trainer.accumulate_grad_batches
        is_due = int(batches_done % trainer.val_check_interval == 0)
        counters = ("ready", "started", "processed", "completed")
        none = dict.fromkeys(counters, 0)
        fit_loop["epoch_loop.batch_progress"] |= {
            "total": dict.fromkeys(counters, batches_done),
            "current": dict(none),
            "is_last_batch": False,
        }
        # Lightning counts the step again after the validation.
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - is_due
        fit_loop["epoch_loop.val_loop.batch_progress"] |= {
            "total": none | {"ready": is_due, "started": is_due},
            "current": dict(none),
        }
        if self.skip_to:
            for loader in loader_states(checkpoint):
                loader |= self.skip_to._asdict()

    def _on_written(self, path: Path) -> None:
        """Called on rank 0 when a checkpoint is complete."""
        point_link(self.folder / LAST, path)
        self._prune(path)

    def _prune(self, written: Path) -> None:
        found = checkpoints_in(self.folder)
        kept = {
            self.folder / checkpoint_name(self.best_step),
            written,
            *found[-self.settings.keep_checkpoints :],
        }
        for path in set(found) - kept:
            shutil.rmtree(path, ignore_errors=True)

    def _rename_later(self, step: int) -> None:
        """Rename the checkpoints of later steps than the one the run was resumed from.

        Otherwise, they would be found as the newest checkpoints of the run.
        """
        later = [path for path in checkpoints_in(self.folder) if path.name > checkpoint_name(step)]
        if not later:
            return
        for path in later:
            renamed = path.with_name(SUPERSEDED + path.name)
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
        for path in sorted(self.folder.glob(f"{SUPERSEDED}*"))[: -self.settings.keep_checkpoints]:
            shutil.rmtree(path, ignore_errors=True)
        for link, target_step in ((LAST, step), (BEST, self.best_step)):
            target = self.folder / checkpoint_name(target_step)
            if target.exists():
                point_link(self.folder / link, target)
            else:
                (self.folder / link).unlink(missing_ok=True)
        self.warn(
            f"The run resumes from step {step}, so later checkpoints in {self.folder} were renamed "
            f"to {SUPERSEDED}step-… and can be deleted: {', '.join(path.name for path in later)}."
        )


class AverageWeights(lightning.Callback):
    """Updates `AudioTextModule.average` after each optimizer step, and validates with it.

    The average is `decay` times the average plus 1 − `decay` times the weights, and begins at the
    pretrained weights. Checkpoints contain it besides the weights. Lightning's `EMAWeightAveraging`
    copies the whole module, a frozen language model included, and saves it in Lightning's format.
    """

    def __init__(self, decay: float):
        self.decay, self._validating = decay, ExitStack()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        trained = {n: p.detach() for n, p in module.named_parameters() if n in module.average}
        module.average = {n: module.average[n].to(p.device) for n, p in trained.items()}
        # Under FSDP, each rank averages its part.
        weights = [local_tensor(weight).float() for weight in trained.values()]
        averages = [local_tensor(average) for average in module.average.values()]
        get_ema_multi_avg_fn(self.decay)(averages, weights, None)

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._validating.enter_context(module.averaged())

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._validating.close()


def loader_states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of the training loaders in the state of a checkpoint."""
    return checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
