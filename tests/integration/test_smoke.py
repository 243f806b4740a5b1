"""The whole pipeline through the real command line: synthesised corpus → training → export → probes
→ report, twice.
"""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml

from tests.support import REPOSITORY
from tests.support.audio import encode_audio, tone
from whisper_aut import load_encoder
from whisper_aut.cli import main


@pytest.fixture(scope="module")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_in_a_process(folder)
    return folder


def train_arguments(folder: Path, config: str = "smoke") -> list[str]:
    return [
        "train",
        str(REPOSITORY / "conf" / f"{config}.yaml"),
        f"data.shards={folder}/data",
        f"runs={folder}/runs",
        f"probe.root={folder}/data/demo",
        "hardware.threads=1",
    ]


def run_in_a_process(folder: Path) -> None:
    command = [sys.executable, "-m", "whisper_aut.cli", *train_arguments(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_shards_to_report(pipeline_run: Path):
    run = pipeline_run / "runs" / "smoke" / "latest"
    scores = json.loads((run / "scores.json").read_text())
    assert {entry["encoder"] for entry in scores["entries"]} == {
        "log-mel statistics",
        "random",
        "smoke_speech",
        "smoke",
    }
    assert {entry["task"] for entry in scores["entries"]} == {
        "demo_speech",
        "demo_sound",
        "demo_music",
    }
    report = (run / "report" / "report.md").read_text()
    assert "protocol strict" in report
    for picture in ("scores.png", "losses.png"):
        assert (run / "report" / picture).read_bytes().startswith(b"\x89PNG")
    assert load_encoder(str(run / "export" / "encoder")).width == 32


def test_the_config_that_it_starts_after_runs_on_as_many_threads(pipeline_run: Path):
    configs = [
        pipeline_run / "runs" / name / "latest" / "config.yaml"
        for name in ("smoke_speech", "smoke")
    ]
    assert [yaml.safe_load(config.read_text())["hardware"]["threads"] for config in configs] == [
        1,
        1,
    ]


def test_the_second_run_trains_nothing_again(
    pipeline_run: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(path.name for path in (pipeline_run / "runs" / "smoke").iterdir())
    assert main(train_arguments(pipeline_run)) == 0
    assert "which has the same config" in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in (pipeline_run / "runs" / "smoke").iterdir()) == before


def test_the_export_command_gives_the_same_encoder(pipeline_run: Path):
    run = pipeline_run / "runs" / "smoke" / "latest"
    assert main(["export", str(run), "--out", str(pipeline_run / "again")]) == 0
    assert (
        load_encoder(str(pipeline_run / "again")).fingerprint()
        == load_encoder(str(run / "export" / "encoder")).fingerprint()
    )


@pytest.fixture(scope="module")
def uniwhisper(pipeline_run: Path) -> Path:
    """The same pipeline with a language model, on the shards and the first stage that are there
    already.
    """
    assert main(train_arguments(pipeline_run, "smoke_uniwhisper")) == 0
    return pipeline_run / "runs" / "smoke_uniwhisper" / "latest"


def test_uniwhisper_goes_through_the_same_doors(
    uniwhisper: Path, pipeline_run: Path, capsys: pytest.CaptureFixture[str]
):
    assert load_encoder(str(uniwhisper / "export" / "encoder")).width == 32
    scores = json.loads((uniwhisper / "scores.json").read_text())
    assert "smoke_uniwhisper" in {entry["encoder"] for entry in scores["entries"]}
    assert (uniwhisper / "report" / "report.md").exists()
    export = ["export", str(uniwhisper), "--out", str(pipeline_run / "again_uniwhisper")]
    assert main(export) == 0
    assert main([*export, "--format", "whisper"]) == 1
    assert "did not train a Whisper decoder" in " ".join(capsys.readouterr().err.split())
    assert main([*export, "--format", "whisper", "--decoder", "pretrained"]) == 0


def test_a_trained_run_answers_and_is_measured(
    uniwhisper: Path,
    pipeline_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    clip = pipeline_run / "clip.wav"
    clip.write_bytes(encode_audio(tone(0.7), kind="WAV"))
    assert main(["chat", str(uniwhisper), str(clip), "What do you hear?"]) == 0
    monkeypatch.setattr("sys.stdin", StringIO("What is it?\nAnd now?\n\n"))
    assert main(["chat", str(uniwhisper), str(clip)]) == 0
    capsys.readouterr()
    shards, out = (
        str(pipeline_run / "data" / "demo" / "test" / "sound"),
        pipeline_run / "answers.jsonl",
    )
    assert (
        main(["evaluate", str(uniwhisper), shards, "--tasks", "sound_class", "--out", str(out)])
        == 0
    )
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert entries
    assert {entry["task"] for entry in entries} == {"sound_class"}
    exact = sum(
        entry["generated"].lower() == entry["reference"].lower() for entry in entries
    ) / len(entries)
    assert f"exact_sound_class            {exact:.4f}" in capsys.readouterr().out


def test_mistakes_in_questions_are_named(
    uniwhisper: Path, pipeline_run: Path, capsys: pytest.CaptureFixture[str]
):
    clip, broken, shards = (
        pipeline_run / "a.wav",
        pipeline_run / "broken.wav",
        str(pipeline_run / "data" / "demo" / "test" / "sound"),
    )
    whisper_run = str(pipeline_run / "runs" / "smoke" / "latest")
    clip.write_bytes(encode_audio(tone(0.7), kind="WAV"))
    broken.write_text("not audio")
    for arguments, message in (
        (["chat", whisper_run, str(clip), "What?"], "takes no questions"),
        (["chat", str(uniwhisper), "gone.wav", "What?"], "Cannot read gone.wav"),
        (["chat", str(uniwhisper), str(broken), "What?"], "undecodable audio"),
        (
            ["evaluate", str(uniwhisper), shards, "--tasks", "sound_clas"],
            "Did you mean 'sound_class'",
        ),
        (["evaluate", whisper_run, shards, "--tasks", "sound_class"], "has no tasks such as"),
        (["chat", "nowhere", str(clip), "What?"], "neither a run directory"),
    ):
        assert main(arguments) == 1, arguments
        assert message in " ".join(capsys.readouterr().err.split())
