"""Tars from elsewhere → the index and the tables that ours have: `whisper-aut data index FOLDER`.

In: a local folder of WebDataset tars. Out: `index.json` and one `NAME.samples.npy` a tar, beside them; the tars stay as they are.
Next: the stream reads single samples, plans batches by seconds, and reads the folder over a network.
"""

import hashlib
import tarfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from whisper_aut.corpora.audio import ClipLimits, read_header
from whisper_aut.corpora.members import Group, MemberGroups, audio_and_annotation
from whisper_aut.corpora.sample_table import SampleTable, TableWriter, table_name
from whisper_aut.corpora.shards import (
    HAS_TABLES,
    INDEX_NAME,
    ShardEntry,
    ShardIndex,
    list_tars,
    open_index,
    sample_members,
    write_index,
)
from whisper_aut.errors import SampleRefused, UserError

TAR_BLOCK_BYTES = 512
ANY_LENGTH = ClipLimits(
    min_seconds=0.0, max_seconds=1e6
)  # lengths are written down here, and judged by the run


def index_folder(folder: Path) -> ShardIndex:
    """Write tables and index of a folder of tars; what an index held besides its shards stays.

    Raises:
        UserError: no folder, no tars, or not writable.
    """
    tars = [Path(tar) for tar in list_tars(LocalFileSystem(), str(folder.absolute()))]
    if not tars:
        raise UserError(f"There are no tars in {folder} to index.")
    facts = dict(open_index(folder).facts) if (folder / INDEX_NAME).exists() else {}
    domains: Counter[str] = Counter()
    entries = []
    try:
        for tar in tars:
            table = table_of(tar, domains)
            (folder / table_name(tar.name)).write_bytes(table.to_bytes())
            with tar.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            seconds = float(table.milliseconds.clip(min=0).sum()) / 1000
            entries.append(
                ShardEntry(tar.name, len(table), round(seconds, 3), tar.stat().st_size, digest)
            )
        facts = {
            name: value
            for name, value in facts.items()
            if name not in ("version", "samples", "seconds")
        }
        write_index(folder, entries, {"domains": dict(domains), **facts, HAS_TABLES: True})
    except OSError as error:
        raise UserError(f"{folder} cannot be indexed: {error}.") from None
    return open_index(folder)


def table_of(tar: Path, domains: Counter[str]) -> SampleTable:
    """Read one tar through: where each sample starts, and how long its audio is by its annotation, else by its header."""
    with tar.open("rb") as stream:
        starts, end = _starts(stream)
        stream.seek(0)
        lengths = {
            number: _seconds(group, domains) for number, group in MemberGroups(stream, ANY_LENGTH)
        }
    writer = TableWriter()
    for number, start in enumerate(starts):
        writer.add(start, lengths.get(number))
    return writer.finish(end)


def _starts(stream: BinaryIO) -> tuple[list[int], int]:
    starts: list[int] = []
    end = 0
    try:
        for ordinal, _, _, _, member in sample_members(stream):
            if ordinal == len(starts):
                starts.append(member.offset)
            end = member.offset_data + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    except (tarfile.TarError, ValueError) as error:  # what stands before the damage is counted
        if not starts:
            raise OSError(f"{getattr(stream, 'name', 'tar')}: {error}") from None
    return starts, end


def _seconds(group: Group, domains: Counter[str]) -> float | None:
    try:
        _, audio, annotation = audio_and_annotation(group)
        domains[annotation.domain] += 1
        stated = annotation.duration_seconds
        return read_header(audio, ANY_LENGTH).seconds if stated is None else stated
    except SampleRefused:
        return None
