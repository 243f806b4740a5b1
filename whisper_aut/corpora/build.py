"""Build folders of shards from a manifest.

A build writes `OUT/shard-000000.tar …` and `OUT/index.json` (one such folder per value of
`split_by`, if that is set), and `OUT/refused.jsonl` with one line per rejected row. The bytes
written depend only on the inputs, not on the number of workers.
"""

import hashlib
import io
import json
import os
import signal
import stat
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whisper_aut.audio.decode import ClipLimits, channel_layout, decode, mix_down, open_recording
from whisper_aut.corpora.manifest import Entry, Manifest, ManifestSpec, Segment, SkippedRow
from whisper_aut.data.shards import INDEX_NAME, ShardIndex, open_index
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import SkipReason, SkipSample, UserError

SUFFIX_OF_FORMAT = {"FLAC": "flac", "WAV": "wav", "WAVEX": "wav", "OGG": "ogg", "MP3": "mp3"}
LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
HEAD_BYTES = 4096  # enough of a file to tell its channel layout
MAX_FLAC_RATE_HZ = 655_350
BATCH_FILES = 32
BATCH_BYTES = 8 << 20  # encoded audio in one message between processes
ROUNDING_SECONDS = 0.1  # a segment may end this much after the end of its file


@dataclass(frozen=True)
class EncodedClip:
    """One clip as it is stored in a shard; `suffix` is the file extension of `audio`."""

    audio: bytes
    suffix: str
    seconds: float


@dataclass(frozen=True)
class Ingested:
    """A manifest entry with its audio."""

    entry: Entry
    clip: EncodedClip


Batch = list[Entry | SkippedRow]
Job = tuple[Path, Segment | None]
Outcome = EncodedClip | SkipSample


