import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from whisper_aut.data import shards, writer
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.reader import MemberNames, tar_members
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError


def fill(folder: Path, samples: int = 6, audio: bytes = b"x" * 1000, **options) -> None:
    with ShardWriter(folder, **options) as shard:
        for number in range(samples):
            shard.write(
                f"clip{number}",
                "wav",
                audio,
                Annotation(text=str(number), domain="sound", duration_seconds=0.5),
            )


def fill_until_it_fails(folder: Path) -> None:
    with ShardWriter(folder, max_bytes=600) as shard:
        for annotation in (
            Annotation(text="x" * 600),
            Annotation(),
            None,
        ):  # a tar that is full, one begun, and a bug
            shard.write("a", "wav", b"1", annotation)


def tars(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".tar" in path.name)


def test_a_folder_reads_back_with_its_index_and_with_webdataset(tmp_path: Path):
    fill(tmp_path, samples=6, max_bytes=2000)
    index = open_index(tmp_path)
    assert (index.samples, index.seconds, len(index.shards)) == (6, 3.0, 3)
    assert index.metadata["domains"] == {"sound": 6}
    assert index.shards[0].bytes == (tmp_path / "shard-000000.tar").stat().st_size
    urls = [index.url(number) for number in range(3)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == [f"clip{number}" for number in range(6)]
    assert json.loads(read[3]["json"])["text"] == "3"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path):
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    assert open_index(tmp_path / "a").fingerprint() == open_index(tmp_path / "b").fingerprint()
    fill(tmp_path / "c", audio=b"y" * 1000)
    assert open_index(tmp_path / "c").fingerprint() != open_index(tmp_path / "a").fingerprint()


def test_dots_in_keys_do_not_become_extensions(tmp_path: Path):
    with ShardWriter(tmp_path) as shard:
        shard.write("a.b.c", "flac", b"1", Annotation(text="t"))
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == ["a_b_c.flac", "a_b_c.json"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(AttributeError):
        fill_until_it_fails(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_the_former_one_as_it_was(tmp_path: Path):
    fill(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AttributeError):
        fill_until_it_fails(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_build_that_is_killed_while_it_publishes_does_not_look_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replace = writer.os.replace

    def die_at_the_second_tar(source: Path, target: Path) -> None:
        if Path(target).name == "shard-000001.tar":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(writer.os, "replace", die_at_the_second_tar)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, max_bytes=1)
    with pytest.raises(UserError, match="5 shards that are missing"):
        open_index(tmp_path)


def test_a_shorter_build_removes_the_tars_of_a_longer_one(tmp_path: Path):
    (tmp_path / ".shard-000007.tar.partial").write_bytes(b"left by a killed process")
    fill(tmp_path, samples=6, max_bytes=1)
    fill(tmp_path, samples=2, max_bytes=1)
    assert tars(tmp_path) == ["shard-000000.tar", "shard-000001.tar"]


def test_a_folder_that_cannot_be_made_is_the_users_matter(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write shards to"), ShardWriter(tmp_path / "file"):
        pass


def test_an_index_that_names_a_missing_shard_says_which(tmp_path: Path):
    fill(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"names 1 shards that are missing: shard-000000\.tar"):
        open_index(tmp_path)


def test_tars_without_an_index_are_counted(tmp_path: Path):
    fill(tmp_path, samples=6, max_bytes=2000)
    (tmp_path / INDEX_NAME).unlink()
    assert [shard.samples for shard in open_index(tmp_path).shards] == [2, 2, 2]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 2}', "is damaged"),
        ('{"version": 99, "shards": []}', "has version 99"),
        ('{"version": 2, "shards": [{"name": "../x.tar", "samples": 1}]}', "outside its folder"),
        ('{"version": 2, "shards": [{"nom": "x.tar"}]}', "is damaged"),
    ],
)
def test_an_index_that_cannot_be_believed_says_so(tmp_path: Path, index: str, said: str):
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(UserError, match=said):
        open_index(tmp_path)


def test_an_index_above_the_size_limit_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(tmp_path)
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", 100)
    for root in (tmp_path, f"{tmp_path}/*.tar"):
        with pytest.raises(UserError, match="is larger than 100 bytes"):
            open_index(root)


def test_no_shards_at_all_tells_the_command_to_run(tmp_path: Path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="whisper-aut data build"):
            open_index(place)


def read_all(stream: io.IOBase, names: list[str]) -> None:
    for tar, member in tar_members(stream):
        names.append(member.name)
        assert tar.extractfile(member).read()


def test_a_truncated_tar_yields_what_is_whole_and_then_raises(tmp_path: Path):
    fill(tmp_path, samples=4)
    data = (tmp_path / "shard-000000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        third = tar.getmembers()[4].offset
    for cut in (third, third + 100, third + 600):  # at a member's edge, in its header, in its body
        names = []
        with pytest.raises(tarfile.TarError):
            read_all(io.BytesIO(data[:cut]), names)
        assert names[:4] == ["clip0.json", "clip0.wav", "clip1.json", "clip1.wav"]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path):
    fill(tmp_path, samples=4)
    data = bytearray((tmp_path / "shard-000000.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        third = tar.getmembers()[4].offset
    data[third : third + 512] = b"\x07" * 512
    with pytest.raises(tarfile.TarError, match=f"at byte {third}"):
        list(tar_members(io.BytesIO(bytes(data))))
    assert len(list(MemberNames(io.BytesIO(bytes(data))))) == 2


def test_only_regular_files_are_members():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (
            ("a.wav", tarfile.SYMTYPE),
            ("b", tarfile.DIRTYPE),
            ("c.wav", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
    file.seek(0)
    assert [member.name for _, member in tar_members(file)] == ["c.wav"]


NAMES = ("a.flac", "deep/" * 30 + "b.flac", "long" * 40 + ".flac", "ünïcode.flac", "x" * 100)


@pytest.mark.parametrize(
    "kind",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_members_are_those_that_tarfile_reads(kind: int):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for number, name in enumerate(NAMES):
            if kind == tarfile.USTAR_FORMAT and name.startswith("long"):
                continue  # has no place in such a header
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 600 * number, 1.5
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        wanted = [(member.name, tar.extractfile(member).read()) for member in tar]  # pyright: ignore[reportOptionalMemberAccess]
    buffer.seek(0)
    found = [(member.name, tar.extractfile(member).read()) for tar, member in tar_members(buffer)]  # pyright: ignore[reportOptionalMemberAccess]
    assert found == wanted


def test_a_changed_byte_in_a_header_is_damage():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.flac", "b.flac"):
            tar.addfile(tarfile.TarInfo(name))
    data = bytearray(buffer.getvalue())
    data[512] ^= 1  # the name of the second
    with pytest.raises(tarfile.TarError):
        list(tar_members(io.BytesIO(bytes(data))))
