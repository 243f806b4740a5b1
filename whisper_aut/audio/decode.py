"""Decode audio to mono 16 kHz, with limits on every size that are checked before decoding.

Decoding uses libsndfile through soundfile. Surround sound is mixed down with the weights of ITU-R
BS.775-3 (https://www.itu.int/rec/R-REC-BS.775) if the order of the channels is known: FLAC, Ogg and
Opus define it, and an extensible WAV states it. In all other cases, such as stereo or a plain WAV
of several microphones, the channels are averaged.

libsndfile silently reads only the first of several files that were joined into one. For an MP3
without a Xing header, it estimates the length from the bit rate of the first frame and stops there,
so a recording that begins at a high bit rate loses its end. Both are detected in the encoded bytes.
"""

import io
import mmap
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr
import torch

from whisper_aut.errors import MissingModule, SkipReason, SkipSample

Data = bytes | mmap.mmap
ChoosePart = Callable[[float], tuple[float, float]]
LongClips = Literal["trim", "crop", "chunk", "skip"]  # see `data.targets.choose_part`
SAMPLE_RATE_HZ = 16_000
AV_SUFFIXES = ("m4a", "mp4", "aac", "webm")  # see `as_soundfile`
AUDIO_SUFFIXES = ("flac", "wav", "ogg", "mp3", "opus", *AV_SUFFIXES)
ROUNDING_SECONDS = 5e-4  # codecs and resamplers round a 30 s clip by a sample
SLACK_SECONDS = 0.1  # a segment or a clip may end this much after the end of its file
TRIM_SECONDS = 0.5  # a training clip that is too long by up to this loses its end
MAX_CHANNELS = 32
MAX_SAMPLE_RATE_HZ = 768_000
MIN_SAMPLE_RATE_HZ = 1_000
# libsndfile's SF_COUNT_MAX: a FLAC file that was written to a pipe does not state its length.
UNKNOWN_FRAMES = 2**63 - 1
# +12 dB over full scale. Larger floats are most likely integers that were never divided.
MAX_PEAK = 4.0

# Channels in file order: L, R front; C centre; S surround; B back centre; X low frequencies.
FLAC_LAYOUTS = ("LRC", "LRSS", "LRCSS", "LRCXSS", "LRCXBSS", "LRCXSSSS")  # RFC 9639, 9.1.3
VORBIS_LAYOUTS = ("LCR", "LRSS", "LCRSS", "LCRSSX", "LCRSSBX", "LCRSSSSX")  # Vorbis I, 4.3.9
WAVE_MASK_BITS = "LRCXSSLRBSS"  # dwChannelMask of WAVEFORMATEXTENSIBLE, from the lowest bit
HALF_POWER = 0.5**0.5
# Mix to stereo by BS.775-3 (centre and surrounds at -3 dB, no low frequencies), then average.
DOWNMIX = {"L": 0.5, "R": 0.5, "C": HALF_POWER, "S": HALF_POWER / 2, "B": 0.5, "X": 0.0}


@dataclass(frozen=True)
class ClipLimits:
    """Limits on accepted clips, inclusive."""

    min_seconds: float = 0.1
    max_seconds: float = 30.0
    max_bytes: int = 64 << 20  # of the encoded file
    # A clip is silent if its mix-down stays below this (full scale is 1). The default is just above
    # half a 16-bit step, the rounding error that remains when channels of opposite phase are
    # averaged.
    silence_peak: float = 2e-5


# For clips that an encoder processes in windows; training clips fit into one.
LONG_CLIPS = ClipLimits(max_seconds=3600.0, max_bytes=1 << 30)


@dataclass(frozen=True)
class Clip:
    """Decoded audio: mono `samples`, float32 `[S]`, at the sample rate of the file."""

    samples: np.ndarray
    sample_rate_hz: int
    codec: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate_hz


@dataclass(frozen=True)
class Header:
    """Metadata from the header of an encoded clip; `seconds` is None if it is not stated."""

    sample_rate_hz: int
    channels: int
    codec: str
    seconds: float | None


class _Recording(soundfile.SoundFile):
    """Reads without seeking where libsndfile cannot: in a stream of unknown length."""

    def seekable(self) -> bool:
        return self.frames != UNKNOWN_FRAMES and super().seekable()


