"""A tiny experiment through the command line: finished runs are reused, changed ones are trained
again.
"""

from pathlib import Path

import pytest
import yaml

from tests.support.audio import TONES
from whisper_aut.cli import main
from whisper_aut.errors import Interrupted
from whisper_aut.experiments import runner
from whisper_aut.experiments.analysis import Results
from whisper_aut.training.run_dir import list_runs
from whisper_aut.utils import read_json


@pytest.fixture
def experiment(tmp_path: Path, tiny_whisper: Path, tiny_shards: Path) -> Path:
    """Two arms, one seed, one pretraining run, on the shards of the tests."""
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
        "runs": str(tmp_path / "runs"),
        "seeds": [0],
        "everywhere": everywhere,
        "pretraining": {"base": {"config": "smoke.yaml"}},
        "axes": {
            "mixture": {
                "even": {"init_from": "base"},
                "speech": {"init_from": "base", "set": {"data": {"domains": {"sound": 0}}}},
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
        path.name: len(list(path.glob("2*")))
        for path in (folder / "runs").iterdir()
        if path.name.endswith("-s0")
    }


def test_an_experiment_trains_what_is_missing_and_nothing_twice(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = ["--out", str(tmp_path / "out")]
    made, make_run = [], runner.make_run

    def stopping(run, console):
        made.append(run.name)
        if len(made) == 2:
            raise Interrupted("stopped after step 1")
        return make_run(run, console)

    monkeypatch.setattr(runner, "make_run", stopping)
    assert main(["experiment", str(experiment), *out]) == 130
    assert "tried stopped at run 2 of 3, tried-even-s0" in capsys.readouterr().err
    assert main(["experiment", str(experiment), *out]) == 0  # the same command resumes
    assert made == ["pretrained-base-s0", "tried-even-s0", "tried-even-s0", "tried-speech-s0"]
    assert trained(tmp_path) == {"pretrained-base-s0": 1, "tried-even-s0": 1, "tried-speech-s0": 1}
    results = Results.load(tmp_path / "out" / "tried.json")
    even, speech = results.measurements
    first, last = even.curve
    assert (first.step, last.step, even.padding_fraction) == (1, 2, 0.0)
    done = read_json(list_runs(tmp_path / "runs", "tried-even-s0")[0].done)["metrics"]
    assert last.loss == pytest.approx(done["valid/loss"], abs=1e-6)
    assert last.audio_seconds == pytest.approx(done["throughput/total_audio_seconds"])
    assert first.teraflop is not None
    assert last.teraflop == pytest.approx(done["throughput/total_teraflop"], abs=1e-6)
    assert first.teraflop < last.teraflop
    assert set(even.scores) == set(speech.scores) == {"tones"} == set(results.baseline)
    assert "11 training clips overlap" in results.audits[0]  # the tests train on their test shards
    text = (tmp_path / "out" / "tried.md").read_text()
    assert "Cost to reach a validation loss" in text
    assert str(tmp_path / "out" / "tried.png") not in text  # they can be moved together
    assert "no claim (1 run)" in text

    capsys.readouterr()
    assert main(["experiment", str(experiment), "--plan"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 runs to train" in printed
    assert "Fewer than 5 seeds: the results will not support any claim." in printed
    assert main(["experiment", str(experiment), *out, "axes.mixture.speech.set.optim.lr=1e-3"]) == 0
    assert made[4:] == ["tried-speech-s0"]  # only what changed is trained again
    assert trained(tmp_path) == {"pretrained-base-s0": 1, "tried-even-s0": 1, "tried-speech-s0": 2}
    assert main(["experiment", str(experiment), *out]) == 0  # and back: the older run is reused
    assert len(made) == 5


def test_an_unmeasured_primary_comparison_is_rejected_before_training(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    primary = ["primary.arm=speech", "primary.endpoint=answers"]
    assert main(["experiment", str(experiment), *primary]) == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "primary.endpoint: answers is not measured. Measured: compute, loss, sound." in printed
    assert not (tmp_path / "runs").exists()
