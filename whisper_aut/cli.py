"""The one console script: `whisper-aut COMMAND …`.

In: a command line. Out: an exit status: 0 done, 1 a user's mistake (said in one paragraph, never a traceback), 130 interrupted by
Ctrl-C, 75 preempted by SIGTERM or SIGUSR1 with everything saved (start it again with `--resume auto`).
The commands themselves are in `commands/`, a file per stage of the picture.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from whisper_aut import __version__
from whisper_aut.commands import Parser, data, encoder, experiment, export, probe, train
from whisper_aut.errors import Interrupted, Preempted, UserError

FILE_COLUMNS = 160  # of tables that go into a file or a pipe, which no window bounds
NOTHING_TRAINED = "nothing was being trained; finished parts are kept."
EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED = (
    1,
    75,
    130,
)  # 75: EX_TEMPFAIL of sysexits.h, "try again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    options = _parse(arguments)
    console, errors = _console(), _console(stderr=True)
    _quieten()
    try:
        options.run(options, console)
    except UserError as error:
        errors.print(Text.assemble(("Error:", "bold red"), f" {error}"))
        return EXIT_USER_ERROR
    except OSError as error:  # a file that a command was told to read or write
        if not error.filename:
            raise
        errors.print(Text.assemble(("Error:", "bold red"), f" {error.filename}: {error.strerror}."))
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt) as stop:
        if _rank():  # the first rank speaks for all; a launcher takes a failed rank as a reason to kill the others
            return 0
        errors.print(Text.assemble(("Interrupted:", "bold"), f" {str(stop) or NOTHING_TRAINED}"))
        return EXIT_PREEMPTED if isinstance(stop, Preempted) else EXIT_INTERRUPTED
    return 0


def _console(stderr: bool = False) -> Console:
    # Names may hold brackets, which are no markup here, and `:-1`, which is no thumb.
    console = Console(stderr=stderr, soft_wrap=True, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_COLUMNS
    return console


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option; overrides may also follow one.
    if (
        rest
        and hasattr(options, "overrides")
        and all("=" in item and not item.startswith("-") for item in rest)
    ):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="whisper-aut", description="Train universal audio encoders from Whisper.")
    parser.add_argument("--version", action="version", version=f"whisper-aut {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for stage in (data, train, export, encoder, probe, experiment):
        stage.add_parsers(commands)
    return parser


def _rank() -> int:
    """Return this process's rank as a launcher told it: torchrun, Slurm, or Lightning for the ranks that it starts."""
    return int(
        next(
            (
                os.environ[name]
                for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")
                if name in os.environ
            ),
            0,
        )
    )


def _quieten() -> None:
    """Keep libraries from writing over our own lines; their warnings still show, but for those that ask nothing of anyone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",  # between Lightning and PyTorch
        ".*IterableDataset.* has .*__len__.* defined",  # ours is right about its length with any number of workers
        "Experiment logs directory .* exists and is not empty",  # `RunDirectory.metrics_aside` has put them aside
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
