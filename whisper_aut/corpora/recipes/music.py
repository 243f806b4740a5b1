"""Music: NSynth, FMA small and GTZAN."""

import csv
from pathlib import Path

from whisper_aut.corpora.recipes.base import (
    Archive,
    Recipe,
    Rows,
    find,
    find_parts,
    with_article,
    words,
)
from whisper_aut.utils import read_json

NSYNTH_URL = "http://download.magenta.tensorflow.org/datasets/nsynth"
FMA_URL = "https://os.unil.cloud.switch.ch/fma"
FMA_SPLITS = {"training": "train", "validation": "valid", "test": "test"}


def _nsynth(raw: Path) -> Rows:
    folders = {split: f"nsynth-{split}" for split in ("train", "valid", "test")}
    for split, folder in find_parts(raw, folders).items():
        for name, note in read_json(folder / "examples.json").items():
            family, kind = note["instrument_family_str"], note["instrument_source_str"]
            qualities = [words(quality) for quality in note.get("qualities_str", ())]
            instrument = f"a single note of {with_article(kind)} {words(family)}"
            yield {
                "audio": str(folder.relative_to(raw) / "audio" / f"{name}.wav"),
                "text": ", ".join([instrument, *qualities]),
                "label": family,
                "split": split,
                "instrument": note["instrument_str"],
                "pitch": note["pitch"],
                "velocity": note["velocity"],
            }


def _fma_small(raw: Path) -> Rows:
    audio = find(raw, "fma_small").relative_to(raw)
    with find(raw, "fma_metadata/tracks.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        columns = list(zip(next(lines), next(lines), strict=True))  # the header has two lines
        next(lines)  # and a third one that only names the index
        for line in lines:
            row = dict(zip(columns, line, strict=True))
            if row["set", "subset"] == "small":
                track, genre = f"{int(line[0]):06d}", row["track", "genre_top"]
                yield {
                    "audio": str(audio / track[:3] / f"{track}.mp3"),
                    "text": f"a piece of {genre.lower()} music",
                    "label": genre,
                    "split": FMA_SPLITS[row["set", "split"]],
                    "licence": row["track", "license"],
                }


def _gtzan(raw: Path) -> Rows:
    """Use the fault-filtered splits that torchaudio lists."""
    from torchaudio.datasets import gtzan  # here, because it imports torch

    root = find(raw, "blues").parent.relative_to(raw)
    for split in ("train", "valid", "test"):
        for name in getattr(gtzan, f"filtered_{split}"):
            genre = name.partition(".")[0]
            yield {
                "audio": str(root / genre / f"{name}.wav"),
                "text": f"a piece of {genre} music",
                "label": genre,
                "split": split,
                "id": name,
            }


RECIPES = (
    Recipe(
        name="nsynth",
        title="NSynth",
        domain="music",
        task="caption",
        licence="CC BY 4.0",
        source="https://magenta.tensorflow.org/datasets/nsynth",
        rows=_nsynth,
        archives=tuple(
            Archive(f"{NSYNTH_URL}/nsynth-{split}.jsonwav.tar.gz")
            for split in ("train", "valid", "test")
        ),
        clips=305_979,
        hours=340,  # of 4 s each
        checked=("clips", "hours"),
    ),
    Recipe(
        name="fma_small",
        title="FMA small",
        domain="music",
        task="caption",
        licence="by track; metadata CC BY 4.0",
        source="https://github.com/mdeff/fma",
        rows=_fma_small,
        archives=(
            Archive(f"{FMA_URL}/fma_metadata.zip", "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733"),
            Archive(f"{FMA_URL}/fma_small.zip", "sha1:ade154f733639d52e35e32f5593efe5be76c6d70"),
        ),
        clips=8_000,
        hours=67,  # of 30 s each
        max_seconds=31.0,
        checked=("checksums", "clips", "hours", "licence"),
    ),
    Recipe(
        name="gtzan_filtered",
        title="GTZAN, fault-filtered",
        domain="music",
        task="caption",
        licence="none stated",
        source="https://www.tensorflow.org/datasets/catalog/gtzan",
        rows=_gtzan,
        archives=(
            Archive(
                "http://opihi.cs.uvic.ca/sound/genres.tar.gz",
                "sha256:24347e0223d2ba798e0a558c4c172d9d4a19c00bb7963fe055d183dadb4ef2c6",
            ),
        ),
        manual_steps=(
            "The publisher's server has been unreachable for years. Use a copy with --mirror URL, "
            "or unpack it into the folder; the checksum tells whether it is the same archive."
        ),
        clips=930,
        hours=7.8,
        max_seconds=31.0,
        checked=("checksums", "split"),
    ),
)
