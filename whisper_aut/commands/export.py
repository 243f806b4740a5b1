"""`whisper-aut export`, `card`, `interpolate`, `chat` and `evaluate`: use a trained model."""

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from rich.console import Console

from whisper_aut.commands import (
    DTYPES,
    PROBE_KINDS,
    Commands,
    add_choice,
    add_device_options,
    fraction,
    whole_number,
)
from whisper_aut.errors import UserError

SWAP = "Load it into a model: whisper_aut.export.towers.swap_tower(model, '{out}')"
NEXT_STEPS = {
    "encoder": "Load it: whisper_aut.load_encoder('{out}')",
    "whisper": "Load it: transformers.WhisperForConditionalGeneration.from_pretrained('{out}')",
    **dict.fromkeys(("qwen2-audio", "qwen2.5-omni", "audio-flamingo-3", "voxtral"), SWAP),
    "onnx": "Load it: onnxruntime.InferenceSession('{out}/encoder.onnx')",
}


def export(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.export.hf import check_repository, describe_push, push
    from whisper_aut.loading import export_run

    if options.dry_run and not options.push:
        raise UserError("--dry-run shows what --push would upload. Give --push ORG/NAME too.")
    if options.push:  # before an export that may take minutes
        check_repository(options.push)
    card = {"name": options.push, "licence": options.licence}
    run, out = Path(options.run_or_checkpoint), Path(options.out)
    mixed = {"interpolate": options.interpolate, "decoder": options.decoder}
    export_run(run, out, options.format, options.dtype, **mixed, **card)
    next_step = NEXT_STEPS[options.format].format(out=out)
    console.print(f"Wrote {out}, with a card in README.md. {next_step}", highlight=False)
    if options.push and options.dry_run:
        console.print(describe_push(out, options.push, private=options.private), highlight=False)
    elif options.push:
        url = push(out, options.push, private=options.private)
        console.print(f"Pushed to {url}", highlight=False)


def card(options: argparse.Namespace, console: Console) -> None:
    """Add scores of later probe runs, and an audit, to the model card of an export."""
    from dataclasses import replace

    from whisper_aut.export.card import update_card
    from whisper_aut.probes.results import Scores
    from whisper_aut.probes.suite import compare
    from whisper_aut.report.leaderboard import join_scores
    from whisper_aut.utils import read_json

    if not options.scores and not options.audit:
        raise UserError("Give files of scores, --audit, or both.")
    files = [path / "scores.json" if path.is_dir() else path for path in map(Path, options.scores)]
    stored = [one.against for file in files for one in Scores.load(file).comparisons]
    joined = []
    for scores, warnings in join_scores(files).values():
        bases = dict.fromkeys(options.against or stored)
        bases = [name for name in bases if name in scores.encoders]
        compared = compare(scores, bases) if bases else ()
        joined.append(json.loads(replace(scores, comparisons=tuple(compared)).to_json()))
        for warning in warnings:
            console.print(f"Note: {warning}", highlight=False)
    audit = read_json(Path(options.audit)) if options.audit else None
    path = update_card(Path(options.export), joined, encoder=options.encoder, audit=audit)
    console.print(f"Wrote {path}", highlight=False)


def interpolate(options: argparse.Namespace, console: Console) -> None:
    """Probe encoders between the pretrained and the trained one, and choose one on validation."""
    from whisper_aut.inference.encoder import device_name, load_encoder
    from whisper_aut.loading import export_run, load_tasks
    from whisper_aut.probes.suite import run_suite
    from whisper_aut.report.plots import plot_interpolation
    from whisper_aut.utils import write_json

    run, out, device = Path(options.run_or_checkpoint), Path(options.out), options.device
    tasks, device = load_tasks(options.tasks, Path("conf")), device_name(device)
    out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict[float, tuple[float, float]]] = {}  # validation and test score
    for share in sorted({*options.fractions}):
        with TemporaryDirectory(dir=out) as folder:
            export_run(run, Path(folder), "encoder", interpolate=share)
            encoder = load_encoder(folder, device=device)
        found = run_suite(
            {f"{share:g}": encoder},
            tasks,
            root=options.root,
            cache=out / "embeddings",
            kind=options.kind or "",
            device=device,
        )
        for entry in found.entries:
            valid = [score for score in entry.valid_scores if score is not None]
            if not valid:
                raise UserError(f"{entry.task} chooses nothing on validation clips. Leave it out.")
            scores = (fmean(valid), entry.mean)
            curves.setdefault(entry.task, {})[share] = scores
            row = f"{share:g} {entry.task}: validation {scores[0]:.1%}, test {scores[1]:.1%}"
            console.print(row, highlight=False)
    means = {x: fmean(curve[x][0] for curve in curves.values()) for x in options.fractions}
    best = max(sorted(means), key=lambda share: means[share])
    write_json(out / "interpolation.json", {"best": best, "scores": curves})
    plot = plot_interpolation(curves, best, out / "interpolation.png")
    console.print(
        f"Best mean on validation: {best:g}. Curves are in {plot}. Export it: whisper-aut export "
        f"{run} --out DIR --interpolate {best:g}",
        highlight=False,
    )


