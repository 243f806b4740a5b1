"""Build the shards of the field suite from a folder of corpora: one CSV and one `audio/` each.

    python benchmarks/field/corpora.py CORPORA --out DATA/field

Splits are the published ones. Three things are added. ESC-10 loses the seven recordings that it
shares with UrbanSound8K. A tenth of the recordings of UrbanSound8K's folds 1 and 2 is held out for
validation, drawn by the SHA-256 of the Freesound id. Classes become captions by one of several
templates, drawn by the SHA-256 of the file name.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from whisper_aut.corpora.build import build_shards
from whisper_aut.corpora.manifest import ManifestSpec

SHARED_RECORDINGS = {"114587", "163459", "180256", "199261", "203128", "30344", "59513"}
SOUND_CAPTIONS = (
    "the sound of {}",
    "{} can be heard",
    "a recording of {}",
    "this is {}",
    "an audio clip of {}",
)
SOUND_NAMES = {
    "air_conditioner": "an air conditioner humming",
    "car_horn": "a car horn",
    "children_playing": "children playing",
    "dog_bark": "a dog barking",
    "drilling": "drilling",
    "engine_idling": "an engine idling",
    "gun_shot": "a gun shot",
    "jackhammer": "a jackhammer",
    "siren": "a siren",
    "street_music": "street music",
}
NOTE_CAPTIONS = (
    "a single {register} note of a {family}",
    "one {family} note, {register} and {dynamics}",
    "a {dynamics} {register} {family} note",
    "a {family} plays one {register} note",
)
Row = dict[str, str]


def draw(text: str, count: int) -> int:
    """Return a number below `count` that depends on `text` only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count


def sound_caption(row: Row) -> str:
    template = SOUND_CAPTIONS[draw(row["audio"], len(SOUND_CAPTIONS))]
    return template.format(SOUND_NAMES[row["category"]])


def note_caption(row: Row) -> str:
    pitch, velocity = int(row["pitch"]), int(row["velocity"])
    return NOTE_CAPTIONS[draw(row["filename"], len(NOTE_CAPTIONS))].format(
        family=row["family"].replace("_", " "),
        register="low" if pitch < 48 else "middle" if pitch < 72 else "high",
        dynamics="loud" if velocity > 90 else "soft",
    )


def urban_split(row: Row) -> str:
    if row["fold"] == "10":
        return "test"
    return "valid" if draw(row["freesound_id"], 10) == 0 else "train"


# Corpus → the constants of its samples, and what each row gets: split, label and text.
CORPORA: dict[str, tuple[dict[str, str], Callable[[Row], dict[str, str] | None]]] = {
    "kathleen": (
        {"domain": "speech", "task": "asr", "language": "en", "licence": "CC0-1.0"},
        lambda row: {"split": row["split"], "text": row["text"]},
    ),
    "kerstin": (
        {"domain": "speech", "task": "asr", "language": "de", "licence": "CC0-1.0"},
        lambda row: {"split": row["split"], "text": row["text"]},
    ),
    "keywords": (
        {"domain": "speech", "task": "class", "language": "en", "licence": "Apache-2.0"},
        lambda row: {"split": row["split"], "label": row["keyword"]},
    ),
    "tuxpaint": (
        {"domain": "speech", "task": "class", "licence": "GPL-2.0"},
        lambda row: {"split": row["split"], "label": row["language"], "language": ""},
    ),
    "fsdd": (
        {"domain": "speech", "task": "class", "language": "en", "licence": "CC-BY-SA-4.0"},
        lambda row: {"split": row["split"], "label": row["text"], "text": ""},
    ),
    "esc10": (
        {"domain": "sound", "task": "class", "licence": "CC-BY-3.0"},
        lambda row: (
            None
            if row["src_file"] in SHARED_RECORDINGS
            else {"split": row["fold"], "label": row["category"]}
        ),
    ),
    "us8k": (
        {"domain": "sound", "task": "caption", "licence": "CC-BY-NC-3.0"},
        lambda row: {
            "split": urban_split(row),
            "label": row["category"],
            "text": sound_caption(row),
        },
    ),
    "instruments": (
        {"domain": "music", "task": "class", "licence": "CC-BY-4.0"},
        lambda row: {"split": row["fold"], "label": row["instrument"]},
    ),
    "gmnotes": (
        {"domain": "music", "task": "caption", "licence": "MIT"},
        lambda row: {"split": row["split"], "label": row["family"], "text": note_caption(row)},
    ),
    "gmpieces": (
        {"domain": "music", "task": "caption", "licence": "MIT"},
        lambda row: {"split": row["fold"], "label": row["style"], "text": row["caption"]},
    ),
}


def build(name: str, source: Path, out: Path) -> Any:
    constants, describe = CORPORA[name]
    with (source / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            row | {"audio": row.get("audio") or row["filename"]} for row in csv.DictReader(file)
        ]
    described = [row | extra for row in rows if (extra := describe(row)) is not None]
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in described), encoding="utf-8")
    spec = replace(
        ManifestSpec(manifest, source / "audio", split_by="split", source=name), **constants
    )
    return build_shards(spec, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the shards of the field suite.")
    parser.add_argument("corpora", type=Path, help="folder with esc10/, us8k/, kathleen/ …")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name in CORPORA:
        print(f"{name}: {build(name, options.corpora / name, options.out / name).summary()}")


if __name__ == "__main__":
    main()
