"""URL → file: resumed where it was cut, compared with its checksum, never half there under its own name.

In: a URL, a place, the checksum if it is known. Out: the file; until it is whole it is called `NAME.part`. Next: `corpora.unpack`. A
connection that breaks is opened again and goes on by HTTP Range; a server that ignores ranges makes it begin anew.
"""

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from whisper_aut import __version__
from whisper_aut.errors import UserError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
FATAL_STATUS = range(400, 500)


def download(
    url: str,
    path: Path,
    checksum: str = "",
    *,
    attempts: int = 8,
    first_wait_seconds: float = 1.0,
    progress: bool = True,
) -> Path:
    """Fetch `url` to `path`, or go on with what an earlier call left; a file that is there and right is left alone.

    Raises:
        UserError: the server refuses or stays away, the disk is full, or the file is not the one that `checksum` names.
    """
    if path.exists():
        _check(path, checksum, url)
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            bar.add_task(path.name, total=None)
            _persist(url, part, bar, attempts, first_wait_seconds)
        _check(part, checksum, url)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path


def _persist(url: str, part: Path, bar: Progress, attempts: int, wait_seconds: float) -> None:
    """Try until the file is whole; an attempt that brought something does not count."""
    failures = 0
    while True:
        before = _size(part)
        try:
            if _fetch(url, part, bar):
                return
            fault = "the connection broke"
        except urllib.error.HTTPError as error:
            if error.code in FATAL_STATUS and error.code not in (408, 429):
                raise UserError(
                    f"{url} answers {error.code} {error.reason}. Is the address still right? --mirror names another."
                ) from None
            fault = f"{error.code} {error.reason}"
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            fault = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        if failures >= attempts:
            raise UserError(
                f"{url} could not be fetched ({fault}, {attempts} attempts in a row). {_size(part)} bytes are kept in {part}: run "
                "the same command again to go on."
            )
        time.sleep(min(60.0, wait_seconds * 2**failures))


def _fetch(url: str, part: Path, bar: Progress) -> bool:
    """Append what the server sends; return whether that was all of it."""
    have = _size(part)
    request = urllib.request.Request(
        url, headers={"User-Agent": f"whisper-aut/{__version__}", "Accept-Encoding": "identity"}
    )
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = cast(HTTPResponse, urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS))
    except urllib.error.HTTPError as error:
        total = (
            error.headers.get("Content-Range", "").rpartition("/")[2] if error.code == 416 else ""
        )
        if total.isdecimal() and int(total) == have:
            return True
        if (
            error.code == 416
        ):  # what is there is longer than what the server has: it is of something else
            part.unlink()
            return False
        raise
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        if total is not None and total - have > shutil.disk_usage(part.parent).free:
            raise UserError(f"{url} is {total / 1e9:.1f} GB, more than is free in {part.parent}.")
        bar.update(bar.task_ids[0], total=total, completed=have)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.advance(bar.task_ids[0], len(chunk))
    return total is None or _size(part) >= total


def _check(path: Path, checksum: str, url: str) -> None:
    if not checksum:
        return
    kind, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise UserError(
            f"{path} is not the file that the recipe was written for: {kind} {found}, expected {expected}. Delete it to fetch it "
            f"again from {url}; if it comes out the same, the publisher has changed it."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
