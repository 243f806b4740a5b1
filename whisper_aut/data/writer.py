"""Write shards: the tars, their sample tables and the index (see `shards`)."""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from webdataset.writer import TarWriter

from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits, stated_seconds
from whisper_aut.data.annotation import AUDIO_ONLY, Annotation
from whisper_aut.data.reader import (
    DEFAULT_POLICY,
    GZIP_SUFFIXES,
    MAX_EXPANSION,
    MIN_ALLOWED_BYTES,
    MemberGroups,
    ReadPolicy,
    audio_and_annotation,
    is_local,
    local_path,
    open_filesystem,
    open_stream,
    read_file,
    sibling_url,
)
from whisper_aut.data.shards import (
    HAS_TABLES,
    INDEX_NAME,
    INDEX_VERSION,
    MAX_INDEX_BYTES,
    TARS,
    UNKNOWN_BYTES,
    FolderCounts,
    SampleTable,
    ShardEntry,
    ShardIndex,
    find_tars,
    open_index,
    table_name,
    unpacked_name,
)
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.utils import atomic_path, file_sha256, parallel_map, parse_json, read_json


class ShardWriter:
    """A context manager that writes samples into tars of about `max_bytes` and then the index.

    Inside the context the tars have hidden temporary names, and earlier shards in the folder stay
    untouched. On exit the earlier tars are removed, the index is written, and the new tars are
    renamed into place, in this order. If that is interrupted, the index names missing tars and
    `open_index` raises, so an incomplete folder never looks complete.

    If the context is left with an exception, the temporary files are removed. With a `recipe`, the
    finished ones stay, also if the process is killed, and the next writer with this recipe goes on
    after them.

    Args:
        folder: where to write; created if missing.
        prefix: start of the tars' names, `PREFIX-000000.tar`.
        max_bytes: a tar is finished as soon as its members reach this size.
        recipe: identifies the samples and their order; empty if nothing is kept.
        append: keep the shards of the folder, and write more.

    Attributes:
        metadata: further metadata for the index.
        keys: hashes of the keys that need not be written again, see `text_hash`.
        resumed: number of samples in tars that an interrupted writer finished.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "shard",
        max_bytes: int = 256 << 20,
        *,
        recipe: str = "",
        append: bool = False,
    ):
        # TarWriter would read `name:` at the start of a relative path as a URL.
        self.folder = Path(folder).absolute()
        self.prefix, self.max_bytes, self.recipe, self.append = prefix, max_bytes, recipe, append
        self.metadata: dict[str, Any] = {}
        self.keys: set[int] = set()
        self.resumed = 0
        self._shards: list[ShardEntry] = []
        self._earlier = 0  # shards of the folder before this writer
        self._counts, self._tar_counts = FolderCounts(), FolderCounts()
        self._tar: TarWriter | None = None
        self._rows: list[tuple[int, float | None, str, str, int]] = []  # of the current tar
        self._bytes = 0

    def __enter__(self) -> "ShardWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.append and (self.folder / INDEX_NAME).exists():
                index = open_index(self.folder)
                self._shards, self._earlier = list(index.shards), len(index.shards)
                self._counts = FolderCounts(index.metadata["domains"], index.metadata["licences"])
                for number in range(len(index.shards)):
                    self.keys.update(index.table(number).keys.tolist())
            self._resume()
            self._remove_partial()
        except (OSError, ValueError) as error:
            detail = getattr(error, "strerror", None) or error
            raise UserError(f"Cannot write shards to {self.folder}: {detail}.") from None
        return self

    @property
    def samples(self) -> int:
        """Samples in the folder so far."""
        return len(self._rows) + sum(shard.samples for shard in self._shards)

    def write(self, key: str, suffix: str, audio: bytes, annotation: Annotation) -> None:
        """Append one sample: an encoded audio file with its suffix, such as `flac`, and its JSON.

        Dots in the key become underscores, since WebDataset would read an extension after them.
        """
        key = key.replace(".", "_")
        if self._tar is None:
            self._tar = TarWriter(str(self._partial(self._tar_name())), encoder=False, mtime=0)
        data, seconds = annotation.to_json(), annotation.duration_seconds
        row = (seconds, key, annotation.licence, annotation.text_bytes)
        self._rows.append((self._tar.tarstream.offset, *row))
        self._tar.write({"__key__": key, suffix: audio, "json": data})
        self._bytes += len(audio) + len(data)
        self._tar_counts.add(annotation.domain, annotation.licence, seconds or 0.0)
        if self._bytes >= self.max_bytes:
            self.finish_tar()

    def __exit__(self, kind: type | None, *_: object) -> None:
        keep = bool(self.recipe)
        try:
            if kind is None:
                self.finish_tar()
                self._publish()
                keep = False
        finally:
            if self._tar is not None:
                # The disk may be full. The partial tars must be removed even then.
                with suppress(OSError):
                    self._tar.close()
            self._remove_partial(keep)

    def _tar_name(self) -> str:
        return f"{self.prefix}-{len(self._shards):06d}.tar"

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _remove_partial(self, keep_finished: bool = True) -> None:
        """Remove temporary files, except those of finished tars."""
        finished = self._shards if keep_finished else []
        kept = {name for shard in finished for name in _files_of(shard.name)}
        for path in self.folder.glob(f".{self.prefix}-*.partial"):
            if path.name[1 : -len(".partial")] not in kept:
                path.unlink(missing_ok=True)

    def finish_tar(self) -> None:
        """Finish the current tar; the next sample begins a new one."""
        if self._tar is None:
            return
        name = self._tar_name()
        table = SampleTable.from_rows(self._rows, self._tar.tarstream.offset)
        self._tar.close()
        self._partial(table_name(name)).write_bytes(table.to_bytes())
        partial = self._partial(name)
        seconds = round(sum(seconds or 0.0 for _, seconds, *_ in self._rows), 3)
        size, digest = partial.stat().st_size, file_sha256(partial)
        entry = ShardEntry(name, len(self._rows), seconds, size, digest)
        if self.recipe:
            counts = [self._tar_counts.domains, self._tar_counts.licences]
            finished = {"recipe": self.recipe, "shard": asdict(entry), "counts": counts}
            self._partial(f"{name}.json").write_text(json.dumps(finished))
        self._shards.append(entry)
        self._counts.update(self._tar_counts)
        self._tar, self._rows, self._bytes, self._tar_counts = None, [], 0, FolderCounts()

    def _resume(self) -> None:
        """Keep the tars that an interrupted writer of the same recipe finished."""
        while self.recipe:
            name = self._tar_name()
            finished = read_json(self._partial(f"{name}.json"), default={})
            if finished.get("recipe") != self.recipe:
                return
            entry = ShardEntry(**finished["shard"])
            for part in (name, table_name(name)):
                if not self._partial(part).exists() and (self.folder / part).exists():
                    os.replace(self.folder / part, self._partial(part))  # it had been published
            try:
                data = self._partial(table_name(name)).read_bytes()
                table = SampleTable.from_bytes(data, entry.samples)
                if self._partial(name).stat().st_size != entry.bytes:
                    return
            except (OSError, ValueError):  # cut, or removed by hand
                return
            self.keys.update(table.keys.tolist())
            self._counts.update(FolderCounts(*finished["counts"]))
            self._shards.append(entry)
            self.resumed += entry.samples

    def _publish(self) -> None:
        new = self._shards[self._earlier :]
        metadata = {**self.metadata, **self._counts.metadata(), HAS_TABLES: True}
        if not self._earlier:
            # Removes the tars of an earlier build. Until the end, `open_index` reports missing
            # tars.
            for pattern in _files_of(f"{self.prefix}-*.tar"):
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)
            write_index(self.folder, self._shards, metadata)
        for shard in new:
            for name in (shard.name, table_name(shard.name)):
                os.replace(self._partial(name), self.folder / name)
        if self._earlier:  # until now, the folder is what it was
            write_index(self.folder, self._shards, metadata)


def _files_of(tar: str) -> tuple[str, str, str]:
    """Return the names of a tar, of its table, and of what is noted while a build is unfinished."""
    return tar, table_name(tar), f"{tar}.json"


def write_index(
    folder: str | Path, shards: Sequence[ShardEntry], metadata: Mapping[str, Any]
) -> None:
    """Write `index.json` to a folder or URL. Totals of `shards` override those in `metadata`."""
    totals = {
        "version": INDEX_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "seconds": round(sum(shard.seconds for shard in shards), 3),
        "shards": [asdict(shard) for shard in shards],
    }
    content = json.dumps({**metadata, **totals}, indent=1, ensure_ascii=False) + "\n"
    _write_file(sibling_url(str(folder), INDEX_NAME), content.encode())


# Lengths are only recorded here; each run applies its own limits.
ANY_LENGTH = ClipLimits(min_seconds=0.0, max_seconds=1e6)


def index_folder(
    root: str | Path, out: str | Path = "", *, workers: int = 1, policy: ReadPolicy = DEFAULT_POLICY
) -> ShardIndex:
    """Write the sample tables and the index of the tars of a folder, a URL or a pattern.

    Local tars are read for their checksums, remote ones once and without checksums. Compressed tars
    are unpacked. New counts replace those of an existing index. Its other metadata is kept.

    Args:
        root: see `find_tars`.
        out: folder or URL for the index, the tables and unpacked tars; by default that of the tars.
        workers: number of processes.
        policy: retries and timeouts.

    Raises:
        UserError: there are no tars, they cannot be read, or `out` cannot be written.
    """
    tars = find_tars(str(root), policy)
    target, names = str(out or tars.root), [shard.name for shard in tars.shards]
    compressed = [name for name in names if name.endswith(GZIP_SUFFIXES)]
    if target.startswith(("http://", "https://")) or (compressed and not is_local(target)):
        what = "tars are unpacked" if compressed else "the index is written"
        raise UserError(f"{target} is not a folder to which {what}. Give one with --out FOLDER.")
    elsewhere = target.rstrip("/") != tars.root.rstrip("/")
    if elsewhere and 0 < len(compressed) < len(names):
        raise UserError(f"{root} has tars and compressed tars. Index them one after the other.")
    existing: Any = {}
    with suppress(OSError, ValueError):  # an index of any version
        url = sibling_url(target, INDEX_NAME)
        existing = parse_json(read_file(url, policy, max_bytes=MAX_INDEX_BYTES))
    existing = existing if isinstance(existing, dict) else {}
    existing.pop(TARS, None)
    counts, entries = FolderCounts(), []
    try:
        if is_local(target):
            Path(local_path(target)).mkdir(parents=True, exist_ok=True)
        index_one = partial(_index_tar, folder=tars.root, target=target, policy=policy)
        # Clients of object stores do not survive a fork.
        spawn = not (is_local(tars.root) and is_local(target))
        for entry, own in parallel_map(index_one, names, min(workers, len(names)), spawn=spawn):
            entries.append(entry)
            counts.update(own)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{root} cannot be indexed: {error}.") from None
    tars_metadata = {TARS: tars.root} if elsewhere and not compressed else {}
    metadata = {**existing, **counts.metadata(), **tars_metadata, HAS_TABLES: True}
    write_index(target, entries, metadata)
    return open_index(target, policy)


def _index_tar(
    name: str, *, folder: str, target: str, policy: ReadPolicy
) -> tuple[ShardEntry, FolderCounts]:
    """Write the table of one tar, and the tar itself if it is compressed."""
    url, counts = sibling_url(folder, name), FolderCounts()
    if name.endswith(GZIP_SUFFIXES):
        name = unpacked_name(name)
        unpacked = Path(local_path(target)) / name
        archived = Path(local_path(url)).stat().st_mtime if is_local(url) else 0.0
        if not unpacked.exists() or unpacked.stat().st_mtime < archived:
            with (
                open_stream(url, policy) as stream,
                atomic_path(unpacked) as partial_path,
                partial_path.open("wb") as file,
            ):
                _unpack(stream, file)
        url = str(unpacked)
    with open_stream(url, policy) as stream:
        table = build_table(stream, counts)
        size, digest = stream.seek(0, os.SEEK_END), ""
        if is_local(url):
            stream.seek(0)
            digest = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
    _write_file(sibling_url(target, table_name(name)), table.to_bytes())
    seconds = round(float(table.milliseconds.clip(min=0).sum()) / 1000, 3)
    return ShardEntry(name, len(table), seconds, size, digest), counts


def _unpack(stream: Any, file: BinaryIO) -> None:
    written = 0
    while chunk := stream.read(1 << 20):
        written += file.write(chunk)
        if written > max(MIN_ALLOWED_BYTES, MAX_EXPANSION * stream.fileobj.tell()):
            raise OSError(f"{Path(file.name).name} is over {MAX_EXPANSION} times as large unpacked")


def _write_file(url: str, data: bytes) -> None:
    if is_local(url):
        with atomic_path(Path(local_path(url))) as path:
            path.write_bytes(data)
    else:
        filesystem, path = open_filesystem(url)
        filesystem.pipe_file(path, data)


class _Headers(MemberGroups):
    """Groups in which the body of an audio member is a file object, which has not been read."""

    damages = (tarfile.TarError, ValueError)  # a failed read is an error, not the end of the tar

    def _body(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Any:
        if suffix in AUDIO_SUFFIXES and member.size <= self.limits.max_bytes:
            return tar.extractfile(member)
        return super()._body(tar, member, suffix)


def build_table(stream: BinaryIO, counts: FolderCounts, *, audio: bool = True) -> SampleTable:
    """Read the headers and annotations of a tar, and return its sample table.

    Lengths are taken from the annotation, or else from the audio header, if `audio` is true. The
    samples are added to `counts`.

    Raises:
        OSError: the tar is damaged before its first sample.
    """
    groups, rows = _Headers(stream, ANY_LENGTH), []
    for _, group in groups:
        seconds, licence, text_bytes = None, "", UNKNOWN_BYTES
        with suppress(SkipSample):
            suffix, body, annotation = audio_and_annotation(group, AUDIO_ONLY)
            seconds, licence = annotation.duration_seconds, annotation.licence
            text_bytes = annotation.text_bytes
            if seconds is None and audio:
                with suppress(SkipSample):
                    seconds = stated_seconds(cast(Any, body), suffix, ANY_LENGTH)
            counts.add(annotation.domain, licence, seconds or 0.0)
        rows.append((seconds, group["__key__"], licence, text_bytes))
    if groups.damage and not rows:  # samples before the damage are counted
        raise OSError(f"{getattr(stream, 'name', 'tar')}: {groups.damage}")
    table = ((start, *row) for start, row in zip(groups.starts, rows, strict=True))
    return SampleTable.from_rows(table, groups.end)
