"""The dataset: read clips in the sampler's order, decode them, collate batches, and count skips.

Rank r of R takes every R-th micro-batch, and worker w of W every W-th of those. The batches of a
rank do not depend on the number of workers. If R × W divides the number of partitions, every
partition belongs to one worker, which reads its windows in large requests.
"""

import json
import math
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from whisper_aut.audio.augment import Augment
from whisper_aut.audio.decode import ClipLimits, LongClips, load_waveform
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.annotation import AUDIO_ONLY, Annotation
from whisper_aut.data.batch import Batch, Example, collate
from whisper_aut.data.filters import licence_id
from whisper_aut.data.reader import Sample, SkippedSample, is_local
from whisper_aut.data.sampler import Batching, Cursor, MicroBatch, MixedPadding, Order, batches_from
from whisper_aut.data.shards import UNKNOWN_BYTES, FolderCounts, ShardIndex, ShardReader
from whisper_aut.data.targets import LossSettings, PartOfClip, TextCodec, choose_part
from whisper_aut.errors import SkipReason, SkipSample, UserError

NO_CLIPS = MicroBatch(0, ())
ClipId = tuple[int, int, int]  # partition, source, and running number; see `Order.draws`
READ_THREADS = 8
# How far a worker reads ahead of the batch that it decodes.
AHEAD_BYTES, AHEAD_BATCHES = 256 << 20, 64
PREFETCH_BATCHES = 4
NOISE_LIMITS = ClipLimits(min_seconds=0.1, max_seconds=60.0)


@dataclass
class ExampleBuilder:
    """Turns samples into examples for one decoder.

    Args:
        logmel: computes the features of the encoder.
        codec: makes the tokens of the decoder.
        limits: limits on accepted clips.
        augment: augmentation of training clips; None for validation.
        long_clips: what to do with clips that are longer than `limits`, see `targets.choose_part`.
        domains: the domains of the run, which rejects samples of any other; empty for all.
        on_device: return waveforms; `DeviceFeatures` computes and masks the log-mel later.
        padding: draws the training clips that the encoder pads to 30 s.
        loss: weights of training clips in the loss.
    """

    logmel: LogMel
    codec: TextCodec
    limits: ClipLimits
    augment: Augment | None = None
    on_device: bool = False
    long_clips: LongClips = "skip"
    padding: MixedPadding | None = None
    loss: LossSettings | None = None
    domains: Sequence[str] = ()

    def __call__(self, sample: Sample, domain: str, position: int) -> Example | SkippedSample:
        """Build one example, or return a `SkippedSample` if the sample cannot be used.

        `domain` is that of the source, for samples that do not state their own. The position of
        the sample in the order seeds all random draws for it.
        """
        annotation, max_seconds = sample.annotation, self.limits.max_seconds
        domain = annotation.domain or domain
        try:
            if self.domains and domain not in self.domains:
                raise SkipSample(
                    SkipReason.BAD_JSON,
                    f"domain {domain!r} is not one of {', '.join(self.domains)}: name it in "
                    "data.domains, or ignore the field with fields: {domain: ''}",
                )
            # The text comes first: if it is rejected, the expensive audio decoding is not needed.
            if self.augment:
                annotation = annotation.draw_text(position)
            annotation, part = choose_part(
                self.long_clips, annotation, domain, position, max_seconds
            )
            target = self.codec.encode(annotation, domain, position)
            if self.loss:
                target = replace(target, weight=self.loss.weight(target, domain))
            if not self.augment and len(annotation.texts) > 1:
                target = replace(target, references=self._references(annotation, domain, position))
            waveform = load_waveform(sample.audio, self.limits, part)
        except SkipSample as skip:
            return SkippedSample(sample.shard, sample.key, skip.reason, skip.detail)
        if self.augment:
            waveform = self.augment.waveform(waveform, position)
        mel_length = mel_frames(len(waveform))
        audio = waveform if self.on_device else self.logmel(waveform)
        if self.augment and not self.on_device:
            audio = self.augment.mel(audio, mel_length, position)
        return Example(
            audio=audio,
            mel_length=mel_length,
            target=target,
            domain=domain,
            key=sample.key,
            source=_folder_of(sample.shard),
            position=position if self.augment else None,
            is_cut=part is not None and part.is_cut,
            is_padded=self.padding is not None and self.padding(position),
        )

    def _references(self, annotation: Annotation, domain: str, position: int) -> tuple[str, ...]:
        """Return the answer that each of several texts of a clip gives."""
        found = []
        for text in annotation.texts:
            with suppress(SkipSample):
                one = self.codec.encode(replace(annotation, text=text), domain, position)
                found.append(one.text)
        return tuple(dict.fromkeys(found))


