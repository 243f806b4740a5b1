"""Captioned corpora with manual download: AudioCaps, MusicCaps, Clotho v2, MusicBench, WavCaps.

A clip with several captions has the first one as `text` and all of them as `caption_1`,
`caption_2`, …. Rows whose audio is missing are rejected and counted when shards are built.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.base import (
    Recipe,
    audio_files,
    find,
    find_parts,
    read_json,
    read_table,
)
from whisper_aut.data.annotation import read_lines
from whisper_aut.errors import UserError

WAVCAPS_PARTS = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
# Maps the names in the exclusion lists to parts.
WAVCAPS_LISTS = {
    "AudioSet": "AudioSet_SL",
    "FreeSound": "FreeSound",
}
YOUTUBE = (
    "The release names YouTube videos, whose audio a person has to fetch under YouTube's terms. "
    "Put {tables} into the folder, and the "
    "audio into audio/, each file named by its video's id, or by id and start (`ID_30.wav`, "
    "`ID_30000_40000.flac`)."
)


def audiocaps(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per clip of AudioCaps, whose tables may have several rows per clip."""
    files = _by_stem(raw)
    tables = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
    for split, table in find_parts(raw, tables).items():
        clips: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in read_table(table):  # validation and test have five rows per clip
            clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
        for (video, start), rows in clips.items():
            numbers = [row.get("audiocap_id", "") for row in rows]
            texts = [row["caption"] for row in rows]
            yield _video(video, start, files, numbers) | _captions(texts) | {"split": split}


