"""The ledger: counts, lines, and the limit at which a run stops."""

import json
import os
from pathlib import Path

import pytest

from tests.support.ranks import join_gloo, on_ranks
from whisper_aut.data.dataset import MIN_SEEN, Counts, Ledger, by_source
from whisper_aut.data.reader import SkippedSample
from whisper_aut.errors import SkipReason, UserError
from whisper_aut.training.callbacks.metrics import gather_counts


def refusal(folder: str, reason: SkipReason = SkipReason.SILENT, key: str = "k") -> SkippedSample:
    return SkippedSample(f"{folder}/shard-000000.tar", key, reason, "peak 0")


def checked(ledger: Ledger, *, at_end: bool = False) -> None:
    ledger.check(gather_counts(ledger), at_end=at_end)


def test_counts_by_source_and_reason_and_writes_lines(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(
        ["a", "a", "b"], [refusal("a"), refusal("a", SkipReason.NO_TEXT), refusal("b", key="ü")]
    )
    ledger.close()
    assert by_source(ledger.counts.skipped) == {
        "a": {"no text": 1, "silent audio": 1},
        "b": {"silent audio": 1},
    }
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert lines[2] == {
        "shard": "b/shard-000000.tar",
        "key": "ü",
        "reason": "silent audio",
        "detail": "peak 0",
    }


def test_stops_the_run_above_the_limit_and_says_why():
    ledger = Ledger(None, max_fraction=0.1)
    ledger.record(["a"] * (MIN_SEEN - 30), [refusal("a")] * 18)
    checked(ledger)
    ledger.record([], [refusal("a")] * 20)
    with pytest.raises(
        UserError, match=r"38 of 208 samples of a were skipped \(silent audio: 38\).*max_skipped"
    ):
        checked(ledger)


def test_a_few_early_skips_do_not_stop_a_run():
    ledger = Ledger(None, max_fraction=0.01)
    ledger.record(["a"], [refusal("a")] * 5)
    checked(ledger)


def test_at_the_end_small_sources_are_judged_too():
    ledger = Ledger(None, max_fraction=0.5)
    ledger.record(["a"] * 4, [refusal("a")] * 6)
    checked(ledger, at_end=True)  # ten samples say too little
    ledger.record(["a"] * 4, [refusal("a")] * 6)
    checked(ledger)
    with pytest.raises(UserError, match="12 of 20 samples of a were skipped"):
        checked(ledger, at_end=True)


def test_at_the_end_every_source_has_given_something():
    ledger = Ledger(None, max_fraction=0.5)
    ledger.record(["a"] * 100, [refusal("b")])
    with pytest.raises(UserError, match="1 of 1 samples of b were skipped"):
        checked(ledger, at_end=True)


def test_what_validation_skips_is_counted_but_does_not_stop_a_run():
    ledger = Ledger(None, max_fraction=0.01)
    ledger.record(["a"] * MIN_SEEN, [])
    ledger.record_validation([refusal("a")] * MIN_SEEN)
    ledger.record([], [refusal("a")])
    assert by_source(ledger.counts.all_skipped) == {"a": {"silent audio": 1}}, "not at its end"
    ledger.validated = True
    assert by_source(ledger.counts.all_skipped) == {"a": {"silent audio": MIN_SEEN + 1}}
    checked(ledger, at_end=True)


def test_the_limit_holds_over_a_resumed_run():
    first = Ledger(None, max_fraction=0.1)
    first.record(["a"] * 90, [refusal("a")] * 30)
    checked(first)
    second = Ledger(None, max_fraction=0.1)
    second.resume(Counts.from_state(json.loads(json.dumps(first.counts.state_dict()))), True)
    second.record(["a"] * 100, [])
    with pytest.raises(UserError, match="30 of 220 samples of a were skipped"):
        checked(second)


def test_a_rewind_counts_nothing_twice():
    ledger = Ledger(None)
    ledger.record(["a"], [refusal("a")])
    ledger.resume(ledger.counts, validated=False)
    assert gather_counts(ledger) == ledger.counts


def skipped_by_the_second_rank() -> list[str]:
    join_gloo()
    rank = int(os.environ["RANK"])
    ledger = Ledger(None, max_fraction=0.05)
    ledger.record(["a"] * 110, [refusal("a")] * 20 * rank)
    problems = []
    for at_end in (False, True):
        try:
            checked(ledger, at_end=at_end)
        except UserError as error:
            problems.append(str(error).partition(" (")[0])
    return problems


def test_the_limit_holds_over_all_ranks_and_all_stop_together():
    expected = ["20 of 240 samples of a were skipped"] * 2
    assert on_ranks(skipped_by_the_second_rank) == [expected, expected]


def test_one_bad_source_is_not_hidden_by_a_good_one():
    ledger = Ledger(None, max_fraction=0.05)
    ledger.record(["good"] * 10_000 + ["bad"] * MIN_SEEN, [refusal("bad")] * 20)
    with pytest.raises(UserError, match="of bad were skipped"):
        checked(ledger)
