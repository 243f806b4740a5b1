"""`whisper-aut data …`: download corpora, and build, index, audit and inspect shards."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from whisper_aut.commands import add_workers, whole_number
from whisper_aut.errors import UserError, nearest

if TYPE_CHECKING:
    from whisper_aut.corpora.manifest import ManifestSpec

SHARDS = Path("data")  # the default --root of `probe`
RAW = SHARDS / "raw"


def data_demo(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.synth.corpus import DemoOptions, build_demo

    out = build_demo(
        Path(options.out),
        DemoOptions(seed=options.seed).scaled(options.scale),
        workers=options.workers,
    )
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
    folder = Path(options.out or RAW / recipe.name)
    download_corpus(recipe, folder, mirror=options.mirror, only=options.only)
    console.print(f"{recipe.title} is in {folder}; its licence: {recipe.licence}.")
    where = "" if folder == RAW / recipe.name else f" {shlex.quote(str(folder))}"
    console.print(f"Next: whisper-aut data build {recipe.name}{where}", soft_wrap=True)


def data_build(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.build import build_shards
    from whisper_aut.corpora.recipes import RECIPES
    from whisper_aut.corpora.recipes.base import build_corpus

    spec = _manifest_spec(options)
    if not options.out and options.manifest not in RECIPES:
        raise UserError(f"Where do the shards of {options.manifest} go? Name a folder with --out.")
    out = Path(options.out or SHARDS / options.manifest)
    how = {"workers": options.workers, "max_skipped_fraction": options.max_skipped_fraction}
    if options.manifest in RECIPES:
        raw = Path(options.path or RAW / options.manifest)
        result = build_corpus(RECIPES[options.manifest], raw, out, spec, **how)
    elif options.path:
        raise UserError(
            f"{options.manifest} is not a recipe, so {options.path} has no meaning."
            f"{nearest(options.manifest, RECIPES)} Recipes: {', '.join(RECIPES)}. Name the audio "
            "folder of a manifest with --audio-root."
        )
    elif Path(options.manifest).is_dir():
        raise UserError(
            f"{options.manifest} is a folder: whisper-aut data build folder {options.manifest} "
            f"--out {out}"
        )
    elif not Path(options.manifest).exists() and (hint := nearest(options.manifest, RECIPES)):
        raise UserError(f"There is neither a manifest nor a recipe {options.manifest}.{hint}")
    else:
        result = build_shards(spec, out, **how)
    console.print(result.summary())
    console.print(f"Next: {_after_build(options.manifest, out)}", soft_wrap=True)


def _after_build(recipe: str, out: Path) -> str:
    """Suggest the next command: probe a corpus that has a probe task, otherwise inspect it."""
    from whisper_aut.probes.tasks import list_tasks, load_task

    tasks = Path("conf") / "probe_tasks"
    task = load_task(recipe, tasks) if recipe in list_tasks(tasks) and out.name == recipe else None
    if task and all(
        Path(folder).is_dir() for part in task.parts for folder in task.folders(part, out.parent)
    ):
        root = "" if out.parent == SHARDS else f" --root {shlex.quote(str(out.parent))}"
        return f"whisper-aut probe logmel --tasks {recipe}{root}"
    folder = next((path.parent for path in sorted(out.rglob("*.tar"))), out)
    return f"whisper-aut data inspect {shlex.quote(str(folder))}"


def _manifest_spec(options: argparse.Namespace) -> "ManifestSpec":
    from whisper_aut.corpora.manifest import ManifestSpec

    where: dict[str, list[str]] = {}
    for condition in options.where:
        column, separator, values = condition.partition("=")
        if not separator:
            raise UserError(f"--where takes COLUMN=VALUE[,VALUE…], not {condition!r}.")
        where.setdefault(column, []).extend(values.split(","))
    named = (
        "audio",
        "text",
        "label",
        "offset",
        "duration",
        "domain",
        "task",
        "language",
        "source",
        "licence",
        "split_by",
    )
    return ManifestSpec(
        manifest=Path(options.manifest),
        audio_root=Path(options.audio_root) if options.audio_root else None,
        where=where,
        **{name: getattr(options, name) for name in named},
    )


def data_inspect(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.inspect import inspect_shards, render

    facts = inspect_shards(options.shards)
    console.print_json(json.dumps(facts.as_dict())) if options.json else console.print(
        render(facts)
    )


def data_index(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.data.writer import index_folder

    index = index_folder(Path(options.folder))
    console.print(
        f"{index.root}: {index.samples} samples, {index.seconds / 3600:.2f} h "
        f"in {len(index.shards)} tars",
    )


def data_audit(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.corpora.audit import AUDIT_NAME, EXCLUDE_NAME, run_audit

    against = [
        folder
        for name in options.against
        for folder in _probe_folders(name, Path(options.conf), options.root)
    ]
    audit = run_audit(options.train, against, options.out, workers=options.workers)
    console.print(audit.summary())
    for folder, clips in audit.counts()["probe_clips_in_training_by_folder"].items():
        console.print(f"  {clips:>7}  clips of {folder} are in the training shards")
    out = Path(options.out)
    console.print(
        f"All pairs and why: {out / AUDIT_NAME}. Leave them out: data.exclude={out / EXCLUDE_NAME}",
    )


def _probe_folders(name: str, conf: Path, root: str) -> list[str]:
    """Return the test folders of a task. A name that is not a task is returned as a folder."""
    from whisper_aut.probes.tasks import list_tasks, load_task

    folder = conf / "probe_tasks"
    if not name.endswith(".yaml") and name not in list_tasks(folder):
        return [name]
    return load_task(name, folder).test_folders(root)


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    commands = commands.add_parser(
        "data", help="download corpora; build, audit and inspect shards"
    ).add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="synthesise the demo corpus")
    command.add_argument("--out", default="data/demo", help="output folder (default: data/demo)")
    command.add_argument(
        "--seed", type=whole_number(0), default=0, help="random seed of the clips (default: 0)"
    )
    command.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="size factor; 2 doubles the number of clips (default: 1)",
    )
    add_workers(command)
    command.set_defaults(run=data_demo)

    command = commands.add_parser(
        "list", help="list the public corpora that can be downloaded and built by name"
    )
    command.set_defaults(run=data_list)

    command = commands.add_parser(
        "get", help="download and unpack a public corpus; resumes if interrupted"
    )
    command.add_argument("name", help="name of a corpus, see `data list`")
    command.add_argument("--out", default="", help="output folder (default: data/raw/NAME)")
    command.add_argument(
        "--mirror",
        default="",
        metavar="URL",
        help="download the archives from here instead of the publisher",
    )
    command.add_argument(
        "--only", default="", metavar="TEXT", help="only archives whose name contains this"
    )
    command.set_defaults(run=data_get)

    command = commands.add_parser(
        "build", help="build shards from a CSV, TSV or JSONL manifest, or from a corpus by name"
    )
    command.add_argument(
        "manifest", help="a manifest, the name of a corpus, or `folder` for a folder of your own"
    )
    command.add_argument(
        "path",
        nargs="?",
        default="",
        help="folder of the unpacked corpus (default: data/raw/NAME)",
    )
    command.add_argument(
        "--out", default="", help="output folder (default for a corpus: data/NAME)"
    )
    command.add_argument("--audio-root", default="", help="base folder of relative audio paths")
    command.add_argument("--audio", default="", help="column with the audio path")
    command.add_argument(
        "--text",
        default="",
        help="column or template of the text, e.g. 'the sound of a {category:words}'",
    )
    command.add_argument("--label", default="", help="column or template of the class label")
    command.add_argument(
        "--offset",
        default="",
        metavar="COLUMN",
        help="column with the start of a clip in a longer file in seconds (default: offset)",
    )
    command.add_argument(
        "--duration",
        default="",
        metavar="COLUMN",
        help="column with its duration in seconds (default: duration, if there is an offset)",
    )
    for name in ("domain", "task", "language", "source", "licence"):
        command.add_argument(f"--{name}", default="", help=f"{name} of all rows")
    command.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE[,VALUE…]",
        help="keep only rows with one of these values; may be repeated",
    )
    command.add_argument(
        "--split-by", default="", metavar="COLUMN", help="write one folder of shards per value"
    )
    command.add_argument(
        "--max-skipped-fraction",
        type=float,
        default=0.5,
        help="fail if a larger fraction of the rows is skipped (default: 0.5)",
    )
    add_workers(command)
    command.set_defaults(run=data_build)

    command = commands.add_parser(
        "index", help="write the index and sample tables for a folder of existing tars"
    )
    command.add_argument("folder", help="a folder of tars, which are not modified")
    command.set_defaults(run=data_index)

    command = commands.add_parser(
        "audit", help="find training clips that are also in probe sets, whole or in part"
    )
    command.add_argument(
        "train", nargs="+", metavar="TRAIN", help="folders of shards, or folders of such folders"
    )
    command.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="PROBE",
        help="folders of shards, or names of probe tasks",
    )
    command.add_argument(
        "--root", default="data", help="replaces {root} in the tasks (default: data)"
    )
    command.add_argument("--conf", default="conf", help="folder with probe_tasks/ (default: conf)")
    command.add_argument(
        "--out",
        default="runs/audit",
        help="folder for audit.json and exclude.jsonl (default: runs/audit)",
    )
    add_workers(command)
    command.set_defaults(run=data_audit)

    command = commands.add_parser("inspect", help="summarise a folder of shards")
    command.add_argument("shards", help="a folder or URL of shards")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=data_inspect)
