"""A file lock that lets one process build a corpus or a model while the others wait for it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whisper_aut.errors import UserError


@contextmanager
def file_lock(place: Path) -> Iterator[None]:
    """Hold an exclusive lock for `place`, across all machines that share the folder.

    The process that gets the lock first creates `place`; those that wait then find it there. A
    process that dies releases its lock. If the lock file cannot be written, the block runs without
    a lock.

    Args:
        place: the path to create. The lock file is `.NAME.lock` in the same folder.

    Raises:
        UserError: the file system does not support locks.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f".{place.name}.lock").open("a")
    except OSError:
        # The folder is not writable. Creating `place` in it gives a clearer error.
        yield
        return
    with lock:  # closing the file releases the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"The file system of {place.parent} has no file locks ({error.strerror}), by which "
                f"several processes take turns in making {place.name}. Use another one, or have it "
                "mounted with them (for Lustre: -o flock)."
            ) from None
        yield
