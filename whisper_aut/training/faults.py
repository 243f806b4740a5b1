"""What the machine can do to a run: no compiler, no room on the disk, no right to write, no memory, a rank that is gone.

In: the size of the model, a run directory, an exception out of the Trainer. Out: `UserError`s that say what happened and how to go on.
Next: `training.train` checks before the first step and translates behind the last.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import FULL_DISK, existing_parent, full_disk_message

BYTES_OF_STATE = 12  # float32 weight and two moments of a trained parameter
LOST_RANK = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|connection refused|timed out|timeout|peer|gloo|nccl|socket",
    re.I,
)
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def checkpoint_bytes(module: torch.nn.Module) -> int:
    """Return about what one checkpoint takes: weights and moments of what is trained, weights of what is stored beside."""
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return BYTES_OF_STATE * trained


def check_room(folder: Path, one_checkpoint: int, kept: int) -> str:
    """Check that a run can write where it is to write; return a warning where room may run out later, or nothing.

    Args:
        folder: the run directory.
        one_checkpoint: bytes.
        kept: checkpoints that stay at a time; one more is being written.

    Raises:
        UserError: the folder cannot be written, or two checkpoints do not fit.
    """
    place = existing_parent(folder)
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot write to {place}: {error.strerror}. Set runs=FOLDER to write elsewhere."
        ) from None
    free, size = shutil.disk_usage(place).free, one_checkpoint / 2**30
    if free < 2 * one_checkpoint:
        raise UserError(
            f"{place} has {free / 2**30:.1f} GiB free, and a checkpoint takes about {size:.1f} GiB; the one before stays until the "
            "next is whole, so twice that is needed. Make room, or set runs=FOLDER to write elsewhere."
        )
    if free < (kept + 1) * one_checkpoint:
        return (
            f"{place} has {free / 2**30:.1f} GiB free, and {kept + 1} checkpoints of {size:.1f} GiB may lie there at a time: "
            "lower trainer.keep_checkpoints or make room."
        )
    return ""


def check_accelerator(accelerator: str) -> None:
    """Check that a device of the kind that a config asks for is there.

    Raises:
        UserError: none is.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(accelerator, True):
        raise UserError(
            f"hardware.accelerator={accelerator}, and PyTorch sees no such device here. hardware=cpu runs on the CPU, hardware=auto on "
            "what is there; whisper-aut doctor looks at drivers and devices."
        )


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None."""
    named = os.environ.get("CXX")
    return next(
        (
            path
            for name in (named, "c++", "g++", "clang++")
            if name and (path := shutil.which(name))
        ),
        None,
    )


def check_compilable(strategy: str) -> None:
    """Check that `model.compile` can be had.

    Raises:
        UserError: no compiler, or ZeRO-3, which fetches a layer's weights while the layer runs.
    """
    if "stage_3" in strategy:
        raise UserError(
            f"model.compile does not go with strategy.name={strategy}: compiled layers cannot fetch their weights."
        )
    if find_compiler() is None:
        raise UserError(
            "model.compile=true needs a C++ compiler, such as g++ or what CXX names. Install one, or leave it false."
        )


@contextmanager
def explained(folder: Path, ranks: int) -> Iterator[None]:
    """Turn what the machine did to a run into words.

    Raises:
        UserError: memory or disk ran out, another rank is gone, or Lightning cannot use the devices as the config wants.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(
            f"This machine cannot run the config as hardware and strategy ask: {' '.join(str(error).split())}"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"The GPU's memory is not enough: {str(error).splitlines()[0]}\n"
            "Lower data.batch_clips or data.batch_seconds and raise trainer.accumulate, set model.gradient_checkpointing=true, or pick a "
            "higher ZeRO stage."
        ) from None
    except OSError as error:
        if error.errno in FULL_DISK | UNWRITABLE:
            raise UserError(full_disk_message(Path(error.filename or folder), error)) from None
        raise
    except RuntimeError as error:
        if ranks > 1 and LOST_RANK.search(str(error)):
            raise UserError(
                f"Another rank is gone or does not answer: {str(error).splitlines()[0][:300]}\n"
                "The job ends here. The logs of the other ranks say why; --resume auto goes on from the last checkpoint."
            ) from error
        raise
