"""Build folders of shards from a manifest.

A build writes `OUT/shard-000000.tar …` and `OUT/index.json` (one such folder per value of
`split_by`, if that is set), and `OUT/skipped.jsonl` with one line per skipped row. The bytes
written depend only on the inputs, not on the number of workers or on interruptions.
"""

import hashlib
import io
import json
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import soundfile

from whisper_aut.audio.decode import (
    AV_SUFFIXES,
    SLACK_SECONDS,
    ClipLimits,
    as_soundfile,
    channel_layout,
    check_complete,
    decode,
    mix_down,
    open_recording,
)
from whisper_aut.corpora.manifest import Entry, Manifest, ManifestSpec, Segment, SkippedRow
from whisper_aut.data.annotation import safe_name
from whisper_aut.data.shards import INDEX_NAME, ShardIndex, open_index, text_hash
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import SkipReason, SkipSample, UserError
from whisper_aut.utils import available_cores, file_sha256, parallel_map, progress_bar, read_json

RECIPE_VERSION = 4  # increase it when the same inputs result in different shards
PATHS = ("manifest", "audio_root", "out")  # of a spec; the same files at other paths are equal
SKIPPED_NAME = "skipped.jsonl"
SUFFIX_OF_FORMAT = {"FLAC": "flac", "WAV": "wav", "WAVEX": "wav", "OGG": "ogg", "MP3": "mp3"}
LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
HEAD_BYTES = 4096  # enough of a file to tell its channel layout
MAX_FLAC_RATE_HZ = 655_350


@dataclass(frozen=True)
class EncodedClip:
    """One clip as it is stored in a shard; `suffix` is the file extension of `audio`."""

    audio: bytes
    suffix: str
    seconds: float


def read_clip(
    path: Path, limits: ClipLimits, segment: Segment | None = None, data: bytes | None = None
) -> EncodedClip:
    """Read a file or a segment of it, or use its `data`, and check that it decodes within limits.

    Whole files keep their encoding if shards support it. Other formats and segments are encoded
    again, as FLAC or WAV.

    Raises:
        SkipSample: the path is missing or is not a regular file, the segment is not inside the
            file, or `audio.decode` rejects the audio.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block forever
            raise SkipSample(SkipReason.MISSING_FILE, "not a file")
        if segment:
            return _cut(path, segment, limits)
        if data is None and found.st_size > limits.max_bytes:
            size = f"{found.st_size} bytes, limit {limits.max_bytes}"
            raise SkipSample(SkipReason.TOO_LARGE, size)
        data = as_soundfile(path.read_bytes() if data is None else data, limits)
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        detail = error.strerror if isinstance(error, OSError) else None
        raise SkipSample(SkipReason.MISSING_FILE, detail or str(error)) from None
    clip = decode(data, limits)
    kind, _, subtype = clip.codec.partition("/")
    if kind not in SUFFIX_OF_FORMAT:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return EncodedClip(*_encode(_read(file, -1, data), file.samplerate), clip.seconds)
    is_opus = subtype == "OPUS" and path.suffix.lower() == ".opus"
    return EncodedClip(data, "opus" if is_opus else SUFFIX_OF_FORMAT[kind], clip.seconds)


def _cut(path: Path, segment: Segment, limits: ClipLimits) -> EncodedClip:
    """Read only the segment: the file may be hours long."""
    with open_recording(path) as file:
        rate, file_seconds = file.samplerate, file.frames / file.samplerate
        end = file_seconds if segment.seconds is None else segment.start_seconds + segment.seconds
        if segment.start_seconds >= file_seconds or end > file_seconds + SLACK_SECONDS:
            raise SkipSample(
                SkipReason.BAD_ROW,
                f"a segment from {segment.start_seconds:g} to {end:g} s of a file that ends at "
                f"{file_seconds:g} s",
            )
        start = round(segment.start_seconds * rate)
        file.seek(start)
        # One second above the limit is enough for `decode` to reject the clip as too long.
        frames = min(round(end * rate) - start, round((limits.max_seconds + 1) * rate))
        with path.open("rb") as head:
            samples = _read(file, frames, head.read(HEAD_BYTES))
        check_complete(len(samples), min(frames, file.frames - start), rate)
    data, suffix = _encode(samples, rate)
    return EncodedClip(data, suffix, decode(data, limits).seconds)


def _read(file: soundfile.SoundFile, frames: int, head: bytes) -> np.ndarray:
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
    if depth == "FLOAT":  # libsndfile writes the time into the PEAK chunk, after its version
        encoded.seek(encoded.getvalue().index(b"PEAK") + 12)
        encoded.write(bytes(4))
    return encoded.getvalue(), "flac" if fits_flac else "wav"


def _read_row(
    row: Entry | SkippedRow, limits: ClipLimits
) -> tuple[Entry, EncodedClip] | SkippedRow:
    if isinstance(row, SkippedRow):
        return row
    try:
        return row, read_clip(row.path, limits, row.segment, row.audio)
    except SkipSample as skip:
        return SkippedRow(row.line, str(row.path), skip.reason, skip.detail, row.split)


@dataclass
class SkipLog:
    """Counts the skipped rows by reason and by split, and writes them to `file`, if any."""

    file: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)
    by_split: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, SkippedRow] = field(default_factory=dict)  # the first of each reason

    def add(self, row: SkippedRow) -> None:
        self.counts[row.reason] += 1
        self.by_split[row.split][row.reason] += 1
        self.examples.setdefault(row.reason, row)
        if self.file:
            # Escaped to ASCII, because a path may contain bytes that are not UTF-8.
            self.file.write(json.dumps(asdict(row)) + "\n")

    def table(self) -> str:
        lines = []
        for reason, count in self.counts.most_common():
            row = self.examples[reason]
            example = ": ".join(part for part in (row.path, row.detail) if part)
            lines.append(f"  {count:>7}  {reason}, first in line {row.line}: {example}")
        return "\n".join(lines)


@contextmanager
def _skip_log(out: Path) -> Iterator[SkipLog]:
    """Write `OUT/skipped.jsonl`, also if the build fails, because it explains the failure."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SKIPPED_NAME
    with path.open("w", encoding="ascii") as file:
        try:
            yield SkipLog(file)
        finally:
            if not file.tell():
                path.unlink()


