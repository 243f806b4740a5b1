"""Speech Commands v0.01 and v0.02: single words. In: `WORD/*.wav` and two lists. Out: rows, by the published lists of validation and test.

Source: Warden 2018, arXiv 1804.03209. What is on neither list is for training; `_background_noise_` is long and left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.recipe import Archive, Recipe, audio_files, find
from whisper_aut.corpora.tables import read_lines

URL = "http://download.tensorflow.org/data"


def rows(raw: Path) -> Iterator[dict[str, Any]]:
    testing = find(raw, "testing_list.txt")
    root = testing.parent
    split_of = dict.fromkeys(read_lines(root / "validation_list.txt"), "valid") | dict.fromkeys(
        read_lines(testing), "test"
    )
    for path in audio_files(root):
        name = path.relative_to(root).as_posix()
        word = path.parent.name
        if not word.startswith("_") and path.parent != root:
            yield {
                "audio": str(path.relative_to(raw)),
                "text": word,
                "label": word,
                "split": split_of.get(name, "train"),
                "id": f"{word}-{path.stem}",
                "speaker": path.stem.partition("_nohash_")[0],
            }


def _recipe(name: str, title: str, release: str, digest: str) -> Recipe:
    return Recipe(
        name=name,
        title=title,
        domain="speech",
        task="keyword",
        licence="CC BY 4.0",
        source="https://arxiv.org/abs/1804.03209",
        rows=rows,
        archives=(
            Archive(
                f"{URL}/speech_commands_{release}.tar.gz",
                f"sha256:{digest}",
                into=f"speech_commands_{release}",
            ),
        ),
        language="en",
        checked=("checksums",),
    )


V1 = _recipe(
    "speech_commands_v1",
    "Speech Commands v0.01, 30 words",
    "v0.01",
    "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
)
V2 = _recipe(
    "speech_commands_v2_35",
    "Speech Commands v0.02, 35 words",
    "v0.02",
    "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)
