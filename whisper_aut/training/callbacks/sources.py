"""Logs how often each training source has been gone through, `data/epochs/FOLDER`, beside the other figures of a step."""

from typing import Any

import lightning


class SourceEpochs(lightning.Callback):
    """Writes the epochs of every source into the loggers, as often as they log."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.position = batch.behind.position
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        epochs = data.source_epochs(batch.behind.position)
        short = _short_names(list(epochs))
        for logger in trainer.loggers:
            figures = {f"data/epochs/{short[root]}": value for root, value in epochs.items()}
            logger.log_metrics(figures, step=trainer.global_step)


def _short_names(roots: list[str]) -> dict[str, str]:
    """Leave out the folders that all sources share."""
    parts = {root: root.rstrip("/").split("/") for root in roots}
    shared = 0
    while (
        all(len(names) > shared + 1 for names in parts.values())
        and len({names[shared] for names in parts.values()}) == 1
    ):
        shared += 1
    return {
        root: "/".join(names[shared:]) if len(roots) > 1 else names[-1]
        for root, names in parts.items()
    }
