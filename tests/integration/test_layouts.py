"""Corpora as people have them, from their files to a training step, from the command line."""

import gzip
import io
import json
import logging
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import REPOSITORY
from tests.support.audio import encode_audio
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.cli import main
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.training.run_dir import RunDirectory


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.4, 0.4, round(seconds * 8_000)).astype(np.float32)


def train(tiny_whisper: Path, runs: Path, *overrides: str) -> RunDirectory:
    """Run `whisper-aut train` without exports and probes."""
    config = str(REPOSITORY / "conf" / "smoke.yaml")
    chosen = [
        *("corpora.demo=null", "model.after=", f"model.path={tiny_whisper}", f"runs={runs}"),
        *("export=[]", "probe.tasks=[]", "trainer.log_every_steps=1", "data.batch_clips=3"),
    ]
    assert main(["train", config, *chosen, *overrides]) == 0
    return RunDirectory((runs / "smoke" / "latest").resolve())


def test_clips_of_30_seconds_and_clips_with_five_captions_train(tiny_whisper: Path, tmp_path: Path):
    genres = tmp_path / "genres"  # as GTZAN: every clip is a little longer than 30 s
    for number, genre in enumerate(("blues", "jazz")):
        (genres / genre).mkdir(parents=True)
        clip = encode_audio(noise(30.013, number), 8_000)
        (genres / genre / f"{genre}.00000.flac").write_bytes(clip)
    raw = tmp_path / "clotho"
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    for part in ("development", "validation"):
        (raw / part).mkdir(parents=True)
        rows = [f"{n}.wav,one {n},two {n},three {n},four {n},five {n}" for n in range(3)]
        (raw / f"clotho_captions_{part}.csv").write_text("\n".join([header, *rows]))
        table = "\n".join(["file_name,sound_id,license", *(f"{n}.wav,{n},CC0" for n in range(3))])
        (raw / f"clotho_metadata_{part}.csv").write_text(table)
        for n in range(3):
            (raw / part / f"{n}.wav").write_bytes(encode_audio(noise(1, n), 8_000, "WAV"))
    shards = tmp_path / "shards"
    folder = ["data", "build", "folder", str(genres), "--out", str(shards / "genres")]
    text = ["--domain", "music", "--text", "a piece of {label} music", "--max-seconds", "31"]
    assert main([*folder, *text, "--workers", "1"]) == 0
    clotho = ["data", "build", "clotho", str(raw), "--out", str(shards / "clotho")]
    assert main([*clotho, "--workers", "1"]) == 0

    train_on = [
        f"{{path: {shards}/genres, domain: music}}",
        f"{{path: {shards}/clotho/train, domain: sound}}",
    ]
    run = train(
        tiny_whisper,
        tmp_path / "runs",
        f"data.train=[{', '.join(train_on)}]",
        f"data.valid=[{{path: {shards}/clotho/valid, domain: sound}}]",
        "data.domains={speech: 0, sound: 0.5, music: 0.5}",
        "trainer.max_steps=2",
        "trainer.valid_every_steps=2",
    )
    done = json.loads(run.done.read_text())
    assert (done["steps"], done["skipped"]) == (2, {})
    assert list(done["cut"]) == [str(shards / "genres")]
    assert done["cut"][str(shards / "genres")] > 0
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert {entry["reference"] for entry in samples} <= {"one 0", "one 1", "one 2"}


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def found_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the entry of `data.train` that `data inspect` prints."""
    capsys.readouterr()
    assert main(["data", "inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["source"]


def test_shards_of_others_train_with_the_mapping_that_inspect_prints(
    tiny_whisper: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    """As LAION's (other fields, numeric ids) and XARES-LLM's (compressed), in a fourth domain."""
    laion: dict[str, bytes] = {}
    for n in range(3):
        fields: dict[str, Any] = {"id": n, "domain": "Sound", "tags": ["dog"]}
        fields["descriptions"] = [f"a dog barks {n} times", f"{n} barks of a dog"]
        laion[f"{n}.FLAC"] = encode_audio(noise(1, n), 8_000)
        laion[f"{n}.JSON"] = json.dumps(fields).encode()
    write_tar(tmp_path / "laion" / "0.tar", laion)
    xares: dict[str, bytes] = {}
    for n in range(3):
        xares[f"whale/{n}.wav"] = encode_audio(noise(1, n), 8_000, "WAV")
        xares[f"whale/{n}.json"] = json.dumps({"caption": f"a whale sings {n}"}).encode()
    write_tar(tmp_path / "xares" / "train.tar.gz", xares)

    sources = []
    for name, domain in (("laion", ""), ("xares", "bioacoustics")):
        source = found_source(tmp_path / name, capsys)
        assert main(["data", "index", str(tmp_path / name), "--workers", "1"]) == 0
        sources.append(source.replace("DOMAIN", domain))
    laion_fields = "fields: {label: tags, text: descriptions}"
    assert sources[0] == f"{{path: {tmp_path}/laion, domain: sound, {laion_fields}}}"
    relabelled = tmp_path / "better.jsonl"
    rows = [{"id": f"whale/{n}", "text": "a humpback whale"} for n in range(4)]
    relabelled.write_text("\n".join(map(json.dumps, rows)))
    sources[1] = f"{sources[1][:-1]}, annotations: {relabelled}}}"

    with caplog.at_level(logging.WARNING):
        run = train(
            tiny_whisper,
            tmp_path / "runs",
            f"data.train=[{', '.join(sources)}]",
            f"data.valid=[{', '.join(sources)}]",
            "data.domains={speech: 0, sound: 0.5, music: 0, bioacoustics: 0.5}",
            "trainer.max_steps=1",
            "trainer.valid_every_steps=1",
            "trainer.generate_clips=6",
        )
    assert f"1 of 4 ids of {relabelled} are not keys of {tmp_path}/xares: whale/3." in caplog.text
    done = json.loads(run.done.read_text())
    assert (done["steps"], done["skipped"]) == (1, {})
    assert {"valid/loss_sound", "valid/loss_bioacoustics"} <= done["metrics"].keys()
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    texts = {entry["domain"]: set() for entry in samples}
    for entry in samples:
        texts[entry["domain"]].add(entry["reference"])
    assert texts["bioacoustics"] == {"a humpback whale"}
    assert texts["sound"] == {f"a dog barks {n} times" for n in range(3)}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_hugging_face_dataset_on_disk_is_built_with_its_splits_and_classes_and_trains(
    suffix: str, tiny_whisper: Path, tmp_path: Path
):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    dataset = tmp_path / "dataset"
    dataset.mkdir()
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    clip = encode_audio(noise(1, 0), 8_000)
    for split, clips in (("train", 3), ("test", 1)):
        table = pyarrow.table(
            {
                "audio": [{"bytes": clip, "path": f"{n}.flac"} for n in range(clips)],
                "label": [n % 2 for n in range(clips)],
                "captions": [["an animal", f"number {n}"] for n in range(clips)],
            }
        ).replace_schema_metadata(about)
        if suffix == "parquet":  # as on the hub
            parquet.write_table(table, dataset / f"{split}-00000-of-00001.parquet")
        else:  # as `save_to_disk` writes it
            (dataset / split).mkdir()
            name = f"{dataset}/{split}/data-00000-of-00001.arrow"
            with (
                pyarrow.OSFile(name, "wb") as file,
                pyarrow.ipc.new_stream(file, table.schema) as out,
            ):
                out.write_table(table)
    build = ["data", "build", str(dataset), "--out", str(tmp_path / "out"), "--domain", "sound"]
    build += ["--split-by", "split", "--workers", "1"]
    assert main(build) == 0
    train_index = open_index(tmp_path / "out" / "train")
    samples = [one for one in iter_samples(train_index, ClipLimits()) if isinstance(one, Sample)]
    assert [(one.annotation.id, one.annotation.label) for one in samples] == [
        *(("0", "cat"), ("1", "dog"), ("2", "cat")),
    ]
    assert samples[1].annotation.texts == ("an animal", "number 1")
    assert samples[1].audio == clip
    assert "audio" not in samples[1].annotation.extra
    assert open_index(tmp_path / "out" / "test").samples == 1
    run = train(
        tiny_whisper,
        tmp_path / "runs",
        f"data.train=[{{path: {tmp_path}/out/train, domain: sound}}]",
        f"data.valid=[{{path: {tmp_path}/out/test, domain: sound}}]",
        "data.domains={speech: 0, sound: 1, music: 0}",
        "trainer.max_steps=1",
    )
    done = json.loads(run.done.read_text())
    assert (done["steps"], done["skipped"]) == (1, {})
