"""Recipes of public corpora: where to get them, their licence, and how files become manifest rows.

`get` downloads and unpacks a corpus, `build` makes its shards. `Recipe.checked` names the metadata
that was compared with the publisher's page or with a torchaudio release. The rest is taken from
papers and has not been verified.
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
    """A file to download.

    Attributes:
        url: its address.
        checksum: `sha256:…`, `sha1:…` or `md5:…`; empty if no published checksum was found.
        into: folder to unpack into, for archives without a top-level folder.
    """

    url: str
    checksum: str = ""
    into: str = ""

    @property
    def name(self) -> str:
        """File name in the URL."""
        return self.url.partition("?")[0].rpartition("/")[2]


@dataclass(frozen=True)
class Recipe:
    """A public corpus.

    Attributes:
        name: name in commands.
        title: name in tables.
        domain, task: defaults for clips whose rows do not set them.
        licence: the publisher's licence for all clips. If licences differ by clip, a description
            that is not the name of a licence.
        source: the publisher's page.
        rows: function that maps the unpacked folder to rows with `audio` (a path relative to that
            folder), `text` or `label`, and if available `split`, `freesound_id` or `youtube_id`.
            If licences differ by clip, every row has a `licence`, which is empty where the
            corpus's tables name none.
        archives: files to download.
        by_hand: instructions, if the terms or the format of the release require manual steps.
        clips, hours, download_gb: size of the whole corpus; None if unknown.
        language: language of the speech.
        max_seconds: duration of the longest clip to keep. Training skips clips longer than
            `data.max_seconds`.
        checked: names of the metadata that was compared with its source.
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
    """A part of a corpus is missing from its folder; `build` adds instructions for getting it."""


def find(root: Path, pattern: str) -> Path:
    """Return the first path that matches, directly under `root` or else at any depth.

    Raises:
        NotThere: no path matches.
    """
    found = sorted(root.glob(pattern)) or sorted(root.glob(f"**/{pattern}"))
    if not found:
        raise NotThere(f"{root} holds no {pattern}.")
    return found[0]


def find_parts(root: Path, patterns: Mapping[str, str]) -> dict[str, Path]:
    """Return the available parts of a corpus by split; a corpus may be downloaded in part.

    Raises:
        NotThere: no part is available.
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
    """Return the audio files under a folder, sorted, without hidden files and folders."""
    found = (
        path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )
    return sorted(
        path
        for path in found
        if not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    )


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file with a header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None


def with_article(noun: str) -> str:
    """Write `organ` as `an organ`, judging by the first letter."""
    return f"{'an' if noun.startswith(tuple('aeiou')) else 'a'} {noun}"


def words(name: str) -> str:
    """Write a class name as words: `crackling_fire` → `crackling fire`."""
    return " ".join(name.replace("_", " ").split())


MANIFEST_NAME = "manifest.jsonl"


def get(
    recipe: Recipe, folder: Path, *, mirror: str = "", only: str = "", progress: bool = True
) -> Path:
    """Download and unpack a corpus into `folder`; existing files are not downloaded again.

    Args:
        recipe: the corpus.
        folder: where to put it.
        mirror: base URL of a server with the same files, to use instead of the publisher's.
        only: download only archives whose name contains this.
        progress: whether to show progress bars.

    Returns:
        `folder`.

    Raises:
        UserError: the corpus needs manual steps, a download failed, or an archive is damaged.
    """
    if not recipe.archives or (recipe.by_hand and not mirror):
        raise UserError(
            f"{recipe.title} has to be fetched by a person. {recipe.by_hand}\n"
            f"  page: {recipe.source or '-'}\n"
            f"  licence: {recipe.licence or '-'}\n"
            f"  folder: {folder}\n"
            f"Then: whisper-aut data build {recipe.name} {folder}"
        )
    chosen = [archive for archive in recipe.archives if only in archive.name]
    if not chosen:
        raise UserError(
            f"{recipe.name} has no archive {only!r}: "
            f"{', '.join(archive.name for archive in recipe.archives)}."
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
        recipe: the corpus.
        raw: folder of the unpacked corpus.
        out: output folder.
        overrides: options of `data build` that override the recipe's (texts, labels, which rows,
            …). Its `manifest` is ignored.
        workers, max_skipped_fraction, progress: see `build_shards`.

    Raises:
        UserError: `raw` does not contain the corpus, or the build failed (see `build_shards`).
    """
    if not raw.is_dir():
        raise UserError(
            f"There is no folder {raw}. Fetch the corpus: whisper-aut data get {recipe.name} --out "
            f"{raw}"
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
    """Write the rows of a corpus as a manifest; return its path and whether all rows have a split.

    Rows without the key `licence` get the corpus's licence. An empty `licence` stays empty: it
    means that licences differ by clip and this one is unknown.
    """
    has_splits, number = True, 0
    path, partial = out / MANIFEST_NAME, out / f".{MANIFEST_NAME}.partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for number, row in enumerate(recipe.rows(raw), 1):  # noqa: B007 (the number of rows)
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
            f"{raw} is not laid out as {recipe.title} is published: {error!r}. Its page: "
            f"{recipe.source}."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return path, has_splits


COLUMNS = ("name", "domain", "clips", "hours", "licence", "how it comes", "checked", "source")
LISTED = 6  # columns that fit in a terminal


def cells(recipe: Recipe) -> tuple[str, ...]:
    """Return the table row of a recipe; unknown values are empty."""
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
    """Return the table of recipes in Markdown, as in `docs/data.md`."""
    lines = [COLUMNS, tuple(":---" for _ in COLUMNS), *(cells(recipe) for recipe in recipes)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
