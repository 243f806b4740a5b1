"""A recipe for your own folder: class names as subfolders, or a table next to the audio.

`dog/1.wav` has the class `dog`. If all top folders are named like splits, `train/dog/1.wav` and
`fold1/dog/1.wav` also have a split. If the folder contains a single CSV, TSV or JSONL table, the
rows come from that, with the usual column names for audio, class and split. Files in formats that
libsndfile does not read also become rows; they are rejected and counted when shards are built.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.manifest import AUDIO_COLUMNS
from whisper_aut.corpora.recipes.base import Recipe, audio_files
from whisper_aut.corpora.tables import TABLE_SUFFIXES, read_columns, read_rows
from whisper_aut.errors import UserError

SPLIT_NAMES = (
    "train",
    "training",
    "valid",
    "validation",
    "val",
    "dev",
    "test",
    "testing",
    "eval",
    "evaluation",
)
READABLE = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".mp3",
    ".opus",
    ".aif",
    ".aiff",
    ".aifc",
    ".au",
    ".caf",
    ".w64",
    ".rf64",
)
UNREADABLE = (".m4a", ".aac", ".wma", ".mp4", ".webm", ".amr")  # libsndfile does not support these
LABEL_COLUMNS = (
    "label",
    "category",
    "class",
    "class_name",
    "genre",
    "style",
    "family",
    "instrument",
    "emotion",
    "word",
)
SPLIT_COLUMNS = ("split", "fold", "subset")


def rows(root: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifest rows of a folder.

    Raises:
        UserError: there is no folder, no audio or no class, or there are several tables.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    tables = sorted(
        path for path in root.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()
    )
    if len(tables) > 1:
        raise UserError(
            f"{root} holds {len(tables)} tables: {', '.join(path.name for path in tables)}. Build "
            f"from the one that you mean: whisper-aut data build {tables[0]} --out OUT"
        )
    yield from _from_table(root, tables[0]) if tables else _from_classes(root)


def _from_table(root: Path, table: Path) -> Iterator[dict[str, Any]]:
    columns = read_columns(table)
    audio = next((name for name in AUDIO_COLUMNS if name in columns), "")
    if not audio:
        raise UserError(
            f"{table} has no column of audio files (looked for {', '.join(AUDIO_COLUMNS)}). It has "
            f"{', '.join(columns)}."
        )
    label = next((name for name in LABEL_COLUMNS if name in columns), "")
    split = next((name for name in SPLIT_COLUMNS if name in columns), "")
    for number, row in read_rows(table):
        if isinstance(row, str):  # a row without audio is rejected and counted
            yield {"audio": "", "unreadable": f"line {number} of {table.name}: {row}"}
            continue
        path = Path(str(row[audio]))
        inside = (
            path
            if (root / path).exists() or not (root / "audio" / path).exists()
            else Path("audio") / path
        )
        own = {key: value for key, value in row.items() if key and key != audio}
        own |= {"audio": str(inside)}
        own |= {"label": row[label]} if label and row[label] else {}
        own |= {"split": str(row[split])} if split else {}
        yield own


def _from_classes(root: Path) -> Iterator[dict[str, Any]]:
    files = [path.relative_to(root) for path in audio_files(root, READABLE + UNREADABLE)]
    if not files:
        raise UserError(
            f"{root} holds no audio ({' '.join(READABLE)}), neither in folders of classes nor "
            "beside a table."
        )
    tops = sorted({path.parts[0] for path in files})
    deep = any(len(path.parts) > 2 for path in files)
    # Numbers only name splits if there is a class below them: in 7/1.wav, 7 may be a digit class.
    has_splits = all(_names_a_split(top) or (deep and top.isdecimal()) for top in tops)
    odd = next((path for path in files if len(path.parts) != (3 if has_splits else 2)), None)
    if odd:
        raise UserError(
            f"{root / odd} lies in no folder of a class. Expected {root}/CLASS/FILE or "
            f"{root}/SPLIT/CLASS/FILE, where all splits are named like train, valid, test or "
            f"fold1, or a table in {root}. It holds: {', '.join(tops[:10])}"
        )
    for path in files:
        split = {"split": path.parts[0]} if has_splits else {}
        yield {
            "audio": str(path),
            "label": path.parent.name,
            "id": "-".join(path.with_suffix("").parts),
        } | split


def _names_a_split(folder: str) -> bool:
    name = folder.lower()
    return name in SPLIT_NAMES or (
        name.startswith("fold") and name.removeprefix("fold").strip("_-").isdecimal()
    )


RECIPE = Recipe(
    name="folder",
    title="A folder of your own",
    domain="",
    task="",
    licence="",
    source="",
    rows=rows,
    by_hand="It is yours: whisper-aut data build folder PATH --out OUT",
)
