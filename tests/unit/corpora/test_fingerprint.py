"""Fingerprints: what survives, what does not, and that unrelated sounds stay apart."""

import io

import numpy as np
import pytest
import soundfile
import soxr

from tests.support.audio import TEXTURE_HZ, encode_audio, mp3, texture, tone
from whisper_aut.corpora.fingerprint import BITS, FRAME_SECONDS, FingerprintIndex, fingerprint


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [texture(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def index(clips: list[np.ndarray]) -> FingerprintIndex:
    return FingerprintIndex(fingerprint(clip, TEXTURE_HZ) for clip in clips)


@pytest.mark.parametrize("kind", ["mp3", "ogg", "gain", "16 kHz", "8 kHz mp3"])
def test_a_changed_part_is_found_where_it_was_cut(
    kind: str, clips: list[np.ndarray], index: FingerprintIndex
):
    number, start = 7, 1.3
    part, rate = (
        clips[number][round(start * TEXTURE_HZ) : round((start + 3.1) * TEXTURE_HZ)],
        TEXTURE_HZ,
    )
    if kind == "gain":
        part = 0.05 * part
    elif "kHz" in kind:
        rate = int(kind.split()[0]) * 1000
        part = soxr.resample(part, TEXTURE_HZ, rate)
    if "mp3" in kind:
        data = mp3(part, rate)
        assert kind != "mp3" or abs(len(data) * 8 / 3.1 - 64_000) < 4_000  # it is what it is called
        part, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    elif kind == "ogg":
        part, rate = soundfile.read(
            io.BytesIO(encode_audio(part, rate, "OGG", "VORBIS")), dtype="float32"
        )
    (found,) = index.search(fingerprint(part, rate))
    assert found.clip == number
    assert found.bit_error < 0.2
    assert found.indexed_start_seconds - found.start_seconds == pytest.approx(start, abs=0.06)


def test_a_part_inside_something_else_is_found(clips: list[np.ndarray], index: FingerprintIndex):
    mixed = np.concatenate(
        [
            texture(100, 4.0),
            clips[3][TEXTURE_HZ : 4 * TEXTURE_HZ + TEXTURE_HZ // 4],
            texture(101, 4.0),
        ]
    )
    (found,) = index.search(fingerprint(mixed, TEXTURE_HZ))
    assert found.clip == 3
    assert found.start_seconds - found.indexed_start_seconds == pytest.approx(3.0, abs=0.05)


def test_unrelated_sounds_differ_in_half_of_their_bits(
    clips: list[np.ndarray], index: FingerprintIndex
):
    words = [fingerprint(clip, TEXTURE_HZ).words for clip in clips]
    fractions = [
        np.bitwise_count(a ^ b).mean() / BITS
        for number, a in enumerate(words)
        for b in words[:number]
    ]
    assert np.mean(fractions) == pytest.approx(0.5, abs=0.02)
    assert min(fractions) > 0.4
    assert not any(index.search(fingerprint(texture(seed), TEXTURE_HZ)) for seed in range(200, 230))


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(3 * TEXTURE_HZ),
        tone(3.0, 440, TEXTURE_HZ),
        np.full(3 * TEXTURE_HZ, 0.2),
        tone(0.05, 440, TEXTURE_HZ),
        np.zeros(0),
    ],
    ids=["silence", "hum", "offset", "short", "nothing"],
)
def test_silence_hums_and_short_clips_match_nothing(samples: np.ndarray):
    samples = samples.astype(np.float32)
    index = FingerprintIndex(
        [fingerprint(samples, TEXTURE_HZ), fingerprint(texture(1), TEXTURE_HZ)]
    )
    assert index.search(fingerprint(0.3 * samples[777:], TEXTURE_HZ)) == []


def test_padding_with_silence_changes_nothing(clips: list[np.ndarray], index: FingerprintIndex):
    padded = np.concatenate(
        [np.zeros(TEXTURE_HZ), clips[5][: 2 * TEXTURE_HZ], np.zeros(3 * TEXTURE_HZ)]
    ).astype(np.float32)
    found = index.search(fingerprint(padded, TEXTURE_HZ))
    assert [segment.clip for segment in found] == [5]
    assert found[0].start_seconds - found[0].indexed_start_seconds == pytest.approx(
        1.0, abs=2 * FRAME_SECONDS
    )


def test_an_empty_index_finds_nothing():
    assert FingerprintIndex([]).search(fingerprint(texture(1), TEXTURE_HZ)) == []
