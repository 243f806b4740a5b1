"""Means, paired tests and prices against numpy, scipy and hand-made results."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp, wilcoxon

from whisper_aut.errors import UserError
from whisper_aut.experiments.figures import draw
from whisper_aut.experiments.results import ArmFacts, Cost, Measure, Point, Results, TaskResult
from whisper_aut.experiments.statistics import (
    differences,
    domain_score,
    price,
    seed_differences,
    spread,
)
from whisper_aut.experiments.tables import (
    cost_sheet,
    difference_sheet,
    page,
    price_sheet,
    put_into,
    score_sheet,
    seed_difference_sheet,
    sheets,
)

CLIPS, PROBE_SEEDS = 200, 3


def task(
    name: str, chance: float, seed: int, domain: str = "sound", keys: str = "same"
) -> TaskResult:
    rng = np.random.default_rng(seed)
    right = rng.binomial(PROBE_SEEDS, chance, CLIPS)
    digits = "".join(map(str, right))
    return TaskResult(
        name, domain, float(right.mean()) / PROBE_SEEDS, 0.01, 0.5, digits, keys, CLIPS
    )


def measure(arm: str, seed: int, chance: float, *, slow: bool = False) -> Measure:
    number = seed + 10 * len(arm)
    tasks = {
        "a": task("A", chance, number),
        "b": task("B", chance - 0.1, number + 100),
        "c": task("C", 0.5, seed, "music"),
    }
    losses = (3.0, 2.0, 1.5) if not slow else (3.0, 2.5, 2.1)
    curve = tuple(
        Point(10 * i, loss + 0.01 * seed, 100.0 * i, 0.1 * i, 2.0 * i)
        for i, loss in enumerate(losses, 1)
    )
    return Measure(
        arm,
        seed,
        tasks,
        {},
        curve,
        Cost(30, 300.0, 0.3, 6.0 + seed, 0.5),
        ("whisper-aut train x.yaml",),
    )


@pytest.fixture
def results() -> Results:
    arms = (
        ArmFacts("good", ("good arm",), {"arm": "good"}),
        ArmFacts("poor", ("poor arm",), {"arm": "poor"}),
    )
    measures = [measure("good", seed, 0.8) for seed in range(3)] + [
        measure("poor", seed, 0.6, slow=True) for seed in range(3)
    ]
    figure = {"x": "arm", "colour": "", "line": "", "curves": True, "ordered": False}
    return Results(
        "tried", "Tried", "Which?", "poor", (0, 1, 2), PROBE_SEEDS, arms, tuple(measures), {"a": task("A", 0.3, 5)},
        ("no overlap",), {"date": "today"}, {"figure": figure, "thresholds": [2.05, 1.0]},
    )  # fmt: skip


def test_spread_is_numpys_sample_deviation():
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.std) == pytest.approx((np.mean([1, 2, 4]), np.std([1, 2, 4], ddof=1)))
    assert spread([1.0]).std is None


def test_differences_agree_with_scipy_and_with_the_clips(results: Results):
    found = {one.domain: one for one in differences(results)}
    sound = found["sound"]
    per_seed = [
        domain_score(results, good, "sound") - domain_score(results, poor, "sound")
        for good, poor in zip(results.of("good"), results.of("poor"), strict=True)
    ]
    assert sound.per_seed == pytest.approx(per_seed)
    assert sound.p_seeds == pytest.approx(ttest_1samp(per_seed, 0).pvalue)
    clips = {}
    for arm in ("good", "poor"):  # [seeds, tasks, clips] → a mean over seeds, both tasks in one row
        digits = [
            [[int(d) for d in m.tasks[name].right] for name in ("a", "b")] for m in results.of(arm)
        ]
        clips[arm] = np.mean(digits, axis=0).reshape(-1) / PROBE_SEEDS
    assert sound.value == pytest.approx((clips["good"] - clips["poor"]).mean(), abs=1e-6)
    error = (clips["good"] - clips["poor"]).std() / np.sqrt(2 * CLIPS)
    assert sound.low == pytest.approx(sound.value - 1.96 * error, abs=0.01)
    assert sound.high == pytest.approx(sound.value + 1.96 * error, abs=0.01)
    assert sound.p_clips is not None
    assert sound.p_clips < 0.01
    assert wilcoxon(clips["good"] - clips["poor"]).pvalue < 0.01
    assert sound.verdict == "better"
    music = found["music"]  # the same clips right in both arms
    assert (music.value, music.p_clips, music.p_seeds, music.verdict) == (
        0,
        1,
        None,
        "no significant difference",
    )


def test_a_difference_that_one_seed_contradicts_is_none(results: Results):
    (first, *others) = results.of("good")
    turned = replace(first, tasks={**first.tasks, "a": task("A", 0.2, 3), "b": task("B", 0.2, 4)})
    mixed = replace(results, measures=(turned, *others, *results.of("poor")))
    sound = next(one for one in differences(mixed) if one.domain == "sound")
    assert min(sound.per_seed) < 0 < max(sound.per_seed)
    assert sound.verdict == "no significant difference"


def test_other_clips_are_not_compared(results: Results):
    moved = replace(results.measures[0], tasks={"a": task("A", 0.8, 1, keys="others")})
    with pytest.raises(UserError, match="different clips of 'a'"):
        differences(replace(results, measures=(moved, *results.measures[1:])))


def test_a_price_is_read_off_at_the_first_validation_below(results: Results):
    curves = [one.curve for one in results.of("good")]
    found = price(curves, 2.05)
    assert (found.reached, found.seeds) == (3, 3)
    assert found.steps == spread([20, 20, 20])
    assert found.seconds == spread([4.0, 4.0, 4.0])
    assert price(curves, 1.505).reached == 1  # the second seed ends at 1.51
    assert price(curves, 1.0).steps is None


def test_tables_hold_means_deviations_and_prices(results: Results):
    scores = [100 * one.tasks["a"].score for one in results.of("good")]
    row = next(row for row in score_sheet(results).rows if row[0] == "good arm")
    assert row[1] == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    assert score_sheet(results).rows[0][0] == "log-mel statistics"
    cost = cost_sheet(results).rows[0]
    assert cost[1:6] == (
        "30",
        "300",
        "600",
        "0.300",
        "7 ± 1",
    )  # half of what the encoder ran on was padding
    assert [row[2] for row in price_sheet(results).rows] == ["3 of 3", "0 of 3", "0 of 3", "0 of 3"]
    assert difference_sheet(results).rows[0][-1] == "better"
    assert len(sheets(results)) == 5


def test_whole_trainings_are_compared_seed_by_seed(results: Results):
    rng = np.random.default_rng(0)
    answers = {
        arm: 0.2 + 0.4 * (arm == "good") + 0.05 * rng.random((3, 2)) for arm in ("good", "poor")
    }
    answered = tuple(
        replace(
            one, answers=dict(zip(("exact_a", "exact_b"), answers[one.arm][one.seed], strict=True))
        )
        for one in results.measures
    )
    told = replace(
        results, measures=answered, settings={**results.settings, "thresholds": [2.6, 2.2, 1.0]}
    )
    one = told.of("poor")[1]
    lower = replace(
        one, curve=(*one.curve[:-1], replace(one.curve[-1], loss=one.curve[-1].loss - 0.1))
    )
    told = replace(
        told, measures=tuple(lower if measure is one else measure for measure in told.measures)
    )
    points, loss, work = seed_differences(told)
    assert points.p_value
    expected = 100 * (answers["good"] - answers["poor"]).mean(1)
    assert points.per_seed == pytest.approx(expected)
    assert (points.value, points.std) == pytest.approx((expected.mean(), expected.std(ddof=1)))
    assert points.p_value == pytest.approx(ttest_1samp(expected, 0).pvalue)
    assert points.p_holm == pytest.approx(
        2 * points.p_value
    )  # of two: equal seeds leave the ratio without one
    assert points.verdict == "better"
    assert (loss.value, loss.lower_is_better, work.p_value) == (
        pytest.approx(-0.6 + 0.1 / 3),
        True,
        None,
    )
    assert np.exp(work.value) == pytest.approx(
        2 / 3
    )  # 2.2, the lowest loss that all reach: after 20 steps, and after 30
    cells = seed_difference_sheet(told).rows
    assert [row[2] for row in cells] == [
        f"{expected.mean():+.1f} ± {expected.std(ddof=1):.1f}",
        "-0.567 ± 0.058",
        "× 0.67",
    ]
    worse = next(
        one for one in seed_differences(replace(told, reference="good")) if "points" in one.figure
    )
    assert (worse.value, worse.verdict) == (pytest.approx(-expected.mean()), "worse")


def test_losses_are_not_compared_where_no_threshold_says_that_they_may(results: Results):
    assert seed_differences(replace(results, settings={})) == []
    none_shared = replace(results, settings={"thresholds": [1.0]})
    assert {one.figure for one in seed_differences(none_shared)} == {"final validation loss"}


def test_results_survive_their_json(results: Results, tmp_path: Path):
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results
    (tmp_path / "r.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="results of this release"):
        Results.load(tmp_path / "r.json")


def test_a_figure_shows_every_panel(results: Results, tmp_path: Path):
    assert draw(results, tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="Nothing is measured"):
        draw(replace(results, measures=()), tmp_path / "g.png")


def test_tables_go_between_the_marks_of_a_page(results: Results, tmp_path: Path):
    document = tmp_path / "results.md"
    document.write_text("Before.\n<!-- tried -->\nOUTDATED\n<!-- end tried -->\nAfter.\n")
    put_into(document, "tried", page(results, "tried.png"))
    text = document.read_text()
    assert text.startswith("Before.\n<!-- tried -->\n![Tried")
    assert text.endswith("<!-- end tried -->\nAfter.\n")
    assert "OUTDATED" not in text
    with pytest.raises(UserError, match="has no lines"):
        put_into(document, "other", "x")
