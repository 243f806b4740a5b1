"""What an exclusion list and an allow-list leave of an index, with sample tables and without."""

import json
from pathlib import Path

import pytest

from tests.support.audio import encode_audio, tone
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.filters import excluded_from, read_exclusions, select_samples
from whisper_aut.data.reader import Sample, SkippedSample
from whisper_aut.data.shards import (
    INDEX_NAME,
    ShardIndex,
    ShardReader,
    iter_samples,
    open_index,
    table_name,
)
from whisper_aut.data.writer import ShardWriter, index_folder
from whisper_aut.errors import UserError

LICENCES = ("CC BY 4.0", "CC BY-NC 4.0", "", "used by permission", "Attribution 4.0 International")
PLACES = frozenset({("shard-000000.tar", "clip-0"), ("shard-000002.tar", "clip-5")})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten clips, two a tar, whose licences take turns."""
    audio = encode_audio(tone(0.5))
    with ShardWriter(tmp_path / "sound", max_bytes=2 * len(audio)) as shards:
        for number in range(10):
            licence = LICENCES[number % len(LICENCES)]
            annotation = Annotation(
                "a tone", "sound", licence=licence, duration_seconds=0.5 + number
            )
            shards.write(f"clip-{number}", "flac", audio, annotation)
    return tmp_path / "sound"


def keys(index: ShardIndex) -> list[str]:
    return [item.key for item in iter_samples(index, ClipLimits()) if isinstance(item, Sample)]


@pytest.mark.parametrize("tables", [True, False], ids=["tables", "bare tars"])
def test_excluded_clips_and_licences_that_are_not_allowed_leave_the_index(
    folder: Path, tables: bool
):
    if not tables:
        (folder / INDEX_NAME).unlink()
    index = open_index(folder)
    chosen = select_samples(index, PLACES, ["CC-BY"])
    assert keys(chosen) == ["clip-4", "clip-9"]
    assert chosen.shard_samples == (0, 0, 1, 0, 1)
    assert chosen.seconds == pytest.approx(4.5 + 9.5)
    assert chosen.selection
    assert chosen.selection.left_out == {"excluded by an audit": 2, "licence not allowed": 6}
    assert chosen.licences == {"Attribution 4.0 International": {"clips": 2, "seconds": 14.0}}
    assert chosen.fingerprint() == index.fingerprint()
    others = (index, select_samples(index, PLACES), select_samples(index, (), ["CC-BY"]))
    assert len({one.selected_fingerprint() for one in (chosen, *others)}) == 4


def test_the_licence_of_the_source_is_that_of_the_clips_that_state_none(folder: Path):
    chosen = select_samples(open_index(folder), allowed=["MIT"], licence="MIT License")
    assert keys(chosen) == ["clip-2", "clip-7"]


def test_nothing_is_read_where_nothing_is_left_out(folder: Path):
    index = open_index(folder)
    for table in folder.glob("*.npy"):
        table.unlink()
    assert select_samples(index) is index
    written = [*filter(None, LICENCES)]
    with ShardWriter(folder / "other") as shards:
        shards.write("a", "flac", b"1", Annotation("a", licence=written[0]))
    (folder / "other" / table_name("shard-000000.tar")).unlink()
    other = open_index(folder / "other")
    assert select_samples(other, allowed=["CC-BY-4.0"]) is other
    with pytest.raises(UserError, match=r"cannot be read.*data\.exclude.*whisper-aut data index"):
        select_samples(index, PLACES)


def test_tars_from_elsewhere_are_filtered_after_they_were_indexed(folder: Path):
    before = keys(select_samples(open_index(folder), PLACES, ["CC-BY"]))
    for file in [*folder.glob("*.npy"), folder / INDEX_NAME]:
        file.unlink()
    index = index_folder(folder)
    assert keys(select_samples(index, PLACES, ["CC-BY"])) == before
    assert index.licences["CC BY-NC 4.0"] == {"clips": 2, "seconds": 8.0}


def test_a_tar_that_is_not_the_one_of_its_table_is_rejected_rather_than_guessed(folder: Path):
    chosen, everything = select_samples(open_index(folder), PLACES), open_index(folder)
    tars = sorted(folder.glob("*.tar"))
    tars[0].write_bytes(tars[1].read_bytes())  # as many clips, of other names
    reader = ShardReader(ClipLimits())
    item = reader.read(chosen, {0: (0, 0)})[0]
    assert isinstance(item, SkippedSample)
    assert "another sample 'clip-3' than its table" in item.detail
    assert "whisper-aut data index" in item.detail
    item = reader.read(everything, {0: (0, 0)})[0]
    assert isinstance(item, Sample)  # where nothing is left out, any tar can be read


def test_a_list_is_read_or_says_which_line_is_wrong(folder: Path, tmp_path: Path):
    index = open_index(folder)
    line = {"fingerprint": index.fingerprint(), "shard": "shard-000000.tar", "key": "clip-0"}
    (tmp_path / "good.jsonl").write_text(json.dumps(line) + "\n")
    excluded = excluded_from(index, read_exclusions(tmp_path / "good.jsonl"))
    assert excluded == {("shard-000000.tar", "clip-0")}
    (tmp_path / "bad.jsonl").write_text(json.dumps({"shard": "a"}) + "\n")
    with pytest.raises(UserError, match="Line 1"):
        read_exclusions(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="data audit"):
        read_exclusions(tmp_path / "none.jsonl")
