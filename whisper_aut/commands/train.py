"""`whisper-aut train`, `plan` and `doctor`: run a config, estimate its cost, check the machine."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from whisper_aut.commands import Commands, add_config

if TYPE_CHECKING:
    from whisper_aut.config import Settings


def train(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.config import dump_settings, find_config, load_settings
    from whisper_aut.models.decoders import check_decoder

    settings = load_settings(options.config, options.overrides)
    check_decoder(settings.decoder)
    if options.print_config:
        console.print(dump_settings(settings), highlight=False)
        return
    from whisper_aut.pipeline import PipelineOptions, run_pipeline
    from whisper_aut.training.run_dir import check_resume, is_first_rank

    # A wrong path is reported before any corpus is built.
    check_resume(options.resume, Path(settings.runs) / settings.name)
    config, overrides = find_config(options.config), tuple(options.overrides)
    pipeline_options = PipelineOptions(
        config, overrides, options.resume, options.fresh, options.allow_data_change
    )
    run = run_pipeline(settings, pipeline_options, console)
    if is_first_rank():
        console.print(f"Done. The run is in {run.path}, its encoder in {run.export('encoder')}.")


def plan(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.config import find_config, first_model, load_settings
    from whisper_aut.training.plan import build_forecast, forecast_tables, planned_config

    settings = load_settings(options.config, options.overrides)
    model = first_model(settings.model, find_config(options.config))
    for table in forecast_tables(build_forecast(settings, planned_config(model))):
        console.print(table)


def doctor(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.errors import UserError
    from whisper_aut.training.doctor import build_table, examine

    findings = list(examine(_checks(options, console)))
    console.print(build_table(findings))
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if failed:
        raise UserError(f"This machine is not ready: {', '.join(failed)}.")


def _checks(options: argparse.Namespace, console: Console) -> list[tuple[str, Any]]:
    """Return the checks of the machine and, if there is a config, of what the config needs."""
    from whisper_aut.config import dump_settings, find_config, load_settings
    from whisper_aut.training import doctor
    from whisper_aut.training.factory import clip_limits, open_sources, read_policy
    from whisper_aut.training.plan import planned_checkpoint_bytes

    checks: list[tuple[str, Any]] = [("versions", doctor.check_versions)]
    if not options.config:
        return [
            *checks,
            ("devices", lambda: doctor.check_devices("auto", "auto")),
            ("DeepSpeed", lambda: doctor.check_deepspeed("")),
            ("disk", lambda: doctor.check_disk(Path())),
        ]
    settings = load_settings(options.config, options.overrides)
    dry = _two_steps(settings, find_config(options.config))
    hardware, kept = settings.hardware, settings.trainer.keep_checkpoints + 1
    size = planned_checkpoint_bytes(dry)
    checks += [
        ("devices", lambda: doctor.check_devices(hardware.accelerator, hardware.devices)),
        ("DeepSpeed", lambda: doctor.check_deepspeed(settings.strategy.name)),
        ("disk", lambda: doctor.check_disk(Path(settings.runs), size, kept)),
    ]
    built_later = settings.corpora.demo or settings.corpora.manifests
    if built_later and not all(Path(source.path).exists() for source in settings.data.train):
        console.print(
            "The shards and the two training steps are not checked: training builds the shards."
        )
        return checks

    def check_shards() -> Any:
        data = settings.data
        sources = open_sources([*data.train, *data.valid], read_policy(data))
        indexes = [source.index for source in sources]
        return doctor.check_shards(indexes, clip_limits(data))

    checks.append(("shards", check_shards))
    if not options.no_dry_run:
        checks.append(("dry run", lambda: doctor.check_dry_run(dump_settings(dry))))
    return checks


def _two_steps(settings: "Settings", config: Path) -> "Settings":
    """Return the settings of a two-step dry run on this node, which skips `model.after`."""
    import torch

    from whisper_aut.config import CorporaSettings, first_model

    steps = dict.fromkeys(("max_steps", "valid_every_steps", "checkpoint_every_steps"), 2)
    trainer = replace(settings.trainer, **steps, log_every_steps=1)
    model = replace(first_model(settings.model, config), padding=settings.model.padding)
    hardware = replace(settings.hardware, nodes=1)
    on_gpu = hardware.accelerator in ("gpu", "cuda") and torch.cuda.is_available()
    if on_gpu and hardware.devices != "auto":
        hardware = replace(hardware, devices=min(hardware.devices, torch.cuda.device_count()))
    return replace(
        settings,
        trainer=trainer,
        model=model,
        data=replace(settings.data, valid_clips=2),
        probe=replace(settings.probe, tasks=[]),
        hardware=hardware,
        export=[],
        corpora=CorporaSettings(),
    )


def add_parsers(commands: Commands) -> None:
    command = commands.add_parser(
        "train", help="run a config: data, training, export, probes and report"
    )
    add_config(command, "trainer.max_steps=100 decoder=whisper")
    add = command.add_argument
    resume = "resume this run or checkpoint, or the newest unfinished run of this name (auto)"
    add("--resume", default="", metavar="auto|PATH", help=resume)
    change = "resume although the training data or its mixture has changed"
    add("--allow-data-change", action="store_true", help=change)
    add("--fresh", action="store_true", help="train again even if a finished run exists")
    add("--print-config", action="store_true", help="print the resolved config and exit")
    command.set_defaults(run=train)

    command = commands.add_parser(
        "plan", help="estimate memory, time and cores that a config needs, without loading weights"
    )
    add_config(command, "strategy=deepspeed_stage_3")
    command.set_defaults(run=plan)

    command = commands.add_parser(
        "doctor",
        help="check that this machine can run a config: versions, devices, disk, shards, two steps",
    )
    add_config(command, "hardware=8xgpu", optional=True)
    command.add_argument("--no-dry-run", action="store_true", help="skip the two training steps")
    command.set_defaults(run=doctor)
