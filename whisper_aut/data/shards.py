"""Shards on disk: tars of (audio, json) pairs and the `index.json` beside them.

In: encoded clips with annotations, or a folder of tars. Out: `NAME-000000.tar …` and an index; a `ShardIndex` to plan a stream
by. Next: `data.order` plans over the index, `data.stream` reads the tars. The format is plain WebDataset
(https://github.com/webdataset/webdataset); nothing in it is ever unpickled.
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
from whisper_aut.data.remote import DEFAULT_POLICY, PIPE, ReadPolicy, beside, is_local, read_file
from whisper_aut.errors import Reason, SampleRefused, UserError

UNKNOWN_MS = -1
COLUMNS = 4
# NumPy parses a header with `ast`, which in Python 3.11 is not safe in threads:
# https://github.com/python/cpython/issues/106905
_HEADER_LOCK = Lock()


def table_name(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.samples.npy"


def text_hash(text: str) -> int:
    """Return the 64-bit number by which tables know a key or a licence."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class SampleTable:
    """Samples of a tar in order.

    Attributes:
        starts: the first byte of each, and one entry more, the end of the last.
        milliseconds: their lengths; -1 where unknown.
        keys, licences: `text_hash` of the key, and of the licence as the sample states it.
    """

    starts: np.ndarray
    milliseconds: np.ndarray
    keys: np.ndarray
    licences: np.ndarray

    def __len__(self) -> int:
        return len(self.milliseconds)

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        columns = [self.milliseconds, self.keys, self.licences]
        rows = np.stack([self.starts, *(np.append(column, 0) for column in columns)], axis=1)
        np.save(buffer, rows.astype("<i8"), allow_pickle=False)
        return buffer.getvalue()

    def licence_counts(
        self, rows: np.ndarray | slice = slice(None)
    ) -> Iterator[tuple[int, int, float]]:
        """Yield hash, samples and seconds of each licence among some rows."""
        licences, seconds = self.licences[rows], self.milliseconds[rows].clip(min=0) / 1000
        for licence in np.unique(licences):
            own = licences == licence
            yield int(licence), int(own.sum()), float(seconds[own].sum())

    @classmethod
    def from_bytes(cls, data: bytes, samples: int) -> "SampleTable":
        """Read a table.

        Raises:
            ValueError: it is damaged, or not of a tar with so many samples.
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
    """Collects the rows of a table."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, start: int, seconds: float | None, key: str, licence: str) -> None:
        milliseconds = UNKNOWN_MS if seconds is None else round(seconds * 1000)
        self._rows.append((start, milliseconds, text_hash(key), text_hash(licence)))

    def finish(self, end: int) -> SampleTable:
        rows = np.array(self._rows, np.int64).reshape(-1, COLUMNS)
        return SampleTable(np.append(rows[:, 0], end), *rows[:, 1:].T)


