"""Read samples from tars on a disk or behind a URL (`https://`, `s3://`, `gs://`, through fsspec).

URLs are read in range requests, and each request that fails is repeated with exponential backoff.
The tars are plain WebDataset (https://github.com/webdataset/webdataset). Nothing is unpickled.
"""

import gzip
import io
import logging
import random
import re
import tarfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from tarfile import EOFHeaderError, HeaderError, InvalidHeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from threading import Lock
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from torch import Tensor

from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits
from whisper_aut.data.annotation import (
    KEY_FIELD,
    MAX_JSON_BYTES,
    TEXT_MEMBERS,
    Annotation,
    FieldMapping,
)
from whisper_aut.errors import SkipReason, SkipSample, UserError, require

log = logging.getLogger(__name__)
Item = TypeVar("Item")
MAX_PAUSE_SECONDS = 30.0
BUFFER_BYTES = 1 << 20
REQUEST_BYTES = 8 << 20  # size of a range request when a tar is read from start to end
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


def local_path(url: str) -> str:
    """Return the path of a local file or folder that may be given as a `file://` URL."""
    return str(fsspec.core.url_to_fs(url)[1])


@contextmanager
def open_stream(url: str, policy: ReadPolicy = DEFAULT_POLICY) -> Iterator[BinaryIO]:
    """Open a path or URL that is read from start to end, as a context manager.

    Compressed tars (`GZIP_SUFFIXES`) are decompressed.

    Raises:
        OSError: the file does not exist or all attempts failed. Reads of the stream raise it too.
        UserError: the package for the URL's protocol is not installed.
    """
    with ExitStack() as stack:
        if is_local(url):
            stream = stack.enter_context(open(local_path(url), "rb"))
        else:
            stream = stack.enter_context(io.BufferedReader(RemoteFile(url, policy), BUFFER_BYTES))
        if url.endswith(GZIP_SUFFIXES):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        yield cast(BinaryIO, stream)


