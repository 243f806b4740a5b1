"""`whisper-aut data …`: download corpora, and build, index, audit and inspect shards."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from whisper_aut.commands import Commands, add_workers, fraction, positive_number, whole_number
from whisper_aut.errors import UserError, nearest
from whisper_aut.utils import available_cores

SHARDS = Path("data")  # the default --root of `probe`
RAW = SHARDS / "raw"
# Options of `data build` that are passed on to `ManifestSpec`.
COLUMNS = ("audio_root", "audio", "text", "label", "offset", "duration", "split_by")
CONSTANTS = ("domain", "task", "language", "source", "licence")


def data_demo(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.synth.corpus import build_demo

    out = Path(options.out)
    build_demo(out, seed=options.seed, scale=options.scale, workers=options.workers)
    console.print(
        f"The demo corpus is in {out}. Look at it: whisper-aut data inspect {out}/train/sound"
    )


def data_list(options: argparse.Namespace, console: Console) -> None:
    from rich.table import Table

    from whisper_aut.corpora.recipes import RECIPES
    from whisper_aut.corpora.recipes.base import LISTED_COLUMNS, TABLE_COLUMNS

    table = Table(title="Corpora that can be built by name")
    for column in TABLE_COLUMNS[:LISTED_COLUMNS]:
        table.add_column(column, no_wrap=column in ("name", "download"), overflow="fold")
    for recipe in RECIPES.values():
        table.add_row(*recipe.table_row()[:LISTED_COLUMNS])
    console.print(table)


def data_get(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.recipes import find_recipe
    from whisper_aut.corpora.recipes.base import download_corpus

    recipe = find_recipe(options.name)
    default = RAW / recipe.name
    folder = Path(options.out or default)
    download_corpus(recipe, folder, mirror=options.mirror, only=options.only)
    argument = "" if folder == default else f" {shlex.quote(str(folder))}"
    console.print(f"{recipe.title} is in {folder}. Licence: {recipe.licence}.")
    console.print(f"Next: whisper-aut data build {recipe.name}{argument}", soft_wrap=True)


def data_build(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.audio.decode import ClipLimits
    from whisper_aut.corpora.build import build_shards
    from whisper_aut.corpora.download import download_dataset
    from whisper_aut.corpora.manifest import ManifestSpec, arrow_files
    from whisper_aut.corpora.recipes import RECIPES
    from whisper_aut.corpora.recipes.base import build_corpus

    where: dict[str, list[str]] = {}
    for condition in options.where:
        column, separator, values = condition.partition("=")
        if not separator:
            raise UserError(f"--where takes COLUMN=VALUE[,VALUE…], not {condition!r}.")
        where.setdefault(column, []).extend(values.split(","))
    name = options.manifest
    if name.startswith("hf://") and options.out:
        name = str(download_dataset(name))
    spec = ManifestSpec(
        name, where=where, **{key: getattr(options, key) for key in (*COLUMNS, *CONSTANTS)}
    )
    names = ("workers", "max_skipped_fraction", "append")
    choices: dict[str, Any] = {name: getattr(options, name) for name in names}
    if name in RECIPES:
        out = Path(options.out or SHARDS / name)
        raw = Path(options.path or RAW / name)
        result = build_corpus(
            RECIPES[name], raw, out, spec, max_seconds=options.max_seconds, **choices
        )
    else:
        hint = nearest(name, RECIPES)
        if options.path:
            raise UserError(
                f"{name} is not the name of a corpus, so no folder can follow it.{hint} Give the "
                "audio folder of a manifest with --audio-root."
            )
        if hint and not Path(name).exists():
            raise UserError(f"{name} is neither a manifest nor the name of a corpus.{hint}")
        if not options.out:
            raise UserError(f"Give the output folder for the shards of {name} with --out.")
        out = Path(options.out)
        if Path(name).is_dir() and not arrow_files(Path(name)):
            raise UserError(f"{name} is a folder: whisper-aut data build folder {name} --out {out}")
        limits = ClipLimits(max_seconds=options.max_seconds or 30.0)
        result = build_shards(spec, out, limits=limits, **choices)
    console.print(result.summary())
    console.print(f"Next: {_next_command(name, out)}", soft_wrap=True)


def _next_command(recipe: str, out: Path) -> str:
    """Return the suggested command: probe a corpus that has a probe task, inspect any other."""
    from whisper_aut.config import LOCAL_CONF
    from whisper_aut.probes.tasks import list_tasks, load_task

    tasks = LOCAL_CONF / "probe_tasks"
    task = load_task(recipe, tasks) if recipe in list_tasks(tasks) and out.name == recipe else None
    if task and all(
        Path(folder).is_dir() for part in task.parts for folder in task.folders(part, out.parent)
    ):
        root = "" if out.parent == SHARDS else f" --root {shlex.quote(str(out.parent))}"
        return f"whisper-aut probe logmel --tasks {recipe}{root}"
    folders = sorted({path.parent for path in out.rglob("*.tar")} or {out})
    folder = next((one for one in folders if one.name == "train"), folders[0])
    return f"whisper-aut data inspect {shlex.quote(str(folder))}"


def data_inspect(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.inspect import inspect_shards, render

    stats = inspect_shards(options.shards, most=options.limit)
    if options.json:
        console.print_json(json.dumps(stats.as_dict()))
    else:
        console.print(render(stats))


def data_index(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.data.writer import index_folder

    workers = options.workers or available_cores()
    index = index_folder(options.tars, options.out, workers=workers)
    hours, tars = index.seconds / 3600, len(index.shards)
    console.print(f"{index.root}: {index.samples} samples, {hours:.2f} h in {tars} tars")


def data_audit(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.audit import AUDIT_NAME, EXCLUDE_NAME, run_audit, summarize
    from whisper_aut.probes.tasks import list_tasks, load_task

    tasks, against = Path(options.conf) / "probe_tasks", []
    for name in options.against:
        if name.endswith(".yaml") or name in list_tasks(tasks):
            against += load_task(name, tasks).test_folders(options.root)
        else:
            against.append(name)
    audit = run_audit(options.train, against, options.out, workers=options.workers)
    console.print(summarize(audit))
    for folder, clips in audit["counts"]["probe_clips_in_training_by_folder"].items():
        console.print(f"  {clips:>7}  clips of {folder} are in the training shards")
    out = Path(options.out)
    console.print(
        f"All pairs are in {out / AUDIT_NAME}. Exclude them from training: "
        f"data.exclude={out / EXCLUDE_NAME}"
    )


def add_parsers(commands: Commands) -> None:
    data = commands.add_parser("data", help="download corpora; build, audit and inspect shards")
    commands = data.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="synthesise the demo corpus")
    add = command.add_argument
    add("--out", default="data/demo", help="output folder (default: data/demo)")
    add("--seed", type=whole_number(0), default=0, help="random seed of the clips (default: 0)")
    scale = "size factor; 2 doubles the number of clips (default: 1)"
    add("--scale", type=positive_number, default=1.0, help=scale)
    add_workers(command)
    command.set_defaults(run=data_demo)

    command = commands.add_parser(
        "list", help="list the public corpora that can be downloaded and built by name"
    )
    command.set_defaults(run=data_list)

    command = commands.add_parser(
        "get", help="download and unpack a public corpus; resumes if interrupted"
    )
    add = command.add_argument
    add("name", help="name of a corpus, see `data list`")
    add("--out", default="", help="output folder (default: data/raw/NAME)")
    mirror = "download the archives from here instead of the publisher"
    add("--mirror", default="", metavar="URL", help=mirror)
    add("--only", default="", metavar="TEXT", help="only archives whose name contains this")
    command.set_defaults(run=data_get)

    command = commands.add_parser(
        "build", help="build shards from a manifest, a Hugging Face dataset, or a corpus by name"
    )
    add = command.add_argument
    manifest = (
        "a manifest, the name of a corpus, `folder` for a folder of your own, a Hugging Face "
        "dataset on disk, or hf://ORG/NAME"
    )
    add("manifest", help=manifest)
    path = "folder of the unpacked corpus (default: data/raw/NAME)"
    add("path", nargs="?", default="", help=path)
    add("--out", default="", help="output folder (default for a corpus: data/NAME)")
    add("--audio-root", default="", help="base folder of relative audio paths")
    add("--audio", default="", help="column with the audio path")
    text = "column or template of the text, e.g. 'the sound of a {category:words}'"
    add("--text", default="", help=text)
    add("--label", default="", help="column or template of the class label")
    offset = "column with the start of a clip in a longer file in seconds (default: offset)"
    add("--offset", default="", metavar="COLUMN", help=offset)
    duration = "column with its duration in seconds (default: duration, if there is an offset)"
    add("--duration", default="", metavar="COLUMN", help=duration)
    for name in CONSTANTS:
        add(f"--{name}", default="", help=f"{name} of all rows")
    where = "keep only rows with one of these values; may be repeated"
    add("--where", action="append", default=[], metavar="COLUMN=VALUE[,VALUE…]", help=where)
    add("--split-by", default="", metavar="COLUMN", help="write one folder of shards per value")
    longest = "skip longer clips (default: 30, or the recipe's)"
    add("--max-seconds", type=positive_number, default=None, help=longest)
    skipped = "fail if a larger fraction of the rows is skipped (default: 0.5)"
    add("--max-skipped-fraction", type=fraction, default=0.5, help=skipped)
    append = "keep the shards in --out, and add the rows whose ids they do not have"
    add("--append", action="store_true", help=append)
    add_workers(command)
    command.set_defaults(run=data_build)

    command = commands.add_parser("index", help="write index and sample tables of existing tars")
    add = command.add_argument
    tars = "a folder, URL or pattern of tars, which are not modified; .tar.gz files are unpacked"
    add("tars", help=tars)
    out = "where to write the index, the tables and unpacked tars (default: next to the tars)"
    add("--out", default="", metavar="FOLDER", help=out)
    add_workers(command)
    command.set_defaults(run=data_index)

    command = commands.add_parser(
        "audit", help="find training clips that are also in probe sets, whole or in part"
    )
    add = command.add_argument
    add("train", nargs="+", metavar="TRAIN", help="folders of shards, or folders of such folders")
    against = "folders of shards, or names of probe tasks"
    add("--against", nargs="+", required=True, metavar="PROBE", help=against)
    add("--root", default="data", help="replaces {root} in the tasks (default: data)")
    add("--conf", default="conf", help="folder with probe_tasks/ (default: conf)")
    out = "folder for audit.json and exclude.jsonl (default: runs/audit)"
    add("--out", default="runs/audit", help=out)
    add_workers(command)
    command.set_defaults(run=data_audit)

    command = commands.add_parser("inspect", help="summarise a folder of shards")
    command.add_argument("shards", help="a folder, URL or pattern of shards")
    limit = "read only the first N samples of each folder"
    command.add_argument("--limit", type=whole_number(1), metavar="N", help=limit)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=data_inspect)