INDEX_NAME = "index.json"
INDEX_VERSION = 2
HAS_TABLES = "sample_tables"  # the fact that says that a table lies beside each tar
SUFFIX = re.compile(r"[A-Za-z_][\w-]*")  # one part of a suffix such as `seg.json`
COMPRESSED = "compressed by gzip, which allows no reading by position and saves nothing on audio"
MAX_INDEX_BYTES, MAX_TABLE_BYTES = 256 << 20, 256 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One tar: its name within the folder, samples, seconds of audio, bytes and SHA-256 (empty where not computed)."""

    name: str
    samples: int
    seconds: float = 0.0
    bytes: int = 0
    sha256: str = ""


class FolderCounts:
    """Clips by domain, and clips and seconds by licence as written."""

    def __init__(self) -> None:
        self.domains: Counter[str] = Counter()
        self.licences: dict[str, dict[str, float]] = {}

    def add(self, domain: str, licence: str, seconds: float, clips: int = 1) -> None:
        """Count clips that are `seconds` long together."""
        self.domains[domain] += clips
        total = self.licences.setdefault(licence, {"clips": 0, "seconds": 0.0})
        total["clips"] += clips
        total["seconds"] += seconds

    def facts(self) -> dict[str, Any]:
        """Return the counts as an index holds them."""
        licences = {
            written: {"clips": total["clips"], "seconds": round(total["seconds"], 3)}
            for written, total in self.licences.items()
        }
        return {"domains": dict(self.domains), "licences": licences}


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples of a folder that a run may use.

    Attributes:
        ordinals: of each shard, which of its samples they are, ascending.
        seconds: of audio that they hold.
        licences: clips and seconds by licence as written.
        left_out: how many are left out, by reason.
    """

    ordinals: tuple[np.ndarray, ...]
    seconds: float
    licences: dict[str, dict[str, float]]
    left_out: dict[str, int]

    def digest(self) -> str:
        """Return a hash of which samples are selected."""
        digest = hashlib.sha256()
        for ordinals in self.ordinals:
            digest.update(len(ordinals).to_bytes(8) + ordinals.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ShardIndex:
    """All tars under one folder or URL, in order.

    Attributes:
        root: folder or URL prefix.
        shards: the tars.
        facts: what the builder counted over the whole (domains, refusals, …), for people.
        pattern: of the shards' names, where they are a part of their folder.
        selection: the samples that a run may use; None for all.
    """

    root: str
    shards: tuple[ShardEntry, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    selection: Selection | None = None

    @property
    def name(self) -> str:
        """The folder or URL, and the pattern if there is one."""
        return f"{self.root.rstrip('/')}/{self.pattern}" if self.pattern else self.root

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Selected samples of each shard."""
        if self.selection:
            return tuple(map(len, self.selection.ordinals))
        return tuple(shard.samples for shard in self.shards)

    @property
    def samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def seconds(self) -> float:
        if self.selection:
            return self.selection.seconds
        return sum(shard.seconds for shard in self.shards)

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by licence as written; all under `""` where nobody counted them."""
        if self.selection:
            return self.selection.licences
        return self.facts.get("licences") or {"": {"clips": self.samples, "seconds": self.seconds}}

    @property
    def has_tables(self) -> bool:
        return bool(self.facts.get(HAS_TABLES))

    def url(self, number: int) -> str:
        return beside(self.root, self.shards[number].name)

    def ordinals(self, shard: int) -> np.ndarray:
        """Return which samples of a shard are selected, by their place in it."""
        if self.selection:
            return self.selection.ordinals[shard]
        return np.arange(self.shards[shard].samples)

    def table(self, number: int, policy: ReadPolicy = DEFAULT_POLICY) -> SampleTable:
        """Read where the samples of one tar lie and how long they are.

        Raises:
            OSError: there is no table, or it cannot be read.
            ValueError: it is damaged or another tar's.
        """
        data = read_file(
            beside(self.root, table_name(self.shards[number].name)),
            policy,
            max_bytes=MAX_TABLE_BYTES,
        )
        return SampleTable.from_bytes(data, self.shards[number].samples)

    def fingerprint(self) -> str:
        """A hash of what all shards hold: names, sizes and checksums, not where they are."""
        listing = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    def identities(self) -> set[str]:
        """Fingerprints under which an audit knows these shards: their own, and their folder's."""
        return {self.fingerprint(), self.facts.get("folder", self.fingerprint())}

    def selected_fingerprint(self) -> str:
        """A hash of the shards and of which of their samples are selected."""
        chosen = f"-{self.selection.digest()}" if self.selection else ""
        return self.fingerprint() + chosen


class ShardFolder:
    """Writes samples into tars of at most `max_bytes`, then the index. A context manager: leaving it completes the folder.

    Until then the tars carry hidden, temporary names and whatever the folder held stays as it was. Leaving replaces the index
    first and renames the tars into place after it: should that be cut short, the index names tars which are missing, and
    `open_index` says so. No interruption leaves a folder that looks complete and is not.
    """

    def __init__(self, folder: str | Path, prefix: str = "shard", max_bytes: int = 256 << 20):
        self.folder = Path(
            folder
        ).absolute()  # TarWriter would take `name:` at the start of a relative path for a URL
        self.prefix, self.max_bytes = prefix, max_bytes
        self.facts: dict[str, Any] = {}
        self._shards: list[ShardEntry] = []
        self._counts = FolderCounts()
        self._writer: TarWriter | None = None
        self._table = TableWriter()
        self._samples, self._seconds, self._bytes = 0, 0.0, 0

    def __enter__(self) -> "ShardFolder":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_partial()  # of a build that was cut short
        except OSError as error:
            raise UserError(f"Cannot write shards to {self.folder}: {error.strerror}.") from None
        return self

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return self._samples + sum(shard.samples for shard in self._shards)

    def write(self, key: str, suffix: str, audio: bytes, annotation: Annotation) -> None:
        """Append one sample. `key` loses its dots (WebDataset would read an extension there); `suffix` names the codec."""
        key = key.replace(".", "_")
        writer = self._writer or TarWriter(
            str(self._partial(len(self._shards))), encoder=False, mtime=0
        )
        self._writer = writer
        facts = annotation.to_json()
        seconds = annotation.duration_seconds
        self._table.add(writer.tarstream.offset, seconds, key, annotation.licence)
        writer.write({"__key__": key, suffix: audio, "json": facts})
        self._samples += 1
        self._seconds += seconds or 0.0
        self._bytes += len(audio) + len(facts)
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
                with suppress(OSError):  # a full disk; what matters is that the partial tars go
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
        self._remove(
            f"{self.prefix}-*.tar"
        )  # a former build's: from here to the end the folder is visibly incomplete
        self._remove(table_name(f"{self.prefix}-*.tar"))
        facts = {**self.facts, **self._counts.facts(), HAS_TABLES: True}
        write_index(self.folder, self._shards, facts)
        for number, shard in enumerate(self._shards):
            os.replace(self._partial(number), self.folder / shard.name)
            os.replace(self._partial_table(number), self.folder / table_name(shard.name))


def write_index(folder: Path, shards: Sequence[ShardEntry], facts: dict[str, Any]) -> None:
    """Write `index.json`, at once or not at all; what `shards` tell wins over `facts`."""
    index = {
        **facts,
        "version": INDEX_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "seconds": round(sum(shard.seconds for shard in shards), 3),
        "shards": [asdict(shard) for shard in shards],
    }
    partial = folder / f".{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, folder / INDEX_NAME)


def open_index(root: str | Path, policy: ReadPolicy = DEFAULT_POLICY) -> ShardIndex:
    """Read the index of a folder or URL of shards; a local folder without one is listed and its tars are counted.

    A root that ends in `.tar` is a pattern for some of a folder's tars, `FOLDER/train-*.tar` or
    `FOLDER/{000000..000999}.tar`. The folder's index and tables are used where they list them all.

    Raises:
        UserError: nothing there, no tars, a damaged index, or an index that names tars which are missing.
    """
    root = str(root)
    if root.endswith(".tar") and not root.startswith(PIPE):
        return _some_tars(root, policy)
    if not is_local(root):
        return _remote_index(root, policy)
    filesystem, path = fsspec.url_to_fs(root)
    if not filesystem.exists(path):
        raise UserError(
            f"There are no shards at {root}. Build some: whisper-aut data build MANIFEST --out {root}"
        )
    if filesystem.exists(f"{path}/{INDEX_NAME}"):
        index = _read_index(filesystem, path, root)
        missing = [
            shard.name for shard in index.shards if not filesystem.exists(f"{path}/{shard.name}")
        ]
        if missing:
            listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise UserError(
                f"{root}/{INDEX_NAME} names {len(missing)} shards that are missing: {listed}. Bring them back or rebuild."
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
        # A tar that the index names and the server lacks is found, and refused, when its turn comes: asking for each would take
        # as many requests as there are tars.
        return _parse_index(
            root, read_file(beside(root, INDEX_NAME), policy, max_bytes=MAX_INDEX_BYTES)
        )
    except FileNotFoundError:
        raise UserError(
            f"There is no {INDEX_NAME} at {root}, and remote tars are not read through to count them. Make one where the tars are "
            f"on a disk, and put what it writes beside them: whisper-aut data index FOLDER"
        ) from None
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error}.") from None


def _some_tars(root: str, policy: ReadPolicy) -> ShardIndex:
    """Open the tars of a folder that fit a pattern: by its index, or counted where it lacks one."""
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
            list_tars(
                fsspec.filesystem("file"), folder, missing[0]
            )  # says so where gzip packed them
        listed = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise UserError(f"{folder} holds no {listed} ({len(missing)} of {len(patterns)} patterns).")
    if chosen <= {shard.name for shard in whole.shards}:
        index = _part(whole, chosen, policy)
    else:
        index = _count_tars(filesystem, folder, [f"{path}/{name}" for name in sorted(chosen)])
    return replace(index, pattern=pattern)


def _part(whole: ShardIndex, names: set[str], policy: ReadPolicy) -> ShardIndex:
    """Return the index of some of a folder's tars, with what its tables tell of them alone."""
    shards = tuple(shard for shard in whole.shards if shard.name in names)
    if len(shards) == len(whole.shards):
        return whole
    facts: dict[str, Any] = {"folder": whole.fingerprint()}
    part = ShardIndex(whole.root, shards, facts)
    if whole.has_tables:
        counts, written = FolderCounts(), {text_hash(name): name for name in whole.licences}
        with suppress(OSError, ValueError):  # then it is read without tables
            for number in range(len(shards)):
                for licence, clips, seconds in part.table(number, policy).licence_counts():
                    counts.add("", written.get(licence, "unknown"), seconds, clips)
            facts |= {"licences": counts.facts()["licences"], HAS_TABLES: True}
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
    """Return the paths of a folder's tars, sorted; brackets in the folder's name are no pattern.

    Raises:
        UserError: there are tars that gzip compressed.
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
    """Return the paths of what is in a folder by name, without what is hidden."""
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
            f"{root}/{INDEX_NAME} is damaged ({error!r}). Delete it to have the tars counted, or rebuild."
        ) from None
    unsafe = [shard.name for shard in shards if "/" in shard.name or shard.name.startswith(".")]
    if unsafe:
        raise UserError(f"{root}/{INDEX_NAME} names files outside its folder: {unsafe[0]!r}.")
    return ShardIndex(root, shards, index)


class _StrictHeader(tarfile.TarInfo):
    """Python's tarfile takes a damaged header inside an archive for its end, without a word; this one raises.

    It also refuses sizes below zero, which send tarfile back to where it was, for ever.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        header = super().frombuf(buf, encoding, errors)
        _check_size(header)  # of headers that only prepare for the next too
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_StrictHeader":
        try:
            header = super().fromtarfile(tarfile)
            _check_size(header)  # again: a pax header may have changed it
        except EOFHeaderError:  # the zero block that ends an archive
            raise
        except (HeaderError, ValueError, OverflowError) as error:
            raise ReadError(f"{error}, at byte {tarfile.offset}") from None
        return header


def _check_size(header: tarfile.TarInfo) -> None:
    if header.size < 0:
        raise InvalidHeaderError(f"{header.name} says that it has {header.size} bytes")


def tar_members(stream: BinaryIO) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the regular files of an uncompressed tar in order, seeking over bodies where the stream can seek.

    Raises:
        tarfile.TarError: the tar is damaged or lacks the mark at its end; members before the damage have been yielded.
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
            # tarfile keeps every header otherwise: a 20 M-sample tar would fill memory
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]


def sample_members(
    stream: BinaryIO,
) -> Iterator[tuple[int, str, str, tarfile.TarFile, tarfile.TarInfo]]:
    """Yield `(ordinal, key, suffix, tar, member)` for the members of a tar's samples.

    The suffix is in lower case. Consecutive members with one key are one sample, until a suffix
    comes twice: a key that is repeated is a sample of its own.

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
    """Split a member's name into key and suffix, which is empty where there is none.

    As in WebDataset the suffix begins at the first dot of the file's name, but only where each part
    of it could be one: the dots of `Track 2.0 v0.wav`, after which come digits or blanks, belong to
    the key.
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
    """Count the samples of a tar by its member names alone."""
    samples = 0
    try:
        for ordinal, *_ in sample_members(stream):
            samples = ordinal + 1
    except tarfile.TarError:
        pass  # what comes before the damage is counted; reading reports the damage itself
    return samples


Group = dict[str, Any]


class MemberGroups:
    """Iterates over `(ordinal, group)`; bodies of samples that are not wanted are skipped over and left empty.

    Args:
        stream: the tar.
        limits: members above its bytes are not read; a `SampleRefused` stands in their place.
        wanted: ordinals of samples; None for all.
        suffixes: members whose bodies are read; None for all.

    Attributes:
        damage: what stopped the iteration, empty after a sound tar.
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
    ) -> bytes | SampleRefused:
        limit = MAX_JSON_BYTES if suffix in ("json", "txt") else self.limits.max_bytes
        if member.size > limit:
            return SampleRefused(
                Reason.TOO_LARGE, f"{member.name}: {member.size} bytes, limit {limit}"
            )
        if self.stream.seekable() and not member.issparse():
            self.stream.seek(
                member.offset_data
            )  # tarfile's own file object takes several times as long
            body = self.stream.read(member.size)
        else:
            file = tar.extractfile(member)
            body = file.read() if file else b""
        if len(body) < member.size:
            raise tarfile.ReadError(f"{member.name} ends after {len(body)} of {member.size} bytes")
        return body


def audio_and_annotation(group: Group) -> tuple[str, bytes, Annotation]:
    """Return the audio member's suffix, its bytes, and the annotation of `.json` and `.txt` members.

    Raises:
        SampleRefused: there is no audio, or neither JSON nor text; a member is too large, or not
            what its name says.
    """
    bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
    for body in bodies.values():
        if isinstance(body, SampleRefused):
            raise body
    suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
    listed = f"members: {', '.join(f'.{suffix}' for suffix in sorted(bodies))}"
    if "json" not in bodies and "txt" not in bodies:
        raise SampleRefused(Reason.BAD_JSON, f"no .json or .txt member; {listed}{_dots(group)}")
    if suffix is None:
        raise SampleRefused(Reason.NO_AUDIO, f"{listed}{_dots(group)}")
    try:
        text = bodies.get("txt", b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleRefused(Reason.BAD_JSON, f"the .txt member is not UTF-8: {error}") from None
    return suffix, bodies[suffix], Annotation.from_json(bodies.get("json", b"{}"), text)


def _dots(group: Group) -> str:
    """Return the cause where a name with dots in it hides what its last suffix says."""
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
ANY_LENGTH = ClipLimits(
    min_seconds=0.0, max_seconds=1e6
)  # lengths are written down here, and judged by the run


def index_folder(folder: Path) -> ShardIndex:
    """Write tables and index of a folder of tars.

    What is counted here replaces what an index said before; its other facts stay.

    Raises:
        UserError: no folder, no tars, or not writable.
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
        facts = {**_facts(folder), **counts.facts(), HAS_TABLES: True}
        write_index(folder, entries, facts)
    except OSError as error:
        raise UserError(f"{folder} cannot be indexed: {error}.") from None
    return open_index(folder)


def _facts(folder: Path) -> dict[str, Any]:
    """Return what an earlier index says, whatever its version; nothing where none can be read."""
    try:
        facts = json.loads((folder / INDEX_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def table_of(stream: BinaryIO, counts: FolderCounts, *, audio: bool = True) -> SampleTable:
    """Read one tar through: starts, keys, licences and lengths of its samples.

    A length is that of the annotation, or else of the audio's header.

    Args:
        stream: the tar.
        counts: counts its samples.
        audio: read headers; else a length that is not stated is unknown.
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
    """Return the first byte and the key of each sample, and the end of the last."""
    starts: list[tuple[int, str]] = []
    end = 0
    try:
        for ordinal, key, _, _, member in sample_members(stream):
            if ordinal == len(starts):
                starts.append((member.offset, key))
            end = member.offset_data + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    except (tarfile.TarError, ValueError) as error:  # what stands before the damage is counted
        if not starts:
            raise OSError(f"{getattr(stream, 'name', 'tar')}: {error}") from None
    return starts, end


def _described(group: Group, audio: bool) -> tuple[Annotation | None, float | None]:
    """Return a sample's annotation and seconds, None where they cannot be read."""
    annotation = None
    try:
        _, encoded, annotation = audio_and_annotation(group)
        if annotation.duration_seconds is not None or not audio:
            return annotation, annotation.duration_seconds
        return annotation, read_header(encoded, ANY_LENGTH).seconds
    except SampleRefused:
        return annotation, None
