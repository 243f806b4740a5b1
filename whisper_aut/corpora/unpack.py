"""Archive → files, inside one folder and nowhere else.

In: a `.tar.gz`, `.tar`, `.zip` or a single file. Out: its regular files under a folder; a mark beside them once all are there, so that a
second call has nothing to do. Next: a recipe's rows. Names that lead out of the folder, links, devices and archives that swell beyond
reason are refused.
"""

import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from whisper_aut.errors import UserError

MAX_SWELLING = 100  # of the archive's size: audio hardly shrinks, a bomb does
MIN_ALLOWED_BYTES = 1 << 30
MAX_MEMBERS = 20_000_000

DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, OSError
)  # fmt: skip

Member = tuple[str, int, Callable[[], IO[bytes] | None]]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack `archive` under `folder`, unless it has been before.

    Raises:
        UserError: damaged, a member that would land elsewhere, too large, or the disk is full.
    """
    mark = folder / f".unpacked-{archive.name}"
    stamp = f"{archive.stat().st_size} {archive.stat().st_mtime_ns}"
    if mark.exists() and mark.read_text() == stamp:
        return
    allowed = max(MIN_ALLOWED_BYTES, MAX_SWELLING * archive.stat().st_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, size, open_member) in enumerate(_members(archive)):
            allowed -= size
            if allowed < 0 or number >= MAX_MEMBERS:
                raise UserError(
                    f"{archive} swells beyond {MAX_SWELLING} times its size: not unpacked further."
                )
            if size > shutil.disk_usage(folder).free:
                raise UserError(f"{folder} has no room for {name} of {archive} ({size} bytes).")
            _write(folder, name, size, open_member, archive)
        mark.write_text(stamp)
    except DAMAGE as error:
        raise UserError(
            f"{archive} cannot be unpacked to {folder}: {error}. If it is damaged, delete it and fetch it again."
        ) from None


def _members(archive: Path) -> Iterator[Member]:
    if archive.name.lower().endswith(".zip") or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
                if not info.is_dir() and not is_link:
                    yield info.filename, info.file_size, lambda info=info: opened.open(info)
    elif archive.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        # tarfile's own gzip does not look at the checksum behind the data; gzip does, once all of it is read.
        with gzip.open(archive) if archive.name.endswith("gz") else archive.open("rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|*") as opened:
                for member in opened:
                    if member.isreg():
                        yield (
                            member.name,
                            member.size,
                            lambda member=member: opened.extractfile(member),
                        )
                    opened.members = []  # pyright: ignore[reportAttributeAccessIssue] (it would keep every header)
            while stream.read(1 << 20):
                pass
    else:
        yield archive.name, archive.stat().st_size, lambda: archive.open("rb")


def _write(
    folder: Path, name: str, size: int, open_member: Callable[[], IO[bytes] | None], archive: Path
) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in name:
        raise UserError(
            f"{archive} holds {name!r}, which would be written outside {folder}. Not unpacked: is it the right file?"
        )
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        return
    path = folder.joinpath(*parts)
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{archive}: {name!r} would be written through a link that leads out of {folder}."
        )
    if path.is_file() and path.stat().st_size == size:  # of an unpacking that was cut short
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    source = open_member()
    if source is None:
        return
    with source, partial.open("wb") as file:
        written = 0
        while chunk := source.read(1 << 20):
            written += len(chunk)
            if written > size:
                raise UserError(f"{archive}: {name!r} is longer than it says.")
            file.write(chunk)
    os.replace(partial, path)
