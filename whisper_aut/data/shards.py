"""Write, index and read shards: tars of (audio, JSON) pairs with an `index.json` in their folder.

The format is plain WebDataset (https://github.com/webdataset/webdataset). Nothing is unpickled.
"""

import fnmatch
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, InvalidHeaderError, ReadError  # pyright: ignore[reportAttributeAccessIssue]
from threading import Lock
from typing import Any, BinaryIO

import fsspec
import numpy as np
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits, read_header
from whisper_aut.data.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.data.remote import DEFAULT_POLICY, ReadPolicy, is_local, read_file, sibling_url
from whisper_aut.errors import SkipReason, SkipSample, UserError

UNKNOWN_MS = -1
COLUMNS = 4
# NumPy parses a header with `ast`, which in Python 3.11 is not safe in threads:
# https://github.com/python/cpython/issues/106905
_HEADER_LOCK = Lock()


def table_name(tar: str) -> str:
    """Return the file name of the sample table of a tar."""
    return f"{tar.removesuffix('.tar')}.samples.npy"


def text_hash(text: str) -> int:
    """Return the signed 64-bit hash that sample tables store for a key or a licence."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class SampleTable:
    """The N samples of a tar, in order. All arrays are int64.

    Attributes:
        starts: `[N + 1]`, byte offset of each sample, then the end of the last one.
        milliseconds: `[N]`, length of each clip; -1 if unknown.
        keys, licences: `[N]`, `text_hash` of the key, and of the licence as the sample states it.
    """

    starts: np.ndarray
    milliseconds: np.ndarray
    keys: np.ndarray
    licences: np.ndarray

    def __len__(self) -> int:
        return len(self.milliseconds)

    def to_bytes(self) -> bytes:
        """Return the table as an `.npy` file: int64 `[N + 1, 4]`, little-endian."""
        buffer = io.BytesIO()
        columns = [self.milliseconds, self.keys, self.licences]
        rows = np.stack([self.starts, *(np.append(column, 0) for column in columns)], axis=1)
        np.save(buffer, rows.astype("<i8"), allow_pickle=False)
        return buffer.getvalue()

    def count_licences(
        self, rows: np.ndarray | slice = slice(None)
    ) -> Iterator[tuple[int, int, float]]:
        """Yield `(licence hash, samples, seconds)` for each licence in the selected rows."""
        licences, seconds = self.licences[rows], self.milliseconds[rows].clip(min=0) / 1000
        for licence in np.unique(licences):
            own = licences == licence
            yield int(licence), int(own.sum()), float(seconds[own].sum())

    @classmethod
    def from_bytes(cls, data: bytes, samples: int) -> "SampleTable":
        """Parse a table written by `to_bytes`.

        Args:
            data: the `.npy` file.
            samples: number of samples of the tar, as its index says.

        Raises:
            ValueError: the table is damaged, or does not have `samples` samples.
        """
        with _HEADER_LOCK:
            rows = np.load(io.BytesIO(data), allow_pickle=False)
        if rows.dtype.kind != "i" or rows.shape != (samples + 1, COLUMNS):
            raise ValueError(f"a table of {rows.dtype} {rows.shape} for {samples} samples")
        starts, (milliseconds, keys, licences) = rows[:, 0], rows[:-1, 1:].T
        if starts[0] < 0 or (np.diff(starts) <= 0).any() or (milliseconds < UNKNOWN_MS).any():
            raise ValueError("offsets that do not ascend, or negative lengths")
        return cls(starts, milliseconds, keys, licences)


class TableWriter:
    """Collects the samples of a tar into a `SampleTable`."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, start: int, seconds: float | None, key: str, licence: str) -> None:
        """Append a sample that begins at byte `start`; `seconds` is None if unknown."""
        milliseconds = UNKNOWN_MS if seconds is None else round(seconds * 1000)
        self._rows.append((start, milliseconds, text_hash(key), text_hash(licence)))

    def finish(self, end: int) -> SampleTable:
        """Return the table. `end` is the byte offset after the last sample."""
        rows = np.array(self._rows, np.int64).reshape(-1, COLUMNS)
        return SampleTable(np.append(rows[:, 0], end), *rows[:, 1:].T)


