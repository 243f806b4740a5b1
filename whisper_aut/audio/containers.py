"""Find the true end of an audio file: several files joined into one, and MP3s without a length.

libsndfile silently reads only the first of several joined files. For an MP3 without a Xing header,
it estimates the length from the bit rate of the first frame and stops there, so a recording that
begins at a high bit rate loses its end. This module detects both in the encoded bytes.
"""

import mmap
import struct
from dataclasses import dataclass

Data = bytes | mmap.mmap

RATES_HZ = (44_100, 48_000, 32_000)  # of MPEG-1; half of these in MPEG-2, a quarter in MPEG-2.5
# Bit rates of layer III, by the index in a frame header; True for MPEG-1.
KBIT = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
HEADER_INDEX = 9  # 128 or 80 kbit/s: such a frame has room for a Xing header at any sample rate
LONGEST_FRAME = 2048
MOST_TRIES = 100_000  # limit on false matches, against malicious files
# First bytes of a file: the offset and format of its size, and the bytes that the size leaves out.
SIZES = {
    b"RIFF": (4, "<I", 8),
    b"FORM": (4, ">I", 8),
    b"RF64": (20, "<Q", 8),
    b"riff": (16, "<Q", 0),  # W64
}


def find_second_file(data: Data) -> int | None:
    """Return the offset of a second file, as after `cat a.mp3 b.mp3`; None for a single file."""
    begin = _after_id3(data, 0)
    magic = data[begin : begin + 4]
    if magic in SIZES:
        at, kind, more = SIZES[magic]
        if len(data) < at + 8:
            return None
        (size,) = struct.unpack_from(kind, data, at)
        ends = (size + more, size + more + size % 2)
        return next((end for end in ends if size and data[end : end + 4] == magic), None)
    if magic == b".snd" and len(data) >= 12:
        end = sum(struct.unpack_from(">II", data, 4))
        return end if data[end : end + 4] == magic else None
    if magic == b"fLaC":
        at = begin
        while (at := data.find(magic, at + 4)) > 0:
            # The first metadata block is always STREAMINFO, 34 bytes long.
            if data[at + 5 : at + 8] == b"\0\0\x22":
                return at
        return None
    return _second_ogg(data) if magic == b"OggS" else _second_mp3(data, begin)


def add_length_header(data: Data) -> Data:
    """Add a Xing header with the number of frames to an MP3 without one.

    Any other data is returned unchanged.
    """
    begin = _after_id3(data, 0)
    first = _frame(data, begin)
    if first is None or _xing(data, begin) is not None:
        return data
    frames, end = _walk(data, begin)[:2]
    head = bytearray(data[begin : begin + 4])
    head[1] |= 1  # no checksum
    head[2] = HEADER_INDEX << 4 | head[2] & 0x0C
    made = _frame(bytes(head), 0)
    assert made is not None
    counts = struct.pack(">4sIII", b"Info", 3, frames, made.bytes + end - begin)
    xing = (bytes(head) + bytes(made.side - 4) + counts).ljust(made.bytes, b"\0")
    return xing + data[begin:]


def _second_ogg(data: Data) -> int | None:
    """Walk the pages (RFC 3533); a stream that begins after data pages is a second file."""
    at, within = 0, False
    while data[at : at + 4] == b"OggS" and len(data) >= at + 27:
        begins = bool(data[at + 5] & 2)
        if begins and within:
            return at
        within = within or not begins
        segments = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + len(segments) + sum(segments)
    return None


def _second_mp3(data: Data, begin: int) -> int | None:
    """Find a second Xing header, frames after those that it counts, or frames of another format."""
    if _frame(data, begin) is None:
        return None
    first = _xing(data, begin)
    for mark in (b"Xing", b"Info"):
        at = begin if first is None else first
        for _ in range(MOST_TRIES):
            at = data.find(mark, at + 4)
            if at < 0:
                break
            start = next((at - side for side in (36, 21, 13) if _xing(data, at - side) == at), None)
            if start is not None:
                return start
    if first is None:
        return _walk(data, begin)[2]
    if len(data) < first + 16:
        return None
    flags, *counts = struct.unpack_from(">III", data, first + 4)
    if not flags & 2:  # the header has no number of bytes
        return None
    # The number of bytes follows the number of frames, if flag 1 says that there is one.
    end = begin + counts[flags & 1]
    follows = _frame(data, _after_id3(data, end)) is not None
    return end if follows and len(data) - end > LONGEST_FRAME else None


@dataclass(frozen=True)
class _Frame:
    """A layer III frame.

    Attributes:
        bytes: length of the frame.
        side: offset of a Xing header in the frame, after the side information.
        format: version, sample rate and channels, which are equal in all frames of a file.
    """

    bytes: int
    side: int
    format: tuple[int, int, bool]


def _frame(data: Data, at: int) -> _Frame | None:
    if at < 0 or len(data) < at + 4 or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return None
    version, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 2 & 3
    kbit, padded = data[at + 2] >> 4, data[at + 2] >> 1 & 1
    if version == 1 or rate == 3 or kbit in (0, 15):  # reserved values, or a free bit rate
        return None
    is_mpeg1, is_mono = version == 3, data[at + 3] & 0xC0 == 0xC0
    rate_hz = RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    length = (144 if is_mpeg1 else 72) * KBIT[is_mpeg1][kbit] * 1000 // rate_hz + padded
    side = 4 + ((17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17))
    return _Frame(length, side, (version, rate, is_mono))


def _walk(data: Data, at: int) -> tuple[int, int, int | None]:
    """Return the number of frames of one format, their end, and where another format begins."""
    frames, end, format, tries = 0, at, None, 0
    while at >= 0 and tries < MOST_TRIES:
        frame = _frame(data, at)
        if frame is not None and (format is None or frame.format == format):
            frames, format = frames + 1, frame.format
            at = end = at + frame.bytes
            continue
        following = None if frame is None else _frame(data, at + frame.bytes)
        if frame is not None and following is not None and following.format == frame.format:
            return frames, end, at
        tries += 1  # a tag, or other bytes that look like a frame
        after = _after_id3(data, at)
        at = after if after > at else data.find(b"\xff", at + 1)
    return frames, end, None


def _after_id3(data: Data, at: int) -> int:
    """Return the end of an ID3v2 tag at `at`, or `at`; its size has seven bits per byte."""
    if data[at : at + 3] != b"ID3" or len(data) < at + 10:
        return at
    size = data[at + 6 : at + 10]
    return at + 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])


def _xing(data: Data, at: int) -> int | None:
    """Return the offset of the Xing header in the frame at `at`; None if it has none."""
    frame = _frame(data, at)
    if frame is None or data[at + frame.side : at + frame.side + 4] not in (b"Xing", b"Info"):
        return None
    return at + frame.side
