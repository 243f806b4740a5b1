"""A training run, from `Settings` to a run directory with checkpoints, logs, samples and ledger."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor
from rich.console import Console
from rich.text import Text

from whisper_aut.config import Settings, dump_settings
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.ledger import Ledger, by_source
from whisper_aut.data.sampler import Cursor
from whisper_aut.data.shards import ShardIndex
from whisper_aut.errors import UserError
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.callbacks.languages import UnknownLanguages
from whisper_aut.training.callbacks.metrics import (
    LedgerCallback,
    RunProgressBar,
    SampleWriter,
    SourceEpochs,
    ThroughputMeter,
    build_loggers,
    gather_counts,
)
from whisper_aut.training.callbacks.stopping import (
    CleanStop,
    ElasticResume,
    Guard,
    Rewind,
    StopOnDataEnd,
    check_accelerator,
    check_disk_space,
    checkpoint_bytes,
    explain_errors,
    loader_state,
)
from whisper_aut.training.checkpoint import read_manifest
from whisper_aut.training.factory import (
    build_data,
    build_decoder,
    build_module,
    build_pretrained,
    fix_chat_date,
    run_fingerprint,
    same_chat_date,
    trainer_arguments,
)
from whisper_aut.training.run_dir import (
    RunDirectory,
    check_step_size,
    create_job_run,
    find_resume_checkpoint,
    is_first_rank,
    latest_valid_checkpoint,
    list_runs,
    share_run_name,
)
from whisper_aut.training.strategies import build_strategy, resolve_precision
from whisper_aut.utils import write_text

MAX_REWINDS = 3


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`.

    Attributes:
        run: The finished run.
        reused: Whether the run had finished before, so nothing was trained.
    """

    run: RunDirectory
    reused: bool


def train(
    settings: Settings,
    console: Console,
    *,
    resume: str = "",
    fresh: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
) -> TrainResult:
    """Train, or return the newest run that finished with the same config, data and release.

    Args:
        settings: Config of the run.
        console: Console for messages.
        resume: `auto` resumes the newest run of this name if it is unfinished. A path resumes that
            run or checkpoint. Empty starts a new run.
        fresh: Train again even if there is a finished run.
        callbacks: Additional callbacks of the Trainer.

    Raises:
        UserError: If the config, the data or the checkpoint cannot be used.
        Interrupted: If a signal stopped the run. The message names the saved checkpoint.
    """
    hardware = settings.hardware
    precision, hint = resolve_precision(hardware.precision, hardware.accelerator)
    settings = replace(settings, hardware=replace(hardware, precision=precision))
    fingerprint = run_fingerprint(settings)
    runs = list_runs(Path(settings.runs), settings.name)
    finished = next(
        (
            run
            for run in runs
            if run.finished_with(fingerprint) and same_chat_date(settings, run.config)
        ),
        None,
    )
    if finished and not fresh:
        console.print(
            Text.assemble(
                (settings.name, "bold"),
                f": nothing has changed since {finished.path} was trained; using it.",
            )
        )
        if is_first_rank():
            finished.point_latest()
        return TrainResult(finished, reused=True)
    check_accelerator(settings.hardware.accelerator)
    place = f"{settings.runs}/{settings.name}"
    checkpoint = find_resume_checkpoint(
        resume,
        runs[0] if runs else None,
        place,
        lambda line: _warn(console, line),
    )
    if checkpoint and not settings.data.batch_seconds:
        check_step_size(
            checkpoint, settings.data.batch_clips, _ranks(settings), settings.trainer.accumulate
        )
    settings = fix_chat_date(
        settings, RunDirectory(checkpoint.parent.parent).config if checkpoint else None
    )
    parts = _build(settings, checkpoint)
    if checkpoint and (step := read_manifest(checkpoint).step) > parts.total_steps:
        raise UserError(
            f"{checkpoint} stands at step {step}, behind the {parts.total_steps} that this "
            "config trains: its learning rate would never "
            "have fallen to the end. Raise trainer.max_steps, resume from an earlier "
            "checkpoint, or start anew with --fresh."
        )
    if warning := check_disk_space(
        checkpoint.parent if checkpoint else Path(settings.runs),
        checkpoint_bytes(parts.module),
        settings.trainer.keep_checkpoints + 1,
    ):
        _warn(console, warning)
    if hint:
        _warn(console, hint)
    facts = {
        "fingerprint": fingerprint,
        "pretrained": {"path": parts.start.path, "revision": parts.start.revision},
        "decoder": {
            "name": settings.decoder["name"],
            **getattr(parts.module.decoder, "identity", {}),
        },
        "steps": parts.total_steps,
        "seed": settings.seed,
        "ranks": _ranks(settings),
        "data": _data_facts(parts.data),
    }
    run = (
        RunDirectory(checkpoint.parent.parent)
        if checkpoint
        else create_job_run(Path(settings.runs), settings.name, dump_settings(settings), facts)
    )
    console.print(_headline(settings, parts, run, checkpoint))
    for source in parts.data.train:
        if source.index.selection:
            console.print(_left_out(source.index), markup=False)
    # When training starts, Lightning has loaded the checkpoint without an error.
    goes_on = LambdaCallback(on_train_start=lambda *_: _go_on(run, settings, facts))
    with share_run_name(run), explain_errors(run.path, _ranks(settings)):
        _fit(
            settings,
            parts,
            run,
            checkpoint,
            fingerprint,
            console,
            [goes_on, *callbacks] if checkpoint else callbacks,
        )
    return TrainResult(run, reused=False)


