"""Carries the refusals of every batch into the run's ledger, and their total into the log."""

from typing import Any

import lightning

from whisper_aut.data.ledger import Ledger
from whisper_aut.data.pack import Batch


class LedgerCallback(lightning.Callback):
    """Records each training and validation batch in a `Ledger`.

    Args:
        ledger: of this rank.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        self.ledger.record(batch.sources, batch.refusals)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # The same clips come back in every validation: written down once, and not counted into the training share.
        if not trainer.sanity_checking and trainer.global_step == 0:
            self.ledger.record((), batch.refusals)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.ledger.total:
            module.log("data/refused", float(self.ledger.total), prog_bar=True, batch_size=1)

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        self.ledger.close()
