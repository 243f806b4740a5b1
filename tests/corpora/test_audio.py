import io
import pickle
import struct

import numpy as np
import pytest
import soundfile

from whisper_aut.corpora.audio import ClipLimits, decode, read_header
from whisper_aut.errors import Reason, SampleRefused

LIMITS = ClipLimits()
RATE_HZ = 16_000


def noise(seconds: float, rate_hz: int = RATE_HZ, channels: int = 1) -> np.ndarray:
    samples = (
        np.random.default_rng(0)
        .uniform(-0.5, 0.5, (round(seconds * rate_hz), channels))
        .astype(np.float32)
    )
    return samples[:, 0] if channels == 1 else samples


def encode(
    samples: np.ndarray, rate_hz: int = RATE_HZ, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format=kind, subtype=subtype)
    return file.getvalue()


def with_flac_samples(data: bytes, claimed: int) -> bytes:
    """Rewrite the 36 bits of STREAMINFO that count the samples (RFC 9639, section 8.2)."""
    word = int.from_bytes(data[18:26], "big")
    return data[:18] + ((word >> 36 << 36) | claimed).to_bytes(8, "big") + data[26:]


def reason_of(data: bytes, limits: ClipLimits = LIMITS) -> Reason:
    with pytest.raises(SampleRefused) as refused:
        decode(data, limits)
    assert pickle.loads(pickle.dumps(refused.value)).detail == refused.value.detail
    assert " at 0x" not in refused.value.detail  # ledgers of two runs should be comparable
    return refused.value.reason


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
    ],
)
def test_every_kind_of_audio_decodes_at_its_own_rate_and_length(kind: str, subtype: str | None):
    clip = decode(encode(noise(1), 16_000, kind, subtype), LIMITS)
    assert (clip.samples.dtype, clip.sample_rate_hz, clip.codec.split("/")[0]) == (
        np.float32,
        16_000,
        kind,
    )
    assert clip.seconds == pytest.approx(1, abs=0.08)


def test_stereo_48_khz_keeps_its_channels():
    clip = decode(encode(noise(0.5, 48_000, 2), 48_000), LIMITS)
    assert clip.samples.shape == (24_000, 2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"this is a text file named .wav\n" * 20, Reason.UNDECODABLE),
        (b"RIFF", Reason.UNDECODABLE),
        (encode(np.zeros(0, np.float32)), Reason.EMPTY),
        (encode(np.zeros(RATE_HZ, np.float32)), Reason.SILENT),
        (encode(noise(0.05)), Reason.TOO_SHORT),
        (encode(noise(30.01)), Reason.TOO_LONG),
        (encode(noise(1), 500), Reason.UNDECODABLE),
    ],
    ids=["nothing", "text", "stump", "no samples", "silence", "short", "long", "500 Hz"],
)
def test_a_clip_that_cannot_be_used_is_refused_for_its_reason(data: bytes, reason: Reason):
    assert reason_of(data) is reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_not_finite_is_enough(bad: float):
    samples = noise(1)
    samples[777] = bad
    assert reason_of(encode(samples, subtype="FLOAT")) is Reason.NON_FINITE


def test_both_ends_of_the_duration_limits_are_allowed():
    assert decode(encode(noise(30)), LIMITS).seconds == 30
    assert decode(encode(noise(0.1)), LIMITS).seconds == pytest.approx(0.1)


def test_size_is_checked_before_anything_is_decoded():
    assert reason_of(b"x" * 101, ClipLimits(max_bytes=100)) is Reason.TOO_LARGE


@pytest.mark.parametrize("claimed", [RATE_HZ * 40, 2**36 - 1])
def test_a_header_that_promises_hours_is_refused_before_decoding(claimed: int):
    assert reason_of(with_flac_samples(encode(noise(1), kind="FLAC"), claimed)) is Reason.TOO_LONG


def test_a_flac_that_was_cut_short_of_its_header_is_refused():
    assert (
        reason_of(with_flac_samples(encode(noise(1), kind="FLAC"), RATE_HZ + 1000))
        is Reason.UNDECODABLE
    )


def test_a_flac_from_a_pipe_which_does_not_say_its_length_decodes():
    whole = encode(noise(1), kind="FLAC")
    streamed = with_flac_samples(whole, 0)
    assert np.array_equal(decode(streamed, LIMITS).samples, decode(whole, LIMITS).samples)
    assert read_header(streamed, LIMITS).seconds is None


def test_a_flac_from_a_pipe_is_held_to_the_limit_all_the_same():
    assert reason_of(with_flac_samples(encode(noise(33), kind="FLAC"), 0)) is Reason.TOO_LONG


def test_a_wav_header_that_lies_gives_only_what_is_there():
    data = bytearray(encode(noise(1)))
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert decode(bytes(data), LIMITS).seconds == 1


def test_a_header_is_read_without_decoding():
    header = read_header(encode(noise(2, 8_000, 2), 8_000), LIMITS)
    assert (header.sample_rate_hz, header.channels, header.codec, header.seconds) == (
        8_000,
        2,
        "WAV/PCM_16",
        2.0,
    )


@pytest.mark.parametrize(
    ("seconds", "reason"), [(0, Reason.EMPTY), (0.05, Reason.TOO_SHORT), (31, Reason.TOO_LONG)]
)
def test_a_header_outside_the_limits_is_refused(seconds: float, reason: Reason):
    with pytest.raises(SampleRefused) as refused:
        read_header(encode(noise(seconds)), LIMITS)
    assert refused.value.reason is reason


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_hostile_bytes_are_refused_or_decoded_and_nothing_else(kind: str):
    random = np.random.default_rng(1)
    whole = np.frombuffer(encode(noise(0.3), kind=kind), np.uint8)
    for _ in range(60):
        data = whole[: random.integers(1, len(whole) + 1)].copy()
        data[random.integers(0, len(data), 8)] = random.integers(0, 256, 8)
        for read in (decode, read_header):
            try:
                read(data.tobytes(), LIMITS)
            except SampleRefused:
                continue