@dataclass(frozen=True)
class BuildReport:
    """The result of a build."""

    out: Path
    folders: dict[str, Path]  # by split; without `split_by`, the only split is ""
    rows: int  # of the manifest that `where` kept
    filtered_rows: int  # that `where` dropped
    clips: int  # written
    seconds: float  # their total duration
    skipped: dict[str, int]  # rows by reason
    recipe: str  # hash of everything that the shards depend on
    reused: bool = False  # whether the shards of an earlier build with this recipe were kept
    resumed: int = 0  # clips that an interrupted build had finished
    appended_to: int = 0  # clips that the folders held before

    def summary(self) -> str:
        """Return a human-readable summary of one paragraph."""
        filtered = f" ({self.filtered_rows} more dropped by --where)" if self.filtered_rows else ""
        text = f"{self.clips} clips, {self.seconds / 3600:.2f} h, from {self.rows} rows{filtered}, "
        text += f"in {self.out}"
        if any(self.folders):
            text += f", split into {', '.join(self.folders)}"
        if self.appended_to:
            new = self.clips - self.appended_to
            already = self.rows - sum(self.skipped.values()) - new
            text += f". {new} of the clips are new, {already} rows were there already"
        if self.resumed:
            text += f". {self.resumed} had been finished before an interruption"
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            text += f". Skipped: {reasons}; see {self.out / SKIPPED_NAME}"
        return f"{text}. The inputs have not changed: reused." if self.reused else f"{text}."


