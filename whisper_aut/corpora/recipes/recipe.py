"""What a recipe is: where a public corpus lies, on what terms, and how its files become rows of a manifest.

In: facts that were looked up, written down in the modules beside this one. Out: `Recipe`. Next: `corpora.download` fetches the archives,
`corpora.recipes.build` turns the rows into shards. `checked` names the facts that were compared with the publisher's own page or with
a release of torchaudio; the others are as papers tell them, and nobody has compared them.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisper_aut.errors import UserError

Rows = Callable[[Path], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Archive:
    """One file to fetch: `checksum` is `sha256:…`, `sha1:…` or `md5:…`, or empty where none was found to compare with."""

    url: str
    checksum: str = ""
    into: str = ""  # folder, for archives that bring none of their own

    @property
    def name(self) -> str:
        return self.url.partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Recipe:
    """A public corpus.

    Attributes:
        name, title: for commands; for tables.
        domain, task: of all clips, where the rows do not say otherwise.
        licence: as the publisher states it for all clips; where it differs by clip, words that name no licence.
        source: the publisher's page.
        rows: unpacked folder → rows with `audio` (relative to it), `text` or `label`, and where there are any `split`,
            `freesound_id` or `youtube_id`. Where licences differ by clip every row has a `licence`, empty where the tables name none.
        archives: what is fetched.
        by_hand: what a person must do, where the terms or the form of the release want it.
        clips, hours, download_gb: of the whole; None where not known.
        language: of the speech.
        max_seconds: the longest clip that is kept; training leaves out what is longer than `data.max_seconds`.
        checked: which of these facts were compared with their source.
    """

    name: str
    title: str
    domain: str
    task: str
    licence: str
    source: str
    rows: Rows
    archives: tuple[Archive, ...] = ()
    by_hand: str = ""
    clips: int | None = None
    hours: float | None = None
    download_gb: float | None = None
    language: str = ""
    max_seconds: float = 30.0
    checked: tuple[str, ...] = ()


class NotThere(UserError):
    """A part of a corpus is not in its folder; `recipes.build` adds how to get it."""


def find(root: Path, pattern: str) -> Path:
    """Return the one path under `root` that fits, at whatever depth the archive put it.

    Raises:
        NotThere: none fits.
    """
    found = sorted(root.glob(pattern)) or sorted(root.glob(f"**/{pattern}"))
    if not found:
        raise NotThere(f"{root} holds no {pattern}.")
    return found[0]


def find_parts(root: Path, patterns: Mapping[str, str]) -> dict[str, Path]:
    """Return the parts of a corpus that are there, by split; a corpus may be fetched in part.

    Raises:
        NotThere: there is none.
    """
    found: dict[str, Path] = {}
    for split, pattern in patterns.items():
        with suppress(NotThere):
            found[split] = find(root, pattern)
    if not found:
        raise NotThere(f"{root} holds none of {', '.join(patterns.values())}.")
    return found


def audio_files(
    folder: Path, suffixes: tuple[str, ...] = (".wav", ".flac", ".ogg", ".mp3", ".opus")
) -> list[Path]:
    """Return the audio files under a folder, sorted; hidden ones, also by the folder they lie in, are not looked at."""
    found = (
        path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )
    return sorted(
        path
        for path in found
        if not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    )


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV with a header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


def with_article(noun: str) -> str:
    """Write `organ` as `an organ`, by its first letter."""
    return f"{'an' if noun.startswith(tuple('aeiou')) else 'a'} {noun}"


def words(name: str) -> str:
    """Write a class name as words: `crackling_fire` → `crackling fire`."""
    return " ".join(name.replace("_", " ").split())
