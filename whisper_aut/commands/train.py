"""`whisper-aut train`, `plan` and `doctor`: run a config, estimate its cost, check the machine."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console


def train(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.config import dump_settings, find_config, load_settings
    from whisper_aut.pipeline import Story, run_pipeline
    from whisper_aut.training.run_dir import is_first_rank

    settings = load_settings(options.config, options.overrides)
    if options.print_config:
        console.print(dump_settings(settings), highlight=False)
        return
    story = Story(
        find_config(options.config), tuple(options.overrides), options.resume, options.fresh
    )
    run = run_pipeline(settings, story, console)
    if is_first_rank():
        console.print(f"Done. Everything is in {run.path}; the encoder in {run.export('encoder')}.")


def plan(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.config import find_config, load_settings
    from whisper_aut.pipeline import run_plan

    run_plan(load_settings(options.config, options.overrides), find_config(options.config), console)


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
    from whisper_aut.training import doctor as look
    from whisper_aut.training.factory import clip_limits, open_sources, read_policy
    from whisper_aut.training.plan import planned_checkpoint_bytes

    checks: list[tuple[str, Any]] = [("versions", look.check_versions)]
    if not options.config:
        return [
            *checks,
            ("devices", lambda: look.check_devices("auto", "auto")),
            ("DeepSpeed", lambda: look.check_deepspeed("")),
            ("disk", lambda: look.check_disk(Path())),
        ]
    settings = load_settings(options.config, options.overrides)
    dry = _two_steps(settings, find_config(options.config))
    kept = settings.trainer.keep_checkpoints + 1
    checks += [
        (
            "devices",
            lambda: look.check_devices(settings.hardware.accelerator, settings.hardware.devices),
        ),
        ("DeepSpeed", lambda: look.check_deepspeed(settings.strategy.name)),
        ("disk", lambda: look.check_disk(Path(settings.runs), planned_checkpoint_bytes(dry), kept)),
    ]
    built = settings.corpora.demo or settings.corpora.manifests
    if built and not all(Path(source.path).exists() for source in settings.data.train):
        console.print(
            "The shards are built when the config is trained; they and the two steps are left out "
            "here."
        )
        return checks
    sources, policy = [*settings.data.train, *settings.data.valid], read_policy(settings.data)
    limits = clip_limits(settings.data)
    checks.append(
        (
            "shards",
            lambda: look.check_shards(
                [s.index for s in open_sources(sources, policy)], limits, policy
            ),
        )
    )
    if not options.no_dry_run:
        checks.append(("dry run", lambda: look.check_dry_run(dump_settings(dry))))
    return checks


def _two_steps(settings: Any, config: Path) -> Any:
    """Return the settings of a two-step dry run on this node.

    A start model that another config would train first is replaced by the model of that config.
    """
    import torch

    from whisper_aut.config import CorporaSettings, find_config, load_settings

    trainer = replace(
        settings.trainer,
        max_steps=2,
        valid_every_steps=2,
        checkpoint_every_steps=2,
        log_every_steps=1,
    )
    model = settings.model
    while model.after:
        config = find_config(model.after, config.parent)
        model = replace(load_settings(config).model, padding=settings.model.padding)
    probe = replace(settings.probe, tasks=[])
    data = replace(settings.data, valid_clips=2)
    hardware = replace(settings.hardware, nodes=1)
    if (
        hardware.accelerator in ("gpu", "cuda")
        and isinstance(hardware.devices, int)
        and torch.cuda.is_available()
    ):
        hardware.devices = min(hardware.devices, torch.cuda.device_count())
    return replace(
        settings,
        trainer=trainer,
        model=model,
        data=data,
        probe=probe,
        hardware=hardware,
        export=[],
        corpora=CorporaSettings(),
    )


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "train", help="run a config: data, training, export, probes and report"
    )
    command.add_argument(
        "config", help="a YAML file, or the name of a config in the package, such as aut_tiny"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. trainer.max_steps=100 decoder=whisper",
    )
    command.add_argument(
        "--resume", default="", metavar="auto|CKPT", help="resume an unfinished run"
    )
    command.add_argument(
        "--fresh", action="store_true", help="train again even if a finished run exists"
    )
    command.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    command.set_defaults(run=train)

    command = commands.add_parser(
        "plan", help="estimate memory, time and cores that a config needs, without loading anything"
    )
    command.add_argument(
        "config", help="a YAML file, or the name of a config in the package, such as aut_tiny"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. strategy=deepspeed_stage_3"
    )
    command.set_defaults(run=plan)

    command = commands.add_parser(
        "doctor",
        help="check that this machine can run a config: versions, ranks, disk, shards, two steps",
    )
    command.add_argument(
        "config",
        nargs="?",
        default="",
        help="a YAML file or a name such as aut_tiny; without it, check only the machine",
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. hardware=8xgpu")
    command.add_argument("--no-dry-run", action="store_true", help="skip the two training steps")
    command.set_defaults(run=doctor)
