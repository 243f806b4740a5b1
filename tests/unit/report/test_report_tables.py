"""Tables of scores in every format, and the verdicts on differences."""

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console

from whisper_aut.probes.results import Comparison, Scores
from whisper_aut.report.tables import score_tables, scores_csv, verdict


def rendered(scores: Scores) -> str:
    console = Console(width=220, file=io.StringIO(), record=True, markup=False)
    for table in score_tables(scores):
        console.print(table.to_rich())
    return " ".join(console.export_text().split())


def test_scores_with_spread_and_averages(two_encoders):
    text = rendered(two_encoders)
    assert "75.0 ± 7.1" in text  # 0.8 and 0.7
    assert "45.0 ± 7.1" in text
    assert "protocol strict" in text
    assert "all tasks, weighted" in text
    assert "Skipped clips: bark train: 4 no label." in text


def test_a_difference_without_support_is_called_that(two_encoders):
    strong = Comparison("ours", "base", "bark", 0.3, 0.1, 0.5, 0.0001, 0.0002)
    weak = Comparison("ours", "base", "speak", 0.1, -0.1, 0.3, 0.03, 0.06)
    assert [verdict(c) for c in (strong, replace(strong, difference=-0.3), weak)] == [
        "better",
        "worse",
        "no significant difference",
    ]
    text = rendered(replace(two_encoders, comparisons=(strong, weak)))
    assert "+30.0" in text
    assert "+10.0 … +50.0" in text
    assert "< 0.001" in text
    assert "no significant difference" in text


def test_a_probe_that_is_fitted_once_has_no_deviation(two_encoders):
    entries = tuple(
        replace(
            e,
            kind="linear",
            seeds=(),
            scores=e.scores[:1],
            record=e.record[:1],
            chosen=({"penalty": 1.0},),
            valid_scores=(0.5,),
        )
        for e in two_encoders.entries
    )
    text = rendered(replace(two_encoders, entries=entries, seeds=(0,)))
    assert "80.0 [49.8, 100.0]" in text  # a t interval of ten clips
    assert " ± " not in text
    assert "fitted once and has no ±" in text


def test_the_table_says_what_the_tested_probes_were_fitted_on(two_encoders):
    assert "fitted on the full training split (train)." in rendered(two_encoders)
    both = tuple(replace(e, final_fit="train+valid") for e in two_encoders.entries)
    text = rendered(replace(two_encoders, entries=both))
    assert "fitted on training and validation split (train+valid)." in text
    folds = tuple(replace(e, seeds=(0,), record=("1" * 10,)) for e in two_encoders.entries)
    assert "fitted on all other folds." in rendered(replace(two_encoders, entries=folds))


def test_folds_are_reported_apart_from_the_deviation_over_seeds(two_encoders):
    folds = tuple(
        replace(e, scores=(0.9, 0.5, 0.7, 0.7), chosen=e.chosen * 2, valid_scores=(0.5,) * 4)
        for e in two_encoders.entries
    )
    text = rendered(replace(two_encoders, entries=folds))
    assert "70.0 ± 0.0" in text  # both seeds reach 0.7 over the folds
    assert "Scores by fold" in text
    table = score_tables(replace(two_encoders, entries=folds))[1].to_markdown()
    assert "| Bark | ours | 80.0 | 60.0 |" in table


def test_markdown_has_as_many_cells_in_every_row(two_encoders):
    odd = replace(
        two_encoders, entries=tuple(replace(e, title="a|b") for e in two_encoders.entries)
    )
    rows = [
        line for line in score_tables(odd)[0].to_markdown().splitlines() if line.startswith("|")
    ]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert len(rows) == 2 + 2 + 3


def test_brackets_in_names_are_not_markup(two_encoders):
    named = replace(
        two_encoders,
        entries=tuple(replace(e, title="[red]tone[/red]") for e in two_encoders.entries),
    )
    assert "[red]tone[/red]" in rendered(named)


def test_unknown_kinds_and_tasks_are_shown_by_name(two_encoders):
    entries = tuple(replace(e, kind="mine") for e in two_encoders.entries)
    removed = Comparison("ours", "base", "gone", 0.3, 0.1, 0.5, 0.0001, 0.0002)
    text = rendered(replace(two_encoders, entries=entries, comparisons=(removed,)))
    assert "Mine, protocol strict" in text
    assert "gone" in text


def test_no_scores_are_a_table_without_rows():
    assert score_tables(Scores(()))[0].rows == ()


def test_a_task_that_one_encoder_lacks_is_blank(two_encoders):
    assert "–" in rendered(replace(two_encoders, entries=two_encoders.entries[:3]))


def test_csv_is_read_back(two_encoders):
    rows = list(csv.DictReader(io.StringIO(scores_csv(two_encoders))))
    assert [(row["encoder"], row["task"]) for row in rows] == [
        (e.encoder, e.task) for e in two_encoders.entries
    ]
    assert float(rows[0]["mean"]) == pytest.approx(0.75)
    assert (rows[0]["groups"], rows[0]["fold_means"]) == ("10", "0.75")
    assert float(rows[0]["low"]) < 0.75 < float(rows[0]["high"])
    assert rows[0]["protocol"] == "strict"
