"""Audio files on disk → checked bytes for a shard, by several processes, in the order of the manifest.

In: `Entry` items of `corpora.manifest`. Out: `Ingested` clips, or the `RefusedRow` that says why there is none. Next:
`corpora.build` writes them. What is FLAC, WAV, Ogg, Opus or MP3 passes through byte for byte; what else libsndfile reads (AIFF,
AU, CAF, W64, …), and what is cut out of a longer file, becomes FLAC, or WAV where the samples are floats, at its own rate and
without loss. More than two channels are mixed down then, since another format orders them otherwise;
Vorbis, Opus and MP3 decode to floats beyond full scale, which are clipped to 16 bits.
"""

import io
import os
import signal
import stat
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import soundfile

from whisper_aut.corpora.audio import ClipLimits, channel_layout, decode, mix_down, opened_recording
from whisper_aut.corpora.manifest import Entry, RefusedRow, Segment
from whisper_aut.errors import Reason, SampleRefused, UserError

SUFFIX_OF_FORMAT = {"FLAC": "flac", "WAV": "wav", "WAVEX": "wav", "OGG": "ogg", "MP3": "mp3"}
LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")
HEAD_BYTES = 4096  # that tell a file's layout of channels
MAX_FLAC_RATE_HZ = 655_350
BATCH_FILES = 32
BATCH_BYTES = 8 << 20  # of encoded audio that one message between processes carries
ROUNDING_SECONDS = 0.1  # that the end of a segment may lie behind the end of its file


@dataclass(frozen=True)
class EncodedClip:
    """One clip as a shard holds it; `suffix` names the kind of `audio`."""

    audio: bytes
    suffix: str
    seconds: float


@dataclass(frozen=True)
class Ingested:
    """An entry of the manifest with its audio."""

    entry: Entry
    clip: EncodedClip


Batch = list[Entry | RefusedRow]
Job = tuple[Path, Segment | None]
Outcome = EncodedClip | SampleRefused


def ingest(
    entries: Iterable[Entry | RefusedRow], limits: ClipLimits, workers: int
) -> Generator[Ingested | RefusedRow]:
    """Read and check the audio of all entries; one item comes out per item that goes in, in the same order.

    Raises:
        UserError: a worker process died, which is more than a decoder's error.
    """
    if workers == 1:
        for batch in _batches(entries):
            yield from _settle(batch, _read_batch(_jobs(batch), limits))
        return
    # Linux forks: starting afresh would import torch in every worker. They only decode, no thread's lock is theirs.
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
    """Read one file, or a segment of it, check that it decodes within the limits, and return what a shard should hold of it.

    Raises:
        SampleRefused: missing or not a file, a segment that is not in it, or refused by `corpora.audio.decode`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block for ever
            raise SampleRefused(Reason.MISSING_FILE, "not a file")
        if segment:
            return _cut(path, segment, limits)
        if found.st_size > limits.max_bytes:
            raise SampleRefused(
                Reason.TOO_LARGE, f"{found.st_size} bytes, limit {limits.max_bytes}"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file system could hold
        detail = error.strerror if isinstance(error, OSError) else None
        raise SampleRefused(Reason.MISSING_FILE, detail or str(error)) from None
    clip = decode(data, limits)
    kind, _, subtype = clip.codec.partition("/")
    if kind not in SUFFIX_OF_FORMAT:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return EncodedClip(*_encode(_native(file, -1, data), file.samplerate), clip.seconds)
    is_opus = subtype == "OPUS" and path.suffix.lower() == ".opus"
    return EncodedClip(data, "opus" if is_opus else SUFFIX_OF_FORMAT[kind], clip.seconds)


def _cut(path: Path, segment: Segment, limits: ClipLimits) -> EncodedClip:
    """Read a segment and nothing else of its file, which may be hours long."""
    with opened_recording(path) as file:
        rate, there = file.samplerate, file.frames / file.samplerate
        end = there if segment.seconds is None else segment.start_seconds + segment.seconds
        if segment.start_seconds >= there or end > there + ROUNDING_SECONDS:
            raise SampleRefused(
                Reason.BAD_ROW,
                f"a segment from {segment.start_seconds:g} to {end:g} s of a file that ends at {there:g} s",
            )
        start = round(segment.start_seconds * rate)
        file.seek(start)
        wanted = min(
            round(end * rate) - start, round((limits.max_seconds + 1) * rate)
        )  # enough to know that it is too long
        with path.open("rb") as head:
            samples = _native(file, wanted, head.read(HEAD_BYTES))
    data, suffix = _encode(samples, rate)
    return EncodedClip(data, suffix, decode(data, limits).seconds)


def _native(file: soundfile.SoundFile, frames: int, head: bytes) -> np.ndarray:
    """Read samples as the file holds them: int16, int32 or float32. `head` are its first bytes."""
    if file.channels > 2:
        return mix_down(file.read(frames, dtype="float32"), channel_layout(file, head))
    if file.subtype in ("FLOAT", "DOUBLE"):
        return file.read(frames, dtype="float32")
    if file.subtype in LOSSY:  # read as integers they would wrap round: +1.0 becomes -1.0
        samples = file.read(frames, dtype="float32")
        return np.clip(np.rint(samples * 2.0**15), -(2**15), 2**15 - 1).astype(np.int16)
    # Integers are read as integers: libsndfile's scales for reading and for writing floats differ by one step.
    return file.read(
        frames, dtype="int32" if file.subtype.endswith(("20", "24", "32")) else "int16"
    )


def _encode(samples: np.ndarray, rate: int) -> tuple[bytes, str]:
    """Return samples as FLAC, or as WAV where FLAC cannot hold them, and the suffix."""
    fits_flac = samples.dtype != np.float32 and rate <= MAX_FLAC_RATE_HZ
    depth = {"float32": "FLOAT", "int32": "PCM_24", "int16": "PCM_16"}[samples.dtype.name]
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, subtype=depth, format="FLAC" if fits_flac else "WAV")
    return encoded.getvalue(), "flac" if fits_flac else "wav"


def _batches(entries: Iterable[Entry | RefusedRow]) -> Iterator[Batch]:
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
    """Bytes of a file; 0 where there is none."""
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
        except SampleRefused as refused:
            outcomes.append(refused)
    return outcomes


def _result(batch: Batch, future: "Future[list[Outcome]]") -> Iterator[Ingested | RefusedRow]:
    try:
        outcomes = future.result()
    except BrokenProcessPool:
        lines = f"lines {batch[0].line} to {batch[-1].line}"
        raise UserError(
            f"A worker process died, probably while it read an audio file of {lines} of the manifest, or for want of memory. "
            "Run with --workers 1 to find the file, and leave its row out."
        ) from None
    yield from _settle(batch, outcomes)


def _settle(batch: Batch, outcomes: Sequence[Outcome]) -> Iterator[Ingested | RefusedRow]:
    remaining = iter(outcomes)
    for item in batch:
        if isinstance(item, RefusedRow):
            yield item
            continue
        outcome = next(remaining)
        if isinstance(outcome, EncodedClip):
            yield Ingested(item, outcome)
        else:
            yield RefusedRow(item.line, str(item.path), outcome.reason, outcome.detail, item.split)


def obey_parent() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the parent's to handle: one message, not one per worker
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()  # a parent that was killed cannot stop its pool, whose workers would wait for work for ever
        os._exit(1)
