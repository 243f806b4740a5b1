"""Speech: LibriSpeech, Speech Commands, CREMA-D, RAVDESS and VoxLingua107."""

from pathlib import Path

from whisper_aut.corpora.recipes.base import Archive, Recipe, Rows, audio_files, find, with_article
from whisper_aut.data.annotation import language_name, read_lines, whisper_codes

LIBRISPEECH_SHA256 = {
    "dev-clean": "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
    "dev-other": "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
    "test-clean": "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
    "test-other": "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
    "train-clean-100": "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
    "train-clean-360": "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
    "train-other-500": "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
}
RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgusted", "surprised")
CREMA_EMOTIONS = {  # written as ANG, DIS, …
    emotion[:3].upper(): emotion
    for emotion in RAVDESS_EMOTIONS
    if emotion not in ("calm", "surprised")
}
RAVDESS_SENTENCES = ("kids are talking by the door", "dogs are sitting by the door")


def _librispeech(raw: Path) -> Rows:
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


def _speech_commands(raw: Path) -> Rows:
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


def _crema_d(raw: Path) -> Rows:
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


def _ravdess(raw: Path) -> Rows:
    for path in audio_files(raw, (".wav",)):
        parts = path.stem.split("-")
        if len(parts) != 7 or parts[:2] != ["03", "01"]:  # not audio-only speech
            continue
        emotion, sentence = (
            RAVDESS_EMOTIONS[int(parts[2]) - 1],
            RAVDESS_SENTENCES[int(parts[4]) - 1],
        )
        speaker = "man" if int(parts[6]) % 2 else "woman"
        yield {
            "audio": str(path.relative_to(raw)),
            "text": f"a {speaker} says “{sentence}” in {with_article(emotion)} voice",
            "label": emotion,
            "speaker": parts[6],
        }


def _voxlingua(raw: Path) -> Rows:
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


def _speech_commands_recipe(name: str, title: str, release: str, sha256: str) -> Recipe:
    url = f"http://download.tensorflow.org/data/speech_commands_{release}.tar.gz"
    return Recipe(
        name=name,
        title=title,
        domain="speech",
        task="keyword",
        licence="CC BY 4.0",
        source="https://arxiv.org/abs/1804.03209",
        rows=_speech_commands,
        archives=(Archive(url, f"sha256:{sha256}", into=f"speech_commands_{release}"),),
        language="en",
        checked=("checksums",),
    )


RECIPES = (
    Recipe(
        name="librispeech",
        title="LibriSpeech",
        domain="speech",
        task="asr",
        licence="CC BY 4.0",
        source="https://www.openslr.org/12",
        rows=_librispeech,
        archives=tuple(
            Archive(f"https://www.openslr.org/resources/12/{name}.tar.gz", f"sha256:{digest}")
            for name, digest in LIBRISPEECH_SHA256.items()
        ),
        hours=982,
        language="en",
        max_seconds=36.0,
        checked=("checksums",),
    ),
    _speech_commands_recipe(
        "speech_commands_v1",
        "Speech Commands v0.01, 30 words",
        "v0.01",
        "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
    ),
    _speech_commands_recipe(
        "speech_commands_v2_35",
        "Speech Commands v0.02, 35 words",
        "v0.02",
        "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
    ),
    Recipe(
        name="crema_d",
        title="CREMA-D",
        domain="speech",
        task="emotion",
        licence="Open Database License 1.0",
        source="https://github.com/CheyneyComputerScience/CREMA-D",
        rows=_crema_d,
        manual_steps=(
            "The audio is kept in Git LFS: git lfs clone "
            "https://github.com/CheyneyComputerScience/CREMA-D FOLDER"
        ),
        clips=7_442,
    ),
    Recipe(
        name="ravdess",
        title="RAVDESS, speech",
        domain="speech",
        task="emotion",
        licence="CC BY-NC-SA 4.0",
        source="https://zenodo.org/records/1188976",
        rows=_ravdess,
        archives=(
            Archive(
                "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip?download=1",
                "md5:bc696df654c87fed845eb13823edef8a",
            ),
        ),
        clips=1_440,
        checked=("clips", "licence"),
    ),
    Recipe(
        name="voxlingua",
        title="VoxLingua107",
        domain="speech",
        task="language",
        licence="collection CC BY 4.0; audio from YouTube",
        source="https://bark.phon.ioc.ee/voxlingua107",
        rows=_voxlingua,
        manual_steps=(
            "The page lists one zip per language and dev.zip. Unpack those that you want into the "
            "folder, each as a folder named by its language's code, and dev.zip as dev/."
        ),
        hours=6_628,
    ),
)
