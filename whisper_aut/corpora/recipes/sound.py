"""Recipes for corpora of environmental sounds: ESC-50, FSD50K and UrbanSound8K.

Source of ESC-50: Piczak 2015, https://github.com/karolpiczak/ESC-50. Clips of one recording are in
the same fold; `src_file` is the recording's Freesound id.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.base import (
    Archive,
    Recipe,
    find,
    find_parts,
    read_json,
    read_table,
    words,
)


def esc50_rows(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of ESC-50, split by the published folds."""
    table = find(raw, "meta/esc50.csv")
    audio = table.parents[1].relative_to(raw) / "audio"
    for row in read_table(table):
        yield {
            "audio": str(audio / row["filename"]),
            "text": f"the sound of {words(row['category'])}",
            "label": row["category"],
            "split": row["fold"],
            "freesound_id": row["src_file"],
        }


ESC50 = Recipe(
    name="esc50",
    title="ESC-50",
    domain="sound",
    task="caption",
    licence="CC BY-NC 3.0",
    source="https://github.com/karolpiczak/ESC-50",
    rows=esc50_rows,
    archives=(Archive("https://github.com/karolpiczak/ESC-50/archive/master.zip"),),
    clips=2_000,
    hours=2.8,
)


def fsd50k(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of FSD50K.

    The label has all classes of a clip. The text leaves out those that another class implies.
    """
    tables = {part: f"FSD50K.ground_truth/{part}.csv" for part in ("dev", "eval")}
    rows = {part: list(read_table(path)) for part, path in find_parts(raw, tables).items()}
    ancestors = _ancestors([row["labels"].split(",") for part in rows.values() for row in part])
    for part in find_parts(raw, {part: f"FSD50K.{part}_audio" for part in rows}):
        folder = find(raw, f"FSD50K.{part}_audio").relative_to(raw)
        facts = read_json(find(raw, f"{part}_clips_info_FSD50K.json"))
        for row in rows[part]:
            labels = row["labels"].split(",")
            implied = set().union(*(ancestors[label] for label in labels))
            named = ", ".join(words(label).lower() for label in labels if label not in implied)
            yield {
                "audio": str(folder / f"{row['fname']}.wav"),
                "text": f"the sounds of {named}",
                "label": labels,
                "split": "test"
                if part == "eval"
                else {"train": "train", "val": "valid"}[row["split"]],
                "freesound_id": row["fname"],
                "licence": facts.get(row["fname"], {}).get("license", ""),
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


def urbansound8k(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of UrbanSound8K, split by the published folds."""
    table = find(raw, "metadata/UrbanSound8K.csv")
    audio = table.parents[1].relative_to(raw) / "audio"
    for row in read_table(table):
        yield {
            "audio": str(audio / f"fold{row['fold']}" / row["slice_file_name"]),
            "text": f"the sound of {words(row['class'])}",
            "label": row["class"],
            "split": row["fold"],
            "freesound_id": row["fsID"],
        }


FSD50K = Recipe(
    name="fsd50k",
    title="FSD50K",
    domain="sound",
    task="tag",
    licence="by clip: CC0, CC BY, CC BY-NC, CC Sampling+",
    source="https://zenodo.org/records/4060432",
    rows=fsd50k,
    by_hand=(
        "The audio is published as multi-part zips, which only `zip -s 0 FSD50K.dev_audio.zip "
        "--out dev.zip` joins (and the same for eval). Fetch all files of the record, join, and "
        "unpack everything into the folder."
    ),
    clips=51_197,
    hours=108.3,
    checked=("clips", "hours"),
)
URBANSOUND8K = Recipe(
    name="urbansound8k",
    title="UrbanSound8K",
    domain="sound",
    task="caption",
    licence="CC BY-NC 3.0",
    source="https://zenodo.org/records/1203745",
    rows=urbansound8k,
    archives=(
        Archive(
            "https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz?download=1",
            "md5:9aa69802bbf37fb986f71ec1483a196e",
        ),
    ),
    clips=8_732,
    checked=("checksums", "clips", "licence"),
)
