"""Captioned corpora: AudioCaps, MusicCaps, Clotho v2, MusicBench and WavCaps.

A clip with several captions has the first one as `text` and all of them as `caption_1`,
`caption_2`, …. Rows whose audio is missing are skipped and counted when shards are built.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.base import Recipe, Rows, audio_files, find, find_parts, read_csv
from whisper_aut.data.annotation import parse_json, read_lines
from whisper_aut.errors import UserError
from whisper_aut.utils import read_json

WAVCAPS_TABLES = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
# Names in the exclusion lists, and the parts that they mean.
WAVCAPS_LISTS = {"AudioSet": "AudioSet_SL", "FreeSound": "FreeSound"}
YOUTUBE_STEPS = (
    "The release names YouTube videos, whose audio you have to download under YouTube's terms. "
    "Put {tables} into the folder, and the audio into audio/, each file named by its video's id, "
    "or by id and start (`ID_30.wav`, `ID_30000_40000.flac`)."
)


def _audiocaps(raw: Path) -> Rows:
    files = _by_stem(raw)
    tables = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
    for split, table in find_parts(raw, tables).items():
        clips = defaultdict(list)
        for row in read_csv(table):  # validation and test have five rows per clip
            clips[row["youtube_id"], row["start_time"]].append(row)
        for (video, start), rows in clips.items():
            yield {
                **_video_row(video, start, files, [row.get("audiocap_id", "") for row in rows]),
                **_captions(row["caption"] for row in rows),
                "split": split,
            }


def _musiccaps(raw: Path) -> Rows:
    """Clips of AudioSet's evaluation set are the test split."""
    files = _by_stem(raw)
    for row in read_csv(find(raw, "musiccaps-public.csv")):
        yield {
            **_video_row(row["ytid"], row["start_s"], files),
            "text": row["caption"],
            "split": "test" if row["is_audioset_eval"].lower() == "true" else "train",
            "aspects": row["aspect_list"],
        }


def _clotho(raw: Path) -> Rows:
    names = {"train": "development", "valid": "validation", "test": "evaluation"}
    tables = {split: f"clotho_captions_{name}.csv" for split, name in names.items()}
    for split, table in find_parts(raw, tables).items():
        path = find(raw, f"clotho_metadata_{names[split]}.csv")
        reader = csv.DictReader(io.StringIO(_decode(path.read_bytes()), newline=""))
        metadata = {row["file_name"]: row for row in reader}
        folder = find(raw, names[split]).relative_to(raw)
        for row in read_csv(table):
            own = metadata.get(row["file_name"], {})
            sound_id = own.get("sound_id", "")  # "Not found" for some clips
            yield {
                "audio": str(folder / row["file_name"]),
                "split": split,
                "freesound_id": sound_id if sound_id.isdigit() else "",
                "licence": own.get("license", ""),
                **_captions(row[f"caption_{number}"] for number in range(1, 6)),
            }


def _decode(data: bytes) -> str:
    """Decode UTF-8, Windows-1252 or Latin-1; Clotho's metadata uses several."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")  # decodes any byte


def musicbench_rows(raw: Path) -> Rows:
    """Yield the rows of MusicBench's training set and its test set A."""
    tables = {"train": "MusicBench_train.json", "test": "MusicBench_test_A.json"}
    for split, table in find_parts(raw, tables).items():
        audio = find(raw, "datashare").relative_to(raw)
        for line in read_lines(table):
            row = parse_json(line)
            yield {
                "audio": str(audio / row["location"]),
                "text": row["main_caption"],
                "split": split,
            }


def _wavcaps(raw: Path) -> Rows:
    """Leave out the clips in the release's exclusion lists.

    Raises:
        UserError: the exclusion lists are missing or name an unknown part.
    """
    files, excluded = _by_part(raw), _read_exclusions(raw)
    tables = {part: f"{part}/{name}" for part, name in WAVCAPS_TABLES.items()}
    for part, table in find_parts(raw, tables).items():
        for clip in read_json(table)["data"]:
            stem = str(clip["id"]).removesuffix(".wav")
            if stem in excluded[part]:
                continue
            row = {
                "audio": files[part].get(stem, f"{part}/{stem}.flac"),
                "text": clip["caption"],
                "part": part,
                "id": f"{part}-{stem}",
            }
            if part == "FreeSound":
                row["freesound_id"] = stem
            elif part == "AudioSet_SL":
                row["youtube_id"] = stem.removeprefix("Y")
            yield row


def _read_exclusions(raw: Path) -> dict[str, set[str]]:
    """Return the ids in the release's exclusion lists, by part.

    They are the clips that overlap with AudioCaps, ESC-50, UrbanSound8K and VGGSound.
    """
    excluded: dict[str, set[str]] = {part: set() for part in WAVCAPS_TABLES}
    lists = sorted(raw.rglob("blacklist*.json"))
    if not lists:
        raise UserError(
            f"{raw} has none of the release's blacklist_*.json. Without them, clips of ESC-50, "
            "UrbanSound8K, AudioCaps and VGGSound would be trained on. They are in "
            "json_files/blacklist of the release."
        )
    for path in lists:
        for name, ids in read_json(path).items():
            if name not in WAVCAPS_LISTS:
                known = " and ".join(WAVCAPS_LISTS)
                raise UserError(f"{path} excludes clips of {name!r}; known are {known}.")
            excluded[WAVCAPS_LISTS[name]].update(str(key).removesuffix(".wav") for key in ids)
    return excluded


