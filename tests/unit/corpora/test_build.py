import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.cli import main
from whisper_aut.corpora import build as build_module
from whisper_aut.corpora.build import BuildReport, EncodedClip, build_shards, read_clip
from whisper_aut.corpora.manifest import ManifestSpec
from whisper_aut.data import writer
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.errors import SkipReason, SkipSample, UserError

REAL_CORPORA = Path(__file__).parents[4] / "shared" / "data"


def noise(seconds: float = 0.5, rate_hz: int = 16_000, channels: int = 1) -> np.ndarray:
    samples = (
        np.random.default_rng(0)
        .uniform(-0.5, 0.5, (round(seconds * rate_hz), channels))
        .astype(np.float32)
    )
    return samples[:, 0] if channels == 1 else samples


def write(
    path: Path, samples: np.ndarray | None = None, rate_hz: int = 16_000, **options: Any
) -> Path:
    soundfile.write(path, noise() if samples is None else samples, rate_hz, **options)
    return path


def corpus(folder: Path, clips: int = 4, rows: str = "") -> Path:
    """A folder of tiny clips, `0.wav` in fold 0 to the last, and its manifest, to which `rows` are
    appended.
    """
    folder.mkdir(exist_ok=True)
    for number in range(clips):
        write(folder / f"{number}.wav", noise(0.2 + number / 100))
    lines = "".join(f"{number}.wav,clip {number},{number % 2}\n" for number in range(clips))
    (folder / "clips.csv").write_text("filename,text,fold\n" + lines + rows)
    return folder / "clips.csv"