def read_file(url: str, policy: ReadPolicy = DEFAULT_POLICY, *, max_bytes: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read or is larger than `max_bytes`.
    """
    data = read_range(url, 0, max_bytes + 1, policy)
    if len(data) > max_bytes:
        raise OSError(f"{url} is larger than {max_bytes} bytes")
    return data


# Servers that ignore range requests, such as Python's `http.server`, send whole files. The last one
# is kept, and one thread at a time gets another, because tars may have gigabytes.
_without_ranges: set[str] = set()
_whole_file: tuple[str, bytes] = "", b""
_whole_file_lock = Lock()


def read_range(url: str, start: int, end: int, policy: ReadPolicy = DEFAULT_POLICY) -> bytes:
    """Return the bytes of a file from `start` to `end - 1`, or fewer if it ends before.

    Raises:
        OSError: the file does not exist or all attempts failed.
        UserError: the package for the URL's protocol is not installed.
    """
    global _whole_file
    if is_local(url):
        with open(local_path(url), "rb") as file:
            file.seek(start)
            return file.read(end - start)
    filesystem, path = open_filesystem(url, policy)
    server = url.rpartition("://")[2].partition("/")[0]
    data = b""
    if server not in _without_ranges:
        action = partial(filesystem.cat_file, path, start=start, end=end)
        data = _with_retries(url, policy, action)
        if len(data) <= end - start:
            return data
    with _whole_file_lock:
        if server not in _without_ranges:
            _without_ranges.add(server)
            log.warning(
                f"{server} does not support range requests and sends whole files, so tars are "
                "downloaded again and again. Use another server, or copy the shards to a disk."
            )
        if _whole_file[0] != url:
            data = data or _with_retries(url, policy, partial(filesystem.cat_file, path))
            _whole_file = url, data
        return _whole_file[1][start:end]


class RemoteFile(io.RawIOBase):
    """A remote file, read in large requests. The next one is sent before it is needed."""

    def __init__(self, url: str, policy: ReadPolicy):
        self.url, self.policy = url, policy
        filesystem, path = open_filesystem(url, policy)
        # None if the server does not report it.
        self._size: int | None = _with_retries(url, policy, lambda: filesystem.info(path))["size"]
        self._position = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._requests: dict[int, Future[bytes]] = {}  # by the number of the block

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        number = self._position // REQUEST_BYTES
        while whence == io.SEEK_END and self._size is None:
            self._block(number)  # the last one is shorter
            number += 1
        self._position = max(0, (0, self._position, self._size or 0)[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, offset = divmod(self._position, REQUEST_BYTES)
        data = self._block(number)[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _block(self, number: int) -> bytes:
        ahead = 1 if self._size is None else 2
        wanted = range(number, number + ahead)
        self._requests = {n: request for n, request in self._requests.items() if n in wanted}
        for n in wanted:
            start, end = n * REQUEST_BYTES, (n + 1) * REQUEST_BYTES
            if self._size is not None:
                end = min(end, self._size)
            if n not in self._requests and start < end:
                self._requests[n] = self._pool.submit(read_range, self.url, start, end, self.policy)
        if number not in self._requests:
            return b""
        data = self._requests[number].result()
        if self._size is None and len(data) < REQUEST_BYTES:
            self._size = number * REQUEST_BYTES + len(data)
        return data


def _with_retries(url: str, policy: ReadPolicy, action: Callable[[], Any]) -> Any:
    attempt = 0
    while True:
        try:
            return action()
        except Exception as error:  # every fsspec file system raises its own types
            if _is_final(error):
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{url}: {error}") from error
            if attempt == policy.retries:
                raise OSError(
                    f"{url}: {str(error) or type(error).__name__} "
                    f"(given up after {attempt + 1} attempts)"
                ) from error
            pause = min(policy.pause_seconds * 2**attempt, MAX_PAUSE_SECONDS)
            time.sleep(pause * (1 + random.random()))
            attempt += 1


def open_filesystem(url: str, policy: ReadPolicy = DEFAULT_POLICY) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path in it.

    Raises:
        UserError: the package for the URL's protocol is not installed.
    """
    protocol = str(fsspec.core.split_protocol(url)[0])
    seconds, options = policy.timeout_seconds, {}
    if protocol in ("http", "https"):
        require("aiohttp")
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options = {"client_kwargs": {"timeout": limits}}
    elif protocol in ("s3", "s3a"):
        require("s3fs")
        options = {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    elif protocol in ("gs", "gcs"):
        require("gcsfs")
        options = {"requests_timeout": seconds}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # an unusual or unknown protocol
        raise UserError(f"{url} cannot be read: {error}.") from None


def _is_final(error: BaseException) -> bool:
    """Return whether a retry cannot help.

    fsspec turns every failed look-up of a URL into `FileNotFoundError`, so its cause decides.
    """
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(response := getattr(error, "response", None), dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int) and 400 <= status < 500:
        return status not in RETRIED_STATUSES
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _is_final(error.__cause__)
    return isinstance(
        error, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
    )


GZIP_SUFFIXES = (".tar.gz", ".tgz")
TAR_SUFFIXES = (".tar", *GZIP_SUFFIXES)
COMPRESSED = "compressed with gzip, which prevents random access and does not shrink audio"
MAX_EXPANSION = 100  # unpacked size relative to the archive's: audio compresses little
MIN_ALLOWED_BYTES = 1 << 30
TAR_BLOCK_BYTES = 512
# Headers that hold long names and other attributes of the next member.
EXTENSION_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
MAX_EXTENSION_BYTES = 1 << 20
SUFFIX = re.compile(r"[A-Za-z_][\w-]*")  # one part of a suffix such as `seg.json`


class StrictHeader(tarfile.TarInfo):
    """A header that raises when it is damaged.

    Python's `tarfile` silently treats a damaged header inside an archive as the archive's end.
    Negative sizes, which make `tarfile` seek backwards and loop forever, are rejected too, and so
    are long extension headers, which `tarfile` reads into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictHeader":
        header = super().frombuf(buf, encoding, errors)
        # `frombuf` also parses extension headers, which `fromtarfile` does not return.
        _check_size(header)
        if header.type in EXTENSION_TYPES and header.size > MAX_EXTENSION_BYTES:
            raise InvalidHeaderError(f"an extension header has {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "StrictHeader":
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
        raise ReadError(f"{COMPRESSED}: rename it to .tar.gz, and see `data index`")
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictHeader) as tar:
        for member in tar:
            if member.isreg():
                yield tar, member
            # Otherwise tarfile keeps every header, and a tar of 20 M samples would fill memory.
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into its key and its suffix (empty if there is none).

    As in WebDataset, the suffix begins at the first dot of the file name, unless what follows
    cannot be part of a suffix: in `Track 2.0 v0.wav`, the first dot belongs to the key because
    `0 v0` is not a valid part.
    """
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name)
    if key is None or suffix is None:
        return name, ""
    parts = suffix.split(".")
    key_parts = [n for n, part in enumerate(parts[:-1], 1) if not SUFFIX.fullmatch(part)]
    split = max(key_parts, default=0)
    return ".".join([key, *parts[:split]]), ".".join(parts[split:]).lower()


Group = dict[str, Any]


class MemberGroups:
    """Iterates over `(ordinal, group)` for all samples of a tar.

    `ordinal` is the index of the sample in the tar. A group maps `__key__` to the sample's key and
    each suffix, in lower case, to the member's body. Consecutive members with the same key form one
    sample. A suffix that repeats starts a new sample, so two consecutive samples may have the same
    key. Bodies that are not wanted are not read and are empty.

    Args:
        stream: the tar.
        limits: a member above `max_bytes` is not read; its body is a `SkipSample` instead.
        wanted: indices of the samples to read; None for all.

    Attributes:
        starts: byte offset of each sample that was reached.
        end: byte offset at which the last of them ends.
        damage: the error that stopped the iteration; empty if the tar is valid.
    """

    damages = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error)

    def __init__(self, stream: BinaryIO, limits: ClipLimits, wanted: Container[int] | None = None):
        self.stream, self.limits, self.wanted = stream, limits, wanted
        self.starts: list[int] = []
        self.end, self.damage = 0, ""

    def __iter__(self) -> Iterator[tuple[int, Group]]:
        ordinal = -1
        group: Group = {}
        try:
            for tar, member in tar_members(self.stream):
                key, suffix = split_name(member.name)
                if not suffix or suffix == KEY_FIELD:
                    continue
                is_next = key != group.get("__key__") or suffix in group
                is_wanted = self.wanted is None or ordinal + is_next in self.wanted
                body = self._body(tar, member, suffix) if is_wanted else b""
                if is_next:
                    if group:
                        yield ordinal, group
                    ordinal, group = ordinal + 1, {"__key__": key}
                    self.starts.append(member.offset)
                group[suffix] = body
                self.end = member.offset_data + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        except self.damages as error:
            self.damage = str(error) or type(error).__name__
        if group:
            yield ordinal, group

    def _body(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str
    ) -> bytes | SkipSample:
        is_text = suffix in ("json", *TEXT_MEMBERS)
        limit = MAX_JSON_BYTES if is_text else self.limits.max_bytes
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


