"""probes.suite and probes.scores: a run end to end, its record, and when a stored score counts."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.loading import encoder_names
from whisper_aut.probes import suite
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.encoders import BASELINE_NAME, LogMelBaseline
from whisper_aut.probes.modules import LinearProbe
from whisper_aut.probes.results import AVERAGE, Scores
from whisper_aut.probes.suite import compare, run_suite
from whisper_aut.probes.tasks import load_task

QUIET = EmbedSettings(quiet=True)
REPOSITORY = Path(__file__).parents[3]
REAL_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tones, task_with, tiny_encoder, cache):
    tasks = [
        task_with(),
        task_with(name="half", title="Half", domain="music", label="half", weight=3.0),
    ]

    def run(**changes) -> Scores:
        encoders = {"tiny": tiny_encoder(), BASELINE_NAME: LogMelBaseline()}
        arguments = {
            "encoders": encoders,
            "tasks": tasks,
            "root": tones,
            "cache": cache,
            "seeds": (0, 1),
            "embedding": QUIET,
        }
        return run_suite(**(arguments | changes))

    return run


def test_a_run_end_to_end(run):
    scores = run(against=[BASELINE_NAME])
    assert (scores.encoders, scores.tasks, scores.protocol) == (
        ["tiny", BASELINE_NAME],
        ["tones", "half"],
        "strict",
    )
    floor = scores.get(BASELINE_NAME, "tones")
    assert floor.mean > 0.6 > floor.chance == pytest.approx(1 / 3)
    assert scores.get(BASELINE_NAME, "half").mean < 0.9  # the half has no acoustic cue
    assert floor.pooling == "mean_std"
    assert floor.clips == {"train": 48, "valid": 24, "test": 30}
    for entry in scores.entries:
        assert entry.protocol == "strict"
        assert entry.per_unit().mean() == pytest.approx(entry.mean, abs=1e-6)
    assert [(c.encoder, c.against, c.task) for c in scores.comparisons] == [
        ("tiny", BASELINE_NAME, task) for task in ("tones", "half", AVERAGE)
    ]
    for c in scores.comparisons[:2]:
        difference = scores.get("tiny", c.task).mean - scores.get(BASELINE_NAME, c.task).mean
        assert c.difference == pytest.approx(difference, abs=1e-6)
        assert c.low <= c.difference <= c.high
        assert c.p_holm >= c.p_value


def test_averages_are_weighted(run):
    scores = run()
    averages = {(a.encoder, a.domain): a for a in scores.averages()}
    tones, half = scores.get("tiny", "tones"), scores.get("tiny", "half")
    assert averages["tiny", "sound"].mean == pytest.approx(tones.mean)
    assert averages["tiny", AVERAGE].mean == pytest.approx((tones.mean + 3 * half.mean) / 4)
    assert averages["tiny", AVERAGE].std is None, "linear probes are fitted once"


def test_an_average_scatters_as_its_seeds_do(run, task_with, few_epochs):
    fitted_once = task_with(name="half", domain="music", label="half", weight=3.0)
    scores = run(tasks=[task_with(kind="mlp"), fitted_once], seeds=(0, 1))
    tones, half = scores.get("tiny", "tones"), scores.get("tiny", "half")
    assert (tones.seeds, half.seeds) == ((0, 1), ())
    assert tones.scores[0] != tones.scores[1]
    seeds = [(score + 3 * half.mean) / 4 for score in tones.scores]
    average = next(a for a in scores.averages() if (a.encoder, a.domain) == ("tiny", AVERAGE))
    assert average.std == pytest.approx(abs(seeds[0] - seeds[1]) / 2**0.5)
    assert tones.epochs == np.mean([setting["epochs"] for setting in tones.chosen])
    assert half.epochs is None


def test_an_encoder_against_itself_is_no_difference(run, tiny_encoder):
    scores = run(encoders={"a": tiny_encoder(), "b": tiny_encoder()}, against=["a"])
    for comparison in scores.comparisons:
        assert (comparison.difference, comparison.p_holm, comparison.significant) == (
            0.0,
            1.0,
            False,
        )


def test_scores_survive_json(run, tmp_path):
    scores = run(against=[BASELINE_NAME])
    assert Scores.from_json(scores.to_json()) == scores
    scores.save(tmp_path / "deep" / "scores.json")
    assert Scores.load(tmp_path / "deep" / "scores.json") == scores
    assert tuple(compare(Scores.from_json(scores.to_json()), [BASELINE_NAME])) == scores.comparisons
    assert json.loads(scores.to_json())["averages"][0]["encoder"] == "tiny"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"version": 99}', '{"version": 5, "entries": [{}]}']
)
def test_other_files_are_not_read_as_scores(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match="Probe again"):
        Scores.load(tmp_path / "scores.json")
    with pytest.raises(UserError, match="Cannot read"):
        Scores.load(tmp_path / "none.json")


def test_an_incomplete_record_is_an_error(run):
    scores = run()
    values = json.loads(scores.to_json())
    values["entries"][0]["record"] = [seed[:-1] for seed in values["entries"][0]["record"]]
    with pytest.raises(UserError, match="damaged"):
        Scores.from_json(json.dumps(values))
    for key, value in (("weight", 0), ("final_fit", "test")):
        values = json.loads(scores.to_json())
        values["entries"][0][key] = value
        with pytest.raises(UserError, match="damaged"):
            Scores.from_json(json.dumps(values))


@pytest.fixture
def fits(monkeypatch):
    """Counts the probes that are really fitted."""
    counted = []
    original = suite.probe_splits
    monkeypatch.setattr(
        suite, "probe_splits", lambda *a, **k: counted.append(k["name"]) or original(*a, **k)
    )
    return counted


def test_stored_scores_are_reused_while_nothing_changed(run, tmp_path, fits):
    file = tmp_path / "scores.json"
    first = run(scores_file=file)
    assert len(fits) == 4
    again = run(scores_file=file, against=["tiny"])
    assert len(fits) == 4
    assert again.entries == first.entries
    assert Scores.load(file) == again


def test_stored_scores_are_not_reused_for_other_encoders_data_or_settings(
    run, tmp_path, fits, tiny_encoder, task_with, write_shards, tones, monkeypatch
):
    file = tmp_path / "scores.json"

    def newly_fitted(**changes) -> int:
        before = len(fits)
        run(scores_file=file, **changes)
        return len(fits) - before

    one = {"encoders": {"tiny": tiny_encoder()}, "tasks": [task_with()]}
    assert newly_fitted(**one) == 1
    assert newly_fitted(**one) == 0
    assert newly_fitted(**one, seeds=(0, 1, 2)) == 0, "linear probes know no seeds"
    assert newly_fitted(**one | {"encoders": {"tiny": tiny_encoder(seed=1)}}) == 1
    assert newly_fitted(**one, final_fit="train+valid") == 1
    with monkeypatch.context() as changed:
        changed.setattr(LinearProbe, "version", LinearProbe.version + 1)
        assert newly_fitted(**one) == 1
    assert newly_fitted(**one, embedding=EmbedSettings(pooling="mean_std", quiet=True)) == 1
    write_shards(tmp_path / "other", 8, seed=50)
    assert (
        newly_fitted(encoders=one["encoders"], tasks=[task_with(test=[str(tmp_path / "other")])])
        == 1
    )
    assert (
        newly_fitted(
            encoders=one["encoders"], tasks=[task_with(test=[str(tmp_path / "other")], weight=2.0)]
        )
        == 0
    )
    file.write_text("{damaged")
    assert newly_fitted(**one) == 1


def test_predictions_trace_each_score_to_its_clips(
    run, tmp_path, task_with, fits, tiny_encoder, few_epochs
):
    file, lines = tmp_path / "scores.json", tmp_path / "predictions.jsonl"
    knn = task_with(kind="knn", group="half")
    arguments = {"tasks": [knn, task_with(name="mlp", kind="mlp")]}
    arguments |= {"scores_file": file, "predictions_file": lines}
    scores = run(**arguments)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 2 * 30 * (1 + 2), "encoders × clips × (once without seeds, and two seeds)"
    for entry in scores.entries:
        own = [row for row in rows if (row["encoder"], row["task"]) == (entry.encoder, entry.task)]
        right = [row["predicted"] == row["true"] for row in own]
        assert np.mean(right) == pytest.approx(entry.mean, abs=1e-6)
        assert len({row["key"] for row in own}) == 30
        assert {row.get("seed") for row in own} == ({0, 1} if entry.kind == "mlp" else {None})
        assert all(0 <= row["probability"] <= 1 for row in own)
        halves = {row.get("group") for row in own}
        assert halves == ({"0", "1"} if entry.kind == "knn" else {None})
    assert len(fits) == 4
    renamed = {"encoders": {"other": tiny_encoder()}}
    run(**arguments | renamed)
    again = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(fits) == 4, "stored scores are used again, with their predictions"
    assert again == [row | {"encoder": "other"} for row in rows if row["encoder"] == "tiny"]
    whole = lines.read_bytes()
    lines.write_bytes(whole + '{"key": "é'.encode()[:-1])  # by an interrupted run
    run(**arguments | renamed)
    assert len(fits) == 4
    assert lines.read_bytes() == whole
    lines.unlink()
    run(**arguments | renamed)
    assert len(fits) == 6, "a score whose predictions are gone does not count"
    assert lines.read_text().count("\n") == 90


def test_a_stopped_run_keeps_the_scores_that_it_has_not_come_to(
    run, tmp_path, task_with, fits, monkeypatch
):
    files = {"scores_file": tmp_path / "scores.json", "predictions_file": tmp_path / "rows.jsonl"}
    old, new, last = (task_with(name=name) for name in ("old", "new", "last"))
    whole = run(tasks=[new, old], **files)
    with monkeypatch.context() as patched:
        patched.setattr(suite, "probe_splits", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tasks=[last, new, old], **files)
    scores = run(tasks=[old, last, new], **files)
    assert fits == ["new", "new", "old", "old", "last", "last"]
    assert scores.tasks == ["old", "last", "new"]
    assert all(scores.get("tiny", name) == whole.get("tiny", name) for name in whole.tasks)


def test_different_test_clips_cannot_be_paired(run):
    scores = run()
    moved = replace(scores.get("tiny", "tones"), keys_sha256="other")
    with pytest.raises(UserError, match="different clips of 'tones'"):
        compare(replace(scores, entries=(moved, *scores.entries[1:])), [BASELINE_NAME])


def test_mistakes_are_reported_before_anything_is_embedded(run, task_with, tiny_encoder):
    with pytest.raises(UserError, match="Did you mean 'tiny'"):
        run(against=["tinny"])
    with pytest.raises(UserError, match="Two probe tasks"):
        run(tasks=[task_with(), task_with()])
    with pytest.raises(UserError, match="Nothing to probe"):
        run(tasks=[])


def test_an_unexpected_number_of_classes_is_an_error(run, task_with):
    with pytest.raises(
        UserError, match="should have 10 classes; its training clips have 3: high, low, middle"
    ):
        run(tasks=[task_with(classes=10)])


@pytest.mark.skipif(
    not (REAL_DATA / "esc10").is_dir(), reason="needs the real corpora next to this checkout"
)
def test_log_mel_floor_on_esc10(tmp_path):
    with (REAL_DATA / "esc10" / "esc10.csv").open() as file:
        rows = list(csv.DictReader(file))
    for fold in "12345":
        with ShardWriter(tmp_path / "esc10" / fold) as shards:
            for row in (row for row in rows if row["fold"] == fold):
                path = REAL_DATA / "esc10" / "audio" / row["filename"]
                shards.write(
                    path.stem, path.suffix[1:], path.read_bytes(), Annotation(label=row["category"])
                )
    task = load_task("esc10", REPOSITORY / "conf" / "probe_tasks")
    scores = run_suite(
        {BASELINE_NAME: LogMelBaseline()},
        [task],
        root=tmp_path,
        cache=tmp_path / "cache",
        seeds=(0, 1),
        embedding=QUIET,
    )
    assert 0.78 <= scores.entries[0].mean <= 0.92
    assert scores.entries[0].clips == {"train": 240, "valid": 80, "test": 80}


def test_encoders_of_one_name_get_distinct_names(tmp_path: Path):
    runs = [tmp_path / name / "20260101-000000" for name in ("aut", "again")]
    for run in runs:
        (run / "export" / "encoder").mkdir(parents=True)
        (run / "config.yaml").touch()
    assert list(encoder_names([str(run) for run in runs]).values()) == ["aut", "again"]
    exports = [str(run / "export" / "encoder") for run in runs]
    assert list(encoder_names(exports).values()) == ["aut", "again"]
    assert encoder_names(
        ["openai/whisper-tiny", "models/whisper-tiny/", "random:openai/whisper-tiny", "logmel"]
    ) == {
        "openai/whisper-tiny": "openai/whisper-tiny",
        "models/whisper-tiny/": "models/whisper-tiny",
        "random:openai/whisper-tiny": "random whisper-tiny",
        "logmel": "log-mel statistics",
    }
    marked = encoder_names(["openai/whisper-tiny@30s", f"{runs[0]}@none", f"{runs[0]}@30s"])
    assert list(marked.values()) == ["whisper-tiny@30s", "aut@none", "aut@30s"]
    assert list(encoder_names([str(runs[0]), exports[0]]).values()) == [str(runs[0]), exports[0]]
    with pytest.raises(UserError, match="named twice"):
        encoder_names(["logmel", "logmel"])
    with pytest.raises(UserError, match="named twice"):
        encoder_names([f"{runs[0]}/", str(runs[0])])
