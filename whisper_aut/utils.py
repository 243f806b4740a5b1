"""Small helpers that every package uses: atomic writes, JSON, locks, progress, a parallel map."""

import hashlib
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import filelock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whisper_aut.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
# A dead node may hold its lock on NFS for 90 s, and workers of a killed process for a moment.
BUSY_SECONDS = 120.0


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` when the block succeeds.

    A block that fails leaves `path` as it was and removes the temporary file.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def without_shared_folders(paths: Sequence[str]) -> list[str]:
    """Return paths or URLs without the leading folders that all of them share.

    Examples:
        >>> without_shared_folders(["s3://b/data/us8k/train", "s3://b/data/gm/train/"])
        ['us8k/train', 'gm/train']
    """
    paths = [path.rstrip("/") for path in paths]
    shared = os.path.commonprefix(paths).rfind("/") + 1  # noqa: RUF071 — paths may be URLs
    return [path[shared:] for path in paths]


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, see `atomic_path`."""
    with atomic_path(path) as partial:
        # File names may contain bytes that are not UTF-8. JSON reads their escapes back.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, see `atomic_path`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON of unknown origin; `options` are those of `json.loads`.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object. With a `default`, return that instead of raising an error.

    Raises:
        UserError: the file is missing, is not valid JSON, or does not hold an object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        problem = ""
    except OSError as error:
        content, problem = None, f"Cannot read {path}: {error.strerror}."
    except ValueError as error:
        content, problem = None, f"{path} is not valid JSON: {error}."
    if isinstance(content, dict):
        return content
    if default is not None:
        return default
    raise UserError(problem or f"{path} must hold a JSON object, not {type(content).__name__}.")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def file_lock(path: Path, busy: str = "") -> Iterator[None]:
    """Hold an exclusive lock for `path`, across all machines that share the folder.

    The process that gets the lock first creates `path`; the others wait and then find it there. A
    process that dies releases its lock. If the lock file cannot be written, the block runs without
    a lock. With `busy`, it also does so on a file system that does not support locks.

    Raises:
        UserError: the file system does not support locks; or, with the message `busy`, another
            process has held the lock for `BUSY_SECONDS`.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    # No soft lock, which is a file that a process that dies leaves behind.
    lock = filelock.FileLock(lock_path, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_path.open("a").close()
    except OSError:
        yield  # without a lock: creating `path` in this folder gives a clearer error
        return
    try:
        lock.acquire(timeout=BUSY_SECONDS if busy else -1)
    except filelock.Timeout:
        raise UserError(busy) from None
    except OSError as error:
        if not busy:
            raise UserError(
                f"The file system of {path.parent} does not support file locks ({error.strerror})"
                f", which keep several processes from creating {path.name} at once. Use another "
                "folder, or mount the file system with locks (for Lustre: -o flock)."
            ) from None
    try:
        yield
    finally:
        lock.release()


def progress_bar(visible: bool = True, *, text: str = "") -> Progress:
    """Return a progress bar on stderr that disappears when it is done.

    Nothing is drawn unless it is `visible` and stderr is a terminal. `text` is an extra column,
    such as `"{task.fields[loss]}"`.
    """
    description = TextColumn("{task.description}", markup=False)
    columns = [description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns += [TextColumn(text, markup=False)] if text else []
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, disable=not (visible and console.is_terminal), transient=True
    )


def parallel_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    chunk_size: int = 1,
    spawn: bool = False,
    on_crash: str = "Run again with --workers 1 to find the file that crashes the decoder.",
) -> Generator[Result]:
    """Yield `function(item)` for each item in order, computed in worker processes.

    At most `2 * workers` chunks are in flight, so `items` may be a long generator. Ctrl-C is left
    to this process, and workers exit when this process is killed.

    Args:
        function: a picklable function. Each worker gets it once, so `functools.partial` may bind
            large shared arguments.
        items: picklable items.
        workers: number of processes; 1 computes in this process.
        chunk_size: number of items that are sent to a worker at once; more is faster for calls of
            less than a few milliseconds.
        spawn: start clean processes. The default forks on Linux, which starts faster and shares
            memory, but is unsafe if `function` takes a lock that a thread here may hold.
        on_crash: what to do when a worker dies, for the error message.

    Raises:
        UserError: a worker process died.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    context = get_context("spawn" if spawn or sys.platform != "linux" else "fork")
    pending: deque[Future[list[Result]]] = deque()
    iterator = iter(items)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (function,))
    try:
        while chunk := list(islice(iterator, chunk_size)):
            pending.append(pool.submit(_call_function, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"A worker process died, for lack of memory or in a decoder. {on_crash}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_function: Callable[[Any], Any] | None = None  # of this worker process


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Keep the function, let the parent handle Ctrl-C, and exit when the parent is killed."""
    global _worker_function
    _worker_function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent() -> None:
        parent = parent_process()
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _call_function(chunk: list[Any]) -> list[Any]:
    assert _worker_function
    return [_worker_function(item) for item in chunk]
