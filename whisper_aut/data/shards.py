"""Shards: tars of (audio, JSON) pairs with an `index.json`, and how selected samples are read.

The tars are plain WebDataset. The sample table of a tar, a `.npy` file next to it, holds the
position and length of every sample, so that single samples can be fetched. `writer` writes all
three.
"""

import fnmatch
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.annotation import MAX_JSON_BYTES, FieldMapping
from whisper_aut.data.reader import (
    COMPRESSED,
    DEFAULT_POLICY,
    TAR_SUFFIXES,
    MemberNames,
    ReadPolicy,
    Sample,
    SkippedSample,
    is_local,
    local_path,
    open_filesystem,
    open_stream,
    read_file,
    read_range,
    read_shard,
    sibling_url,
)
from whisper_aut.errors import SkipReason, UserError, require
from whisper_aut.utils import parse_json

log = logging.getLogger(__name__)
UNKNOWN_MS = -1
UNKNOWN_BYTES = -1
INDEX_NAME = "index.json"
INDEX_VERSION = 2
# Key of the index; true if every tar has a sample table next to it.
HAS_TABLES = "sample_tables"
# Key of the index; the folder or URL of the tars, if the index is not next to them.
TARS = "tars"
UNCOUNTED = -1  # the samples of a tar that no index lists
MAX_INDEX_BYTES, MAX_TABLE_BYTES = 256 << 20, 256 << 20
TABLE_COLUMNS = 5  # tables of earlier versions lack the last one
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
        text_bytes: `[N]`, see `Annotation.text_bytes`; -1 if unknown.
    """

    starts: np.ndarray
    milliseconds: np.ndarray
    keys: np.ndarray
    licences: np.ndarray
    text_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.milliseconds)

    @classmethod
    def from_rows(
        cls, rows: Iterable[tuple[int, float | None, str, str, int]], end: int
    ) -> "SampleTable":
        """Build a table from each sample's start, length in seconds, key, licence and text bytes.

        Starts and `end` are byte offsets; a length of None is unknown.
        """
        columns = []
        for start, seconds, key, licence, text_bytes in rows:
            milliseconds = UNKNOWN_MS if seconds is None else round(seconds * 1000)
            columns.append((start, milliseconds, text_hash(key), text_hash(licence), text_bytes))
        table = np.array(columns, np.int64).reshape(-1, TABLE_COLUMNS)
        return cls(np.append(table[:, 0], end), *table[:, 1:].T)

    def to_bytes(self) -> bytes:
        """Return the table as an `.npy` file: int64 `[N + 1, 5]`, little-endian."""
        buffer = io.BytesIO()
        columns = [self.milliseconds, self.keys, self.licences, self.text_bytes]
        rows = np.stack([self.starts, *(np.append(column, 0) for column in columns)], axis=1)
        np.save(buffer, rows.astype("<i8"), allow_pickle=False)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, samples: int) -> "SampleTable":
        """Parse a table written by `to_bytes` for a tar of `samples` samples.

        Raises:
            ValueError: the table is damaged, or has another number of samples.
        """
        with _HEADER_LOCK:
            rows = np.load(io.BytesIO(data), allow_pickle=False)
        if rows.shape[1:] == (TABLE_COLUMNS - 1,):
            rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=UNKNOWN_BYTES)
        if rows.dtype.kind != "i" or rows.shape != (samples + 1, TABLE_COLUMNS):
            raise ValueError(f"a table of {rows.dtype} {rows.shape} for {samples} samples")
        starts, (milliseconds, *others) = rows[:, 0], rows[:-1, 1:].T
        if starts[0] < 0 or (np.diff(starts) <= 0).any() or (milliseconds < UNKNOWN_MS).any():
            raise ValueError("offsets that do not ascend, or negative lengths")
        return cls(starts, milliseconds, *others)


@dataclass(frozen=True)
class ShardEntry:
    """One tar of an index. `seconds` is 0 if unknown, and `sha256` is empty if not computed."""

    name: str
    samples: int
    seconds: float = 0.0
    bytes: int = 0
    sha256: str = ""


class FolderCounts:
    """Counts clips by domain, and clips and seconds by licence (as written in the annotations)."""

    def __init__(
        self,
        domains: Mapping[str, int] | None = None,
        licences: Mapping[str, dict[str, float]] | None = None,
    ) -> None:
        self.domains = Counter(domains)
        self.licences = dict(licences or {})

    def add(self, domain: str, licence: str, seconds: float, clips: int = 1) -> None:
        """Count `clips` clips with a total length of `seconds`."""
        self.domains[domain] += clips
        total = self.licences.setdefault(licence, {"clips": 0, "seconds": 0.0})
        total["clips"] += clips
        total["seconds"] += seconds

    def add_table(
        self, table: SampleTable, licences: Iterable[str], rows: np.ndarray | slice = slice(None)
    ) -> None:
        """Count the clips of a sample table, or of some of its rows, by their licence.

        `licences` are those that it may refer to; any other counts as `unknown`.
        """
        names = {text_hash(name): name for name in licences}
        stated, seconds = table.licences[rows], table.milliseconds[rows].clip(min=0) / 1000
        for licence in np.unique(stated):
            own = stated == licence
            name = names.get(int(licence), "unknown")
            self.add("", name, float(seconds[own].sum()), int(own.sum()))

    def update(self, other: "FolderCounts") -> None:
        """Add the counts of another part of the folder."""
        self.domains.update(other.domains)
        for licence, counts in other.licences.items():
            total = self.licences.setdefault(licence, {"clips": 0, "seconds": 0.0})
            for name, count in counts.items():
                total[name] += count

    def metadata(self) -> dict[str, Any]:
        """Return the counts as stored in an index."""
        licences = {
            written: {"clips": total["clips"], "seconds": round(total["seconds"], 3)}
            for written, total in self.licences.items()
        }
        return {"domains": dict(self.domains), "licences": licences}


@dataclass(frozen=True, eq=False)
class Selection:
    """The samples of a folder that a run may use."""

    ordinals: tuple[np.ndarray, ...]  # of each shard: ascending indices of its selected samples
    seconds: float
    licences: dict[str, dict[str, float]]  # clips and seconds by licence as written
    left_out: dict[str, int]  # samples by reason


@dataclass(frozen=True)
class ShardIndex:
    """The tars of one folder or URL, in order."""

    root: str  # folder or URL prefix
    shards: tuple[ShardEntry, ...]
    metadata: dict[str, Any] = field(default_factory=dict)  # everything else in the index
    pattern: str = ""  # of file names, if only some tars of the folder are used
    selection: Selection | None = None  # None for all samples
    mapping: FieldMapping | None = None  # where annotations are read from; None for the usual names
    policy: ReadPolicy = DEFAULT_POLICY  # how files at a URL are read

    @property
    def name(self) -> str:
        """The folder or URL, followed by the pattern if there is one."""
        return f"{self.root.rstrip('/')}/{self.pattern}" if self.pattern else self.root

    @property
    def tars(self) -> str:
        """The folder or URL of the tars."""
        return self.metadata.get(TARS) or self.root

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
    def sample_bytes(self) -> float:
        """Mean bytes of the tars per selected sample; 0 if unknown."""
        return sum(shard.bytes for shard in self.shards) / max(1, self.samples)

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by licence as written; a single entry `""` if they were not counted."""
        if self.selection:
            return self.selection.licences
        everything = {"": {"clips": self.samples, "seconds": self.seconds}}
        return self.metadata.get("licences") or everything

    @property
    def first_shard(self) -> int:
        """The first shard with selected samples; 0 if there is none."""
        return next((n for n, samples in enumerate(self.shard_samples) if samples), 0)

    @property
    def has_tables(self) -> bool:
        """Whether every tar has a sample table."""
        return bool(self.metadata.get(HAS_TABLES))

    def url(self, shard: int) -> str:
        """Return the path or URL of a tar."""
        return sibling_url(self.tars, self.shards[shard].name)

    def ordinals(self, shard: int) -> np.ndarray:
        """Return the indices of a shard's selected samples, ascending."""
        if self.selection:
            return self.selection.ordinals[shard]
        return np.arange(self.shards[shard].samples)

    def table(self, shard: int) -> SampleTable:
        """Read the sample table of one tar.

        Raises:
            OSError: there is no table, or it cannot be read.
            ValueError: the table is damaged or does not match the tar.
        """
        url = sibling_url(self.root, table_name(self.shards[shard].name))
        data = read_file(url, self.policy, max_bytes=MAX_TABLE_BYTES)
        return SampleTable.from_bytes(data, self.shards[shard].samples)

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sizes and checksums, but not of their location."""
        listing = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    def identities(self) -> set[str]:
        """Return the fingerprints an audit may list: of these shards and of the whole folder."""
        return {self.fingerprint(), self.metadata.get("folder", self.fingerprint())}

    def selected_fingerprint(self) -> str:
        """Return a hash of the shards and of the selection."""
        if not self.selection:
            return self.fingerprint()
        digest = hashlib.sha256()
        for ordinals in self.selection.ordinals:
            digest.update(len(ordinals).to_bytes(8) + ordinals.astype("<i8").tobytes())
        return f"{self.fingerprint()}-{digest.hexdigest()[:16]}"


def open_index(root: str | Path, policy: ReadPolicy = DEFAULT_POLICY) -> ShardIndex:
    """Read the index of a folder or URL of shards.

    If a local folder has no index, the samples of its tars are counted. A root that ends in `.tar`
    is a pattern for some tars of a folder, such as `FOLDER/train-*.tar` or
    `FOLDER/{000000..000999}.tar`. The folder's index and tables are used if they list all of them.

    Args:
        root: a folder, a URL, or a pattern.
        policy: how files at a URL are read, now and later.

    Raises:
        UserError: the folder or its tars do not exist, or the index is damaged or names missing
            tars.
    """
    root = str(root)
    folder, pattern = _split_pattern(root, (".tar",))
    patterns = _expand_braces(pattern, root) if pattern else ["*.tar"]
    build_hint = f"Build shards: whisper-aut data build MANIFEST --out {folder}"
    if is_local(folder):
        path = local_path(folder)
        if not (pattern or Path(path).exists()):
            raise UserError(f"There are no shards at {root}. {build_hint}")
        files = _file_names(LocalFileSystem(), path)
        has_index = INDEX_NAME in files
        index = _read_index(folder, policy) if has_index else ShardIndex(folder, (), policy=policy)
    else:
        # Missing tars are found when they are read: looking for them here would take one request
        # per tar.
        index, has_index = _read_index(folder, policy), True
        files = {shard.name: index.url(number) for number, shard in enumerate(index.shards)}
    if not pattern and has_index:
        missing = [shard.name for shard in index.shards if shard.name not in files]
        if missing and TARS not in index.metadata:
            raise UserError(
                f"{root}/{INDEX_NAME} names {len(missing)} shards that are missing: "
                f"{_listed(missing)}. Bring them back or rebuild."
            )
        listed = {shard.name for shard in index.shards}
        if new := sorted(one for one in files if one.endswith(".tar") and one not in listed):
            log.warning(
                f"{root}/{INDEX_NAME} does not list {_listed(new)}, so these tars are not used. "
                f"Index them: whisper-aut data index {root}"
            )
        return index
    # Braces may list 100,000 names, which are not compared with each other.
    matches = {one: [one] if one in files else fnmatch.filter(files, one) for one in patterns}
    missing = [one for one, found in matches.items() if not found]
    chosen = set().union(*matches.values())
    if not missing and chosen <= {shard.name for shard in index.shards}:
        return replace(_part_of(index, chosen), pattern=pattern)
    _check_unpacked(folder, files, (missing or patterns)[0])
    if missing:
        listed = f"{_listed(missing)} ({len(missing)} of {len(patterns)} patterns)."
        if inner := sorted(one.parent.name for one in Path(folder).glob(f"*/{INDEX_NAME}")):
            build_hint = f"Shards are in its folders {', '.join(inner)}: give one of them."
        nothing = f"{root} has neither {INDEX_NAME} nor *.tar files. {build_hint}"
        raise UserError(f"{folder} holds no {listed}" if pattern else nothing)
    entries = []
    for name in sorted(chosen):
        with open(files[name], "rb") as stream:
            samples = sum(1 for _ in MemberNames(stream))  # damage is reported by reading the tar
            entries.append(ShardEntry(name, samples, bytes=stream.seek(0, io.SEEK_END)))
    return ShardIndex(folder, tuple(entries), pattern=pattern, policy=policy)


def _split_pattern(root: str, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """Return the folder of a root, and the pattern of tars that it ends in, if any."""
    folder, _, pattern = root.rpartition("/") if root.endswith(suffixes) else (root, "", "")
    return folder or ".", pattern


def _expand_braces(pattern: str, root: str) -> list[str]:
    require("braceexpand")
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{root}: {error}.") from None


def _part_of(whole: ShardIndex, names: set[str]) -> ShardIndex:
    """Return the index of some tars of a folder, with licences counted from their tables."""
    shards = tuple(shard for shard in whole.shards if shard.name in names)
    if len(shards) == len(whole.shards):
        return whole
    part = replace(whole, shards=shards, metadata={"folder": whole.fingerprint(), TARS: whole.tars})
    if whole.has_tables:
        counts = FolderCounts()
        # If a table cannot be read, the part is used without tables.
        with suppress(OSError, ValueError):
            for number in range(len(shards)):
                counts.add_table(part.table(number), whole.licences)
            part.metadata.update({"licences": counts.metadata()["licences"], HAS_TABLES: True})
    return part


def _read_index(root: str, policy: ReadPolicy) -> ShardIndex:
    url = sibling_url(root, INDEX_NAME)
    try:
        index = parse_json(read_file(url, policy, max_bytes=MAX_INDEX_BYTES))
        if index["version"] != INDEX_VERSION:
            raise UserError(
                f"{url} has version {index['version']}; this release reads {INDEX_VERSION}. Write "
                f"it again: whisper-aut data index {root}"
            )
        shards = tuple(ShardEntry(**shard) for shard in index.pop("shards"))
    except FileNotFoundError:
        raise UserError(
            f"There is no {INDEX_NAME} at {root}, and remote tars are not read through to count "
            f"their samples at every start. Write an index: whisper-aut data index {root} "
            "[--out FOLDER]"
        ) from None
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url} is damaged ({error!r}). Delete it to have the tars counted, or rebuild."
        ) from None
    unsafe = [shard.name for shard in shards if "/" in shard.name or shard.name.startswith(".")]
    if unsafe:
        raise UserError(f"{url} names files outside its folder: {unsafe[0]!r}.")
    return ShardIndex(root, shards, index, policy=policy)


def _check_unpacked(folder: str, names: Iterable[str], pattern: str) -> None:
    """Raise an error if tars that a pattern means are there, but only compressed."""
    for name in sorted(names):
        is_match = fnmatch.fnmatchcase(name, f"{pattern}.gz") or name.endswith(".tgz")
        if is_match and unpacked_name(name) not in names:
            raise UserError(
                f"{folder}/{name} is {COMPRESSED}. Unpack the tars of the folder and index them: "
                f"whisper-aut data index {folder}"
            )


def unpacked_name(name: str) -> str:
    """Return the name of a tar without the suffix of its compression."""
    return f"{name.removesuffix('.tgz').removesuffix('.gz').removesuffix('.tar')}.tar"


def find_tars(root: str, policy: ReadPolicy = DEFAULT_POLICY) -> ShardIndex:
    """Return the tars of a folder, URL or pattern, compressed ones included, without reading them.

    Their samples are `UNCOUNTED`. Braces in a pattern are expanded without a listing, which web
    servers may not offer.

    Raises:
        UserError: there are none, or the folder cannot be listed.
    """
    folder, pattern = _split_pattern(root, TAR_SUFFIXES)
    patterns = (
        _expand_braces(pattern, root) if pattern else [f"*{suffix}" for suffix in TAR_SUFFIXES]
    )
    try:
        if is_local(root) or any(set("*?[") & set(one) for one in patterns):
            filesystem, path = open_filesystem(folder, policy)
            names = _file_names(filesystem, path)
            found = {name for one in patterns for name in fnmatch.filter(names, one)}
        else:
            names, found = patterns, set(patterns)
    except (OSError, ValueError) as error:
        raise UserError(f"The tars of {root} cannot be listed: {error}.") from None
    if not found:
        raise UserError(f"There are no tars in {root}.")
    # An unpacked tar replaces its compressed one.
    names = sorted(one for one in found if one.endswith(".tar") or unpacked_name(one) not in found)
    entries = tuple(ShardEntry(name, UNCOUNTED) for name in names)
    return ShardIndex(folder, entries, policy=policy)


def _file_names(filesystem: Any, folder: str) -> dict[str, str]:
    """Map the names of a folder's files, hidden ones excluded, to their paths."""
    paths = filesystem.ls(folder, detail=False) if filesystem.isdir(folder) else []
    names = {path.rpartition("/")[2]: path for path in paths}
    return {name: path for name, path in names.items() if not name.startswith(".")}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def iter_samples(index: ShardIndex, limits: ClipLimits) -> Iterator[Sample | SkippedSample]:
    """Yield every selected sample of an index once, in the order of the shards.

    A shard that cannot be opened or read yields one `SkippedSample`.
    """
    for number in range(len(index.shards)):
        url = index.url(number)
        wanted = set(index.ordinals(number).tolist()) if index.selection else None
        try:
            with open_stream(url, index.policy) as stream:
                for _, item in read_shard(stream, url, wanted, limits, index.mapping):
                    yield item
        except OSError as error:
            yield SkippedSample(url, "", SkipReason.BAD_TAR, str(error))


