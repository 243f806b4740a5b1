"""Groups of test clips: read from the shards, counted once in intervals and tests, printed in
tables.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.probes import TONES_HZ, TinyEncoder, embed_task, make_task, noisy_tone
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.encoders import BASELINE_NAME, LogMelBaseline
from whisper_aut.probes.results import AVERAGE, Scores
from whisper_aut.probes.stats import GroupTotals, difference, holm, interval
from whisper_aut.probes.suite import compare, run_suite
from whisper_aut.probes.tasks import list_tasks, load_task
from whisper_aut.report.tables import score_table, score_tables

QUIET = EmbedSettings(quiet=True)
CONF = Path(__file__).parents[3] / "conf" / "probe_tasks"
SPEAKERS, CLIPS = 5, 6


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy tones; in `test`, six clips of each of five speakers, named like `s3-04`."""
    root = tmp_path_factory.mktemp("spoken")
    for part, (split, speakers) in enumerate({"train": 8, "valid": 4, "test": SPEAKERS}.items()):
        with ShardWriter(root / split) as shards:
            for number in range(speakers * CLIPS):
                label, speaker = list(TONES_HZ)[number % 3], f"s{number // CLIPS}"
                annotation = Annotation(label=label, extra={"speaker": speaker})
                audio = noisy_tone(
                    label, 1000 * part + number, noise=0.6 + 0.3 * (number // CLIPS % 3)
                )
                shards.write(f"{speaker}-{number:02d}", "wav", audio, annotation)
    return root


def task(spoken: Path, **changes):
    parts = {split: [str(spoken / split)] for split in ("train", "valid", "test")}
    return make_task(**parts, group="speaker", **changes)


@pytest.fixture(scope="module")
def scores(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    encoders = {"tiny": TinyEncoder(), "other": TinyEncoder(1), BASELINE_NAME: LogMelBaseline()}
    tasks = [task(spoken), task(spoken, name="apart", title="Apart", kind="knn")]
    tasks[1] = replace(tasks[1], group="")
    return run_suite(
        encoders,
        tasks,
        root=None,
        cache=tmp_path_factory.mktemp("cache"),
        against=["other", BASELINE_NAME],
        embedding=QUIET,
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"group": "key", "group_pattern": r"^(s\d)-"}, {"group": "key", "group_pattern": "s."}],
)
def test_groups_are_read_from_a_field_or_from_the_name_of_a_sample(
    how: dict, spoken: Path, tmp_path: Path
):
    one = replace(task(spoken), **how)
    test = embed_task(LogMelBaseline(), one, None, tmp_path, QUIET)["test"]
    assert test.groups == tuple(f"s{number // CLIPS}" for number in range(SPEAKERS * CLIPS))
    again = embed_task(LogMelBaseline(), one, None, tmp_path, QUIET)["test"]  # from the cache
    assert again.group_numbers().tolist() == np.repeat(np.arange(SPEAKERS), CLIPS).tolist()


def test_a_clip_without_the_first_part_of_the_pattern_has_no_group(spoken: Path):
    one = replace(task(spoken), group="key", group_pattern=r"^(a\d)|^s")
    samples: Any = [SimpleNamespace(key=key) for key in ("a1", "s1", "x1")]
    assert [one.group_of(sample) for sample in samples] == ["a1", "", ""]


