"""The commands of `whisper-aut` and the options that they share.

Each module has an `add_parsers` that adds its commands to the parser of `cli`. Commands import
their dependencies when they run, which keeps `--help` fast.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from whisper_aut.errors import nearest

Commands = argparse._SubParsersAction  # what `add_subparsers` returns; argparse has no public name

# Copies of values from modules that import PyTorch. A test checks that they agree.
PADDINGS = ("none", "30s")
POOLINGS = ("mean", "mean_std")
DTYPES = ("fp32", "bf16", "fp16")
PROBE_KINDS = (
    *("linear", "knn", "mlp", "layers", "attention", "frame", "retrieval", "transcription"),
)
BATCH_SECONDS = 160.0


class Parser(argparse.ArgumentParser):
    """Adds a hint to errors where an option with several values has consumed the positionals."""

    def error(self, message: str) -> NoReturn:
        actions = self._actions
        greedy = [a.option_strings[0] for a in actions if a.option_strings and a.nargs == "+"]
        first = [str(a.metavar or a.dest.upper()) for a in actions if not a.option_strings]
        blamed = [option for option in greedy if f"argument {option}" in message]
        if first and (blamed or (greedy and "arguments are required" in message)):
            options = blamed or greedy
            message += (
                f". {' and '.join(options)} take{'s' * (len(options) == 1)} all words that follow. "
                f"Write {self.prog} {' '.join(first)} {options[0]} …"
            )
        super().error(message)


def add_config(command: argparse.ArgumentParser, example: str, *, optional: bool = False) -> None:
    """Add the arguments for a config and its overrides."""
    config = "a YAML file, or the name of a config in the package, such as aut_tiny"
    if optional:
        config += "; without it, only the machine is checked"
        command.add_argument("config", nargs="?", default="", help=config)
    else:
        command.add_argument("config", help=config)
    command.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. {example}")


def add_encoder_options(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that run an encoder."""
    padding = (
        "padding mode of encoders whose name has no @none or @30s: none runs clips at their own "
        "length, 30s pads them to 30 s (default: as the encoder was trained; 30s for a released "
        "Whisper)"
    )
    add_choice(command, "--padding", PADDINGS, padding)
    add_device_options(command)


def add_device_options(
    command: argparse.ArgumentParser, *, dtype: str | None = "fp32", batches: bool = True
) -> None:
    """Add the options for device, precision and batch size.

    Args:
        command: the parser.
        dtype: the default precision; None for that of the index that the command reads.
        batches: add `--batch-seconds`.
    """
    device = "cpu, cuda, cuda:1, …; auto uses a GPU if there is one (default: auto)"
    command.add_argument("--device", default="auto", help=device)
    default = f"default: {dtype}" if dtype else "default: as the index was made"
    add_choice(command, "--dtype", DTYPES, f"precision of the models ({default})", dtype)
    if batches:
        command.add_argument(
            "--batch-seconds",
            type=positive_number,
            default=BATCH_SECONDS,
            metavar="SECONDS",
            help="audio per batch, including padding; lower values need less memory (default: 160)",
        )


def add_pooling_options(command: argparse.ArgumentParser, curve: bool = False) -> None:
    """Add the options that choose pooling and layers; with `curve`, `--layers all` is one."""
    pooling = "mean, or mean and standard deviation, over the frames of a clip (default: mean)"
    add_choice(command, "--pooling", POOLINGS, pooling, "mean")
    command.add_argument(
        "--layers",
        type=lambda text: text if curve and text == "all" else whole_number(0)(text),
        nargs="+",
        default=[],
        metavar="N",
        help="use these layers instead of the output; 0 is the input of the first layer"
        + "; all scores each layer of ENCODER, and a learned sum of them, in addition" * curve,
    )


def add_workers(command: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    workers = "number of processes (default: one per core)"
    command.add_argument("--workers", type=whole_number(1), help=workers)


def add_choice(
    command: argparse.ArgumentParser,
    flag: str,
    names: Sequence[str],
    help: str,
    default: str | None = None,
) -> None:
    """Add an option that takes one of `names`, and suggests the nearest for an unknown value."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(names)}.{nearest(text, names)}"
            )
        return text

    command.add_argument(flag, type=parse, choices=names, default=default, help=help)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse type that accepts integers from `least` to `most`, inclusive."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is below {least}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"{number} is above {most}")
        return number

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def positive_number(text: str) -> float:
    """Parse a finite number above 0, as an argparse type."""
    if not 0 < (number := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def fraction(text: str) -> float:
    """Parse a number from 0 to 1, as an argparse type."""
    if not 0 <= (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number
