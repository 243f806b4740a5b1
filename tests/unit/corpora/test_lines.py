"""Lines of text end at `\n` and nowhere else, whatever characters a caption or a key holds."""

import json
from pathlib import Path

import pytest

from whisper_aut.corpora.audit import Journal, ShardResult
from whisper_aut.corpora.recipes.public import musicbench
from whisper_aut.data.annotation import Annotation, read_lines
from whisper_aut.data.filters import excluded_from, read_exclusions
from whisper_aut.data.shards import open_index
from whisper_aut.data.writer import ShardWriter
from whisper_aut.report.html import last_samples

BREAKS = "a\u2028b\u2029c\x85d"  # where `str.splitlines` would break, and JSON need not escape
CONTROLS = "e\x0bf\x0cg\x1ch\x1di\x1ej"  # where it would break, too


def test_only_newlines_end_a_line(tmp_path: Path):
    path = tmp_path / "list.txt"
    path.write_bytes(f"\ufeffone {BREAKS} {CONTROLS}\r\n\n two \nthree".encode())
    assert read_lines(path) == [f"one {BREAKS} {CONTROLS}", "two", "three"]


def test_an_exclusion_list_holds_keys_with_any_character(tmp_path: Path):
    with ShardWriter(tmp_path / "shards") as shards:
        shards.write("k", "wav", b"x", Annotation(text="t"))
    index = open_index(tmp_path / "shards")
    line = {"fingerprint": index.fingerprint(), "shard": "shard-000000.tar", "key": BREAKS}
    (tmp_path / "exclude.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    excluded = excluded_from(index, read_exclusions(tmp_path / "exclude.jsonl"))
    assert excluded == {("shard-000000.tar", BREAKS)}


def test_captions_with_line_separators_build(tmp_path: Path):
    (tmp_path / "datashare").mkdir()
    for name in ("MusicBench_train.json", "MusicBench_test_A.json"):
        row = {"location": "a.wav", "main_caption": BREAKS}
        (tmp_path / name).write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert [row["text"] for row in musicbench(tmp_path)] == [[BREAKS], [BREAKS]]


def test_an_audit_resumes_after_a_tar_of_any_name(tmp_path: Path):
    tar = (f"folder {BREAKS}", "a.tar")
    journal = Journal(tmp_path / "journal.jsonl", "key")
    journal.read()
    journal.add(tar, ShardResult(3, 1.5))
    text = journal.path.read_text(encoding="utf-8").replace(
        json.dumps(BREAKS)[1:-1], BREAKS
    )  # as a peer would write it
    journal.path.write_text(text, encoding="utf-8")
    assert list(Journal(journal.path, "key").read()) == [tar]


@pytest.mark.parametrize("text", [BREAKS])
def test_the_report_reads_texts_with_any_character(tmp_path: Path, text: str):
    entry = {"step": 1, "domain": "sound", "task": "", "key": "k", "reference": text}
    line = json.dumps({**entry, "generated": text}, ensure_ascii=False)
    (tmp_path / "samples.jsonl").write_text(line + "\n", encoding="utf-8")
    (written,) = last_samples(tmp_path / "samples.jsonl")
    assert written.generated == text