def build(manifest: Path, out: Path, workers: int = 1, **options: Any) -> BuildReport:
    spec = {
        name: options.pop(name)
        for name in ("split_by", "where", "text", "audio_root")
        if name in options
    }
    return build_shards(
        ManifestSpec(manifest, **spec), out, workers=workers, progress=False, **options
    )


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_skipped(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_rows_become_samples_with_the_files_own_bytes(tmp_path: Path):
    report = build(corpus(tmp_path / "in"), tmp_path / "out")
    assert (report.clips, report.rows, report.skipped, report.reused) == (4, 4, {}, False)
    assert report.seconds == pytest.approx(0.86)
    found = members(tmp_path / "out")
    assert list(found) == [
        f"{number}.{suffix}" for number in range(4) for suffix in ("json", "wav")
    ]
    assert found["2.wav"] == (tmp_path / "in/2.wav").read_bytes()
    annotation = json.loads(found["2.json"])
    assert annotation == {
        "text": "clip 2",
        "duration_seconds": 0.22,
        "id": "2",
        "filename": "2.wav",
        "fold": "0",
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        INDEX_NAME,
        "shard-000000.samples.npy",
        "shard-000000.tar",
    ]


def test_shards_are_the_same_whatever_the_number_of_workers(tmp_path: Path):
    manifest = corpus(tmp_path / "in", 40, "missing.wav,t,1\nclips.csv,t,1\n0.wav,,1\n")
    for workers in (1, 2, 3):
        build(manifest, tmp_path / str(workers), workers, max_shard_bytes=50_000)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")
    assert len(open_index(tmp_path / "1").shards) > 1


def test_each_value_of_split_by_gets_its_own_folder(tmp_path: Path):
    report = build(corpus(tmp_path / "in", 5), tmp_path / "out", split_by="fold")
    assert report.folders == {"0": tmp_path / "out/0", "1": tmp_path / "out/1"}
    assert {split: open_index(folder).samples for split, folder in report.folders.items()} == {
        "0": 3,
        "1": 2,
    }
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    assert build(tmp_path / "in/clips.csv", tmp_path / "out", split_by="fold").reused


def test_skipped_rows_are_counted_listed_and_written_into_the_index(tmp_path: Path):
    folder = tmp_path / "in"
    manifest = corpus(
        folder,
        12,
        "text.wav,t,0\nempty.wav,t,0\nnan.wav,t,1\nlong.wav,t,1\ngone.wav,t,1\n0.wav,,0\n,t,0\nin,t,0\n",
    )
    (folder / "text.wav").write_text("this is text " * 100)
    (folder / "in").mkdir()
    write(folder / "empty.wav", np.zeros(0, np.float32))
    write(folder / "nan.wav", np.full(16_000, np.nan, np.float32), subtype="FLOAT")
    write(folder / "long.wav", noise(31))
    report = build(manifest, tmp_path / "out", split_by="fold")
    expected = [
        (14, "undecodable audio"),
        (15, "empty audio"),
        (16, "non-finite audio"),
        (17, "audio too long"),
        (18, "missing file"),
        (19, "no text"),
        (20, "bad manifest row"),
        (21, "missing file"),
    ]
    assert [(row["line"], row["reason"]) for row in read_skipped(tmp_path / "out")] == expected
    assert read_skipped(tmp_path / "out")[4]["path"] == str(folder / "gone.wav")
    assert report.skipped["missing file"] == 2
    assert (report.clips, sum(report.skipped.values())) == (12, 8)
    metadata = open_index(tmp_path / "out/1").metadata
    assert metadata["skipped"] == {"non-finite audio": 1, "audio too long": 1, "missing file": 1}
    assert metadata["build"]["skipped"] == report.skipped
    assert "2 missing file" in report.summary()


def test_the_list_of_skipped_rows_is_removed_when_there_are_none(tmp_path: Path):
    manifest = corpus(tmp_path / "in", 4, "gone.wav,t,1\n")
    build(manifest, tmp_path / "out")
    write(tmp_path / "in/gone.wav")
    assert build(manifest, tmp_path / "out").skipped == {}
    assert not (tmp_path / "out/skipped.jsonl").exists()


def test_too_many_skipped_rows_fail_with_their_reasons_and_leave_no_shards(tmp_path: Path):
    folder = tmp_path / "in"
    manifest = corpus(folder, 1, "a.wav,t,0\nb.wav,t,0\n")
    for name in ("a.wav", "b.wav"):
        (folder / name).write_text("text")
    with pytest.raises(
        UserError,
        match=r"2 of 3 rows .* more than the 50%.*\n +2  undecodable audio, "
        r"first in line 3: .*a\.wav",
    ):
        build(manifest, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["skipped.jsonl"]
    assert build(manifest, tmp_path / "out", max_skipped_fraction=0.7).clips == 1


def test_missing_files_are_known_before_anything_is_decoded_and_name_the_root(tmp_path: Path):
    manifest = corpus(tmp_path / "in")
    with pytest.raises(
        UserError,
        match=r"4 of 4 rows(?s:.*)missing file(?s:.*)paths start from "
        rf"{tmp_path}/audio; --audio-root",
    ):
        build(manifest, tmp_path / "out", audio_root=tmp_path / "audio", max_skipped_fraction=1)
    assert not (tmp_path / "out").exists()


def test_a_split_without_a_clip_fails(tmp_path: Path):
    manifest = corpus(tmp_path / "in", 4, "bad.wav,t,9\n")
    (tmp_path / "in/bad.wav").write_text("text")
    with pytest.raises(
        UserError, match=r"All rows of fold '9' were skipped \(1 undecodable audio\)"
    ):
        build(manifest, tmp_path / "out", split_by="fold")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_where_that_keeps_nothing_shows_the_existing_values(tmp_path: Path):
    with pytest.raises(UserError, match=r"--where keeps none of the rows .* fold: 0, 1"):
        build(corpus(tmp_path / "in"), tmp_path / "out", where={"fold": ["7"]})


def test_the_same_inputs_are_not_built_twice(tmp_path: Path):
    manifest = corpus(tmp_path / "in", 4, "gone.wav,t,1\n")
    first = build(manifest, tmp_path / "out")
    before = files(tmp_path / "out")
    again = build(manifest, tmp_path / "out", workers=2)
    assert again.reused
    assert (again.clips, again.rows, again.skipped, again.recipe) == (
        first.clips,
        first.rows,
        first.skipped,
        first.recipe,
    )
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change", ["audio", "manifest", "spec", "limits", "tar gone", "tar cut", "index gone"]
)
def test_any_change_builds_again(tmp_path: Path, change: str):
    manifest, out = corpus(tmp_path / "in"), tmp_path / "out"
    build(manifest, out)
    options: dict[str, Any] = {}
    if change == "audio":  # of the same size
        os.utime(write(tmp_path / "in/0.wav", noise(0.2)[::-1]), (1, 1))
    elif change == "manifest":
        manifest.write_text(manifest.read_text().replace("clip 0", "clip zero"))
    elif change == "spec":
        options = {"text": "about {text}"}
    elif change == "limits":
        options = {"limits": ClipLimits(max_seconds=20)}
    elif change == "tar gone":
        (out / "shard-000000.tar").unlink()
    elif change == "tar cut":
        os.truncate(out / "shard-000000.tar", 1000)
    else:
        (out / "shard-000000.tar").unlink()
        (out / INDEX_NAME).unlink()
    assert not build(manifest, out, **options).reused
    assert open_index(out).samples == len(members(out)) / 2 == 4


SPLIT_BUILD: dict[str, Any] = {"split_by": "fold", "max_shard_bytes": 20_000}


def kill_at(clip: int, manifest: Path, out: Path, **options: Any) -> None:
    """Build in a process that is killed when a clip is about to be written."""

    def run() -> None:
        write, seen = writer.ShardWriter.write, []

        def kill(self: Any, key: str, *rest: Any) -> None:
            seen.append(key)
            if len(seen) == clip:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, key, *rest)

        writer.ShardWriter.write = kill
        build(manifest, out, **options, **SPLIT_BUILD)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_build_goes_on_and_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, out = tmp_path / "in", tmp_path / "out"
    manifest = corpus(folder, 20, "bad.wav,t,1\n" + "".join(f"{n}.wav,b,0\n" for n in range(10)))
    (folder / "bad.wav").write_text("text")
    kill_at(22, manifest, out)
    with pytest.raises(UserError, match="has neither"):
        open_index(out / "0")
    assert not list(out.rglob("*.tar"))
    kept = len(list(out.rglob(".*.tar.json.partial")))
    assert kept >= 4

    read, decoded = build_module.read_clip, []
    monkeypatch.setattr(
        build_module, "read_clip", lambda path, *rest: (decoded.append(path), read(path, *rest))[1]
    )
    report = build(manifest, out, **SPLIT_BUILD)
    finished, decoded_again = report.resumed, len(decoded)
    assert finished >= kept
    assert decoded_again == 31 - finished  # the bad file is read again
    assert f"{finished} had been finished before" in report.summary()
    whole = build(manifest, tmp_path / "whole", **SPLIT_BUILD)
    assert (whole.resumed, len(decoded) - decoded_again) == (0, 31)
    assert files(out) == files(tmp_path / "whole")


