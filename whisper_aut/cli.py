"""The console script `whisper-aut COMMAND …`. The commands themselves are in `commands/`.

Exit status: 0 on success, 1 on a user error (printed as one paragraph without a traceback), 130
after Ctrl-C, and 75 after SIGTERM or SIGUSR1. After 75, progress is saved, and the same command
with `--resume auto` continues the run.
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from whisper_aut import __version__
from whisper_aut.commands import Parser, data, encoder, experiment, export, probe, train
from whisper_aut.errors import EXTRAS, Interrupted, MissingModule, Preempted, UserError

# Table width when the output goes to a file or a pipe, which has no window width.
FILE_COLUMNS = 160
# Control characters → their pictures in Unicode; line breaks and tabs stay.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
CONTROL_PICTURES |= dict.fromkeys(range(0x7F, 0xA0), 0x2421)
# 75 is EX_TEMPFAIL in sysexits.h: a temporary failure, try again later.
EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 75, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        arguments: the command line without the program name; `sys.argv` by default.
    """
    options = _parse(arguments)
    console, errors = _console(), _console(stderr=True)
    _silence_libraries()
    try:
        options.run(options, console)
    except UserError as error:
        _print_error(errors, f"{error}")
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not any(module in modules for modules in EXTRAS.values()):
            raise
        _print_error(errors, f"{MissingModule(module)}")
        return EXIT_USER_ERROR
    except OSError as error:
        # An error with a file name is a user error: a path that the command cannot read or write.
        if not error.filename:
            raise
        _print_error(errors, f"{error.filename}: {error.strerror}.")
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt) as stop:
        # Only rank 0 reports the interruption. The other ranks return 0, because a launcher kills
        # the remaining ranks when one exits with an error.
        if _rank():
            return 0
        reason = str(stop) or "no training was running. Finished parts are kept."
        errors.print(Text.assemble(("Interrupted:", "bold"), f" {reason}"))
        return EXIT_PREEMPTED if isinstance(stop, Preempted) else EXIT_INTERRUPTED
    return 0


def _print_error(console: Console, message: str) -> None:
    console.print(Text("Error:", "bold red"), message, highlight=False)


class _SafeConsole(Console):
    """Shows control characters of captions and file names, which would drive the terminal, and
    bytes of file names that are not UTF-8, which cannot be printed.
    """

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        text = text.encode(errors="backslashreplace").decode()
        return super().render_str(text.translate(CONTROL_PICTURES), *args, **options)


def _console(stderr: bool = False) -> Console:
    # Without markup and emoji, because names may contain brackets and codes such as `:-1:`.
    console = _SafeConsole(stderr=stderr, soft_wrap=True, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_COLUMNS
    return console


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option. Overrides may also come after one.
    overrides = all("=" in item and not item.startswith("-") for item in rest)
    if rest and overrides and hasattr(options, "overrides"):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="whisper-aut", description="Train universal audio encoders from Whisper.")
    parser.add_argument("--version", action="version", version=f"whisper-aut {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (data, train, export, encoder, probe, experiment):
        group.add_parsers(commands)
    return parser


def _rank() -> int:
    """Return the rank that torchrun, Slurm or Lightning has set for this process, else 0."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def _silence_libraries() -> None:
    """Silence library output that would mix with ours, and warnings that need no action."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    # DeepSpeed, which transformers imports, warns of a machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.funcName != "get_accelerator")
    for message in (
        # A deprecated PyTorch API that Lightning calls.
        ".*LeafSpec.*",
        # The length of our dataset is correct with any number of workers.
        ".*IterableDataset.* has .*__len__.* defined",
        # `RunDirectory.keep_metrics` has already renamed the earlier logs.
        "Experiment logs directory .* exists and is not empty",
        # A frozen encoder or language model, which stays in evaluation mode.
        "Found .* module.* in eval mode at the start of training",
        # The adapter's norm in mixed precision: slower than one dtype, with the same result.
        "Mismatch dtype between input and weight",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
