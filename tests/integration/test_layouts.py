"""Corpora as people have them, from their files to a training step."""

import json
from pathlib import Path

import numpy as np

from tests.support.audio import encode_audio
from tests.support.training import QUIET, settings_for
from whisper_aut.cli import main
from whisper_aut.training.train import train


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.4, 0.4, round(seconds * 8_000)).astype(np.float32)


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
    settings = settings_for(
        tiny_whisper,
        shards,
        tmp_path / "runs",
        f"data.train=[{', '.join(train_on)}]",
        f"data.valid=[{{path: {shards}/clotho/valid, domain: sound}}]",
        "data.domains={speech: 0, sound: 0.5, music: 0.5}",
        "trainer.max_steps=2",
        "trainer.valid_every_steps=2",
    )
    run = train(settings, QUIET).run
    done = json.loads(run.done.read_text())
    assert (done["steps"], done["skipped"]) == (2, {})
    assert list(done["cut"]) == [str(shards / "genres")]
    assert done["cut"][str(shards / "genres")] > 0
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert {entry["reference"] for entry in samples} <= {"one 0", "one 1", "one 2"}
