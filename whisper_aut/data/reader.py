"""Read samples from tars on a disk or behind a URL (`https://`, `s3://`, `gs://`, through fsspec).

Failed reads of a URL are retried with exponential backoff and continue at the byte that was
reached: with a range request if the server supports it, otherwise by reading from the beginning.
The tars are plain WebDataset (https://github.com/webdataset/webdataset). Nothing is unpickled.
"""

import io
import random
import re
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tarfile import EOFHeaderError, HeaderError, InvalidHeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from torch import Tensor
from webdataset.tariterators import base_plus_ext

from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits
from whisper_aut.data.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.errors import SkipReason, SkipSample, UserError

Item = TypeVar("Item")
MAX_PAUSE_SECONDS = 30.0
BUFFER_BYTES = 1 << 20
REQUEST_BYTES = 4 << 20  # size of a range request when a tar is read sequentially
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "remote", "https": "remote"}
RETRIED_STATUSES = (408, 425, 429)  # the only 4xx statuses that are worth a retry


@dataclass(frozen=True)
class ReadPolicy:
    """How reads of URLs are retried."""

    retries: int = 6  # attempts after the first one, counted separately for each read
    timeout_seconds: float = 30.0  # a connection that sends nothing for this long is closed
    # Before the first retry. It doubles with each retry and is lengthened by a random factor of up
    # to 2, so that ranks that failed together do not retry together.
    pause_seconds: float = 0.5


DEFAULT_POLICY = ReadPolicy()


def is_local(url: str) -> bool:
    """Return whether `url` is a path or a `file://` URL."""
    return fsspec.core.split_protocol(url)[0] in (None, "file", "local")


def sibling_url(root: str, name: str) -> str:
    """Return the path or URL of a file in the folder `root`."""
    return f"{root.rstrip('/')}/{name}"


@contextmanager
def open_stream(
    url: str, policy: ReadPolicy = DEFAULT_POLICY, *, whole: bool = True
) -> Iterator[BinaryIO]:
    """Open a path or URL for reading, as a context manager.

    With `whole`, a URL is read ahead, for a file that is read from start to end. Otherwise only the
    requested bytes are fetched.

    Raises:
        OSError: the file does not exist or all attempts failed. Reads of the stream raise it too.
        UserError: the package for the URL's protocol is not installed.
    """
    if is_local(url):
        with fsspec.open(url, "rb") as stream:
            yield cast(BinaryIO, stream)
    else:
        reader = RetryingReader(url, policy, whole=whole)
        with io.BufferedReader(reader, BUFFER_BYTES if whole else 4096) as stream:
            yield cast(BinaryIO, stream)


def read_file(url: str, policy: ReadPolicy = DEFAULT_POLICY, *, max_bytes: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read or is larger than `max_bytes`.
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
        self._with_retries(self._reopen)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise io.UnsupportedOperation(f"{self.url} does not report its size")
        self._position = max(0, (0, self._position, self._size or 0)[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._with_retries(lambda: self._read(len(buffer)))
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
            file = self._skip_to_position(file)
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
        # fsspec streams the body if a server rejects range requests. For HTTP files, the module
        # has already been imported.
        http = sys.modules.get("fsspec.implementations.http")
        if http is not None and isinstance(self._file, http.HTTPStreamFile):
            self._ranges = False

    def _skip_to_position(self, file: Any) -> Any:
        """Advance a stream without range requests; reopen it to go backwards."""
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

    def _with_retries(self, action: Callable[[], Any]) -> Any:
        attempt = 0
        while True:
            try:
                return action()
            except UserError:
                raise
            except Exception as error:  # every fsspec file system raises its own types
                self._drop()
                # fsspec's message for a server that ignored a range request.
                if self._ranges and "range request" in str(error):
                    self._ranges = False
                    continue
                if _is_final(error):
                    if isinstance(error, OSError):
                        raise
                    raise OSError(f"{self.url}: {error}") from error
                if attempt == self.policy.retries:
                    raise OSError(
                        f"{self.url}: {str(error) or type(error).__name__} "
                        f"(given up after {attempt + 1} attempts)"
                    ) from error
                pause = min(self.policy.pause_seconds * 2**attempt, MAX_PAUSE_SECONDS)
                time.sleep(pause * (1 + random.random()))
                attempt += 1


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
        package = f'"whisper-aut[{extra}]"' if extra else f"a package for {protocol}://"
        raise UserError(f"{url} cannot be read ({error}). Run: pip install {package}.") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}.") from None


def _is_final(error: BaseException) -> bool:
    """Return whether a retry cannot help.

    fsspec turns every failed look-up of a URL into `FileNotFoundError`, so its cause decides.
    """
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in RETRIED_STATUSES
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _is_final(error.__cause__)
    return isinstance(
        error, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
    )


COMPRESSED = "compressed with gzip, which prevents random access and does not shrink audio"
SUFFIX = re.compile(r"[A-Za-z_][\w-]*")  # one part of a suffix such as `seg.json`


class _StrictHeader(tarfile.TarInfo):
    """A header that raises when it is damaged.

    Python's `tarfile` silently treats a damaged header inside an archive as the archive's end.
    Negative sizes, which make `tarfile` seek backwards and loop forever, are rejected too.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        header = super().frombuf(buf, encoding, errors)
        # `frombuf` also parses extension headers, which `fromtarfile` does not return.
        _check_size(header)
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_StrictHeader":
        try:
            header = super().fromtarfile(tarfile)
            _check_size(header)  # again, since a pax header may override the size
        except EOFHeaderError:  # the zero block that ends an archive
            raise
        except (HeaderError, ValueError, OverflowError) as error:
            raise ReadError(f"{error}, at byte {tarfile.offset}") from None
        return header


def _check_size(header: tarfile.TarInfo) -> None:
    if header.size < 0:
        raise InvalidHeaderError(f"{header.name} has a size of {header.size} bytes")


def tar_members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield `(tar, member)` for the regular files of an uncompressed tar, in order.

    Raises:
        tarfile.TarError: the tar is compressed or damaged, or has no end marker. Members before
            the damage are yielded first.
    """
    is_gzip = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    if is_gzip:
        raise ReadError(f"{COMPRESSED}: gunzip it")
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_StrictHeader) as tar:
        for member in tar:
            if member.isreg():
                yield tar, member
            # Otherwise tarfile keeps every header, and a tar of 20 M samples would fill memory.
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]


