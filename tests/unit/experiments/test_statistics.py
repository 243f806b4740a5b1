"""Comparisons between recipes: against scipy, by simulation, and on hand-made results."""

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from tests.support import REPOSITORY
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.experiments.analysis import (
    Measurement,
    Progress,
    Results,
    TaskMetadata,
    compare,
    comparison_table,
    cost_table,
    endpoints,
    plot_results,
    result_tables,
    results_page,
    score_table,
    threshold_table,
)
from whisper_aut.experiments.grid import FigureSettings, PrimarySettings
from whisper_aut.probes.stats import detectable_difference, paired_tests

CLIPS, RUNS = 200, 5


def measure(arm: str, seed: int, accuracy: float, *, slow: bool = False) -> Measurement:
    rng = np.random.default_rng(seed + 10 * len(arm))
    scores = {
        "a": rng.binomial(CLIPS, accuracy) / CLIPS,
        "b": rng.binomial(CLIPS, accuracy - 0.1) / CLIPS,
        "c": np.random.default_rng(seed).binomial(CLIPS, 0.5) / CLIPS,  # the same in both arms
    }
    losses = (3.0, 2.5, 2.1) if slow else (3.0, 2.0, 1.5)
    curve = tuple(
        Progress(10 * i, loss + 0.01 * seed, 100.0 * i, 0.1 * i, 2.0 * i + (i == 3) * seed)
        for i, loss in enumerate(losses, 1)
    )
    return Measurement(arm, seed, scores, {}, curve, 0.5)


@pytest.fixture
def results() -> Results:
    measurements = [measure("good", seed, 0.8) for seed in range(RUNS)]
    measurements += [measure("poor", seed, 0.6, slow=True) for seed in range(RUNS)]
    return Results(
        name="tried",
        title="Tried",
        question="Which?",
        reference="poor",
        arms={"good": {"arm": "good arm"}, "poor": {"arm": "poor arm"}},
        tasks={
            "a": TaskMetadata("A", "sound", CLIPS),
            "b": TaskMetadata("B", "sound", CLIPS),
            "c": TaskMetadata("C", "music", CLIPS),
        },
        measurements=tuple(measurements),
        baseline={"a": 0.3, "b": 0.3, "c": 0.3},
        audits=("no overlap",),
        figure=FigureSettings(x="arm", curves=True, ordered=False),
        thresholds=[2.05, 1.0],
        environment={"date": "today"},
    )


