"""The audit from the command line to the stream: copies are found and why, the list is honoured,
nothing else is touched.
"""

import errno
import io
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.audio import TEXTURE_HZ, encode_audio, mp3, texture
from tests.support.downloads import tar_of
from whisper_aut.cli import main
from whisper_aut.corpora.audit import names_of, read_audit, run_audit, unaudited
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.filters import excluded_from, read_exclusions
from whisper_aut.data.shards import open_index
from whisper_aut.data.writer import ShardWriter, index_folder
from whisper_aut.errors import SkipReason, UserError


def write(folder: Path, clips: dict[str, tuple[str, bytes, Annotation]]) -> Path:
    with ShardWriter(folder, max_bytes=200_000) as shards:
        for key, (suffix, audio, annotation) in clips.items():
            shards.write(key, suffix, audio, annotation)
    return folder


def flac(samples: np.ndarray) -> bytes:
    return encode_audio(samples, TEXTURE_HZ)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training clips, some of which are probe clips in disguise, and the probe clips."""
    root = tmp_path_factory.mktemp("audit")
    sounds = [texture(seed, 4.0) for seed in range(6)]
    flacs = [flac(sound) for sound in sounds]
    decoded, _ = soundfile.read(io.BytesIO(flacs[1]), dtype="int16")
    note = Annotation(text="rain")
    probe = write(
        root / "probe",
        {
            **{
                f"p{number}": ("flac", audio, Annotation(text="rain", source="ours"))
                for number, audio in enumerate(flacs)
            },
            "1-100032-A-0": ("flac", flac(texture(50)), note),
        },
    )
    others = {f"other-{seed}": ("flac", flac(texture(seed)), note) for seed in range(300, 310)}
    train = write(
        root / "train",
        {
            **others,
            "same_bytes": ("flac", flacs[0], note),
            "same_samples": ("wav", encode_audio(decoded, TEXTURE_HZ, "WAV"), note),
            "cut_mp3": ("mp3", mp3(0.3 * sounds[2][TEXTURE_HZ // 2 :], TEXTURE_HZ), note),
            "named": (
                "flac",
                flac(texture(60)),
                Annotation(text="dog", extra={"freesound_id": 100032}),
            ),
            "broken": ("flac", flacs[3][:200], note),
        },
    )
    return train, probe


def test_copies_are_found_with_the_reason_and_nothing_else(
    corpora: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    train, probe = corpora
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "data",
                "audit",
                str(train),
                "--against",
                str(probe),
                "--out",
                "found",
                "--workers",
                "2",
            ]
        )
        == 0
    )
    assert "data.exclude=found/exclude.jsonl" in capsys.readouterr().out
    audit = read_audit(Path("found/audit.json"))
    found = {match["train"]["key"]: match for match in audit["matches"]}
    kinds = {key: {reason["kind"] for reason in match["evidence"]} for key, match in found.items()}
    assert kinds == {
        "same_bytes": {"bytes", "samples", "sound"},
        "same_samples": {"samples", "sound"},
        "cut_mp3": {"sound"},
        "named": {"name"},
    }
    assert {key: match["probe"]["key"] for key, match in found.items()} == {
        "same_bytes": "p0",
        "same_samples": "p1",
        "cut_mp3": "p2",
        "named": "1-100032-A-0",
    }
    assert audit["counts"]["train_clips"] == 14
    assert audit["train"][0]["skipped"] == {str(SkipReason.UNDECODABLE): 1}
    index = open_index(train)
    assert {key for _, key in excluded_from(index, read_exclusions("found/exclude.jsonl"))} == set(
        found
    )
    assert unaudited(audit, "train", [str(train)]) == unaudited(audit, "probes", [str(probe)]) == []
    assert unaudited(audit, "probes", [str(train)]) == [str(train)]


def test_a_stopped_audit_resumes(
    corpora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train, probe = corpora
    whole = run_audit([str(train)], [str(probe)], tmp_path / "whole", workers=1, progress=False)
    from whisper_aut.corpora import audit

    read, seen = audit._read_train, []

    def stop_at_the_third(tar, probes):
        seen.append(tar)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(tar, probes)

    monkeypatch.setattr(audit, "_read_train", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_audit([str(train)], [str(probe)], tmp_path / "stopped", workers=1, progress=False)
    resumed = run_audit([str(train)], [str(probe)], tmp_path / "stopped", workers=1, progress=False)
    assert (
        len(seen) == len(open_index(train).shards) + 1
    )  # only the tar that was cut short is read again
    assert resumed["matches"] == whole["matches"]
    assert resumed["counts"] == whole["counts"]
    assert not (tmp_path / "stopped" / ".audit.jsonl").exists()


def test_an_audit_that_fails_stops_its_workers(
    corpora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("whisper_aut.corpora.audit.Journal.add", fail)
    train, probe = corpora
    with pytest.raises(UserError, match="No space left") as failure:
        run_audit([str(train)], [str(probe)], tmp_path, workers=2, progress=False)
    assert failure.traceback, "held, as by the command line until it exits"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("key", "annotation", "expected"),
    [
        ("0001", Annotation(), set()),
        ("clip_0012", Annotation(), set()),
        ("0012", Annotation(source="Set A"), {"set_a:0012"}),
        ("1-100032-A-0", Annotation(), {"file:1_100032_a_0", "freesound:100032"}),
        ("100032", Annotation(source="FSD50K"), {"fsd50k:100032", "freesound:100032"}),
        (
            "100263-2-0-117",
            Annotation(source="UrbanSound8K"),
            {"urbansound8k:100263_2_0_117", "file:100263_2_0_117", "freesound:100263"},
        ),
        (
            "YrbFXkhbpFJA",
            Annotation(source="AudioSet"),
            {"audioset:yrbfxkhbpfja", "youtube:rbFXkhbpFJA"},
        ),
        ("a", Annotation(extra={"ytid": "rbFXkhbpFJA"}), {"youtube:rbFXkhbpFJA"}),
    ],
)
def test_names(key: str, annotation: Annotation, expected: set[str]):
    assert names_of(key, annotation) == expected


def test_tars_that_are_not_next_to_their_index_and_have_no_texts_are_compared(tmp_path: Path):
    clips = {f"{seed}.flac": flac(texture(seed, 1.0)) for seed in (400, 401)}
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "tars" / "a.tar", clips)
    index_folder(tmp_path / "tars", tmp_path / "index")
    folders = [str(tmp_path / "index")], [str(tmp_path / "tars")]
    for train, probes in (folders, folders[::-1]):
        audit = run_audit(train, probes, tmp_path / "out", workers=1, progress=False)
        assert audit["counts"]["train_clips_that_overlap"] == 2
