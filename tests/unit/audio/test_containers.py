"""Several files in one, and MP3s that do not state their length, are read in full or rejected."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.audio import tone
from whisper_aut.audio.decode import (
    ClipLimits,
    add_length_header,
    decode,
    find_second_file,
    read_header,
)
from whisper_aut.corpora.build import read_clip
from whisper_aut.corpora.manifest import Segment
from whisper_aut.errors import SkipReason, SkipSample

LIMITS = ClipLimits()
RATE_HZ = 16_000


def noise(seconds: float, rate_hz: int = RATE_HZ, falling: bool = False) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.4, 0.4, round(seconds * rate_hz))
    return samples * np.linspace(1, 0.05, len(samples)) ** 4 if falling else samples


def encode(samples: np.ndarray, kind: str, subtype: str | None = None, rate_hz: int = RATE_HZ):
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


def mp3(samples: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    """An MP3 of variable bit rate without the frame that says how long it is."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="MP3", bitrate_mode="VARIABLE")
    whole = file.getvalue()
    begin = next(at for at in range(4, 2000) if whole[at : at + 2] == whole[:2])
    return whole[begin:]


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", None),
        ("RF64", None),
        ("W64", None),
        ("AIFF", None),
        ("AU", None),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
    ],
)
def test_two_files_joined_into_one_are_rejected_with_the_reason(kind: str, subtype: str | None):
    first, second = (encode(noise(seconds), kind, subtype) for seconds in (1, 2))
    assert find_second_file(first) is find_second_file(second) is None
    assert find_second_file(first + second) == len(first)
    for read in (decode, read_header):
        with pytest.raises(SkipSample, match=f"another file begins at byte {len(first)}") as at:
            read(first + second, LIMITS)
        assert at.value.reason is SkipReason.JOINED


TAG = b"ID3\x04\x00\x00\x00\x00\x00\x05hello"


def test_mp3_frames_after_those_that_the_header_counts_are_a_second_file():
    first, second = encode(noise(1), "MP3"), mp3(noise(2))
    assert find_second_file(first + second) == len(first)
    assert find_second_file(TAG + first + TAG + second) == len(TAG + first)
    assert find_second_file(TAG + first + b"TAG" + bytes(125)) is None


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_an_mp3_that_does_not_say_its_length_is_decoded_to_its_end(rate_hz: int):
    """libsndfile guesses it from the first frame, which is loud, and would stop before the half."""
    data = mp3(noise(4, rate_hz, falling=True), rate_hz)
    guessed = soundfile.info(io.BytesIO(data)).frames / rate_hz
    assert guessed < 2.5
    for whole in (data, TAG + data, data + b"TAG" + bytes(125), data + TAG):
        assert decode(whole, LIMITS).seconds == pytest.approx(4, abs=0.1)
        assert read_header(whole, LIMITS).seconds == pytest.approx(4, abs=0.1)


def test_an_mp3_is_not_too_long_because_it_begins_quietly():
    data = mp3(noise(12, falling=True)[::-1])
    assert soundfile.info(io.BytesIO(data)).frames / RATE_HZ > LIMITS.max_seconds
    assert decode(data, LIMITS).seconds == pytest.approx(12, abs=0.1)


def test_a_header_that_counts_nothing_counts_as_none():
    whole = encode(noise(4, falling=True), "MP3")
    at = whole.index(b"Info") if b"Info" in whole else whole.index(b"Xing")
    for header in (b"\0\0\0\0", b"\0\0\0\3" + bytes(8)):
        data = whole[: at + 4] + header + whole[at + 4 + len(header) :]
        assert find_second_file(data) is None
        assert decode(data, LIMITS).seconds == pytest.approx(4, abs=0.15)


def test_mp3s_of_one_format_are_one_recording_and_of_two_formats_are_two_files():
    first, second, other = mp3(noise(1)), mp3(noise(2)), mp3(noise(2, 22_050), 22_050)
    headed = encode(noise(2), "MP3")
    for joined in (first + second, first + TAG + second, first + headed):
        assert decode(joined, LIMITS).seconds == pytest.approx(3, abs=0.3)
    assert find_second_file(first + other) == len(first)
    assert find_second_file(other + first) == len(other)


def test_what_says_its_length_is_left_as_it_is():
    for data in (encode(noise(1), "MP3"), encode(noise(1), "FLAC"), b"", b"text", TAG):
        assert add_length_header(data) is data


@pytest.mark.parametrize("pattern", [b"\xff", b"\xff\xf3", b"Info", b"\xff\xf3\x88\xc4", b"OggS"])
def test_hostile_bytes_take_no_time(pattern: bytes):
    data = encode(noise(0.1), "MP3")[:8] + pattern * (1 << 20)
    start = time.monotonic()
    find_second_file(data)
    add_length_header(data)
    assert time.monotonic() - start < 10


def encode_with_av(samples: np.ndarray, rate_hz: int, kind: str, codec: str) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "aac"), ("adts", "aac"), ("webm", "libopus"), ("ipod", "aac")]
)
def test_containers_of_video_are_decoded_and_stored_as_flac(kind: str, codec: str, tmp_path: Path):
    rate = 48_000
    whole = encode_with_av(tone(2.0, 440.0, rate), rate, kind, codec)
    clip = decode(whole, ClipLimits())
    assert (clip.sample_rate_hz, clip.samples.ndim) == (rate, 1)
    assert clip.seconds == pytest.approx(2.0, abs=0.1)  # encoders pad to whole frames
    middle = clip.samples[rate // 2 : 3 * rate // 2]
    assert np.abs(np.fft.rfft(middle)).argmax() == 440
    assert middle.std() == pytest.approx(0.3 / 2**0.5, rel=0.02)
    with pytest.raises(SkipSample) as skipped:
        decode(whole, ClipLimits(max_seconds=1.5))
    assert skipped.value.reason is SkipReason.TOO_LONG
    part = decode(whole, ClipLimits(max_seconds=1.0), lambda seconds: (seconds - 1.0, 1.0))
    assert part.seconds == pytest.approx(1.0, abs=0.01)
    path = tmp_path / "clip.m4a"
    path.write_bytes(whole)
    stored = read_clip(path, ClipLimits())
    assert (stored.suffix, stored.seconds) == ("flac", pytest.approx(clip.seconds, abs=0.01))
    assert read_clip(path, ClipLimits(), Segment(0.5, 1.0)).seconds == pytest.approx(1.0, abs=0.01)


def test_a_container_without_audio_is_skipped():
    pytest.importorskip("av")
    with pytest.raises(SkipSample) as skipped:
        decode(b"\0\0\0\x18ftypmp42" + bytes(100), ClipLimits())
    assert skipped.value.reason is SkipReason.UNDECODABLE


def test_without_pyav_a_clip_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whisper_aut.audio.decode.find_spec", lambda _: None)
    with pytest.raises(SkipSample, match=r"pip install 'whisper-aut\[av\]'"):
        decode(b"\0\0\0\x18ftypmp42" + bytes(100), ClipLimits())
