"""`whisper-aut experiment`: run a grid of configs and seeds and compare the results."""

import argparse
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import Commands


def experiment(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.errors import UserError
    from whisper_aut.experiments.analysis import Results, plot_results, result_tables, results_page
    from whisper_aut.experiments.grid import load_experiment
    from whisper_aut.experiments.runner import plan_table, run_experiment
    from whisper_aut.utils import write_text

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