class ShardNoise:
    """Draws recordings of noise from shards with sample tables, for `Augment`."""

    def __init__(self, indexes: Sequence[ShardIndex]):
        self.indexes = tuple(replace(index, mapping=AUDIO_ONLY) for index in indexes)
        self.reader = ShardReader(NOISE_LIMITS)

    def __call__(self, random: np.random.Generator) -> Tensor | None:
        """Return a recording `[S]` at 16 kHz, or a minute of it; None if it cannot be used."""
        sizes = np.array([index.samples for index in self.indexes])
        index = self.indexes[int(random.choice(len(sizes), p=sizes / sizes.sum()))]
        ends = np.cumsum(index.shard_samples)
        number = int(random.integers(ends[-1]))
        shard = int(np.searchsorted(ends, number, side="right"))
        location = (shard, number - int(ends[shard] - index.shard_samples[shard]))
        item = self.reader.read(index, {0: location})[0]
        try:
            part = PartOfClip(NOISE_LIMITS.max_seconds, crop=random.random())
            is_read = isinstance(item, Sample)
            return load_waveform(item.audio, NOISE_LIMITS, part) if is_read else None
        except SkipSample:
            return None


@dataclass(frozen=True)
class StreamSource:
    """A source of clips. Its domain and licence are for clips that do not state their own."""

    index: ShardIndex
    domain: str
    licence: str = ""

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by SPDX id, or by the licence as written if its id is unknown."""
        found = FolderCounts()
        for written, total in self.index.licences.items():
            written = written or self.licence
            licence = licence_id(written) or written
            found.add(self.domain, licence, total["seconds"], int(total["clips"]))
        return found.metadata()["licences"]


FIT_CLIPS = 64


def fit_tokens(source: StreamSource, build: ExampleBuilder) -> tuple[float, float]:
    """Fit the tokens of a source's first clips to their `Annotation.text_bytes`.

    The line is moved up so that no clip is above it.

    Returns:
        Tokens per text byte, and tokens of a clip without text.

    Raises:
        UserError: the table or the clips cannot be read, or the table is of an earlier version.
    """
    index, shard = source.index, source.index.first_shard
    locations = {n: (shard, n) for n in range(min(FIT_CLIPS, index.shard_samples[shard]))}
    try:
        text_bytes = index.table(shard).text_bytes[index.ordinals(shard)]
        if (text_bytes == UNKNOWN_BYTES).any():
            raise ValueError("its table does not have the lengths of texts")
        points = []
        for n, item in ShardReader(build.limits).read(index, locations).items():
            if isinstance(item, SkippedSample):
                if item.reason == SkipReason.BAD_TAR:
                    raise OSError(item.detail)
                continue
            texts = item.annotation.texts
            annotation = replace(item.annotation, text=max(texts, key=len, default=""))
            with suppress(SkipSample):
                target = build.codec.encode(annotation, annotation.domain or source.domain, n)
                points.append((int(text_bytes[n]), len(target.tokens)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{index.url(shard)}: {error}. data.batch_tokens predicts tokens from the tables and "
            f"the first clips. Write the tables again: whisper-aut data index {index.root}"
        ) from None
    x, y = np.array(points or [(0, 0)], np.float64).T
    slope = max(0.0, float(np.polyfit(x, y, 1)[0])) if x.std() else 0.0
    return round(slope, 4), math.ceil((y - round(slope, 4) * x).max())


class Prefetcher:
    """Reads the clips of coming micro-batches in threads, while earlier ones are decoded.

    Args:
        stream: the stream that the clips are for.
        whole_windows: read windows of remote sources as a whole, because all their clips are for
            this worker; otherwise, and on disks, read the clips of one batch at a time.
    """

    def __init__(self, stream: "BatchStream", whole_windows: bool):
        self.order, self.sources, self.reader = stream.order, stream.sources, stream.reader
        self.pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self.whole_windows = [
            whole_windows and not is_local(source.index.tars) for source in stream.sources
        ]
        self._reads: dict[ClipId, Future[dict[int, Sample | SkippedSample]]] = {}
        # The reads of which no clip has been taken yet, with their approximate bytes.
        self._ahead: dict[Future[dict[int, Sample | SkippedSample]], float] = {}
        # The clips before the start of the stream, which belong to windows that are read again.
        self._position, taken = stream.start
        before = stream.batching.chunk(self._position)[0][:taken] if taken else []
        self._taken = {clip for batch in before for clip in stream.clips_of(batch)}

    @property
    def is_full(self) -> bool:
        """Whether enough is being read ahead."""
        return sum(self._ahead.values()) >= AHEAD_BYTES

    def request(self, clips: Iterable[ClipId]) -> None:
        """Begin to read clips."""
        windows: dict[ClipId, list[int]] = {}
        for partition, source, number in clips:
            if (partition, source, number) not in self._reads:
                first, _ = self.order.window(partition, source, number)
                windows.setdefault((partition, source, first), []).append(number)
        for (partition, source, first), numbers in windows.items():
            if self.whole_windows[source]:
                drawn = int(self.order.draw_counts(partition, self._position)[source])
                last = self.order.window(partition, source, numbers[0])[1]
                numbers = range(max(first, drawn), last)
            clips = [(partition, source, number) for number in numbers]
            clips = [clip for clip in clips if clip not in self._taken]
            read = self.pool.submit(self._read, clips)
            self._ahead[read] = len(clips) * self.sources[source].index.sample_bytes
            self._reads.update(dict.fromkeys(clips, read))

    def take(self, clip: ClipId) -> Sample | SkippedSample:
        """Return a clip that was requested, once."""
        read = self._reads.pop(clip)
        self._ahead.pop(read, None)
        return read.result().pop(clip[2])

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, clips: Sequence[ClipId]) -> dict[int, Sample | SkippedSample]:
        """Read clips of one window."""
        partition, source, number = clips[0]
        first, last = self.order.window(partition, source, number)
        shards, ordinals = self.order.locate(partition, source, first, last)
        locations = {
            number: (int(shards[number - first]), int(ordinals[number - first]))
            for *_, number in clips
        }
        return self.reader.read(self.sources[source].index, locations)


@dataclass(eq=False)
class BatchStream(IterableDataset[Batch]):
    """The next `count` micro-batches of one rank after a cursor, in order.

    Args:
        order: the order of clips.
        batching: cuts the order into micro-batches.
        sources: the sources, in the same sequence as in `order`.
        build: turns samples into examples.
        count: number of micro-batches of this rank.
        rank, ranks: this rank and the world size; they decide which micro-batches are taken.
        start: cursor at which the micro-batches of all ranks begin.
        end: position at which they end. After it, empty batches make up the rest of `count`, so
            that all ranks take the same number of steps.
    """

    order: Order
    batching: Batching
    sources: Sequence[StreamSource]
    build: ExampleBuilder
    count: int
    rank: int = 0
    ranks: int = 1
    start: Cursor = Cursor()  # noqa: RUF009 — immutable
    end: int | None = None

    def __post_init__(self) -> None:
        self.reader = ShardReader(self.build.limits)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        steps = islice(self._steps(), offset, self.count, workers)
        prefetcher = Prefetcher(self, self.order.partitions % (self.ranks * workers) == 0)
        ahead: deque[tuple[MicroBatch, list[ClipId], Cursor]] = deque()
        try:
            while True:
                while not ahead or (len(ahead) < AHEAD_BATCHES and not prefetcher.is_full):
                    if (step := next(steps, None)) is None:
                        break
                    clips = self.clips_of(step[0])
                    prefetcher.request(clips)
                    ahead.append((step[0], clips, step[1]))
                if not ahead:
                    return
                batch, clips, next_cursor = ahead.popleft()
                yield self._collate(batch, clips, prefetcher, next_cursor)
        finally:
            prefetcher.close()

    def _steps(self) -> Iterator[tuple[MicroBatch, Cursor]]:
        """Yield this rank's micro-batches, without end.

        Each comes with the cursor after the micro-batches that all ranks take in that step.
        """
        batches = batches_from(self.batching, self.start, self.end)
        next_cursor = self.start
        while True:
            step = list(islice(batches, self.ranks))
            next_cursor = step[-1][1] if step else next_cursor
            yield (step[self.rank][0] if self.rank < len(step) else NO_CLIPS), next_cursor

    def clips_of(self, batch: MicroBatch) -> list[ClipId]:
        """Return the clips of a micro-batch."""
        partition, positions = batch
        if not len(positions):
            return []
        start = int(positions[0])
        sources, numbers = self.order.draws(partition, start, int(positions[-1]) + 1)
        chosen = np.asarray(positions) - start
        draws = zip(sources[chosen].tolist(), numbers[chosen].tolist(), strict=True)
        return [(partition, source, number) for source, number in draws]

    def _collate(
        self, batch: MicroBatch, clips: list[ClipId], prefetcher: Prefetcher, next_cursor: Cursor
    ) -> Batch:
        examples: list[Example] = []
        skipped: list[SkippedSample] = []
        for position, clip in zip(batch.positions, clips, strict=True):
            number = self.order.clip_number(batch.partition, int(position))
            item = prefetcher.take(clip)
            if isinstance(item, Sample):
                item = self.build(item, self.sources[clip[1]].domain, number)
            if isinstance(item, Example):
                examples.append(item)
            else:
                skipped.append(item)
        return collate(examples, skipped, self.build.logmel.num_mel_bins, next_cursor)


def batch_loader(stream: BatchStream, workers: int) -> DataLoader[Batch]:
    """Return a DataLoader over a stream; worker processes, if any, prepare batches in advance."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_main,
    )


