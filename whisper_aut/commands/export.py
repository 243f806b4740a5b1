"""`whisper-aut export`, `chat` and `evaluate`: use a trained model."""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from whisper_aut.commands import DTYPES, add_choice, add_device_options, whole_number
from whisper_aut.data.annotation import DOMAINS

SWAP = "Load it into a model: whisper_aut.export.towers.swap_tower(model, '{out}')"
NEXT_STEPS = {
    "encoder": "Load it: whisper_aut.load_encoder('{out}')",
    "whisper": "Load it: transformers.WhisperForConditionalGeneration.from_pretrained('{out}')",
    "qwen2-audio": SWAP,
    "qwen2.5-omni": SWAP,
    "voxtral": SWAP,
    "onnx": "Load it: onnxruntime.InferenceSession('{out}/encoder.onnx')",
}


def export(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.pipeline import export_run

    out = export_run(
        Path(options.run_or_checkpoint),
        Path(options.out),
        options.format,
        options.dtype,
        name=options.push,
        licence=options.licence,
    )
    console.print(
        f"Wrote {out}, with a card in README.md. {NEXT_STEPS[options.format].format(out=out)}",
        highlight=False,
    )
    if options.push:
        from whisper_aut.export.hf import push

        console.print(
            f"Pushed to {push(out, options.push, private=options.private)}",
            highlight=False,
        )


def chat(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.inference.chat import answer
    from whisper_aut.pipeline import open_run

    module = open_run(Path(options.run_or_checkpoint), device=options.device, dtype=options.dtype)
    for question in [options.question] if options.question else _asked(console):
        text = answer(module, Path(options.audio), question, max_new_tokens=options.max_new_tokens)
        console.print(text, highlight=False)


def _asked(console: Console) -> Iterator[str]:
    """Yield the questions that the user types, up to an empty line or end of file."""
    with suppress(EOFError):
        while question := console.input("[bold]?[/] ").strip():
            yield question


def evaluate(options: argparse.Namespace, console: Console) -> None:
    from whisper_aut.data.targets import missing_token_warning
    from whisper_aut.inference.chat import evaluate
    from whisper_aut.pipeline import open_run

    out = Path(options.out) if options.out else None
    module = open_run(Path(options.run_or_checkpoint), device=options.device, dtype=options.dtype)
    result = evaluate(
        module,
        options.shards,
        tasks=options.tasks,
        domain=options.domain or "",
        limit=options.limit,
        batch_seconds=options.batch_seconds,
        out=out,
    )
    console.print(f"{result.clips} clips" + (f", answers in {out}" if out else ""))
    for name, value in sorted(result.metrics.items()):
        console.print(f"  {name:<28} {value:.4f}", highlight=False)
    if result.unknown_languages:
        console.print(f"  {missing_token_warning(result.unknown_languages)}")
    for source, reasons in result.skipped.items():
        console.print(f"  skipped in {source}: {reasons}", highlight=False)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "run_or_checkpoint",
        metavar="RUN_OR_CKPT",
        help="runs/NAME/latest, another run directory, or a checkpoint in one",
    )


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "export", help="export a trained model to a directory that other libraries can load"
    )
    _add_run(command)
    command.add_argument(
        "--out", required=True, help="output directory; replaces an earlier export"
    )
    formats = tuple(NEXT_STEPS)
    add_choice(
        command, "--format", formats, "format, see docs/export.md (default: encoder)", "encoder"
    )
    add_choice(command, "--dtype", DTYPES, "precision of the weights (default: fp32)", "fp32")
    command.add_argument(
        "--licence",
        default="unknown",
        metavar="ID",
        help="licence of the weights for the card, by its hub id: apache-2.0, cc-by-nc-4.0, …",
    )
    command.add_argument(
        "--push",
        metavar="ORG/NAME",
        default="",
        help="upload the directory to this repository on the Hugging Face hub",
    )
    command.add_argument(
        "--private", action="store_true", help="make a repository that --push creates private"
    )
    command.set_defaults(run=export)

    command = commands.add_parser(
        "chat", help="ask a trained run about an audio file (runs with decoder=causal_lm)"
    )
    _add_run(command)
    command.add_argument("audio", help="an audio file of at most 30 s")
    command.add_argument(
        "question",
        nargs="?",
        default="",
        help="the question; without it, questions are read from the terminal",
    )
    command.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=64,
        help="maximum length of an answer in tokens (default: 64)",
    )
    add_device_options(command, batches=False)
    command.set_defaults(run=chat)

    command = commands.add_parser(
        "evaluate", help="score the texts that a trained model generates for shards"
    )
    _add_run(command)
    command.add_argument("shards", nargs="+", help="folders or URLs of shards")
    command.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        help="only these tasks, by their names in conf/instructions",
    )
    add_choice(command, "--domain", DOMAINS, "domain of clips that do not have their own")
    command.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="only the first N clips of each folder"
    )
    add_device_options(command)
    command.add_argument(
        "--out", default="", help="write answers and references to this JSON Lines file"
    )
    command.set_defaults(run=evaluate)
