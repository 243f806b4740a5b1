"""A whole experiment through the command line at tiny size: what is done is not repeated, what changed is, and a stop is no loss."""

from pathlib import Path

import pytest
import yaml

from tests.support import REPOSITORY
from tests.support.audio import TONES
from whisper_aut.cli import main
from whisper_aut.errors import Interrupted
from whisper_aut.experiments import conduct
from whisper_aut.experiments.analysis import Results


@pytest.fixture
def experiment(tmp_path: Path, tiny_whisper: Path, tiny_shards: Path) -> Path:
    """Two arms, one seed, a start; on the shards of the tests."""
    task = tmp_path / "tones.yaml"
    task.write_text(yaml.safe_dump({**TONES, "train": ["{root}/speech"], "test": ["{root}/sound"]}))
    sources = [
        {"path": str(tiny_shards / domain), "domain": domain}
        for domain in ("speech", "sound", "music")
    ]
    everywhere = {
        "corpora": {"demo": None},
        "model": {"after": "", "path": str(tiny_whisper)},
        "data": {"train": sources, "valid": sources, "workers": 0, "batch_clips": 4},
        "trainer": {"max_steps": 2, "valid_every_steps": 1, "generate_clips": 0},
    }
    values = {
        "name": "tried",
        "title": "Tried",
        "question": "Which?",
        "config": "smoke.yaml",
        "conf": str(REPOSITORY / "conf"),
        "runs": str(tmp_path / "runs"),
        "seeds": [0],
        "everywhere": everywhere,
        "starts": {"base": {"config": "smoke.yaml"}},
        "axes": {
            "mixture": {
                "even": {"start": "base"},
                "speech": {"start": "base", "set": {"data": {"domains": {"sound": 0}}}},
            }
        },
        "reference": "even",
        "probes": [{"root": str(tiny_shards), "tasks": [str(task)]}],
        "thresholds": [100.0],
        "figure": {"x": "mixture", "curves": True},
    }
    path = tmp_path / "tried.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def trained(folder: Path) -> dict[str, int]:
    return {
        place.name: len(list(place.glob("2*")))
        for place in (folder / "runs").iterdir()
        if place.name.endswith("-s0")
    }


def test_an_experiment_runs_what_is_missing_and_nothing_twice(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = ["--out", str(tmp_path / "out")]
    made, make = [], conduct.make

    def stopping(run, console):
        made.append(run.name)
        if len(made) == 2:
            raise Interrupted("stopped behind step 1")
        return make(run, console)

    monkeypatch.setattr(conduct, "make", stopping)
    assert main(["experiment", str(experiment), *out]) == 130
    assert "tried stopped at run 2 of 3, tried-even-s0" in capsys.readouterr().err
    assert main(["experiment", str(experiment), *out]) == 0  # the same command goes on
    assert made == ["start-base-s0", "tried-even-s0", "tried-even-s0", "tried-speech-s0"]
    assert trained(tmp_path) == {"start-base-s0": 1, "tried-even-s0": 1, "tried-speech-s0": 1}
    results = Results.load(tmp_path / "out" / "tried.json")
    (even, speech) = results.measures
    assert (even.cost.steps, even.cost.padding_fraction) == (2, 0.0)  # pyright: ignore[reportOptionalMemberAccess]
    assert [point.step for point in even.curve] == [1, 2]
    assert even.curve[-1].audio_seconds == pytest.approx(even.cost.audio_seconds)  # pyright: ignore[reportOptionalMemberAccess]
    assert (
        even.curve[0].teraflop
        < even.curve[1].teraflop
        == pytest.approx(even.cost.teraflop, abs=1e-6)
    )  # pyright: ignore
    assert set(even.tasks) == {"tones"} == set(results.baseline)
    assert speech.commands[1].endswith("model.after= model.scratch=null")
    assert "11 overlap" in results.audits[0]  # of the shards of the tests, which are trained on
    text = (tmp_path / "out" / "tried.md").read_text()
    assert "Price of a validation loss" in text
    assert str(tmp_path / "out" / "tried.png") not in text  # the page and the picture move together

    assert "no claim (1 training)" in text

    capsys.readouterr()
    assert main(["experiment", str(experiment), "--plan"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 runs to make" in told
    assert "Fewer than 5 seeds: differences are shown, and nothing is claimed." in told
    assert main(["experiment", str(experiment), *out, "axes.mixture.speech.set.optim.lr=1e-3"]) == 0
    assert made[4:] == ["tried-speech-s0"]  # what changed is made anew, the rest is not
    assert trained(tmp_path) == {"start-base-s0": 1, "tried-even-s0": 1, "tried-speech-s0": 2}
    assert main(["experiment", str(experiment), *out]) == 0  # and back: the older run still counts
    assert len(made) == 5


def test_a_primary_comparison_that_nothing_measures_is_found_before_training(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    primary = ["primary.arm=speech", "primary.endpoint=answers"]
    assert main(["experiment", str(experiment), *primary]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "primary.endpoint: answers is not measured. Measured: compute, loss, sound." in told
    assert not (tmp_path / "runs").exists()
