"""Callbacks that report on a run: throughput, progress bar, validation samples, ledger, loggers."""

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from rich.console import Console
from rich.table import Table

from whisper_aut.audio.logmel import MAX_MEL_FRAMES
from whisper_aut.data.batch import Batch
from whisper_aut.data.ledger import Counts, Ledger
from whisper_aut.models.encoder import encoder_frames
from whisper_aut.models.flops import encoder_flops
from whisper_aut.training.strategies import peak_flops

GIBIBYTE = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIBIBYTE
    unit = 1 if sys.platform == "darwin" else 1024  # `ru_maxrss` is in bytes on macOS, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIBIBYTE


@dataclass
class Throughput:
    """Sums over the training steps of one rank.

    Attributes:
        seconds: Wall clock time, including waits for data.
        waited_seconds: Time spent waiting for the data loader.
        mel_frames: Mel frames of the clips.
        computed_mel_frames: Mel frames that the encoder computed; more than `mel_frames` if it
            pads.
        token_count: Text tokens.
        clips: Number of clips.
        flops: Useful FLOPs of the forward and backward pass; None if the decoder cannot count its
            own.
    """

    seconds: float = 0.0
    waited_seconds: float = 0.0
    mel_frames: int = 0
    computed_mel_frames: int = 0
    token_count: int = 0
    clips: int = 0
    flops: float | None = 0.0

    def add_batch(
        self, mel_lengths: Sequence[int], tokens: int, flops: float | None, *, padded: bool
    ) -> None:
        """Add a micro-batch.

        Args:
            mel_lengths: Mel frames F of each clip.
            tokens: Number of text tokens.
            flops: Useful FLOPs, or None if unknown.
            padded: Whether the encoder pads every clip to 30 s.
        """
        self.mel_frames += sum(mel_lengths)
        self.computed_mel_frames += (
            MAX_MEL_FRAMES * len(mel_lengths) if padded else sum(mel_lengths)
        )
        self.token_count += tokens
        self.clips += len(mel_lengths)
        self.flops = None if flops is None or self.flops is None else self.flops + flops

    def add_time(self, seconds: float, waited_seconds: float) -> None:
        self.seconds += seconds
        self.waited_seconds += waited_seconds

    def __add__(self, other: "Throughput") -> "Throughput":
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in vars(self)
            if name != "flops"
        }
        return Throughput(**sums, flops=flops)

    def figures(self, ranks: int = 1, peak: float | None = None) -> dict[str, float]:
        """Return the metrics to log, over all ranks.

        Args:
            ranks: Number of ranks. All are assumed to process as much as this one.
            peak: Peak FLOP/s of the device, for `mfu`.
        """
        if not self.seconds:
            return {}
        figures = {
            "audio_seconds_per_second": ranks * self.mel_frames / 100 / self.seconds,
            "tokens_per_second": ranks * self.token_count / self.seconds,
            "clips_per_second": ranks * self.clips / self.seconds,
            "padding_fraction": 1 - self.mel_frames / max(1, self.computed_mel_frames),
            "data_wait_fraction": self.waited_seconds / self.seconds,
        }
        if self.flops is not None:
            figures["teraflops"] = ranks * self.flops / self.seconds / 1e12
            if peak:
                figures["mfu"] = self.flops / self.seconds / peak
        return figures

    def sums(self, ranks: int = 1) -> dict[str, float]:
        """Return the total time, audio and, if known, FLOPs so far, over all ranks."""
        sums = {"total_seconds": self.seconds, "total_audio_seconds": ranks * self.mel_frames / 100}
        return sums if self.flops is None else sums | {"total_teraflop": ranks * self.flops / 1e12}


PREFIX = "throughput/"


