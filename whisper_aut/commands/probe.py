"""`whisper-aut probe` and `report`: score encoders, and write tables and plots."""

import argparse
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import (
    PROBE_KINDS,
    Commands,
    add_choice,
    add_encoder_options,
    add_pooling_options,
    whole_number,
)


def probe(options: argparse.Namespace, console: Console) -> None:
    """Score an encoder and those to compare it with, and write scores and report to `--out`.

    Under `torchrun`, all ranks embed clips and the first one scores. Problems of encoders, tasks
    and shards are reported at once, before the first clip is embedded.
    """
    from whisper_aut.errors import Problems
    from whisper_aut.inference.encoder import device_name, split_padding
    from whisper_aut.loading import encoder_names, load_tasks, open_encoder
    from whisper_aut.probes.embed import EmbedSettings
    from whisper_aut.probes.encoders import FrameEncoder
    from whisper_aut.probes.suite import (
        embed_on_ranks,
        find_problems,
        process_group,
        rank_and_world_size,
        run_suite,
    )
    from whisper_aut.report.html import build_report

    out, root, kind = Path(options.out), options.root, options.kind or ""
    names = [name for names in options.tasks for name in names.split(",") if name]
    (rank, _), device = rank_and_world_size(), device_name(options.device)
    embedding = EmbedSettings(
        pooling=options.pooling,
        layers=tuple(options.layers),
        batch_seconds=options.batch_seconds,
        quiet=rank > 0,
    )
    encoders: dict[str, FrameEncoder] = {}  # by display name, those of `--against` first
    with process_group():  # if a rank fails in this block, the others stop too
        problems, given = Problems(), []
        tasks = load_tasks(names, Path(options.conf), problems)
        for name in (*options.against, options.encoder):
            with problems.gather():
                split_padding(name)
                given.append(name)
        with problems.gather():
            for name, label in encoder_names(given).items():
                with problems.gather():
                    encoders[label] = open_encoder(
                        name, options.padding, device=device, dtype=options.dtype
                    )
        find_problems(problems, encoders, tasks, root=root, embedding=embedding, kind=kind)
        problems.raise_if_any("The probe")
        out.mkdir(parents=True, exist_ok=True)
        cache = out / "embeddings"
        embed_on_ranks(encoders, tasks, root=root, cache=cache, embedding=embedding, kind=kind)
    if rank:
        return
    run_suite(
        encoders,
        tasks,
        root=root,
        cache=cache,
        seeds=range(options.seeds),
        against=list(encoders)[: len(options.against)],
        embedding=embedding,
        scores_file=out / "scores.json",
        predictions_file=out / "predictions.jsonl",
        kind=kind,
        device=device,
        final_fit=options.final_fit,
    )
    build_report([out], out, console)


def report(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.report.html import build_report

    build_report([Path(run) for run in options.runs], Path(options.out), console)


def add_parsers(commands: Commands) -> None:
    command = commands.add_parser("probe", help="score an encoder on probe tasks")
    add = command.add_argument
    add(
        "encoder",
        help="a run, a directory or a hub id; FILE.py:CLASS; random:DIR for random weights; logmel "
        "for log-mel statistics. NAME@30s or NAME@none sets the padding of a Whisper",
    )
    against = "encoder to compare with; may be repeated"
    add("--against", action="append", default=[], metavar="BASE", help=against)
    tasks = "tasks in CONF/probe_tasks, suites in CONF/suites, or paths of YAML files"
    add("--tasks", nargs="+", required=True, metavar="TASK", help=tasks)
    add("--root", default="data", help="replaces {root} in the tasks (default: data)")
    seeds = (
        "number of seeds for probes with random initialization; linear and knn probes are fitted "
        "once (default: 5)"
    )
    add("--seeds", type=whole_number(1), default=5, help=seeds)
    fit = "data to fit the tested probe on, after its settings are chosen (default: train)"
    add_choice(command, "--final-fit", ("train", "train+valid"), fit, default="train")
    add_choice(command, "--kind", PROBE_KINDS, "kind of probe (default: that of each task)")
    add_pooling_options(command)
    add_encoder_options(command)
    add("--conf", default="conf", help="folder with probe_tasks/ (default: conf)")
    out = "folder for scores.json and the report (default: runs/probe)"
    add("--out", default="runs/probe", help=out)
    command.set_defaults(run=probe)

    command = commands.add_parser("report", help="write tables and plots of one or more runs")
    runs = "output directories of `train` or `probe`"
    command.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    command.add_argument("--out", required=True, help="folder for report.html, tables and figures")
    command.set_defaults(run=report)