def chat(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.inference.chat import answer
    from whisper_aut.loading import open_run

    module = open_run(Path(options.run_or_checkpoint), device=options.device, dtype=options.dtype)
    for question in [options.question] if options.question else _read_questions(console):
        text = answer(module, Path(options.audio), question, max_new_tokens=options.max_new_tokens)
        console.print(text, highlight=False)


def _read_questions(console: Console) -> Iterator[str]:
    """Yield the questions that the user types, up to an empty line or end of file."""
    with suppress(EOFError):
        while question := console.input("[bold]?[/] ").strip():
            yield question


def evaluate(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.data.targets import missing_token_warning
    from whisper_aut.inference.chat import evaluate
    from whisper_aut.loading import open_generator

    out = Path(options.out) if options.out else None
    module = open_generator(options.model, device=options.device, dtype=options.dtype)
    result = evaluate(
        module,
        options.shards,
        tasks=options.tasks,
        domain=options.domain,
        limit=options.limit,
        batch_seconds=options.batch_seconds,
        long_clips=options.long_clips,
        out=out,
        max_new_tokens=options.max_new_tokens,
    )
    console.print(f"{result.clips} clips" + (f", answers in {out}" if out else ""))
    for name, value in sorted(result.metrics.items()):
        console.print(f"  {name:<28} {value:.4f}", highlight=False)
    if result.cut:
        console.print(f"  {result.cut} texts were cut at {options.max_new_tokens} tokens")
    if result.unknown_languages:
        console.print(f"  {missing_token_warning(result.unknown_languages)}")
    for source, reasons in result.skipped.items():
        console.print(f"  skipped in {source}: {reasons}", highlight=False)


def _add_run(command: argparse.ArgumentParser) -> None:
    run = "runs/NAME/latest, another run directory, or a checkpoint in one"
    command.add_argument("run_or_checkpoint", metavar="RUN_OR_CKPT", help=run)


def add_parsers(commands: Commands) -> None:
    command = commands.add_parser(
        "export", help="export a trained model to a directory that other libraries can load"
    )
    _add_run(command)
    add = command.add_argument
    add("--out", required=True, help="output directory; replaces an earlier export")
    formats = "format, see docs/export.md (default: encoder)"
    add_choice(command, "--format", tuple(NEXT_STEPS), formats, "encoder")
    add_choice(command, "--dtype", DTYPES, "precision of the weights (default: fp32)", "fp32")
    trained = "fraction of trained weights; the rest are pretrained (default: model.interpolate)"
    add("--interpolate", type=fraction, metavar="FRACTION", help=trained)
    decoder = "with --format whisper: the run's decoder or the pretrained one (default: trained)"
    add_choice(command, "--decoder", ("trained", "pretrained"), decoder, "trained")
    licence = "licence of the weights for the card, by its hub id: apache-2.0, cc-by-nc-4.0, …"
    add("--licence", default="unknown", metavar="ID", help=licence)
    push = "upload the directory to this repository on the Hugging Face hub"
    add("--push", metavar="ORG/NAME", default="", help=push)
    add("--private", action="store_true", help="make a repository that --push creates private")
    dry_run = "export, list what --push would upload, and upload nothing"
    add("--dry-run", action="store_true", help=dry_run)
    command.set_defaults(run=export)

    command = commands.add_parser("card", help="add scores of `probe` to the card of an export")
    add = command.add_argument
    add("export", help="directory of the export")
    scores = "folders with a scores.json, or such files; they replace the scores on the card"
    add("scores", nargs="*", metavar="SCORES", help=scores)
    against = "encoder in the scores to compare with; may be repeated (default: as in the scores)"
    add("--against", action="append", default=[], metavar="NAME", help=against)
    encoder = "name of the export's encoder in the scores (default: the title of the card)"
    add("--encoder", default="", metavar="NAME", help=encoder)
    add("--audit", default="", metavar="FILE", help="audit.json of `whisper-aut data audit`")
    command.set_defaults(run=card)

    command = commands.add_parser(
        "interpolate", help="probe mixtures of trained and pretrained weights, and choose the best"
    )
    _add_run(command)
    add = command.add_argument
    tasks = "tasks in conf/probe_tasks, suites in conf/suites, or paths of YAML files"
    add("--tasks", nargs="+", required=True, metavar="TASK", help=tasks)
    fractions = "fractions of the trained weights (default: 0 0.25 0.5 0.75 1)"
    default = [0.0, 0.25, 0.5, 0.75, 1.0]
    add("--fractions", type=fraction, nargs="+", default=default, metavar="X", help=fractions)
    add("--root", default="data", help="replaces {root} in the tasks (default: data)")
    add_choice(command, "--kind", PROBE_KINDS, "kind of probe (default: that of each task)")
    add("--device", default="auto", help="cpu, cuda:1, …; auto: a GPU if there is one (default)")
    add("--out", required=True, help="folder for interpolation.json and interpolation.png")
    command.set_defaults(run=interpolate)

    command = commands.add_parser(
        "chat", help="ask a trained run about an audio file (runs with decoder=causal_lm)"
    )
    _add_run(command)
    add = command.add_argument
    add("audio", help="an audio file of at most 30 s")
    question = "the question; without it, questions are read from the terminal"
    add("question", nargs="?", default="", help=question)
    tokens = "maximum length of an answer in tokens (default: 64)"
    add("--max-new-tokens", type=whole_number(1), default=64, help=tokens)
    add_device_options(command, batches=False)
    command.set_defaults(run=chat)

    command = commands.add_parser(
        "evaluate", help="score the texts that a trained model or a Whisper generates for shards"
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="a run, its checkpoint, or a Whisper (NAME[@none|@30s])")
    add("shards", nargs="+", help="folders or URLs of shards")
    tasks = "only these instruction tasks, by their names in conf/instructions (decoder=causal_lm)"
    add("--tasks", nargs="+", default=[], help=tasks)
    domain = "domain of clips without one: speech, sound, music, …"
    add("--domain", default="", help=domain)
    long_clips = "what to do with clips above 30 s, as data.long_clips (default: trim)"
    add_choice(command, "--long-clips", ("trim", "crop", "chunk", "skip"), long_clips, "trim")
    add("--limit", type=whole_number(1), metavar="N", help="only the first N clips of each folder")
    tokens = "at most N tokens of each text (default: 256)"
    add("--max-new-tokens", type=whole_number(1), default=256, metavar="N", help=tokens)
    add_device_options(command)
    add("--out", default="", help="write answers and references to this JSON Lines file")
    command.set_defaults(run=evaluate)