def test_a_build_that_was_killed_while_it_published_decodes_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest, out = corpus(tmp_path / "in", 12), tmp_path / "out"
    rename = os.replace

    def die_at_the_second_tar(source: Path, target: Path) -> None:
        if Path(target).name == "shard-000001.tar":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", die_at_the_second_tar)
        with pytest.raises(KeyboardInterrupt):
            build(manifest, out, max_shard_bytes=20_000)
    assert build(manifest, out, max_shard_bytes=20_000).resumed == 12
    build(manifest, tmp_path / "whole", max_shard_bytes=20_000)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("change", ["manifest", "tar", "table"])
def test_what_a_killed_build_left_is_used_only_if_it_fits(change: str, tmp_path: Path):
    manifest, out = corpus(tmp_path / "in", 12), tmp_path / "out"
    kill_at(12, manifest, out)
    if change == "manifest":
        manifest.write_text(manifest.read_text().replace("clip 0", "clip zero"))
    elif change == "tar":
        os.truncate(out / "0/.shard-000000.tar.partial", 1000)
    else:
        (out / "0/.shard-000000.samples.npy.partial").unlink()
    report = build(manifest, out, **SPLIT_BUILD)
    of_other_fold = 3
    assert report.resumed == (0 if change == "manifest" else of_other_fold)
    build(manifest, tmp_path / "whole", **SPLIT_BUILD)
    assert files(out) == files(tmp_path / "whole")


