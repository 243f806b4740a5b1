"""Download files with resume and checksums, and unpack archives safely.

A file is called `NAME.part` until it is complete and its checksum is verified. A broken connection
is resumed with an HTTP Range request; if the server ignores ranges, the download starts over.
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
    """Download `url` to `path`, resuming from what an earlier call left.

    An existing file is only checked against `checksum`.

    Args:
        url: what to download.
        path: where to write it.
        checksum: `sha256:…`, `sha1:…` or `md5:…`; empty for no check.
        attempts: failed attempts in a row after which to give up. An attempt that received data
            does not count.
        first_wait_seconds: base of the exponential backoff. After n failed attempts in a row the
            wait is `first_wait_seconds * 2**n`, at most 60 seconds.
        progress: whether to show a progress bar.

    Returns:
        `path`.

    Raises:
        UserError: the server rejects the request or cannot be reached, the disk is full, or the
            checksum differs.
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
    """Retry until the file is complete; an attempt that received data does not count as failed."""
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
                    f"{url} answers {error.code} {error.reason}. Is the address still right? "
                    "--mirror names another."
                ) from None
            fault = f"{error.code} {error.reason}"
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            fault = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        if failures >= attempts:
            raise UserError(
                f"{url} could not be fetched ({fault}, {attempts} attempts in a row). "
                f"{_size(part)} bytes are kept in {part}: run the same command again to go on."
            )
        time.sleep(min(60.0, wait_seconds * 2**failures))


def _fetch(url: str, part: Path, bar: Progress) -> bool:
    """Append what the server sends; return whether the file is complete."""
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
        # The local part is longer than the server's file, so it is part of another file.
        if error.code == 416:
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
            f"{path} is not the file that the recipe was written for: {kind} {found}, expected "
            f"{expected}. Delete it to fetch it again from {url}; if it comes out the same, the "
            "publisher has changed it."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# Largest unpacked size as a multiple of the archive's: audio compresses little, a zip bomb a lot.
MAX_SWELLING = 100
MIN_ALLOWED_BYTES = 1 << 30
MAX_MEMBERS = 20_000_000

DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    EOFError, NotImplementedError, RuntimeError, OSError
)  # fmt: skip

Member = tuple[str, int, Callable[[], IO[bytes] | None]]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into `folder`, unless an earlier call did.

    Any other file is copied. Hidden files, links and `__MACOSX` folders are left out.

    Raises:
        UserError: the archive is damaged, a member would be written outside `folder`, the unpacked
            size is too large, or the disk is full.
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
            f"{archive} cannot be unpacked to {folder}: {error}. If it is damaged, delete it and "
            "fetch it again."
        ) from None


def _members(archive: Path) -> Iterator[Member]:
    if archive.name.lower().endswith(".zip") or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
                if not info.is_dir() and not is_link:
                    yield info.filename, info.file_size, lambda info=info: opened.open(info)
    elif archive.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        # tarfile's own gzip reader ignores the checksum after the data. The gzip module verifies it
        # once the stream has been read to the end.
        with gzip.open(archive) if archive.name.endswith("gz") else archive.open("rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|*") as opened:
                for member in opened:
                    if member.isreg():
                        yield (
                            member.name,
                            member.size,
                            lambda member=member: opened.extractfile(member),
                        )
                    # Otherwise tarfile keeps every header in memory.
                    opened.members = []  # pyright: ignore[reportAttributeAccessIssue]
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
            f"{archive} holds {name!r}, which would be written outside {folder}. Not unpacked: is "
            "it the right file?"
        )
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        return
    path = folder.joinpath(*parts)
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{archive}: {name!r} would be written through a link that leads out of {folder}."
        )
    if path.is_file() and path.stat().st_size == size:  # written before an interruption
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