def musiccaps(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of MusicCaps; clips of AudioSet's evaluation set are the test split."""
    files = _by_stem(raw)
    for row in read_table(find(raw, "musiccaps-public.csv")):
        split = "test" if row["is_audioset_eval"].lower() == "true" else "train"
        yield _video(row["ytid"], row["start_s"], files) | {
            "text": row["caption"],
            "split": split,
            "aspects": row["aspect_list"],
        }


def clotho(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of Clotho, with the licence of each clip."""
    names = {"train": "development", "valid": "validation", "test": "evaluation"}
    tables = {split: f"clotho_captions_{name}.csv" for split, name in names.items()}
    for split, table in find_parts(raw, tables).items():
        metadata = find(raw, f"clotho_metadata_{names[split]}.csv")
        facts = {row["file_name"]: row for row in read_table_of_any_encoding(metadata)}
        folder = find(raw, names[split])
        for row in read_table(table):
            own = facts.get(row["file_name"], {})
            yield {
                "audio": str((folder / row["file_name"]).relative_to(raw)),
                "split": split,
                "freesound_id": number
                if (number := own.get("sound_id", "")).isdigit()
                else "",  # the table says "Not found" for some clips
                "licence": own.get("license", ""),
            } | _captions([row[f"caption_{number}"] for number in range(1, 6)])


def musicbench(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of MusicBench's training set and its test set A."""
    tables = {"train": "MusicBench_train.json", "test": "MusicBench_test_A.json"}
    for split, table in find_parts(raw, tables).items():
        for line in read_lines(table):
            row = _object(line, table.name)
            yield {
                "audio": str(find(raw, "datashare").relative_to(raw) / row["location"]),
                "text": row["main_caption"],
                "split": split,
            }


def wavcaps(raw: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of WavCaps, without the clips in its exclusion lists.

    Raises:
        UserError: the exclusion lists are missing or name an unknown part.
    """
    files, banned = _by_part(raw), _wavcaps_exclusions(raw)
    tables = {part: f"{part}/{name}" for part, name in WAVCAPS_PARTS.items()}
    for part, table in find_parts(raw, tables).items():
        for row in read_json(table)["data"]:
            stem = str(row["id"]).removesuffix(".wav")
            if stem in banned[part]:
                continue
            site = {
                "FreeSound": {"freesound_id": stem},
                "AudioSet_SL": {"youtube_id": stem.removeprefix("Y")},
            }.get(part, {})
            yield {
                "audio": files[part].get(stem, f"{part}/{stem}.flac"),
                "text": row["caption"],
                "part": part,
                "id": f"{part}-{stem}",
            } | site


def _wavcaps_exclusions(raw: Path) -> dict[str, set[str]]:
    """Return the ids in the release's exclusion lists, by part.

    They are the clips that overlap with AudioCaps, ESC-50, UrbanSound8K and VGGSound.
    """
    banned: dict[str, set[str]] = {part: set() for part in WAVCAPS_PARTS}
    lists = sorted(raw.rglob("blacklist*.json"))
    for path in lists:
        for called, names in read_json(path).items():
            if called not in WAVCAPS_LISTS:
                raise UserError(
                    f"{path} excludes clips of {called!r}; known are {' and '.join(WAVCAPS_LISTS)}."
                )
            banned[WAVCAPS_LISTS[called]].update(str(name).removesuffix(".wav") for name in names)
    if not lists:
        raise UserError(
            f"{raw} holds none of the release's blacklist_*.json, without which clips of ESC-50, "
            "UrbanSound8K, AudioCaps and VGGSound would be trained on. They lie in "
            "json_files/blacklist of the release."
        )
    return banned


def read_table_of_any_encoding(path: Path) -> Iterator[dict[str, str]]:
    """Read a CSV file in UTF-8, Windows-1252 or Latin-1; Clotho's metadata uses several."""
    data = path.read_bytes()
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):  # Latin-1 decodes any byte
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    yield from csv.DictReader(io.StringIO(text, newline=""))


def _video(
    video: str, start: str, files: dict[str, str], numbers: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the row of a segment of a video, whose file may be named as common downloaders do.

    Args:
        video: the YouTube id.
        start: start of the segment in seconds.
        files: paths of the audio by stem.
        numbers: ids of the clip in its table, which may also name the file.
    """
    seconds = int(float(start))
    start = str(seconds)
    begins = (f"_{start}", f"_{seconds * 1000}", f"_{seconds}.000")  # `_by_stem` drops the end
    stems = [f"{prefix}{video}{begin}" for begin in (*begins, "") for prefix in ("", "Y")]
    stems += numbers
    found = next((files[stem] for stem in stems if stem in files), f"audio/{video}.wav")
    return {"audio": found, "youtube_id": video, "start_seconds": start, "id": f"{video}_{start}"}


def _captions(texts: list[str]) -> dict[str, Any]:
    texts = [text.strip() for text in texts if text and text.strip()]
    several = (
        {f"caption_{number}": text for number, text in enumerate(texts, 1)}
        if len(texts) > 1
        else {}
    )
    return {"text": texts[0] if texts else "", **several}


def _by_stem(raw: Path) -> dict[str, str]:
    """Return the audio files by stem. Files named `ID_START_END` are also found by `ID_START`."""
    found = {path.stem: str(path.relative_to(raw)) for path in audio_files(raw)}
    for stem, file in list(found.items()):
        if is_part := re.fullmatch(r"(.+_[\d.]+)_[\d.]+", stem):
            found.setdefault(is_part[1], file)
    return found


def _by_part(raw: Path) -> dict[str, dict[str, str]]:
    """Return the audio of each part of WavCaps by stem.

    Parts are kept apart because each numbers its clips from the beginning, so names collide. Audio
    in a folder named after a part (such as `FreeSound_flac`) belongs to that part; audio elsewhere
    may belong to any part.
    """
    found: dict[str, dict[str, str]] = {part: {} for part in WAVCAPS_PARTS}
    for path in audio_files(raw):
        place = path.relative_to(raw)
        owners = [
            part
            for part in WAVCAPS_PARTS
            if any(piece.startswith(part) for piece in place.parts[:-1])
        ]
        for part in owners or WAVCAPS_PARTS:
            if owners or path.stem not in found[part]:
                found[part][path.stem] = str(place)
    return found


def _object(line: str, name: str) -> dict[str, Any]:
    import json

    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{name} is not JSON lines: {error}.") from None


AUDIOCAPS = Recipe(
    name="audiocaps",
    title="AudioCaps",
    domain="sound",
    task="caption",
    licence="captions MIT; audio under YouTube's terms",
    source="https://github.com/cdjkim/audiocaps",
    rows=audiocaps,
    by_hand=YOUTUBE.format(tables="train.csv, val.csv and test.csv"),
)
MUSICCAPS = Recipe(
    name="musiccaps",
    title="MusicCaps",
    domain="music",
    task="caption",
    licence="captions CC BY-SA 4.0; audio under YouTube's terms",
    source="https://huggingface.co/datasets/google/MusicCaps",
    rows=musiccaps,
    by_hand=YOUTUBE.format(tables="musiccaps-public.csv"),
    clips=5_521,
)
CLOTHO = Recipe(
    name="clotho",
    title="Clotho v2",
    domain="sound",
    task="caption",
    licence="captions under the Tampere University licence; audio by clip",
    source="https://zenodo.org/records/4783391",
    rows=clotho,
    by_hand=(
        "The audio is published as 7z archives. Unpack them with 7z into the folder, as "
        "development/, validation/ and evaluation/, and put the clotho_captions_*.csv and "
        "clotho_metadata_*.csv beside them."
    ),
)
MUSICBENCH = Recipe(
    name="musicbench",
    title="MusicBench",
    domain="music",
    task="caption",
    licence="collection CC BY-SA 3.0; audio from YouTube by MusicCaps",
    source="https://huggingface.co/datasets/amaai-lab/MusicBench",
    rows=musicbench,
    by_hand=(
        "Fetch the release with the hub's own client (hf download --repo-type dataset "
        "amaai-lab/MusicBench --local-dir FOLDER) and unpack its archive there, so that datashare/ "
        "lies beside the .json files."
    ),
    clips=53_168,
    checked=("licence", "clips"),
)
WAVCAPS = Recipe(
    name="wavcaps",
    title="WavCaps, without the clips of its exclusion lists",
    domain="sound",
    task="caption",
    licence="academic use only",
    source="https://huggingface.co/datasets/cvssp/WavCaps",
    rows=wavcaps,
    by_hand=(
        "The audio is published as multi-part zips, which only `zip -FF PART.zip --out WHOLE.zip` "
        "joins. Fetch the release with the hub's own client (hf download --repo-type dataset "
        "cvssp/WavCaps --local-dir FOLDER), join and unpack the archives there."
    ),
    clips=403_050,
)
