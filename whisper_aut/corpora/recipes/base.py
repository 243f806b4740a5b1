"""What a recipe of a public corpus consists of, and how it is downloaded and built."""

import csv
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits
from whisper_aut.corpora.build import BuildReport, build_shards
from whisper_aut.corpora.download import download, unpack
from whisper_aut.corpora.manifest import ManifestSpec
from whisper_aut.errors import UserError
from whisper_aut.utils import write_text

MANIFEST_NAME = "manifest.jsonl"
AUDIO_FILES = tuple(f".{suffix}" for suffix in AUDIO_SUFFIXES)
TABLE_COLUMNS = ("name", "domain", "clips", "hours", "licence", "download", "checked", "source")
LISTED_COLUMNS = 6  # columns that fit in a terminal

Rows = Iterator[dict[str, Any]]


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
    """A corpus, as described in a YAML file of this folder.

    Attributes:
        name: name in commands.
        title: name in tables.
        rows: function that maps the unpacked folder to rows with `audio` (a path relative to that
            folder), `text` or `label`, and if available `split`, `freesound_id` or `youtube_id`.
            Several texts are a list. If licences differ by clip, every row has a `licence`, which
            is empty where the corpus's tables name none. None if the corpus is published as shards.
        domain, task: defaults for clips whose rows do not set them.
        licence: the publisher's licence for all clips. If licences differ by clip, a description
            that is not the name of a licence.
        source: the publisher's page.
        archives: files to download.
        manual_steps: what to do by hand, if the terms or the format of the release require it.
        clips, hours: size of the whole corpus; None if unknown.
        language: language of the speech.
        max_seconds: duration of the longest clip to keep. `data.long_clips` says what training
            does with clips longer than `data.max_seconds`.
        checked: what was compared with the publisher's page or with a torchaudio release. The rest
            is taken from papers and has not been verified.
    """

    name: str
    title: str
    rows: Callable[[Path], Rows] | None
    domain: str = ""
    task: str = ""
    licence: str = ""
    source: str = ""
    archives: tuple[Archive, ...] = ()
    manual_steps: str = ""
    clips: int | None = None
    hours: float | None = None
    language: str = ""
    max_seconds: float = 30.0
    checked: Sequence[str] = ()

    def table_row(self) -> tuple[str, ...]:
        """Return the cells of `TABLE_COLUMNS`; unknown values are empty."""
        return (
            self.name,
            self.domain,
            "" if self.clips is None else f"{self.clips:,}",
            "" if self.hours is None else f"{self.hours:,g}",
            self.licence,
            "manual" if self.manual_steps or not self.archives else "automatic",
            ", ".join(self.checked),
            self.source,
        )


def read_recipes(module: ModuleType) -> dict[str, Recipe]:
    """Return the recipes in the YAML file next to a module, by name.

    The module has the function `rows` of each recipe, under the name of the recipe unless the YAML
    file gives another one.
    """
    table = Path(str(module.__file__)).with_suffix(".yaml").read_text(encoding="utf-8")
    recipes = {}
    for name, entry in yaml.safe_load(table).items():
        function = entry.pop("rows", name)
        rows = getattr(module, function) if function else None
        archives = tuple(Archive(**archive) for archive in entry.pop("archives", ()))
        recipes[name] = Recipe(name, rows=rows, archives=archives, **entry)
    return recipes


class MissingPart(UserError):
    """A part of a corpus is not in its folder."""


def find(root: Path, pattern: str) -> Path:
    """Return the first path that matches, directly under `root` or else at any depth.

    Raises:
        MissingPart: no path matches.
    """
    found = sorted(root.glob(pattern)) or sorted(root.glob(f"**/{pattern}"))
    if not found:
        raise MissingPart(f"{root} does not contain {pattern}.")
    return found[0]


def find_parts(root: Path, patterns: Mapping[str, str]) -> dict[str, Path]:
    """Return the available parts of a corpus by split; a corpus may be downloaded in part.

    Raises:
        MissingPart: no part is available.
    """
    found: dict[str, Path] = {}
    for split, pattern in patterns.items():
        with suppress(MissingPart):
            found[split] = find(root, pattern)
    if not found:
        raise MissingPart(f"{root} contains none of {', '.join(patterns.values())}.")
    return found


