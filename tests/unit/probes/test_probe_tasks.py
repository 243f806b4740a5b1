"""Probe tasks: every shipped YAML loads, and an error lists all problems of a bad one."""

from collections import Counter
from pathlib import Path

import pytest

from whisper_aut.errors import UserError
from whisper_aut.probes.metrics import ANSWERS
from whisper_aut.probes.tasks import (
    SPLITS,
    expand_suites,
    list_tasks,
    load_task,
    task_from_mapping,
)

TASK_FOLDER = Path(__file__).parents[3] / "conf" / "probe_tasks"
SHIPPED = {"demo_music", "demo_sound", "demo_speech", "esc10", "fsdd", "gmpieces"}


def test_every_shipped_task_loads():
    names = list_tasks(TASK_FOLDER)
    assert set(names) >= SHIPPED
    for name in names:
        task = load_task(name, TASK_FOLDER)
        assert task.name == name
        assert task.source
        assert task.licence
        assert task.metric in ANSWERS


def test_the_public_x_ares_tasks_carry_its_weights():
    tasks = [load_task(name, TASK_FOLDER) for name in list_tasks(TASK_FOLDER)]
    theirs = [task for task in tasks if task.name.startswith("xares_")]
    assert len(theirs) == 22
    assert sum(task.weight for task in theirs) == 38_752
    assert Counter(task.domain for task in theirs) == {"speech": 12, "sound": 6, "music": 4}
    folds = {task.name: len(task.split.folds) for task in theirs if task.split.scheme == "folds"}
    assert folds == {
        "xares_libricount": 5,
        "xares_ravdess": 4,
        "xares_vocal_imitations": 3,
        "xares_esc50": 5,
        "xares_urbansound8k": 10,
        "xares_gtzan": 10,
    }
    classes = {task.name.removeprefix("xares_"): task.classes for task in theirs}
    assert (
        classes["voxceleb1"],
        classes["fluent_speech_commands"],
        classes["fsd50k"],
        classes["fsd18_kaggle"],
    ) == (
        1251,
        248,
        200,
        41,
    )
    crops = {
        task.name.removeprefix("xares_"): task.crop_seconds for task in theirs if task.crop_seconds
    }
    assert crops == {
        "librispeech_gender": 5,
        "voxceleb1": 6,
        "voxlingua33": 10,
        "clotho": 30,
        "fsd50k": 10,
        "fma_small": 10,
        "gtzan": 30,
    }
    headline = {
        "esc50": 50,
        "gtzan_filtered": 10,
        "speech_commands_v2_35": 35,
        "speech_commands_v2_12": 12,
    }
    assert {task.name: task.classes for task in tasks if task.name in headline} == headline


def test_the_table_of_tasks_is_that_of_the_yamls():
    """docs/evaluate.md lists what conf/probe_tasks holds; the failure prints the lines to paste."""
    lines = [
        "| task | domain | classes | metric | split | weight |",
        "|:---|:---|---:|:---|:---|---:|",
    ]
    for task in (load_task(name, TASK_FOLDER) for name in list_tasks(TASK_FOLDER)):
        split = (
            f"{len(task.split.folds)} folds"
            if task.split.scheme == "folds"
            else "/".join(s for s in SPLITS if getattr(task, s))
        )
        lines.append(
            f"| `{task.name}` | {task.domain} | {task.classes or '–'} | {task.metric} "
            f"| {split} | {task.weight:g} |"
        )
    table = "\n".join(lines)
    assert table in (TASK_FOLDER.parents[1] / "docs" / "evaluate.md").read_text(), table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": {"scheme": "folds", "folds": ["a"]}}, "at least two folds"),
        ({"split": {"scheme": "folds", "folds": ["a", "a"]}}, "is in fold 1 too"),
        ({"split": {"scheme": "fold"}}, "Did you mean 'folds'"),
        ({"split": {"folds": ["a", "b"]}}, "needs split.scheme folds"),
        ({"metric": "segment_f1_micro"}, "needs a length"),
        ({"segment_seconds": 1}, "takes none"),
        ({"group_pattern": "^a"}, "group_pattern: needs group"),
        ({"group": "key", "group_pattern": "(a"}, r"group_pattern: missing \)"),
        ({"crop_seconds": 0}, "must be above 0"),
        ({"event": ["start"]}, "three fields"),
    ],
)
def test_mistakes_in_folds_and_answers_are_named(task_with, changes, message):
    if "folds" in str(changes.get("split", {}).get("scheme")):
        changes = {"train": [], "valid": [], "test": []} | changes
    with pytest.raises(UserError, match=message):
        task_with(**changes)


def test_folds_of_esc10_are_the_published_ones():
    task = load_task("esc10", TASK_FOLDER)
    assert task.folders("train", "/data/") == ["/data/esc10/1", "/data/esc10/2", "/data/esc10/3"]
    assert task.folders("valid", "/data") == ["/data/esc10/4"]
    assert task.folders("test", "/data") == ["/data/esc10/5"]


def test_a_task_is_found_by_path(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text((TASK_FOLDER / "fsdd.yaml").read_text())
    assert load_task(path, TASK_FOLDER) == load_task("fsdd", TASK_FOLDER)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(UserError) as caught:
        load_task("esc1O", TASK_FOLDER)
    assert "Did you mean 'esc10'?" in str(caught.value)
    assert "gmpieces" in str(caught.value)


def test_all_schema_problems_at_once(task_with):
    with pytest.raises(UserError) as caught:
        task_with(tittle="x", domain="noise", metric="accurracy", weight="much")
    message = str(caught.value)
    for part in ("tittle", "'title'", "domain", "'accuracy'", "weight"):
        assert part in message


def test_all_problems_of_meaning_at_once(task_with):
    with pytest.raises(UserError) as caught:
        task_with(
            train=["{root}/a"],
            valid=[],
            test=["{root}/a/", "{fold}/b", "{root"],
            weight=-1,
            classes=1,
            label=" ",
        )
    message = str(caught.value)
    for part in (
        "6 problems",
        "{root}/a/' is in train too. Build one folder of shards per split",
        "{fold}/b",
        "weight",
        "classes",
        "label",
    ):
        assert part in message


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "name: [unclosed\n", "train: [{root}/x]\n", "name: ${missing}\n"]
)
def test_files_that_are_not_tasks(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_task(path, tmp_path)


def test_root_is_required_where_it_is_used(task_with):
    with pytest.raises(UserError, match="data folder"):
        task_with().folders("train", None)
    assert task_with(train=["/plain"]).folders("train", None) == ["/plain"]


def test_missing_keys_are_named():
    with pytest.raises(UserError, match=r"(?s)title.*domain.*train.*test"):
        task_from_mapping({"name": "x"}, "x.yaml")


def test_suites_expand_to_their_tasks():
    suites = TASK_FOLDER.parent / "suites"
    xares = expand_suites(["xares"], suites)
    assert xares == [name for name in list_tasks(TASK_FOLDER) if name.startswith("xares_")]
    assert len(xares) == 22
    named = expand_suites(["headline", "small", "esc50", "mine.yaml"], suites)
    assert named.count("esc50") == 1
    assert named[-1] == "mine.yaml"
    for name in named[:-1]:
        load_task(name, TASK_FOLDER)


def test_a_mistake_in_the_suites_is_named(tmp_path):
    assert expand_suites(["esc50"], tmp_path / "none") == ["esc50"]
    (tmp_path / "mine.yaml").write_text("task: [esc50]")
    with pytest.raises(UserError, match=r"(?s)tasks: missing.*task: unknown key"):
        expand_suites(["mine"], tmp_path)
