"""The progress bar: Lightning's, with the step and the time left of the whole run instead of a version number."""

import time
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import TQDMProgressBar

from whisper_aut.training.callbacks.throughput import ThroughputMeter


class RunProgressBar(TQDMProgressBar):
    """Shows epochs as Lightning does, and behind them `step 150/700, left 0:02:10, audio-s/s 210` for all of the run.

    Args:
        meter: knows the last figure.
        refresh_rate: batches between updates.
    """

    def __init__(self, meter: ThroughputMeter, refresh_rate: int):
        super().__init__(refresh_rate=refresh_rate)
        self.meter = meter
        self._started, self._first_step = 0.0, 0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        done = trainer.global_step - self._first_step
        if trainer.training and done:
            seconds = (
                (time.monotonic() - self._started)
                / done
                * (trainer.max_steps - trainer.global_step)
            )
            metrics |= {
                "step": f"{trainer.global_step}/{trainer.max_steps}",
                "left": str(timedelta(seconds=round(seconds))),
            }
        if self.meter.shown:
            metrics["audio-s/s"] = self.meter.shown
        return metrics
