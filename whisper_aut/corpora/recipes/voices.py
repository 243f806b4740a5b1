"""Voices by what they express or in which language: CREMA-D, RAVDESS, VocalSound, VoxLingua107. In: files whose names say it. Out: rows.

Sources: Cao et al. 2014, https://github.com/CheyneyComputerScience/CREMA-D; Livingstone & Russo 2018, https://zenodo.org/records/1188976;
Gong et al. 2022, https://github.com/YuanGongND/vocalsound; Valk & Alumäe 2021, https://bark.phon.ioc.ee/voxlingua107. CREMA-D and RAVDESS
publish no split: rows carry the `speaker`, by whom one should be made.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.languages import language_name, whisper_codes
from whisper_aut.corpora.recipes.recipe import (
    Archive,
    Recipe,
    audio_files,
    find,
    read_json,
    with_article,
)

CREMA_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "fearful",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
RAVDESS_SENTENCES = ("kids are talking by the door", "dogs are sitting by the door")
VOCALSOUNDS = {
    "laughter": "laughing",
    "sigh": "sighing",
    "cough": "coughing",
    "throatclearing": "clearing the throat",
    "sneeze": "sneezing",
    "sniff": "sniffing",
}


def crema_d(raw: Path) -> Iterator[dict[str, Any]]:
    for path in audio_files(find(raw, "AudioWAV")):
        parts = path.stem.split("_")
        if len(parts) == 4 and parts[2] in CREMA_EMOTIONS:
            emotion = CREMA_EMOTIONS[parts[2]]
            text = f"a person speaks in {with_article(emotion)} voice"
            yield {
                "audio": str(path.relative_to(raw)),
                "text": text,
                "label": emotion,
                "speaker": parts[0],
                "sentence": parts[1],
            }


def ravdess(raw: Path) -> Iterator[dict[str, Any]]:
    for path in audio_files(raw, (".wav",)):
        parts = path.stem.split("-")
        if len(parts) != 7 or parts[:2] != ["03", "01"]:  # sound alone, spoken
            continue
        emotion, actor = RAVDESS_EMOTIONS[int(parts[2]) - 1], int(parts[6])
        gender = "man" if actor % 2 else "woman"
        yield {
            "audio": str(path.relative_to(raw)),
            "text": f"a {gender} says “{RAVDESS_SENTENCES[int(parts[4]) - 1]}” in {with_article(emotion)} voice",
            "label": emotion,
            "speaker": parts[6],
        }


def vocalsound(raw: Path) -> Iterator[dict[str, Any]]:
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


def voxlingua(raw: Path) -> Iterator[dict[str, Any]]:
    for path in audio_files(raw):
        parts = path.relative_to(raw).parts
        if len(parts) < 2:
            continue
        code, is_dev = parts[-2], "dev" in parts[:-2]
        # VoxLingua107 writes Hebrew as `iw`; some of its languages Whisper has no code for.
        language = next(iter(whisper_codes(code)), code)
        yield {
            "audio": str(path.relative_to(raw)),
            "label": code,
            "language": language,
            "text": f"speech in {language_name(code)}",
            "split": "valid" if is_dev else "train",
            "id": f"{code}-{path.stem}",
        }


CREMA_D = Recipe(
    name="crema_d",
    title="CREMA-D",
    domain="speech",
    task="emotion",
    licence="Open Database License 1.0",
    source="https://github.com/CheyneyComputerScience/CREMA-D",
    rows=crema_d,
    by_hand="The audio is kept in Git LFS: git lfs clone https://github.com/CheyneyComputerScience/CREMA-D FOLDER",
    clips=7_442,
)
RAVDESS = Recipe(
    name="ravdess",
    title="RAVDESS, speech",
    domain="speech",
    task="emotion",
    licence="CC BY-NC-SA 4.0",
    source="https://zenodo.org/records/1188976",
    rows=ravdess,
    archives=(
        Archive(
            "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip?download=1",
            "md5:bc696df654c87fed845eb13823edef8a",
        ),
    ),
    clips=1_440,
    download_gb=0.2,
    checked=("clips", "download_gb", "licence"),
)
VOCALSOUND = Recipe(
    name="vocalsound",
    title="VocalSound",
    domain="sound",
    task="caption",
    licence="CC BY-SA 4.0",
    source="https://github.com/YuanGongND/vocalsound",
    rows=vocalsound,
    by_hand="The page links the 16 kHz release, one zip. Unpack it into the folder, so that audio_16k/ and datafiles/ lie in it.",
    clips=21_024,
    download_gb=1.7,
    checked=("clips", "download_gb"),
)
VOXLINGUA = Recipe(
    name="voxlingua",
    title="VoxLingua107",
    domain="speech",
    task="language",
    licence="collection CC BY 4.0; audio from YouTube",
    source="https://bark.phon.ioc.ee/voxlingua107",
    rows=voxlingua,
    by_hand=(
        "The page lists one zip per language and dev.zip. Unpack those that you want into the folder, each as a folder named by its "
        "language's code, and dev.zip as dev/."
    ),
    hours=6_628,
)
