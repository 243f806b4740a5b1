"""What a recipe is: where a public corpus lies, on what terms, and how its files become rows of a manifest.

In: facts that were looked up, written down in the modules beside this one. Out: `Recipe`. Next: `corpora.download` fetches the archives,
`corpora.recipes.build` turns the rows into shards. `checked` names the facts that were compared with the publisher's own page or with
a release of torchaudio; the others are as papers tell them, and nobody has compared them.
"""

import csv
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.corpora.build import BuildReport, build_shards
from whisper_aut.corpora.download import download, unpack
from whisper_aut.corpora.manifest import ManifestSpec
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


MANIFEST_NAME = "manifest.jsonl"


def get(
    recipe: Recipe, folder: Path, *, mirror: str = "", only: str = "", progress: bool = True
) -> Path:
    """Fetch and unpack a corpus into `folder`; what is there already is not fetched again.

    Args:
        mirror: a URL or folder of the web under which the same files lie, in place of the publisher's.
        only: archives whose name holds this.

    Raises:
        UserError: a person has to fetch it, a download failed, or an archive is damaged.
    """
    if not recipe.archives or (recipe.by_hand and not mirror):
        raise UserError(
            f"{recipe.title} has to be fetched by a person. {recipe.by_hand}\n"
            f"  page: {recipe.source or '-'}\n  licence: {recipe.licence or '-'}\n  folder: {folder}\n"
            f"Then: whisper-aut data build {recipe.name} {folder}"
        )
    chosen = [archive for archive in recipe.archives if only in archive.name]
    if not chosen:
        raise UserError(
            f"{recipe.name} has no archive {only!r}: {', '.join(archive.name for archive in recipe.archives)}."
        )
    for archive in chosen:
        url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
        path = download(
            url, folder / "archives" / archive.name, archive.checksum, progress=progress
        )
        unpack(path, folder / archive.into)
    return folder


def build(
    recipe: Recipe,
    raw: Path,
    out: Path,
    overrides: ManifestSpec | None = None,
    *,
    workers: int | None = None,
    max_skipped_fraction: float = 0.5,
    progress: bool = True,
) -> BuildReport:
    """Build the shards of an unpacked corpus.

    Args:
        overrides: options of `data build` that win over the recipe's (texts, labels, which rows, …); its manifest is not looked at.

    Raises:
        UserError: `raw` does not hold the corpus, or see `build_shards`.
    """
    if not raw.is_dir():
        raise UserError(
            f"There is no folder {raw}. Fetch the corpus: whisper-aut data get {recipe.name} --out {raw}"
        )
    manifest, has_splits = _write_manifest(recipe, raw, out)
    given = overrides or ManifestSpec(manifest)
    spec = replace(
        given,
        manifest=manifest,
        audio_root=raw,
        audio="audio",
        domain=given.domain or recipe.domain,
        task=given.task or recipe.task,
        language=given.language or recipe.language,
        source=given.source or ("" if recipe.name == "folder" else recipe.title),
        split_by=given.split_by or ("split" if has_splits else ""),
    )
    limits = ClipLimits(max_seconds=max(recipe.max_seconds, ClipLimits().max_seconds))
    return build_shards(
        spec,
        out,
        limits=limits,
        workers=workers,
        max_skipped_fraction=max_skipped_fraction,
        progress=progress,
    )


def _write_manifest(recipe: Recipe, raw: Path, out: Path) -> tuple[Path, bool]:
    """Write the rows down. A row without the key `licence` has the corpus's; where each clip has its own, an empty one stays empty."""
    has_splits, number = True, 0
    path, partial = out / MANIFEST_NAME, out / f".{MANIFEST_NAME}.partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for number, row in enumerate(recipe.rows(raw), 1):  # noqa: B007 (the last number counts them)
                has_splits = has_splits and bool(row.get("split") or not row["audio"])
                if recipe.licence and "licence" not in row:
                    row["licence"] = recipe.licence
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not number:
            raise UserError(
                f"{raw} holds no clip of {recipe.title}. Is that where it was unpacked?"
            )
        os.replace(partial, path)
    except NotThere as error:
        raise UserError(
            f"{error} Is that where {recipe.title} was unpacked? How to fetch what is missing: "
            f"whisper-aut data get {recipe.name} --out {shlex.quote(str(raw))}"
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read {raw}, or write {path}: {error}.") from None
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{raw} is not laid out as {recipe.title} is published: {error!r}. Its page: {recipe.source}."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return path, has_splits


COLUMNS = ("name", "domain", "clips", "hours", "licence", "how it comes", "checked", "source")
LISTED = 6  # of them fit a terminal


def cells(recipe: Recipe) -> tuple[str, ...]:
    """Return one row; a fact that is not known stays empty."""
    how = "fetched" if recipe.archives and not recipe.by_hand else "by hand"
    return (
        recipe.name,
        recipe.domain,
        "" if recipe.clips is None else f"{recipe.clips:,}",
        "" if recipe.hours is None else f"{recipe.hours:,g}",
        recipe.licence,
        how,
        ", ".join(recipe.checked),
        recipe.source,
    )


def markdown(recipes: list[Recipe]) -> str:
    """Return the table as `docs/corpora.md` holds it."""
    lines = [COLUMNS, tuple(":---" for _ in COLUMNS), *(cells(recipe) for recipe in recipes)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
