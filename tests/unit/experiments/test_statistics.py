"""Comparisons between recipes: against scipy, by simulation, and on hand-made results."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from tests.support import REPOSITORY
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.experiments.analysis import (
    ArmFacts,
    Cost,
    Measure,
    Point,
    Results,
    TaskResult,
    compare,
    detectable_difference,
    domain_score,
    endpoints_of,
    judge,
    price,
    spread,
)
from whisper_aut.experiments.tables import (
    comparison_sheet,
    cost_sheet,
    draw,
    page,
    price_sheet,
    put_into,
    score_sheet,
    sheets,
)

CLIPS, PROBE_SEEDS, TRAININGS = 200, 3, 5


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
    measures = [measure("good", seed, 0.8) for seed in range(TRAININGS)] + [
        measure("poor", seed, 0.6, slow=True) for seed in range(TRAININGS)
    ]
    figure = {"x": "arm", "colour": "", "line": "", "curves": True, "ordered": False}
    return Results(
        "tried", "Tried", "Which?", "poor", tuple(range(TRAININGS)), PROBE_SEEDS, arms,
        tuple(measures), {"a": task("A", 0.3, 5)},
        ("no overlap",), {"date": "today"}, {"figure": figure, "thresholds": [2.05, 1.0]},
    )  # fmt: skip


def test_spread_is_numpys_sample_deviation():
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.std) == pytest.approx((np.mean([1, 2, 4]), np.std([1, 2, 4], ddof=1)))
    assert spread([1.0]).std is None


def test_comparisons_are_paired_t_tests_over_trainings(results: Results):
    found = {one.endpoint.name: one for one in compare(replace(results, settings={"margin": 2.0}))}
    sound = found["sound"]
    expected = [
        100 * (domain_score(results, good, "sound") - domain_score(results, poor, "sound"))
        for good, poor in zip(results.of("good"), results.of("poor"), strict=True)
    ]
    test = ttest_rel(expected, np.zeros(TRAININGS))
    assert sound.per_training == pytest.approx(expected)
    assert sound.p_value == pytest.approx(test.pvalue)
    assert (sound.low, sound.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert sound.verdict == "better"
    music = found["music"]  # the same in both arms: nothing varies, so nothing is tested
    assert (music.value, music.p_value, music.verdict) == (0, None, "no difference shown")


def test_fewer_than_five_trainings_make_no_claim(results: Results):
    few = replace(results, measures=tuple(one for one in results.measures if one.seed < 4))
    sound = next(one for one in compare(few) if one.endpoint.name == "sound")
    assert sound.p_adjusted is not None
    assert sound.p_adjusted < 0.05
    assert sound.verdict == "no claim (4 trainings)"
    assert "no claim (4 trainings)" in page(few, "tried.png")


def experiments(kind: str, sd: float, families: int) -> Iterator[np.ndarray]:
    """Yield `[12, 5]` differences in points: four recipes against an equal fifth on three domains."""
    rng = np.random.default_rng(22)
    for _ in range(families):
        noise = {
            "normal": lambda: rng.normal(size=(5, 3, TRAININGS)),
            "skewed": lambda: rng.exponential(size=(5, 3, TRAININGS)),
        }[kind]()
        scores = 70 + sd * noise
        yield (scores[1:] - scores[0]).reshape(12, TRAININGS)


@pytest.mark.parametrize("primary", [None, 0], ids=["Holm over all", "primary"])
@pytest.mark.parametrize(("kind", "sd"), [("normal", 2.5), ("skewed", 2.5)])
def test_equal_recipes_are_called_different_in_less_than_6_percent_of_experiments(
    kind: str, sd: float, primary: int | None
):
    families, margins = 1_000, np.full(12, np.nan)
    false = [
        bool(np.any(judge(differences, margins, primary).p_adjusted < 0.05))
        for differences in experiments(kind, sd, families)
    ]
    assert np.mean(false) < 0.06


def test_a_recipe_that_is_worse_by_the_margin_is_rarely_called_no_worse():
    margins = np.full(12, 2.0)
    false = [
        bool(np.any(judge(differences - 2.0, margins, 0).p_no_worse < 0.025))
        for differences in experiments("normal", 2.5, 500)
    ]
    assert np.mean(false) < 0.06


def test_the_detectable_difference_is_found_in_80_percent_of_experiments(
    record_property: Callable[[str, object], None],
):
    rng = np.random.default_rng(0)
    for rows, primary in ((1, 0), (12, None)):  # by itself; the first of twelve that Holm corrects
        smallest = detectable_difference(3.0, TRAININGS, 0.05 / rows)
        found = []
        for _ in range(1_000):
            differences = rng.normal(scale=3.0, size=(rows, TRAININGS))
            differences[0] += smallest
            found.append(judge(differences, np.full(rows, np.nan), primary).p_adjusted[0] < 0.05)
        record_property(
            f"power at {smallest:.1f} points, {rows} comparisons", float(np.mean(found))
        )
        assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_others_are_claimed_only_where_the_primary_comparison_is():
    rng = np.random.default_rng(0)
    clear = 10 + 0.1 * rng.normal(size=5)
    noise = rng.permutation([-3.0, -1.0, 0.5, 1.0, 3.0])
    margins = np.full(2, np.nan)
    gated = judge(np.stack([noise, clear]), margins, 0)
    assert gated.p_value[1] < 1e-6
    assert gated.p_adjusted[1] == gated.p_value[0] > 0.5
    assert judge(np.stack([clear, noise]), margins, 0).p_adjusted[0] < 1e-6
    assert judge(np.stack([noise, clear]), margins).p_adjusted[1] < 1e-6
    assert judge(clear[None], margins[:1], gated=True).p_adjusted[0] == 1, "primary never measured"


def test_no_worse_needs_the_whole_interval_within_the_margin():
    differences = np.array([-0.5, 0.2, -0.2, 0.1, 0.3])
    low = ttest_1samp(differences, 0).confidence_interval(0.95).low
    for margin, expected in ((-low + 0.01, True), (-low - 0.01, False)):
        tests = judge(differences[None], np.array([margin]), 0)
        assert tests.low[0] == pytest.approx(low)
        assert (tests.p_no_worse[0] < 0.025) == expected


def verdict(per_training: np.ndarray, margin: float | None, results: Results) -> str:
    """Of an arm whose sound score differs from the reference's by this, in points."""
    moved = []
    for one in results.of("poor"):
        tasks = {name: replace(task, score=0.5) for name, task in one.tasks.items()}
        better = {
            name: replace(task, score=0.5 + per_training[one.seed] / 100 * (task.domain == "sound"))
            for name, task in tasks.items()
        }
        moved += [replace(one, tasks=tasks), replace(one, arm="good", tasks=better)]
    settings = {"primary": {"arm": "good", "endpoint": "sound"}, "margin": margin}
    (found, _) = compare(replace(results, measures=tuple(moved), settings=settings))
    assert found.primary
    return found.verdict


