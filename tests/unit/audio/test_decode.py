import io
import pickle
import struct

import numpy as np
import pytest
import soundfile

from whisper_aut.audio.decode import DOWNMIX, ClipLimits, decode, load_waveform, read_header
from whisper_aut.errors import SkipReason, SkipSample

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


def reason_of(data: bytes, limits: ClipLimits = LIMITS) -> SkipReason:
    with pytest.raises(SkipSample) as refused:
        decode(data, limits)
    assert pickle.loads(pickle.dumps(refused.value)).detail == refused.value.detail
    assert " at 0x" not in refused.value.detail  # ledgers of two runs should be comparable
    return refused.value.reason


@pytest.mark.parametrize("kind", ["WAV", "MP3"])
def test_a_file_whose_end_is_missing_is_skipped(kind: str):
    """Its text describes audio that is missing."""
    data = encode(noise(2), kind=kind)
    assert reason_of(data[: len(data) // 2]) is SkipReason.UNDECODABLE
    assert decode(data[: len(data) - 100], LIMITS).seconds > 1.9


def test_pages_that_are_missing_in_the_middle_of_an_ogg_are_noticed():
    data = encode(noise(10), kind="OGG")
    middle = len(data) // 2
    assert reason_of(data[:middle] + bytes(5000) + data[middle + 5000 :]) is SkipReason.UNDECODABLE


@pytest.mark.parametrize("stated", [0, 2**31 - 1, 2**32 - 1])
def test_a_wav_from_a_pipe_does_not_state_its_size(stated: int):
    data = bytearray(encode(noise(1)))
    struct.pack_into("<I", data, 4, stated)
    assert decode(bytes(data), LIMITS).seconds == 1


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


def test_stereo_is_averaged_at_its_own_rate():
    samples = noise(0.5, 48_000, 2)
    clip = decode(encode(samples, 48_000, subtype="FLOAT"), LIMITS)
    np.testing.assert_allclose(clip.samples, samples.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", SkipReason.EMPTY),
        (b"this is a text file named .wav\n" * 20, SkipReason.UNDECODABLE),
        (b"RIFF", SkipReason.UNDECODABLE),
        (encode(np.zeros(0, np.float32)), SkipReason.EMPTY),
        (encode(np.zeros(RATE_HZ, np.float32)), SkipReason.SILENT),
        (encode(noise(0.05)), SkipReason.TOO_SHORT),
        (encode(noise(30.01)), SkipReason.TOO_LONG),
        (encode(noise(1), 500), SkipReason.UNDECODABLE),
    ],
    ids=["nothing", "text", "stump", "no samples", "silence", "short", "long", "500 Hz"],
)
def test_a_clip_that_cannot_be_used_is_refused_for_its_reason(data: bytes, reason: SkipReason):
    assert reason_of(data) is reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_not_finite_is_enough(bad: float):
    samples = noise(1)
    samples[777] = bad
    assert reason_of(encode(samples, subtype="FLOAT")) is SkipReason.NON_FINITE


def test_both_ends_of_the_duration_limits_are_allowed():
    assert decode(encode(noise(30)), LIMITS).seconds == 30
    assert decode(encode(noise(0.1)), LIMITS).seconds == pytest.approx(0.1)


def test_size_is_checked_before_anything_is_decoded():
    assert reason_of(b"x" * 101, ClipLimits(max_bytes=100)) is SkipReason.TOO_LARGE


@pytest.mark.parametrize("claimed", [RATE_HZ * 40, 2**36 - 1])
def test_a_header_that_promises_hours_is_refused_before_decoding(claimed: int):
    assert (
        reason_of(with_flac_samples(encode(noise(1), kind="FLAC"), claimed)) is SkipReason.TOO_LONG
    )


def test_a_flac_that_was_cut_short_of_its_header_is_refused():
    assert (
        reason_of(with_flac_samples(encode(noise(1), kind="FLAC"), RATE_HZ + 1000))
        is SkipReason.UNDECODABLE
    )


def test_a_flac_from_a_pipe_which_does_not_say_its_length_decodes():
    whole = encode(noise(1), kind="FLAC")
    streamed = with_flac_samples(whole, 0)
    assert np.array_equal(decode(streamed, LIMITS).samples, decode(whole, LIMITS).samples)
    assert read_header(streamed, LIMITS).seconds is None


def test_a_flac_from_a_pipe_is_held_to_the_limit_all_the_same():
    assert reason_of(with_flac_samples(encode(noise(33), kind="FLAC"), 0)) is SkipReason.TOO_LONG


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
    ("seconds", "reason"),
    [(0, SkipReason.EMPTY), (0.05, SkipReason.TOO_SHORT), (31, SkipReason.TOO_LONG)],
)
def test_a_header_outside_the_limits_is_refused(seconds: float, reason: SkipReason):
    with pytest.raises(SkipSample) as refused:
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
            except SkipSample:
                continue


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_stereo_in_opposite_phase_is_silent_once_it_is_mixed_down(subtype: str):
    left = noise(1)
    assert reason_of(encode(np.stack([left, -left], axis=1), subtype=subtype)) is SkipReason.SILENT


