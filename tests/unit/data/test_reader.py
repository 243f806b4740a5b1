"""Tar headers that are damaged or wrong, names with dots, and how members become samples."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.reader import (
    MemberGroups,
    MemberNames,
    Sample,
    audio_and_annotation,
    read_shard,
    split_name,
)
from whisper_aut.data.shards import FolderCounts, ShardReader, open_index
from whisper_aut.data.writer import build_table
from whisper_aut.errors import SkipReason, SkipSample

LIMITS = ClipLimits(max_bytes=4096)
END = bytes(1024)


def member(name: str, body: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def negative_in_binary(size: int) -> bytes:
    info = tarfile.TarInfo("b.flac")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def negative_in_pax(size: int) -> bytes:
    info = tarfile.TarInfo("b.flac")
    info.pax_headers = {"size": str(size)}
    return info.tobuf(tarfile.PAX_FORMAT)


def negative_long_name(size: int) -> bytes:
    info = tarfile.TarInfo("b.flac")
    info.size, info.type = size, tarfile.GNUTYPE_LONGNAME
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "size", [-1, -512, -1536]
)  # the last two lead back to headers that were read already
@pytest.mark.parametrize("lie", [negative_in_binary, negative_in_pax, negative_long_name])
@pytest.mark.parametrize("wanted", [None, {0}], ids=["all", "the first"])
def test_a_negative_size_is_damage_and_neither_reads_on_nor_goes_back(
    lie: Callable[[int], bytes], size: int, wanted: set[int] | None
):
    sound = member("a.flac", b"one") + member("a.json", b"{}")
    data = sound + lie(size) + member("c.flac", bytes(9000)) + END
    groups = MemberGroups(io.BytesIO(data), LIMITS, wanted)
    found = [group for _, group in groups]
    assert [group["__key__"] for group in found] == ["a"]
    assert found[0]["flac"] == b"one"
    assert f"{size} bytes" in groups.damage
    assert [group["__key__"] for _, group in MemberNames(io.BytesIO(data))] == ["a"]


def test_the_holes_of_a_sparse_member_are_zeros():
    """GNU's old form: 512 zero bytes that are not in the file, then 512 that are."""
    header = bytearray(member("a.flac"))
    header[124:136], header[156:157] = b"%011o\0" % 512, tarfile.GNUTYPE_SPARSE
    header[257:265] = b"ustar  \0"
    header[386:434] = b"".join(b"%011o\0" % number for number in (512, 512, 1024, 0))
    header[483:495] = b"%011o\0" % 1024
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]  # pyright: ignore[reportAttributeAccessIssue]
    groups = MemberGroups(io.BytesIO(bytes(header) + b"x" * 512 + END), LIMITS)
    assert [group["flac"] for _, group in groups] == [bytes(512) + b"x" * 512]
    assert not groups.damage


def test_a_key_that_comes_twice_in_a_row_is_two_samples(tmp_path: Path):
    """Nothing is dropped, and the table says the same as a reading from the start."""
    pairs = [("0", b"first"), ("0", b"second"), ("1", b"third")]
    data = b"".join(
        member(f"{key}.wav", text) + member(f"{key}.json", b'{"text": "%s"}' % text)
        for key, text in pairs
    )
    path = tmp_path / "a.tar"
    path.write_bytes(data + END)
    table = build_table(io.BytesIO(path.read_bytes()), FolderCounts())
    with path.open("rb") as stream:
        whole = list(read_shard(stream, str(path), None, LIMITS))
    index, reader = open_index(tmp_path), ShardReader(LIMITS)
    single = [reader.read(index, {0: (0, number)})[0] for number in range(3)]
    assert [item for _, item in whole] == single
    samples = [item for _, item in whole if isinstance(item, Sample)]
    assert [(sample.key, sample.annotation.text) for sample in samples] == [
        ("0", "first"),
        ("0", "second"),
        ("1", "third"),
    ]
    assert index.samples == len(table) == 3


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a.wav", "a", "wav"),
        ("x.y/a.JSON", "x.y/a", "json"),
        ("a.seg.json", "a", "seg.json"),
        ("Track 2.0 v0.wav", "Track 2.0 v0", "wav"),
        ("2024.01.15 rain.flac", "2024.01.15 rain", "flac"),
        ("Mr. Smith.take.json", "Mr. Smith", "take.json"),
        ("README", "README", ""),
        (".hidden.wav", ".hidden.wav", ""),
    ],
)
def test_dots_in_a_name_belong_to_its_key_where_no_suffix_follows(name: str, key: str, suffix: str):
    assert split_name(name) == (key, suffix)


def test_dots_that_could_be_a_suffix_are_named_as_the_cause():
    data = member("song.v1.wav", b"one") + member("song.v1.json", b"{}") + END
    ((_, group),) = MemberGroups(io.BytesIO(data), LIMITS)
    with pytest.raises(SkipSample, match=r"'song\.v1\.wav' is the member '\.v1\.wav' of 'song'"):
        audio_and_annotation(group)


def test_a_txt_member_is_the_text_where_the_json_has_none():
    members = member("0.wav", b"one") + member("0.txt", "\ufeff a caf\u00e9\n".encode())
    ((_, group),) = MemberGroups(io.BytesIO(members + END), LIMITS)
    assert audio_and_annotation(group)[2].text == "a caf\u00e9"
    both = members + member("0.json", b'{"label": "x"}') + END
    ((_, group),) = MemberGroups(io.BytesIO(both), LIMITS)
    annotation = audio_and_annotation(group)[2]
    assert (annotation.text, annotation.label) == ("a caf\u00e9", "x")
    group["txt"] = b"\xff\xfe"
    with pytest.raises(SkipSample, match="not UTF-8") as refused:
        audio_and_annotation(group)
    assert refused.value.reason is SkipReason.BAD_JSON


def test_a_tar_that_gzip_compressed_says_so():
    groups = MemberGroups(io.BytesIO(gzip.compress(member("a.wav", b"one") + END)), LIMITS)
    assert not list(groups)
    assert "compressed with gzip" in groups.damage


def test_a_member_named_like_the_key_is_ignored():
    tar = member("a.flac", b"x") + member("a.__key__", b"y") + member("a.txt", b"a dog") + END
    ((_, sample),) = read_shard(io.BytesIO(tar), "a.tar", None, LIMITS)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.annotation.text) == ("a", "a dog")
