"""`data build folder`: corpora that nobody wrote a recipe for."""

from pathlib import Path

import pytest

from tests.support.audio import encode_audio, tone
from tests.support.downloads import csv, lay_out, samples
from whisper_aut.audio.decode import AUDIO_SUFFIXES
from whisper_aut.cli import main
from whisper_aut.corpora.recipes.base import audio_files
from whisper_aut.data.shards import open_index

WAV = encode_audio(tone(0.5), kind="WAV")


def test_a_table_next_to_the_audio_is_read(tmp_path: Path):
    table = csv("filename,fold,category", "a.wav,1,dog", "b.wav,2,cat")
    raw = lay_out(tmp_path / "raw", {"audio/a.wav": WAV, "audio/b.wav": WAV, "clips.csv": table})
    out = str(tmp_path / "out")
    command = ["data", "build", "folder", str(raw), "--out", out, "--workers", "1"]
    assert main([*command, "--text", "the sound of a {category}", "--domain", "sound"]) == 0
    (sample,) = samples(tmp_path / "out" / "2")
    assert (sample.annotation.label, sample.annotation.text, sample.annotation.domain) == (
        "cat",
        "the sound of a cat",
        "sound",
    )


@pytest.mark.parametrize("nothing", ["null", '""'])
def test_a_row_of_a_table_without_a_split_is_skipped(nothing: str, tmp_path: Path):
    """Its clip used to put all splits into one folder, or to be a split called None."""
    table = "".join(
        f'{{"file": "{name}.wav", "split": {split}, "category": {number}}}\n'
        for number, (name, split) in enumerate([("a", '"train"'), ("b", '"test"'), ("c", nothing)])
    )
    files = {f"{name}.wav": WAV for name in "abc"} | {"clips.jsonl": table.encode()}
    raw, out = lay_out(tmp_path / "raw", files), tmp_path / "out"
    command = ["data", "build", "folder", str(raw), "--out", str(out), "--workers", "1"]
    assert main(command) == 0
    found = {path.parent.name: samples(path.parent) for path in out.glob("*/index.json")}
    labels = {split: [one.annotation.label for one in own] for split, own in found.items()}
    assert labels == {"train": ["0"], "test": ["1"]}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["7/a.wav", "8/a.wav"], {"": {"7", "8"}}),  # digits, and no folds
        (["1/dog/a.wav", "2/cat/a.wav"], {"1": {"dog"}, "2": {"cat"}}),
        (["fold_1/dog/a.wav", "Test/cat/a.wav"], {"fold_1": {"dog"}, "Test": {"cat"}}),
        (
            ["dog/a.aiff", "cat/b.WAV", ".trash/x/c.wav", "__MACOSX/dog/d.wav", "dog/.e.wav"],
            {"": {"dog", "cat"}},
        ),
    ],
)
def test_folders_of_classes_and_splits(
    files: list[str], splits: dict[str, set[str]], tmp_path: Path
):
    aiff = encode_audio(tone(0.5), kind="AIFF", subtype="PCM_16")
    raw = lay_out(
        tmp_path / "raw", {name: aiff if name.endswith("aiff") else WAV for name in files}
    )
    assert (
        main(
            ["data", "build", "folder", str(raw), "--out", str(tmp_path / "out"), "--workers", "1"]
        )
        == 0
    )
    assert {
        split: {sample.annotation.label for sample in samples(tmp_path / "out" / split)}
        for split in splits
    } == splits


@pytest.mark.parametrize(
    "name", ["dog/takes/a.wav", "train/a.wav", "fold1/a.wav", "train/dog/a/b.wav"]
)
def test_a_file_too_high_or_too_deep_is_an_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    raw = lay_out(
        tmp_path / "raw",
        {
            name: WAV,
            f"{Path(name).parts[0]}/cat/b.wav" if "dog/t" not in name else "cat/b.wav": WAV,
        },
    )
    assert main(["data", "build", "folder", str(raw), "--out", str(tmp_path / "out")]) == 1
    assert "is not in the folder of a class" in capsys.readouterr().err.replace("\n", " ")


def test_recipes_find_all_files_that_can_be_decoded(tmp_path: Path):
    names = [f"{index}.{suffix}" for index, suffix in enumerate(AUDIO_SUFFIXES)]
    lay_out(tmp_path, dict.fromkeys([*names, "notes.txt", ".hidden.wav"], WAV))
    assert [path.name for path in audio_files(tmp_path)] == names


def test_unreadable_files_of_a_folder_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    raw = lay_out(
        tmp_path / "raw", {"dog/a.wav": WAV, "dog/b.wav": WAV, "dog/c.m4a": b"\0\0\0 ftypM4A "}
    )
    assert (
        main(
            ["data", "build", "folder", str(raw), "--out", str(tmp_path / "out"), "--workers", "1"]
        )
        == 0
    )
    assert "undecodable audio" in capsys.readouterr().out
    table = csv("filename,fold,category", "a.wav,1,dog", "b.wav,2,cat,too,many", "c.wav,2,cat")
    raw = lay_out(
        tmp_path / "table",
        {"audio/a.wav": WAV, "audio/b.wav": WAV, "audio/c.wav": WAV, "clips.csv": table},
    )
    assert (
        main(
            ["data", "build", "folder", str(raw), "--out", str(tmp_path / "rows"), "--workers", "1"]
        )
        == 0
    )
    assert "1 bad manifest row" in capsys.readouterr().out
    assert "line 3 of clips.csv" in (tmp_path / "rows" / "manifest.jsonl").read_text()
    assert {path.name for path in (tmp_path / "rows").iterdir() if path.is_dir()} == {"1", "2"}


@pytest.mark.parametrize(
    ("name", "clips"),
    [
        ("gmnotes", 797),
        *(
            pytest.param(name, clips, marks=pytest.mark.slow)
            for name, clips in (("esc10", 400), ("fsdd", 3000), ("gmpieces", 400))
        ),
    ],
)
def test_the_real_corpora_build_as_folders(name: str, clips: int, real_data: Path, tmp_path: Path):
    assert (
        main(["data", "build", "folder", str(real_data / name), "--out", str(tmp_path / "out")])
        == 0
    )
    assert (
        sum(
            open_index(folder).samples for folder in (tmp_path / "out").iterdir() if folder.is_dir()
        )
        == clips
    )
