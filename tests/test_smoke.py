"""The whole story through the real command line: synthesised corpus → training → export → probes → report, twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from whisper_aut import load_encoder


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("story")
    run_cli(folder)
    return folder


def run_cli(folder: Path, *extra: str) -> str:
    places = [f"data.shards={folder}/data", f"runs={folder}/runs", f"probe.root={folder}/data/demo"]
    command = [sys.executable, "-m", "whisper_aut.cli", "train", str(REPOSITORY / "conf" / "smoke.yaml"), *places, *extra]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_shards_to_report(story: Path):
    run = story / "runs" / "smoke" / "latest"
    scores = json.loads((run / "scores.json").read_text())
    assert {entry["encoder"] for entry in scores["entries"]} == {"log-mel statistics", "random", "smoke_speech", "smoke"}
    assert {entry["task"] for entry in scores["entries"]} == {"demo_speech", "demo_sound", "demo_music"}
    report = (run / "report" / "report.md").read_text()
    assert "protocol strict" in report
    for picture in ("scores.png", "losses.png"):
        assert (run / "report" / picture).read_bytes().startswith(b"\x89PNG")
    assert load_encoder(str(run / "export" / "encoder")).width == 32


def test_the_second_run_trains_nothing_again(story: Path):
    before = sorted(path.name for path in (story / "runs" / "smoke").iterdir())
    printed = run_cli(story)
    assert "nothing has changed" in printed
    assert sorted(path.name for path in (story / "runs" / "smoke").iterdir()) == before


def test_the_export_command_gives_the_same_encoder(story: Path):
    run = story / "runs" / "smoke" / "latest"
    command = [sys.executable, "-m", "whisper_aut.cli", "export", str(run), "--out", str(story / "again")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert load_encoder(str(story / "again")).fingerprint() == load_encoder(str(run / "export" / "encoder")).fingerprint()
