"""Environmental and vocal sounds: ESC-50, FSD50K, UrbanSound8K and VocalSound."""

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from whisper_aut.corpora.recipes.base import (
    Archive,
    Recipe,
    Rows,
    find,
    find_parts,
    read_csv,
    words,
)
from whisper_aut.utils import read_json

VOCALSOUNDS = {
    "laughter": "laughing",
    "sigh": "sighing",
    "cough": "coughing",
    "throatclearing": "clearing the throat",
    "sneeze": "sneezing",
    "sniff": "sniffing",
}


def _esc50(raw: Path) -> Rows:
    """Split by the published folds, which keep clips of one recording (`src_file`) together."""
    table = find(raw, "meta/esc50.csv")
    audio = table.parents[1].relative_to(raw) / "audio"
    for row in read_csv(table):
        yield {
            "audio": str(audio / row["filename"]),
            "text": f"the sound of {words(row['category'])}",
            "label": row["category"],
            "split": row["fold"],
            "freesound_id": row["src_file"],
        }


def _urbansound8k(raw: Path) -> Rows:
    table = find(raw, "metadata/UrbanSound8K.csv")
    audio = table.parents[1].relative_to(raw) / "audio"
    for row in read_csv(table):
        yield {
            "audio": str(audio / f"fold{row['fold']}" / row["slice_file_name"]),
            "text": f"the sound of {words(row['class'])}",
            "label": row["class"],
            "split": row["fold"],
            "freesound_id": row["fsID"],
        }


def _fsd50k(raw: Path) -> Rows:
    """The label has all classes of a clip. The text leaves out those that another class implies."""
    tables = {part: f"FSD50K.ground_truth/{part}.csv" for part in ("dev", "eval")}
    rows = {part: list(read_csv(path)) for part, path in find_parts(raw, tables).items()}
    ancestors = _ancestors([row["labels"].split(",") for part in rows.values() for row in part])
    splits = {"train": "train", "val": "valid"}  # of dev.csv
    for part, folder in find_parts(raw, {part: f"FSD50K.{part}_audio" for part in rows}).items():
        metadata = read_json(find(raw, f"{part}_clips_info_FSD50K.json"))
        for row in rows[part]:
            labels = row["labels"].split(",")
            implied = set().union(*(ancestors[label] for label in labels))
            named = ", ".join(words(label).lower() for label in labels if label not in implied)
            yield {
                "audio": str(folder.relative_to(raw) / f"{row['fname']}.wav"),
                "text": f"the sounds of {named}",
                "label": labels,
                "split": "test" if part == "eval" else splits[row["split"]],
                "freesound_id": row["fname"],
                "licence": metadata.get(row["fname"], {}).get("license", ""),
            }


def _ancestors(clips: Sequence[Sequence[str]]) -> dict[str, set[str]]:
    """Return the ancestors of each class.

    The release labels a clip with every ancestor of its classes in the AudioSet ontology. A class
    is therefore an ancestor if it has all clips of the other class, and more.
    """
    counts = Counter(label for labels in clips for label in labels)
    together = Counter(pair for labels in clips for pair in permutations(labels, 2))
    ancestors: dict[str, set[str]] = {label: set() for label in counts}
    for (label, other), shared in together.items():
        if shared == counts[label] < counts[other]:
            ancestors[label].add(other)
    return ancestors


def _vocalsound(raw: Path) -> Rows:
    audio = find(raw, "audio_16k").relative_to(raw)
    for split, name in (("train", "tr"), ("valid", "val"), ("test", "te")):
        for item in read_json(find(raw, f"datafiles/{name}.json"))["data"]:
            file = item["wav"].rpartition("/")[2]
            kind = Path(file).stem.rpartition("_")[2]
            yield {
                "audio": str(audio / file),
                "text": f"a person {VOCALSOUNDS[kind]}",
                "label": kind,
                "split": split,
                "speaker": file.partition("_")[0],
            }


RECIPES = (
    Recipe(
        name="esc50",
        title="ESC-50",
        domain="sound",
        task="caption",
        licence="CC BY-NC 3.0",
        source="https://github.com/karolpiczak/ESC-50",
        rows=_esc50,
        archives=(Archive("https://github.com/karolpiczak/ESC-50/archive/master.zip"),),
        clips=2_000,
        hours=2.8,
    ),
    Recipe(
        name="fsd50k",
        title="FSD50K",
        domain="sound",
        task="tag",
        licence="by clip: CC0, CC BY, CC BY-NC, CC Sampling+",
        source="https://zenodo.org/records/4060432",
        rows=_fsd50k,
        manual_steps=(
            "The audio is published as multi-part zips, which only `zip -s 0 FSD50K.dev_audio.zip "
            "--out dev.zip` joins (and the same for eval). Download all files of the record, join, "
            "and unpack everything into the folder."
        ),
        clips=51_197,
        hours=108.3,
        checked=("clips", "hours"),
    ),
    Recipe(
        name="urbansound8k",
        title="UrbanSound8K",
        domain="sound",
        task="caption",
        licence="CC BY-NC 3.0",
        source="https://zenodo.org/records/1203745",
        rows=_urbansound8k,
        archives=(
            Archive(
                "https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz?download=1",
                "md5:9aa69802bbf37fb986f71ec1483a196e",
            ),
        ),
        clips=8_732,
        checked=("checksums", "clips", "licence"),
    ),
    Recipe(
        name="vocalsound",
        title="VocalSound",
        domain="sound",
        task="caption",
        licence="CC BY-SA 4.0",
        source="https://github.com/YuanGongND/vocalsound",
        rows=_vocalsound,
        manual_steps=(
            "The page links the 16 kHz release, one zip of 1.7 GB. Unpack it into the folder, so "
            "that audio_16k/ and datafiles/ are in it."
        ),
        clips=21_024,
        checked=("clips",),
    ),
)