def test_clips_without_the_field_count_by_themselves_and_the_log_says_so(
    spoken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    one = replace(task(spoken), group="singer")
    found = run_suite(
        {"floor": LogMelBaseline()}, [one], root=None, cache=tmp_path, embedding=QUIET
    )
    assert (found.entries[0].groups, found.entries[0].group_count) == ("", SPEAKERS * CLIPS)
    assert "no two test clips share a singer; each counts by itself" in caplog.text


def test_a_score_and_a_difference_count_speakers_not_clips(scores: Scores):
    entry, other = scores.get("tiny", "tones"), scores.get("other", "tones")
    assert entry is not None
    assert other is not None
    right = np.array([int(digit) for digit in entry.record[0]], dtype=float)
    speaker = np.repeat(np.arange(SPEAKERS), CLIPS)
    assert entry.group_count == SPEAKERS
    assert entry.interval == interval([GroupTotals.of(right, groups=speaker)])
    against = np.array([int(digit) for digit in other.record[0]], dtype=float)
    expected = difference([GroupTotals.of(right - against, groups=speaker)])
    found = next(c for c in scores.comparisons if (c.against, c.task) == ("other", "tones"))
    assert (found.low, found.high, found.p_value) == pytest.approx(
        (expected.low, expected.high, expected.p_value)
    )


def test_holm_covers_every_row_of_the_table_averages_and_all_pairs_included(scores: Scores):
    assert [(c.encoder, c.against, c.task) for c in scores.comparisons] == [
        *(("tiny", "other", task) for task in ("tones", "apart", AVERAGE)),
        *((BASELINE_NAME, "other", task) for task in ("tones", "apart", AVERAGE)),
        *(("tiny", BASELINE_NAME, task) for task in ("tones", "apart", AVERAGE)),
    ]
    assert [c.p_holm for c in scores.comparisons] == holm([c.p_value for c in scores.comparisons])
    assert tuple(compare(Scores.from_json(scores.to_json()), ["other", BASELINE_NAME])) == (
        scores.comparisons
    )


def test_tables_print_the_number_of_groups_and_an_interval_in_place_of_a_deviation(scores: Scores):
    page = score_table(scores).to_markdown()
    assert "| test clips (groups) |" in page
    assert f"| {SPEAKERS * CLIPS} ({SPEAKERS}) |" in page
    assert "tones by speaker" in page
    assert " ± " not in page.partition("\n\nSettings")[0]
    low, high = scores.entries[0].interval
    mean = scores.entries[0].mean
    assert f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in page
    comparisons = score_tables(scores)[-1]
    assert f"corrected for all {len(scores.comparisons)} rows" in comparisons.caption


def test_scores_with_other_groups_cannot_be_paired(scores: Scores):
    moved = replace(scores.entries[0], groups=scores.entries[0].groups[::-1])
    with pytest.raises(UserError, match="different clips of 'tones'"):
        compare(replace(scores, entries=(moved, *scores.entries[1:])), ["other"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "xares_librispeech_gender",
            {"61-70968-0000": "61", "test-clean/1089-134686-0001": "1089"},
        ),
        ("xares_librispeech_asr", {"61-70968-0000": "61"}),
        ("xares_crema_d", {"1001_DFA_ANG_XX": "1001"}),
        ("xares_ravdess", {"03-01-06-01-02-01-12": "12"}),
        ("xares_vocalsound", {"f0003_0_cough": "f0003"}),
        ("xares_esc50", {"1-100032-A-0": "100032"}),
        ("xares_urbansound8k", {"100032-3-0-0": "100032"}),
        ("xares_speech_commands_v1", {"bed-0a7c2a8d_nohash_0": "0a7c2a8d"}),
    ],
)
def test_patterns_of_the_tasks_fit_the_publishers_file_names(name: str, keys: dict[str, str]):
    from whisper_aut.data.reader import Sample

    one = load_task(name, CONF)
    for key, group in keys.items():
        assert one.group_of(Sample(key, "", b"", "wav", Annotation())) == group
    assert one.group_of(Sample("clip 17", "", b"", "wav", Annotation())) == ""


def test_tasks_of_several_clips_a_speaker_or_recording_name_the_field():
    grouped = {name: load_task(name, CONF).group for name in list_tasks(CONF)}
    assert {name: group for name, group in grouped.items() if group and group != "key"} == {
        "demo_speech": "voice",
        "esc10": "src_file",
        "esc10_5fold": "src_file",
        "esc50": "freesound_id",
        "fsdd": "speaker",
        "gmnotes": "program",
        "tuxpaint": "stamp",
        "us8k_fold10": "freesound_id",
        "speech_commands_v2_12": "speaker",
        "speech_commands_v2_35": "speaker",
        "xares_nsynth_instruments": "instrument_str",
    }
