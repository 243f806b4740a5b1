"""probes.tasks: every YAML loads, and a bad one is told all that is wrong with it."""

from pathlib import Path

import pytest

from whisper_aut.errors import UserError
from whisper_aut.probes.tasks import METRICS, list_tasks, load_task, task_from_mapping

TASK_FOLDER = Path(__file__).parents[2] / "conf" / "probe_tasks"
SHIPPED = {"demo_music", "demo_sound", "demo_speech", "esc10", "fsdd", "gmpieces"}


def test_every_shipped_task_loads():
    names = list_tasks(TASK_FOLDER)
    assert set(names) >= SHIPPED
    for name in names:
        task = load_task(name, TASK_FOLDER)
        assert task.name == name
        assert task.source
        assert task.licence
        assert task.metric in METRICS


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
        task_with(train=["{root}/a"], valid=[], test=["{root}/a/", "{fold}/b", "{root"], weight=-1, classes=1, label=" ")
    message = str(caught.value)
    for part in ("6 problems", "{root}/a/' is in train too", "{fold}/b", "weight", "classes", "label"):
        assert part in message


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [unclosed\n", "train: [{root}/x]\n", "name: ${missing}\n"])
def test_files_that_are_no_task(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_task(path, tmp_path)


def test_root_must_be_said_where_it_is_needed(task_with):
    with pytest.raises(UserError, match="data folder"):
        task_with().folders("train", None)
    assert task_with(train=["/plain"]).folders("train", None) == ["/plain"]


def test_missing_keys_are_named():
    with pytest.raises(UserError, match=r"(?s)title.*domain.*train.*test"):
        task_from_mapping({"name": "x"}, "x.yaml")
