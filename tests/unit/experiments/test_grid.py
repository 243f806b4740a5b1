"""Experiment configs: arms, runs, shared pretraining, and all mistakes reported."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.probes import TinyEncoder, write_tones
from whisper_aut.cli import main
from whisper_aut.config import load_settings
from whisper_aut.errors import UserError
from whisper_aut.experiments.analysis import Progress
from whisper_aut.experiments.grid import flatten, load_experiment
from whisper_aut.experiments.runner import Evaluator, available_probes, training_curve
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import write_json

GRID = {
    "name": "tried",
    "title": "Tried",
    "question": "Which?",
    "config": "aut_tiny.yaml",
    "seeds": [0, 7],
    "everywhere": {"data": {"workers": 0}},
    "set": {"trainer": {"max_steps": 9}},
    "pretraining": {"base": {"config": "speech_tiny.yaml", "set": {"trainer": {"max_steps": 5}}}},
    "axes": {
        "encoder": {
            "new": {"init_from": "random:base"},
            "old": {"title": "trained", "init_from": "base"},
        },
        "padding": {
            "none": {"set": {"model": {"padding": "none"}}},
            "30s": {"set": {"model": {"padding": "30s"}}},
        },
        "evaluation": {"own": {}, "deviation": {"evaluate": {"pooling": "mean_std", "layer": 0}}},
    },
    "reference": "old/none/own",
    "probes": [{"root": "data/demo", "tasks": ["demo_sound"]}],
    "figure": {"x": "encoder", "colour": "padding"},
}


def write_experiment(folder: Path, **changes: object) -> Path:
    path = folder / "tried.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def test_arms_are_all_combinations_and_share_what_they_can(tmp_path: Path):
    experiment = load_experiment(write_experiment(tmp_path))
    arms, runs = experiment.arms, experiment.runs
    assert len(arms) == 8
    assert [arm.name for arm in arms][:3] == ["new/none/own", "new/none/deviation", "new/30s/own"]
    own, deviation = arms[0], arms[1]
    assert own.runs == deviation.runs  # evaluated in two ways, trained once
    assert (deviation.evaluate.pooling, deviation.evaluate.layer) == ("mean_std", 0)
    assert list(arms[4].titles.values()) == ["trained", "none", "own"]
    assert len(runs) == 2 * (1 + 4)  # seeds × (pretraining + encoders × paddings)
    names = [run.name for run in runs]
    for run in runs:
        assert run.pretrained is None or names.index(run.pretrained.name) < names.index(run.name)
    assert [run.random for run in runs if run.pretrained][:2] == [True, True]


def test_the_runs_of_a_seed_come_before_those_of_the_next(tmp_path: Path):
    runs = load_experiment(write_experiment(tmp_path)).runs
    seeds = [run.name.rsplit("-s", 1)[1] for run in runs]
    assert seeds == sorted(seeds)


def test_overrides_reach_the_arms_but_not_pretraining(tmp_path: Path):
    experiment = load_experiment(write_experiment(tmp_path), ["set.optim.lr=0.5"])
    runs = {run.name: run for run in experiment.runs}
    arm, pretrained = runs["tried-old-30s-s7"], runs["pretrained-base-s7"]
    settings = load_settings(arm.config, arm.overrides)
    assert (
        settings.trainer.max_steps,
        settings.optim.lr,
        settings.model.padding,
        settings.seed,
    ) == (9, 0.5, "30s", 7)
    before = load_settings(pretrained.config, pretrained.overrides)
    assert (before.trainer.max_steps, before.optim.lr, before.seed, before.data.workers) == (
        5,
        2e-3,
        7,
        0,
    )


def test_a_group_is_chosen_before_its_values_are_overridden(tmp_path: Path):
    axes = {
        "decoder": {"conv": {"set": {"decoder.adapter.name": "conv", "decoder": "causal_lm_tiny"}}}
    }
    path = write_experiment(tmp_path, axes=axes, reference="conv", figure={"x": "decoder"})
    (run, _) = load_experiment(path).runs
    assert load_settings(run.config, run.overrides).decoder["adapter"]["name"] == "conv"


def test_two_runs_cannot_have_the_same_name(tmp_path: Path):
    def switch(key: str, value: float) -> dict[str, object]:
        return {"off": {}, "on": {"set": {key: value}}}

    axes = {"padding": switch("model.pad_to_30s", 0.5), "rate": switch("optim.lr", 0.1)}
    path = write_experiment(tmp_path, axes=axes, reference="off/off", figure={"x": "rate"})
    with pytest.raises(UserError, match="two different runs would have the name tried-on-s0"):
        load_experiment(path)
    axes["rate"] = {"low": {}, "high": {"set": {"optim.lr": 0.1}}}
    path = write_experiment(tmp_path, axes=axes, reference="off/low", figure={"x": "rate"})
    assert len(load_experiment(path).runs) == 2 * 4


def test_nested_and_dotted_keys_are_the_same():
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e.f": {}}) == {"a.b.c": 1, "a.d": [], "e.f": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [1]}, "seedz: unknown key. Did you mean 'seeds'"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "seeds: [1, 1] must be different"),
        ({"reference": "old/none/owm"}, "no arm 'old/none/owm'. Did you mean 'old/none/own'"),
        (
            {"primary": {"arm": "old/none/deviatoin", "endpoint": "sound"}},
            "primary.arm: there is no arm 'old/none/deviatoin'. Did you mean 'old/none/deviation'",
        ),
        (
            {"primary": {"arm": "old/none/own", "endpoint": "sound"}},
            "primary.arm: old/none/own is the reference",
        ),
        ({"primary": {"arm": "old/30s/own"}}, "primary: give both arm and endpoint"),
        ({"primary": {"arm": "old/30s/own", "endpoint": "sounds"}}, "primary.endpoint"),
        ({"margin": 0}, "margin: must be greater than 0, got 0"),
        (
            {"figure": {"x": "encodr"}},
            "figure.x: there is no axis 'encodr'. Did you mean 'encoder'",
        ),
        ({"figure": {"x": ""}}, "figure.x: there is no axis ''"),
        ({"pretraining": {}}, "axes.encoder.old.init_from: there is no pretraining run 'base'"),
        (
            {"pretraining": {"base": {"config": "speech_tiny.yaml", "init_from": "base"}}},
            "pretraining.base: starts from itself",
        ),
        ({"probes": []}, "nothing is measured"),
        ({"config": "", "axes": {"a": {"b": {}}}, "figure": {"x": "a"}}, "config: missing"),
        (
            {"axes": {**GRID["axes"], "more": {"c": {"init_from": "base"}}}},
            "only one axis can have init_from, not encoder and more",
        ),
        ({"config": "aut_tinny.yaml"}, "Did you mean 'aut_tiny'"),
        ({"set": {"trainer": {"max_stepz": 1}}}, "Did you mean 'max_steps'"),
    ],
)
def test_each_mistake_is_named(
    changes: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["experiment", str(write_experiment(tmp_path, **changes)), "--plan"]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_arms_are_tested_on_the_same_clips(tmp_path: Path):
    folders = {part: [f"{{root}}/{part}"] for part in ("train", "valid", "test")}
    task = {"name": "tones", "title": "Tones", "domain": "sound", **folders}
    (tmp_path / "tones.yaml").write_text(yaml.safe_dump(task))
    for number, part in enumerate(folders):
        write_tones(tmp_path / part, 4, number)
    probes = [{"root": str(tmp_path), "tasks": [str(tmp_path / "tones.yaml")]}]
    path = write_experiment(tmp_path, probes=probes, runs=str(tmp_path / "runs"))
    settings = load_experiment(path).settings
    evaluator = Evaluator(settings, tmp_path, settings.probes)
    embedding = EmbedSettings(quiet=True)
    assert set(evaluator.score("one", TinyEncoder(), embedding)) == {"tones"}
    shutil.rmtree(tmp_path / "test")
    write_tones(tmp_path / "test", 5, 9)
    with pytest.raises(UserError, match="different clips of 'tones'"):
        evaluator.score("other", TinyEncoder(1), embedding)


@pytest.mark.parametrize("validated", [True, False])
def test_a_curve_has_each_validation_and_the_end(tmp_path: Path, validated: bool):
    run = RunDirectory(tmp_path)
    total = "throughput/total_"
    head = f"step,valid/loss,{total}audio_seconds,{total}teraflop,{total}seconds\n"
    losses = "9,2.5,,,\n14,2.0,,,\n15,1.9,,,\n" if validated else ""  # the last two: one step
    run.metrics.parent.mkdir()
    run.metrics.write_text(f"{head}10,,100,0.1,7\n15,,150,0.15,11\n{losses}")
    totals = {"audio_seconds": 151.0, "teraflop": 0.16, "seconds": 12.0}
    metrics = {f"{total}{name}": value for name, value in totals.items()}
    write_json(run.done, {"steps": 15, "metrics": metrics})
    expected = (Progress(10, 2.5, 100, 0.1, 7), Progress(15, 1.9, 150, 0.15, 11))
    without = (Progress(15, None, 151, 0.16, 12),)  # the log may end before the run
    assert training_curve(run) == (expected if validated else without)


def test_only_optional_probes_may_be_missing(tmp_path: Path):
    manifest = {"manifest": str(tmp_path / "a.csv"), "out": str(tmp_path / "a")}
    probes = [{"root": "x", "tasks": ["fsdd"], "manifests": [manifest], "optional": True}]
    settings = load_experiment(write_experiment(tmp_path, probes=probes)).settings
    assert available_probes(settings) == ([], [str(tmp_path / "a.csv")])
    settings.probes[0].optional = False
    with pytest.raises(UserError, match="root=FOLDER"):
        available_probes(settings)
