"""`whisper-aut experiment` and `lalm`: train a grid of configs or on encoders, and compare."""

import argparse
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import Commands, positive_number, whole_number


def experiment(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.errors import UserError
    from whisper_aut.experiments.grid import load_experiment
    from whisper_aut.experiments.runner import plan_table, run_experiment

    stored = Path(options.experiment)
    if stored.suffix == ".json":
        if options.overrides or options.plan or options.out:
            raise UserError(
                f"{stored} holds results, so nothing is run and there is nothing to override. Its "
                "tables and figure are written next to it."
            )
    else:
        found = load_experiment(options.experiment, options.overrides)
        if options.plan:
            console.print(plan_table(found).to_rich())
            return
        out = Path(options.out or Path(found.settings.runs) / found.settings.name)
        stored = run_experiment(found, out, console)
    _report(stored, console)


def lalm(options: argparse.Namespace, console: Console) -> None:
    """Train a language model on frozen encoders, and write `lalm.json`, tables and a figure."""
    from whisper_aut.experiments.grid import load_experiment
    from whisper_aut.experiments.lalm import write_lalm_probe
    from whisper_aut.experiments.runner import run_experiment
    from whisper_aut.loading import load_tasks

    out = Path(options.out)
    names = [name for names in options.tasks for name in names.split(",") if name]
    written = write_lalm_probe(
        [*options.against, options.encoder],
        load_tasks(names, Path(options.conf)),
        out,
        root=options.root,
        seeds=options.seeds,
        losses=options.losses,
        overrides=options.overrides,
    )
    _report(run_experiment(load_experiment(written), out, console), console)


def _report(stored: Path, console: Console) -> None:
    """Write page and figure of stored results next to them, and print the tables."""
    from whisper_aut.experiments.analysis import Results, plot_results, result_tables, results_page
    from whisper_aut.utils import write_text

    results, page = Results.load(stored), stored.with_suffix(".md")
    plot_results(results, stored.with_suffix(".png"))
    write_text(page, results_page(results))
    for table in result_tables(results):
        console.print(table.to_rich())
    console.print(f"Wrote {page}; all results are in {stored}.")


def add_parsers(commands: Commands) -> None:
    command = commands.add_parser(
        "experiment",
        help="run a grid of configs and seeds and compare them in a table and a figure",
    )
    add = command.add_argument
    add(
        "experiment",
        help="a YAML file, or the name of an experiment in the package, such as e4_mixture; or "
        "stored results, such as docs/results/e4_mixture.json, to write tables and figure again",
    )
    overrides = "e.g. seeds=[0] set.trainer.max_steps=20 root=FOLDER"
    add("overrides", nargs="*", metavar="key=value", help=overrides)
    plan = "list the runs, which of them exist, and the cost of the others; run nothing"
    add("--plan", action="store_true", help=plan)
    out = "folder for table, figure and JSON (default: the experiment's folder in runs/)"
    add("--out", default="", help=out)
    command.set_defaults(run=experiment)

    command = commands.add_parser(
        "lalm", help="score frozen encoders inside a small language model trained on probe tasks"
    )
    add = command.add_argument
    encoder = "a Whisper: a run, a directory or a hub id, `random:DIR`; NAME@30s or NAME@none"
    add("encoder", help=encoder)
    overrides = "for conf/lalm.yaml, e.g. trainer.max_steps=300 data.batch_clips=8"
    add("overrides", nargs="*", metavar="key=value", help=overrides)
    against = "encoder to compare with; may be repeated, and the first one is the reference"
    add("--against", action="append", default=[], metavar="BASE", help=against)
    tasks = "tasks in CONF/probe_tasks, suites in CONF/suites, or paths of YAML files"
    add("--tasks", nargs="+", required=True, metavar="TASK", help=tasks)
    add("--root", default="data", help="replaces {root} in the tasks (default: data)")
    seeds = "number of trainings of each encoder (default: 3)"
    add("--seeds", type=whole_number(1), default=3, help=seeds)
    losses = "validation losses; the cost to reach each is reported"
    add("--losses", nargs="+", type=positive_number, default=[], metavar="LOSS", help=losses)
    add("--conf", default="conf", help="folder with probe_tasks/ (default: conf)")
    out = "folder for runs, lalm.json, tables and figure (default: runs/lalm)"
    add("--out", default="runs/lalm", help=out)
    command.set_defaults(run=lalm)
