"""The rows of public corpora, one function for each entry of `public.yaml` next to this file.

A function maps the folder of the unpacked corpus to the rows of a manifest. Rows whose audio is
missing are skipped and counted when shards are built.
"""

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.base import (
    Rows,
    audio_files,
    find,
    find_parts,
    read_csv,
    with_article,
    words,
)
from whisper_aut.data.annotation import language_name, parse_row, read_lines, whisper_codes
from whisper_aut.errors import UserError
from whisper_aut.utils import read_json

# Speech

RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
RAVDESS_SENTENCES = ("kids are talking by the door", "dogs are sitting by the door")
CREMA_EMOTIONS = {  # written as ANG, DIS, …
    emotion[:3].upper(): emotion
    for emotion in RAVDESS_EMOTIONS
    if emotion not in ("calm", "surprised")
}


def librispeech(raw: Path) -> Rows:
    """Split by subset; the upper-case transcripts become lower case."""
    for transcripts in sorted(find(raw, "LibriSpeech").glob("*/*/*/*.trans.txt")):
        for line in read_lines(transcripts):
            name, _, text = line.partition(" ")
            audio = transcripts.parent / f"{name}.flac"
            yield {
                "audio": str(audio.relative_to(raw)),
                "text": text.lower(),
                "split": audio.parents[2].name,
                "speaker": name.split("-")[0],
            }


def speech_commands(raw: Path) -> Rows:
    """Clips in neither published list are the training split."""
    testing = find(raw, "testing_list.txt")
    root = testing.parent
    splits = dict.fromkeys(read_lines(root / "validation_list.txt"), "valid")
    splits |= dict.fromkeys(read_lines(testing), "test")
    for path in audio_files(root):
        word = path.parent.name
        if not word.startswith("_") and path.parent != root:
            yield {
                "audio": str(path.relative_to(raw)),
                "text": word,
                "label": word,
                "split": splits.get(path.relative_to(root).as_posix(), "train"),
                "id": f"{word}-{path.stem}",
                "speaker": path.stem.partition("_nohash_")[0],
            }


def crema_d(raw: Path) -> Rows:
    for path in audio_files(find(raw, "AudioWAV")):
        parts = path.stem.split("_")
        if len(parts) == 4 and parts[2] in CREMA_EMOTIONS:
            emotion = CREMA_EMOTIONS[parts[2]]
            yield {
                "audio": str(path.relative_to(raw)),
                "text": f"a person speaks in {with_article(emotion)} voice",
                "label": emotion,
                "speaker": parts[0],
                "sentence": parts[1],
            }


def ravdess(raw: Path) -> Rows:
    for path in audio_files(raw, (".wav",)):
        parts = path.stem.split("-")
        if len(parts) != 7 or parts[:2] != ["03", "01"]:  # not audio-only speech
            continue
        emotion = RAVDESS_EMOTIONS[int(parts[2]) - 1]
        sentence = RAVDESS_SENTENCES[int(parts[4]) - 1]
        speaker = "man" if int(parts[6]) % 2 else "woman"
        yield {
            "audio": str(path.relative_to(raw)),
            "text": f"a {speaker} says “{sentence}” in {with_article(emotion)} voice",
            "label": emotion,
            "speaker": parts[6],
        }


def voxlingua(raw: Path) -> Rows:
    for path in audio_files(raw):
        parts = path.relative_to(raw).parts
        if len(parts) < 2:
            continue
        code = parts[-2]
        yield {
            "audio": str(path.relative_to(raw)),
            "label": code,
            # VoxLingua107 writes Hebrew as `iw`. Whisper has no code for some of its languages.
            "language": next(iter(whisper_codes(code)), code),
            "text": f"speech in {language_name(code)}",
            "split": "valid" if "dev" in parts[:-2] else "train",
            "id": f"{code}-{path.stem}",
        }


# Sounds

VOCALSOUNDS = {
    "laughter": "laughing",
    "sigh": "sighing",
    "cough": "coughing",
    "throatclearing": "clearing the throat",
    "sneeze": "sneezing",
    "sniff": "sniffing",
}


def esc50(raw: Path) -> Rows:
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


def urbansound8k(raw: Path) -> Rows:
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


def fsd50k(raw: Path) -> Rows:
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


def vocalsound(raw: Path) -> Rows:
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


# Music

FMA_SPLITS = {"training": "train", "validation": "valid", "test": "test"}


def nsynth(raw: Path) -> Rows:
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


def fma_small(raw: Path) -> Rows:
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


def gtzan_filtered(raw: Path) -> Rows:
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


# Captions. The text of a clip with several captions is a list.

WAVCAPS_TABLES = {
    "AudioSet_SL": "as_final.json",
    "BBC_Sound_Effects": "bbc_final.json",
    "FreeSound": "fsd_final.json",
    "SoundBible": "sb_final.json",
}
# Names in the exclusion lists, and the parts that they mean.
WAVCAPS_LISTS = {"AudioSet": "AudioSet_SL", "FreeSound": "FreeSound"}


def audiocaps(raw: Path) -> Rows:
    files = _by_stem(raw)
    tables = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
    for split, table in find_parts(raw, tables).items():
        clips = defaultdict(list)
        for row in read_csv(table):  # validation and test have five rows per clip
            clips[row["youtube_id"], row["start_time"]].append(row)
        for (video, start), rows in clips.items():
            yield {
                **_video_row(video, start, files, [row.get("audiocap_id", "") for row in rows]),
                "text": _captions(row["caption"] for row in rows),
                "split": split,
            }


def musiccaps(raw: Path) -> Rows:
    """Clips of AudioSet's evaluation set are the test split."""
    files = _by_stem(raw)
    for row in read_csv(find(raw, "musiccaps-public.csv")):
        yield {
            **_video_row(row["ytid"], row["start_s"], files),
            "text": row["caption"],
            "split": "test" if row["is_audioset_eval"].lower() == "true" else "train",
            "aspects": row["aspect_list"],
        }


def clotho(raw: Path) -> Rows:
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
                "text": _captions(row[f"caption_{number}"] for number in range(1, 6)),
                "split": split,
                "freesound_id": sound_id if sound_id.isdigit() else "",
                "licence": own.get("license", ""),
            }


def _decode(data: bytes) -> str:
    """Decode UTF-8, Windows-1252 or Latin-1; Clotho's metadata uses several."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")  # decodes any byte


def musicbench(raw: Path) -> Rows:
    """The training set and test set A."""
    tables = {"train": "MusicBench_train.json", "test": "MusicBench_test_A.json"}
    for split, table in find_parts(raw, tables).items():
        audio = find(raw, "datashare").relative_to(raw)
        for line in read_lines(table):
            row = parse_row(line)
            yield {
                "audio": str(audio / row["location"]),
                "text": _captions([row["main_caption"], row.get("alt_caption")]),
                "split": split,
            }


def wavcaps(raw: Path) -> Rows:
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
    """Return the row of a segment of a video, whose file may be named as by common downloaders.

    `files` are paths of the audio by stem. The `clip_ids` in its table may also name the file.
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


def _captions(texts: Iterable[str | None]) -> list[str]:
    return [text.strip() for text in texts if text and text.strip()]