def ingest(
    entries: Iterable[Entry | SkippedRow], limits: ClipLimits, workers: int
) -> Generator[Ingested | SkippedRow]:
    """Read and check the audio of all entries.

    Yields one item per input item, in the same order. Rejected rows pass through.

    Args:
        entries: the items of a manifest.
        limits: what a clip must satisfy.
        workers: number of decoding processes; with 1 decoding happens in this process.

    Raises:
        UserError: a worker process died. Errors of a decoder only reject the row.
    """
    if workers == 1:
        for batch in _batches(entries):
            yield from _settle(batch, _read_batch(_jobs(batch), limits))
        return
    # Fork on Linux: spawned workers would each import torch. Forking is safe because the workers
    # only decode and take no lock that a thread of the parent may hold.
    context = get_context("fork" if sys.platform == "linux" else None)
    pending: deque[tuple[Batch, Future[list[Outcome]]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=obey_parent) as pool:
        try:
            for batch in _batches(entries):
                pending.append((batch, pool.submit(_read_batch, _jobs(batch), limits)))
                if len(pending) > 2 * workers:
                    yield from _result(*pending.popleft())
            while pending:
                yield from _result(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_clip(path: Path, limits: ClipLimits, segment: Segment | None = None) -> EncodedClip:
    """Read a file or a segment of it and check that it decodes within the limits.

    Whole files keep their encoding if shards support it. Other formats and segments are encoded
    again, as FLAC or WAV.

    Raises:
        SampleRefused: the path is missing or is not a regular file, the segment is not inside the
            file, or `audio.decode` rejects the audio.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block forever
            raise SkipSample(SkipReason.MISSING_FILE, "not a file")
        if segment:
            return _cut(path, segment, limits)
        if found.st_size > limits.max_bytes:
            raise SkipSample(
                SkipReason.TOO_LARGE, f"{found.st_size} bytes, limit {limits.max_bytes}"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        detail = error.strerror if isinstance(error, OSError) else None
        raise SkipSample(SkipReason.MISSING_FILE, detail or str(error)) from None
    clip = decode(data, limits)
    kind, _, subtype = clip.codec.partition("/")
    if kind not in SUFFIX_OF_FORMAT:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return EncodedClip(*_encode(_native(file, -1, data), file.samplerate), clip.seconds)
    is_opus = subtype == "OPUS" and path.suffix.lower() == ".opus"
    return EncodedClip(data, "opus" if is_opus else SUFFIX_OF_FORMAT[kind], clip.seconds)


def _cut(path: Path, segment: Segment, limits: ClipLimits) -> EncodedClip:
    """Read only the segment: the file may be hours long."""
    with open_recording(path) as file:
        rate, there = file.samplerate, file.frames / file.samplerate
        end = there if segment.seconds is None else segment.start_seconds + segment.seconds
        if segment.start_seconds >= there or end > there + ROUNDING_SECONDS:
            raise SkipSample(
                SkipReason.BAD_ROW,
                f"a segment from {segment.start_seconds:g} to {end:g} s of a file that ends at "
                f"{there:g} s",
            )
        start = round(segment.start_seconds * rate)
        file.seek(start)
        # One second above the limit is enough for `decode` to reject the clip as too long.
        wanted = min(round(end * rate) - start, round((limits.max_seconds + 1) * rate))
        with path.open("rb") as head:
            samples = _native(file, wanted, head.read(HEAD_BYTES))
    data, suffix = _encode(samples, rate)
    return EncodedClip(data, suffix, decode(data, limits).seconds)


def _native(file: soundfile.SoundFile, frames: int, head: bytes) -> np.ndarray:
    """Read samples in the file's own precision: int16, int32 or float32.

    More than two channels are mixed down. `head` is the beginning of the file.
    """
    if file.channels > 2:
        return mix_down(file.read(frames, dtype="float32"), channel_layout(file, head))
    if file.subtype in ("FLOAT", "DOUBLE"):
        return file.read(frames, dtype="float32")
    if file.subtype in LOSSY:
        # Read as integers, values would wrap around: +1.0 becomes -1.0.
        samples = file.read(frames, dtype="float32")
        return np.clip(np.rint(samples * 2.0**15), -(2**15), 2**15 - 1).astype(np.int16)
    # Do not read integers as floats: libsndfile reads and writes floats with scales that differ
    # by one step.
    return file.read(
        frames, dtype="int32" if file.subtype.endswith(("20", "24", "32")) else "int16"
    )


def _encode(samples: np.ndarray, rate: int) -> tuple[bytes, str]:
    """Encode samples as FLAC, or as WAV if FLAC does not support them; return bytes and suffix."""
    fits_flac = samples.dtype != np.float32 and rate <= MAX_FLAC_RATE_HZ
    depth = {"float32": "FLOAT", "int32": "PCM_24", "int16": "PCM_16"}[samples.dtype.name]
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, subtype=depth, format="FLAC" if fits_flac else "WAV")
    return encoded.getvalue(), "flac" if fits_flac else "wav"


def _batches(entries: Iterable[Entry | SkippedRow]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for item in entries:
        batch.append(item)
        size += file_size(item.path) if isinstance(item, Entry) and not item.segment else 0
        if len(batch) == BATCH_FILES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if it does not exist."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _jobs(batch: Batch) -> list[Job]:
    return [(item.path, item.segment) for item in batch if isinstance(item, Entry)]


def _read_batch(jobs: Sequence[Job], limits: ClipLimits) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for path, segment in jobs:
        try:
            outcomes.append(read_clip(path, limits, segment))
        except SkipSample as refused:
            outcomes.append(refused)
    return outcomes


def _result(batch: Batch, future: "Future[list[Outcome]]") -> Iterator[Ingested | SkippedRow]:
    try:
        outcomes = future.result()
    except BrokenProcessPool:
        lines = f"lines {batch[0].line} to {batch[-1].line}"
        raise UserError(
            f"A worker process died, probably while it read an audio file of {lines} of the "
            "manifest, or for want of memory. Run with --workers 1 to find the file, and leave its "
            "row out."
        ) from None
    yield from _settle(batch, outcomes)


def _settle(batch: Batch, outcomes: Sequence[Outcome]) -> Iterator[Ingested | SkippedRow]:
    remaining = iter(outcomes)
    for item in batch:
        if isinstance(item, SkippedRow):
            yield item
            continue
        outcome = next(remaining)
        if isinstance(outcome, EncodedClip):
            yield Ingested(item, outcome)
        else:
            yield SkippedRow(item.line, str(item.path), outcome.reason, outcome.detail, item.split)


def obey_parent() -> None:
    """Make the calling worker process ignore Ctrl-C and exit when its parent does."""
    # The parent handles Ctrl-C, so that there is one message instead of one per worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent:
        # A killed parent cannot stop its pool, whose workers would wait for work forever.
        parent.join()
        os._exit(1)


REFUSED_NAME = "refused.jsonl"


@dataclass
class SkipLog:
    """Counts the rejected rows by reason and by split.

    Attributes:
        log: file that each row is written to as a JSON line; None for no log.
        counts: number of rows by reason.
        by_split: number of rows by split and reason.
        examples: the first row of each reason.
    """

    log: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)
    by_split: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, SkippedRow] = field(default_factory=dict)

    def add(self, row: SkippedRow) -> None:
        """Count a row, and log it."""
        self.counts[row.reason] += 1
        self.by_split[row.split][row.reason] += 1
        self.examples.setdefault(row.reason, row)
        if self.log:
            # Escaped to ASCII, because a path may contain bytes that are not UTF-8.
            self.log.write(json.dumps(asdict(row)) + "\n")

    def table(self) -> str:
        """Return one line per reason, the most frequent first."""
        lines = []
        for reason, count in self.counts.most_common():
            row = self.examples[reason]
            example = ": ".join(part for part in (row.path, row.detail) if part)
            lines.append(f"  {count:>7}  {reason}, first in line {row.line}: {example}")
        return "\n".join(lines)


@contextmanager
def skip_log(out: Path) -> Iterator[TextIO]:
    """Open `OUT/refused.jsonl` for writing.

    The file is kept even if the build fails, because it explains the failure. It is removed if it
    is empty.
    """
    partial = out / f".{REFUSED_NAME}.partial"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="ascii") as file:
            yield file
    finally:
        if partial.stat().st_size:
            os.replace(partial, out / REFUSED_NAME)
        else:
            partial.unlink()
            (out / REFUSED_NAME).unlink(missing_ok=True)


RECIPE_VERSION = 2  # increase it when the same inputs result in different shards


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Attributes:
        out: output folder.
        folders: the folders of shards by split. Without `split_by`, the only split is "".
        rows: number of manifest rows that `where` kept.
        passed_over: number of rows that `where` dropped.
        clips: number of clips written.
        seconds: their total duration.
        refused: number of rejected rows by reason.
        recipe: hash of everything that the shards depend on.
        reused: whether the shards of an earlier build with the same recipe were kept.
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
        """Return a human-readable summary of one paragraph."""
        kept = f" ({self.passed_over} rows passed over by --where)" if self.passed_over else ""
        text = (
            f"{self.clips} clips, {self.seconds / 3600:.2f} h, from {self.rows} rows{kept}, in "
            f"{self.out}"
        )
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
    """The result of a first pass over the manifest that looks up audio files but opens none."""

    recipe: str
    rows: int
    splits: tuple[str, ...]
    refusals: SkipLog


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
    """Build the shards of a manifest under `out`, unless they already exist.

    Args:
        spec: the manifest and the meaning of its columns.
        out: output folder.
        limits: what a clip must satisfy.
        workers: number of decoding processes; by default one per available core.
        max_shard_bytes: size at which the next tar begins.
        max_skipped_fraction: fraction of rows that may be rejected, in [0, 1].
        progress: whether to show a progress bar.

    Raises:
        UserError: the manifest does not fit (see `Manifest`), `out` cannot be written to, more than
            `max_skipped_fraction` of the rows were rejected, or all rows of a split were.
    """
    out = Path(out).absolute()
    manifest = Manifest(spec)
    settings = {
        "limits": asdict(limits),
        "max_shard_bytes": max_shard_bytes,
        "max_skipped_fraction": max_skipped_fraction,
    }
    plan = _survey(manifest, settings)
    # Too many missing files are an error before anything is built.
    _check_share(manifest, plan.refusals, plan.rows, max_skipped_fraction)
    folders = {split: out / split for split in plan.splits}
    _check_out(out, folders)
    indices = _built_before(folders, plan.recipe)
    if indices:
        return _report(out, folders, indices, reused=True)
    items = ingest(manifest.entries(), limits, workers or _cores())
    try:
        with closing(items), skip_log(out) as log:
            refusals = SkipLog(log)
            with ExitStack() as stack:
                shards = {
                    split: stack.enter_context(ShardWriter(path, max_bytes=max_shard_bytes))
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
    rows, splits, refusals = 0, {}, SkipLog()
    for rows, item in enumerate(manifest.entries(), 1):  # noqa: B007 (number of rows)
        if isinstance(item, SkippedRow):
            refusals.add(item)
            continue
        splits[item.split] = None
        try:
            found = item.path.stat()
            recipe.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        except (OSError, ValueError):
            refusals.add(
                SkippedRow(item.line, str(item.path), SkipReason.MISSING_FILE, split=item.split)
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
    items: Iterator[Ingested | SkippedRow],
    shards: dict[str, ShardWriter],
    refusals: SkipLog,
    bar: Progress,
) -> None:
    for item in items:
        if isinstance(item, SkippedRow):
            refusals.add(item)
        else:
            annotation = replace(item.entry.annotation, duration_seconds=item.clip.seconds)
            shards[item.entry.split].write(
                item.entry.key, item.clip.suffix, item.clip.audio, annotation
            )
        bar.advance(bar.task_ids[0])


def _add_facts(
    shards: dict[str, ShardWriter], manifest: Manifest, plan: _Plan, refusals: SkipLog
) -> None:
    build = {
        "rows": plan.rows,
        "passed_over": manifest.passed_over,
        "refused": dict(refusals.counts),
        "split_by": manifest.spec.split_by,
    }
    for split, folder in shards.items():
        folder.metadata = {
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
    manifest: Manifest, refusals: SkipLog, rows: int, max_share: float, more: str = ""
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
    hint = hint if SkipReason.MISSING_FILE in refusals.counts else ""
    raise UserError(
        (
            f"{refused} of {rows} rows of {manifest.path} were refused{allowed}:\n"
            f"{refusals.table()}\n"
            f"{more}{hint}"
        ).rstrip()
    )


def _check_splits(spec: ManifestSpec, shards: dict[str, ShardWriter], refusals: SkipLog) -> None:
    empty = [split for split, folder in shards.items() if not folder.samples]
    if empty:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in refusals.by_split[empty[0]].items()
        )
        raise UserError(
            f"All rows of {spec.split_by} {empty[0]!r} were refused ({reasons}). Mend them or "
            "leave them out by --where."
        )


def _check_out(out: Path, folders: dict[str, Path]) -> None:
    """Check that `out` has no shards from elsewhere and no split left over from another build."""
    if out.exists() and not out.is_dir():
        raise UserError(f"Cannot write shards to {out}: it is a file.")
    for folder in folders.values():
        if next(folder.glob("*.tar"), None) and "recipe" not in _facts(folder):
            raise UserError(
                f"{folder} holds tars that `data build` did not write. Choose another --out, or "
                "move them away."
            )
    for index in sorted([*out.glob(INDEX_NAME), *out.glob(f"*/{INDEX_NAME}")]):
        facts = _facts(index.parent)
        if (
            index.parent not in folders.values()
            and "build" in facts
            and (index.parent == out or facts["build"].get("split_by"))
        ):
            raise UserError(
                f"{index.parent} holds shards of a former build, split otherwise. Choose another "
                "--out, or delete them."
            )


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / INDEX_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _built_before(folders: dict[str, Path], recipe: str) -> dict[str, ShardIndex]:
    """Return the indices of a complete earlier build of the same recipe, or an empty dict."""
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
    facts = next(iter(indices.values())).metadata
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
