"""Counts of the data that a run reads."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning

from whisper_aut.data.batch import Batch
from whisper_aut.data.dataset import Counts, Ledger
from whisper_aut.data.targets import missing_token_warning
from whisper_aut.errors import UserError
from whisper_aut.training.callbacks import ends_logged_step, gather_objects
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints


class DataMonitor(lightning.Callback):
    """Counts skipped samples, epochs of each source, and clips in unknown languages.

    All counts are part of checkpoints, so those of a resumed run cover the whole run.

    Args:
        ledger: Ledger of this rank. Its limit on skipped samples is checked at every logged step.
            It applies to the counts of all ranks, so all ranks stop together.
        checkpoints: Saves the step at which the limit stops the run, if a checkpoint is due.
        warn: Called once with a message about clips in languages without a token.
    """

    def __init__(
        self, ledger: Ledger, checkpoints: RollingCheckpoints, warn: Callable[[str], None]
    ):
        self.ledger, self.checkpoints, self.warn = ledger, checkpoints, warn
        self._languages: Counter[str] = Counter()  # on this rank, in this process
        self._earlier_languages: Counter[str] = Counter()  # on all ranks, before the resume
        self._validation_languages: Counter[str] = Counter()
        self._warned = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, *_: Any) -> None:
        self.ledger.record(batch.sources, batch.skipped)
        self._languages.update(batch.unknown_languages)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        data = trainer.datamodule
        data.position = batch.next_cursor.position
        if not ends_logged_step(trainer, batch_idx):
            return
        epochs = data.source_epochs(data.position)
        names = _short_names(list(epochs))
        for logger in trainer.loggers:
            metrics = {f"data/epochs/{names[path]}": value for path, value in epochs.items()}
            logger.log_metrics(metrics, step=trainer.global_step)
        self._warn_once("So far ", self._languages)
        counts = gather_counts(self.ledger)
        if skipped := counts.all_skipped.total():
            module.log("data/skipped", float(skipped), prog_bar=True, batch_size=1)
        try:
            self.ledger.check(counts)
        except UserError:
            # Lightning calls the callback that saves after this one.
            self.checkpoints.save_if_due(trainer)
            raise

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._validation_languages.clear()

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Batch, *_: Any) -> None:
        self._validation_languages.update(batch.unknown_languages)
        # Every validation reads the same clips, so only the first is recorded.
        if not self.ledger.validated:
            self.ledger.record_validation(batch.skipped)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.ledger.validated = True
        self._warn_once("In validation ", self._validation_languages)

    def unknown_languages(self) -> Counter[str]:
        """Return the clips of the whole run by unknown language. Must be called on all ranks."""
        return sum(gather_objects(self._languages), self._earlier_languages)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the run so far. Must be called on all ranks."""
        return gather_counts(self.ledger).state_dict() | {
            "validated": self.ledger.validated,
            "unknown_languages": dict(self.unknown_languages()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.resume(Counts.from_state(state), state["validated"])
        self._earlier_languages = Counter(state["unknown_languages"])

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        self.ledger.close()

    def _warn_once(self, when: str, clips: Counter[str]) -> None:
        if not self._warned and (found := sum(gather_objects(clips), Counter())):
            self.warn(when + missing_token_warning(found))
            self._warned = True


def gather_counts(ledger: Ledger) -> Counts:
    """Return the counts of the whole run. Must be called on all ranks."""
    return sum(gather_objects(ledger.counts), ledger.earlier)


def _short_names(paths: list[str]) -> dict[str, str]:
    """Return the source paths without their common leading folders."""
    parts = {path: path.rstrip("/").split("/") for path in paths}
    shared = 0
    while (
        all(len(names) > shared + 1 for names in parts.values())
        and len({names[shared] for names in parts.values()}) == 1
    ):
        shared += 1
    return {
        path: "/".join(names[shared:]) if len(paths) > 1 else names[-1]
        for path, names in parts.items()
    }
