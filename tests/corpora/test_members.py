"""corpora.members: what tar headers may say."""

import io
import tarfile
from collections.abc import Callable

import pytest

from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.members import MemberGroups
from whisper_aut.corpora.shards import count_samples

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
    assert count_samples(io.BytesIO(data)) == 1


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
