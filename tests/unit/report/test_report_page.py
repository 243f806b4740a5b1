"""The report of a run: one self-contained page."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console
from sklearn.metrics import confusion_matrix

from tests.support.audio import encode_audio, tone
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.probes.results import Confusion
from whisper_aut.report.html import (
    Figure,
    GeneratedText,
    Section,
    build_report,
    data_table,
    generated_texts,
    last_samples,
    render,
    run_table,
    skipped_table,
)
from whisper_aut.report.plots import project
from whisper_aut.report.tables import Table

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, or closed out of turn."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_escapes_its_content(tmp_path):
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    hostile = '<script>alert("x")</script>'
    section = Section(
        "Probes",
        hostile,
        [Figure(tmp_path / "p.png", hostile)],
        [Table(hostile, ("a", "b"), ((hostile, "1"),), 1, "note")],
        [
            GeneratedText("sound", "", hostile, hostile, "b", "", 1.0, b"OggS", b"\x89PNG"),
            GeneratedText("speech", "asr", "silent", "a", "b", ""),
            GeneratedText("music", "", "caf\udce9", "a", "b", ""),
        ],
    )
    runs = [("one", [section]), ("two", [])]
    page = render(runs, "report.html")
    parsed = Balanced()
    parsed.feed(page)
    assert not parsed.open
    assert page.count("<script") == 1  # which sorts tables
    assert page.count("&lt;script&gt;") >= 5
    assert all(source.startswith(("data:", "#")) for source in parsed.sources)  # nothing is fetched
    assert page.count("<audio") == 1
    assert "sound · text · " in page
    assert "music · text · caf\\udce9" in page
    ids = set(re.findall(r'id="(\w+)"', page))
    assert {source[1:] for source in parsed.sources if source.startswith("#")} <= ids
    assert 'href="#run1_1"' in render(runs[:1], "report.html")
    text = render(runs, "report.md")
    assert "](p.png)" in text
    assert "\n\n| a | b |\n| :--- | ---: |\n" in text
    assert "- speech · asr · silent: reference “a”, generated “b”" in text


def test_neighbours_stay_neighbours_on_the_map():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    features = 8 * generator.normal(size=(3, 16))[labels] + generator.normal(size=(60, 16))
    points = project(features.astype(np.float32))
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 0.95
    np.testing.assert_array_equal(points, project(features.astype(np.float32)))


def test_counts_of_a_confusion_are_scikit_learns():
    from whisper_aut.probes.fit import SeedRun
    from whisper_aut.probes.suite import _confusion

    generator = np.random.default_rng(1)
    classes = ["a", "b", "c"]
    true = generator.integers(0, 3, 50)
    guesses = [generator.integers(0, 3, 50) for _ in range(2)]
    runs = [
        SeedRun(s, ({},), (None,), (0.0,), (), (names[:30], names[30:]), ())
        for s, names in enumerate(tuple(classes[code] for code in guess) for guess in guesses)
    ]
    found = _confusion(runs, classes, [classes[place] for place in true])
    assert isinstance(found, Confusion)
    np.testing.assert_array_equal(
        found.counts, sum(confusion_matrix(true, guess) for guess in guesses)
    )


@pytest.fixture
def run(tmp_path, tiny_shards) -> Path:
    """A run directory with what training writes, over the tests' shards."""
    folder = tiny_shards
    clip = {"step": 9, "domain": "sound", "task": "t", "reference": "r", "generated": "g"}
    lines = [
        clip | {"step": 5, "key": "no"},
        clip | {"key": "missing"},
        clip | {"key": _key(folder / "sound"), "source": str(folder / "sound")},
        clip | {"key": "third"},
    ]
    (tmp_path / "samples.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + '\n{"step": 9, "dom'
    )
    (tmp_path / "config.yaml").write_text(
        json.dumps({"data": {"valid": [{"path": str(folder / "sound")}, {"path": "gone"}]}})
    )
    return tmp_path


def _key(folder: Path) -> str:
    from whisper_aut.audio.decode import ClipLimits
    from whisper_aut.data.reader import Sample
    from whisper_aut.data.shards import iter_samples, open_index

    return next(
        sample.key
        for sample in iter_samples(open_index(str(folder)), ClipLimits())
        if isinstance(sample, Sample)
    )


