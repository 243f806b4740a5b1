"""A recipe and the corpus it is for → archives on disk → shards.

In: a `Recipe`, a folder. Out: `FOLDER/archives/…` and what they unpack to; from these a manifest, `OUT/manifest.jsonl`, and its shards, a
folder of them per split. Next: `corpora.build`, which does what it does for any manifest.
"""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.build import BuildReport, build_shards
from whisper_aut.corpora.download import download
from whisper_aut.corpora.manifest import ManifestSpec
from whisper_aut.corpora.recipes.recipe import NotThere, Recipe
from whisper_aut.corpora.unpack import unpack
from whisper_aut.errors import UserError

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