INDEX_NAME = "index.json"
INDEX_VERSION = 2
# Key of the index; true if every tar has a sample table next to it.
HAS_TABLES = "sample_tables"
SUFFIX = re.compile(r"[A-Za-z_][\w-]*")  # one part of a suffix such as `seg.json`
COMPRESSED = "compressed by gzip, which allows no reading by position and saves nothing on audio"
MAX_INDEX_BYTES, MAX_TABLE_BYTES = 256 << 20, 256 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One tar of an index.

    Attributes:
        name: file name within the folder.
        samples: number of samples.
        seconds: total length of the audio; 0 if unknown.
        bytes: size of the file.
        sha256: hex digest of the file; empty if not computed.
    """

    name: str
    samples: int
    seconds: float = 0.0
    bytes: int = 0
    sha256: str = ""


class FolderCounts:
    """Counts clips by domain, and clips and seconds by licence (as written in the annotations)."""

    def __init__(self) -> None:
        self.domains: Counter[str] = Counter()
        self.licences: dict[str, dict[str, float]] = {}

    def add(self, domain: str, licence: str, seconds: float, clips: int = 1) -> None:
        """Count `clips` clips with a total length of `seconds`."""
        self.domains[domain] += clips
        total = self.licences.setdefault(licence, {"clips": 0, "seconds": 0.0})
        total["clips"] += clips
        total["seconds"] += seconds

    def metadata(self) -> dict[str, Any]:
        """Return the counts as stored in an index."""
        licences = {
            written: {"clips": total["clips"], "seconds": round(total["seconds"], 3)}
            for written, total in self.licences.items()
        }
        return {"domains": dict(self.domains), "licences": licences}


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples of a folder that a run may use.

    Attributes:
        ordinals: for each shard, the ascending indices of its selected samples.
        seconds: total length of the selected samples.
        licences: clips and seconds by licence as written.
        left_out: number of samples left out, by reason.
    """

    ordinals: tuple[np.ndarray, ...]
    seconds: float
    licences: dict[str, dict[str, float]]
    left_out: dict[str, int]

    def digest(self) -> str:
        """Return a hash of the selected indices."""
        digest = hashlib.sha256()
        for ordinals in self.ordinals:
            digest.update(len(ordinals).to_bytes(8) + ordinals.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ShardIndex:
    """The tars of one folder or URL, in order.

    Attributes:
        root: folder or URL prefix.
        shards: the tars.
        metadata: other metadata of the index, such as counts of domains, licences and skipped clips.
        pattern: file name pattern if only some tars of the folder are used; empty for all.
        selection: the samples that a run may use; None for all.
    """

    root: str
    shards: tuple[ShardEntry, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    selection: Selection | None = None

    @property
    def name(self) -> str:
        """The folder or URL, followed by the pattern if there is one."""
        return f"{self.root.rstrip('/')}/{self.pattern}" if self.pattern else self.root

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Number of selected samples of each shard."""
        if self.selection:
            return tuple(map(len, self.selection.ordinals))
        return tuple(shard.samples for shard in self.shards)

    @property
    def samples(self) -> int:
        """Number of selected samples."""
        return sum(self.shard_samples)

    @property
    def seconds(self) -> float:
        """Total length of the selected samples."""
        if self.selection:
            return self.selection.seconds
        return sum(shard.seconds for shard in self.shards)

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by licence as written; a single entry `""` if they were not counted."""
        if self.selection:
            return self.selection.licences
        return self.metadata.get("licences") or {
            "": {"clips": self.samples, "seconds": self.seconds}
        }

    @property
    def has_tables(self) -> bool:
        """Whether every tar has a sample table."""
        return bool(self.metadata.get(HAS_TABLES))

    def url(self, number: int) -> str:
        """Return the path or URL of a tar."""
        return sibling_url(self.root, self.shards[number].name)

    def ordinals(self, shard: int) -> np.ndarray:
        """Return the indices of a shard's selected samples, ascending."""
        if self.selection:
            return self.selection.ordinals[shard]
        return np.arange(self.shards[shard].samples)

    def table(self, number: int, policy: ReadPolicy = DEFAULT_POLICY) -> SampleTable:
        """Read the sample table of one tar.

        Raises:
            OSError: there is no table, or it cannot be read.
            ValueError: the table is damaged or does not match the tar.
        """
        data = read_file(
            sibling_url(self.root, table_name(self.shards[number].name)),
            policy,
            max_bytes=MAX_TABLE_BYTES,
        )
        return SampleTable.from_bytes(data, self.shards[number].samples)

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sizes and checksums, but not of their location."""
        listing = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    def identities(self) -> set[str]:
        """Return the fingerprints an audit may list: of these shards and of the whole folder."""
        return {self.fingerprint(), self.metadata.get("folder", self.fingerprint())}

    def selected_fingerprint(self) -> str:
        """Return a hash of the shards and of the selection."""
        chosen = f"-{self.selection.digest()}" if self.selection else ""
        return self.fingerprint() + chosen


class ShardWriter:
    """A context manager that writes samples into tars of about `max_bytes` and then the index.

    Inside the context the tars have hidden temporary names, and earlier shards in the folder stay
    untouched. On exit the earlier tars are removed, the index is written, and the new tars are
    renamed into place, in this order. If that is interrupted, the index names missing tars and
    `open_index` raises, so an incomplete folder never looks complete. If the context is left with
    an exception, only the temporary files are removed.

    Args:
        folder: where to write; created if missing.
        prefix: start of the tars' names, `PREFIX-000000.tar`.
        max_bytes: a tar is finished as soon as its members reach this size.
    """

    def __init__(self, folder: str | Path, prefix: str = "shard", max_bytes: int = 256 << 20):
        # TarWriter would read `name:` at the start of a relative path as a URL.
        self.folder = Path(folder).absolute()
        self.prefix, self.max_bytes = prefix, max_bytes
        self.metadata: dict[str, Any] = {}
        self._shards: list[ShardEntry] = []
        self._counts = FolderCounts()
        self._writer: TarWriter | None = None
        self._table = TableWriter()
        self._samples, self._seconds, self._bytes = 0, 0.0, 0

    def __enter__(self) -> "ShardWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_partial()  # left over from an interrupted build
        except OSError as error:
            raise UserError(f"Cannot write shards to {self.folder}: {error.strerror}.") from None
        return self

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return self._samples + sum(shard.samples for shard in self._shards)

    def write(self, key: str, suffix: str, audio: bytes, annotation: Annotation) -> None:
        """Append one sample.

        Args:
            key: name of the sample. Dots become underscores, since WebDataset would read an
                extension after them.
            suffix: file suffix of the audio, such as `flac`.
            audio: the encoded audio file.
            annotation: the content of the `.json` member.
        """
        key = key.replace(".", "_")
        writer = self._writer or TarWriter(
            str(self._partial(len(self._shards))), encoder=False, mtime=0
        )
        self._writer = writer
        metadata = annotation.to_json()
        seconds = annotation.duration_seconds
        self._table.add(writer.tarstream.offset, seconds, key, annotation.licence)
        writer.write({"__key__": key, suffix: audio, "json": metadata})
        self._samples += 1
        self._seconds += seconds or 0.0
        self._bytes += len(audio) + len(metadata)
        self._counts.add(annotation.domain, annotation.licence, seconds or 0.0)
        if self._bytes >= self.max_bytes:
            self._finish_shard()

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish_shard()
                self._publish()
        finally:
            if self._writer is not None:
                # The disk may be full. The partial tars must be removed even then.
                with suppress(OSError):
                    self._writer.close()
            self._remove_partial()

    def _name(self, number: int) -> str:
        return f"{self.prefix}-{number:06d}.tar"

    def _partial(self, number: int) -> Path:
        return self.folder / f".{self._name(number)}.partial"

    def _partial_table(self, number: int) -> Path:
        return self.folder / f".{table_name(self._name(number))}.partial"

    def _remove_partial(self) -> None:
        self._remove(f".{self.prefix}-*.tar.partial")
        self._remove(f".{table_name(f'{self.prefix}-*.tar')}.partial")

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink(missing_ok=True)

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        table = self._table.finish(self._writer.tarstream.offset)
        self._writer.close()
        self._partial_table(len(self._shards)).write_bytes(table.to_bytes())
        partial = self._partial(len(self._shards))
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entry = ShardEntry(
            self._name(len(self._shards)),
            self._samples,
            round(self._seconds, 3),
            partial.stat().st_size,
            digest,
        )
        self._shards.append(entry)
        self._table = TableWriter()
        self._writer, self._samples, self._seconds, self._bytes = None, 0, 0.0, 0

    def _publish(self) -> None:
        # Removes the tars of an earlier build. Until the end, `open_index` reports missing tars.
        self._remove(f"{self.prefix}-*.tar")
        self._remove(table_name(f"{self.prefix}-*.tar"))
        metadata = {**self.metadata, **self._counts.metadata(), HAS_TABLES: True}
        write_index(self.folder, self._shards, metadata)
        for number, shard in enumerate(self._shards):
            os.replace(self._partial(number), self.folder / shard.name)
            os.replace(self._partial_table(number), self.folder / table_name(shard.name))


def write_index(folder: Path, shards: Sequence[ShardEntry], metadata: dict[str, Any]) -> None:
    """Write `index.json` atomically. Values computed from `shards` override those in `metadata`."""
    index = {
        **metadata,
        "version": INDEX_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "seconds": round(sum(shard.seconds for shard in shards), 3),
        "shards": [asdict(shard) for shard in shards],
    }
    partial = folder / f".{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, folder / INDEX_NAME)


def open_index(root: str | Path, policy: ReadPolicy = DEFAULT_POLICY) -> ShardIndex:
    """Read the index of a folder or URL of shards.

    If a local folder has no index, the samples of its tars are counted. A root that ends in `.tar`
    is a pattern for some tars of a folder, such as `FOLDER/train-*.tar` or
    `FOLDER/{000000..000999}.tar`. The folder's index and tables are used if they list all of them.

    Raises:
        UserError: the folder or its tars do not exist, or the index is damaged or names missing
            tars.
    """
    root = str(root)
    if root.endswith(".tar"):
        return _some_tars(root, policy)
    if not is_local(root):
        return _remote_index(root, policy)
    filesystem, path = fsspec.url_to_fs(root)
    if not filesystem.exists(path):
        raise UserError(
            f"There are no shards at {root}. Build some: "
            f"whisper-aut data build MANIFEST --out {root}"
        )
    if filesystem.exists(f"{path}/{INDEX_NAME}"):
        index = _read_index(filesystem, path, root)
        missing = [
            shard.name for shard in index.shards if not filesystem.exists(f"{path}/{shard.name}")
        ]
        if missing:
            listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise UserError(
                f"{root}/{INDEX_NAME} names {len(missing)} shards that are missing: {listed}. "
                "Bring them back or rebuild."
            )
        return index
    tars = list_tars(filesystem, path)
    if not tars:
        raise UserError(
            f"{root} holds neither {INDEX_NAME} nor any *.tar. Build shards: "
            f"whisper-aut data build MANIFEST --out {root}"
        )
    return _count_tars(filesystem, root, tars)


def _remote_index(root: str, policy: ReadPolicy) -> ShardIndex:
    try:
        # Missing tars are found when they are read: looking for them here would take one request
        # per tar.
        return _parse_index(
            root, read_file(sibling_url(root, INDEX_NAME), policy, max_bytes=MAX_INDEX_BYTES)
        )
    except FileNotFoundError:
        raise UserError(
            f"There is no {INDEX_NAME} at {root}, and remote tars are not read through to count "
            "them. Make one where the tars are on a disk, and put what it writes beside them: "
            "whisper-aut data index FOLDER"
        ) from None
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error}.") from None


def _some_tars(root: str, policy: ReadPolicy) -> ShardIndex:
    """Open the tars that match a pattern, with the folder's index or else by counting samples."""
    folder, _, pattern = root.rpartition("/")
    folder = folder or "."
    try:
        patterns = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{root}: {error}.") from None
    if is_local(root):
        filesystem, path = fsspec.url_to_fs(folder)
        names = sorted(_names(filesystem, path))
        has_index = filesystem.exists(f"{path}/{INDEX_NAME}")
        whole = _read_index(filesystem, path, folder) if has_index else ShardIndex(folder, ())
    else:
        whole = _remote_index(folder, policy)
        names = [shard.name for shard in whole.shards]
    there, chosen, missing = set(names), set[str](), []
    for one in patterns:
        found = [one] if one in there else fnmatch.filter(names, one)
        chosen.update(found)
        missing += [] if found else [one]
    if missing:
        if is_local(root):
            # Raises a more helpful error if the tars are compressed.
            list_tars(fsspec.filesystem("file"), folder, missing[0])
        listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise UserError(f"{folder} holds no {listed} ({len(missing)} of {len(patterns)} patterns).")
    if chosen <= {shard.name for shard in whole.shards}:
        index = _part(whole, chosen, policy)
    else:
        index = _count_tars(filesystem, folder, [f"{path}/{name}" for name in sorted(chosen)])
    return replace(index, pattern=pattern)


def _part(whole: ShardIndex, names: set[str], policy: ReadPolicy) -> ShardIndex:
    """Return the index of some tars of a folder, with licences counted from their tables."""
    shards = tuple(shard for shard in whole.shards if shard.name in names)
    if len(shards) == len(whole.shards):
        return whole
    metadata: dict[str, Any] = {"folder": whole.fingerprint()}
    part = ShardIndex(whole.root, shards, metadata)
    if whole.has_tables:
        counts, written = FolderCounts(), {text_hash(name): name for name in whole.licences}
        # If a table cannot be read, the part is used without tables.
        with suppress(OSError, ValueError):
            for number in range(len(shards)):
                for licence, clips, seconds in part.table(number, policy).count_licences():
                    counts.add("", written.get(licence, "unknown"), seconds, clips)
            metadata |= {"licences": counts.metadata()["licences"], HAS_TABLES: True}
    return part


def _count_tars(filesystem: Any, root: str, tars: Sequence[str]) -> ShardIndex:
    entries = []
    for tar in tars:
        with filesystem.open(tar, "rb") as stream:
            entries.append(
                ShardEntry(Path(tar).name, count_samples(stream), bytes=filesystem.size(tar) or 0)
            )
    return ShardIndex(root, tuple(entries))


def list_tars(filesystem: Any, folder: str, pattern: str = "*.tar") -> list[str]:
    """Return the sorted paths of a folder's tars. Brackets in the folder's name match literally.

    Raises:
        UserError: the folder has gzip-compressed tars.
    """
    names = _names(filesystem, folder)
    compressed = [
        name
        for name in sorted(names)
        if fnmatch.fnmatchcase(name, f"{pattern}.gz") or name.endswith(".tgz")
    ]
    if compressed:
        raise UserError(f"{folder}/{compressed[0]} is {COMPRESSED}: run gunzip {folder}/*.gz")
    return sorted(path for name, path in names.items() if fnmatch.fnmatchcase(name, pattern))


def _names(filesystem: Any, folder: str) -> dict[str, str]:
    """Map the names of a folder's files, hidden ones excluded, to their paths."""
    paths = filesystem.ls(folder, detail=False) if filesystem.isdir(folder) else []
    names = {path.rpartition("/")[2]: path for path in paths}
    return {name: path for name, path in names.items() if not name.startswith(".")}


def _read_index(filesystem: Any, path: str, root: str) -> ShardIndex:
    return _parse_index(root, filesystem.cat_file(f"{path}/{INDEX_NAME}"))


def _parse_index(root: str, data: bytes) -> ShardIndex:
    try:
        index = json.loads(data)
        if index["version"] != INDEX_VERSION:
            raise UserError(
                f"{root}/{INDEX_NAME} has version {index['version']}; this release reads "
                f"{INDEX_VERSION}. Write it again: whisper-aut data index {root}"
            )
        shards = tuple(ShardEntry(**shard) for shard in index.pop("shards"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{root}/{INDEX_NAME} is damaged ({error!r}). Delete it to have the tars counted, "
            "or rebuild."
        ) from None
    unsafe = [shard.name for shard in shards if "/" in shard.name or shard.name.startswith(".")]
    if unsafe:
        raise UserError(f"{root}/{INDEX_NAME} names files outside its folder: {unsafe[0]!r}.")
    return ShardIndex(root, shards, index)


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
        raise InvalidHeaderError(f"{header.name} says that it has {header.size} bytes")


def tar_members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield `(tar, member)` for the regular files of an uncompressed tar, in order.

    Bodies are skipped by seeking if the stream is seekable.

    Raises:
        tarfile.TarError: the tar is compressed or damaged, or has no end marker. Members before
            the damage are yielded first.
    """
    if stream.seekable():
        is_gzip = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if is_gzip:
            raise ReadError(f"{COMPRESSED}: gunzip it")
    with tarfile.open(
        fileobj=stream, mode="r:" if stream.seekable() else "r|", tarinfo=_StrictHeader
    ) as tar:
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
    consecutive samples may have the same key.

    Raises:
        tarfile.TarError: see `tar_members`.
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
    of_key = max(
        (n for n, part in enumerate(parts[:-1], 1) if not SUFFIX.fullmatch(part)), default=0
    )
    return ".".join([key, *parts[:of_key]]), ".".join(parts[of_key:]).lower()


def count_samples(stream: BinaryIO) -> int:
    """Count the samples of a tar from its member names alone. Stops at the first damaged header."""
    samples = 0
    try:
        for ordinal, *_ in sample_members(stream):
            samples = ordinal + 1
    except tarfile.TarError:
        pass  # the damage is reported when the tar is read
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
            return SkipSample(
                SkipReason.TOO_LARGE, f"{member.name}: {member.size} bytes, limit {limit}"
            )
        if self.stream.seekable() and not member.issparse():
            # Several times faster than the file object of `extractfile`.
            self.stream.seek(member.offset_data)
            body = self.stream.read(member.size)
        else:
            file = tar.extractfile(member)
            body = file.read() if file else b""
        if len(body) < member.size:
            raise tarfile.ReadError(f"{member.name} ends after {len(body)} of {member.size} bytes")
        return body


def audio_and_annotation(group: Group) -> tuple[str, bytes, Annotation]:
    """Return the suffix and bytes of the audio member, and the annotation.

    The annotation is read from the `.json` and `.txt` members.

    Raises:
        SkipSample: the sample has no audio, or neither JSON nor text; a member is too large; or
            the JSON or text cannot be parsed.
    """
    bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
    for body in bodies.values():
        if isinstance(body, SkipSample):
            raise body
    suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
    listed = f"members: {', '.join(f'.{suffix}' for suffix in sorted(bodies))}"
    if "json" not in bodies and "txt" not in bodies:
        raise SkipSample(SkipReason.BAD_JSON, f"no .json or .txt member; {listed}{_dots(group)}")
    if suffix is None:
        raise SkipSample(SkipReason.NO_AUDIO, f"{listed}{_dots(group)}")
    try:
        text = bodies.get("txt", b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SkipSample(SkipReason.BAD_JSON, f"the .txt member is not UTF-8: {error}") from None
    return suffix, bodies[suffix], Annotation.from_json(bodies.get("json", b"{}"), text)


def _dots(group: Group) -> str:
    """Return an explanation for errors if dots in a file name hide the suffix of a member."""
    known = (*AUDIO_SUFFIXES, "json", "txt")
    hidden = [suffix for suffix in group if "." in suffix and suffix.rpartition(".")[2] in known]
    if not hidden:
        return ""
    key = group["__key__"]
    return (
        f". WebDataset ends a key at the first dot, so {f'{key}.{hidden[0]}'!r} is the member "
        f"{f'.{hidden[0]}'!r} of {key!r}: rename the files with no dot but the suffix's"
    )


TAR_BLOCK_BYTES = 512
TEXT_SUFFIXES = ("json", "txt")
# Lengths are only recorded here; each run applies its own limits.
ANY_LENGTH = ClipLimits(min_seconds=0.0, max_seconds=1e6)


def index_folder(folder: Path) -> ShardIndex:
    """Write the sample tables and the index of a local folder of tars.

    New counts replace those of an existing index. Its other metadata is kept.

    Raises:
        UserError: the folder has no tars, cannot be read or cannot be written.
    """
    tars = [Path(tar) for tar in list_tars(LocalFileSystem(), str(folder.absolute()))]
    if not tars:
        raise UserError(f"There are no tars in {folder} to index.")
    counts, entries = FolderCounts(), []
    try:
        for tar in tars:
            with tar.open("rb") as stream:
                table = table_of(stream, counts)
                stream.seek(0)
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            (folder / table_name(tar.name)).write_bytes(table.to_bytes())
            seconds = float(table.milliseconds.clip(min=0).sum()) / 1000
            entries.append(
                ShardEntry(tar.name, len(table), round(seconds, 3), tar.stat().st_size, digest)
            )
        metadata = {**_existing_metadata(folder), **counts.metadata(), HAS_TABLES: True}
        write_index(folder, entries, metadata)
    except OSError as error:
        raise UserError(f"{folder} cannot be indexed: {error}.") from None
    return open_index(folder)


def _existing_metadata(folder: Path) -> dict[str, Any]:
    """Return the content of an existing index of any version; empty if there is no readable one."""
    try:
        metadata = json.loads((folder / INDEX_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def table_of(stream: BinaryIO, counts: FolderCounts, *, audio: bool = True) -> SampleTable:
    """Read a whole tar and return its sample table.

    Lengths are taken from the annotation, or else from the audio header.

    Args:
        stream: the tar.
        counts: the tar's samples are added to these counts.
        audio: read audio headers. Without them, a length that the annotation omits is unknown.

    Raises:
        OSError: the tar is damaged before its first sample.
    """
    starts, end = _starts(stream)
    stream.seek(0)
    groups = MemberGroups(stream, ANY_LENGTH, suffixes=None if audio else TEXT_SUFFIXES)
    found = {number: _described(group, audio) for number, group in groups}
    writer = TableWriter()
    for number, (start, key) in enumerate(starts):
        annotation, seconds = found.get(number, (None, None))
        licence = annotation.licence if annotation else ""
        writer.add(start, seconds, key, licence)
        if annotation:
            counts.add(annotation.domain, licence, seconds or 0.0)
    return writer.finish(end)


def _starts(stream: BinaryIO) -> tuple[list[tuple[int, str]], int]:
    """Return the byte offset and key of each sample, and the end of the last sample in bytes."""
    starts: list[tuple[int, str]] = []
    end = 0
    try:
        for ordinal, key, _, _, member in sample_members(stream):
            if ordinal == len(starts):
                starts.append((member.offset, key))
            end = member.offset_data + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    except (tarfile.TarError, ValueError) as error:  # samples before the damage are counted
        if not starts:
            raise OSError(f"{getattr(stream, 'name', 'tar')}: {error}") from None
    return starts, end


def _described(group: Group, audio: bool) -> tuple[Annotation | None, float | None]:
    """Return a sample's annotation and length in seconds; None for what cannot be read."""
    annotation = None
    try:
        _, encoded, annotation = audio_and_annotation(group)
        if annotation.duration_seconds is not None or not audio:
            return annotation, annotation.duration_seconds
        return annotation, read_header(encoded, ANY_LENGTH).seconds
    except SkipSample:
        return annotation, None
