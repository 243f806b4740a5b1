"""Lets several processes that need the same thing wait for the first of them to make it.

In: the place of what is made. Out: a context in which one process at a time is, on all machines that share the folder. Next: corpora,
scratch models and language models are made in it, by whichever rank of a job comes first.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whisper_aut.errors import UserError


@contextmanager
def file_lock(place: Path) -> Iterator[None]:
    """Hold the turn for `place`. Who comes second finds it made; a process that dies gives its turn back.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f".{place.name}.lock").open("a")
    except OSError:  # nothing can be written there; what is made says so better
        yield
        return
    with lock:  # closing it gives the turn back
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"The file system of {place.parent} has no file locks ({error.strerror}), by which several processes take turns in "
                f"making {place.name}. Use another one, or have it mounted with them (for Lustre: -o flock)."
            ) from None
        yield
