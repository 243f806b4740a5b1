"""Write shards: the tars, their sample tables and the index (see `shards`)."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem
from webdataset.writer import TarWriter

from whisper_aut.audio.decode import ClipLimits, read_header
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.reader import MemberGroups, audio_and_annotation, scan_tar
from whisper_aut.data.shards import (
    HAS_TABLES,
    INDEX_NAME,
    INDEX_VERSION,
    FolderCounts,
    SampleTable,
    ShardEntry,
    ShardIndex,
    list_tars,
    open_index,
    table_name,
)
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.utils import write_json


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

    Attributes:
        metadata: further metadata for the index.
    """

    def __init__(self, folder: str | Path, prefix: str = "shard", max_bytes: int = 256 << 20):
        # TarWriter would read `name:` at the start of a relative path as a URL.
        self.folder = Path(folder).absolute()
        self.prefix, self.max_bytes = prefix, max_bytes
        self.metadata: dict[str, Any] = {}
        self._shards: list[ShardEntry] = []
        self._counts = FolderCounts()
        self._tar: TarWriter | None = None
        self._rows: list[tuple[int, float | None, str, str]] = []  # of the current tar
        self._bytes = 0

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
        return len(self._rows) + sum(shard.samples for shard in self._shards)

    def write(self, key: str, suffix: str, audio: bytes, annotation: Annotation) -> None:
        """Append one sample: an encoded audio file with its suffix, such as `flac`, and its JSON.

        Dots in the key become underscores, since WebDataset would read an extension after them.
        """
        key = key.replace(".", "_")
        if self._tar is None:
            self._tar = TarWriter(str(self._partial(self._tar_name())), encoder=False, mtime=0)
        data, seconds = annotation.to_json(), annotation.duration_seconds
        self._rows.append((self._tar.tarstream.offset, seconds, key, annotation.licence))
        self._tar.write({"__key__": key, suffix: audio, "json": data})
        self._bytes += len(audio) + len(data)
        self._counts.add(annotation.domain, annotation.licence, seconds or 0.0)
        if self._bytes >= self.max_bytes:
            self.finish_tar()

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish_tar()
                self._publish()
        finally:
            if self._tar is not None:
                # The disk may be full. The partial tars must be removed even then.
                with suppress(OSError):
                    self._tar.close()
            self._remove_partial()

    def _tar_name(self) -> str:
        return f"{self.prefix}-{len(self._shards):06d}.tar"

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink(missing_ok=True)

    def _remove_partial(self) -> None:
        for name in (f"{self.prefix}-*.tar", table_name(f"{self.prefix}-*.tar")):
            self._remove(f".{name}.partial")

    def finish_tar(self) -> None:
        """Finish the current tar; the next sample begins a new one."""
        if self._tar is None:
            return
        name = self._tar_name()
        table = SampleTable.from_rows(self._rows, self._tar.tarstream.offset)
        self._tar.close()
        self._partial(table_name(name)).write_bytes(table.to_bytes())
        partial = self._partial(name)
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        seconds = round(sum(seconds or 0.0 for _, seconds, *_ in self._rows), 3)
        size = partial.stat().st_size
        self._shards.append(ShardEntry(name, len(self._rows), seconds, size, digest))
        self._tar, self._rows, self._bytes = None, [], 0

    def _publish(self) -> None:
        # Removes the tars of an earlier build. Until the end, `open_index` reports missing tars.
        for name in (f"{self.prefix}-*.tar", table_name(f"{self.prefix}-*.tar")):
            self._remove(name)
        metadata = {**self.metadata, **self._counts.metadata(), HAS_TABLES: True}
        write_index(self.folder, self._shards, metadata)
        for shard in self._shards:
            for name in (shard.name, table_name(shard.name)):
                os.replace(self._partial(name), self.folder / name)


def write_index(folder: Path, shards: Sequence[ShardEntry], metadata: Mapping[str, Any]) -> None:
    """Write `index.json` atomically. Values computed from `shards` override those in `metadata`."""
    totals = {
        "version": INDEX_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "seconds": round(sum(shard.seconds for shard in shards), 3),
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX_NAME, {**metadata, **totals})


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
    existing: Any = {}
    with suppress(OSError, ValueError):  # an index of any version
        existing = json.loads((folder / INDEX_NAME).read_bytes())
    counts, entries = FolderCounts(), []
    try:
        for tar in tars:
            with tar.open("rb") as stream:
                table = build_table(stream, counts)
                stream.seek(0)
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            (folder / table_name(tar.name)).write_bytes(table.to_bytes())
            seconds = round(float(table.milliseconds.clip(min=0).sum()) / 1000, 3)
            size = tar.stat().st_size
            entries.append(ShardEntry(tar.name, len(table), seconds, size, digest))
    except OSError as error:
        raise UserError(f"{folder} cannot be indexed: {error}.") from None
    existing = existing if isinstance(existing, dict) else {}
    write_index(folder, entries, {**existing, **counts.metadata(), HAS_TABLES: True})
    return open_index(folder)


def build_table(stream: BinaryIO, counts: FolderCounts, *, audio: bool = True) -> SampleTable:
    """Read a whole tar and return its sample table.

    Lengths are taken from the annotation, or else from the audio header, if `audio` is true. The
    samples are added to `counts`.

    Raises:
        OSError: the tar is damaged before its first sample.
    """
    starts, keys, end, damage = scan_tar(stream)
    if damage and not starts:  # samples before the damage are counted
        raise OSError(f"{getattr(stream, 'name', 'tar')}: {damage}")
    lengths: list[float | None] = [None] * len(starts)
    licences = [""] * len(starts)
    stream.seek(0)
    for number, group in MemberGroups(stream, ANY_LENGTH, None, None if audio else {"json", "txt"}):
        with suppress(SkipSample):
            _, encoded, annotation = audio_and_annotation(group)
            seconds = annotation.duration_seconds
            if seconds is None and audio:
                with suppress(SkipSample):
                    seconds = read_header(encoded, ANY_LENGTH).seconds
            lengths[number], licences[number] = seconds, annotation.licence
            counts.add(annotation.domain, annotation.licence, seconds or 0.0)
    return SampleTable.from_rows(zip(starts, lengths, keys, licences, strict=True), end)
