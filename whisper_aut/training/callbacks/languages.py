"""Counts clips whose language the decoder has no token for, warns of them once, and carries their number over resumes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning
import torch.distributed as dist

from whisper_aut.data.batch import Batch
from whisper_aut.data.targets import without_language_token


class UnknownLanguages(lightning.Callback):
    """Counts training clips by their unknown language, over all ranks and the whole run.

    Args:
        warn: told once, at the first step that is logged after such a clip, or after the validation that finds the first.
    """

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.warned = False
        self.seen: Counter[str] = Counter()  # by this rank in this process
        self.earlier: Counter[str] = Counter()  # up to the checkpoint that was resumed
        self.in_validation: Counter[str] = Counter()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.seen.update(batch.unknown_languages)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole_step and trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            self._warn_once("So far ", self.seen)

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.in_validation = Counter()

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        module: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.in_validation.update(batch.unknown_languages)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._warn_once("In validation ", self.in_validation)

    def state_dict(self) -> dict[str, Any]:
        """Return what the run has counted so far; all ranks write a checkpoint together."""
        return {"clips": dict(self.total())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.earlier = Counter(state["clips"])

    def total(self) -> Counter[str]:
        """Return the training clips of the whole run by their language; all ranks call it together."""
        return self.earlier + _over_ranks(self.seen)

    def _warn_once(self, when: str, clips: Counter[str]) -> None:
        if not self.warned and (found := _over_ranks(clips)):
            self.warn(when + without_language_token(found))
            self.warned = True


def _over_ranks(clips: Counter[str]) -> Counter[str]:
    counts: list[Any] = [clips]
    if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        counts = [None] * ranks
        dist.all_gather_object(counts, clips)
    return sum(counts, Counter())
