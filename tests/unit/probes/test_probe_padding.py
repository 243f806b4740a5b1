"""Padding belongs to each encoder: what runs how by default, what a mark changes, and that tables
say it.
"""

from pathlib import Path

import pytest
import yaml

from tests.support.audio import TONES
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.loading import open_demo_models, open_encoder
from whisper_aut.probes.results import Scores

RUN = "runs/aut_tiny/latest"


def paddings(path: Path) -> dict[str, str]:
    return {entry.encoder: entry.padding for entry in Scores.load(path).entries}


def test_a_run_compares_its_encoder_with_the_released_start_at_the_starts_own_padding(
    pipeline_run: Path,
):
    assert paddings(pipeline_run / RUN / "scores.json") == {
        "log-mel statistics": "",
        "random": "none",
        "tiny": "30s",
        "aut_tiny": "none",
    }
    report = (pipeline_run / RUN / "report" / "report.md").read_text()
    assert "| log-mel statistics | random@none | tiny@30s | aut_tiny@none |" in report
    assert "| aut_tiny@none | tiny@30s |" in report


def test_a_mark_chooses_the_padding_of_one_encoder_and_the_option_that_of_the_others(
    in_pipeline_run: Path, tiny_whisper: Path, tmp_path: Path
):
    (tmp_path / "tones.yaml").write_text(yaml.safe_dump(TONES))
    command = ["probe", RUN, "--tasks", str(tmp_path / "tones.yaml"), "--root", "data"]
    command += ["--seeds", "1", "--kind", "knn", "--out", str(tmp_path / "probe")]
    for encoder in (tiny_whisper, f"{tiny_whisper}@none", f"random:{tiny_whisper}", "logmel"):
        command += ["--against", str(encoder)]
    assert main(command) == 0
    assert paddings(tmp_path / "probe" / "scores.json") == {
        "tiny": "30s",
        "tiny@none": "none",
        "random tiny": "30s",
        "log-mel statistics": "",
        "aut_tiny": "none",
    }
    assert main([*command, "--padding", "30s"]) == 0
    assert paddings(tmp_path / "probe" / "scores.json") == {
        "tiny": "30s",
        "tiny@none": "none",
        "random tiny": "30s",
        "log-mel statistics": "",
        "aut_tiny": "30s",
    }


def test_log_mel_statistics_know_no_padding():
    assert not hasattr(open_encoder("logmel", "30s"), "padding")  # the option is for the others
    with pytest.raises(UserError, match="only Whispers have a padding mode"):
        open_encoder("logmel@30s", None)


def test_the_demo_page_runs_a_run_and_its_start_as_each_was_trained(
    pipeline_run: Path, tiny_whisper: Path
):
    opened = open_demo_models(str(pipeline_run / RUN), "", None).encoders
    assert {name: encoder.padding for name, encoder in opened.items()} == {
        "before": "30s",
        "after": "none",
    }
    opened = open_demo_models(
        f"{pipeline_run / RUN / 'export' / 'encoder'}@30s", f"{tiny_whisper}@none", None
    )
    assert [encoder.padding for encoder in opened.encoders.values()] == ["none", "30s"]