def _leave_signals_to_main(_: int) -> None:
    """Keep a worker alive until its main process ends it.

    Terminals, Slurm and systemd send a signal to all processes. Only the main process decides what
    to do about it, and workers follow.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    # macOS has no `sigwaitinfo`, which reports the sender of a signal.
    if main is None or not hasattr(signal, "sigwaitinfo"):
        return
    # Threads that start later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_exit_with_main, args=(main,), daemon=True).start()


def _exit_with_main(main: BaseProcess) -> None:
    """Exit at the first SIGTERM from the main process, or from anyone once that is gone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid and main.is_alive():
        pass
    os._exit(0)


MIN_SEEN = 200  # with fewer samples, the skipped fraction of a source is not reliable
MIN_SEEN_AT_END = 20  # lower at the end of a run, because small sources may have few samples
MAX_LINES = 100_000
ByReason = Counter[tuple[str, str]]  # (source, reason) → samples


@dataclass
class Counts:
    """Numbers of samples by source folder."""

    # Training samples, including skipped ones but not those that the config filters out.
    read: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)  # of which only a part was used
    skipped: ByReason = field(default_factory=Counter)
    skipped_in_validation: ByReason = field(default_factory=Counter)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(counts + vars(other)[name] for name, counts in vars(self).items()))

    @property
    def all_skipped(self) -> ByReason:
        """Skipped samples of training and validation together."""
        return self.skipped + self.skipped_in_validation

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain dictionaries, for a checkpoint."""
        return {
            "read": dict(self.read),
            "cut": dict(self.cut),
            "skipped": by_source(self.skipped),
            "skipped_in_validation": by_source(self.skipped_in_validation),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Counts":
        """Restore counts from `state_dict`."""

        def by_reason(name: str) -> ByReason:
            sources = state[name].items()
            return Counter({(one, why): n for one, found in sources for why, n in found.items()})

        skips = by_reason("skipped"), by_reason("skipped_in_validation")
        return cls(Counter(state["read"]), Counter(state["cut"]), *skips)


class Ledger:
    """Counts skipped samples and writes each one to a JSON Lines file.

    A run stops if too large a fraction of a source is skipped, because it would no longer train on
    the data of its config. A process stops writing, but not counting, after about `MAX_LINES`
    skipped samples.

    Args:
        path: the file; None to count only.
        max_fraction: the fraction of a source's samples that may be skipped.

    Attributes:
        earlier: counts of the run before this process started, summed over all ranks.
        validated: whether the run has completed and recorded a validation.
    """

    def __init__(self, path: Path | None, max_fraction: float = 1.0):
        self.path, self.max_fraction = path, max_fraction
        self.earlier, self.validated = Counts(), False
        self._own = Counts()
        self._file: TextIO | None = None

    def record(
        self, sources: Iterable[str], skipped: Sequence[SkippedSample], cut: Iterable[str] = ()
    ) -> None:
        """Count the clips of one training batch and its skips.

        Args:
            sources: source folder of each clip.
            skipped: the samples that were skipped.
            cut: source folder of each clip of which only a part was used.
        """
        self._own.read.update(sources)
        self._own.cut.update(cut)
        for sample in skipped:
            source = _folder_of(sample.shard)
            self._own.read[source] += 1
            self._own.skipped[source, str(sample.reason)] += 1
            self.note(sample)

    def record_validation(self, skipped: Sequence[SkippedSample]) -> None:
        """Count the skipped samples of a validation batch; `max_fraction` does not apply."""
        for sample in skipped:
            self._own.skipped_in_validation[_folder_of(sample.shard), str(sample.reason)] += 1
            self.note(sample)

    def note(self, sample: SkippedSample) -> None:
        """Write a line without counting it, as for a clip that caused trouble in training."""
        if self.path is None or self._own.all_skipped.total() > MAX_LINES:
            return
        if self._file is None:
            # File names may contain bytes that are not UTF-8.
            options = {"encoding": "utf-8", "errors": "backslashreplace"}
            self._file = self.path.open("a", buffering=1, **options)
        self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def resume(self, earlier: Counts, validated: bool) -> None:
        """Restore the counts that a checkpoint saved.

        Does nothing if this process has already counted samples, as after a rewind: a rewind reads
        no sample twice.
        """
        if not self._own.read:
            self.earlier, self.validated = earlier, validated

    @property
    def counts(self) -> Counts:
        """The counts of this rank in this process.

        An interrupted validation is left out. It is repeated after resuming and counted then.
        """
        own = self._own
        return own if self.validated else Counts(own.read, own.cut, own.skipped)

    def check(self, counts: Counts, *, at_end: bool = False) -> None:
        """Check that no source exceeds `max_fraction`.

        Args:
            counts: counts of the whole run, summed over all ranks.
            at_end: whether the run has ended. Then sources with few samples are checked too, and
                sources with any number of samples if all of them were skipped.

        Raises:
            UserError: more than `max_fraction` of a source's samples were skipped.
        """
        by_reason = by_source(counts.skipped)
        for source, read in counts.read.items():
            reasons = Counter(by_reason.get(source, {}))
            skipped = reasons.total()
            enough = read >= (MIN_SEEN_AT_END if at_end else MIN_SEEN)
            if skipped > self.max_fraction * read and (enough or (at_end and skipped == read)):
                listed = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common())
                where = f" See {self.path.parent}/ledger*.jsonl." if self.path else ""
                raise UserError(
                    f"{skipped} of {read} samples of {source} were skipped ({listed}); "
                    f"data.max_skipped_fraction allows {self.max_fraction:.1%}.{where} "
                    "Fix the source, or raise data.max_skipped_fraction."
                )

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def by_source(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Nest counts by source, then by reason, as stored in files."""
    result: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(counts.items()):
        result.setdefault(source, {})[reason] = count
    return result


def _folder_of(shard: str) -> str:
    return shard.rsplit("/", 1)[0]
