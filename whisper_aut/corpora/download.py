"""URL → file: resumed where it was cut, compared with its checksum, never half there under its own name.

In: a URL, a place, the checksum if it is known. Out: the file; until it is whole it is called `NAME.part`. Next: `corpora.unpack`. A
connection that breaks is opened again and goes on by HTTP Range; a server that ignores ranges makes it begin anew.
"""

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import cast

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