def test_a_clip_that_resampling_leaves_nothing_of_is_silent():
    whistle = 0.5 * np.sin(2 * np.pi * 20_000 * np.arange(48_000) / 48_000)
    fade = np.hanning(len(whistle))
    data = encode((whistle * fade).astype(np.float32), 48_000, subtype="FLOAT")
    assert decode(data, LIMITS).seconds == 1
    with pytest.raises(SkipSample) as refused:
        load_waveform(data, LIMITS)
    assert refused.value.reason is SkipReason.SILENT


def one_channel(channel: int, channels: int) -> np.ndarray:
    samples = np.zeros((RATE_HZ, channels), np.float32)
    samples[:, channel] = noise(1)
    return samples


@pytest.mark.parametrize(
    ("kind", "subtype", "centre", "low"),
    [("FLAC", None, 2, 3), ("WAVEX", "PCM_16", 2, 3), ("OGG", "VORBIS", 1, 5)],
)
def test_speech_in_the_centre_of_5_1_comes_out_3_db_down_and_the_low_frequencies_not_at_all(
    kind: str, subtype: str | None, centre: int, low: int
):
    """As in BS.775's stereo, averaged. An average over six channels would be 15.6 dB down."""
    data = encode(one_channel(centre, 6), RATE_HZ, kind, subtype)
    level = np.std(decode(data, LIMITS).samples) / np.std(noise(1))
    assert 20 * np.log10(level) == pytest.approx(-3.01, abs=1.0 if kind == "OGG" else 0.01)
    assert reason_of(encode(one_channel(low, 6), RATE_HZ, kind, subtype)) is SkipReason.SILENT


def test_front_and_surround_channels_have_the_weights_of_bs_775():
    samples = noise(1, channels=6)
    found = decode(encode(samples, kind="FLAC", subtype="PCM_24"), LIMITS).samples
    weights = [0.5, 0.5, 0.5**0.5, 0.0, 0.5**1.5, 0.5**1.5]
    np.testing.assert_allclose(found, samples @ np.array(weights, np.float32), atol=1e-6)
    assert [DOWNMIX[channel] for channel in "LRCXSS"] == pytest.approx(weights)


def test_channels_of_an_unknown_layout_are_averaged():
    samples = noise(1, channels=6)
    found = decode(encode(samples, kind="WAV", subtype="FLOAT"), LIMITS).samples
    np.testing.assert_allclose(found, samples.mean(axis=1), atol=1e-6)


def test_floats_on_the_scale_of_integers_are_refused_and_named():
    integers = np.round(noise(1) * 32_767)
    with pytest.raises(SkipSample, match=r"peak of 1.*divide integers"):
        decode(encode(integers, subtype="FLOAT"), LIMITS)
    assert reason_of(encode(integers, subtype="FLOAT")) is SkipReason.OUT_OF_SCALE
    assert decode(encode(noise(1) * 6, subtype="FLOAT"), LIMITS).seconds == 1, "loud is no fault"
