"""The commands of `whisper-aut` and the options that they share.

Each module has an `add_parsers` that adds its commands to the parser of `cli`. Commands import
their dependencies when they run, which keeps `--help` fast.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from whisper_aut.errors import nearest

# Copies of values from modules that import PyTorch. A test checks that they agree.
PADDINGS = ("none", "30s")
POOLINGS = ("mean", "mean_std")
DTYPES = ("fp32", "bf16", "fp16")
PROBE_KINDS = (
    "linear",
    "knn",
    "mlp",
    "layers",
    "attention",
    "frame",
    "retrieval",
    "transcription",
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
            taking = blamed or greedy
            message += (
                f". {' and '.join(taking)} take{'s' * (len(taking) == 1)} every word that follows: "
                f"write {self.prog} {' '.join(first)} {taking[0]} …"
            )
        super().error(message)


def add_encoder_options(command: argparse.ArgumentParser, *, batches: bool = True) -> None:
    """Add the options of commands that run an encoder.

    Args:
        command: the parser.
        batches: add `--batch-seconds`.
    """
    add_choice(
        command,
        "--padding",
        PADDINGS,
        "padding mode of encoders whose name has no @none or @30s: none runs clips at their own "
        "length, 30s pads them to 30 s (default: as the encoder was trained; 30s for a released "
        "Whisper)",
    )
    add_device_options(command, batches=batches)


def add_device_options(
    command: argparse.ArgumentParser, *, dtype: str | None = "fp32", batches: bool = True
) -> None:
    """Add the options for device, precision and batch size.

    Args:
        command: the parser.
        dtype: the default precision; None for that of the index that the command reads.
        batches: add `--batch-seconds`.
    """
    command.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, …; auto uses a GPU if there is one (default: auto)",
    )
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


def add_pooling_options(command: argparse.ArgumentParser) -> None:
    """Add the options that choose pooling and layers."""
    add_choice(
        command,
        "--pooling",
        POOLINGS,
        "mean, or mean and standard deviation, over the frames of a clip (default: mean)",
        "mean",
    )
    command.add_argument(
        "--layers",
        type=whole_number(0),
        nargs="+",
        default=[],
        metavar="N",
        help="use these layers instead of the output; 0 is the input of the first layer",
    )


def add_workers(command: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    command.add_argument(
        "--workers", type=whole_number(1), help="number of processes (default: one per core)"
    )


def add_choice(
    command: argparse.ArgumentParser,
    flag: str,
    names: Sequence[str],
    help: str,
    default: str | None = None,
) -> None:
    """Add an option that takes one of `names`, and suggests the nearest for an unknown value."""
    command.add_argument(flag, type=one_of(names), choices=names, default=default, help=help)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return an argparse type that accepts one of `names`."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(names)}.{nearest(text, names)}"
            )
        return text

    return parse


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse type that accepts integers from `least` to `most`, inclusive."""
    bounds = f"from {least} up" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{number} is not a whole number {bounds}")
        return number

    return parse


def positive_number(text: str) -> float:
    """Parse a finite number above 0, as an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
