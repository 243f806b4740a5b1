"""A recipe for your own folder: class names as subfolders, or a table next to the audio.

`dog/1.wav` has the class `dog`. If all top folders are named like splits, `train/dog/1.wav` and
`fold1/dog/1.wav` also have a split. If the folder contains a single CSV, TSV or JSONL table, the
rows come from that, with the usual column names for audio, class and split.
"""

import re
from pathlib import Path

from whisper_aut.corpora.manifest import AUDIO_COLUMNS, TABLE_SUFFIXES, read_columns, read_rows
from whisper_aut.corpora.recipes.base import AUDIO_FILES, Rows, audio_files
from whisper_aut.data.annotation import plain
from whisper_aut.errors import UserError

SPLIT_NAME = re.compile(
    r"train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?|fold[_-]*\d+", re.I
)
READABLE = (*AUDIO_FILES, ".oga", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64")
UNREADABLE = (".wma", ".amr")  # they become rows that are skipped and counted
LABEL_COLUMNS = (
    *("label", "category", "class", "class_name", "genre"),
    *("style", "family", "instrument", "emotion", "word"),
)
SPLIT_COLUMNS = ("split", "fold", "subset")


def folder(root: Path) -> Rows:
    """Yield the manifest rows of a folder.

    Raises:
        UserError: there is no audio or no class, or there are several tables.
    """
    files = (path for path in root.iterdir() if path.is_file())
    tables = sorted(path for path in files if path.suffix.lower() in TABLE_SUFFIXES)
    if len(tables) > 1:
        raise UserError(
            f"{root} has {len(tables)} tables: {', '.join(path.name for path in tables)}. Build "
            f"from one of them: whisper-aut data build {tables[0]} --out OUT"
        )
    return _from_table(root, tables[0]) if tables else _from_classes(root)


def _from_table(root: Path, table: Path) -> Rows:
    columns = read_columns(table)
    audio, label, split = (
        next((name for name in names if name in columns), "")
        for names in (AUDIO_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
    )
    if not audio:
        raise UserError(
            f"{table} has no column of audio files (looked for {', '.join(AUDIO_COLUMNS)}). Its "
            f"columns: {', '.join(columns)}."
        )
    for number, row in read_rows(table):
        if isinstance(row, str):  # a row without audio is skipped and counted
            yield {"audio": "", "unreadable": f"line {number} of {table.name}: {row}"}
            continue
        path = plain(row.pop(audio, None))
        if not (root / path).exists() and (root / "audio" / path).exists():
            path = f"audio/{path}"
        row["audio"] = path
        if label:
            row["label"] = row.get(label)
        if split:
            row["split"] = plain(row.get(split)).strip()
        yield row


def _from_classes(root: Path) -> Rows:
    files = [path.relative_to(root) for path in audio_files(root, READABLE + UNREADABLE)]
    if not files:
        raise UserError(f"{root} has no audio files ({' '.join(READABLE)}) and no table.")
    top_folders = sorted({path.parts[0] for path in files})
    is_deep = any(len(path.parts) > 2 for path in files)
    # Numbers only name splits if there is a class below them: in 7/1.wav, 7 may be a digit class.
    has_splits = all(
        SPLIT_NAME.fullmatch(name) or (is_deep and name.isdecimal()) for name in top_folders
    )
    for path in files:
        if len(path.parts) != (3 if has_splits else 2):
            raise UserError(
                f"{root / path} is not in the folder of a class. Expected {root}/CLASS/FILE or "
                f"{root}/SPLIT/CLASS/FILE, where all splits are named like train, valid, test or "
                f"fold1, or a table in {root}. It contains: {', '.join(top_folders[:10])}"
            )
        name = "-".join(path.with_suffix("").parts)
        row = {"audio": str(path), "label": path.parent.name, "id": name}
        yield {**row, "split": path.parts[0]} if has_splits else row
