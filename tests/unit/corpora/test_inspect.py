import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.cli import main
from whisper_aut.corpora.inspect import (
    ShardStatistics,
    distribution,
    histogram,
    inspect_shards,
    render,
)
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.data.writer import ShardWriter, index_folder
from whisper_aut.errors import UserError


def audio(
    seconds: float = 1, rate_hz: int = 16_000, channels: int = 1, kind: str = "FLAC"
) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate_hz), channels))
    soundfile.write(file, samples, rate_hz, format=kind)
    return file.getvalue()


def tar(folder: Path, members: dict[str, bytes], name: str = "foreign.tar") -> Path:
    """A tar that no builder of ours wrote, without an index."""
    with tarfile.open(folder / name, "w") as file:
        for member_name, body in members.items():
            member = tarfile.TarInfo(member_name)
            member.size = len(body)
            file.addfile(member, io.BytesIO(body))
    return folder / name


def shown(statistics: ShardStatistics) -> str:
    console = Console(width=120, file=io.StringIO(), record=True, markup=False)
    console.print(render(statistics))
    return console.export_text()


def annotation(**fields: Any) -> bytes:
    return json.dumps({"text": "a dog barks", **fields}).encode()


def test_statistics_of_a_folder_that_we_wrote(tmp_path: Path):
    with ShardWriter(tmp_path) as shard:
        shard.write(
            "a",
            "flac",
            audio(1),
            Annotation("one two", "sound", "caption", label="dog", licence="CC0"),
        )
        shard.write(
            "b",
            "wav",
            audio(3, 48_000, 2, "WAV"),
            Annotation("eins", "speech", "asr", language="de"),
        )
        shard.write(
            "c", "ogg", audio(3, kind="OGG"), Annotation(domain="sound", label=["dog", "bark"])
        )
        shard.metadata = {"recipe": "r", "skipped": {"silent audio": 2}}
    statistics = inspect_shards(tmp_path)
    shown_as = json.loads(json.dumps(statistics.as_dict()))
    assert (shown_as["clips"], shown_as["shards"], shown_as["hours"]) == (
        3,
        1,
        pytest.approx(7 / 3600),
    )
    assert shown_as["bytes"] == (tmp_path / "shard-000000.tar").stat().st_size
    assert shown_as["sample_rates_hz"] == {"16000": 2, "48000": 1}
    assert (shown_as["channels"], shown_as["codecs"]["OGG/VORBIS"]) == ({"1": 2, "2": 1}, 1)
    assert (shown_as["domain"], shown_as["language"]) == (
        {"sound": 2, "speech": 1},
        {"": 2, "de": 1},
    )
    assert shown_as["labels"] == {"dog": 2, "bark": 1}
    assert (
        shown_as["clips_with_text"],
        shown_as["words"]["max"],
        shown_as["characters"]["median"],
    ) == (
        2,
        2,
        5.5,
    )
    assert shown_as["builds"] == {"": {"recipe": "r", "skipped": {"silent audio": 2}}}
    assert shown_as["examples"][1]["text"] == "eins"
    assert (shown_as["skipped"], shown_as["warnings"]) == ({}, [])
    assert all(
        word in shown(statistics)
        for word in ("48000 Hz (1)", "OGG/VORBIS (1)", "dog", "eins", "silent audio (2)")
    )


def test_folders_of_a_split_are_counted_together(tmp_path: Path):
    for fold, clips in (("1", 2), ("2", 3)):
        with ShardWriter(tmp_path / fold) as shard:
            for number in range(clips):
                shard.write(f"{number}", "flac", audio(), Annotation("t"))
    statistics = inspect_shards(tmp_path)
    assert (statistics.clips, statistics.folders) == (5, {"1": 2, "2": 3})
    assert "1 (2), 2 (3)" in shown(statistics)


def test_every_skip_reason_is_counted(tmp_path: Path):
    tar(
        tmp_path,
        {
            "good.flac": audio(),
            "good.json": annotation(esc=1),
            "nojson.flac": audio(),
            "noaudio.json": annotation(),
            "badjson.flac": audio(),
            "badjson.json": b"{",
            "badfield.flac": audio(),
            "badfield.json": annotation(domain="two words"),
            "text.wav": b"this is text " * 50,
            "text.json": annotation(),
            "empty.wav": audio(0, kind="WAV"),
            "empty.json": annotation(),
            "long.wav": audio(31, kind="WAV"),
            "long.json": annotation(),
            "large.wav": audio(40, 48_000, kind="WAV"),
            "large.json": annotation(),
            "x/good.wav": audio(kind="WAV"),
            "x/good.json": annotation(),
            "no_suffix": b"",
        },
    )
    statistics = inspect_shards(tmp_path, ClipLimits(max_bytes=3_000_000))
    assert statistics.clips == 2
    assert statistics.skipped == {
        "bad or missing JSON": 3,
        "no audio member": 1,
        "undecodable audio": 1,
        "empty audio": 1,
        "audio too long": 1,
        "member too large": 1,
    }
    listed = " ".join(shown(statistics).split())  # lines break where the path of the test ends
    assert "nojson: bad or missing JSON: no .json, .txt or .cls member" in listed


