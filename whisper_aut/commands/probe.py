"""`whisper-aut probe` and `report`: score encoders, and write tables and plots."""

import argparse
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import (
    PROBE_KINDS,
    add_choice,
    add_encoder_options,
    add_pooling_options,
    whole_number,
)


def probe(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.pipeline import ProbeRequest, run_probe

    tasks = [name for names in options.tasks for name in names.split(",") if name]
    request = ProbeRequest(
        encoder=options.encoder,
        against=options.against,
        tasks=tasks,
        seeds=options.seeds,
        conf=Path(options.conf),
        root=options.root,
        out=Path(options.out),
        padding=options.padding,
        kind=options.kind or "",
        pooling=options.pooling,
        layers=tuple(options.layers),
        device=options.device,
        dtype=options.dtype,
        batch_seconds=options.batch_seconds,
        final_fit=options.final_fit,
    )
    run_probe(request, console)


def report(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.report.html import build_report

    build_report([Path(run) for run in options.runs], Path(options.out), console)


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("probe", help="score an encoder on probe tasks")
    command.add_argument(
        "encoder",
        help="a directory, a run or a hub id; `logmel` for log-mel statistics, `random:DIR` for "
        "random weights; NAME@30s or NAME@none sets the padding",
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="BASE",
        help="encoder to compare with; may be repeated",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="tasks in CONF/probe_tasks, suites in CONF/probe.yaml, or paths of YAML files",
    )
    command.add_argument(
        "--root", default="data", help="replaces {root} in the tasks (default: data)"
    )
    command.add_argument(
        "--seeds",
        type=whole_number(1),
        default=5,
        help="number of seeds for probes with random initialization; linear and knn probes are "
        "fitted once (default: 5)",
    )
    finals = "data to fit the tested probe on, after its settings are chosen (default: train)"
    add_choice(command, "--final-fit", ("train", "train+valid"), finals, default="train")
    kinds = "kind of probe (default: that of each task)"
    add_choice(command, "--kind", PROBE_KINDS, kinds)
    add_pooling_options(command)
    add_encoder_options(command)
    command.add_argument("--conf", default="conf", help="folder with probe_tasks/ (default: conf)")
    command.add_argument(
        "--out",
        default="runs/probe",
        help="folder for scores.json and the report (default: runs/probe)",
    )
    command.set_defaults(run=probe)

    command = commands.add_parser("report", help="write tables and plots of one or more runs")
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directories of `train` or `probe`"
    )
    command.add_argument("--out", required=True, help="folder for report.html, tables and figures")
    command.set_defaults(run=report)
