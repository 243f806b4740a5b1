"""Open paths and fsspec URLs (`https://`, `s3://`, `gs://`) as binary streams.

Failed reads of a URL are retried with exponential backoff and continue at the byte that was
reached: with a range request if the server supports it, otherwise by reading from the beginning.
"""

import io
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec

from whisper_aut.errors import UserError

MAX_PAUSE_SECONDS = 30.0
BUFFER_BYTES = 1 << 20
REQUEST_BYTES = 4 << 20  # size of a range request when a tar is read sequentially
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "remote", "https": "remote"}
TRY_AGAIN_LATER = (408, 425, 429)  # the only 4xx statuses that are worth a retry


@dataclass(frozen=True)
class ReadPolicy:
    """How reads are retried.

    Attributes:
        retries: attempts after the first one, counted separately for each read.
        timeout_seconds: a connection that sends nothing for this long is closed.
        pause_seconds: pause before the first retry. It doubles with each retry, up to
            `MAX_PAUSE_SECONDS`, and is lengthened by a random factor between 1 and 2.
    """

    retries: int = 6
    timeout_seconds: float = 30.0
    pause_seconds: float = 0.5


DEFAULT_POLICY = ReadPolicy()


def is_local(url: str) -> bool:
    """Return whether `url` is a path or a `file://` URL."""
    return fsspec.core.split_protocol(url)[0] in (None, "file", "local")


def sibling_url(root: str, name: str) -> str:
    """Return the URL of a file in the folder `root`."""
    return f"{root.rstrip('/')}/{name}"


@contextmanager
def open_stream(
    url: str, policy: ReadPolicy = DEFAULT_POLICY, *, whole: bool = True
) -> Iterator[BinaryIO]:
    """Open a file for reading, as a context manager.

    Args:
        url: path or URL.
        policy: how to retry.
        whole: read ahead, for a file that is read from start to end. Otherwise only the requested
            bytes are fetched.

    Raises:
        OSError: the file does not exist or all attempts failed. Reads of the stream raise it too.
        UserError: the package for the URL's protocol is not installed.
    """
    if is_local(url):
        with fsspec.open(url, "rb") as stream:
            yield cast(BinaryIO, stream)
    else:
        with io.BufferedReader(
            RetryingReader(url, policy, whole=whole), BUFFER_BYTES if whole else 4096
        ) as stream:
            yield cast(BinaryIO, stream)


def read_file(url: str, policy: ReadPolicy = DEFAULT_POLICY, *, max_bytes: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read (see `open_stream`) or is larger than `max_bytes`.
    """
    with open_stream(url, policy) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(f"{url} is larger than {max_bytes} bytes")
    return data


class RetryingReader(io.RawIOBase):
    """A remote file that is reopened at the current position whenever a read fails."""

    def __init__(self, url: str, policy: ReadPolicy, *, whole: bool = True):
        self.url, self.policy, self.whole = url, policy, whole
        self._position = 0
        self._file: Any = None
        self._size: int | None = None  # None if the server does not report it
        self._ranges = True  # until the server turns out not to support range requests
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
        # A block size of 0 makes fsspec stream the body, for servers without range requests.
        options: dict[str, Any] = {"block_size": REQUEST_BYTES if self._ranges else 0}
        if self._ranges and not self.whole:
            options["cache_type"] = "none"
        self._file = filesystem.open(path, "rb", **options)
        self._size = getattr(self._file, "size", None) or self._size
        self._ranges = self._ranges and not _only_streams(self._file)

    def _skip(self, file: Any) -> Any:
        """Advance a stream without range requests to the position, reopening it to go backwards."""
        if file.tell() > self._position:
            self._drop()
            self._reopen()
            file = self._file
        while (missing := self._position - file.tell()) > 0:
            if not file.read(min(missing, BUFFER_BYTES)):
                break  # the position is after the end of the file
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
            except Exception as error:  # every fsspec file system raises its own types
                self._drop()
                # fsspec's message for a server that ignored a range request.
                if self._ranges and "range request" in str(error):
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
                    # Random, so that ranks that failed together do not retry together.
                    time.sleep(pause * (1 + random.random()))
        # Reached only if the last attempt found that there are no range requests.
        return act()


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
    """Return whether fsspec streams the body, as it does if a server rejects range requests."""
    # For HTTP files the module has already been imported.
    http = sys.modules.get("fsspec.implementations.http")
    return http is not None and isinstance(file, http.HTTPStreamFile)


def _is_final(error: BaseException) -> bool:
    """Return whether a retry cannot help.

    fsspec turns every failed look-up of a URL into `FileNotFoundError`, so its cause decides.
    """
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