def test_new_rows_are_appended_to_shards_that_stay_as_they_are(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    manifest = corpus(folder, 10)
    first = build(manifest, out, append=True, **SPLIT_BUILD)
    assert (first.appended_to, first.clips) == (0, 10)
    before = files(out)

    corpus(folder, 30)  # the first clips and 20 more
    with (folder / "clips.csv").open("a") as file:
        file.write("new.wav,of a new fold,2\n")
    write(folder / "new.wav")
    kill_at(18, manifest, out, append=True)
    assert {name: files(out)[name] for name in before} == before
    report = build(manifest, out, append=True, **SPLIT_BUILD)
    assert report.resumed > 0
    assert (report.appended_to, report.clips, report.rows) == (10, 31, 31)
    assert "21 of the clips are new, 10 rows were there already" in report.summary()
    after = files(out)
    assert all(after[name] == before[name] for name in before if not name.endswith(INDEX_NAME))
    assert {path.name for path in out.iterdir()} == {"0", "1", "2"}
    texts = [
        json.loads(data)["text"] for name, data in members(out / "0").items() if "json" in name
    ]
    assert texts == [f"clip {number}" for number in range(0, 30, 2)]
    index = open_index(out / "0")
    assert index.seconds == pytest.approx(sum(0.2 + n / 100 for n in range(0, 30, 2)))
    assert index.metadata["domains"] == {"": 15}
    assert sorted(shard.name for shard in index.shards) == sorted(
        path.name for path in (out / "0").glob("*.tar")
    )
    assert build(manifest, out, append=True, **SPLIT_BUILD).reused

    other = folder / "other.csv"  # other rows, of one of the folds
    other.write_text("filename,text,fold,id\n0.wav,again,1,more\n1.wav,there,0,1\n")
    report = build(other, out, append=True, **SPLIT_BUILD)
    assert (report.appended_to, report.clips) == (31, 32)


def test_appending_never_guesses_and_its_result_is_not_built_over(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    manifest = corpus(folder)
    build(manifest, out)
    twice = folder / "twice.csv"
    twice.write_text("filename,text\n0.wav,a\n0.wav,b\n")
    with pytest.raises(UserError, match=r"Line 3 of .*'0' is not one that only this clip has"):
        build(twice, out, append=True)
    with pytest.raises(UserError, match="earlier build with other splits"):
        build(manifest, out, append=True, split_by="fold")
    more = folder / "more.csv"
    more.write_text("filename,text,id\n0.wav,a,new\n")
    assert build(more, out, append=True).clips == 5
    with pytest.raises(UserError, match=r"added with --append\. Add more with --append"):
        build(manifest, out)
    assert main(["data", "build", str(manifest), "--out", str(out), "--append"]) == 0
    assert open_index(out).samples == 5


def test_a_build_that_skipped_too_much_goes_on_with_a_higher_limit(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    manifest = corpus(folder, 4, "".join(f"{n}.txt,t,0\n" for n in range(9)))
    for number in range(9):
        (folder / f"{number}.txt").write_text("text")
    with pytest.raises(UserError, match="9 of 13 rows"):
        build(manifest, out, max_shard_bytes=1)
    assert build(manifest, out, max_shard_bytes=1, max_skipped_fraction=0.8).resumed == 4
    with pytest.raises(UserError, match="9 of 13 rows"):
        build(manifest, out, max_shard_bytes=1)


def test_a_worker_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_module, "read_clip", lambda *_: os._exit(11))
    with pytest.raises(UserError, match=r"worker process died.*--workers 1"):
        build(corpus(tmp_path / "in"), tmp_path / "out", workers=2)
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_workers_do_not_outlive_a_parent_that_was_killed(tmp_path: Path):
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from whisper_aut.corpora import build\n"
        "from whisper_aut.corpora.manifest import ManifestSpec\n"
        "build.read_clip = lambda *_: (os.write(1, b'working\\n'), time.sleep(600))\n"
        "spec = ManifestSpec(Path(sys.argv[1]))\n"
        "build.build_shards(spec, sys.argv[2], workers=2, progress=False)\n"
    )
    command = [sys.executable, "-c", script, str(corpus(tmp_path / "in")), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "working\n"
        parent.kill()
        parent.communicate(
            timeout=60
        )  # ends when the last process that could write to the pipe is gone


def test_a_higher_limit_keeps_long_clips(tmp_path: Path):
    manifest = corpus(tmp_path / "in", 4, "long.wav,long,1\n")
    write(tmp_path / "in/long.wav", noise(30.2))
    build = ["data", "build", str(manifest), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(build) == 0
    assert open_index(tmp_path / "out").samples == 4
    assert main([*build, "--max-seconds", "31"]) == 0
    assert open_index(tmp_path / "out").samples == 5


def test_other_tars_are_never_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="`data build` did not write"):
        build(corpus(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out/shard-000000.tar").read_bytes() == b"somebody's"


def test_shards_of_an_earlier_split_are_not_kept_next_to_new_ones(tmp_path: Path):
    manifest = corpus(tmp_path / "in")
    build(manifest, tmp_path / "out", split_by="fold")
    with pytest.raises(UserError, match="earlier build with other splits"):
        build(manifest, tmp_path / "out")
    with pytest.raises(UserError, match="out/1 holds shards of an earlier build"):
        build(manifest, tmp_path / "out", split_by="fold", where={"fold": ["0"]})


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path: Path):
    manifest = corpus(tmp_path / "in")
    with pytest.raises(UserError, match="it is a file"):
        build(manifest, manifest)
    with pytest.raises(UserError, match="Cannot write shards to"):
        build(manifest, manifest / "below")


@pytest.mark.parametrize(
    ("name", "options", "suffix"),
    [
        ("a.wav", {}, "wav"),
        ("a.WAV", {"format": "WAVEX"}, "wav"),
        ("a.flac", {}, "flac"),
        ("a.ogg", {}, "ogg"),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, "opus"),
        ("a.ogg", {"format": "OGG", "subtype": "OPUS"}, "ogg"),
        ("a.mp3", {}, "mp3"),
        ("a.wav", {"format": "FLAC"}, "flac"),  # the content counts, not the name
    ],
)
def test_audio_in_a_format_of_shards_is_stored_byte_for_byte(
    tmp_path: Path, name: str, options: dict[str, str], suffix: str
):
    path = write(tmp_path / name, **options)
    clip = read_clip(path, ClipLimits())
    assert (clip.audio, clip.suffix) == (path.read_bytes(), suffix)


@pytest.mark.parametrize(
    ("name", "options", "codec"),
    [
        ("a.aiff", {"subtype": "PCM_16"}, "FLAC/PCM_16"),
        ("a.aiff", {"subtype": "PCM_24"}, "FLAC/PCM_24"),
        ("a.au", {"subtype": "ULAW"}, "FLAC/PCM_16"),
        ("a.caf", {"subtype": "ALAC_16"}, "FLAC/PCM_16"),
        ("a.w64", {"subtype": "FLOAT"}, "WAV/FLOAT"),
    ],
)
def test_other_audio_is_reencoded_at_its_own_rate_without_loss(
    tmp_path: Path, name: str, options: dict[str, str], codec: str
):
    path = write(
        tmp_path / name, noise(0.5, 44_100, 2) * 3, 44_100, **options
    )  # louder than full scale, where floats allow it
    clip = read_clip(path, ClipLimits())
    held = soundfile.info(io.BytesIO(clip.audio))
    assert (f"{held.format}/{held.subtype}", clip.suffix) == (codec, codec.split("/")[0].lower())
    before, rate_hz = soundfile.read(path)
    after, rate_after_hz = soundfile.read(io.BytesIO(clip.audio))
    assert rate_hz == rate_after_hz
    assert np.array_equal(before, after)


def test_more_than_two_channels_become_a_mono_wav_of_floats(tmp_path: Path):
    samples = noise(0.5, 8_000, 9)
    clip = read_clip(write(tmp_path / "a.aiff", samples, 8_000), ClipLimits())
    after, _ = soundfile.read(io.BytesIO(clip.audio), dtype="float32")
    assert clip.suffix == "wav"
    np.testing.assert_allclose(after, samples.mean(axis=1), atol=2.0**-15)


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", tmp_path, tmp_path / "gone.wav", tmp_path / ("n" * 300)):
        with pytest.raises(SkipSample) as skipped:
            read_clip(path, ClipLimits())
        assert skipped.value.reason is SkipReason.MISSING_FILE


def test_a_large_file_is_not_read(tmp_path: Path):
    with pytest.raises(SkipSample) as skipped:
        read_clip(write(tmp_path / "a.wav"), ClipLimits(max_bytes=1000))
    assert skipped.value.reason is SkipReason.TOO_LARGE
    assert isinstance(read_clip(tmp_path / "a.wav", ClipLimits()), EncodedClip)


@pytest.mark.skipif(
    not REAL_CORPORA.is_dir(),
    reason="the real corpora are not at ../shared/data next to the repository",
)
@pytest.mark.parametrize(
    ("name", "spec", "clips"),
    [
        (
            "esc10",
            {
                "text": "the sound of a {category:words}",
                "label": "category",
                "split_by": "fold",
                "domain": "sound",
            },
            400,
        ),
        ("gmpieces", {"label": "style", "where": {"fold": ["1", "2"]}, "domain": "music"}, 160),
    ],
)
def test_real_corpora_lose_no_clip(tmp_path: Path, name: str, spec: dict[str, Any], clips: int):
    root = REAL_CORPORA / name
    report = build_shards(
        ManifestSpec(root / f"{name}.csv", root / "audio", **spec), tmp_path, progress=False
    )
    assert (report.clips, report.skipped) == (clips, {})


def test_files_that_need_pyav_are_looked_at_again_once_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    manifest = corpus(tmp_path / "in", rows="clip.m4a,a clip,0\n")
    (tmp_path / "in" / "clip.m4a").write_bytes(bytes(4) + b"ftypM4A " + bytes(100))
    reused = []
    for found in (None, None, "installed", "installed"):
        monkeypatch.setattr("whisper_aut.corpora.build.find_spec", lambda _, found=found: found)
        reused.append(build(manifest, tmp_path / "out").reused)
    assert reused == [False, True, False, True]
