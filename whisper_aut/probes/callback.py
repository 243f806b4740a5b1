"""Probe an encoder while it trains, to see how it learns and whether it forgets.

Scores are logged as `probe/TASK`, with a warning or a stop if a domain falls too far below its
first score. Tasks are embedded again each time, so use small ones. The protocol is `strict`,
with one seed. Curves are for monitoring only: choosing a checkpoint by the test part of a task
that is later reported would be selection on test data.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.fsdp import FSDPModule
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.config import DuringSettings
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import AudioEncoder
from whisper_aut.models.encoder import PackedEncoder, merge_lora
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.suite import run_suite
from whisper_aut.probes.tasks import ProbeTask
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.checkpoint import full_tensor

log = logging.getLogger(__name__)


class ProbeDuringTraining(lightning.Callback):
    """Scores the encoder at the start and every N optimizer steps, on rank 0 while the others wait.

    Warns or stops training if the mean score of the guarded domain falls too far below its first
    value.

    Args:
        tasks: small tasks. Their shards are read again each time.
        root: replaces `{root}` in the tasks' folders.
        settings: when to measure, the kind of probe, and what to do about forgetting. `knn` is the
            fastest kind, `linear` is stricter.

    Raises:
        UserError: in `setup`, under ZeRO stage 3, where no rank holds the full weights.
    """

    def __init__(self, tasks: Sequence[ProbeTask], root: str | Path, settings: DuringSettings):
        self.tasks, self.root, self.settings = tuple(tasks), root, settings
        self.scores: dict[int, dict[str, float]] = {}  # by step

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise UserError(
                "probe.during needs the full weights, which ZeRO stage 3 shards over the ranks: "
                "use stage 2 or FSDP, or probe after training."
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not self.scores:  # a checkpoint restores earlier scores
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.settings.every_steps == 0 and step not in self.scores:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = {int(step): dict(scores) for step, scores in state_dict["scores"].items()}

    def score_drop(self) -> float | None:
        """Return how far the guarded domain is below its first score, 0 … 1. None without tasks
        of that domain or without two measurements.
        """
        guarded = [task.name for task in self.tasks if task.domain == self.settings.guarded_domain]
        if not guarded or len(self.scores) < 2:
            return None
        first, last = self.scores[min(self.scores)], self.scores[max(self.scores)]
        # A run may be resumed with other tasks.
        drops = [first[name] - last[name] for name in guarded if name in first.keys() & last.keys()]
        return sum(drops) / len(drops) if drops else None

    def _measure(self, trainer: lightning.Trainer, module: Any) -> None:
        step, callbacks = trainer.global_step, trainer.callbacks  # pyright: ignore
        checkpoints = next(one for one in callbacks if isinstance(one, RollingCheckpoints))
        with checkpoints.paused(trainer), module.averaged():
            weights = {
                name: full_tensor(weight) for name, weight in module.encoder.state_dict().items()
            }
            scores = self._score(module, weights) if trainer.is_global_zero else {}
            scores = self.scores[step] = trainer.strategy.broadcast(scores)
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{name}": score for name, score in scores.items()}, step)
        drop = self.score_drop()
        if drop is None or drop <= self.settings.max_drop:
            return
        log.warning(
            "The probe score of %s has fallen by %.1f points since the start (step %d; "
            "probe.during.max_drop allows %.1f).%s",
            self.settings.guarded_domain,
            100 * drop,
            step,
            100 * self.settings.max_drop,
            " Training stops." if self.settings.on_drop == "stop" else "",
        )
        if self.settings.on_drop == "stop":
            checkpoints.save(trainer)
            trainer.should_stop = True

    def _score(self, module: Any, weights: dict[str, Any]) -> dict[str, float]:
        training, encoder = module.encoder.training, module.encoder
        is_sharded = isinstance(module, FSDPModule)
        if is_sharded or next(encoder.parameters()).dtype != torch.float32:
            with torch.device("meta"):
                encoder = PackedEncoder(WhisperEncoder(encoder.whisper.config), encoder.padding)
            exact = {name: weight.float() for name, weight in weights.items()}
            encoder.load_state_dict(merge_lora(exact, prefix=""), assign=True)
        try:
            with (
                isolate_rng(),  # training continues with the same random numbers
                tempfile.TemporaryDirectory() as cache,
            ):
                scores = run_suite(
                    {"encoder": AudioEncoder(encoder).to(module.device)},
                    self.tasks,
                    root=self.root,
                    cache=cache,
                    seeds=(0,),
                    kind=self.settings.kind,
                    embedding=EmbedSettings(quiet=True),
                )
        finally:
            module.encoder.train(training)
        return {entry.task: entry.mean for entry in scores.entries}
