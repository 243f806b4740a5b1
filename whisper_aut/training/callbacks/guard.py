"""Guard rails around the optimiser: a step whose gradient is not finite is left out on all ranks, and who caused it is written down.

In: gradients, and the per-token losses that the module keeps of each step. Out: clipped gradients, skipped steps, lines in the ledger;
`train/loss`, `train/accuracy`, `train/grad_norm` and `train/skipped_steps` of whole steps in the log; `UserError` after too many bad steps
in a row; `Rewind` where a spike of the loss asks for it. Next: `training.train` goes on from an earlier checkpoint after a `Rewind`.

Gradients are summed over ranks before this looks, so one bad clip makes the norm non-finite on all; ranks then tell each other whether
one of them can name it.
Under DeepSpeed the engine itself leaves such a step out; here that is only counted and explained. The schedule moves on in any case.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning
import torch

from whisper_aut.data.batching import Cursor
from whisper_aut.data.ledger import Ledger
from whisper_aut.data.sample import Refusal
from whisper_aut.errors import Reason, UserError
from whisper_aut.training.callbacks.stop import highest

SPIKE_WINDOW, SPIKE_HISTORY = (
    100,
    20,
)  # steps that are looked back on, and how many of them a judgement needs
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LEAST_DEVIATION = 0.02  # of the median: a plateau must not turn noise into spikes


class Rewind(Exception):
    """The loss has spiked; the run is to go on from an earlier checkpoint, behind the data read so far.

    Attributes:
        cursor: where the data stands behind the step that spiked.
    """

    def __init__(self, cursor: Cursor, message: str):
        super().__init__(message)
        self.cursor = cursor


class Guard(lightning.Callback):
    """Leaves out steps that would spoil the weights.

    Args:
        ledger: of this rank; the clips behind a bad step are written there.
        max_bad_steps: so many in a row stop the run.
        gradient_clip: gradients of a larger norm are scaled down to it, by the norm that is looked at anyway; 0 does not. DeepSpeed clips
            by itself.
        spike_factor: a loss so many robust deviations above the running median is a spike; 0 does not look.
        rewind: answer a spike with `Rewind` and not with a warning alone.
        warn: told what happened, in a sentence.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        max_bad_steps: int,
        gradient_clip: float = 0.0,
        spike_factor: float = 0.0,
        rewind: bool = False,
        warn: Callable[[str], None] = lambda _: None,
    ):
        self.ledger, self.max_bad_steps, self.gradient_clip, self.warn = (
            ledger,
            max_bad_steps,
            gradient_clip,
            warn,
        )
        self.spikes = SpikeDetector(spike_factor) if spike_factor else None
        self.rewind = rewind
        self.skipped = self.streak = 0
        self._norm, self._bad = math.nan, False
        self.figures: dict[
            str, Any
        ] = {}  # of the last step; Lightning forgets them over a validation

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: Any, optimizer: Any
    ) -> None:
        if _engine(trainer) is not None:
            return
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = (
            torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if parameters
            else torch.zeros(())
        )
        self._norm = float(norm)
        self._bad = not math.isfinite(self._norm)
        if (
            self._bad
        ):  # without gradients the optimiser does nothing: no update, no decay, no moment
            for parameter in parameters:
                parameter.grad = None
        elif self.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip, norm)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if (engine := _engine(trainer)) is not None:
            norm: Any = engine.get_global_grad_norm()
            self._norm, self._bad = (
                math.nan if norm is None else float(norm),
                not engine.was_step_applied(),
            )
        loss, accuracy = module.step_figures()
        self.figures = {
            "train/loss": loss,
            "train/accuracy": accuracy,
            "train/grad_norm": self._norm,
        }
        for name, value in self.figures.items():
            module.log(name, value, prog_bar=name == "train/loss", batch_size=1)
        if self._bad:
            self._count_bad(trainer, module)
            return
        self.streak = 0
        if self.spikes and (usual := self.spikes.judge(float(loss))):
            self._answer_spike(trainer.global_step, float(loss), usual, batch.behind)

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "streak": self.streak,
            "losses": list(self.spikes.losses) if self.spikes else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.streak = state["skipped"], state["streak"]
        if self.spikes:
            self.spikes.losses.extend(state["losses"])

    def _count_bad(self, trainer: lightning.Trainer, module: Any) -> None:
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        module.log("train/skipped_steps", float(self.skipped), prog_bar=True, batch_size=1)
        step = trainer.global_step
        reason, named = (
            Reason.NON_FINITE_LOSS,
            [clip for seen in module.seen for clip in seen.non_finite()],
        )
        if not highest(trainer, module, bool(named)):
            reason, named = (
                Reason.NON_FINITE_GRADIENT,
                [clip for seen in module.seen for clip in seen.clips],
            )
        for source, key in named:
            self.ledger.note(Refusal(source, key, reason, f"step {step} was left out"))
        files = "ledger.jsonl" if trainer.world_size == 1 else "ledger*.jsonl"
        where = f" {self.ledger.path.with_name(files)} names the clips." if self.ledger.path else ""
        self.warn(f"Step {step} was left out on all ranks: its gradient is not finite.{where}")
        if self.streak >= self.max_bad_steps:
            raise UserError(
                f"{self.streak} steps in a row had a gradient that is not finite, up to step {step}; the weights are as they were "
                f"before them.{where} Lower optim.lr or raise optim.warmup_steps, use bf16-mixed in place of 16-mixed, look at "
                "those clips, or raise trainer.max_bad_steps. --resume auto goes on from the last checkpoint."
            )

    def _answer_spike(self, step: int, loss: float, usual: float, behind: Cursor) -> None:
        message = f"The loss spiked to {loss:.4g} at step {step}, where {usual:.4g} was usual."
        if self.rewind:
            raise Rewind(behind, message)
        self.warn(message)


class SpikeDetector:
    """Says whether a loss stands out from those before it: above the median by `factor` robust deviations (MAD)."""

    def __init__(self, factor: float):
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def judge(self, loss: float) -> float | None:
        """Return the usual loss where this one is a spike; else take it into the history."""
        if len(self.losses) >= SPIKE_HISTORY:
            median = statistics.median(self.losses)
            deviation = MAD_TO_DEVIATION * statistics.median(
                abs(before - median) for before in self.losses
            )
            if loss > median + self.factor * max(deviation, LEAST_DEVIATION * abs(median)):
                return median
        self.losses.append(loss)
        return None


def _engine(trainer: lightning.Trainer) -> Any:
    """Return the DeepSpeed engine of the run, or None under other strategies."""
    return getattr(trainer.strategy, "deepspeed_engine", None)