def test_a_wrong_length_in_a_header_is_rejected_and_a_missing_one_is_decoded(
    tmp_path: Path,
):
    def with_samples(claimed: int) -> bytes:  # RFC 9639, section 8.2
        data = audio(1)
        return (
            data[:18]
            + ((int.from_bytes(data[18:26], "big") >> 36 << 36) | claimed).to_bytes(8, "big")
            + data[26:]
        )

    lies = {"lie.flac": with_samples(2**36 - 1), "lie.json": annotation()}
    tar(tmp_path, {**lies, "pipe.flac": with_samples(0), "pipe.json": annotation()})
    statistics = inspect_shards(tmp_path)
    assert (list(statistics.seconds), statistics.skipped) == ([1.0], {"audio too long": 1})


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_the_complete_samples_of_a_truncated_tar_are_counted(tmp_path: Path, keep: float):
    with ShardWriter(tmp_path) as shard:
        for number in range(10):
            shard.write(f"{number}", "flac", audio(), Annotation("t"))
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    statistics = inspect_shards(tmp_path)
    assert statistics.skipped["bad tar"] == 1
    assert 0 < statistics.clips < 10
    assert "but its index says 10" in statistics.warnings[0]
    assert "Warning: " in shown(statistics)


@pytest.mark.parametrize("data", [b"", b"not a tar at all", b"\x00" * 10_240, b"\xff" * 4096])
def test_a_file_that_is_not_a_tar_is_counted(tmp_path: Path, data: bytes):
    (tmp_path / "a.tar").write_bytes(data)
    statistics = inspect_shards(tmp_path)
    assert statistics.clips == 0
    assert shown(statistics)
    assert json.dumps(statistics.as_dict())


def test_hostile_bytes_are_counted_whatever_they_are(tmp_path: Path):
    random = np.random.default_rng(0)
    whole = tar(
        tmp_path,
        {
            f"{n}.{suffix}": body
            for n in range(5)
            for suffix, body in (("flac", audio(0.2)), ("json", annotation()))
        },
    )
    sound = np.frombuffer(whole.read_bytes(), np.uint8)
    for _ in range(150):
        data = sound.copy()
        block = random.integers(0, 20) * 512 % len(data)  # headers too, not only bodies
        where = np.concatenate(
            [random.integers(0, len(data), 4), block + random.integers(0, 512, 4)]
        )
        data[where] = random.integers(0, 256, 8)
        whole.write_bytes(data.tobytes())
        statistics = inspect_shards(tmp_path)
        assert statistics.clips + statistics.skipped.total() >= 1


def test_markup_in_names_and_texts_is_not_obeyed(tmp_path: Path):
    tar(
        tmp_path,
        {
            "[red]x[.flac": audio(),
            "[red]x[.json": annotation(text="[/bold] [link=x]", label="[/]", source="[/x]"),
        },
    )
    shown_as = shown(inspect_shards(tmp_path))
    assert all(word in shown_as for word in ("[red]x[", "[/bold] [link=x]", "[/]", "[/x]"))


def test_brackets_in_a_folder_are_no_pattern_and_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "set [2024] [bold]x"
    folder.mkdir()
    tar(folder, {"a.flac": audio(), "a.json": annotation()})
    for root in (str(folder), f"{folder}/for*.tar"):
        assert inspect_shards(root).clips == 1
    assert "set [2024] [bold]x" in " ".join(shown(inspect_shards(folder)).split())
    assert main(["data", "index", str(folder)]) == 0
    assert main(["data", "inspect", str(folder.parent)]) == 0
    assert "set [2024] [bold]x (1)" in capsys.readouterr().out
    assert main(["data", "inspect", str(folder / "none [here]")]) == 1
    assert "none [here]" in capsys.readouterr().err


def test_compressed_tars_are_inspected_and_unpacked_by_the_index(tmp_path: Path):
    path = tar(tmp_path, {"a.flac": audio(), "a.json": annotation()})
    (tmp_path / "more.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"more\.tar\.gz is compressed with gzip.*data index"):
        open_index(tmp_path)
    assert inspect_shards(tmp_path).clips == 2
    assert inspect_shards(tmp_path, most=1).clips == 1
    index = index_folder(tmp_path)
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        (path.name, 1),
        ("more.tar", 1),
    ]
    assert (tmp_path / "more.tar").read_bytes() == path.read_bytes()
    assert index_folder(tmp_path).fingerprint() == index.fingerprint()
    (tmp_path / "index.json").unlink()
    assert open_index(tmp_path).samples == 2
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "more.tar.gz").read_bytes()[:-99])
    with pytest.raises(UserError, match="cannot be indexed"):
        index_folder(tmp_path)
    assert "bad tar" in inspect_shards(f"{tmp_path}/cut.tar.gz").skipped
    other = index_folder(f"{tmp_path}/more.tar.gz", tmp_path / "other", workers=2)
    assert (other.url(0), other.samples) == (f"{tmp_path}/other/more.tar", 1)


