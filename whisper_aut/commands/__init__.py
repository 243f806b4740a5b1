"""The commands of `whisper-aut`, one file per stage of the picture; `cli` gathers them.

Each file ends with `add_parsers`, which names its commands and their options. What a command needs is imported when it runs, so that
`--help` answers at once.
"""

import argparse
from collections.abc import Callable


def add_padding(command: argparse.ArgumentParser) -> None:
    """Add the option of every command that runs an encoder."""
    what = "encode clips at their own length or padded; by default as the encoder was trained"
    command.add_argument("--padding", choices=("none", "30s"), help=what)


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
