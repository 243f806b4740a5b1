"""A training run, from its config to a fitted module and a run directory.

From top to bottom: `train` finds the run to reuse or resume, `build_parts` builds its model and
data, `_fit` trains with the Trainer of `build_trainer`, and `_finish` records the result.
"""

import errno
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor
from rich.console import Console
from rich.text import Text

from whisper_aut.config import Settings, dump_settings
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import Ledger, by_source
from whisper_aut.data.sampler import Cursor
from whisper_aut.errors import Interrupted, UserError, require
from whisper_aut.models.attention import use_flash_attention_3
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.callbacks.checkpoints import (
    AverageWeights,
    RollingCheckpoints,
    loader_states,
)
from whisper_aut.training.callbacks.metrics import (
    DataMonitor,
    Profile,
    RunProgressBar,
    SampleWriter,
    ThroughputMeter,
    build_loggers,
    gather_counts,
)
from whisper_aut.training.callbacks.stopping import CleanStop, Guard, Rewind, StopOnDataEnd
from whisper_aut.training.checkpoint import (
    FULL_DISK,
    check_disk_space,
    checkpoint_bytes,
    latest_valid,
    read_manifest,
    read_state,
    write_error_message,
)
from whisper_aut.training.doctor import check_accelerator
from whisper_aut.training.factory import (
    build_data,
    build_decoder,
    build_module,
    build_pretrained,
    fix_chat_date,
    run_fingerprint,
    same_chat_date,
)
from whisper_aut.training.plan import needs_checkpointing
from whisper_aut.training.run_dir import (
    RunDirectory,
    check_step_size,
    create_job_run,
    find_resume_checkpoint,
    is_first_rank,
    list_runs,
    share_run_name,
)
from whisper_aut.training.strategies import build_strategy, resolve_precision
from whisper_aut.utils import file_lock, write_json

