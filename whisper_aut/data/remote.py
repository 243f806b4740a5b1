"""A file anywhere → an open binary stream that outlives the faults of a network.

In: a path, a URL of any file system that fsspec knows (`https://`, `s3://`, `gs://`), or `pipe:COMMAND`. Out: a stream that reads and
seeks. Next: `corpora.shards` reads indexes from it, `data.stream` tars. A read that fails is tried again after a pause that doubles,
at the byte that was reached: by a range request where the server takes them, else by reading anew and skipping.
"""

import io
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec

from whisper_aut.errors import UserError

PIPE = "pipe:"
MAX_PAUSE_SECONDS = 30.0
BUFFER_BYTES = 1 << 20
REQUEST_BYTES = 4 << 20  # of one range request while a tar is read through
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "remote", "https": "remote"}
TRY_AGAIN_LATER = (408, 425, 429)  # the only answers of the 400s that another attempt may change


@dataclass(frozen=True)
class ReadPolicy:
    """How patient reading is.

    Attributes:
        retries: attempts after the first, for each read anew: what was read before counts as progress.
        timeout_seconds: of silence, after which a connection is given up.
        pause_seconds: before the first further attempt; each next one waits twice as long, and a random part more.
        allow_pipe: run the commands of `pipe:` sources.
    """

    retries: int = 6
    timeout_seconds: float = 30.0
    pause_seconds: float = 0.5
    allow_pipe: bool = False


DEFAULT_POLICY = ReadPolicy()


def is_local(url: str) -> bool:
    return not url.startswith(PIPE) and fsspec.core.split_protocol(url)[0] in (
        None,
        "file",
        "local",
    )


def beside(root: str, name: str) -> str:
    """Return where a file of a folder lies; a `pipe:` root holds `{}` where the name goes."""
    if root.startswith(PIPE):
        return root.replace("{}", name) if "{}" in root else root
    return f"{root.rstrip('/')}/{name}"


@contextmanager
def open_stream(
    url: str, policy: ReadPolicy = DEFAULT_POLICY, *, whole: bool = True
) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Args:
        whole: it will be read from end to end, so read ahead; else only what is asked for is fetched.

    Raises:
        OSError: it is not there, or attempts ran out; also from reads of the stream.
        UserError: a pipe that is not allowed, or a protocol whose package is not installed.
    """
    if url.startswith(PIPE):
        with _piped(url, policy) as stream:
            yield stream
    elif is_local(url):
        with fsspec.open(url, "rb") as stream:
            yield cast(BinaryIO, stream)
    else:
        with io.BufferedReader(
            PatientReader(url, policy, whole=whole), BUFFER_BYTES if whole else 4096
        ) as stream:
            yield cast(BinaryIO, stream)


def read_file(url: str, policy: ReadPolicy = DEFAULT_POLICY, *, max_bytes: int) -> bytes:
    """Return a whole file of at most `max_bytes`.

    Raises:
        OSError: see `open_stream`; or it is larger.
    """
    with open_stream(url, policy) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(f"{url} is larger than {max_bytes} bytes")
    return data


class PatientReader(io.RawIOBase):
    """A remote file that is opened again, where it was, whenever a read fails."""

    def __init__(self, url: str, policy: ReadPolicy, *, whole: bool = True):
        self.url, self.policy, self.whole = url, policy, whole
        self._position = 0
        self._file: Any = None
        self._size: int | None = None  # where the server says it
        self._ranges = True  # until the server turns out to know none
        self._patiently(self._reopen)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise io.UnsupportedOperation(f"{self.url} does not say how long it is")
        self._position = max(0, (0, self._position, self._size or 0)[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._patiently(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._reopen()
        file: Any = self._file
        if self._ranges:
            file.seek(self._position)
        else:
            file = self._skip(file)
        data = file.read(size)
        if not data and self._size is not None and self._position < self._size:
            raise ConnectionError(f"stopped at byte {self._position} of {self._size}")
        return data

    def _reopen(self) -> None:
        filesystem, path = _filesystem(self.url, self.policy)
        # Zero makes fsspec stream the body, for servers that know no ranges.
        options: dict[str, Any] = {"block_size": REQUEST_BYTES if self._ranges else 0}
        if self._ranges and not self.whole:
            options["cache_type"] = "none"
        self._file = filesystem.open(path, "rb", **options)
        self._size = getattr(self._file, "size", None) or self._size
        self._ranges = self._ranges and not _only_streams(self._file)

    def _skip(self, file: Any) -> Any:
        """Read a body without ranges up to where the position is, from its beginning where it lies behind."""
        if file.tell() > self._position:
            self._drop()
            self._reopen()
            file = self._file
        while (missing := self._position - file.tell()) > 0:
            if not file.read(min(missing, BUFFER_BYTES)):
                break  # the position lies behind the end
        return file

    def _drop(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
        self._file = None

    def _patiently(self, act: Any) -> Any:
        for attempt in range(self.policy.retries + 1):
            try:
                return act()
            except (UserError, KeyboardInterrupt):
                raise
            except Exception as error:  # each file system raises its own
                self._drop()
                if self._ranges and "range request" in str(
                    error
                ):  # fsspec, of a server that ignored one
                    self._ranges = False
                elif _is_final(error):
                    raise (
                        error if isinstance(error, OSError) else OSError(f"{self.url}: {error}")
                    ) from error
                elif attempt == self.policy.retries:
                    raise OSError(
                        f"{self.url}: {_said(error)} (given up after {attempt + 1} attempts)"
                    ) from error
                else:
                    pause = min(self.policy.pause_seconds * 2**attempt, MAX_PAUSE_SECONDS)
                    time.sleep(
                        pause * (1 + random.random())
                    )  # ranks that failed together do not come back together
        return act()  # only where the last attempt found that there are no ranges


def _filesystem(url: str, policy: ReadPolicy) -> tuple[Any, str]:
    protocol = str(fsspec.core.split_protocol(url)[0])
    seconds, options = policy.timeout_seconds, {}
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options = {"client_kwargs": {"timeout": limits}}
    elif protocol in ("s3", "s3a"):
        options = {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    elif protocol in ("gs", "gcs"):
        options = {"requests_timeout": seconds}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        mend = f'pip install "whisper-aut[{extra}]"' if extra else f"a package for {protocol}://"
        raise UserError(f"{url} needs what is not installed ({error}): {mend}.") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}.") from None


def _only_streams(file: Any) -> bool:
    """Tell whether fsspec fell back to a body without ranges, which it does by itself where a server refuses them outright."""
    http = sys.modules.get(
        "fsspec.implementations.http"
    )  # imported by then, where it has to do with it
    return http is not None and isinstance(file, http.HTTPStreamFile)


def _is_final(error: BaseException) -> bool:
    """Tell faults that stay from those that may pass. fsspec calls every failure to look at a URL `FileNotFoundError`."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in TRY_AGAIN_LATER
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _is_final(error.__cause__)
    return isinstance(
        error, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
    )


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextmanager
def _piped(url: str, policy: ReadPolicy) -> Iterator[BinaryIO]:
    if not policy.allow_pipe:
        raise UserError(
            f"{url} would run a command. Set data.allow_pipe=true if you trust where this config comes from."
        )
    with subprocess.Popen(url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        yield cast(BinaryIO, process.stdout)
        if process.stdout.read(1):  # nobody wants the rest
            process.kill()
        elif process.wait():
            raise OSError(f"{url} exited with {process.returncode}")
