"""Downloads from a server that drops connections, and archives that mean ill."""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.downloads import Server, tar_of, zip_of
from whisper_aut.corpora.download import download, unpack
from whisper_aut.errors import UserError

DATA = os.urandom(300_000)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server({"a.bin": DATA})
    yield running
    running.shutdown()
    running.server_close()


def fetch(server: Server, path: Path, checksum: str = "", name: str = "a.bin") -> Path:
    return download(
        f"{server.url}/{name}", path, checksum, attempts=3, first_wait_seconds=0, progress=False
    )


def test_a_dropped_connection_resumes_where_it_was_cut(server: Server, tmp_path: Path):
    server.cut = 100_000
    digest = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    assert fetch(server, tmp_path / "a.bin", digest).read_bytes() == DATA
    assert server.asked == ["", "bytes=100000-", "bytes=200000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    fetch(server, tmp_path / "a.bin", digest)
    assert len(server.asked) == 3  # nothing is fetched twice


def test_a_later_call_resumes_too(server: Server, tmp_path: Path):
    (tmp_path / "a.bin.part").write_bytes(DATA[:120_000])
    assert fetch(server, tmp_path / "a.bin").read_bytes() == DATA
    assert server.asked == ["bytes=120000-"]
    (tmp_path / "b.bin.part").write_bytes(DATA)  # whole, but never given its name
    server.files["b.bin"] = DATA
    assert fetch(server, tmp_path / "b.bin", name="b.bin").read_bytes() == DATA


def test_an_interrupted_check_keeps_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    digest = f"sha256:{hashlib.sha256(DATA).hexdigest()}"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", interrupt)
        patch.setattr("hashlib.new", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path / "a.bin", digest)
    assert fetch(server, tmp_path / "a.bin", digest).read_bytes() == DATA
    assert server.asked == ["", f"bytes={len(DATA)}-"]  # the second is answered with 416
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path):
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path / "a.bin").read_bytes() == DATA


def test_failed_downloads_are_explained(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="is not the file that the recipe was written for"):
        fetch(server, tmp_path / "a.bin", "sha1:" + "0" * 40)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="is not a URL"):
        download("example.org/a.bin", tmp_path / "a.bin", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=len(DATA) - 1))
        with pytest.raises(UserError, match="more than is free"):
            fetch(server, tmp_path / "a.bin")
    with pytest.raises(UserError, match="404"):
        fetch(server, tmp_path / "c.bin", name="c.bin")
    server.server_close()
    server.shutdown()
    with pytest.raises(UserError, match="run the same command again"):
        fetch(server, tmp_path / "a.bin")


@pytest.mark.parametrize(("make", "name"), [(tar_of, "a.tar.gz"), (zip_of, "a.zip")])
def test_archives_unpack_once_and_only_into_their_folder(make, name: str, tmp_path: Path):
    good = make(tmp_path / name, {"x/1.wav": b"one", "x/y/2.wav": b"two", "x/.DS_Store": b"-"})
    unpack(good, tmp_path / "out")
    assert (tmp_path / "out/x/y/2.wav").read_bytes() == b"two"
    assert not (tmp_path / "out/x/.DS_Store").exists()
    (tmp_path / "out/x/1.wav").unlink()
    unpack(good, tmp_path / "out")  # it was unpacked: nothing to do
    assert not (tmp_path / "out/x/1.wav").exists()
    for evil in ("../evil.wav", "/evil.wav", "x/../../evil.wav", "..\\evil.wav"):
        with pytest.raises(UserError, match="outside"):
            unpack(make(tmp_path / f"evil-{name}", {evil: b"evil"}), tmp_path / "out")
    assert not list(tmp_path.rglob("evil.wav"))


def test_a_tar_gz_is_read_to_its_checksum(tmp_path: Path):
    archive = tar_of(tmp_path / "a.tar.gz", {"1.wav": os.urandom(5000)})
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # of the data's CRC
    with pytest.raises(UserError, match="If it is damaged, delete it and download it again"):
        unpack(archive, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".unpacked-*"))
    archive.write_bytes(whole)
    unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").glob(".unpacked-*"))


def test_links_are_not_made_and_not_followed(tmp_path: Path):
    unpack(tar_of(tmp_path / "l.tar.gz", {"passwd": b""}, tarfile.SYMTYPE), tmp_path / "out")
    assert not (tmp_path / "out/passwd").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="through a link"):
        unpack(tar_of(tmp_path / "t.tar.gz", {"link/1.wav": b"1"}), tmp_path / "out")


def test_bombs_and_damage_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whisper_aut.corpora.download.MIN_ALLOWED_BYTES", 1000)
    with pytest.raises(UserError, match="expands to more than"):
        unpack(zip_of(tmp_path / "bomb.zip", {"zeros": bytes(1_000_000)}), tmp_path / "out")
    damaged = tar_of(tmp_path / "d.tar.gz", {"1.wav": os.urandom(5000)})
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(damaged, tmp_path / "out")


def corrupt(data: bytes) -> bytes:
    """Overwrite the middle of the compressed data, headers and directory being left."""
    middle = len(data) // 2
    return data[:middle] + b"\xff" * 200 + data[middle + 200 :]


@pytest.mark.parametrize(
    ("harm", "compression"),
    [
        (lambda data: data[:2000], zipfile.ZIP_DEFLATED),
        (lambda data: b"<html>Sign in</html>", zipfile.ZIP_DEFLATED),
        (corrupt, zipfile.ZIP_DEFLATED),
        (corrupt, zipfile.ZIP_LZMA),
    ],
    ids=["cut short", "a web page", "deflate", "lzma"],
)
def test_a_damaged_zip_is_an_error_and_not_marked_as_unpacked(
    harm: Callable[[bytes], bytes], compression: int, tmp_path: Path
):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", compression) as written:
        written.writestr("1.wav", "".join(np.random.default_rng(0).choice(list("abcdef"), 20_000)))
    archive.write_bytes(harm(archive.read_bytes()))
    with pytest.raises(UserError, match="If it is damaged, delete it and download it again"):
        unpack(archive, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.wav")) + list(
        (tmp_path / "out").glob(".unpacked-*")
    )


def test_a_tar_that_was_cut_between_two_members_is_an_error(tmp_path: Path):
    folder = tmp_path / "out"
    archive = tar_of(tmp_path / "a.tar", {"a.bin": bytes(512), "b.bin": bytes(512)})
    archive.write_bytes(archive.read_bytes()[:1024])
    with pytest.raises(UserError, match=r"a\.tar cannot be unpacked"):
        unpack(archive, folder)
    assert not (folder / ".unpacked-a.tar").exists()
