"""A manifest → folders of shards.

In: a `ManifestSpec`. Out: `OUT/shard-000000.tar …` with `OUT/index.json` (with `split_by`, one such folder per value), and
`OUT/refused.jsonl` with a line for every row that gave no clip. Next: `corpora.inspect` tells what is in them, `data.stream`
reads them. The bytes written depend on the inputs alone, not on the number of workers.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.ingest import Ingested, file_size, ingest
from whisper_aut.corpora.manifest import Manifest, ManifestSpec, RefusedRow
from whisper_aut.corpora.refusals import REFUSED_NAME, Refusals, refusal_log
from whisper_aut.corpora.shards import INDEX_NAME, ShardFolder, ShardIndex, open_index
from whisper_aut.errors import Reason, UserError

RECIPE_VERSION = 2  # raise it when the same inputs would give other shards


@dataclass(frozen=True)
class BuildReport:
    """What a build did, or what an earlier one of the same recipe had done (`reused`).

    Attributes:
        folders: the folders of shards, by split; the split's name is empty without `split_by`.
        rows: rows of the manifest that `where` kept; `passed_over` are the others.
        clips, seconds: what was written.
        refused: rows that gave no clip, by reason.
    """

    out: Path
    folders: dict[str, Path]
    rows: int
    passed_over: int
    clips: int
    seconds: float
    refused: dict[str, int]
    recipe: str
    reused: bool = False

    def summary(self) -> str:
        """Return one paragraph for people."""
        kept = f" ({self.passed_over} rows passed over by --where)" if self.passed_over else ""
        text = f"{self.clips} clips, {self.seconds / 3600:.2f} h, from {self.rows} rows{kept}, in {self.out}"
        if any(self.folders):
            text += f", split into {', '.join(self.folders)}"
        if self.refused:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.refused.items())
            text += f". Refused: {reasons}; see {self.out / REFUSED_NAME}"
        return text + (
            "." if not self.reused else ". Nothing has changed since they were built: reused."
        )


@dataclass(frozen=True)
class _Plan:
    """What a first reading of the manifest found, the audio files looked up but not opened."""

    recipe: str
    rows: int
    splits: tuple[str, ...]
    refusals: Refusals


def build_shards(
    spec: ManifestSpec,
    out: str | Path,
    *,
    limits: ClipLimits = ClipLimits(),  # noqa: B008 (frozen)
    workers: int | None = None,
    max_shard_bytes: int = 256 << 20,
    max_skipped_fraction: float = 0.5,
    progress: bool = True,
) -> BuildReport:
    """Build the shards of a manifest under `out`, unless they are there already.

    `workers` is the number of decoding processes, by default one per core that this process may use.

    Raises:
        UserError: see `Manifest`; `out` is not a place to write to; more than `max_skipped_fraction` of the rows were refused, or
            all of one split.
    """
    out = Path(out).absolute()
    manifest = Manifest(spec)
    settings = {
        "limits": asdict(limits),
        "max_shard_bytes": max_shard_bytes,
        "max_skipped_fraction": max_skipped_fraction,
    }
    plan = _survey(manifest, settings)
    _check_share(
        manifest, plan.refusals, plan.rows, max_skipped_fraction
    )  # missing files need no build to be found
    folders = {split: out / split for split in plan.splits}
    _check_out(out, folders)
    indices = _built_before(folders, plan.recipe)
    if indices:
        return _report(out, folders, indices, reused=True)
    items = ingest(manifest.entries(), limits, workers or _cores())
    try:
        with closing(items), refusal_log(out) as log:
            refusals = Refusals(log)
            with ExitStack() as stack:
                shards = {
                    split: stack.enter_context(ShardFolder(path, max_bytes=max_shard_bytes))
                    for split, path in folders.items()
                }
                _write(items, shards, refusals, stack.enter_context(_progress(plan.rows, progress)))
                _check_share(
                    manifest,
                    refusals,
                    plan.rows,
                    max_skipped_fraction,
                    f" All are listed in {out / REFUSED_NAME}.",
                )
                _check_splits(spec, shards, refusals)
                _add_facts(shards, manifest, plan, refusals)
    except OSError as error:
        raise UserError(f"Cannot write shards to {out}: {error.strerror or error}.") from None
    return _report(out, folders, {split: open_index(folder) for split, folder in folders.items()})


def _survey(manifest: Manifest, settings: dict[str, Any]) -> _Plan:
    spec = {
        name: value
        for name, value in asdict(manifest.spec).items()
        if name not in ("manifest", "audio_root")
    }
    facts = {"version": RECIPE_VERSION, "spec": spec, "manifest": manifest.digest(), **settings}
    recipe = hashlib.sha256(json.dumps(facts, sort_keys=True, default=list).encode())
    rows, splits, refusals = 0, {}, Refusals()
    for rows, item in enumerate(manifest.entries(), 1):  # noqa: B007 (the last number counts them)
        if isinstance(item, RefusedRow):
            refusals.add(item)
            continue
        splits[item.split] = None
        try:
            found = item.path.stat()
            recipe.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        except (OSError, ValueError):
            refusals.add(
                RefusedRow(item.line, str(item.path), Reason.MISSING_FILE, split=item.split)
            )
            recipe.update(b"missing\n")
    if not rows:
        kept = " and ".join(
            f"{column} {'|'.join(values)}" for column, values in manifest.spec.where.items()
        )
        there = "; ".join(
            f"{column}: {', '.join(manifest.values(column))}" for column in manifest.spec.where
        )
        raise UserError(
            f"--where {kept} keeps none of the rows of {manifest.path}. First values of {there}."
        )
    return _Plan(recipe.hexdigest()[:16], rows, tuple(splits), refusals)


def _write(
    items: Iterator[Ingested | RefusedRow],
    shards: dict[str, ShardFolder],
    refusals: Refusals,
    bar: Progress,
) -> None:
    for item in items:
        if isinstance(item, RefusedRow):
            refusals.add(item)
        else:
            annotation = replace(item.entry.annotation, duration_seconds=item.clip.seconds)
            shards[item.entry.split].write(
                item.entry.key, item.clip.suffix, item.clip.audio, annotation
            )
        bar.advance(bar.task_ids[0])


def _add_facts(
    shards: dict[str, ShardFolder], manifest: Manifest, plan: _Plan, refusals: Refusals
) -> None:
    build = {
        "rows": plan.rows,
        "passed_over": manifest.passed_over,
        "refused": dict(refusals.counts),
        "split_by": manifest.spec.split_by,
    }
    for split, folder in shards.items():
        folder.facts = {
            "recipe": plan.recipe,
            "refused": dict(refusals.by_split[split]),
            "build": build,
        }


def _progress(rows: int, enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not enabled)
    bar.add_task("clips", total=rows)
    return bar


def _check_share(
    manifest: Manifest, refusals: Refusals, rows: int, max_share: float, more: str = ""
) -> None:
    refused = refusals.counts.total()
    if refused < rows and refused <= max_share * rows:
        return
    allowed = (
        ""
        if refused == rows
        else f", more than the {max_share:.0%} that --max-skipped-fraction allows"
    )
    hint = f" Relative paths start from {manifest.root}; --audio-root names another folder."
    hint = hint if Reason.MISSING_FILE in refusals.counts else ""
    raise UserError(
        f"{refused} of {rows} rows of {manifest.path} were refused{allowed}:\n{refusals.table()}\n{more}{hint}".rstrip()
    )


def _check_splits(spec: ManifestSpec, shards: dict[str, ShardFolder], refusals: Refusals) -> None:
    empty = [split for split, folder in shards.items() if not folder.samples]
    if empty:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in refusals.by_split[empty[0]].items()
        )
        raise UserError(
            f"All rows of {spec.split_by} {empty[0]!r} were refused ({reasons}). Mend them or leave them out by --where."
        )


def _check_out(out: Path, folders: dict[str, Path]) -> None:
    """Refuse to write where shards lie that this command did not write, or a split would be left over from a former build."""
    if out.exists() and not out.is_dir():
        raise UserError(f"Cannot write shards to {out}: it is a file.")
    for folder in folders.values():
        if next(folder.glob("*.tar"), None) and "recipe" not in _facts(folder):
            raise UserError(
                f"{folder} holds tars that `data build` did not write. Choose another --out, or move them away."
            )
    for index in sorted([*out.glob(INDEX_NAME), *out.glob(f"*/{INDEX_NAME}")]):
        facts = _facts(index.parent)
        if (
            index.parent not in folders.values()
            and "build" in facts
            and (index.parent == out or facts["build"].get("split_by"))
        ):
            raise UserError(
                f"{index.parent} holds shards of a former build, split otherwise. Choose another --out, or delete them."
            )


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / INDEX_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _built_before(folders: dict[str, Path], recipe: str) -> dict[str, ShardIndex]:
    """Return the indices of an earlier build of the same recipe whose tars are all there, or nothing."""
    if any(_facts(folder).get("recipe") != recipe for folder in folders.values()):
        return {}
    try:
        indices = {split: open_index(folder) for split, folder in folders.items()}
    except UserError:  # a tar is missing: build again
        return {}
    sizes = [
        (folders[split] / shard.name, shard.bytes)
        for split, index in indices.items()
        for shard in index.shards
    ]
    return indices if all(file_size(path) == size for path, size in sizes) else {}


def _report(
    out: Path, folders: dict[str, Path], indices: dict[str, ShardIndex], reused: bool = False
) -> BuildReport:
    facts = next(iter(indices.values())).facts
    return BuildReport(
        out=out,
        folders=folders,
        rows=facts["build"]["rows"],
        passed_over=facts["build"]["passed_over"],
        clips=sum(index.samples for index in indices.values()),
        seconds=sum(index.seconds for index in indices.values()),
        refused=facts["build"]["refused"],
        recipe=facts["recipe"],
        reused=reused,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
