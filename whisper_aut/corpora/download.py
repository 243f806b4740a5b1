"""Download files with resume and checksums, and unpack archives safely."""

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
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from whisper_aut import __version__
from whisper_aut.data.reader import MAX_EXPANSION, MIN_ALLOWED_BYTES, StrictHeader
from whisper_aut.errors import UserError
from whisper_aut.utils import progress_bar

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
MAX_MEMBERS = 20_000_000
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
DAMAGE += (NotImplementedError, RuntimeError)  # zip compression or encryption that is not supported

Member = tuple[str, int, Callable[[], IO[bytes] | None]]


def download_dataset(name: str) -> Path:
    """Download the parquet files of a dataset on the Hugging Face hub, and return their folder.

    Args:
        name: `hf://ORG/NAME`, or `hf://ORG/NAME/FOLDER` for a part of it. For datasets in another
            form, the hub's own conversion to parquet is used.

    Raises:
        UserError: there is no such dataset, or the hub cannot be reached.
    """
    organisation, _, rest = name.removeprefix("hf://").partition("/")
    dataset, _, folder = rest.partition("/")
    patterns = [f"{folder}/**.parquet" if folder else "*.parquet"]
    try:
        for revision in (None, "refs/convert/parquet"):
            root = snapshot_download(
                f"{organisation}/{dataset}",
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
            )
            if next(Path(root, folder).rglob("*.parquet"), None):
                return Path(root, folder)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(f"{name} cannot be downloaded: {str(error).splitlines()[0]}") from None
    raise UserError(f"{name} has no parquet files.")


def download(
    url: str,
    path: Path,
    checksum: str = "",
    *,
    attempts: int = 8,
    first_wait_seconds: float = 1.0,
    progress: bool = True,
) -> Path:
    """Download `url` to `path`, unless a file with this checksum is there; return `path`.

    Args:
        url: what to download.
        path: where to write it.
        checksum: `sha256:…`, `sha1:…` or `md5:…`; empty for no check.
        attempts: number of failed attempts in a row after which to give up. An attempt that
            received data does not count.
        first_wait_seconds: wait after the first failed attempt; doubled each time, at most 60 s.
        progress: whether to show a progress bar.

    Raises:
        UserError: the server rejects the request or cannot be reached, the disk is full, or the
            checksum differs.
    """
    if "://" not in url:
        raise UserError(f"{url} is not a URL such as https://host/folder/file.zip.")
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists() and _digest(path, checksum) == checksum:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _download_part(url, part, attempts, first_wait_seconds, progress)
        # An interruption from here on keeps the part, and the next call only checks it.
        if (found := _digest(part, checksum)) != checksum:
            part.unlink()
            raise UserError(
                f"{url} is not the file that the recipe was written for: its checksum is {found}, "
                f"expected {checksum}. If it happens again, the publisher has changed the file."
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path


def _digest(path: Path, checksum: str) -> str:
    """Return the checksum of a file in the form of `checksum`; empty if that is empty."""
    if not checksum:
        return ""
    algorithm = checksum.partition(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _download_part(
    url: str, part: Path, attempts: int, first_wait_seconds: float, progress: bool
) -> None:
    """Download into `part` with Range requests, after what is in it already."""
    failures = 0
    while True:
        size = _size(part)
        try:
            if _append(url, part, progress):
                return
            problem = "the connection was closed early"
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}"
            if error.code == 416:
                if error.headers.get("Content-Range", "").endswith(f"/{size}"):
                    return  # an earlier download was interrupted before it was checked
                part.unlink()  # longer than the server's file, so it is part of another file
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(
                    f"{url} cannot be downloaded: {problem}. Check the address, or name another "
                    "server with --mirror."
                ) from None
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > size else failures + 1
        if failures == attempts:
            raise UserError(
                f"{url} could not be downloaded in {failures} attempts: {problem}. "
                f"{_size(part)} bytes are in {part}: run the same command again to resume."
            )
        time.sleep(min(60.0, first_wait_seconds * 2**failures))


def _append(url: str, part: Path, progress: bool) -> bool:
    """Append what the server sends; return whether the file is complete."""
    start = _size(part)
    headers = {"User-Agent": f"whisper-aut/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    response: HTTPResponse
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        resumed = response.status == 206  # some servers ignore Range and send everything
        start = start if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        if total is not None and total - start > shutil.disk_usage(part.parent).free:
            raise UserError(f"{url} has {total / 1e9:.1f} GB, more than is free in {part.parent}.")
        with part.open("ab" if resumed else "wb") as file, progress_bar(progress) as bar:
            mebibytes = None if total is None else total >> 20
            task = bar.add_task(f"{part.stem}, MiB", total=mebibytes, completed=start >> 20)
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.advance(task, len(chunk) / 2**20)
    return total is None or _size(part) >= total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
    allowed = max(MIN_ALLOWED_BYTES, MAX_EXPANSION * archive.stat().st_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, size, open_member) in enumerate(_members(archive)):
            allowed -= size
            if allowed < 0 or number >= MAX_MEMBERS:
                raise UserError(
                    f"{archive} expands to more than {MAX_EXPANSION} times its size. Unpacking "
                    "stopped: check that it is the right file."
                )
            path = _target(name, folder, archive)
            source = open_member() if path else None
            if path and source:  # zipfile and tarfile read at most `size` bytes
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.partial")
                with source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK_BYTES)
                os.replace(temporary, path)
        mark.write_text(stamp)
    except DAMAGE as error:
        raise UserError(
            f"{archive} cannot be unpacked to {folder}: {error}. If it is damaged, delete it and "
            "download it again."
        ) from None


def _members(archive: Path) -> Iterator[Member]:
    """Yield the name, the size and a function that opens each regular file of an archive."""
    if archive.name.lower().endswith(".zip") or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
                if not info.is_dir() and not is_link:
                    yield info.filename, info.file_size, partial(opened.open, info)
    elif archive.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        # tarfile's own gzip reader ignores the checksum after the data. The gzip module verifies it
        # when the stream is read to its end.
        with gzip.open(archive) if archive.name.endswith("gz") else archive.open("rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictHeader) as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, member.size, partial(tar.extractfile, member)
                    # Otherwise tarfile keeps every header in memory.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            while stream.read(CHUNK_BYTES):
                pass
    else:
        yield archive.name, archive.stat().st_size, partial(archive.open, "rb")


def _target(name: str, folder: Path, archive: Path) -> Path | None:
    """Return where in `folder` to write a member, or None to leave it out."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in name:
        raise UserError(
            f"{archive} holds {name!r}, which would be written outside {folder}. Unpacking "
            "stopped: check that it is the right file."
        )
    if parts[-1].startswith(".") or "__MACOSX" in parts:
        return None
    path = folder.joinpath(*parts)
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{archive}: {name!r} would be written through a link that leads out of {folder}."
        )
    return path