def decode(data: bytes, limits: ClipLimits, choose: ChoosePart | None = None) -> Clip:
    """Decode one clip to mono, trusting neither its header nor its samples.

    A clip whose header states more audio than the limit is rejected before it is decoded. Decoding
    stops one second after the limit, whatever the header states.

    Args:
        data: the encoded clip.
        limits: limits on what is decoded.
        choose: maps the duration of the clip to the part to decode, its start and its duration, all
            in seconds; by default the whole clip.

    Raises:
        SkipSample: the clip is empty, too large, undecodable, shorter than its header states,
            several files joined together, outside the duration limits, or silent after the
            mix-down; or it has samples that are not finite or far above full scale.
    """
    # A part may be anywhere in the clip.
    data = as_soundfile(data, LONG_CLIPS if choose else limits)
    with _open_encoded(data, limits) as file:
        _check_format(file)
        # One second more than the limit shows that a clip is too long, and bounds the cost of a
        # wrong header.
        frames, stated = int((limits.max_seconds + 1) * file.samplerate), 0
        if file.frames != UNKNOWN_FRAMES:
            seconds = file.frames / file.samplerate
            start, length = choose(seconds) if choose else (0.0, seconds)
            _check_seconds(length, limits)
            if start:
                file.seek(round(start * file.samplerate))
            if length < seconds:
                frames = round(length * file.samplerate)
            whole = round(file.frames * _stated_size(data) / len(data))
            stated = min(frames, whole - round(start * file.samplerate))
        samples = file.read(frames, dtype="float32")
        check_complete(len(samples), stated, file.samplerate)
        rate, codec = file.samplerate, f"{file.format}/{file.subtype}"
        layout = channel_layout(file, data)
    _check_seconds(len(samples) / rate, limits)
    low, high = float(samples.min()), float(samples.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # min and max propagate NaN and infinity
        raise SkipSample(SkipReason.NON_FINITE, "NaN or infinite samples")
    if (peak := max(-low, high)) > MAX_PEAK:
        raise SkipSample(
            SkipReason.OUT_OF_SCALE,
            f"floats with a peak of {peak:g} where full scale is 1: divide integers by their own "
            "full scale (32768 of 16 bits)",
        )
    clip = Clip(mix_down(samples, layout), rate, codec)
    _check_not_silent(clip.samples, limits)
    return clip


def check_complete(samples: int, stated: int, rate_hz: int) -> None:
    """Raise a `SkipSample` if there are fewer samples than the header of a file states."""
    if samples < stated - SLACK_SECONDS * rate_hz:
        detail = f"it ends after {samples / rate_hz:g} of {stated / rate_hz:g} s"
        raise SkipSample(SkipReason.UNDECODABLE, detail)


def _stated_size(data: bytes) -> int:
    """Return the bytes that a WAV states to have, of which libsndfile reads those that exist."""
    if data[:4] != b"RIFF" or len(data) < 8:
        return len(data)
    (size,) = struct.unpack_from("<I", data, 4)
    # Programs that write to a pipe state about 2 or 4 GB.
    return max(len(data), size + 8) if size < 1 << 30 else len(data)


def as_soundfile(data: bytes, limits: ClipLimits) -> bytes:
    """Return the audio of an MP4, M4A, WebM or AAC file as a FLAC, and other data unchanged.

    Decoding needs PyAV, and stops one second after the limit, or after an hour.

    Raises:
        SkipSample: PyAV is missing, or the file has no audio that it can decode.
    """
    is_container = data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3"
    is_adts = data[:1] == b"\xff" and data[1:2] in (b"\xf0", b"\xf1", b"\xf8", b"\xf9")
    if not (is_container or is_adts) or len(data) > limits.max_bytes:
        return data
    if find_spec("av") is None:
        raise SkipSample(SkipReason.UNDECODABLE, str(MissingModule("av")))
    import av
    from av.error import FFmpegError

    blocks, rate, frames = [], 0, 0
    most_seconds = min(limits.max_seconds, LONG_CLIPS.max_seconds) + 1
    try:
        resampler = av.AudioResampler("s16")  # only changes the format
        with av.open(io.BytesIO(data), mode="r") as container:
            for frame in container.decode(audio=0):
                for block in resampler.resample(frame):
                    blocks.append(block.to_ndarray().reshape(-1, block.layout.nb_channels))
                rate, frames = frame.sample_rate, frames + frame.samples
                if frames > most_seconds * rate:
                    break
        flac = io.BytesIO()
        soundfile.write(flac, np.concatenate(blocks), rate, format="FLAC", subtype="PCM_16")
    except (FFmpegError, IndexError, ValueError, soundfile.SoundFileError) as error:
        raise SkipSample(SkipReason.UNDECODABLE, f"{type(error).__name__}: {error}") from None
    return flac.getvalue()


def mix_down(samples: np.ndarray, layout: str = "") -> np.ndarray:
    """Mix `[S]` or `[S, channels]` to `[S]` by a `channel_layout`; average if it is empty."""
    if samples.ndim == 1:
        return samples
    if not layout:
        return samples.mean(axis=1)
    return samples @ np.array([DOWNMIX[channel] for channel in layout], samples.dtype)


def channel_layout(file: soundfile.SoundFile, data: bytes) -> str:
    """Return a letter for each channel, as in `DOWNMIX`, given the file and its header.

    Empty for mono and stereo, and if the layout is unknown.
    """
    if file.channels <= 2:
        return ""
    if file.format == "FLAC" or (file.format == "OGG" and file.subtype in ("VORBIS", "OPUS")):
        layouts = FLAC_LAYOUTS if file.format == "FLAC" else VORBIS_LAYOUTS
        return layouts[file.channels - 3] if file.channels <= 8 else ""
    start = data.find(b"fmt ", 12)
    if not data.startswith((b"RIFF", b"RF64")) or start < 0 or len(data) < start + 32:
        return ""
    (tag,) = struct.unpack_from("<H", data, start + 8)
    (mask,) = struct.unpack_from("<I", data, start + 28)
    letters = "".join(letter for bit, letter in enumerate(WAVE_MASK_BITS) if mask >> bit & 1)
    is_whole = tag == 0xFFFE and mask.bit_count() == len(letters) == file.channels
    return letters if is_whole else ""


def _check_not_silent(samples: np.ndarray, limits: ClipLimits) -> None:
    peak = float(np.abs(samples).max(initial=0.0))
    if peak < limits.silence_peak:
        raise SkipSample(SkipReason.SILENT, f"peak {peak:.1e} of the mono mix")


def read_header(data: bytes, limits: ClipLimits) -> Header:
    """Read the header of a clip without decoding it. Headers can be wrong; `decode` checks them.

    Raises:
        SkipSample: the clip is empty, too large, not audio, or outside the duration limits
            according to its header.
    """
    with _open_encoded(as_soundfile(data, limits), limits) as file:
        _check_format(file)
        seconds = None if file.frames == UNKNOWN_FRAMES else file.frames / file.samplerate
        if seconds is not None:
            _check_seconds(seconds, limits)
        codec = f"{file.format}/{file.subtype}"
        return Header(file.samplerate, file.channels, codec, seconds)


def stated_seconds(file: BinaryIO, suffix: str, limits: ClipLimits) -> float | None:
    """Return the length that the header of a clip states, or None if it states none.

    Only what this needs is read of the seekable file: a few kilobytes, or all of an MP3. Files with
    one of `AV_SUFFIXES` count as unknown.

    Raises:
        SkipSample: the clip is not audio.
    """
    if suffix in AV_SUFFIXES:
        return None
    if suffix == "mp3":
        return read_header(file.read(), limits).seconds
    with _skip_undecodable(), _Recording(file) as recording:
        known = recording.frames != UNKNOWN_FRAMES
        return recording.frames / recording.samplerate if known else None


@contextmanager
def open_recording(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a recording of any length to read parts of it. Its header must state the length.

    Raises:
        SkipSample: it is undecodable, several files joined together, or of unknown length.
    """
    found = path.stat()
    joined_at, counted = _inspect_file(path, found.st_size, found.st_mtime_ns)
    _check_not_joined(joined_at)
    source = path if counted is None else io.BytesIO(counted)
    with _skip_undecodable(), _Recording(source) as file:
        _check_format(file)
        if file.frames == UNKNOWN_FRAMES:
            raise SkipSample(
                SkipReason.UNDECODABLE, "no part can be cut from a stream of unknown length"
            )
        yield file


@contextmanager
def _open_encoded(data: bytes, limits: ClipLimits) -> Iterator[soundfile.SoundFile]:
    if not data:
        raise SkipSample(SkipReason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise SkipSample(SkipReason.TOO_LARGE, f"{len(data)} bytes, limit {limits.max_bytes}")
    _check_not_joined(find_second_file(data))
    with _skip_undecodable(), _Recording(io.BytesIO(add_length_header(data))) as file:
        yield file


@lru_cache(maxsize=4)
def _inspect_file(path: Path, size: int, mtime_ns: int) -> tuple[int | None, bytes | None]:
    """Return the offset of a second file, and bytes to decode in place of the file, if any.

    `size` and `mtime_ns` are part of the cache key.
    """
    del mtime_ns
    if not size:
        return None, None
    if path.suffix[1:].lower() in AV_SUFFIXES:
        return None, as_soundfile(path.read_bytes(), LONG_CLIPS)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        counted = add_length_header(data)
        return find_second_file(data), None if isinstance(counted, mmap.mmap) else counted


def _check_not_joined(joined_at: int | None) -> None:
    if joined_at is not None:
        raise SkipSample(
            SkipReason.JOINED,
            f"another file begins at byte {joined_at}, and decoders stop there; "
            "split them, or encode them as one",
        )


@contextmanager
def _skip_undecodable() -> Iterator[None]:
    """Convert the errors of a decoder to `SkipSample`."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        # Its str() has a memory address, which would make ledgers of equal runs differ.
        raise SkipSample(SkipReason.UNDECODABLE, error.error_string) from None
    except (soundfile.SoundFileError, OSError, ValueError, TypeError, MemoryError) as error:
        raise SkipSample(SkipReason.UNDECODABLE, str(error)) from None


def _check_format(file: soundfile.SoundFile) -> None:
    if not MIN_SAMPLE_RATE_HZ <= file.samplerate <= MAX_SAMPLE_RATE_HZ:
        raise SkipSample(SkipReason.UNDECODABLE, f"sample rate of {file.samplerate} Hz")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise SkipSample(SkipReason.UNDECODABLE, f"{file.channels} channels")


def _check_seconds(seconds: float, limits: ClipLimits) -> None:
    if seconds > limits.max_seconds + ROUNDING_SECONDS:
        raise SkipSample(SkipReason.TOO_LONG, f"{seconds:.3f} s, limit {limits.max_seconds:g} s")
    if not seconds:
        raise SkipSample(SkipReason.EMPTY, "no samples")
    if seconds < limits.min_seconds:
        raise SkipSample(SkipReason.TOO_SHORT, f"{seconds:.3f} s, limit {limits.min_seconds:g} s")


def load_waveform(
    data: bytes, limits: ClipLimits, choose: ChoosePart | None = None
) -> torch.Tensor:
    """Decode, mix down and resample one clip, or the chosen part of it, to `[S]` at 16 kHz.

    Raises:
        SkipSample: see `decode`.
    """
    clip = decode(data, limits, choose)
    waveform = to_mono_16k(clip.samples, clip.sample_rate_hz)
    # Checked a second time, because resampling has removed everything above 8 kHz.
    _check_not_silent(waveform.numpy(), limits)
    # Resampling may add a sample to a clip at the limit; longer clips were rejected above.
    return waveform[: round(limits.max_seconds * SAMPLE_RATE_HZ)]


def load_file(path: Path, limits: ClipLimits) -> torch.Tensor:
    """Read one audio file as `[S]` at 16 kHz.

    Raises:
        SkipSample: the file cannot be read or is too large; for other reasons see `decode`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a device has no end, and a pipe would block forever
            raise SkipSample(SkipReason.MISSING_FILE, "not a file")
        if found.st_size > limits.max_bytes:
            size = f"{found.st_size} bytes, limit {limits.max_bytes}"
            raise SkipSample(SkipReason.TOO_LARGE, size)
        data = path.read_bytes()
    except OSError as error:
        raise SkipSample(SkipReason.MISSING_FILE, error.strerror or str(error)) from None
    return load_waveform(data, limits)


def to_mono_16k(samples: np.ndarray, sample_rate_hz: int) -> torch.Tensor:
    """Average the channels of `[S]` or `[S, channels]` and resample to `[S]` at 16 kHz."""
    mono = mix_down(samples)
    if sample_rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, sample_rate_hz, SAMPLE_RATE_HZ)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


MP3_RATES_HZ = (44_100, 48_000, 32_000)  # of MPEG-1; half of these in MPEG-2, a quarter in MPEG-2.5
# Bit rates of layer III, by the index in a frame header; True for MPEG-1.
MP3_KBIT = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
HEADER_KBIT_INDEX = 9  # 128 or 80 kbit/s: such a frame has room for a Xing header at any rate
MAX_FRAME_BYTES = 2048
MAX_TRIES = 100_000  # limit on false matches, against malicious files
# By the first bytes of a file: offset and format of its size, and the bytes that the size omits.
CONTAINER_SIZES = {
    b"RIFF": (4, "<I", 8),
    b"FORM": (4, ">I", 8),
    b"RF64": (20, "<Q", 8),
    b"riff": (16, "<Q", 0),  # W64
}


def find_second_file(data: Data) -> int | None:
    """Return the offset of a second file, as after `cat a.mp3 b.mp3`; None for a single file."""
    begin = _skip_id3(data, 0)
    magic = data[begin : begin + 4]
    if magic in CONTAINER_SIZES:
        at, kind, more = CONTAINER_SIZES[magic]
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
    begin = _skip_id3(data, 0)
    first = _parse_frame(data, begin)
    if first is None or _counted_end(data, begin) is not None:
        return data
    frames, end = _walk_frames(data, begin)[:2]
    head = bytearray(data[begin : begin + 4])
    head[1] |= 1  # no checksum
    head[2] = HEADER_KBIT_INDEX << 4 | head[2] & 0x0C
    made = _parse_frame(bytes(head), 0)
    assert made is not None
    counts = struct.pack(">4sIII", b"Info", 3, frames, made.bytes + end - begin)
    xing = (bytes(head) + bytes(made.xing_offset - 4) + counts).ljust(made.bytes, b"\0")
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
    """Find frames after those that the Xing header counts, or frames of another format.

    Frames of one format are one recording, since `add_length_header` counts all of them.
    """
    if _parse_frame(data, begin) is None:
        return None
    end = _counted_end(data, begin)
    if end is None:
        return _walk_frames(data, begin)[2]
    follows = _parse_frame(data, _skip_id3(data, end)) is not None
    return end if follows and len(data) - end > MAX_FRAME_BYTES else None


@dataclass(frozen=True)
class _Mp3Frame:
    """A layer III frame."""

    bytes: int
    xing_offset: int  # of a Xing header in the frame, after the side information
    format: tuple[int, int, bool]  # version, rate and channels, equal in all frames of a file


def _parse_frame(data: Data, at: int) -> _Mp3Frame | None:
    if at < 0 or len(data) < at + 4 or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return None
    version, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 2 & 3
    kbit, padded = data[at + 2] >> 4, data[at + 2] >> 1 & 1
    if version == 1 or rate == 3 or kbit in (0, 15):  # reserved values, or a free bit rate
        return None
    is_mpeg1, is_mono = version == 3, data[at + 3] & 0xC0 == 0xC0
    rate_hz = MP3_RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    length = (144 if is_mpeg1 else 72) * MP3_KBIT[is_mpeg1][kbit] * 1000 // rate_hz + padded
    side = 4 + ((17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17))
    return _Mp3Frame(length, side, (version, rate, is_mono))


def _walk_frames(data: Data, at: int) -> tuple[int, int, int | None]:
    """Return the number of frames of one format, their end, and where another format begins."""
    frames, end, format, tries = 0, at, None, 0
    while at >= 0 and tries < MAX_TRIES:
        frame = _parse_frame(data, at)
        if frame is not None and (format is None or frame.format == format):
            frames, format = frames + 1, frame.format
            at = end = at + frame.bytes
            continue
        following = None if frame is None else _parse_frame(data, at + frame.bytes)
        if frame is not None and following is not None and following.format == frame.format:
            return frames, end, at
        tries += 1  # a tag, or other bytes that look like a frame
        after = _skip_id3(data, at)
        at = after if after > at else data.find(b"\xff", at + 1)
    return frames, end, None


def _skip_id3(data: Data, at: int) -> int:
    """Return the end of an ID3v2 tag at `at`, or `at`; its size has seven bits per byte."""
    if data[at : at + 3] != b"ID3" or len(data) < at + 10:
        return at
    size = data[at + 6 : at + 10]
    return at + 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])


def _counted_end(data: Data, at: int) -> int | None:
    """Return the end of the frames that a Xing header in the frame at `at` counts.

    None without a header that states their number and their bytes.
    """
    frame = _parse_frame(data, at)
    header = data[at + frame.xing_offset : at + frame.xing_offset + 16] if frame else b""
    if len(header) < 16 or header[:4] not in (b"Xing", b"Info"):
        return None
    flags, frames, size = struct.unpack(">III", header[4:])
    return at + size if flags & 3 == 3 and frames and size else None