@dataclass(frozen=True)
class _Parts:
    """The objects of a run, ready for `Trainer.fit`."""

    start: PretrainedWhisper
    module: AudioTextModule
    data: ShardDataModule
    total_steps: int


def _build(settings: Settings, checkpoint: Path | None, skip_to: Cursor | None = None) -> _Parts:
    _seed(settings)
    start = build_pretrained(settings)
    decoder, codec = build_decoder(settings, start)
    data = build_data(settings, codec, start.config.num_mel_bins)
    total_steps = _total_steps(settings, data, checkpoint, skip_to)
    # transformers loads models in eval mode.
    module = build_module(settings, start, decoder, codec, total_steps).train()
    return _Parts(start, module, data, total_steps)


def _fit(
    settings: Settings,
    parts: _Parts,
    run: RunDirectory,
    checkpoint: Path | None,
    fingerprint: str,
    console: Console,
    extra: Sequence[lightning.Callback],
) -> None:
    """Train to the last step.

    After a `Rewind`, train again from the newest valid checkpoint and skip the data read since.
    """
    ledger = Ledger(run.ledger(rank_zero_only.rank or 0), settings.data.max_skipped_fraction)
    skip_to, rewinds = None, 0
    while True:
        meter = ThroughputMeter(settings.hardware.precision)
        strategy = build_strategy(
            settings.strategy.name,
            timeout_minutes=settings.strategy.timeout_minutes,
            ranks=_ranks(settings),
            clips_per_step=_clips_per_step(settings),
            accelerator=settings.hardware.accelerator,
            skip_to=skip_to,
            async_checkpoints=settings.trainer.async_checkpoints,
            deepspeed_options=settings.strategy.deepspeed,
            warn=partial(_warn, console),
        )
        trainer = build_trainer(
            settings, run, strategy, ledger, meter, parts.total_steps, console, extra
        )
        try:
            with run.metrics_aside() if is_first_rank() else nullcontext():
                trainer.fit(
                    parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True
                )
            break
        except Rewind as rewind:
            rewinds += 1
            checkpoint = latest_valid_checkpoint(run, lambda line: _say(console, line))
            if checkpoint is None or rewinds > MAX_REWINDS:
                why = (
                    "no checkpoint to go back to"
                    if checkpoint is None
                    else f"gone back {MAX_REWINDS} times already"
                )
                raise UserError(
                    f"{rewind} The run has {why}. Lower optim.lr, or look at the data around "
                    "that step."
                ) from None
            _warn(console, f"{rewind} Going back to {checkpoint}, past the data read since.")
            skip_to, parts = rewind.cursor, _build(settings, checkpoint, rewind.cursor)
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    checkpoints = next(one for one in callbacks if isinstance(one, RollingCheckpoints))
    if checkpoints.validated_step != trainer.global_step:
        # The metrics of the run are those of its last step.
        trainer.validate(parts.module, datamodule=parts.data, verbose=False)
    _finish(trainer, run, parts.data, ledger, meter, fingerprint, console)