END_OF_TAR = bytes(1024)
_TABLES_LOCK = Lock()  # of all readers, which have to be picklable
MAX_CACHED_TABLES = 256
# Clips are fetched from a URL in one request if no more than `MAX_GAP_BYTES` lie between them, and
# from a disk if they are adjacent.
MAX_GAP_BYTES, MAX_REQUEST_BYTES = 1 << 20, 32 << 20


class ShardReader:
    """Reads selected samples by their byte ranges. Threads may share it.

    The ranges come from the sample tables, of which the last ones are cached. A tar without a
    table, or with one that does not match it, is scanned for them.
    """

    def __init__(self, limits: ClipLimits):
        self.limits = limits
        # Each table with the damage at which its scan ended; None if it was not scanned.
        self._tables: dict[str, tuple[SampleTable, str | None]] = {}

    def read(
        self, index: ShardIndex, locations: Mapping[int, tuple[int, int]]
    ) -> dict[int, Sample | SkippedSample]:
        """Return the sample, or why it is skipped, for every number.

        A damaged, missing or unreachable shard gives a `SkippedSample` for each missing sample.

        Args:
            index: the shards.
            locations: for each number, the index of the shard, and the index of the sample among
                the shard's selected samples.
        """
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for number, (shard, selected) in locations.items():
            by_shard.setdefault(shard, []).append((selected, number))
        found = {}
        for shard, chosen in by_shard.items():
            ordinals = index.ordinals(shard)
            numbers = {int(ordinals[selected]): number for selected, number in chosen}
            items = self._read_shard(index, shard, sorted(numbers))
            found |= {number: items[ordinal] for ordinal, number in numbers.items()}
        return found

    def _read_shard(
        self, index: ShardIndex, shard: int, ordinals: Sequence[int]
    ) -> dict[int, Sample | SkippedSample]:
        items = {}
        try:
            try:
                self._read_ranges(index, shard, self._table(index, shard), ordinals, items)
            except ValueError as error:  # the table does not match the tar
                if index.selection:  # it was computed from the table, so it is wrong too
                    hint = f"make its table again: whisper-aut data index {index.root}"
                    raise OSError(f"{error}; {hint}") from None
                self._read_ranges(index, shard, self._scan(index, shard), ordinals, items)
        except OSError as error:
            for ordinal in ordinals:
                items.setdefault(ordinal, _bad_tar(index.url(shard), ordinal, str(error)))
        return items

    def _read_ranges(
        self,
        index: ShardIndex,
        shard: int,
        scanned: tuple[SampleTable, str | None],
        ordinals: Sequence[int],
        items: dict[int, Sample | SkippedSample],
    ) -> None:
        """Add the samples to `items`. Raise a ValueError if the table does not match the tar."""
        url = index.url(shard)
        table, damage = scanned
        sizes = np.diff(table.starts)
        small = []
        for ordinal in ordinals:
            if ordinal >= len(table):
                detail = damage or "the shard ends before this sample"
                items[ordinal] = _bad_tar(url, ordinal, detail)
            elif sizes[ordinal] > self.limits.max_bytes + MAX_JSON_BYTES:
                detail = f"{sizes[ordinal]} bytes, limit {self.limits.max_bytes}"
                items[ordinal] = SkippedSample(url, f"#{ordinal}", SkipReason.TOO_LARGE, detail)
            else:
                small.append(ordinal)
        for run in _join_ranges(small, table.starts, 0 if is_local(url) else MAX_GAP_BYTES):
            start, end = int(table.starts[run[0]]), int(table.starts[run[-1] + 1])
            data = read_range(url, start, end, index.policy)
            for ordinal in run:
                begin = int(table.starts[ordinal]) - start
                sample = data[begin : begin + int(sizes[ordinal])]
                if len(sample) < sizes[ordinal]:
                    detail = f"the shard ends at byte {start + len(data)}, within this sample"
                    items[ordinal] = _bad_tar(url, ordinal, detail)
                    continue
                stream = io.BytesIO(sample + END_OF_TAR)
                parsed = list(read_shard(stream, url, None, self.limits, index.mapping))
                number, item = parsed[-1] if parsed else (-1, None)
                if item and number == 0 and text_hash(item.key) == table.keys[ordinal]:
                    items[ordinal] = item
                    continue
                other = f"another sample {item.key!r}" if item and number >= 0 else "other bytes"
                if damage is None:
                    raise ValueError(f"{url} has {other} than its table")
                detail = item.detail if isinstance(item, SkippedSample) else "the tar has changed"
                items[ordinal] = _bad_tar(url, ordinal, detail)

    def _table(self, index: ShardIndex, shard: int) -> tuple[SampleTable, str | None]:
        url = index.url(shard)
        with _TABLES_LOCK:
            if url in self._tables:
                return self._tables[url]
        if index.has_tables:
            with suppress(OSError, ValueError):
                return self._cache(url, index.table(shard), None)
        return self._scan(index, shard)

    def _scan(self, index: ShardIndex, shard: int) -> tuple[SampleTable, str | None]:
        url = index.url(shard)
        with open_stream(url, index.policy) as stream:
            scan = MemberNames(stream)
            keys = [group["__key__"] for _, group in scan]
        samples = zip(scan.starts, keys, strict=True)
        rows = ((start, None, key, "", UNKNOWN_BYTES) for start, key in samples)
        return self._cache(url, SampleTable.from_rows(rows, scan.end), scan.damage)

    def _cache(
        self, url: str, table: SampleTable, damage: str | None
    ) -> tuple[SampleTable, str | None]:
        with _TABLES_LOCK:
            if len(self._tables) >= MAX_CACHED_TABLES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[url] = table, damage
        return table, damage


def _bad_tar(url: str, ordinal: int, detail: str) -> SkippedSample:
    return SkippedSample(url, f"#{ordinal}", SkipReason.BAD_TAR, detail)


def _join_ranges(
    ordinals: Sequence[int], starts: np.ndarray, max_gap_bytes: int
) -> Iterator[list[int]]:
    """Join ascending indices of samples into ranges that are fetched together."""
    run: list[int] = []
    for ordinal in ordinals:
        if run and (
            starts[ordinal] - starts[run[-1] + 1] > max_gap_bytes
            or starts[ordinal + 1] - starts[run[0]] > MAX_REQUEST_BYTES
        ):
            yield run
            run = []
        run.append(ordinal)
    if run:
        yield run