def sample_members(
    stream: BinaryIO,
) -> Iterator[tuple[int, str, str, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield `(ordinal, key, suffix, tar, member)` for every member that belongs to a sample.

    `ordinal` is the index of the sample in the tar, and `suffix` is in lower case. Consecutive
    members with the same key form one sample. A suffix that repeats starts a new sample, so two
    consecutive samples may have the same key. Raises the errors of `tar_members`.
    """
    ordinal, last, suffixes = -1, None, set()
    for tar, member in tar_members(stream):
        key, suffix = split_name(member.name)
        if not suffix:
            continue
        if key != last or suffix in suffixes:
            ordinal, last, suffixes = ordinal + 1, key, set()
        suffixes.add(suffix)
        yield ordinal, key, suffix, tar, member


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into its key and its suffix (empty if there is none).

    As in WebDataset, the suffix begins at the first dot of the file name, unless what follows
    cannot be part of a suffix: in `Track 2.0 v0.wav`, the first dot belongs to the key because
    `0 v0` is not a valid part.
    """
    key, suffix = base_plus_ext(name)
    if key is None or suffix is None:
        return name, ""
    parts = suffix.split(".")
    key_parts = [n for n, part in enumerate(parts[:-1], 1) if not SUFFIX.fullmatch(part)]
    split = max(key_parts, default=0)
    return ".".join([key, *parts[:split]]), ".".join(parts[split:]).lower()


def count_samples(stream: BinaryIO) -> int:
    """Count the samples of a tar from its member names alone. Stops at the first damaged header."""
    samples = 0
    with suppress(tarfile.TarError):  # the damage is reported when the tar is read
        for ordinal, *_ in sample_members(stream):
            samples = ordinal + 1
    return samples


Group = dict[str, Any]


class MemberGroups:
    """Iterates over `(ordinal, group)` for all samples of a tar.

    A group maps `__key__` to the sample's key and each suffix to the member's body. Bodies that
    are not wanted are not read and are empty.

    Args:
        stream: the tar.
        limits: a member above `max_bytes` is not read; its body is a `SkipSample` instead.
        wanted: indices of the samples to read; None for all.
        suffixes: suffixes of the members to read; None for all.

    Attributes:
        damage: the error that stopped the iteration; empty if the tar is valid.
    """

    def __init__(
        self,
        stream: BinaryIO,
        limits: ClipLimits,
        wanted: Container[int] | None = None,
        suffixes: Container[str] | None = None,
    ):
        self.stream, self.limits, self.wanted, self.suffixes = stream, limits, wanted, suffixes
        self.damage = ""

    def __iter__(self) -> Iterator[tuple[int, Group]]:
        ordinal = -1
        group: Group = {}
        try:
            for number, key, suffix, tar, member in sample_members(self.stream):
                is_wanted = self.wanted is None or number in self.wanted
                is_read = is_wanted and (self.suffixes is None or suffix in self.suffixes)
                body = self._body(tar, member, suffix) if is_read else b""
                if number != ordinal:
                    if group:
                        yield ordinal, group
                    ordinal, group = number, {"__key__": key}
                group[suffix] = body
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            self.damage = str(error) or type(error).__name__
        if group:
            yield ordinal, group

    def _body(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str
    ) -> bytes | SkipSample:
        limit = MAX_JSON_BYTES if suffix in ("json", "txt") else self.limits.max_bytes
        if member.size > limit:
            detail = f"{member.name}: {member.size} bytes, limit {limit}"
            return SkipSample(SkipReason.TOO_LARGE, detail)
        if member.issparse():
            file = tar.extractfile(member)
            body = file.read() if file else b""
        else:  # several times faster than the file object of `extractfile`
            self.stream.seek(member.offset_data)
            body = self.stream.read(member.size)
        if len(body) < member.size:
            raise ReadError(f"{member.name} ends after {len(body)} of {member.size} bytes")
        return body


def audio_and_annotation(group: Group) -> tuple[str, bytes, Annotation]:
    """Return the suffix and bytes of the audio member, and the annotation from JSON and text.

    Raises:
        SkipSample: the sample has no audio, or neither JSON nor text; a member is too large; or
            the JSON or text cannot be parsed.
    """
    bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
    for body in bodies.values():
        if isinstance(body, SkipSample):
            raise body
    suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
    listed = f"members: {', '.join(f'.{suffix}' for suffix in sorted(bodies))}{_dots_hint(group)}"
    if "json" not in bodies and "txt" not in bodies:
        raise SkipSample(SkipReason.BAD_JSON, f"no .json or .txt member; {listed}")
    if suffix is None:
        raise SkipSample(SkipReason.NO_AUDIO, listed)
    try:
        text = bodies.get("txt", b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipSample(SkipReason.BAD_JSON, f"the .txt member is not UTF-8: {error}") from None
    return suffix, bodies[suffix], Annotation.from_json(bodies.get("json", b"{}"), text)


def _dots_hint(group: Group) -> str:
    """Return an explanation for errors if dots in a file name hide the suffix of a member."""
    known = (*AUDIO_SUFFIXES, "json", "txt")
    hidden = [suffix for suffix in group if "." in suffix and suffix.rpartition(".")[2] in known]
    if not hidden:
        return ""
    key = group["__key__"]
    return (
        f". WebDataset ends a key at the first dot, so {f'{key}.{hidden[0]}'!r} is the member "
        f"{f'.{hidden[0]}'!r} of {key!r}: rename the files so that only the suffix has a dot"
    )


@dataclass(frozen=True)
class Sample:
    """One clip as stored in a shard."""

    key: str
    shard: str  # path or URL
    audio: bytes  # the encoded file
    suffix: str  # of the audio, such as `flac`
    annotation: Annotation


@dataclass
class SkippedSample:
    """One skipped sample, as recorded in the ledger."""

    source: str  # path or URL of the shard
    key: str  # `#` and the index if the key is not known; empty for the whole shard
    reason: SkipReason
    detail: str = ""


def read_shard(
    stream: BinaryIO, url: str, wanted: Container[int] | None, limits: ClipLimits
) -> Iterator[tuple[int, Sample | SkippedSample]]:
    """Yield `(ordinal, sample or skipped sample)` for the wanted samples of one tar, in its order.

    A damaged tar yields the samples before the damage, then one `SkippedSample` with ordinal -1.
    `wanted` are indices of samples, None for all; other bodies are not read. Members larger than
    `limits.max_bytes` are rejected. `url` is stored in the samples.
    """
    groups = MemberGroups(stream, limits, wanted)
    for ordinal, group in groups:
        if wanted is not None and ordinal not in wanted:
            continue
        key = group["__key__"]
        try:
            suffix, audio, annotation = audio_and_annotation(group)
            yield ordinal, Sample(key, url, audio, suffix, annotation)
        except SkipSample as skip:
            yield ordinal, SkippedSample(url, key, skip.reason, skip.detail)
    if groups.damage:
        yield -1, SkippedSample(url, "", SkipReason.BAD_TAR, groups.damage)


# The byte limit makes files with hours of audio load one at a time.
LOOKAHEAD_CLIPS, LOOKAHEAD_BYTES = 256, 64 << 20


def prefetch_decoded(
    items: Iterable[Item],
    load: Callable[[Item], Tensor],
    encoded_bytes: Callable[[Item], int],
    workers: int,
) -> Iterator[tuple[Item, Tensor | SkipSample]]:
    """Load items in threads and yield them in order.

    Args:
        items: what to load.
        load: returns the waveform of an item, or raises `SkipSample`, which is yielded instead.
        encoded_bytes: returns the encoded size of an item, to bound the memory for look-ahead.
        workers: number of threads.
    """

    def load_or_skip(item: Item) -> Tensor | SkipSample:
        try:
            return load(item)
        except SkipSample as skip:
            return skip

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[tuple[Item, Future[Tensor | SkipSample]]] = deque()
    pending_bytes = 0
    try:
        for item in items:
            pending.append((item, pool.submit(load_or_skip, item)))
            pending_bytes += encoded_bytes(item)
            while len(pending) >= LOOKAHEAD_CLIPS or pending_bytes >= LOOKAHEAD_BYTES:
                first, future = pending.popleft()
                pending_bytes -= encoded_bytes(first)
                yield first, future.result()
        for item, future in pending:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
