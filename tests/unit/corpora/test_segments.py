"""Clips that are parts of longer files: cut to the sample, without reading the rest, and skipped if
outside the file.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from whisper_aut.audio.decode import ClipLimits, decode
from whisper_aut.cli import main
from whisper_aut.corpora.build import BuildReport, build_shards
from whisper_aut.corpora.manifest import ManifestSpec

RATE_HZ = 22_050


@pytest.fixture
def recording(tmp_path: Path) -> np.ndarray:
    """A stereo recording of 40 s, longer than a clip may be, as FLAC and as WAV of floats."""
    samples = np.random.default_rng(0).integers(-20_000, 20_000, (40 * RATE_HZ, 2), dtype=np.int16)
    soundfile.write(tmp_path / "talk.flac", samples, RATE_HZ)
    soundfile.write(tmp_path / "floats.wav", samples / np.float32(2**15), RATE_HZ, subtype="FLOAT")
    return samples


def build(
    folder: Path, rows: list[dict[str, Any]], spec: dict[str, str] | None = None, **options: Any
) -> BuildReport:
    (folder / "talk.jsonl").write_text(
        "".join(json.dumps({"text": "words", **row}) + "\n" for row in rows)
    )
    manifest = ManifestSpec(folder / "talk.jsonl", **(spec or {}))
    return build_shards(
        manifest, folder / "out", workers=1, progress=False, max_skipped_fraction=1.0, **options
    )


def members(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / "out" / "shard-000000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]


def test_a_nemo_manifest_is_cut_to_the_sample(tmp_path: Path, recording: np.ndarray):
    row = {"audio_filepath": "talk.flac"}
    rows = [
        row | {"offset": 1.5, "duration": 0.7},
        row | {"offset": 39.0},
        row | {"duration": 2.0},
        row | {"offset": 0, "duration": 1},
    ]
    report = build(tmp_path, rows, limits=ClipLimits(max_bytes=200_000))
    assert (tmp_path / "talk.flac").stat().st_size > 200_000, "only the part is bounded"
    assert (report.clips, report.skipped, report.seconds) == (4, {}, pytest.approx(4.7))
    found = members(tmp_path)
    for key, start, seconds in (
        ("talk", 1.5, 0.7),
        ("talk-2", 39, 1),
        ("talk-3", 0, 2),
        ("talk-4", 0, 1),
    ):
        samples, rate = soundfile.read(io.BytesIO(found[f"{key}.flac"]), dtype="int16")
        first = round(start * RATE_HZ)
        assert rate == RATE_HZ
        np.testing.assert_array_equal(samples, recording[first : first + round(seconds * RATE_HZ)])
        assert json.loads(found[f"{key}.json"])["duration_seconds"] == pytest.approx(
            seconds, abs=1e-4
        )
    assert json.loads(found["talk.json"])["offset"] == 1.5, "where it came from stays"


def test_floats_stay_floats(tmp_path: Path, recording: np.ndarray):
    build(tmp_path, [{"path": "floats.wav", "offset": 2.0, "duration": 1.0}])
    data = members(tmp_path)["floats.wav"]
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_array_equal(samples, recording[2 * RATE_HZ : 3 * RATE_HZ] / np.float32(2**15))
    peak = data.index(b"PEAK")
    assert data[peak + 12 : peak + 16] == bytes(4), "the time of the build would be in the bytes"


@pytest.mark.parametrize(
    ("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
)
def test_a_segment_of_a_loud_lossy_file_does_not_wrap_round(
    tmp_path: Path, kind: str, subtype: str
):
    """Decoders exceed full scale, which read as integers would turn from +1.0 into -1.0."""
    time = np.arange(4 * 16_000) / 16_000
    loud = np.sign(np.sin(2 * np.pi * 220 * time)).astype(np.float32)
    soundfile.write(tmp_path / "loud.bin", loud, 16_000, format=kind, subtype=subtype)
    whole, _ = soundfile.read(tmp_path / "loud.bin", dtype="float32")
    assert np.abs(whole).max() > 1.1
    build(tmp_path, [{"path": "loud.bin", "offset": 1.25, "duration": 2.0}])
    part, _ = soundfile.read(io.BytesIO(members(tmp_path)["loud.flac"]), dtype="float32")
    expected = whole[20_000:52_000].clip(-1, 1)
    np.testing.assert_allclose(part, expected, rtol=0, atol=2.0**-15)


def test_a_segment_is_cut_from_the_end_of_an_mp3_that_does_not_say_its_length(tmp_path: Path):
    """libsndfile takes the 4 s for 1.7 s, by the bit rate of the loud first frame."""
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, 64_000) * np.linspace(1, 0.1, 64_000) ** 4
    soundfile.write(tmp_path / "a.mp3", noise, 16_000, bitrate_mode="VARIABLE")
    without_header = (tmp_path / "a.mp3").read_bytes()
    begin = next(n for n in range(4, 2000) if without_header[n : n + 2] == without_header[:2])
    (tmp_path / "a.mp3").write_bytes(without_header[begin:])
    report = build(tmp_path, [{"path": "a.mp3", "offset": 3.0, "duration": 0.9}])
    assert (report.clips, report.seconds) == (1, pytest.approx(0.9))


def test_a_segment_of_surround_sound_is_mixed_down_as_the_whole_file_is(tmp_path: Path):
    samples = np.random.default_rng(0).uniform(-0.4, 0.4, (3 * 16_000, 6)).astype(np.float32)
    soundfile.write(tmp_path / "film.bin", samples, 16_000, format="OGG", subtype="VORBIS")
    whole = decode((tmp_path / "film.bin").read_bytes(), ClipLimits()).samples
    build(tmp_path, [{"path": "film.bin", "offset": 1.0, "duration": 1.0}])
    part = decode(members(tmp_path)["film.wav"], ClipLimits()).samples
    np.testing.assert_allclose(part, whole[16_000:32_000], atol=1e-6)


def test_no_segment_is_cut_from_two_files_joined_into_one(tmp_path: Path):
    parts = []
    for seed in (0, 1):
        encoded = io.BytesIO()
        samples = np.random.default_rng(seed).uniform(-0.4, 0.4, 32_000)
        soundfile.write(encoded, samples, 16_000, format="OGG", subtype="VORBIS")
        parts.append(encoded.getvalue())
    (tmp_path / "two.ogg").write_bytes(b"".join(parts))
    (tmp_path / "one.ogg").write_bytes(parts[0])
    report = build(tmp_path, [{"path": f"{name}.ogg", "offset": 0.5} for name in ("one", "two")])
    assert (report.clips, report.skipped) == (1, {"several files in one": 1})


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (
            {"offset": 41.0, "duration": 1.0},
            "bad manifest row",
            "a segment from 41 to 42 s of a file that ends at 40 s",
        ),
        ({"offset": 39.0, "duration": 3.0}, "bad manifest row", "a segment from 39 to 42 s"),
        ({"offset": -1.0, "duration": 3.0}, "bad manifest row", "'offset' must be seconds"),
        ({"offset": "soon"}, "bad manifest row", "'offset' must be seconds, not 'soon'"),
        ({"offset": 1.0, "duration": "nan"}, "bad manifest row", "'duration' must be seconds"),
        ({"offset": 1.0, "duration": 36000.0}, "bad manifest row", "of a file that ends at 40 s"),
        ({"offset": 1.0, "duration": 35.0}, "audio too long", ""),
        ({"offset": 1.0, "duration": 0.0}, "empty audio", ""),
        ({"offset": 1.0, "duration": 0.05}, "audio too short", ""),
    ],
)
def test_a_segment_outside_its_file_is_skipped(
    tmp_path: Path, recording: np.ndarray, row: dict[str, Any], reason: str, detail: str
):
    good = {
        "path": "talk.flac",
        "offset": 39.5,
        "duration": 0.55,
    }  # a rounded end behind the file's is no fault
    report = build(tmp_path, [good, {"path": "talk.flac", **row}])
    assert (report.clips, report.skipped) == (1, {reason: 1})
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert detail in json.loads(line)["detail"]


def test_a_duration_alone_cuts_nothing_unless_it_is_named(tmp_path: Path):
    soundfile.write(
        tmp_path / "clip.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000
    )
    rows = [{"path": "clip.wav", "duration": 0.4, "begins": 0.2}]
    assert build(tmp_path, rows).seconds == pytest.approx(1.0)
    assert build(tmp_path, rows, {"offset": "begins"}).seconds == pytest.approx(0.4)


def test_columns_are_named_on_the_command_line(
    tmp_path: Path, recording: np.ndarray, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "talk.csv").write_text("path,text,from,for\ntalk.flac,words,3,0.5\n")
    command = ["data", "build", str(tmp_path / "talk.csv"), "--out", str(tmp_path / "out")]
    assert main([*command, "--offset", "from", "--duration", "for"]) == 0
    assert "1 clips" in capsys.readouterr().out
    assert main([*command, "--offset", "form"]) == 1
    assert "no column 'form', which --offset names" in " ".join(capsys.readouterr().err.split())
