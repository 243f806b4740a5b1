"""LibriSpeech: read English books. In: `LibriSpeech/SUBSET/SPEAKER/CHAPTER/*.flac`, a transcript per chapter. Out: rows, split by subset.

Source: Panayotov et al. 2015, https://www.openslr.org/12. Transcripts are upper case; they become lower case.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whisper_aut.corpora.recipes.recipe import Archive, Recipe, find
from whisper_aut.corpora.tables import read_lines

URL = "https://www.openslr.org/resources/12"
SHA256 = {
    "dev-clean": "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
    "dev-other": "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
    "test-clean": "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
    "test-other": "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
    "train-clean-100": "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
    "train-clean-360": "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
    "train-other-500": "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
}


def rows(raw: Path) -> Iterator[dict[str, Any]]:
    for transcripts in sorted(find(raw, "LibriSpeech").glob("*/*/*/*.trans.txt")):
        for line in read_lines(transcripts):
            name, _, text = line.partition(" ")
            audio = transcripts.parent / f"{name}.flac"
            split = audio.parents[2].name
            yield {
                "audio": str(audio.relative_to(raw)),
                "text": text.lower(),
                "split": split,
                "speaker": name.split("-")[0],
            }


RECIPE = Recipe(
    name="librispeech",
    title="LibriSpeech",
    domain="speech",
    task="asr",
    licence="CC BY 4.0",
    source="https://www.openslr.org/12",
    rows=rows,
    archives=tuple(
        Archive(f"{URL}/{name}.tar.gz", f"sha256:{digest}") for name, digest in SHA256.items()
    ),
    hours=982,
    language="en",
    max_seconds=36.0,
    checked=("checksums",),
)