def _go_on(run: RunDirectory, settings: Settings, facts: dict[str, Any]) -> None:
    """Record the config of a resumed run, and mark the run as unfinished."""
    if is_first_rank():
        run.done.unlink(missing_ok=True)
        run.record(dump_settings(settings), facts)


def build_trainer(
    settings: Settings,
    run: RunDirectory,
    strategy: Any,
    ledger: Ledger,
    meter: ThroughputMeter,
    total_steps: int,
    console: Console,
    extra: Sequence[lightning.Callback],
) -> lightning.Trainer:
    every, warn = settings.trainer, partial(_warn, console)
    checkpoints = RollingCheckpoints(
        run.checkpoints,
        every_steps=min(every.checkpoint_every_steps, total_steps),
        valid_every_steps=min(every.valid_every_steps, total_steps),
        keep=every.keep_checkpoints,
        warn=warn,
        paused=meter.paused,
    )
    guard = Guard(
        ledger,
        max_bad_steps=every.max_bad_steps,
        gradient_clip=settings.optim.gradient_clip,
        spike_factor=every.spike_factor,
        rewind=every.on_spike == "rewind",
        warn=warn,
    )
    callbacks = [
        guard,
        checkpoints,
        LearningRateMonitor("step"),
        LedgerCallback(ledger),
        UnknownLanguages(warn),
        SourceEpochs(),
        ElasticResume(),
        StopOnDataEnd(checkpoints, warn),
        SampleWriter(run.path / "samples.jsonl", console),
        CleanStop(checkpoints),
        meter,
        *extra,
        RunProgressBar(meter, refresh_rate=1 if console.is_terminal else every.log_every_steps),
    ]
    loggers = build_loggers(settings.trainer.loggers, run.path, settings.name)
    return lightning.Trainer(
        **trainer_arguments(settings, total_steps),
        strategy=strategy,
        # `CleanStop` handles the signals of Slurm. Lightning would save elsewhere and requeue.
        plugins=[SLURMEnvironment(auto_requeue=False)]
        if _launched_by_slurm() and _ranks(settings) > 1
        else None,
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,  # `RollingCheckpoints` does it
        default_root_dir=run.path,
    )