class MemberNames(MemberGroups):
    """Groups whose bodies are not read. An error of the stream is raised, and is no damage."""

    damages = (tarfile.TarError, ValueError)

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, ClipLimits(), wanted=())


def audio_and_annotation(
    group: Group, mapping: FieldMapping | None = None
) -> tuple[str, bytes, Annotation]:
    """Return the suffix and bytes of the audio member, and the annotation from JSON and text.

    Raises:
        SkipSample: the sample has no audio, or neither JSON nor text although the mapping needs
            them; a member is too large; or the JSON or text cannot be parsed.
    """
    bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
    for body in bodies.values():
        if isinstance(body, SkipSample):
            raise body
    suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
    listed = f"members: {', '.join(f'.{suffix}' for suffix in sorted(bodies))}{_dots_hint(group)}"
    needs_text = not (mapping and (mapping.rows or mapping.audio_only))
    if needs_text and not {"json", *TEXT_MEMBERS} & bodies.keys():
        raise SkipSample(SkipReason.BAD_JSON, f"no .json, .txt or .cls member; {listed}")
    if suffix is None:
        raise SkipSample(SkipReason.NO_AUDIO, listed)
    members = {KEY_FIELD: group["__key__"]}
    for name in TEXT_MEMBERS:
        try:
            members[name] = bodies.get(name, b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            detail = f"the .{name} member is not UTF-8: {error}"
            raise SkipSample(SkipReason.BAD_JSON, detail) from None
    annotation = Annotation.from_json(bodies.get("json", b"{}"), members, mapping)
    return suffix, bodies[suffix], annotation


def _dots_hint(group: Group) -> str:
    """Return an explanation for errors if dots in a file name hide the suffix of a member."""
    known = (*AUDIO_SUFFIXES, "json", *TEXT_MEMBERS)
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

    shard: str  # path or URL
    key: str  # `#` and the index if the key is not known; empty for the whole shard
    reason: SkipReason
    detail: str = ""


def read_shard(
    stream: BinaryIO,
    url: str,
    wanted: Container[int] | None,
    limits: ClipLimits,
    mapping: FieldMapping | None = None,
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
            suffix, audio, annotation = audio_and_annotation(group, mapping)
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
