"""`whisper-aut experiment`: run a grid of configs and seeds and compare the results."""

import argparse
import os
from pathlib import Path

from rich.console import Console


def experiment(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.config import find_config
    from whisper_aut.errors import UserError
    from whisper_aut.experiments.conduct import analyse, conduct, plan_table
    from whisper_aut.experiments.grid import load_experiment
    from whisper_aut.experiments.tables import page, put_into

    if options.experiment.endswith(".json"):
        if options.overrides or options.plan or options.out:
            raise UserError(
                f"{options.experiment} holds results: its tables and figure are written again next "
                "to it, and nothing is run. Only --page goes with it."
            )
        done = analyse(Path(options.experiment), console)
    else:
        path = find_config(options.experiment, kind="experiments")
        settings = load_experiment(path, options.overrides)
        if options.plan:
            console.print(plan_table(settings, path))
            return
        out = Path(options.out or Path(settings.runs) / settings.name)
        done = conduct(settings, path, out, console)
    if options.page:
        document, name = Path(options.page), done.results.name
        picture = os.path.relpath(done.page.with_suffix(".png"), document.parent)
        put_into(document, name, page(done.results, picture))
    console.print(f"Done. Tables in {done.page}, everything in {done.json}.")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "experiment",
        help="run a grid of configs and seeds and compare them in a table and a figure",
    )
    command.add_argument(
        "experiment",
        help="a YAML file, or the name of an experiment in the package, such as e4_mixture; or "
        "stored results, such as docs/results/e4_mixture.json, to write their tables again",
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. seeds=[0] set.trainer.max_steps=20 root=FOLDER",
    )
    command.add_argument(
        "--plan",
        action="store_true",
        help="list the runs, which of them exist, and the cost of the others; run nothing",
    )
    command.add_argument(
        "--out",
        default="",
        help="folder for table, figure and JSON (default: the experiment's folder in runs/)",
    )
    command.add_argument(
        "--page",
        default="",
        metavar="FILE",
        help="also write the tables between the markers of this Markdown file",
    )
    command.set_defaults(run=experiment)
