"""Shards that broke other tools, as their users reported it."""

import io
import json
import tarfile
from pathlib import Path

from tests.support.audio import encode_audio, tone
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.reader import Sample, SkippedSample
from whisper_aut.data.shards import iter_samples, open_index

CLIP = encode_audio(tone(0.3))


def note(text: str) -> bytes:
    return json.dumps({"text": text, "domain": "sound"}).encode()


def read(folder: Path, members: list[tuple[str, bytes]]) -> list[Sample | SkippedSample]:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return list(iter_samples(open_index(folder), ClipLimits()))


def test_a_title_with_a_version_number(tmp_path: Path):
    """webdataset/webdataset#237: `Track 2.0 (Clean Version).mp3` got the suffix
    `0 (clean version).mp3`, so no audio was found.
    """
    name = "./235342 Track 2.0 (Clean Version)"
    (sample,) = read(tmp_path, [(f"{name}.flac", CLIP), (f"{name}.json", note("a song"))])
    assert isinstance(sample, Sample)
    assert sample.annotation.text == "a song"


def test_members_of_a_sample_that_are_not_adjacent(tmp_path: Path):
    """webdataset/webdataset#140: `tar` had packed all captions after all images.

    Nothing may be paired wrongly, and every part is reported.
    """
    clips = [(f"{n}.flac", CLIP) for n in range(2)]
    found = read(tmp_path, [*clips, *((f"{n}.json", note(str(n))) for n in range(2))])
    assert [one.key for one in found] == ["0", "1", "0", "1"]
    assert all(isinstance(one, SkippedSample) for one in found)


def test_the_same_member_twice(tmp_path: Path):
    """webdataset/webdataset#286: a duplicate entry stopped the whole pass, with a `NameError`."""
    first = [("a.flac", CLIP), ("a.json", note("one"))]
    found = read(tmp_path, [*first, ("a.flac", CLIP), ("b.flac", CLIP), ("b.json", note("two"))])
    texts = [one.annotation.text if isinstance(one, Sample) else "skipped" for one in found]
    assert texts == ["one", "skipped", "two"]