def audio_files(folder: Path, suffixes: tuple[str, ...] = AUDIO_FILES) -> list[Path]:
    """Return the audio files under a folder, sorted, without hidden files and folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    )


def read_csv(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file with a header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def with_article(noun: str) -> str:
    """Write `organ` as `an organ`, judging by the first letter."""
    return f"{'an' if noun.startswith(tuple('aeiou')) else 'a'} {noun}"


def words(name: str) -> str:
    """Write a class name as words: `crackling_fire` → `crackling fire`."""
    return " ".join(name.replace("_", " ").split())


def download_corpus(recipe: Recipe, folder: Path, *, mirror: str = "", only: str = "") -> None:
    """Download and unpack a corpus into `folder`; existing files are not downloaded again.

    `mirror` is the base URL of a server with the same files, to use instead of the publisher's.
    Only archives whose name contains `only` are downloaded.

    Raises:
        UserError: the corpus needs manual steps, a download failed, or an archive is damaged.
    """
    if not recipe.archives or (recipe.manual_steps and not mirror):
        raise UserError(
            f"{recipe.title} has to be downloaded by hand. {recipe.manual_steps}\n"
            f"  page: {recipe.source or '-'}\n"
            f"  licence: {recipe.licence or '-'}\n"
            f"  folder: {folder}\n"
            f"Then: whisper-aut data build {recipe.name} {folder}"
        )
    chosen = [archive for archive in recipe.archives if only in archive.name]
    if not chosen:
        names = ", ".join(archive.name for archive in recipe.archives)
        raise UserError(f"{recipe.name} has no archive {only!r}. Its archives: {names}.")
    for archive in chosen:
        url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
        path = folder / "archives" / archive.name
        download(url, path, archive.checksum)
        unpack(path, folder / archive.into)


def build_corpus(
    recipe: Recipe,
    raw: Path,
    out: Path,
    overrides: ManifestSpec | None = None,
    *,
    max_seconds: float | None = None,
    **options: Any,
) -> BuildReport:
    """Build the shards of an unpacked corpus.

    Args:
        recipe: the corpus.
        raw: folder of the unpacked corpus.
        out: output folder.
        overrides: options of `data build` that override the recipe's (texts, labels, which rows,
            …). Its `manifest` is ignored.
        max_seconds: duration of the longest clip to keep; by default the recipe's, at least 30.
        options: those of `build_shards`, such as `workers`.

    Raises:
        UserError: `raw` does not contain the corpus, or the build failed (see `build_shards`).
    """
    if not raw.is_dir():
        raise UserError(
            f"There is no folder {raw}. Download the corpus: whisper-aut data get {recipe.name} "
            f"--out {raw}"
        )
    if recipe.rows is None:
        raise UserError(
            f"{recipe.title}: its tars are shards already. {recipe.manual_steps} Look at them: "
            f"whisper-aut data inspect {raw}/TASK"
        )
    manifest, has_splits = _write_manifest(recipe, recipe.rows, raw, out)
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
    limits = ClipLimits(max_seconds=max_seconds or max(30.0, recipe.max_seconds))
    return build_shards(spec, out, limits=limits, **options)


def _write_manifest(
    recipe: Recipe, rows: Callable[[Path], Rows], raw: Path, out: Path
) -> tuple[Path, bool]:
    """Write the rows of a corpus as a manifest; return its path and whether any row has a split.

    Rows without the key `licence` get the corpus's licence. An empty `licence` stays empty: it
    means that licences differ by clip and this one is unknown.
    """
    path, lines, has_splits = out / MANIFEST_NAME, [], False
    try:
        for row in rows(raw):
            has_splits = has_splits or bool(row.get("split"))
            if recipe.licence:
                row.setdefault("licence", recipe.licence)
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if not lines:
            raise MissingPart(f"{raw} does not contain any clip of {recipe.title}.")
        write_text(path, "".join(lines))
    except MissingPart as error:
        raise UserError(
            f"{error} Is {recipe.title} unpacked there? To download what is missing: whisper-aut "
            f"data get {recipe.name} --out {shlex.quote(str(raw))}"
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read {raw}: {error}.") from None
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{raw} does not have the layout in which {recipe.title} is published: {error!r}. See "
            f"{recipe.source}."
        ) from None
    return path, has_splits