def test_comparisons_are_paired_t_tests_over_runs(results: Results):
    found = {one.endpoint: one for one in compare(replace(results, margin=2.0))}
    sound, arms = found["sound"], results.by_arm()
    expected = [
        50 * sum(good.scores[task] - poor.scores[task] for task in "ab")
        for good, poor in zip(arms["good"], arms["poor"], strict=True)
    ]
    test = ttest_rel(expected, np.zeros(RUNS))
    found_test = sound.test
    assert found_test.differences == pytest.approx(expected)
    mean_std = np.mean(expected), np.std(expected, ddof=1)
    assert (found_test.mean, found_test.std) == pytest.approx(mean_std)
    assert found_test.p_value == pytest.approx(test.pvalue)
    assert (found_test.low, found_test.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert sound.verdict == "better"
    music = found["music"]  # nothing varies, so nothing is tested
    assert (music.test.mean, music.verdict) == (0, "no difference shown")
    assert np.isnan(music.test.p_value)


def test_fewer_than_five_runs_support_no_claim(results: Results):
    few = replace(results, measurements=tuple(one for one in results.measurements if one.seed < 4))
    sound = next(one for one in compare(few) if one.endpoint == "sound")
    assert sound.test.p_adjusted < 0.05
    assert sound.verdict == "no claim (4 runs)"
    assert "no claim (4 runs)" in results_page(few)


def simulate(kind: str, sd: float, families: int) -> Iterator[np.ndarray]:
    """Yield `[12, 5]` differences in points: four recipes against a fifth on three domains."""
    rng = np.random.default_rng(22)
    for _ in range(families):
        noise = {
            "normal": lambda: rng.normal(size=(5, 3, RUNS)),
            "skewed": lambda: rng.exponential(size=(5, 3, RUNS)),
        }[kind]()
        scores = 70 + sd * noise
        yield (scores[1:] - scores[0]).reshape(12, RUNS)


@pytest.mark.parametrize("primary", [None, 0], ids=["Holm over all", "primary"])
@pytest.mark.parametrize(("kind", "sd"), [("normal", 2.5), ("skewed", 2.5)])
def test_equal_recipes_are_called_different_in_less_than_6_percent_of_experiments(
    kind: str, sd: float, primary: int | None
):
    families, margins = 1_000, np.full(12, np.nan)
    false = [
        any(one.p_adjusted < 0.05 for one in paired_tests(differences, margins, primary))
        for differences in simulate(kind, sd, families)
    ]
    assert np.mean(false) < 0.06


def test_a_recipe_that_is_worse_by_the_margin_is_rarely_called_no_worse():
    margins = np.full(12, 2.0)
    false = [
        any(one.p_no_worse < 0.025 for one in paired_tests(differences - 2.0, margins, 0))
        for differences in simulate("normal", 2.5, 500)
    ]
    assert np.mean(false) < 0.06


def test_the_detectable_difference_is_found_in_80_percent_of_experiments(
    record_property: Callable[[str, object], None],
):
    rng = np.random.default_rng(0)
    for rows, primary in ((1, 0), (12, None)):  # by itself; the first of twelve that Holm corrects
        smallest = detectable_difference(3.0, RUNS, 0.05 / rows)
        found = []
        for _ in range(1_000):
            differences = rng.normal(scale=3.0, size=(rows, RUNS))
            differences[0] += smallest
            found.append(paired_tests(differences, primary=primary)[0].p_adjusted < 0.05)
        record_property(
            f"power at {smallest:.1f} points, {rows} comparisons", float(np.mean(found))
        )
        assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_others_are_claimed_only_where_the_primary_comparison_is():
    rng = np.random.default_rng(0)
    clear = 10 + 0.1 * rng.normal(size=5)
    noise = rng.permutation([-3.0, -1.0, 0.5, 1.0, 3.0])
    gated = paired_tests(np.stack([noise, clear]), primary=0)
    assert gated[1].p_value < 1e-6
    assert gated[1].p_adjusted == gated[0].p_value > 0.5
    assert paired_tests(np.stack([clear, noise]), primary=0)[0].p_adjusted < 1e-6
    assert paired_tests(np.stack([noise, clear]))[1].p_adjusted < 1e-6
    assert paired_tests(clear[None], gated=True)[0].p_adjusted == 1, "primary never measured"


def test_no_worse_needs_the_whole_interval_within_the_margin():
    differences = np.array([-0.5, 0.2, -0.2, 0.1, 0.3])
    low = ttest_1samp(differences, 0).confidence_interval(0.95).low
    for margin, expected in ((-low + 0.01, True), (-low - 0.01, False)):
        (test,) = paired_tests(differences[None], [margin], 0)
        assert test.low == pytest.approx(low)
        assert (test.p_no_worse < 0.025) == expected


def verdict(differences: np.ndarray, margin: float | None, results: Results) -> str:
    """Return the verdict for an arm whose sound score differs by this many points per seed."""
    measurements = []
    for one in results.by_arm()["poor"]:
        equal = dict.fromkeys("abc", 0.5)
        changed = equal | dict.fromkeys("ab", 0.5 + differences[one.seed] / 100)
        measurements += [replace(one, scores=equal), replace(one, arm="good", scores=changed)]
    primary = PrimarySettings(arm="good", endpoint="sound")
    changes = {"primary": primary, "margin": margin, "thresholds": []}
    (found, _) = compare(replace(results, measurements=tuple(measurements), **changes))
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


def test_a_cost_is_taken_at_the_first_validation_below_a_loss(results: Results):
    one = results.by_arm()["good"][1]
    assert one.reached(2.05) == one.curve[1]
    assert one.reached(1.505) is None  # this seed ends at 1.51


def test_tables_have_means_deviations_and_costs(results: Results):
    scores = [100 * one.scores["a"] for one in results.by_arm()["good"]]
    baseline, good, _ = score_table(results).rows
    assert baseline == ("log-mel statistics", "30.0", "30.0", "30.0")
    assert good[:2] == ("good arm", f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}")
    # Half of what the encoder processed was padding.
    assert cost_table(results).rows[0][1:6] == ("30", "300", "600", "0.300", "8 ± 2")
    good_alone = {
        "reference": "good",
        "arms": {"good": results.arms["good"]},
        "measurements": tuple(one for one in results.measurements if one.arm == "good"),
    }
    assert cost_table(replace(results, **good_alone)).rows[0][1] == "30"
    assert [row[2] for row in threshold_table(results).rows] == [
        *("5 of 5", "0 of 5"),
        *("0 of 5", "0 of 5"),
    ]
    assert threshold_table(results).rows[0][3:] == ("20", "200", "0.200", "4")
    assert threshold_table(results).rows[1][3:] == ("–", "–", "–", "–")
    assert comparison_table(results).rows[0][-1] == "better"
    assert len(result_tables(results)) == 4


def test_answers_losses_and_compute_are_compared_too(results: Results):
    rng = np.random.default_rng(0)
    answers = {
        arm: 0.2 + 0.4 * (arm == "good") + 0.05 * rng.random((RUNS, 2)) for arm in results.arms
    }
    measurements = []
    for one in results.measurements:
        named = dict(zip(("exact_a", "exact_b"), answers[one.arm][one.seed], strict=True))
        *before, last = one.curve
        lower = 0.1 if (one.arm, one.seed) == ("poor", 1) else 0.0  # so that differences vary
        curve = (*before, replace(last, loss=last.loss - lower))
        measurements.append(replace(one, answers=named, curve=curve))
    thresholds = [2.6, 2.2, 1.0]
    results = replace(results, measurements=tuple(measurements), thresholds=thresholds)
    found = {one.endpoint: one for one in compare(results)}
    assert list(found) == ["sound", "music", "answers", "loss", "compute"]
    points, loss, compute = found["answers"], found["loss"], found["compute"]
    expected = 100 * (answers["good"] - answers["poor"]).mean(1)
    assert points.test.differences == pytest.approx(expected)
    assert points.test.p_value == pytest.approx(ttest_rel(expected, 0 * expected).pvalue)
    assert (points.verdict, loss.verdict) == ("better", "better")  # a lower loss is better
    assert loss.test.mean == pytest.approx(-0.6 + 0.1 / RUNS)
    # 2.2 is the lowest loss that all reach: after 20 steps or after 30, in every run.
    assert np.exp(compute.test.mean) == pytest.approx(2 / 3)
    assert np.isnan(compute.test.p_value)
    cells = {row[1]: row[2:] for row in comparison_table(results).rows}
    assert cells["right answers"][0] == f"{expected.mean():+.1f} ± {expected.std(ddof=1):.1f}"
    assert cells["TFLOP to a loss of 2.2, ratio"][0] == "× 0.667"
    swapped = {one.endpoint: one for one in compare(replace(results, reference="good"))}
    assert swapped["answers"].test.mean == pytest.approx(-expected.mean())
    assert swapped["answers"].verdict == "worse"


@pytest.mark.parametrize(
    ("thresholds", "more"), [([], []), ([1.0], ["loss"]), ([1.0, 2.6], ["loss", "compute"])]
)
def test_losses_are_compared_only_with_thresholds(
    results: Results, thresholds: list[float], more: list[str]
):
    found = endpoints(replace(results, thresholds=thresholds))
    assert list(found) == ["sound", "music", *more]


def test_stored_results_are_reported_again_without_running_anything(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stored = tmp_path / "tried.json"
    results.save(stored)
    assert Results.load(stored) == results
    replace(results, baseline={"a": float("nan")}).save(tmp_path / "nan.json")
    assert np.isnan(Results.load(tmp_path / "nan.json").baseline["a"])
    assert main(["experiment", str(stored)]) == 0
    assert "better" in (tmp_path / "tried.md").read_text()
    assert (tmp_path / "tried.png").read_bytes().startswith(b"\x89PNG")
    assert main(["experiment", str(stored), "seeds=[0]"]) == 1
    assert "nothing is run" in capsys.readouterr().err.replace("\n", " ")
    stored.write_text('{"name": 3}')
    with pytest.raises(UserError, match=r"tried\.json has \d+ problems"):
        Results.load(stored)


def edited(content: Any, path: tuple = ()) -> Iterator[Any]:
    """Yield copies of a JSON value in which one value is removed or replaced by another."""
    children = content.items() if isinstance(content, dict) else enumerate(content)
    for key, child in list(children):
        for other in (None, -1, "x", [], {}, ...):
            copy = deepcopy(content)
            if other is ...:
                del copy[key]
            else:
                copy[key] = other
            yield copy
        if isinstance(child, (dict, list)):
            for changed in edited(child):
                copy = deepcopy(content)
                copy[key] = changed
                yield copy


def test_results_that_were_edited_by_hand_are_read_or_explained(results: Results, tmp_path: Path):
    stored, read, messages = tmp_path / "tried.json", 0, []
    few = replace(results, measurements=tuple(one for one in results.measurements if one.seed < 2))
    few.save(stored)
    for content in list(edited(json.loads(stored.read_text())))[::3]:
        stored.write_text(json.dumps(content))
        try:
            read += len(results_page(Results.load(stored))) > 0
        except UserError as error:
            messages.append(str(error))
    assert min(read, len(messages)) > 20
    assert all(re.match(r"\S+tried\.json has \d+ problems?:\n  - ", one) for one in messages)


def test_nothing_measured_cannot_be_drawn(results: Results, tmp_path: Path):
    with pytest.raises(UserError, match="no scores and no answers"):
        plot_results(replace(results, measurements=(), tasks={}, baseline={}), tmp_path / "f.png")


PUBLISHED = sorted((REPOSITORY / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("stored", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_tables_are_those_of_the_stored_results(stored: Path):
    results = Results.load(stored)
    assert stored.with_suffix(".md").read_text(encoding="utf-8") == results_page(results)
    page = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"(results/{stored.stem}.md)" in page
