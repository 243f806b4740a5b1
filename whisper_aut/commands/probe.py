"""`whisper-aut probe`, `leaderboard` and `report`: score encoders, and write tables and plots."""

import argparse
from pathlib import Path
from typing import Any

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
    from whisper_aut.loading import encoder_names, load_tasks, open_encoder, split_layers
    from whisper_aut.probes.embed import EmbedSettings
    from whisper_aut.probes.encoders import FrameEncoder, layer_indices, select_layers
    from whisper_aut.probes.fit import PROBES
    from whisper_aut.probes.suite import (
        embed_on_ranks,
        find_problems,
        process_group,
        rank_and_world_size,
        run_suite,
    )
    from whisper_aut.report.html import FEW_SHOT, LAYER_WEIGHTS, LAYERS, build_report

    if options.list:
        list_probes(options, console)
        return
    missing = [name for name in ("encoder", "tasks") if not getattr(options, name)]
    if missing:
        names = ", ".join("--tasks" if name == "tasks" else name for name in missing)
        options.usage_error(f"the following arguments are required: {names}")
    curve = "all" in options.layers
    out, root, kind = Path(options.out), options.root, options.kind or ""
    names = [name for names in options.tasks for name in names.split(",") if name]
    (rank, _), device = rank_and_world_size(), device_name(options.device)
    embedding = EmbedSettings(
        pooling=options.pooling,
        layers=tuple(layer for layer in options.layers if layer != "all"),
        batch_seconds=options.batch_seconds,
        quiet=rank > 0,
    )
    encoders: dict[str, FrameEncoder] = {}  # by display name, those of `--against` first
    with process_group():  # if a rank fails in this block, the others stop too
        problems, given = Problems(), []
        tasks = load_tasks(names, Path(options.conf), problems)
        for name in (*options.against, options.encoder):
            with problems.gather():
                split_padding(split_layers(name)[0])
                given.append(name)
        with problems.gather():
            for name, label in encoder_names(given).items():
                with problems.gather():
                    encoders[label] = open_encoder(
                        name, options.padding, device=device, dtype=options.dtype
                    )
        settings: dict[str, Any] = {"root": root, "embedding": embedding, "kind": kind}
        if options.skip_unavailable:
            for task in list(tasks):
                own = Problems()
                find_problems(own, encoders, [task], **settings)
                if own.found:
                    console.print(f"Left out: {task.name}: {' '.join(own.found)}", highlight=False)
                    tasks.remove(task)
        find_problems(problems, encoders, tasks, **settings)
        views: dict[str, FrameEncoder] = {}
        with problems.gather():
            for name, encoder in list(encoders.items())[-1:] if curve else ():
                for layer in layer_indices(encoder):
                    views[f"{name}#{layer}"] = select_layers(encoder, [layer])
        classified = [task for task in tasks if task.answer == "class"]
        if options.shots:
            few = kind or "linear"
            find_problems(problems, {}, classified, root=root, kind=few, few_shot=True)
            if not classified:
                problems.add("--shots needs a task with one class per clip.")
        problems.raise_if_any("The probe")
        out.mkdir(parents=True, exist_ok=True)
        cache = out / "embeddings"
        all_encoders = {**encoders, **dict(list(views.items())[:1])}  # one has all layers
        embed_on_ranks(all_encoders, tasks, cache=cache, **settings)
    if rank:
        return
    settings |= {"cache": cache, "seeds": range(options.seeds), "device": device}
    settings |= {"final_fit": options.final_fit}
    run_suite(
        encoders,
        tasks,
        against=list(encoders)[: len(options.against)],
        scores_file=out / "scores.json",
        predictions_file=out / "predictions.jsonl",
        **settings,
    )
    if views:
        run_suite(views, tasks, scores_file=out / LAYERS, **settings)
        weighted = [task for task in tasks if task.answer in PROBES["layers"].answers]
        if weighted:
            last, settings["kind"] = dict(list(encoders.items())[-1:]), "layers"
            run_suite(last, weighted, scores_file=out / LAYER_WEIGHTS, **settings)
    if options.shots:
        few_shot, settings["kind"] = out / FEW_SHOT, kind or "linear"
        run_suite(encoders, classified, shots=options.shots, scores_file=few_shot, **settings)
    build_report([out], out, console)