def build_shards(
    spec: ManifestSpec,
    out: str | Path,
    *,
    limits: ClipLimits = ClipLimits(),  # noqa: B008 (frozen)
    workers: int | None = None,
    max_shard_bytes: int = 256 << 20,
    max_skipped_fraction: float = 0.5,
    append: bool = False,
    progress: bool = True,
) -> BuildReport:
    """Build the shards of a manifest under `out`, unless they already exist.

    A build that was interrupted goes on after the last tar that it finished.

    Args:
        spec: the manifest and the meaning of its columns.
        out: output folder.
        limits: what a clip must satisfy.
        workers: number of decoding processes; by default one per available core.
        max_shard_bytes: size at which the next tar begins.
        max_skipped_fraction: fraction of rows that may be skipped, in [0, 1].
        append: keep the shards of earlier builds, and add the rows whose keys they do not have.
        progress: whether to show a progress bar.

    Raises:
        UserError: the manifest does not fit (see `Manifest`), `out` cannot be written to, more than
            `max_skipped_fraction` of the rows were skipped, or all rows of a split were.
    """
    out = Path(out).absolute()
    manifest = Manifest(spec)
    settings = {"limits": asdict(limits), "max_shard_bytes": max_shard_bytes}
    recipe, row_count, splits, missing = _survey(manifest, settings, unique_keys=append)
    # Too many missing files are an error before anything is built.
    _check_skipped(manifest, missing, row_count, max_skipped_fraction)
    folders = {split: out / split for split in splits}
    if append and spec.split_by:  # clips may have moved to another split, so all are looked at
        there = [path.parent for path in out.glob(f"*/{INDEX_NAME}")]
        folders |= {path.name: path for path in there if _build_of(path)}
    _check_out(out, folders, spec.split_by if append else None)
    indices = _find_earlier_build(folders, recipe)
    if indices:
        report = _report(out, folders, indices, reused=True)
        if sum(report.skipped.values()) <= max_skipped_fraction * report.rows:
            return report
    try:
        with _skip_log(out) as skips, ExitStack() as stack:
            options: Any = {"max_bytes": max_shard_bytes, "recipe": recipe, "append": append}
            writers = {
                split: stack.enter_context(ShardWriter(path, **options))
                for split, path in folders.items()
            }
            finished = set[int]().union(*(writer.keys for writer in writers.values()))
            resumed = sum(writer.resumed for writer in writers.values())
            appended_to = sum(writer.samples for writer in writers.values()) - resumed
            entries = (
                row
                for row in manifest.entries()
                if isinstance(row, SkippedRow) or text_hash(row.key) not in finished
            )
            # Forked workers: spawned ones would each import torch. Small chunks, because a clip may
            # have tens of megabytes and 2 chunks per worker are in memory.
            read = partial(_read_row, limits=limits)
            rows = parallel_map(read, entries, workers or available_cores(), chunk_size=4)
            stack.enter_context(closing(rows))
            bar = stack.enter_context(progress_bar(progress))
            for row in bar.track(rows, total=row_count - resumed, description="clips"):
                if isinstance(row, SkippedRow):
                    skips.add(row)
                    continue
                entry, clip = row
                annotation = replace(entry.annotation, duration_seconds=clip.seconds)
                writers[entry.split].write(entry.key, clip.suffix, clip.audio, annotation)
            _check_skipped(manifest, skips, row_count, max_skipped_fraction, out / SKIPPED_NAME)
            for split, writer in writers.items():
                if not writer.samples:
                    counts = skips.by_split[split].items()
                    reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
                    raise UserError(
                        f"All rows of {spec.split_by} {split!r} were skipped ({reasons}). Fix "
                        "them, or leave them out with --where."
                    )
            build = {
                "rows": row_count,
                "filtered_rows": manifest.filtered_rows,
                "skipped": dict(skips.counts),
                "split_by": spec.split_by,
            }
            if appended_to:
                build["appended_to"] = appended_to
            for split, writer in writers.items():
                skipped = dict(skips.by_split[split])
                writer.metadata = {"recipe": recipe, "skipped": skipped, "build": build}
    except OSError as error:
        raise UserError(f"Cannot write shards to {out}: {error.strerror or error}.") from None
    indices = {split: open_index(folder) for split, folder in folders.items()}
    return _report(out, folders, indices, resumed=resumed)


