"""The ledger: counts, lines, and the limit at which a run stops."""

import json
from pathlib import Path

import pytest

from whisper_aut.data.ledger import MIN_SEEN, Ledger
from whisper_aut.data.sample import Refusal
from whisper_aut.errors import Reason, UserError


def refusal(folder: str, reason: Reason = Reason.SILENT, key: str = "k") -> Refusal:
    return Refusal(f"{folder}/shard-000000.tar", key, reason, "peak 0")


def test_counts_by_source_and_reason_and_writes_lines(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(
        ["a", "a", "b"], [refusal("a"), refusal("a", Reason.NO_TEXT), refusal("b", key="ü")]
    )
    ledger.close()
    assert ledger.total == 3
    assert ledger.summary() == {"a": {"no text": 1, "silent audio": 1}, "b": {"silent audio": 1}}
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert lines[2] == {
        "shard": "b/shard-000000.tar",
        "key": "ü",
        "reason": "silent audio",
        "detail": "peak 0",
    }


def test_stops_the_run_above_the_share_and_says_why():
    ledger = Ledger(None, max_share=0.1)
    ledger.record(["a"] * (MIN_SEEN - 30), [refusal("a")] * 20)
    with pytest.raises(
        UserError, match=r"of a were refused \(silent audio: 40\).*max_refused_share"
    ):
        ledger.record([], [refusal("a")] * 20)


def test_a_few_early_refusals_do_not_stop_a_run():
    ledger = Ledger(None, max_share=0.01)
    ledger.record(["a"], [refusal("a")] * 5)
    assert ledger.total == 5


def test_at_the_end_small_sources_are_judged_too():
    ledger = Ledger(None, max_share=0.5)
    ledger.record(["a"] * 4, [refusal("a")] * 6)
    ledger.check_at_end()  # ten samples say too little
    ledger.record(["a"] * 4, [refusal("a")] * 6)
    with pytest.raises(UserError, match="12 of 20 samples of a were refused"):
        ledger.check_at_end()


def test_at_the_end_a_source_has_given_something():
    ledger = Ledger(None, max_share=0.5)
    ledger.record(["a"] * 100, [refusal("b")])
    with pytest.raises(UserError, match="1 of 1 samples of b were refused"):
        ledger.check_at_end()


def test_validation_counts_but_is_no_part_of_the_share():
    ledger = Ledger(None, max_share=0.01)
    ledger.record(["a"] * MIN_SEEN, [])
    ledger.record_validation([refusal("a")] * MIN_SEEN)
    ledger.record([], [refusal("a")])
    assert ledger.summary() == {"a": {"silent audio": 1}}, "it has not come to its end"
    ledger.validated = True
    assert ledger.summary() == {"a": {"silent audio": MIN_SEEN + 1}}


def test_what_was_counted_before_is_taken_over_once():
    ledger = Ledger(None)
    ledger.go_on({"a": {"silent audio": 2}}, validated=True)
    assert (dict(ledger.earlier), ledger.validated, ledger.total) == (
        {("a", "silent audio"): 2},
        True,
        0,
    )
    ledger.record(["a"], [refusal("a")])
    ledger.go_on({"a": {"silent audio": 3}}, validated=False)
    assert (dict(ledger.earlier), ledger.validated, ledger.total) == (
        {("a", "silent audio"): 2},
        True,
        1,
    )


def test_one_bad_source_is_not_hidden_by_a_good_one():
    ledger = Ledger(None, max_share=0.05)
    ledger.record(["good"] * 10_000, [])
    with pytest.raises(UserError, match="of bad were refused"):
        ledger.record(["bad"] * MIN_SEEN, [refusal("bad")] * 20)
