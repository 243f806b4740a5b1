"""Mutated shards and clips: no crash, no hang, nothing written outside, and whatever is missing
is in the ledger.
"""

import io
import json
import pickle
import random
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.audio import encode_audio, tone
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import ExampleBuilder, Ledger, StreamSource
from whisper_aut.data.shards import ShardEntry, open_index
from whisper_aut.data.targets import WhisperText
from whisper_aut.data.writer import ShardWriter, write_index
from whisper_aut.errors import SkipReason
from whisper_aut.models.pretrained import PretrainedWhisper

SAMPLES = 4
LIMITS = ClipLimits(max_bytes=1 << 20)


@pytest.fixture(scope="module")
def build(tiny_whisper: Path) -> ExampleBuilder:
    return ExampleBuilder(
        LogMel(80),
        WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer, max_tokens=40, overflow="drop"),
        LIMITS,
    )


class Bomb:
    """A pickle that would leave a file behind if anything loaded it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def clips() -> dict[str, bytes]:
    sound = tone(0.3)
    kinds = {
        "flac": ("FLAC", None),
        "wav": ("WAV", "PCM_16"),
        "ogg": ("OGG", "VORBIS"),
        "mp3": ("MP3", None),
    }
    made = {
        suffix: encode_audio(sound, 16_000, kind, subtype)
        for suffix, (kind, subtype) in kinds.items()
    }
    return {**made, "opus": encode_audio(sound, 16_000, "OGG", "OPUS")}


CLIPS = clips()
GOOD_JSON = json.dumps({"text": "a tone", "domain": "sound", "duration_seconds": 0.3}).encode()


def flipped(data: bytes, chance: random.Random, most: int = 40) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, most)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def lying(data: bytes, chance: random.Random) -> bytes:
    """Put a huge or strange number where headers keep sizes, rates and channels."""
    changed = bytearray(data)
    value = chance.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 10 * 3600 * 16_000, 44_100])
    at = chance.randrange(0, min(80, len(changed) - 4))
    changed[at : at + 4] = struct.pack(chance.choice("<>") + "I", value)
    return bytes(changed)


def hostile_json(chance: random.Random, bomb: bytes) -> bytes:
    return chance.choice(
        [
            b"",
            b"{",
            b"null",
            b"[1]",
            b"\xff\xfe\x00",
            b"NaN",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"1e999",
            bomb,
            b'{"text": 3}',
            b'{"text": "x", "domain": "speach"}',
            b'{"text": "x", "duration_seconds": -1}',
            b'{"text": "x", "duration_seconds": NaN}',
            b'{"text": "\\ud800"}',
            b'{"text": ""}',
            b'{"text": "\\u0000"}',
            json.dumps({"text": "word " * 500}).encode(),
            json.dumps({"text": "x", "label": {"a": 1}}).encode(),
            b'{"text": "x", "__class__": "os.system", "__reduce__": 1, "extra": {}}',
            b'{"text": "x", "text": ["y"]}',
            b'{"text": "' + b"y" * (1 << 20) + b'"}',
            b'{"text": 1' + b"0" * 5000 + b"}",
        ]
    )


HOSTILE_NAMES = [
    "../../{0}",
    "/{0}",
    "a/../../../{0}",
    "{0}\n",
    "x" * 300 + "{0}",
    "{0}\udcff",
    "-rf {0}",
    "C:\\{0}",
    "./{0}",
    ".{0}",
]


def write_tar(path: Path, members: list[tuple[str, bytes]], chance: random.Random) -> None:
    with tarfile.open(
        path, "w", format=chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as tar:
        for name, body in members:
            header = tarfile.TarInfo(name)
            header.size = len(body)
            if chance.random() < 0.03:
                header.type, header.linkname, header.size = (
                    chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
                    "/etc/passwd",
                    0,
                )
            tar.addfile(header, io.BytesIO(body))


def mutate(folder: Path, chance: random.Random, bomb: bytes) -> int:
    """Write one shard of `SAMPLES` clips with one mutation, and an index that promises them all;
    return how many it promises.
    """
    members, kind = [], chance.randrange(8)
    victim = chance.randrange(SAMPLES)
    for number in range(SAMPLES):
        suffix, name, facts = chance.choice(sorted(CLIPS)), f"clip{number}", GOOD_JSON
        audio, named = CLIPS[suffix], suffix
        if number == victim:
            if kind == 0:
                audio = flipped(audio, chance)
            elif kind == 1:
                audio = audio[: chance.randrange(len(audio))]
            elif kind == 2:
                named = chance.choice(
                    ["wav", "flac", "mp3", "ogg", "opus", "pkl", "pth", "py", "FLAC"]
                )
                audio = chance.choice(
                    [audio, bomb, b"#!/bin/sh\ntouch x", pickle.dumps(np.zeros(3))]
                )
            elif kind == 3:
                audio = lying(audio, chance)
            elif kind == 4:
                facts = hostile_json(chance, bomb)
            elif kind == 5:
                name = chance.choice(HOSTILE_NAMES).format(f"clip{number}")
        members += [(f"{name}.{named}", audio), (f"{name}.json", facts)]
    path = folder / "shard-000000.tar"
    write_tar(path, members, chance)
    if kind >= 6:
        data = path.read_bytes()
        path.write_bytes(
            flipped(data, chance, 12) if kind == 6 else data[: chance.randrange(1, len(data))]
        )
    write_index(folder, [ShardEntry(path.name, SAMPLES, 0.3 * SAMPLES, path.stat().st_size)], {})
    return SAMPLES


def fuzz(root: Path, build: ExampleBuilder, shards: int, seed: int) -> Counter[str]:
    """Stream every mutated shard; every promised sample must come out as a clip or as a line of the
    ledger.
    """
    marker = root / "exploded"
    bomb = pickle.dumps(Bomb(marker))
    reasons: Counter[str] = Counter()
    for number in range(shards):
        folder = root / f"shards-{number}"
        folder.mkdir()
        mutate(folder, random.Random(seed * 100_000 + number), bomb)
        source = StreamSource(open_index(folder), "sound")
        module = ShardDataModule(
            [source], [source], [1.0], build, seed=0, window=10, batch_clips=4, epochs=1
        )
        ledger = Ledger(root / "ledger.jsonl")
        came = 0
        for loader in (module.train_dataloader(), module.val_dataloader()):
            for batch in loader:
                assert batch.mel.isfinite().all()
                came += len(batch) + len(batch.skipped)
                ledger.record(batch.sources, batch.skipped)
                reasons.update(str(refusal.reason) for refusal in batch.skipped)
        ledger.close()
        assert came == 2 * SAMPLES, (
            f"shard {number} of seed {seed}: {came} of {2 * SAMPLES} samples accounted for"
        )
        (folder / "shard-000000.tar").unlink()
    assert not marker.exists()
    lines = (root / "ledger.jsonl").read_text(errors="strict").splitlines()
    assert len(lines) == sum(reasons.values())
    assert all(json.loads(line)["reason"] in set(SkipReason) for line in lines)
    return reasons


@pytest.mark.timeout(120)
def test_mutated_shards_are_refused_and_counted(tmp_path: Path, build: ExampleBuilder):
    reasons = fuzz(tmp_path, build, shards=120, seed=1)
    assert {SkipReason.BAD_TAR, SkipReason.BAD_JSON, SkipReason.UNDECODABLE} <= reasons.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thousands_of_mutated_shards_are_refused_and_counted(tmp_path: Path, build: ExampleBuilder):
    reasons = fuzz(tmp_path, build, shards=2500, seed=2)
    assert len(reasons) >= 7


def test_sizes_are_bounded_before_anything_is_read_or_decoded(
    tmp_path: Path, build: ExampleBuilder
):
    """A 4 GB member that is not there, a 10-hour header in a kilobyte, a label that is too long."""
    hours = bytearray(CLIPS["wav"][:1000])
    hours[40:44] = struct.pack("<I", 10 * 3600 * 32_000)
    hours[4:8] = struct.pack("<I", 10 * 3600 * 32_000 + 36)
    flac = CLIPS["flac"]
    word = int.from_bytes(flac[18:26], "big")
    flac_hours = (
        flac[:18] + ((word >> 36 << 36) | 10 * 3600 * 16_000).to_bytes(8, "big") + flac[26:1000]
    )
    with ShardWriter(tmp_path / "a") as shards:
        shards.write("wav_hours", "wav", bytes(hours), Annotation(text="x", domain="sound"))
        shards.write("flac_hours", "flac", flac_hours, Annotation(text="x", domain="sound"))
        shards.write("long_label", "flac", flac, Annotation(text="word " * 100, domain="sound"))
    source = StreamSource(open_index(tmp_path / "a"), "sound")
    module = ShardDataModule(
        [source], [source], [1.0], build, seed=0, window=10, batch_clips=8, epochs=1
    )
    (batch,) = module.train_dataloader()
    reasons = {refusal.key: refusal.reason for refusal in batch.skipped}
    assert reasons["flac_hours"] is SkipReason.TOO_LONG
    assert reasons["long_label"] is SkipReason.LABEL_TOO_LONG
    assert reasons["wav_hours"] in (
        SkipReason.TOO_LONG,
        SkipReason.TOO_SHORT,
    )  # libsndfile corrects a WAV header that lies
    folder = tmp_path / "b"
    folder.mkdir()
    header = tarfile.TarInfo("big.wav")
    header.size = 4 << 30
    (folder / "shard-000000.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    write_index(folder, [ShardEntry("shard-000000.tar", 1)], {})
    source = StreamSource(open_index(folder), "sound")
    module = ShardDataModule([source], [], [1.0], build, seed=0, window=10, batch_clips=8, epochs=1)
    (batch,) = module.train_dataloader()
    assert batch.skipped[0].reason in (SkipReason.TOO_LARGE, SkipReason.BAD_TAR)
