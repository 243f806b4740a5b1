"""`whisper-aut probe` and `report`: scores, tables, plots."""

import argparse
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import add_padding, whole_number


def probe(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.pipeline import ProbeRequest, run_probe

    tasks = [name for names in options.tasks for name in names.split(",") if name]
    conf, out = Path(options.conf), Path(options.out)
    request = ProbeRequest(
        options.encoder, options.against, tasks, options.seeds, conf, options.root, options.padding, out,
        kind=options.kind, pooling=options.pooling, layers=tuple(options.layers), device=options.device,
        final_fit=options.final_fit,
    )  # fmt: skip
    run_probe(request, console)


def report(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.report.build import build_report

    build_report([Path(run) for run in options.runs], Path(options.out), console)


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser("probe", help="score an encoder on probe tasks")
    command.add_argument(
        "encoder",
        help="a directory or hub id; `logmel` for log-mel statistics, `random:DIR` for random weights",
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="BASE",
        help="compare with this one; may be repeated",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="names from CONF/probe_tasks, suites from CONF/probe.yaml, or paths of YAMLs",
    )
    command.add_argument("--root", default="data", help="what {root} stands for in the tasks")
    command.add_argument(
        "--seeds",
        type=whole_number(1),
        default=5,
        help="how often a probe with a random start is trained (mlp, layers, attention, retrieval, transcription)",
    )
    command.add_argument(
        "--final-fit",
        choices=["train", "train+valid"],
        default="train",
        help="what the tested probe is fitted on once its settings are chosen; folds: all other folds",
    )
    add_padding(command)
    command.add_argument(
        "--kind",
        default="",
        help="linear, knn, mlp, layers, …; by default the one that each task names",
    )
    command.add_argument(
        "--pooling", default="mean", help="mean or mean_std, over a clip's own frames"
    )
    command.add_argument(
        "--layers",
        type=whole_number(0),
        nargs="+",
        default=[],
        metavar="N",
        help="pool these layers; 0 is the first's input",
    )
    command.add_argument(
        "--device",
        default="cpu",
        help="where encoders run and probes are fitted: cpu, cuda:0; cuda is one GPU a rank",
    )
    command.add_argument("--conf", default="conf", help="folder that holds probe_tasks/")
    command.add_argument("--out", default="runs/probe", help="where scores.json and the report go")
    command.set_defaults(run=probe)

    command = commands.add_parser("report", help="tables and plots of one or more runs")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--out", required=True)
    command.set_defaults(run=report)
