"""Recipes for music corpora: NSynth, FMA small and GTZAN.

Sources: Engel et al. 2017, https://magenta.tensorflow.org/datasets/nsynth; Defferrard et al. 2017,
https://github.com/mdeff/fma. GTZAN has the fault-filtered splits that torchaudio lists.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.base import (
    Archive,
    Recipe,
    find,
    find_parts,
    read_json,
    with_article,
    words,
)

NSYNTH_URL = "http://download.magenta.tensorflow.org/datasets/nsynth"
FMA_URL = "https://os.unil.cloud.switch.ch/fma"
FMA_SPLITS = {"training": "train", "validation": "valid", "test": "test"}


def nsynth(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of NSynth, labelled by instrument family."""
    folders = {split: f"nsynth-{split}" for split in ("train", "valid", "test")}
    for split, folder in find_parts(raw, folders).items():
        for name, note in read_json(folder / "examples.json").items():
            family, kind = note["instrument_family_str"], note["instrument_source_str"]
            qualities = ", ".join(words(quality) for quality in note.get("qualities_str", ()))
            yield {
                "audio": str(folder.relative_to(raw) / "audio" / f"{name}.wav"),
                "text": f"a single note of {with_article(kind)} {words(family)}"
                + (f", {qualities}" if qualities else ""),
                "label": family,
                "split": split,
                "instrument": note["instrument_str"],
                "pitch": note["pitch"],
                "velocity": note["velocity"],
            }


def fma_small(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of FMA small, labelled by top genre."""
    audio = find(raw, "fma_small").relative_to(raw)
    with find(raw, "fma_metadata/tracks.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        # The header has two lines. A third one only names the index.
        groups, names = (
            next(lines),
            next(lines),
        )
        next(lines)
        place = {
            (group, name): number
            for number, (group, name) in enumerate(zip(groups, names, strict=True))
        }
        for line in lines:
            if line[place["set", "subset"]] == "small":
                track, genre = f"{int(line[0]):06d}", line[place["track", "genre_top"]]
                yield {
                    "audio": str(audio / track[:3] / f"{track}.mp3"),
                    "text": f"a piece of {genre.lower()} music",
                    "label": genre,
                    "split": FMA_SPLITS[line[place["set", "split"]]],
                    "licence": line[place["track", "license"]],
                }


NSYNTH = Recipe(
    name="nsynth",
    title="NSynth",
    domain="music",
    task="caption",
    licence="CC BY 4.0",
    source="https://magenta.tensorflow.org/datasets/nsynth",
    rows=nsynth,
    archives=tuple(
        Archive(f"{NSYNTH_URL}/nsynth-{split}.jsonwav.tar.gz")
        for split in ("train", "valid", "test")
    ),
    clips=305_979,
    hours=340,  # of 4 s each
    checked=("clips", "hours"),
)
FMA_SMALL = Recipe(
    name="fma_small",
    title="FMA small",
    domain="music",
    task="caption",
    licence="by track; metadata CC BY 4.0",
    source="https://github.com/mdeff/fma",
    rows=fma_small,
    archives=(
        Archive(f"{FMA_URL}/fma_metadata.zip", "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733"),
        Archive(f"{FMA_URL}/fma_small.zip", "sha1:ade154f733639d52e35e32f5593efe5be76c6d70"),
    ),
    clips=8_000,
    hours=67,  # of 30 s each
    download_gb=8.1,
    max_seconds=31.0,
    checked=("checksums", "clips", "hours", "download_gb", "licence"),
)


def gtzan_rows(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the fault-filtered GTZAN, labelled by genre."""
    from torchaudio.datasets import gtzan  # here, because it imports torch

    root = find(raw, "blues").parent
    lists = {
        "train": gtzan.filtered_train,
        "valid": gtzan.filtered_valid,
        "test": gtzan.filtered_test,
    }
    for split, names in lists.items():
        for name in names:
            genre = name.partition(".")[0]
            audio = root.relative_to(raw) / genre / f"{name}.wav"
            yield {
                "audio": str(audio),
                "text": f"a piece of {genre} music",
                "label": genre,
                "split": split,
                "id": name,
            }


GTZAN = Recipe(
    name="gtzan_filtered",
    title="GTZAN, fault-filtered",
    domain="music",
    task="caption",
    licence="none stated",
    source="https://www.tensorflow.org/datasets/catalog/gtzan",
    rows=gtzan_rows,
    archives=(
        Archive(
            "http://opihi.cs.uvic.ca/sound/genres.tar.gz",
            "sha256:24347e0223d2ba798e0a558c4c172d9d4a19c00bb7963fe055d183dadb4ef2c6",
        ),
    ),
    by_hand=(
        "The publisher's server has been unreachable for years. A copy that you have, or find, "
        "goes in by --mirror URL, or unpacked into the folder; the checksum tells whether it is "
        "the same archive."
    ),
    clips=930,
    hours=7.8,
    max_seconds=31.0,
    checked=("checksums", "split"),
)
