"""Metrics of a run: data read, throughput, progress bar, texts of validation clips, loggers."""

import json
import math
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
from whisper_aut.data.dataset import Counts, Ledger
from whisper_aut.data.targets import missing_token_warning
from whisper_aut.errors import UserError
from whisper_aut.models.encoder import encoder_frames
from whisper_aut.models.flops import encoder_flops
from whisper_aut.training.callbacks import ends_logged_step, gather_objects
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.plan import peak_flops
from whisper_aut.utils import without_shared_folders

GIBIBYTE = 2**30
PREFIX = "throughput/"
SHOWN_PER_TASK = 2
IN_PROGRESS_BAR = ("train/loss", "train/skipped_steps", "data/skipped")


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
        self.ledger.record(batch.sources, batch.skipped, batch.cut_sources)
        self._languages.update(batch.unknown_languages)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        data = trainer.datamodule
        data.position = batch.next_cursor.position
        if not ends_logged_step(trainer, batch_idx):
            return
        epochs = data.source_epochs(data.position)
        names = [f"data/epochs/{name}" for name in without_shared_folders(list(epochs))]
        metrics = dict(zip(names, epochs.values(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._warn_once("So far ", self._languages)
        counts = gather_counts(self.ledger)
        if skipped := counts.all_skipped.total():
            module.log("data/skipped", float(skipped), batch_size=1)
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

    def _warn_once(self, when: str, clips: Counter[str]) -> None:
        if not self._warned and (found := sum(gather_objects(clips), Counter())):
            self.warn(when + missing_token_warning(found))
            self._warned = True


def gather_counts(ledger: Ledger) -> Counts:
    """Return the counts of the whole run. Must be called on all ranks."""
    return sum(gather_objects(ledger.counts), ledger.earlier)


@dataclass
class Throughput:
    """Sums over the training steps of one rank.

    `seconds` include `waited_seconds`, the waits for data. `computed_mel_frames` include padding.
    `flops` are useful FLOPs of forward and backward pass; NaN if the decoder does not count them.
    `computed_flops` include padding and what gradient checkpointing recomputes.
    """

    seconds: float = 0.0
    waited_seconds: float = 0.0
    mel_frames: int = 0
    computed_mel_frames: int = 0
    tokens: int = 0
    clips: int = 0
    flops: float = 0.0
    computed_flops: float = 0.0

    def add_batch(self, module: Any, batch: Batch) -> None:
        """Add a micro-batch."""
        mel_lengths, padded = batch.mel_lengths, module.encoder.padded_clips(batch, batch.padded)
        computed = [
            MAX_MEL_FRAMES if is_padded else length
            for length, is_padded in zip(mel_lengths, padded, strict=True)
        ]
        self.mel_frames += sum(mel_lengths)
        self.computed_mel_frames += sum(computed)
        self.tokens += sum(batch.targets.lengths)
        self.clips += len(mel_lengths)
        self.flops += _flops(module, batch, mel_lengths)
        self.computed_flops += _flops(module, batch, computed, recomputed=True)

    def __add__(self, other: "Throughput") -> "Throughput":
        return Throughput(
            **{name: value + getattr(other, name) for name, value in vars(self).items()}
        )

    def metrics(self, ranks: int = 1, peak: float | None = None) -> dict[str, float]:
        """Return the metrics to log, over all ranks, which are assumed to be equally fast.

        `peak` is the peak FLOP/s of the device, for `mfu` and `hfu`.
        """
        if not self.seconds:
            return {}
        metrics = {
            "audio_seconds_per_second": ranks * self.mel_frames / 100 / self.seconds,
            "tokens_per_second": ranks * self.tokens / self.seconds,
            "clips_per_second": ranks * self.clips / self.seconds,
            "padding_fraction": 1 - self.mel_frames / max(1, self.computed_mel_frames),
            "data_wait_fraction": self.waited_seconds / self.seconds,
        }
        if not math.isnan(self.flops):
            metrics["teraflops"] = ranks * self.flops / self.seconds / 1e12
            if peak:
                metrics["mfu"] = self.flops / self.seconds / peak
                metrics["hfu"] = self.computed_flops / self.seconds / peak
        return metrics

    def totals(self, ranks: int = 1) -> dict[str, float]:
        """Return the total time, audio and, if known, FLOPs so far, over all ranks."""
        audio_seconds = ranks * self.mel_frames / 100
        totals = {"total_seconds": self.seconds, "total_audio_seconds": audio_seconds}
        if not math.isnan(self.flops):
            totals["total_teraflop"] = ranks * self.flops / 1e12
        return totals


class ThroughputMeter(lightning.Callback):
    """Measures the throughput of training and logs it as `throughput/…`.

    The device is synchronised only when metrics are due, so steps can queue in between. Validation
    and the writing of checkpoints are not counted. Lightning's `ThroughputMonitor` counts both, and
    neither waits for data, padding, nor totals over a resume.
    """

    def __init__(self, precision: str):
        self.precision = precision
        self.total, self._interval = Throughput(), Throughput()
        self.last_speed = ""  # audio-seconds per second in the last interval
        # Begin of the interval, end of the last step, and wait for data in the interval.
        self._begin = self._step_end = self._waited = 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._begin = self._step_end = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, *_: Any) -> None:
        self._waited += time.perf_counter() - self._step_end
        # Counted before the step, so that a checkpoint written after it includes it.
        self._interval.add_batch(module, batch)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if ends_logged_step(trainer, batch_idx):
            self._log_interval(trainer)
        self._step_end = time.perf_counter()

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._log_interval(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._begin = self._step_end = time.perf_counter()

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._log_interval(trainer)

    @contextmanager
    def paused(self, trainer: lightning.Trainer) -> Iterator[None]:
        """Do not count the time spent inside, after the device has finished the queued steps."""
        begin = self._now(trainer)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self._begin, self._step_end = self._begin + elapsed, self._step_end + elapsed

    def summary(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Return the metrics of the whole run for `done.json`."""
        return {PREFIX + name: value for name, value in self._metrics(trainer, self.total).items()}

    def closing_line(self, trainer: lightning.Trainer) -> str:
        """Return a line of text about the throughput of the run."""
        metrics = self._metrics(trainer, self.total)
        parts = [
            f"{metrics.get('audio_seconds_per_second', 0):,.0f} audio-seconds per second",
            f"{metrics.get('tokens_per_second', 0):,.0f} tokens per second",
            f"waited for data {metrics.get('data_wait_fraction', 0):.0%}",
            f"padding {metrics.get('padding_fraction', 0):.0%}",
            *([f"{metrics['teraflops']:.3g} TFLOP/s"] if "teraflops" in metrics else []),
            *([f"{key.upper()} {metrics[key]:.0%}" for key in ("mfu", "hfu") if key in metrics]),
            f"peak memory {metrics['peak_memory_gib']:.1f} GiB",
        ]
        return "Trained at " + " · ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, so that the metrics of a resumed run cover the whole run."""
        if not self._interval.clips:
            return vars(self.total)
        return vars(self.total + self._timed_interval(time.perf_counter()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = Throughput(**state)

    def _timed_interval(self, now: float) -> Throughput:
        return replace(self._interval, seconds=now - self._begin, waited_seconds=self._waited)

    def _log_interval(self, trainer: lightning.Trainer) -> None:
        """Log the metrics since the last call, and begin the next interval."""
        if not self._interval.clips:
            return
        now = self._now(trainer)
        interval = self._timed_interval(now)
        self.total += interval
        metrics = self._metrics(trainer, interval)
        self.last_speed = f"{metrics['audio_seconds_per_second']:.0f}"
        for logger in trainer.loggers:
            logger.log_metrics(
                {PREFIX + name: value for name, value in metrics.items()}, step=trainer.global_step
            )
        self._interval, self._begin, self._waited = Throughput(), now, 0.0

    def _metrics(self, trainer: lightning.Trainer, throughput: Throughput) -> dict[str, float]:
        device, ranks = trainer.strategy.root_device, trainer.world_size
        peak = None
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), self.precision)
        return {
            **throughput.metrics(ranks, peak),
            **self.total.totals(ranks),
            "peak_memory_gib": peak_memory_gib(device),
        }

    def _now(self, trainer: lightning.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        return time.perf_counter()


class Profile(lightning.Callback):
    """Records three micro-batches with PyTorch's profiler, after the given number of them.

    Writes a trace for https://ui.perfetto.dev and a table of the slowest operations to `folder`, on
    each rank. Lightning's `PyTorchProfiler` fails if the run ends before the recording.
    """

    def __init__(self, folder: Path, after: int):
        self.folder, self.after = folder, after

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=self.after - 1, warmup=1, active=3, repeat=1),
            on_trace_ready=lambda profile: self._write(profile, trainer),
        )
        self._profile.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self._profile.step()

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._profile.stop()

    def _write(self, profile: torch.profiler.profile, trainer: lightning.Trainer) -> None:
        self.folder.mkdir(exist_ok=True)
        rank, device = trainer.global_rank, trainer.strategy.root_device.type
        profile.export_chrome_trace(str(self.folder / f"trace-rank{rank}.json"))
        operations = profile.key_averages()
        slowest = operations.table(sort_by=f"self_{device}_time_total", row_limit=40)
        (self.folder / f"operations-rank{rank}.txt").write_text(slowest)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIBIBYTE
    unit = 1 if sys.platform == "darwin" else 1024  # `ru_maxrss` is in bytes on macOS, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIBIBYTE


def _flops(
    module: Any, batch: Batch, mel_lengths: Sequence[int], *, recomputed: bool = False
) -> float:
    """Return the FLOPs of a micro-batch with these F, or NaN if the decoder does not count its own.

    With `recomputed`, layers that gradient checkpointing recomputes count twice.
    """
    decoder, encoder = module.decoder, module.encoder
    if not hasattr(decoder, "flops"):
        return math.nan
    config, lengths = encoder.whisper.config, list(map(encoder_frames, mel_lengths))
    trained = module.encoder_learns and any(p.requires_grad for p in encoder.parameters())
    again = recomputed and encoder.gradient_checkpointing
    flops = encoder_flops(
        *(config, mel_lengths, lengths),
        trained=trained,
        recomputed=again,
        frozen_weights=hasattr(encoder, "lora_scale"),
    )
    if module.distillation and trained:
        compared = module.distillation.compared(batch)
        chosen, own = [mel_lengths[i] for i in compared], [lengths[i] for i in compared]
        flops += encoder_flops(config, chosen, own, trained=False)
    options = {} if trained else {"through_frames": False}
    if recomputed and getattr(decoder, "gradient_checkpointing", False):
        options["recomputed"] = True
    return flops + decoder.flops(lengths, batch.targets, **options)


class RunProgressBar(TQDMProgressBar):
    """Lightning's progress bar, followed by `step 150/700, left 0:02:10, audio-s/s 210`.

    Step and time left refer to the whole run, not to the epoch. Metrics are those of the last
    logged step. Lightning reads those that are logged with `prog_bar=True` in every step, and waits
    for the device.
    """

    def __init__(self, meter: ThroughputMeter, refresh_rate: int):
        super().__init__(refresh_rate=refresh_rate)
        self.meter = meter
        self._begin, self._first_step = 0.0, 0
        self._shown: dict[str, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin, self._first_step = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: lightning.Trainer, pl_module: Any) -> dict[str, Any]:
        if not trainer.training or trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            logged = trainer.callback_metrics
            shown = {name: float(logged[name]) for name in IN_PROGRESS_BAR if name in logged}
            self._shown = {**super().get_metrics(trainer, pl_module), **shown}
            self._shown.pop("v_num", None)
        metrics = dict(self._shown)
        steps = trainer.global_step - self._first_step
        if trainer.training and steps:
            step_seconds = (time.monotonic() - self._begin) / steps
            seconds_left = step_seconds * (trainer.max_steps - trainer.global_step)
            metrics["step"] = f"{trainer.global_step}/{trainer.max_steps}"
            metrics["left"] = str(timedelta(seconds=round(seconds_left)))
        if self.meter.last_speed:
            metrics["audio-s/s"] = self.meter.last_speed
        return metrics


class SampleWriter(lightning.Callback):
    """Appends the texts generated in each validation to a JSON Lines file.

    At the end, prints `SHOWN_PER_TASK` texts of the last validation for each task.
    """

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self._last: list[dict[str, str]] = []

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not trainer.is_global_zero or not module.generated:
            return
        self._last = list(module.generated)
        with self.path.open("a") as file:
            for entry in self._last:
                line = {"step": trainer.global_step, **entry}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self._last:
            return
        table = Table(title="Texts generated for validation clips", title_justify="left")
        columns = ("domain", "task", "reference", "generated")
        for column in columns:
            table.add_column(column, overflow="fold")
        shown: Counter[str] = Counter()
        for entry in self._last:
            shown[entry["task"]] += 1
            if shown[entry["task"]] <= SHOWN_PER_TASK:
                table.add_row(*(entry[column] for column in columns))
        self.console.print(table)


def build_loggers(names: Sequence[str], run: Path, name: str) -> list[Logger]:
    """Return the loggers of a run: `csv`, `tensorboard`, `wandb` or `mlflow`.

    `name` is the name of the run in the config, used for projects and experiments.
    """
    offline = os.environ.get("WANDB_MODE", "offline") != "online"
    # By default a SQLite file, because MLflow has deprecated its plain folders.
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{run.absolute()}/mlflow.db"
    artifacts = (run.absolute() / "mlruns").as_uri()
    builders: dict[str, Callable[[], Logger]] = {
        # By default, rows stay in memory for 100 steps and are lost if the run is killed.
        "csv": lambda: CSVLogger(run, name="", version="logs", flush_logs_every_n_steps=1),
        "tensorboard": lambda: TensorBoardLogger(run, name="", version="tensorboard"),
        "wandb": lambda: WandbLogger(name=run.name, project=name, save_dir=run, offline=offline),
        "mlflow": lambda: MLFlowLogger(
            name, run_name=run.name, tracking_uri=tracking, artifact_location=artifacts
        ),
    }
    return [builders[logger]() for logger in names]
