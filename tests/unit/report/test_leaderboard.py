"""Leaderboards: joined files, averages, ranks, letters, recipes, warnings."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from whisper_aut.errors import UserError
from whisper_aut.probes.encoders import EncoderCost
from whisper_aut.probes.results import AVERAGE, Confusion, Scores, TaskScore, append_predictions
from whisper_aut.report.html import build_leaderboard, build_report
from whisper_aut.report.leaderboard import join_scores, leaderboard_rows, recipe_table
from whisper_aut.report.tables import class_tables

COST = EncoderCost("hash", 2_000_000, 64, 50.0, 1.25, 3.5, "CPU (x86_64), 1 thread")


def entry(encoder: str, task: str, rate: float, count: int = 200, **changes) -> TaskScore:
    right = np.random.default_rng(len(encoder)).permutation(count) < rate * count
    values = {
        "encoder": encoder,
        "task": task,
        "title": task.title(),
        "domain": {"bark": "sound", "speak": "speech", "asr": "speech"}[task],
        "weight": {"bark": 1.0, "speak": 3.0, "asr": 6.0}[task],
        "metric": "word_accuracy" if task == "asr" else "accuracy",
        "classes": 2,
        "scores": (float(right.mean()),),
        "chosen": ({"penalty": 1.0},),
        "valid_scores": (0.5,),
        "seeds": (),
        "final_fit": "train",
        "record": ("".join("01"[int(one)] for one in right),),
        "units": (count,),
        "keys_sha256": task,
        "clips": {"train": 40, "valid": 10, "test": count},
        "skipped": {},
        "chance": 0.5,
        "pooling": "mean",
        "identity": f"{encoder}-{task}",
    }
    return TaskScore(**(values | changes))


@pytest.fixture
def save(tmp_path: Path):
    def save(folder: str, *entries: TaskScore, **changes) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "scores.json"
        Scores(entries, settings={"kind": "linear"}, **changes).save(file)
        return file

    return save


def encoder(name: str, bark: float, speak: float, **changes) -> list[TaskScore]:
    return [entry(name, "bark", bark, **changes), entry(name, "speak", speak, **changes)]


def test_averages_ranks_and_letters(save):
    files = [
        save("a", *encoder("best", 0.9, 0.9), entry("best", "asr", 0.5), costs={"best": COST}),
        save("b", *encoder("good", 0.95, 0.86), entry("good", "asr", 0.5)),
        save("c", *encoder("weak", 0.5, 0.5), entry("weak", "asr", 0.5)),
        save("d", entry("part", "bark", 0.99)),
    ]
    (scores, warnings), *others = join_scores(files).values()
    assert not others
    assert warnings == ["part has no score of speak, asr."]
    best, good, weak, part = leaderboard_rows(scores)
    assert [row["encoder"] for row in (best, good, weak, part)] == ["best", "good", "weak", "part"]
    assert [row["group"] for row in (best, good, weak)] == ["a", "a", "b"]
    assert (best["rank"], best["mean rank"]) == (1, pytest.approx((2 + 1 + 2) / 3))  # asr is a tie
    assert best["all tasks, weighted"].mean == pytest.approx((0.9 + 3 * 0.9 + 6 * 0.5) / 10)
    assert best["all but recognition, weighted"].mean == pytest.approx(0.9)
    assert best["speech"].mean == pytest.approx((3 * 0.9 + 6 * 0.5) / 9)
    assert (best["parameters (M)"], best["ms/s of audio"]) == (2.0, 3.5)
    assert "parameters (M)" not in good
    assert part["sound"].mean == pytest.approx(0.99)
    assert not {"rank", "group", "all tasks, weighted", "speech"} & set(part)


def test_files_are_written_and_can_be_sorted(save, tmp_path):
    files = [save("a", *encoder("best", 0.9, 0.8), costs={"best": COST})]
    files.append(save("b", *encoder("weak", 0.5, 0.5)).parent)
    out = tmp_path / "out"
    console = Console(file=io.StringIO(), width=200)
    page = build_leaderboard(files, out, console, [], "").read_text()
    assert "aria-sort" in page
    assert "<button" in page
    assert "src=" not in page
    assert "| best | a | 1 | 1.00 | 0.825 [" in (out / "leaderboard.md").read_text()
    rows = list(csv.DictReader((out / "leaderboard.csv").read_text().splitlines()))
    assert [row["encoder"] for row in rows] == ["best", "weak"]
    assert float(rows[0]["all tasks, weighted"]) == pytest.approx(0.825)
    assert float(rows[0]["Bark"]) == pytest.approx(0.9)
    assert float(rows[0]["Bark (low)"]) < 0.9 < float(rows[0]["Bark (high)"])
    assert (rows[0]["width"], rows[1]["width"]) == ("64", "")


def test_names_that_stand_for_two_encoders(save):
    files = [save("a", *encoder("same", 0.9, 0.9)), save("b", *encoder("same", 0.9, 0.9))]
    files.append(save("c", *encoder("same", 0.8, 0.8, identity="other")))
    ((scores, _),) = join_scores(files).values()
    assert scores.encoders == ["same", "same (c)"]  # the second file repeats the first
    (files[2].parent / "c").mkdir()
    files.append(save("c/c", *encoder("same", 0.7, 0.7, identity="third")))
    ((scores, _),) = join_scores([*files, files[-1]]).values()
    assert scores.encoders == ["same", "same (c)", f"same ({files[-1].parent})"]


def test_other_weights_of_the_same_name_are_another_encoder(save):
    """Also if no task is in both files, so that no two scores differ."""
    files = [save("a", entry("same", "bark", 0.9), costs={"same": COST})]
    files.append(save("b", entry("same", "speak", 0.9), costs={"same": COST}))
    other = replace(COST, fingerprint="other")
    files.append(save("c", entry("same", "speak", 0.8), costs={"same": other}))
    ((scores, _),) = join_scores(files).values()
    found = [(one.encoder, one.task) for one in scores.entries]
    assert found == [("same", "bark"), ("same", "speak"), ("same (c)", "speak")]


def test_encoders_without_a_common_task_have_no_ranks(save, tmp_path):
    files = [save("a", entry("one", "bark", 0.9)), save("b", entry("two", "speak", 0.8))]
    ((scores, _),) = join_scores(files).values()
    assert not any("rank" in row for row in leaderboard_rows(scores))
    build_report([file.parent for file in files], tmp_path / "out", Console(quiet=True))
    with pytest.raises(UserError, match="holds no scores"):
        join_scores([save("c")])


def test_two_tasks_of_one_title_are_two_columns(save):
    scores = [entry("one", "bark", 0.9, title="Dogs"), entry("one", "speak", 0.5, title="Dogs")]
    ((joined, _),) = join_scores([save("a", *scores)]).values()
    (row,) = leaderboard_rows(joined)
    assert (row["Dogs (bark)"].mean, row["Dogs (speak)"].mean) == (0.9, 0.5)


def test_differences_of_protocol_splits_and_audits_are_warnings(save):
    files = [
        save("a", *encoder("one", 0.9, 0.9), costs={"one": COST}),
        save("b", *encoder("two", 0.8, 0.8, keys_sha256="others")),
        save("c", *encoder("three", 0.7, 0.7, final_fit="train+valid", protocol="loose")),
        save("d", *encoder("four", 0.7, 0.7, clips={"train": 9, "test": 200})),
    ]
    other = replace(COST, machine="GPU")
    files.append(save("e", *encoder("five", 0.6, 0.6), costs={"five": other}))
    (files[0].parent / "audit.json").write_text(json.dumps({"version": 2}))
    ((scores, warnings),) = join_scores(files).values()
    text = " ".join(warnings)
    for warning in (
        "bark: two with other test clips than one.",
        "bark: three with another protocol than one.",
        "bark: three with another final fit than one.",
        "bark: four with other numbers of training or validation clips than one.",
        "No audit of overlap with training clips is next to the scores of two, three, four, five",
        "Times are of several machines: CPU (x86_64), 1 thread; GPU.",
    ):
        assert warning in text, warning
    ranked = [row["encoder"] for row in leaderboard_rows(scores) if "rank" in row]
    assert "two" not in ranked  # other clips are not paired
    assert {"one", "three", "five"} <= set(ranked)


def test_recipes_are_compared_by_training(save):
    rates = [0.80, 0.84, 0.83, 0.86, 0.85]
    entries = [one for i, rate in enumerate(rates) for one in encoder(f"new-{i}", rate, 0.7)]
    files = [save("a", *entries), save("b", *encoder("old", 0.75, 0.7))]
    ((scores, _),) = join_scores(files).values()
    table = recipe_table(scores, "new", "old")
    rows = {row[0]: row[1:] for row in table.rows}
    expected = stats.ttest_1samp(100 * np.array(rates) - 75, 0)
    ends = expected.confidence_interval(0.95)
    assert rows["Bark"][0] == f"{100 * np.mean(rates) - 75:+.1f}"
    assert rows["Bark"][2] == f"{ends.low:+.1f} … {ends.high:+.1f}"
    assert rows["Bark"][-1] == "better"
    equal = rows["Speak"][2:]  # all differences are equal, so there is no test
    assert equal == (*"––––", "no difference shown")
    few = replace(scores, entries=tuple(e for e in scores.entries if e.encoder != "new-4"))
    assert {row[-1] for row in recipe_table(few, "new", "old").rows} == {"no claim (4 runs)"}
    assert recipe_table(scores, "new", "new").rows[0][1] == "+0.0"
    with pytest.raises(UserError, match="no trainings nev-0, nev-1, …, and no encoder nev"):
        recipe_table(scores, "nev", "old")


def test_an_average_needs_every_task_and_takes_any_number_of_seeds(save):
    """A training that lacks a task is not paired by an average over the other tasks."""
    entries = [one for i in range(6) for one in encoder(f"new-{i}", 0.8 + i / 100, 0.6)]
    kept = [one for one in entries if (one.encoder, one.task) != ("new-3", "speak")]
    ((scores, _),) = join_scores([save("a", *kept, *encoder("old", 0.7, 0.6))]).values()
    assert {one.domain for one in scores.averages() if one.encoder == "new-3"} == {"sound"}
    assert {row[0] for row in recipe_table(scores, "new", "old").rows} == {"Bark", "sound"}
    seeded = [
        replace(one, seeds=tuple(range(n)), scores=one.scores * n, record=one.record * n)
        for n, one in zip((5, 3), encoder("new", 0.8, 0.6), strict=True)
    ]
    average = next(one for one in Scores(tuple(seeded)).averages() if one.domain == AVERAGE)
    assert (average.mean, average.std) == (pytest.approx((0.8 + 3 * 0.6) / 4), pytest.approx(0))


def test_the_report_of_several_runs_begins_with_a_joint_table(save, tmp_path):
    runs = [save("a", *encoder("one", 0.9, 0.9)), save("b", *encoder("two", 0.8, 0.8))]
    page = build_report([run.parent for run in runs], tmp_path / "out", Console(quiet=True))
    text = page.read_text()
    assert '<h2 id="run1">All runs</h2>' in text
    assert text.index("<caption>Leaderboard</caption>") < text.index('<h2 id="run2">')


def test_runs_in_folders_of_the_same_name_keep_their_own_pictures(save, tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder / "runs").mkdir(parents=True)
        save(f"{folder}/runs/probe", entry(f"encoder{number}", "bark", 0.5))
    runs = [tmp_path / folder / "runs" / "probe" for folder in ("a", "b")]
    page = build_report(runs, tmp_path / "out", Console(quiet=True))
    pictures = re.findall(r'src="data:image/png;base64,(.*?)"', page.read_text())
    assert len(pictures) == 2 == len(set(pictures))


def test_the_name_of_a_task_is_no_path(save, tmp_path):
    confusion = Confusion(("cat", "dog"), ((7, 1), (0, 8)))
    file = save("a", replace(entry("one", "bark", 0.5, confusion=confusion), task="x/../../dogs"))
    build_report([file.parent], tmp_path / "out", Console(quiet=True))
    assert "(confusion-x_.._.._dogs.png)" in (tmp_path / "out/report.md").read_text()
    assert [path.parent.name for path in tmp_path.rglob("*dogs*")] == ["out"]


def test_curves_of_other_encoders_or_without_scores_are_not_drawn(save, tmp_path):
    """Such as those of an earlier run with the same `--out`."""
    view = entry("one#0", "bark", 0.5, layers=(0,), kind="knn")
    file = save("a", entry("one", "bark", 0.5), costs={"one": COST})
    (file.parent / "few_shot.json").write_text(Scores(()).to_json())
    for fingerprint, shown in ((COST.fingerprint, True), ("other", False)):
        cost = replace(COST, fingerprint=fingerprint)
        Scores((view,), costs={"one#0": cost}).save(file.with_name("layers.json"))
        page = build_report([file.parent], tmp_path / "out", Console(quiet=True)).read_text()
        assert ("Scores of knn probes on each layer" in page) == shown
        assert "few training clips" not in page


def test_recall_of_each_class(save, tmp_path):
    confusion = Confusion(("cat", "dog"), ((7, 1), (0, 8)))
    scored = entry("one", "bark", 15 / 16, count=16, confusion=confusion)
    rows = [
        {"key": f"{n}", "true": "cat" if n < 8 else "dog", "predicted": "cat" if n < 7 else "dog"}
        for n in range(16)
    ]
    append_predictions(tmp_path / "p.jsonl", scored, rows)
    (table,) = class_tables(Scores((scored,)), tmp_path / "p.jsonl")
    low, high = stats.binomtest(7, 8).proportion_ci(method="wilson")
    assert table.rows[0] == ("cat", "8", f"87.5 [{100 * low:.1f}, {100 * high:.1f}] dog")
    assert table.rows[1][2].startswith("100.0 [67.6, 100.0]")
    assert class_tables(Scores((scored,)), tmp_path / "none.jsonl") == []
    assert AVERAGE not in {row[0] for row in table.rows}
