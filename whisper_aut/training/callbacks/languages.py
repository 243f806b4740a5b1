"""Counts clips in languages for which the decoder has no token, and warns about them once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning
import torch.distributed as dist

from whisper_aut.data.batch import Batch
from whisper_aut.data.targets import missing_token_warning


class UnknownLanguages(lightning.Callback):
    """Counts training clips by unknown language, over all ranks and the whole run.

    The counts are part of checkpoints, so a resumed run continues them.

    Args:
        warn: Called once with a message: at the first logged step after such a clip, or after the
            validation that contains one.
    """

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.warned = False
        self.seen: Counter[str] = Counter()  # on this rank, in this process
        self.earlier: Counter[str] = Counter()  # on all ranks, before the resume
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
        """Return the counts of the run so far. Must be called on all ranks."""
        return {"clips": dict(self.total())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.earlier = Counter(state["clips"])

    def total(self) -> Counter[str]:
        """Return the number of clips of the whole run by language. Must be called on all ranks."""
        return self.earlier + _over_ranks(self.seen)

    def _warn_once(self, when: str, clips: Counter[str]) -> None:
        if not self.warned and (found := _over_ranks(clips)):
            self.warn(when + missing_token_warning(found))
            self.warned = True


def _over_ranks(clips: Counter[str]) -> Counter[str]:
    counts: list[Any] = [clips]
    if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        counts = [None] * ranks
        dist.all_gather_object(counts, clips)
    return sum(counts, Counter())
