"""Tars from elsewhere → the index and the tables that ours have: `whisper-aut data index FOLDER`.

In: a local folder of WebDataset tars. Out: `index.json` and one `NAME.samples.npy` a tar, beside them; the tars stay as they are.
Next: the stream reads single samples, plans batches by seconds, and reads the folder over a network.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.audio import ClipLimits, read_header
from whisper_aut.corpora.members import Group, MemberGroups, audio_and_annotation
from whisper_aut.corpora.sample_table import SampleTable, TableWriter, table_name
from whisper_aut.corpora.shards import (
    HAS_TABLES,
    INDEX_NAME,
    FolderCounts,
    ShardEntry,
    ShardIndex,
    list_tars,
    open_index,
    sample_members,
    write_index,
)
from whisper_aut.errors import SampleRefused, UserError

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
