"""The commands of `whisper-aut`, one file per stage of the picture; `cli` gathers them.

Each file ends with `add_parsers`, which names its commands and their options. What a command needs is imported when it runs, so that
`--help` answers at once.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from whisper_aut.errors import nearest

# The keys of registries whose modules import PyTorch; a test holds them together.
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
    """Says the right order where an option of several words has taken the words that come first."""

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
    """Add the options of every command that runs an encoder."""
    add_choice(
        command,
        "--padding",
        PADDINGS,
        "of encoders that are named without @none or @30s: run clips at their own length, or "
        "padded to 30 s; by default as each was trained, a released Whisper at 30s",
    )
    add_device_options(command, batches=batches)


def add_device_options(
    command: argparse.ArgumentParser, *, dtype: str | None = "fp32", batches: bool = True
) -> None:
    """Add where and in which precision models run, and with `batches` how much they run at once.

    Args:
        dtype: the default; None for that of the index that the command reads.
    """
    command.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one (default: auto)",
    )
    default = f"default: {dtype}" if dtype else "default: as the index was made"
    add_choice(command, "--dtype", DTYPES, f"precision that models run in ({default})", dtype)
    if batches:
        command.add_argument(
            "--batch-seconds",
            type=positive_number,
            default=BATCH_SECONDS,
            metavar="SECONDS",
            help="audio that runs at once, padding included; less takes less memory (default: 160)",
        )


def add_pooling_options(command: argparse.ArgumentParser) -> None:
    """Add what is kept of a clip's frames."""
    add_choice(
        command,
        "--pooling",
        POOLINGS,
        "mean, or mean and standard deviation, over a clip's own frames (default: mean)",
        "mean",
    )
    command.add_argument(
        "--layers",
        type=whole_number(0),
        nargs="+",
        default=[],
        metavar="N",
        help="take these layers in place of the output; 0 is what enters the first",
    )


def add_workers(command: argparse.ArgumentParser) -> None:
    """Add how many processes a command may use."""
    command.add_argument(
        "--workers", type=whole_number(1), help="processes at once; by default one per core"
    )


def add_choice(
    command: argparse.ArgumentParser,
    flag: str,
    names: Sequence[str],
    help: str,
    default: str | None = None,
) -> None:
    """Add an option that takes one of some names, and suggests the nearest for a word that is none."""
    command.add_argument(flag, type=one_of(names), choices=names, default=default, help=help)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return an argparse type: one of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(names)}.{nearest(text, names)}"
            )
        return text

    return parse


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return what argparse takes for a type: whole numbers between two bounds, both allowed."""
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
    """An argparse type: numbers above 0."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