def _survey(
    manifest: Manifest, settings: dict[str, Any], unique_keys: bool
) -> tuple[str, int, tuple[str, ...], SkipLog]:
    """Look up all audio files without opening them; return recipe, row count, splits and skips."""
    spec = {name: value for name, value in asdict(manifest.spec).items() if name not in PATHS}
    sizes = [[file.name, file.stat().st_size] for file in manifest.arrow_files]
    digest = sizes or file_sha256(manifest.path)
    content = {"version": RECIPE_VERSION, "spec": spec, "manifest": digest, **settings}
    recipe = hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode())
    rows, splits, skips = 0, {}, SkipLog()
    for rows, row in enumerate(manifest.entries(), 1):  # noqa: B007 (number of rows)
        if isinstance(row, SkippedRow):
            skips.add(row)
            continue
        splits[row.split] = None
        own_id = row.annotation.id
        if unique_keys and (row.key != safe_name(own_id) or own_id == f"row-{row.line}"):
            raise UserError(
                f"Line {row.line} of {manifest.path}: --append recognises clips by their id, and "
                f"{own_id!r} is not one that only this clip has. Add a column `id`."
            )
        try:
            found = row.path.stat()
            recipe.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
            if row.path.suffix[1:].lower() in AV_SUFFIXES:  # skipped until PyAV is installed
                recipe.update(str(find_spec("av") is not None).encode())
        except (OSError, ValueError):
            skips.add(SkippedRow(row.line, str(row.path), SkipReason.MISSING_FILE, split=row.split))
            recipe.update(b"missing\n")
    if not rows:
        first = (f"{name}: {', '.join(manifest.values(name))}" for name in manifest.spec.where)
        listed = f"First values: {'; '.join(first)}"
        raise UserError(f"--where keeps none of the rows of {manifest.path}. {listed}")
    return recipe.hexdigest()[:16], rows, tuple(splits), skips


def _check_skipped(
    manifest: Manifest, skips: SkipLog, rows: int, max_fraction: float, log: Path | None = None
) -> None:
    skipped = skips.counts.total()
    if skipped < rows and skipped <= max_fraction * rows:
        return
    message = f"{skipped} of {rows} rows of {manifest.path} were skipped"
    if skipped < rows:
        message += f", more than the {max_fraction:.0%} that --max-skipped-fraction allows"
    message += f":\n{skips.table()}\n"
    if log:
        message += f"All are listed in {log}. "
    if SkipReason.MISSING_FILE in skips.counts:
        message += f"Relative paths start from {manifest.root}; --audio-root names another folder."
    raise UserError(message.rstrip())


def _build_of(folder: Path) -> dict[str, Any]:
    """Return what the index of a folder says about its build; empty if it was not built here."""
    return read_json(folder / INDEX_NAME, default={}).get("build") or {}


def _check_out(out: Path, folders: dict[str, Path], append_by: str | None) -> None:
    """Check that `out` has no tars that would be lost, and no splits of another kind.

    `append_by` is the column of the splits if clips are added to earlier ones, otherwise None.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"Cannot write shards to {out}: it is a file.")
    for folder in folders.values():
        if next(folder.glob("*.tar"), None) and not _build_of(folder):
            raise UserError(
                f"{folder} holds tars that `data build` did not write. Choose another --out, or "
                "move them away."
            )
        if append_by is None and _build_of(folder).get("appended_to"):
            raise UserError(
                f"{folder} holds clips that were added with --append. Add more with --append, or "
                "delete the folder to build it again."
            )
    for path in sorted([*out.glob(INDEX_NAME), *out.glob(f"*/{INDEX_NAME}")]):
        folder, build = path.parent, _build_of(path.parent)
        is_ours = build and (folder == out or build.get("split_by"))
        other_kind = append_by is not None and build.get("split_by") != append_by
        if is_ours and (folder not in folders.values() or other_kind):
            raise UserError(
                f"{folder} holds shards of an earlier build with other splits. Choose another "
                "--out, or delete them."
            )


def _find_earlier_build(folders: dict[str, Path], recipe: str) -> dict[str, ShardIndex]:
    """Return the indices of a complete earlier build of the same recipe, or an empty dict."""
    indices = {}
    for split, folder in folders.items():
        try:
            indices[split] = index = open_index(folder)
        except UserError:  # nothing was built, or a tar is missing
            return {}
        sizes = [(folder / shard.name).stat().st_size for shard in index.shards]
        if index.metadata.get("recipe") != recipe or sizes != [one.bytes for one in index.shards]:
            return {}
    return indices


def _report(
    out: Path,
    folders: dict[str, Path],
    indices: dict[str, ShardIndex],
    *,
    reused: bool = False,
    resumed: int = 0,
) -> BuildReport:
    metadata = next(iter(indices.values())).metadata
    build = {name: value for name, value in metadata["build"].items() if name != "split_by"}
    return BuildReport(
        out,
        folders,
        clips=sum(index.samples for index in indices.values()),
        seconds=sum(index.seconds for index in indices.values()),
        recipe=metadata["recipe"],
        reused=reused,
        resumed=resumed,
        **build,
    )