MAX_REWINDS = 3
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
LOST_RANK = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|connection refused|timed out|timeout"
    r"|peer|gloo|nccl|socket",
    re.I,
)
CallbackType = TypeVar("CallbackType", bound=lightning.Callback)


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`: the finished run, and whether it had finished before."""

    run: RunDirectory
    reused: bool


def train(
    settings: Settings,
    console: Console,
    *,
    resume: str = "",
    fresh: bool = False,
    allow_data_change: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
) -> TrainResult:
    """Train, or return the newest run that finished with the same config, data and release.

    Args:
        settings: Config of the run.
        console: Console for messages. Ranks other than the first print nothing.
        resume: `auto` resumes the newest run of this name with a checkpoint, if it is unfinished. A
            path resumes that run or checkpoint. Empty starts a new run.
        fresh: Train again even if there is a finished run.
        allow_data_change: Resume although the training data or its mixture has changed.
        callbacks: Additional callbacks of the Trainer.

    Raises:
        UserError: If the config, the data or the checkpoint cannot be used.
        Interrupted: If a signal stopped the run. The message names the saved checkpoint.
    """
    if not is_first_rank():
        console = Console(quiet=True)
    root, hardware = Path(settings.runs), settings.hardware
    precision, hint = resolve_precision(hardware.precision, hardware.accelerator)
    settings = replace(settings, hardware=replace(hardware, precision=precision))
    fingerprint = run_fingerprint(settings)
    runs = list_runs(root, settings.name)
    for run in runs:
        if not fresh and run.finished_with(fingerprint) and same_chat_date(settings, run.config):
            name = (settings.name, "bold")
            console.print(Text.assemble(name, f": using {run.path}, which has the same config."))
            if is_first_rank():
                run.point_latest()
            return TrainResult(run, reused=True)

    check_machine(settings)
    recomputes = needs_checkpointing(settings)
    settings = replace(settings, model=replace(settings.model, gradient_checkpointing=recomputes))
    warn, ranks = _warnings_to(console), _count_ranks(settings)
    # A run that was stopped before its first checkpoint must not hide an earlier one.
    newest = next((r for r in runs if r.done.exists() or r.last_checkpoint.exists()), None)
    if newest and not (resume or fresh or newest.done.exists()):
        console.print(f"{newest.path} is unfinished. To resume it instead, add --resume auto.")
    checkpoint = find_resume_checkpoint(resume, newest, root / settings.name, warn)
    resumed = RunDirectory(checkpoint.parent.parent) if checkpoint else None
    if checkpoint and not settings.data.batch_seconds:
        check_step_size(checkpoint, settings.data.batch_clips, ranks, settings.trainer.accumulate)
    settings = fix_chat_date(settings, resumed.config if resumed else None)

    parts = build_parts(settings, checkpoint, allow_data_change=allow_data_change)
    if parts.data.earlier_order:
        warn("Training data has changed: the run continues after as many clips of the new order.")
    if checkpoint and (step := read_manifest(checkpoint).step) > parts.total_steps:
        raise UserError(
            f"{checkpoint} was written at step {step}, but this config trains only "
            f"{parts.total_steps} steps, so the learning rate schedule would not end. Raise "
            "trainer.max_steps, resume from an earlier checkpoint, or start again with --fresh."
        )
    size, kept = checkpoint_bytes(parts.module), settings.trainer.keep_checkpoints + 1
    full_disk = check_disk_space(checkpoint.parent if checkpoint else root, size, kept)
    late = "optim.encoder_after_step: the run ends before the encoder is trained."
    is_late = settings.optim.encoder_after_step >= parts.total_steps
    for warning in filter(None, (full_disk, hint, late if is_late else "")):
        warn(warning)

    config, metadata = dump_settings(settings), _metadata(settings, parts, fingerprint)
    run = resumed or create_job_run(root, settings.name, config, metadata)

    @cache
    def record_resume() -> None:
        if is_first_rank():
            run.done.unlink(missing_ok=True)
            run.record(config, metadata)

    if resumed:
        # The resume is recorded only after Lightning has loaded the checkpoint. If the checkpoint
        # is of the last step, `on_train_start` is not called.
        hooks = LambdaCallback(
            on_train_start=lambda *_: record_resume(), on_fit_end=lambda *_: record_resume()
        )
        callbacks = [hooks, *callbacks]
    _announce(settings, parts, f"resuming {checkpoint}" if resumed else str(run.path), console)
    ledger = Ledger(run.ledger(rank_zero_only.rank or 0), settings.data.max_skipped_fraction)
    busy = f"Another process is training in {run.path}. Wait for it, or stop it first."
    lock = file_lock(run.path, busy) if is_first_rank() else nullcontext()
    with lock, share_run_name(run), explain_errors(run.path, ranks), closing(ledger):
        trainer = _fit(settings, parts, run, ledger, checkpoint, console, callbacks)
        _finish(trainer, run, ledger, fingerprint, console)
    return TrainResult(run, reused=False)


def check_machine(settings: Settings) -> None:
    """Check that this machine has the device and the packages of a run.

    Raises:
        UserError: If one is missing.
    """
    check_accelerator(settings.hardware.accelerator)
    require(*(logger for logger in settings.trainer.loggers if logger != "csv"))
    require(*(["deepspeed"] if settings.strategy.name.startswith("deepspeed") else []))


@dataclass(frozen=True)
class RunParts:
    """The objects of a run, ready for `Trainer.fit`."""

    pretrained: PretrainedWhisper
    module: AudioTextModule
    data: ShardDataModule
    total_steps: int
    skip_to: Cursor | None = None  # where the data resumes, if not where the checkpoint ended


def build_parts(
    settings: Settings,
    checkpoint: Path | None,
    skip_to: Cursor | None = None,
    allow_data_change: bool = False,
) -> RunParts:
    """Build model and data, and plan the steps from a checkpoint, or from `skip_to` in the data."""
    if settings.hardware.threads:
        torch.set_num_threads(settings.hardware.threads)
    # TF32 on devices that support it. CPUs are not affected.
    torch.set_float32_matmul_precision("high")
    use_flash_attention_3()
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # The sizes of packed batches differ, which would leave memory in unused blocks.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    ranks = _count_ranks(settings)
    pretrained = build_pretrained(settings, empty=ranks > 1 and not is_first_rank())
    decoder, codec = build_decoder(settings, pretrained)
    data = build_data(settings, codec, pretrained.config.num_mel_bins)
    if checkpoint:
        state = read_state(checkpoint)
        states, step = loader_states(state), state["global_step"]
        skip_to = data.resume(ranks, states[0], step, skip_to, allow_data_change)
    total_steps = data.total_steps(ranks, settings.trainer.max_epochs)
    total_steps = min(total_steps, settings.trainer.max_steps or total_steps)
    module = build_module(settings, pretrained, decoder, codec, total_steps)
    module.weights_on_first_rank = ranks > 1
    # transformers loads models in eval mode.
    return RunParts(pretrained, module.train(), data, total_steps, skip_to)


def _fit(
    settings: Settings,
    parts: RunParts,
    run: RunDirectory,
    ledger: Ledger,
    checkpoint: Path | None,
    console: Console,
    callbacks: Sequence[lightning.Callback],
) -> lightning.Trainer:
    """Train to the last step, and validate it.

    After a `Rewind`, train again from the newest valid checkpoint and skip the data read since.
    """
    warn, skip_to, rewinds = _warnings_to(console), parts.skip_to, 0
    while True:
        trainer = build_trainer(settings, parts, run, ledger, console, callbacks, skip_to)
        try:
            with run.keep_metrics() if is_first_rank() else nullcontext():
                trainer.fit(
                    parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True
                )
                if find_callback(trainer, RollingCheckpoints).validated_step != trainer.global_step:
                    # The metrics of the run are those of its last step.
                    trainer.validate(parts.module, datamodule=parts.data, verbose=False)
            return trainer
        except Rewind as rewind:
            checkpoint = latest_valid(run.checkpoints, warn, hashes=is_first_rank())
            rewinds += 1
            if checkpoint is None or rewinds > MAX_REWINDS:
                why = "has no checkpoint yet" if checkpoint is None else "was rewound too often"
                raise UserError(
                    f"{rewind} The run {why}. Lower optim.lr, or check the data around that step."
                ) from None
            warn(f"{rewind} Resuming from {checkpoint}, after the data read since.")
            has_changed = bool(parts.data.earlier_order)
            skip_to = rewind.cursor
            parts = build_parts(settings, checkpoint, skip_to, has_changed)


def build_trainer(
    settings: Settings,
    parts: RunParts,
    run: RunDirectory,
    ledger: Ledger,
    console: Console,
    callbacks: Sequence[lightning.Callback] = (),
    skip_to: Cursor | None = None,
) -> lightning.Trainer:
    """Return the Trainer of a run.

    `ledger` is that of this rank. If `skip_to` is given, the data resumes there.
    """
    config, hardware, ranks = settings.trainer, settings.hardware, _count_ranks(settings)
    warn, total_steps = _warnings_to(console), parts.total_steps
    profile = [Profile(run.path / "profile", config.profile_after)] if config.profile_after else []
    clips_per_step = settings.data.batch_clips * ranks * config.accumulate
    strategy = build_strategy(
        settings.strategy,
        ranks=ranks,
        clips_per_step=0 if settings.data.batch_seconds else clips_per_step,
        accelerator=hardware.accelerator,
        precision=hardware.precision,
        async_checkpoints=config.async_checkpoints,
        warn=warn,
    )
    meter = ThroughputMeter(hardware.precision)
    guard = Guard(ledger, config, warn)
    checkpoints = RollingCheckpoints(
        run.checkpoints,
        config,
        skip_to=skip_to,
        warn=warn,
        before_save=guard.read,
        paused=meter.paused,
    )
    # `CleanStop` handles the signals of Slurm. Lightning would save elsewhere and requeue.
    slurm: Any = (
        [SLURMEnvironment(auto_requeue=False)] if ranks > 1 and launched_by_slurm() else None
    )
    trainer = lightning.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.nodes,
        # FSDP computes in bfloat16 by itself, without autocast.
        precision="32-true" if settings.strategy.name == "fsdp" else hardware.precision,  # pyright: ignore[reportArgumentType]
        strategy=strategy,
        plugins=slurm,
        max_steps=total_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=settings.optim.gradient_clip or None,
        val_check_interval=min(config.valid_every_steps, total_steps) * config.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=min(config.log_every_steps, total_steps),
        deterministic=config.deterministic,
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=run.path,
        logger=build_loggers(config.loggers, run.path, settings.name),
        # They are called in this order, except that Lightning moves checkpoints to the end.
        callbacks=[
            guard,
            *([AverageWeights(decay)] if (decay := settings.optim.ema_decay) else []),
            checkpoints,
            LearningRateMonitor("step"),
            DataMonitor(ledger, checkpoints, warn),
            StopOnDataEnd(checkpoints, warn),
            SampleWriter(run.path / "samples.jsonl", console),
            CleanStop(checkpoints),
            meter,
            *profile,
            *callbacks,
            RunProgressBar(
                meter, refresh_rate=1 if console.is_terminal else config.log_every_steps
            ),
        ],
    )
    # `CleanStop` handles SIGTERM. Lightning would also exchange it through the devices in every
    # step, for which the host waits.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def launched_by_slurm() -> bool:
    """Return whether `srun` started this rank.

    In a Slurm job, torchrun may have started it instead. Then only torchrun knows the ranks.
    """
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def find_callback(trainer: Any, kind: type[CallbackType]) -> CallbackType:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def _finish(
    trainer: lightning.Trainer,
    run: RunDirectory,
    ledger: Ledger,
    fingerprint: str,
    console: Console,
) -> None:
    """Check the limit on skipped samples, print a summary, and write `done.json`."""
    # Ranks exchange their counts here, after everything that may fail on one of them, and all check
    # the same counts. If a rank fails, no done.json is written.
    counts = gather_counts(ledger)
    unknown_languages = find_callback(trainer, DataMonitor).unknown_languages()
    ledger.check(counts, at_end=True)
    if not trainer.is_global_zero:
        return
    guard, meter = find_callback(trainer, Guard), find_callback(trainer, ThroughputMeter)
    metrics = {**guard.last_metrics, **trainer.callback_metrics, **meter.summary(trainer)}
    data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    done = {
        "fingerprint": fingerprint,
        "steps": trainer.global_step,
        # JSON has no NaN.
        "metrics": {
            name: round(float(value), 6) for name, value in metrics.items() if math.isfinite(value)
        },
        "skipped": by_source(counts.all_skipped),
        "cut": dict(counts.cut),
        "unknown_languages": dict(unknown_languages),
        "sources": {
            path: round(epochs, 4) for path, epochs in data.source_epochs(data.position).items()
        },
    }
    write_json(run.done, done)
    console.print(meter.closing_line(trainer))
    if unknown_languages:
        console.print(
            f"{unknown_languages.total()} clips were trained without a language token; "
            f"{run.done} lists their languages."
        )
    if skipped := counts.all_skipped.total():
        files = "ledger.jsonl" if trainer.world_size == 1 else "ledger*.jsonl"
        console.print(f"{skipped} samples were skipped; {run.path / files} lists them.")


@contextmanager
def explain_errors(folder: Path, ranks: int) -> Iterator[None]:
    """Convert failures of the machine into messages that say what to do.

    Raises:
        UserError: If GPU memory or disk space ran out, another rank failed, or Lightning cannot use
            the devices as configured.
        Interrupted: After Ctrl-C before the first step, or twice, for which Lightning exits.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Interrupted("was stopped at once, without another checkpoint") from None
        raise
    except MisconfigurationException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"This machine cannot run the config: {reason}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"The GPU ran out of memory: {str(error).splitlines()[0]}\nLower data.batch_clips or "
            "data.batch_seconds and raise trainer.accumulate, set "
            "model.gradient_checkpointing=true, or use a higher ZeRO stage."
        ) from None
    except OSError as error:
        if error.errno in FULL_DISK | UNWRITABLE:
            raise UserError(write_error_message(Path(error.filename or folder), error)) from None
        raise
    except RuntimeError as error:
        if ranks > 1 and LOST_RANK.search(str(error)):
            raise UserError(
                f"Another rank failed or does not respond: {str(error).splitlines()[0][:300]}\n"
                "See the logs of the other ranks. Then continue from the last checkpoint with "
                "--resume auto."
            ) from error
        raise


def _warnings_to(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(Text.assemble(("Warning:", "bold yellow"), f" {line}"))


def _count_ranks(settings: Settings) -> int:
    """Return the number of ranks of the job, as Lightning will count them."""
    devices = settings.hardware.devices
    if devices == "auto":
        devices = max(1, torch.cuda.device_count()) if settings.hardware.accelerator != "cpu" else 1
    return int(devices) * settings.hardware.nodes


def _metadata(settings: Settings, parts: RunParts, fingerprint: str) -> dict[str, Any]:
    """Return what `environment.json` says about a run besides the machine."""
    identity = getattr(parts.module.decoder, "identity", {})
    return {
        "fingerprint": fingerprint,
        "pretrained": {"path": parts.pretrained.path, "revision": parts.pretrained.revision},
        "decoder": {"name": settings.decoder["name"], **identity},
        "steps": parts.total_steps,
        "seed": settings.seed,
        "ranks": _count_ranks(settings),
        "data": [
            {
                "root": source.index.name,
                "domain": source.domain,
                "clips": source.index.samples,
                "seconds": source.index.seconds,
                "fingerprint": source.index.fingerprint(),
                "licences": source.licences,
                "left_out": source.index.selection.left_out if source.index.selection else {},
                "weight": round(shape.weight, 4),
            }
            for source, shape in zip(parts.data.train, parts.data.order.sources, strict=True)
        ],
    }


def _announce(settings: Settings, parts: RunParts, target: str, console: Console) -> None:
    """Print the size of a run, its mixture, and which clips the config leaves out."""
    data, module = parts.data, parts.module
    encoder, decoder = (
        f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M"
        for part in (module.encoder, module.decoder)
    )
    # Fraction of each domain among the training clips, as they are drawn.
    weights: Counter[str] = Counter()
    for source, shape in zip(data.train, data.order.sources, strict=True):
        weights[source.domain] += shape.samples if data.order.epoch_clips else shape.weight  # pyright: ignore
    mixture = " · ".join(
        f"{name} {weight / weights.total():.0%}" for name, weight in weights.items() if weight
    )
    batches = settings.trainer.accumulate * _count_ranks(settings)
    text = (
        f": encoder {encoder}, decoder {decoder} parameters · {mixture} · {parts.total_steps} "
        f"steps of {batches} × {data.batch_name} · {target}"
    )
    console.print(Text.assemble((settings.name, "bold"), text))
    for source in data.train:
        if selection := source.index.selection:
            left_out = ", ".join(f"{n} {reason}" for reason, n in selection.left_out.items())
            total = source.index.samples + sum(selection.left_out.values())
            console.print(
                f"{source.index.name}: training on {source.index.samples} of {total} clips; left "
                f"out: {left_out or 'none'}",
                markup=False,
            )
