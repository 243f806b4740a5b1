"""Watches the clock around every step, and writes down how much audio goes through.

In: the batches of training. Out: `throughput/…` in the loggers every `log_every_n_steps`, one figure in the progress bar, all of
them over the whole run in `summary()`. Validation and checkpoints are not counted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning
import torch

from whisper_aut.data.pack import Batch
from whisper_aut.model.encoder import encoder_frames
from whisper_aut.model.flops import encoder_flops
from whisper_aut.training.accelerators import peak_flops
from whisper_aut.training.throughput import Throughput, peak_memory_gib

PREFIX = "throughput/"


class ThroughputMeter(lightning.Callback):
    """Meters a run without making the device wait: times are taken when figures are due, between which steps queue freely.

    Args:
        precision: Lightning's, for the device's peak.
    """

    def __init__(self, precision: str):
        self.precision = precision
        self.total, self.shown = Throughput(), ""
        self._part = Throughput()
        self._begun = self._ended = 0.0
        self._waited = 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._begun = self._ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._ended
        # Counted before the step: a checkpoint that is written behind it, by whichever callback, holds it.
        padded = module.encoder.padding == "30s"
        self._part.add_batch(
            batch.mel_lengths, sum(batch.targets.lengths), _flops(module, batch), padded=padded
        )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole_step and trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            self._take(trainer, module)
        self._ended = time.perf_counter()

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._take(trainer, module)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._begun = self._ended = time.perf_counter()

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._take(trainer, module)

    @contextmanager
    def paused(self, trainer: lightning.Trainer) -> Iterator[None]:
        """Leave out the time that is spent inside, once the device has done the steps that are queued."""
        begun = self._now(trainer)
        try:
            yield
        finally:
            self._begun += time.perf_counter() - begun

    def summary(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Return the figures of the whole run for `done.json`."""
        device = trainer.strategy.root_device
        figures = self.total.figures(trainer.world_size, self._peak(device)) | self.total.sums(
            trainer.world_size
        )
        return {
            PREFIX + name: value
            for name, value in (figures | {"peak_memory_gib": peak_memory_gib(device)}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was done so far, for a checkpoint: the figures of a resumed run are of the whole."""
        part = replace(self._part)
        part.add_time(time.perf_counter() - self._begun, self._waited)
        return vars(self.total + part) if part.clips else vars(self.total)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = Throughput(**state)

    def closing_line(self, trainer: lightning.Trainer) -> str:
        """Say in a line how fast the run was."""
        figures = {
            name.removeprefix(PREFIX): value for name, value in self.summary(trainer).items()
        }
        parts = [
            f"{figures.get('audio_seconds_per_second', 0):,.0f} audio-seconds a second",
            f"{figures.get('tokens_per_second', 0):,.0f} tokens a second",
            f"waited for data {figures.get('data_wait_share', 0):.0%}",
            f"padding {figures.get('padding_share', 0):.0%}",
            *([f"{figures['teraflops']:.3g} TFLOP/s"] if "teraflops" in figures else []),
            *([f"MFU {figures['mfu']:.0%}"] if "mfu" in figures else []),
            f"peak memory {figures['peak_memory_gib']:.1f} GiB",
        ]
        return "Trained at " + " · ".join(parts)

    def _take(self, trainer: lightning.Trainer, module: Any) -> None:
        """Close the stretch since figures were last taken."""
        if not self._part.clips:
            return
        device, now = trainer.strategy.root_device, self._now(trainer)
        self._part.add_time(now - self._begun, self._waited)
        figures = self._part.figures(trainer.world_size, self._peak(device)) | {
            "peak_memory_gib": peak_memory_gib(device)
        }
        self.shown = f"{figures['audio_seconds_per_second']:.0f}"
        self.total += self._part
        figures |= self.total.sums(trainer.world_size)
        for logger in trainer.loggers:
            logger.log_metrics(
                {PREFIX + name: value for name, value in figures.items()}, step=trainer.global_step
            )
        self._part, self._begun, self._waited = Throughput(), now, 0.0

    def _now(self, trainer: lightning.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        return time.perf_counter()

    def _peak(self, device: torch.device) -> float | None:
        return (
            peak_flops(torch.cuda.get_device_name(device), self.precision)
            if device.type == "cuda"
            else None
        )


def _flops(module: Any, batch: Batch) -> float | None:
    """Return the useful work of a step, or None for a decoder that does not tell its own."""
    of_decoder = getattr(module.decoder, "flops", None)
    if of_decoder is None:
        return None
    lengths = [encoder_frames(length) for length in batch.mel_lengths]
    learns = module.encoder_learns and any(
        parameter.requires_grad for parameter in module.encoder.parameters()
    )
    of_encoder = encoder_flops(
        module.encoder.whisper.config, batch.mel_lengths, lengths, trained=learns
    )
    return of_encoder + of_decoder(lengths, batch.targets)