def test_floats_on_the_scale_of_integers_are_counted(tmp_path: Path):
    file = io.BytesIO()
    samples = np.random.default_rng(0).integers(-9000, 9000, 16_000).astype(np.float32)
    soundfile.write(file, samples, 16_000, format="WAV", subtype="FLOAT")
    tar(tmp_path, {"a.wav": file.getvalue(), "a.json": annotation()})
    statistics = inspect_shards(tmp_path)
    assert (statistics.clips, statistics.skipped) == (0, {"audio out of scale": 1})


def test_clips_without_a_label_are_counted(tmp_path: Path):
    labels = ['"dog"', "NaN", "null", '""', '["cat", NaN]']
    members = {}
    for number, label in enumerate(labels):
        members |= {f"{number}.flac": audio(), f"{number}.json": b'{"label": %s}' % label.encode()}
    tar(tmp_path, members)
    statistics = inspect_shards(tmp_path)
    assert (statistics.counts["labels"], statistics.clips_with_label) == ({"dog": 1, "cat": 1}, 2)
    assert "2 labels, 3 clips without one" in " ".join(shown(statistics).split())


def test_the_fields_of_clips_without_text_are_named(tmp_path: Path):
    tar(tmp_path, {"a.flac": audio(), "a.json": b'{"description": "rain", "artist": "x"}'})
    statistics = inspect_shards(tmp_path)
    assert statistics.counts["other_fields"] == {"description": 1, "artist": 1}
    text = " ".join(shown(statistics).split())
    assert "Other fields: description (1), artist (1)" in text
    fields = "fields: {text: description, id: __key__}"
    assert f"{{path: {tmp_path}, domain: DOMAIN, {fields}}}" == statistics.source()


def test_the_suggested_text_of_labelled_clips_is_their_label_not_their_file_name(tmp_path: Path):
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        fields = b'{"label": "dog_bark", "audio": "a.flac", "domain": "sound"}'
        tar(tmp_path / split, {"a.flac": audio(), "a.json": fields})
    statistics = inspect_shards(tmp_path)
    fields = '{text: "{label:words}", id: __key__}'
    assert statistics.source() == f"{{path: {tmp_path}/train, domain: sound, fields: {fields}}}"


def test_a_folder_of_folders_of_shards_is_not_a_source_and_the_error_names_them(tmp_path: Path):
    for split in ("test", "train"):
        with ShardWriter(tmp_path / split) as shard:
            shard.write("a", "flac", audio(), Annotation("a dog barks"))
    with pytest.raises(UserError, match="Shards are in its folders test, train: give one of them"):
        open_index(tmp_path)


def test_a_key_that_is_repeated_is_counted_and_warned_about(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, body in [("0.flac", audio()), ("0.json", annotation())] * 2:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            file.addfile(member, io.BytesIO(body))
    statistics = inspect_shards(tmp_path)
    assert statistics.clips == 2
    assert "1 samples have the key of the previous sample" in statistics.warnings[0]


def test_an_index_that_names_a_missing_shard_is_the_users_matter(tmp_path: Path):
    with ShardWriter(tmp_path) as shard:
        shard.write("a", "flac", audio(), Annotation("t"))
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="are missing: shard-000000"):
        inspect_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(UserError, match="has neither"):
        inspect_shards(tmp_path)
    with pytest.raises(UserError, match="There are no shards at"):
        inspect_shards(tmp_path / "nowhere")
    with pytest.raises(UserError, match="none://x/y cannot be read: Protocol not known"):
        inspect_shards("none://x/y")


def test_distribution_and_histogram():
    assert distribution([]) == {}
    assert distribution([1, 2, 3, 4]) == {
        "min": 1,
        "median": 2.5,
        "mean": 2.5,
        "p95": pytest.approx(3.85),
        "max": 4,
    }
    counts = histogram([0.1, 0.5, 0.7, 5.0, 5.01, 30.0, 30.0004, 31])
    assert counts == {
        "0–0.5 s": 2,
        "0.5–1 s": 1,
        "1–2 s": 0,
        "2–5 s": 1,
        "5–10 s": 1,
        "10–15 s": 0,
        "15–20 s": 0,
        "20–30 s": 2,
        "> 30 s": 1,
    }
    assert sum(histogram([]).values()) == 0


def test_folders_without_an_index_are_read_next_to_those_with_one(tmp_path: Path):
    for name in ("indexed", "plain", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            tar(tmp_path / name, {"a.flac": audio(), "a.json": annotation()})
    index_folder(tmp_path / "indexed")
    assert inspect_shards(tmp_path).folders == {"indexed": 1, "plain": 1}