class ThroughputMeter(lightning.Callback):
    """Measures the throughput of training and logs it as `throughput/…`.

    The device is synchronised only when metrics are due, so steps can queue in between. Validation
    and the writing of checkpoints are not counted.

    Args:
        precision: Lightning's precision, which determines the device's peak FLOP/s.
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
        # Counted before the step, so that a checkpoint written after it includes it.
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
        """Do not count the time spent inside, after the device has finished the queued steps."""
        begun = self._now(trainer)
        try:
            yield
        finally:
            self._begun += time.perf_counter() - begun

    def summary(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Return the metrics of the whole run for `done.json`."""
        device = trainer.strategy.root_device
        figures = self.total.figures(trainer.world_size, self._peak(device)) | self.total.sums(
            trainer.world_size
        )
        return {
            PREFIX + name: value
            for name, value in (figures | {"peak_memory_gib": peak_memory_gib(device)}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, so that the metrics of a resumed run cover the whole run."""
        part = replace(self._part)
        part.add_time(time.perf_counter() - self._begun, self._waited)
        return vars(self.total + part) if part.clips else vars(self.total)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = Throughput(**state)

    def closing_line(self, trainer: lightning.Trainer) -> str:
        """Return a line of text about the throughput of the run."""
        figures = {
            name.removeprefix(PREFIX): value for name, value in self.summary(trainer).items()
        }
        parts = [
            f"{figures.get('audio_seconds_per_second', 0):,.0f} audio-seconds a second",
            f"{figures.get('tokens_per_second', 0):,.0f} tokens a second",
            f"waited for data {figures.get('data_wait_fraction', 0):.0%}",
            f"padding {figures.get('padding_fraction', 0):.0%}",
            *([f"{figures['teraflops']:.3g} TFLOP/s"] if "teraflops" in figures else []),
            *([f"MFU {figures['mfu']:.0%}"] if "mfu" in figures else []),
            f"peak memory {figures['peak_memory_gib']:.1f} GiB",
        ]
        return "Trained at " + " · ".join(parts)

    def _take(self, trainer: lightning.Trainer, module: Any) -> None:
        """Log the metrics since the last call, and begin the next interval."""
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
    """Return the useful FLOPs of a micro-batch, or None if the decoder does not count its own."""
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


class RunProgressBar(TQDMProgressBar):
    """Lightning's progress bar, followed by `step 150/700, left 0:02:10, audio-s/s 210`.

    Step and time left refer to the whole run, not to the epoch.

    Args:
        meter: Provides the throughput.
        refresh_rate: Number of batches between updates.
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


SHOWN_PER_TASK = 2


class SampleWriter(lightning.Callback):
    """Appends the texts generated in each validation to a file, and prints some of the last ones.

    Args:
        path: Path of the JSON Lines file.
        console: Console for the texts of the last validation, `SHOWN_PER_TASK` for each task.
    """

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self._last: list[dict[str, str]] = []

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not module.generated:
            return
        self._last = list(module.generated)
        with self.path.open("a") as file:
            for entry in module.generated:
                file.write(
                    json.dumps({"step": trainer.global_step, **entry}, ensure_ascii=False) + "\n"
                )

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self._last:
            return
        table = Table(title="What the decoder writes for validation clips", title_justify="left")
        columns = ("domain", "task", "reference", "generated")
        for column in columns:
            table.add_column(column, overflow="fold")
        shown: Counter[str] = Counter()
        for entry in self._last:
            shown[entry["task"]] += 1
            if shown[entry["task"]] <= SHOWN_PER_TASK:
                table.add_row(*(entry[column] for column in columns))
        self.console.print(table)


class LedgerCallback(lightning.Callback):
    """Records all training batches and the batches of the first validation in a `Ledger`.

    The limit on skipped samples is checked at every logged step. It applies to the counts of all
    ranks, so all ranks stop together.

    Args:
        ledger: Ledger of this rank.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.ledger.record(batch.sources, batch.skipped)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        module: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Every validation reads the same clips, so only the first is recorded.
        if not trainer.sanity_checking and not self.ledger.validated:
            self.ledger.record_validation(batch.skipped)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.ledger.validated |= not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        counts = gather_counts(self.ledger)
        if skipped := counts.all_skipped.total():
            module.log("data/skipped", float(skipped), prog_bar=True, batch_size=1)
        self.ledger.check(counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the run so far. Must be called on all ranks."""
        return gather_counts(self.ledger).state_dict() | {"validated": self.ledger.validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger.resume(Counts.from_state(state), state["validated"])

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        self.ledger.close()


def gather_counts(ledger: Ledger) -> Counts:
    """Return the counts of the whole run. Must be called on all ranks."""
    counts: list[Any] = [ledger.counts]
    if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        counts = [None] * ranks
        dist.all_gather_object(counts, ledger.counts)
    return sum(counts, ledger.earlier)


class SourceEpochs(lightning.Callback):
    """Logs how many epochs of each source have been read, as `data/epochs/…`."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.position = batch.next_cursor.position
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        epochs = data.source_epochs(batch.next_cursor.position)
        short = _short_names(list(epochs))
        for logger in trainer.loggers:
            figures = {f"data/epochs/{short[root]}": value for root, value in epochs.items()}
            logger.log_metrics(figures, step=trainer.global_step)


def _short_names(roots: list[str]) -> dict[str, str]:
    """Return the source paths without their common leading folders."""
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


def _wandb(run: Path, name: str) -> Logger:
    offline = os.environ.get("WANDB_MODE", "offline") != "online"
    return WandbLogger(name=run.name, project=name, save_dir=run, offline=offline)


def _mlflow(run: Path, name: str) -> Logger:
    # By default a SQLite file, because MLflow has deprecated its plain folders.
    place = run.absolute()
    server = os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{place / 'mlflow.db'}"
    return MLFlowLogger(
        name, run_name=run.name, tracking_uri=server, artifact_location=(place / "mlruns").as_uri()
    )


BUILDERS: dict[str, Callable[[Path, str], Logger]] = {
    # By default, rows stay in memory for 100 steps and are lost if the run is killed.
    "csv": lambda run, _: CSVLogger(run, name="", version="logs", flush_logs_every_n_steps=1),
    "tensorboard": lambda run, _: TensorBoardLogger(run, name="", version="tensorboard"),
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def build_loggers(names: Sequence[str], run: Path, name: str) -> list[Logger]:
    """Return a logger for each name.

    Args:
        names: Keys of `BUILDERS`.
        run: The run directory.
        name: Name of the run in the config, used for projects and experiments.
    """
    return [BUILDERS[one](run, name) for one in names]
