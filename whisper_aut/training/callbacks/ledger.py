"""Carries the counts of skipped samples over ranks and resumes, and stops the run at the limit."""

from typing import Any

import lightning
import torch.distributed as dist

from whisper_aut.data.ledger import Counts, Ledger
from whisper_aut.data.pack import Batch


class LedgerCallback(lightning.Callback):
    """Records each training batch, and the batches of the run's first validation, in a `Ledger`.

    The limit is checked as often as the run logs, on the counts of all ranks: all of them stop
    together.

    Args:
        ledger: of this rank.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.ledger.record(batch.sources, batch.refusals)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        module: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if (
            not trainer.sanity_checking and not self.ledger.validated
        ):  # the same clips come back in every validation
            self.ledger.record_validation(batch.refusals)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.ledger.validated |= not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        counts = counts_of_all_ranks(self.ledger)
        if skipped := counts.all_skipped.total():
            module.log("data/refused", float(skipped), prog_bar=True, batch_size=1)
        self.ledger.check(counts)

    def state_dict(self) -> dict[str, Any]:
        """Return what the run has counted so far; all ranks write a checkpoint together."""
        return counts_of_all_ranks(self.ledger).state_dict() | {"validated": self.ledger.validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.resume(Counts.from_state(state), state["validated"])

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        self.ledger.close()


def counts_of_all_ranks(ledger: Ledger) -> Counts:
    """Return the counts of the whole run; all ranks call it together."""
    counts: list[Any] = [ledger.counts]
    if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        counts = [None] * ranks
        dist.all_gather_object(counts, ledger.counts)
    return sum(counts, ledger.earlier)
