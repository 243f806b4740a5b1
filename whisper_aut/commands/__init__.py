"""The commands of `whisper-aut`, one file per stage of the picture; `cli` gathers them.

Each file ends with `add_parsers`, which names its commands and their options. What a command needs is imported when it runs, so that
`--help` answers at once.
"""

import argparse


def add_padding(command: argparse.ArgumentParser) -> None:
    """Add the option of every command that runs an encoder."""
    what = "encode clips at their own length or padded; by default as the encoder was trained"
    command.add_argument("--padding", choices=("none", "30s"), help=what)
