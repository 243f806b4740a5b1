"""Probes while an encoder trains: how it learns, and whether it forgets.

In: small probe tasks, the module that trains. Out: `probe/TASK` in the logs, and a warning or a stop when a domain falls too far below
where it began. Next: the report draws the curves. A task is embedded anew each time, so small ones are meant; the protocol is `strict`, on
one seed. A curve is for watching: choosing a checkpoint by the test part of a task that is then reported would be selection on test.
"""

import copy
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from whisper_aut.errors import UserError
from whisper_aut.models.pretrained import AudioEncoder
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.suite import run_suite
from whisper_aut.probes.tasks import ProbeTask
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForgettingGuard:
    """Warns, or stops training, when a domain's mean score is more than `max_drop` (0 … 1) below that at the start."""

    domain: str = "speech"
    max_drop: float = 0.05
    action: Literal["warn", "stop"] = "warn"


class ProbeDuringTraining(lightning.Callback):
    """Scores the encoder at the start and every so many optimiser steps, on the first rank while the others wait.

    Args:
        tasks: small ones; their shards are read again each time.
        root: what `{root}` stands for in them.
        every_steps: optimiser steps between two measurements.
        kind: of probe: `knn` is quickest, `linear` stricter.
        guard: against forgetting.

    Raises:
        UserError: under ZeRO stage 3, where no rank holds whole weights.
    """

    def __init__(
        self,
        tasks: Sequence[ProbeTask],
        root: str | Path,
        *,
        every_steps: int,
        kind: str = "knn",
        guard: ForgettingGuard | None = None,
    ):
        self.tasks, self.root, self.every_steps, self.kind = tuple(tasks), root, every_steps, kind
        self.guard = guard or ForgettingGuard()
        self.scores: dict[int, dict[str, float]] = {}  # by step

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise UserError(
                "probe.during needs whole weights, and ZeRO stage 3 spreads them: use stage 2, or probe afterwards."
            )

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self.scores:
            self._measure(trainer, module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_steps == 0 and step not in self.scores:
            self._measure(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = {int(step): dict(scores) for step, scores in state_dict["scores"].items()}

    def forgotten(self) -> float | None:
        """Return how far the guarded domain lies below its first score, 0 … 1; None without two scores of a task of that domain."""
        guarded = [task.name for task in self.tasks if task.domain == self.guard.domain]
        if not guarded or len(self.scores) < 2:
            return None
        first, last = (
            sum(scores[name] for name in guarded) / len(guarded)
            for scores in (self._first(), self._last())
        )
        return first - last

    def _first(self) -> dict[str, float]:
        return self.scores[min(self.scores)]

    def _last(self) -> dict[str, float]:
        return self.scores[max(self.scores)]

    def _measure(self, trainer: lightning.Trainer, module: Any) -> None:
        step = trainer.global_step
        found = self._score(module, step) if trainer.is_global_zero else {}
        found = trainer.strategy.broadcast(found)
        self.scores[step] = found
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{name}": score for name, score in found.items()}, step)
        fallen = self.forgotten()
        if fallen is not None and fallen > self.guard.max_drop:
            told = (
                f"The probe score of {self.guard.domain} has fallen by {100 * fallen:.1f} points since the start "
                f"(step {step}; probe.during.max_drop allows {100 * self.guard.max_drop:.1f})."
            )
            log.warning("%s%s", told, " Training stops." if self.guard.action == "stop" else "")
            if self.guard.action == "stop":
                self._stop(trainer)

    def _stop(self, trainer: lightning.Trainer) -> None:
        """End training behind this step, which is saved first."""
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, RollingCheckpoints):
                callback.save(trainer)
        trainer.should_stop = True

    def _score(self, module: Any, step: int) -> dict[str, float]:
        training, weights = module.encoder.training, next(module.encoder.parameters())
        whole = (
            module.encoder
            if weights.dtype == torch.float32
            else copy.deepcopy(module.encoder).float()
        )
        encoder = AudioEncoder(whole).to(module.device)
        try:
            with (
                isolate_rng(),
                tempfile.TemporaryDirectory() as cache,
            ):  # training draws what it would have drawn
                scores = run_suite(
                    {f"step {step}": encoder}, self.tasks, root=self.root, cache=cache, seeds=(0,), kind=self.kind,
                    embedding=EmbedSettings(quiet=True),
                )  # fmt: skip
        finally:
            module.encoder.train(training)
        return {entry.task: entry.mean for entry in scores.entries}