def _finish(
    trainer: lightning.Trainer,
    run: RunDirectory,
    data: ShardDataModule,
    ledger: Ledger,
    meter: ThroughputMeter,
    fingerprint: str,
    console: Console,
) -> None:
    # Ranks exchange their counts here, after everything that may fail on one of them, and all check
    # the same counts. If a rank fails, no done.json is written.
    counts = gather_counts(ledger)
    callbacks: list[lightning.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    unknown_languages = next(
        callback.total() for callback in callbacks if isinstance(callback, UnknownLanguages)
    )
    ledger.check(counts, at_end=True)
    if not trainer.is_global_zero:
        return
    guard = next(callback for callback in trainer.callbacks if isinstance(callback, Guard))  # pyright: ignore[reportAttributeAccessIssue]
    figures = {**guard.figures, **trainer.callback_metrics, **meter.summary(trainer)}
    metrics = {
        name: round(float(value), 6) for name, value in figures.items() if math.isfinite(value)
    }  # JSON has no NaN
    console.print(meter.closing_line(trainer))
    done = {
        "fingerprint": fingerprint,
        "steps": trainer.global_step,
        "metrics": metrics,
        "skipped": by_source(counts.all_skipped),
        "unknown_languages": dict(unknown_languages),
    }
    done["sources"] = {
        root: round(epochs, 4) for root, epochs in data.source_epochs(data.position).items()
    }
    write_text(run.done, json.dumps(done, indent=1))
    if unknown_languages:
        console.print(
            f"{unknown_languages.total()} clips were trained without a language token; "
            f"{run.done} lists their languages."
        )
    if skipped := counts.all_skipped.total():
        files = "ledger.jsonl" if trainer.world_size == 1 else "ledger*.jsonl"
        console.print(f"{skipped} samples were skipped; {run.path / files} lists them.")


def _say(console: Console, line: str | Text) -> None:
    """Print on rank 0 only."""
    if is_first_rank():
        console.print(line)


def _warn(console: Console, line: str) -> None:
    _say(console, Text.assemble(("Warning:", "bold yellow"), f" {line}"))


def _launched_by_slurm() -> bool:
    """Return whether `srun` started this rank.

    In a Slurm job, torchrun may have started it instead. Then only torchrun knows the ranks.
    """
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def _clips_per_step(settings: Settings) -> int:
    """Return the clips in an optimizer step, or 0 if steps are measured in seconds of audio."""
    if settings.data.batch_seconds:
        return 0
    return settings.data.batch_clips * _ranks(settings) * settings.trainer.accumulate


def _seed(settings: Settings) -> None:
    if settings.hardware.threads:
        torch.set_num_threads(settings.hardware.threads)
    # TF32 on devices that support it. CPUs are not affected.
    torch.set_float32_matmul_precision("high")
    lightning.seed_everything(settings.seed, workers=True, verbose=False)


def _total_steps(
    settings: Settings, data: ShardDataModule, checkpoint: Path | None, skip_to: Cursor | None
) -> int:
    ranks = _ranks(settings)
    if checkpoint and (begun := loader_state(checkpoint)):
        data.resume(ranks, begun.state, begun.step, skip_to)
    by_epochs = data.total_steps(ranks, settings.trainer.max_epochs)
    return min(by_epochs, settings.trainer.max_steps) if settings.trainer.max_steps else by_epochs


def _ranks(settings: Settings) -> int:
    """Return the number of ranks of the job, as Lightning will count them."""
    devices = settings.hardware.devices
    if devices == "auto":
        devices = max(1, torch.cuda.device_count()) if settings.hardware.accelerator != "cpu" else 1
    return int(devices) * settings.hardware.nodes


def _data_facts(data: ShardDataModule) -> list[dict[str, Any]]:
    return [
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
        for source, shape in zip(data.train, data.order.sources, strict=True)
    ]


def _left_out(index: ShardIndex) -> str:
    assert index.selection
    counts = index.selection.left_out
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
    total = index.samples + sum(counts.values())
    return f"{index.name}: {index.samples} of {total} clips are trained on; left out: {reasons}"


def _headline(
    settings: Settings, parts: _Parts, run: RunDirectory, checkpoint: Path | None
) -> Text:
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("encoder", parts.module.encoder), ("decoder", parts.module.decoder))
    }
    shares = " · ".join(
        f"{domain} {share:.0%}" for domain, share in _domain_shares(parts.data).items()
    )
    begun = f"going on from {checkpoint}" if checkpoint else f"into {run.path}"
    return Text.assemble(
        (settings.name, "bold"),
        f": encoder {millions['encoder']:.1f} M, decoder {millions['decoder']:.1f} M parameters "
        f"· {shares} · "
        f"{parts.total_steps} steps of {settings.trainer.accumulate * _ranks(settings)} × "
        f"{parts.data.batch_name} · {begun}",
    )


def _domain_shares(data: ShardDataModule) -> dict[str, float]:
    """Return the fraction of each domain among the training clips, as they are drawn."""
    shares: dict[str, float] = {}
    for source, shape in zip(data.train, data.order.sources, strict=True):
        shares[source.domain] = shares.get(source.domain, 0.0) + (
            shape.samples if data.order.epoch_clips else shape.weight
        )
    return {domain: share / sum(shares.values()) for domain, share in shares.items() if share}
