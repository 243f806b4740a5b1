"""GTZAN: genres of music. In: `genres/GENRE/GENRE.00000.wav`. Out: rows of the fault-filtered split, 443 / 197 / 290 clips.

Source: Tzanetakis & Cook 2002; faults: Sturm 2013; split: Kereliuk et al. 2015. The lists are those that torchaudio carries. What is on
none of them (repeated excerpts, artists on two sides) is left out; `jazz.00054`, which is corrupt in the usual copies, is on the list
of training clips and refused when it cannot be decoded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.recipe import Archive, Recipe, find


def rows(raw: Path) -> Iterator[dict[str, Any]]:
    from torchaudio.datasets import gtzan  # imports torch, which nothing else here needs

    root = find(raw, "blues").parent
    lists = {
        "train": gtzan.filtered_train,
        "valid": gtzan.filtered_valid,
        "test": gtzan.filtered_test,
    }
    for split, names in lists.items():
        for name in names:
            genre = name.partition(".")[0]
            audio = root.relative_to(raw) / genre / f"{name}.wav"
            yield {
                "audio": str(audio),
                "text": f"a piece of {genre} music",
                "label": genre,
                "split": split,
                "id": name,
            }


RECIPE = Recipe(
    name="gtzan_filtered",
    title="GTZAN, fault-filtered",
    domain="music",
    task="caption",
    licence="none stated",
    source="https://www.tensorflow.org/datasets/catalog/gtzan",
    rows=rows,
    archives=(
        Archive(
            "http://opihi.cs.uvic.ca/sound/genres.tar.gz",
            "sha256:24347e0223d2ba798e0a558c4c172d9d4a19c00bb7963fe055d183dadb4ef2c6",
        ),
    ),
    by_hand=(
        "The publisher's server has been unreachable for years. A copy that you have, or find, goes in by --mirror URL, or unpacked "
        "into the folder; the checksum tells whether it is the same archive."
    ),
    clips=930,
    hours=7.8,
    max_seconds=31.0,
    checked=("checksums", "split"),
)