def test_texts_of_the_last_validation_come_with_their_audio(run):
    assert last_samples(run / "samples.jsonl")[0].key == "missing"
    missing, found = generated_texts(run)
    assert not missing.ogg
    waveform, rate = soundfile.read(io.BytesIO(found.ogg))
    assert rate == 16_000
    assert len(waveform) > 100
    assert found.spectrogram.startswith(b"\x89PNG")


def test_texts_come_with_the_clip_of_their_own_source(tmp_path):
    """Keys such as 000001 are in many corpora. A clip that is too long stops no search."""
    lines, sources, lengths = [], [], {"notes": 0.5, "pieces": 1.0, "songs": 1.5}
    for name, seconds in lengths.items():
        source = str(tmp_path / name)
        with ShardWriter(tmp_path / name) as shards:
            for key, length in (("long", 31.0), ("000001", seconds)):
                shards.write(key, "flac", encode_audio(tone(length)), Annotation(text=name))
                clip = {"domain": "music", "task": name, "source": source, "key": key}
                lines.append({"step": 1, **clip})
        sources.append({"path": source, "domain": "music"})
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"valid": sources}}))
    found = {(text.task, text.key): text.seconds for text in generated_texts(tmp_path)}
    assert found == {
        (name, key): seconds if key == "000001" else None
        for name, seconds in lengths.items()
        for key in ("long", "000001")
    }


@pytest.mark.skipif(not shutil.which("node"), reason="no Node.js is installed")
def test_columns_are_sorted_by_their_numbers():
    (compare,) = re.findall(r"const compare = .*?\n  };\n", render([], "report.html"), re.DOTALL)
    cells = ["850", "9,000", "< 0.001", "0.002", "–", "−5.0", "cat, dog"]
    script = f"const descending = false; {compare} console.log({json.dumps(cells)}.sort(compare))"
    found = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    expected = ["−5.0", "< 0.001", "0.002", "850", "9,000", "–", "cat, dog"]
    assert re.findall("'(.*?)'", found.stdout) == expected


def test_a_run_without_samples_or_metadata_has_no_texts_or_tables(tmp_path):
    assert generated_texts(tmp_path) == []
    assert run_table(tmp_path) is data_table(tmp_path) is skipped_table(tmp_path) is None
    (tmp_path / "environment.json").write_text("[broken")
    assert run_table(tmp_path) is None


def test_tables_of_a_run(tmp_path):
    environment = {
        "command": ["whisper-aut", "train"],
        "gpus": [],
        "cpus": 2,
        "packages": {"torch": "2"},
        "pretrained": {"path": "w"},
    }
    sources = [
        {
            "root": "a",
            "domain": "speech",
            "clips": 3,
            "seconds": 7200,
            "weight": 0.8,
            "licences": {"CC0-1.0": {}},
        },
        {"root": "b", "weight": 0.2},
    ]
    (tmp_path / "environment.json").write_text(json.dumps({**environment, "data": sources}))
    done = {
        "steps": 4,
        "sources": {"a": 2.0, "b": 0.0},
        "metrics": {"throughput/data_wait_fraction": 0.125},
        "skipped": {"a": {"silent": 2}},
    }
    (tmp_path / "done.json").write_text(json.dumps(done))
    found = dict(run_table(tmp_path).rows)
    assert found["steps"] == "4"
    assert found["waiting for data, % of the time"] == "12.5"
    table = data_table(tmp_path)
    assert [row[2:] for row in table.rows] == [
        ("CC0-1.0", "3", "2.00", "80.0", "100.0", "2.00"),
        ("–", "0", "0.00", "20.0", "0.0", "0.00"),
    ]
    assert skipped_table(tmp_path).rows == (("a", "silent", "2"),)


def test_a_report_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.5\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        build_report([tmp_path / "run"], tmp_path / "file" / "out", Console(quiet=True))
    page = build_report([tmp_path / "run"], tmp_path / "out", Console(quiet=True))
    assert "Training and validation loss" in page.read_text()