def _by_part(raw: Path) -> dict[str, dict[str, str]]:
    """Return the audio of each part of WavCaps by stem.

    Parts are kept apart because each numbers its clips from the beginning, so names collide. Audio
    in a folder named after a part (such as `FreeSound_flac`) belongs to that part; audio elsewhere
    may belong to any part.
    """
    found: dict[str, dict[str, str]] = {part: {} for part in WAVCAPS_TABLES}
    for path in audio_files(raw):
        relative = path.relative_to(raw)
        folders = relative.parts[:-1]
        owners = [part for part in found if any(name.startswith(part) for name in folders)]
        for part in owners or found:
            if owners or path.stem not in found[part]:
                found[part][path.stem] = str(relative)
    return found


def _by_stem(raw: Path) -> dict[str, str]:
    """Return the audio files by stem. Files named `ID_START_END` are also found by `ID_START`."""
    found = {path.stem: str(path.relative_to(raw)) for path in audio_files(raw)}
    for stem, file in list(found.items()):
        if match := re.fullmatch(r"(.+_[\d.]+)_[\d.]+", stem):
            found.setdefault(match[1], file)
    return found


def _video_row(
    video: str, start: str, files: dict[str, str], clip_ids: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the row of a segment of a video, whose file may be named as common downloaders do.

    Args:
        video: the YouTube id.
        start: start of the segment in seconds.
        files: paths of the audio by stem.
        clip_ids: ids of the clip in its table, which may also name the file.
    """
    seconds = int(float(start))
    starts = (f"_{seconds}", f"_{seconds * 1000}", f"_{seconds}.000", "")
    stems = [f"{prefix}{video}{start}" for start in starts for prefix in ("", "Y")]
    found = [files[stem] for stem in (*stems, *clip_ids) if stem in files]
    return {
        "audio": found[0] if found else f"audio/{video}.wav",
        "youtube_id": video,
        "start_seconds": str(seconds),
        "id": f"{video}_{seconds}",
    }


def _captions(texts: Iterable[str]) -> dict[str, str]:
    texts = [text.strip() for text in texts if text and text.strip()]
    row = {"text": texts[0] if texts else ""}
    if len(texts) > 1:
        row |= {f"caption_{number}": text for number, text in enumerate(texts, 1)}
    return row


RECIPES = (
    Recipe(
        name="audiocaps",
        title="AudioCaps",
        domain="sound",
        task="caption",
        licence="captions MIT; audio under YouTube's terms",
        source="https://github.com/cdjkim/audiocaps",
        rows=_audiocaps,
        manual_steps=YOUTUBE_STEPS.format(tables="train.csv, val.csv and test.csv"),
    ),
    Recipe(
        name="musiccaps",
        title="MusicCaps",
        domain="music",
        task="caption",
        licence="captions CC BY-SA 4.0; audio under YouTube's terms",
        source="https://huggingface.co/datasets/google/MusicCaps",
        rows=_musiccaps,
        manual_steps=YOUTUBE_STEPS.format(tables="musiccaps-public.csv"),
        clips=5_521,
    ),
    Recipe(
        name="clotho",
        title="Clotho v2",
        domain="sound",
        task="caption",
        licence="captions under the Tampere University licence; audio by clip",
        source="https://zenodo.org/records/4783391",
        rows=_clotho,
        manual_steps=(
            "The audio is published as 7z archives. Unpack them with 7z into the folder, as "
            "development/, validation/ and evaluation/, and put clotho_captions_*.csv and "
            "clotho_metadata_*.csv next to them."
        ),
    ),
    Recipe(
        name="musicbench",
        title="MusicBench",
        domain="music",
        task="caption",
        licence="collection CC BY-SA 3.0; audio from YouTube by MusicCaps",
        source="https://huggingface.co/datasets/amaai-lab/MusicBench",
        rows=musicbench_rows,
        manual_steps=(
            "Download the release with the hub's own client (hf download --repo-type dataset "
            "amaai-lab/MusicBench --local-dir FOLDER) and unpack its archive there, so that "
            "datashare/ is next to the .json files."
        ),
        clips=53_168,
        checked=("licence", "clips"),
    ),
    Recipe(
        name="wavcaps",
        title="WavCaps, without the clips of its exclusion lists",
        domain="sound",
        task="caption",
        licence="academic use only",
        source="https://huggingface.co/datasets/cvssp/WavCaps",
        rows=_wavcaps,
        manual_steps=(
            "The audio is published as multi-part zips, which only `zip -FF PART.zip --out "
            "WHOLE.zip` joins. Download the release with the hub's own client (hf download "
            "--repo-type dataset cvssp/WavCaps --local-dir FOLDER), join and unpack the archives "
            "there."
        ),
        clips=403_050,
    ),
)