def test_every_verdict(results: Results):
    small = np.array([0.1, -0.1, 0.2, -0.2, 0.05])
    assert verdict(small, 2.0, results) == "no worse"
    assert verdict(small, None, results) == "no difference shown"
    assert verdict(20 * small, 2.0, results) == "no difference shown"
    assert verdict(small + 3, 2.0, results) == "better"
    assert verdict(small - 3, 2.0, results) == "worse"
    assert verdict(small - 1, 2.0, results) == "worse, within the margin"


def test_other_clips_are_not_compared(results: Results):
    moved = replace(results.measures[0], tasks={"a": task("A", 0.8, 1, keys="others")})
    with pytest.raises(UserError, match="different clips of 'a'"):
        compare(replace(results, measures=(moved, *results.measures[1:])))


def test_a_price_is_read_off_at_the_first_validation_below(results: Results):
    curves = [one.curve for one in results.of("good")]
    found = price(curves, 2.05)
    assert (found.reached, found.seeds) == (5, 5)
    assert found.steps == spread([20] * 5)
    assert found.seconds == spread([4.0] * 5)
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
        "8 ± 2",
    )  # half of what the encoder ran on was padding
    assert [row[2] for row in price_sheet(results).rows] == ["5 of 5", "0 of 5", "0 of 5", "0 of 5"]
    assert comparison_sheet(results).rows[0][-1] == "better"
    assert len(sheets(results)) == 4


def test_answers_losses_and_computation_are_compared_too(results: Results):
    rng = np.random.default_rng(0)
    answers = {
        arm: 0.2 + 0.4 * (arm == "good") + 0.05 * rng.random((TRAININGS, 2))
        for arm in ("good", "poor")
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
    found = {one.endpoint.name: one for one in compare(told)}
    assert list(found) == ["sound", "music", "answers", "loss", "compute"]
    points, loss, work = found["answers"], found["loss"], found["compute"]
    expected = 100 * (answers["good"] - answers["poor"]).mean(1)
    assert points.per_training == pytest.approx(expected)
    assert (points.value, points.std) == pytest.approx((expected.mean(), expected.std(ddof=1)))
    assert points.p_value == pytest.approx(ttest_rel(expected, 0 * expected).pvalue)
    assert (points.verdict, loss.verdict) == ("better", "better")  # a lower loss is the better one
    assert loss.value == pytest.approx(-0.6 + 0.1 / TRAININGS)
    # 2.2 is the lowest loss that all reach: after 20 steps, and after 30, in every training
    assert (np.exp(work.value), work.p_value) == (pytest.approx(2 / 3), None)
    cells = {row[1]: row[2:] for row in comparison_sheet(told).rows}
    assert cells["right answers"][0] == f"{expected.mean():+.1f} ± {expected.std(ddof=1):.1f}"
    assert cells["TFLOP to a loss of 2.2, ratio"][0] == "× 0.667"
    turned = {one.endpoint.name: one for one in compare(replace(told, reference="good"))}
    assert (turned["answers"].value, turned["answers"].verdict) == (
        pytest.approx(-expected.mean()),
        "worse",
    )


def test_losses_are_not_compared_where_no_threshold_says_that_they_may(results: Results):
    names = [one.name for one in endpoints_of(replace(results, settings={}))]
    assert names == ["sound", "music"]
    none_shared = replace(results, settings={"thresholds": [1.0]})
    assert [one.name for one in endpoints_of(none_shared)] == ["sound", "music", "loss"]


def test_stored_results_are_analysed_again_without_running_anything(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored, document = tmp_path / "tried.json", tmp_path / "results.md"
    results.save(stored)
    before = stored.read_text()
    document.write_text("<!-- tried -->\n<!-- end tried -->\n")
    assert main(["experiment", str(stored), "--page", str(document)]) == 0
    assert "better" in (tmp_path / "tried.md").read_text()
    assert "](tried.png)" in document.read_text()
    assert (tmp_path / "tried.png").is_file()
    assert stored.read_text() == before
    assert main(["experiment", str(stored), "seeds=[0]"]) == 1
    assert "nothing is run" in capsys.readouterr().err.replace("\n", " ")


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


PUBLISHED = sorted((REPOSITORY / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("stored", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_tables_are_those_of_the_stored_results(stored: Path):
    results = Results.load(stored)
    tables = page(results, f"{results.name}.png")
    assert stored.with_suffix(".md").read_text(encoding="utf-8").endswith(tables)
    if results.name.endswith("_recordings"):
        pages = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
        assert page(results, f"results/{results.name}.png").strip() in pages