def list_probes(options: argparse.Namespace, console: Console) -> None:
    """Print suites and tasks, and which tasks can run with the shards below `--root`."""
    from whisper_aut.config import PACKAGE_CONF
    from whisper_aut.errors import Problems, UserError
    from whisper_aut.probes.suite import find_problems
    from whisper_aut.probes.tasks import expand_suites, list_tasks, load_task
    from whisper_aut.report.tables import BLANK, Table

    conf = Path(options.conf)
    found = (file for folder in (conf, PACKAGE_CONF) for file in folder.glob("suites/*.yaml"))
    suites = sorted({file.stem for file in found})
    listed = tuple((name, " ".join(expand_suites([name], conf / "suites"))) for name in suites)
    console.print(Table("Suites", ("suite", "tasks"), listed, 2).to_rich())
    names = [name for given in options.tasks for name in given.split(",")]
    rows = []
    for name in expand_suites(names or list_tasks(conf / "probe_tasks"), conf / "suites"):
        try:
            task = load_task(name, conf / "probe_tasks")
        except UserError as error:
            rows.append((name, BLANK, BLANK, str(error), BLANK))
            continue
        problems = Problems()
        find_problems(problems, {}, [task], root=options.root, kind=options.kind or "")
        found = [problem.partition(". ")[0] for problem in problems.found]
        status = "; ".join([*found[:1], *found[1:][-1:]])
        classes = BLANK if task.classes is None else str(task.classes)
        rows.append((name, task.domain, task.metric, status or "can run", classes))
    columns = ("task", "domain", "metric", f"with --root {options.root}", "classes")
    console.print(Table("Tasks", columns, tuple(rows), 4).to_rich())


def leaderboard(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.errors import UserError
    from whisper_aut.report.html import build_leaderboard

    if options.recipe and not options.against:
        raise UserError("--recipe needs --against, the encoder or recipe to compare with.")
    paths, out = [Path(path) for path in options.scores], Path(options.out)
    build_leaderboard(paths, out, console, options.recipe, options.against)


def report(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.report.html import build_report

    build_report([Path(run) for run in options.runs], Path(options.out), console)


def _counts(text: str) -> tuple[int, ...]:
    """Parse `1,2,4` into ascending numbers."""
    return tuple(sorted({whole_number(1)(part) for part in text.split(",")}))


def add_parsers(commands: Commands) -> None:
    command = commands.add_parser("probe", help="score an encoder on probe tasks")
    add = command.add_argument
    add(
        "encoder",
        nargs="?",
        help="a run, a directory or a hub id; FILE.py:CLASS; random:DIR for random weights; logmel "
        "for log-mel statistics. NAME@30s or NAME@none sets the padding of a Whisper, NAME#7, "
        "NAME#all or NAME#last the layers",
    )
    against = "encoder to compare with; may be repeated"
    add("--against", action="append", default=[], metavar="BASE", help=against)
    tasks = "tasks in CONF/probe_tasks, suites in CONF/suites, or paths of YAML files"
    add("--tasks", nargs="+", default=[], metavar="TASK", help=tasks)
    listed = "list suites and tasks, and why a task cannot run; nothing is probed"
    add("--list", action="store_true", help=listed)
    left_out = "leave out tasks that cannot run, such as those without shards, and list them"
    add("--skip-unavailable", action="store_true", help=left_out)
    shots = "also train on N clips of each class, drawn by each seed: --shots 1,2,4,8,16"
    add("--shots", type=_counts, default=(), metavar="N,N,…", help=shots)
    add("--root", default="data", help="replaces {root} in the tasks (default: data)")
    seeds = (
        "number of seeds for probes with random initialization; linear, frame and knn probes are "
        "fitted once (default: 5)"
    )
    add("--seeds", type=whole_number(1), default=5, help=seeds)
    fit = "data to fit the tested probe on, after its settings are chosen (default: train)"
    add_choice(command, "--final-fit", ("train", "train+valid"), fit, default="train")
    add_choice(command, "--kind", PROBE_KINDS, "kind of probe (default: that of each task)")
    add_pooling_options(command, curve=True)
    add_encoder_options(command)
    add("--conf", default="conf", help="folder with probe_tasks/ (default: conf)")
    out = "folder for scores.json and the report (default: runs/probe)"
    add("--out", default="runs/probe", help=out)
    command.set_defaults(run=probe, usage_error=command.error)

    command = commands.add_parser("leaderboard", help="compare the encoders of several probe runs")
    add = command.add_argument
    add("scores", nargs="+", metavar="SCORES", help="folders with a scores.json, or such files")
    add("--out", required=True, help="folder for leaderboard.html, .md and .csv")
    recipe = "encoders NAME-0, NAME-1, … are trainings of one recipe; may be repeated"
    add("--recipe", action="append", default=[], metavar="NAME", help=recipe)
    add("--against", default="", help="encoder or recipe to compare recipes with")
    command.set_defaults(run=leaderboard)

    command = commands.add_parser("report", help="write tables and plots of one or more runs")
    runs = "output directories of `train` or `probe`"
    command.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    command.add_argument("--out", required=True, help="folder for report.html, tables and figures")
    command.set_defaults(run=report)
