"""`data index`, and folders that are read in part: what is counted is true of the tars at hand."""

import json
import os
from pathlib import Path

import pytest

from tests.support.audio import encode_audio, tone
from tests.support.downloads import tar_of
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.corpora.audit import run_audit, unaudited
from whisper_aut.corpora.inspect import inspect_shards
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.filters import excluded_from, read_exclusions, select_samples
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import INDEX_NAME, iter_samples, open_index
from whisper_aut.data.writer import ShardWriter, index_folder
from whisper_aut.errors import UserError


def write(folder: Path, domain: str, licence: str, clips: int, prefix: str = "shard") -> Path:
    """Write a clip a tar; the n-th is 0.2 + n / 10 seconds long."""
    with ShardWriter(folder, prefix, max_bytes=1) as shards:
        for number in range(clips):
            seconds = 0.2 + 0.1 * number
            annotation = Annotation(
                "a tone", domain, licence=licence, duration_seconds=seconds, id=str(number)
            )
            audio = encode_audio(tone(seconds, 300 + 50 * number))
            shards.write(f"{domain}-{number}", "flac", audio, annotation)
    return folder


def keys(root: str) -> list[str]:
    items = iter_samples(open_index(root), ClipLimits())
    return [item.key for item in items if isinstance(item, Sample)]


def test_what_is_counted_replaces_what_an_index_said_before_and_the_rest_stays(tmp_path: Path):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 5)
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / INDEX_NAME).write_text(json.dumps({**index, "builder": "ours"}))
    other = write(tmp_path / "music", "music", "CC BY-NC 4.0", 1, prefix="more")
    (other / "more-000000.tar").rename(folder / "more-000000.tar")
    facts = index_folder(folder).metadata
    assert facts["domains"] == {"music": 1, "sound": 5}
    assert {name: counts["clips"] for name, counts in facts["licences"].items()} == {
        "CC BY-NC 4.0": 1,
        "CC0-1.0": 5,
    }
    assert (facts["samples"], facts["builder"]) == (6, "ours")
    assert facts["seconds"] == pytest.approx(0.2 + sum(0.2 + 0.1 * n for n in range(5)))


def test_the_lengths_of_clips_without_text_are_known(tmp_path: Path):
    clips = {f"{number}.flac": encode_audio(tone(0.5)) for number in range(3)}
    tar_of(tmp_path / "a.tar", clips)
    index = index_folder(tmp_path)
    assert (index.seconds, index.metadata["domains"]) == (1.5, {"": 3})
    assert index.table(0).milliseconds.tolist() == [500] * 3


@pytest.mark.parametrize(
    "before", ["", "{", "[]", '{"version": 1, "shards": [], "samples": 7}', "a tar is gone"]
)
def test_a_folder_is_indexed_again_whatever_its_index_was(before: str, tmp_path: Path):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 3)
    if before == "a tar is gone":
        (folder / "shard-000001.tar").unlink()
    else:
        (folder / INDEX_NAME).write_text(before)
    index = index_folder(folder)
    assert index.samples == index.metadata["samples"] == len(list(folder.glob("*.tar")))
    assert index.metadata["domains"] == {"sound": index.samples}


def test_a_pattern_uses_the_index_and_the_tables_of_the_folder(tmp_path: Path):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 4)
    (write(tmp_path / "own", "sound", "MIT", 1, prefix="own") / "own-000000.tar").rename(
        folder / "own-000000.tar"
    )
    index_folder(folder)
    part = open_index(f"{folder}/shard-00000[01].tar")
    assert [shard.name for shard in part.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert part.has_tables
    assert part.seconds == pytest.approx(0.5)
    assert [part.table(number).milliseconds.tolist() for number in (0, 1)] == [[200], [300]]
    assert part.licences == {"CC0-1.0": {"clips": 2, "seconds": 0.5}}
    assert open_index(f"{folder}/*.tar").fingerprint() == open_index(folder).fingerprint()
    assert keys(f"{folder}/own-*.tar") == ["sound-0"]
    assert (part.root, part.name) == (str(folder), f"{folder}/shard-00000[01].tar")


@pytest.mark.parametrize("has_index", [True, False], ids=["index", "bare tars"])
def test_braces_count_as_webdatasets_do(has_index: bool, tmp_path: Path):
    folder = write(tmp_path / "a [b]" / "sound", "sound", "CC0-1.0", 5)
    if not has_index:
        (folder / INDEX_NAME).unlink()
    part = open_index(f"{folder}/shard-{{000001..000003}}.tar")
    assert [shard.name for shard in part.shards] == [f"shard-{n:06d}.tar" for n in (1, 2, 3)]
    assert part.has_tables == has_index
    assert keys(f"{folder}/shard-{{000000,000004}}.tar") == ["sound-0", "sound-4"]
    assert inspect_shards(f"{folder}/shard-{{000000..000001}}.tar").clips == 2
    with pytest.raises(UserError, match=r"holds no shard-000005\.tar, shard-000006\.tar \(2 of 4"):
        open_index(f"{folder}/shard-{{000003..000006}}.tar")
    with pytest.raises(UserError, match="brace"):
        open_index(f"{folder}/shard-{{000003.tar")


def test_a_name_with_brackets_is_that_tar_and_not_a_pattern(tmp_path: Path):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 2)
    (folder / "shard-000000.tar").rename(folder / "a[1].tar")
    (folder / "shard-000001.tar").rename(folder / "a1.tar")
    assert keys(f"{folder}/a[1].tar") == ["sound-0"]
    assert keys(f"{folder}/a[0-9].tar") == ["sound-1"]


def test_tars_that_the_index_does_not_list_are_counted(tmp_path: Path):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 2)
    (folder / "shard-000001.tar").rename(folder / "new.tar")
    index = open_index(f"{folder}/*.tar")
    assert (index.samples, index.has_tables) == (2, False)
    assert index.root == str(folder)


def test_what_an_audit_excludes_of_a_folder_is_excluded_of_a_part_of_it(tmp_path: Path):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 4)
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "a.tar").write_bytes((folder / "shard-000001.tar").read_bytes())
    out = tmp_path / "audit"
    run_audit([str(folder)], [str(probe)], out, workers=1, progress=False)
    exclusions = read_exclusions(out / "exclude.jsonl")
    part = open_index(f"{folder}/shard-{{000001..000002}}.tar")
    chosen = select_samples(part, excluded_from(part, exclusions))
    assert chosen.shard_samples == (0, 1)
    audit = json.loads((out / "audit.json").read_text())
    assert unaudited(audit, "train", [f"{folder}/shard-000002.tar"]) == []


def test_tars_that_the_index_does_not_list_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = write(tmp_path / "sound", "sound", "CC0-1.0", 3)
    assert open_index(folder).samples == 3
    assert not caplog.messages
    assert index_folder(f"{folder}/shard-000001.tar").samples == 1
    assert "does not list shard-000000.tar, shard-000002.tar, so" in caplog.text


def test_a_compressed_tar_that_has_changed_is_unpacked_again(tmp_path: Path):
    (tmp_path / "raw").mkdir()
    for clips, day in ((1, 0), (2, 4e9)):
        files = {f"{number}.flac": encode_audio(tone(0.5)) for number in range(clips)}
        archive = tar_of(tmp_path / "raw" / "a.tar.gz", files)
        os.utime(archive, (day, day))
        assert index_folder(tmp_path / "raw", tmp_path / "out").samples == clips
