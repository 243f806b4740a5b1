"""The schema of experiments and what a grid lays out: arms, runs, shared starts, and every mistake by name."""

from pathlib import Path

import pytest
import yaml

from tests.support import REPOSITORY
from whisper_aut.cli import main
from whisper_aut.config import load_settings
from whisper_aut.errors import UserError
from whisper_aut.experiments.grid import all_runs, arms_of, flatten, load_experiment

CONF = REPOSITORY / "conf"
GRID = {
    "name": "tried",
    "title": "Tried",
    "question": "Which?",
    "config": "aut_tiny.yaml",
    "conf": str(CONF),
    "seeds": [0, 7],
    "everywhere": {"data": {"workers": 0}},
    "set": {"trainer": {"max_steps": 9}},
    "starts": {"base": {"config": "speech_tiny.yaml", "set": {"trainer": {"max_steps": 5}}}},
    "axes": {
        "encoder": {"new": {"start": "random:base"}, "old": {"title": "trained", "start": "base"}},
        "padding": {
            "none": {"set": {"model": {"padding": "none"}}},
            "30s": {"set": {"model": {"padding": "30s"}}},
        },
        "heard": {"own": {}, "deviation": {"evaluate": {"pooling": "mean_std", "layer": 0}}},
    },
    "reference": "old/none/own",
    "probes": [{"root": "data/demo", "tasks": ["demo_sound"]}],
    "figure": {"x": "encoder", "colour": "padding", "line": "heard"},
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "tried.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def test_arms_are_all_combinations_and_share_what_they_can(tmp_path: Path):
    path = written(tmp_path)
    arms = arms_of(load_experiment(path), path)
    assert len(arms) == 8
    assert [arm.name for arm in arms][:3] == ["new/none/own", "new/none/deviation", "new/30s/own"]
    own, deviation = arms[0], arms[1]
    assert own.runs == deviation.runs  # heard in two ways, trained once
    assert (deviation.evaluate.pooling, deviation.evaluate.layer) == ("mean_std", 0)
    assert arms[4].titles == ("trained", "none", "own")
    runs = all_runs(arms)
    assert len(runs) == 2 * (1 + 4)  # seeds × (start + encoders × paddings)
    names = [run.name for run in runs]
    for run in runs:
        assert run.start is None or names.index(run.start.name) < names.index(run.name)
    assert [run.random for run in runs if run.start][:2] == [True, True]


def test_the_runs_of_a_seed_come_before_those_of_the_next(tmp_path: Path):
    path = written(tmp_path)
    seeds = [run.name.rsplit("-s", 1)[1] for run in all_runs(arms_of(load_experiment(path), path))]
    assert seeds == sorted(seeds)


def test_overrides_reach_the_runs_and_starts_keep_their_own(tmp_path: Path):
    path = written(tmp_path)
    runs = {
        run.name: run
        for run in all_runs(arms_of(load_experiment(path, ["set.optim.lr=0.5"]), path))
    }
    arm, start = runs["tried-old-30s-s7"], runs["start-base-s7"]
    settings = load_settings(arm.config, arm.overrides)
    assert (
        settings.trainer.max_steps,
        settings.optim.lr,
        settings.model.padding,
        settings.seed,
    ) == (9, 0.5, "30s", 7)
    before = load_settings(start.config, start.overrides)
    assert (before.trainer.max_steps, before.optim.lr, before.seed, before.data.workers) == (
        5,
        2e-3,
        7,
        0,
    )


def test_a_group_is_picked_before_what_is_set_in_it(tmp_path: Path):
    axes = {
        "decoder": {"conv": {"set": {"decoder.adapter.name": "conv", "decoder": "causal_lm_tiny"}}}
    }
    path = written(tmp_path, axes=axes, reference="conv", figure={"x": "decoder"})
    (run, _) = all_runs(arms_of(load_experiment(path), path))
    assert load_settings(run.config, run.overrides).decoder["adapter"]["name"] == "conv"


def test_nested_and_dotted_keys_are_the_same():
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e.f": {}}) == {"a.b.c": 1, "a.d": [], "e.f": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [1]}, "seedz: unknown key. Did you mean 'seeds'"),
        ({"seeds": []}, "seeds: at least 1 is needed"),
        ({"seeds": [1, 1]}, "not different numbers"),
        ({"probe_seeds": 0}, "probe_seeds: 0 is not between 1 and 9"),
        ({"reference": "old/none/owm"}, "no arm 'old/none/owm'. Did you mean 'old/none/own'"),
        (
            {"primary": {"arm": "old/none/deviatoin", "endpoint": "sound"}},
            "primary.arm: there is no arm 'old/none/deviatoin'. Did you mean 'old/none/deviation'",
        ),
        (
            {"primary": {"arm": "old/none/own", "endpoint": "sound"}},
            "primary.arm: old/none/own is the reference",
        ),
        ({"primary": {"arm": "old/30s/own"}}, "primary: needs both an arm and an endpoint"),
        ({"primary": {"arm": "old/30s/own", "endpoint": "sounds"}}, "primary.endpoint"),
        ({"margin": 0}, "margin: 0 is not above 0"),
        ({"leave_out": ["old/60s/own"]}, "leave_out: there is no arm"),
        (
            {"figure": {"x": "encodr"}},
            "figure.x: there is no axis 'encodr'. Did you mean 'encoder'",
        ),
        ({"starts": {}}, "there is no start 'base'"),
        (
            {"starts": {"base": {"config": "speech_tiny.yaml", "start": "base"}}},
            "leads back to itself",
        ),
        ({"probes": []}, "nothing is measured"),
        ({"config": "", "axes": {"a": {"b": {}}}, "figure": {"x": "a"}}, "config: missing"),
        (
            {"axes": {**GRID["axes"], "more": {"c": {"start": "base"}}}},
            "only one axis can say where arms start",
        ),
        ({"config": "aut_tinny.yaml"}, "Did you mean 'aut_tiny.yaml'"),
        ({"set": {"trainer": {"max_stepz": 1}}}, "Did you mean 'max_steps'"),
    ],
)
def test_each_mistake_is_named(
    changes: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["experiment", str(written(tmp_path, **changes)), "--plan"]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_optional_probes_may_be_absent_and_others_not(tmp_path: Path):
    from whisper_aut.experiments.conduct import probes_there

    manifest = {"manifest": str(tmp_path / "a.csv"), "out": str(tmp_path / "a")}
    probes = [{"root": "x", "tasks": ["fsdd"], "manifests": [manifest], "optional": True}]
    settings = load_experiment(written(tmp_path, probes=probes))
    assert probes_there(settings) == ([], [str(tmp_path / "a.csv")])
    settings.probes[0].optional = False
    with pytest.raises(UserError, match="root=FOLDER"):
        probes_there(settings)
