"""The dataset and its loaders: read clips in the sampler's order, decode them, pack batches.

Rank r of R takes every R-th micro-batch, and worker w of W every W-th of those. A worker reads only
its own samples: if a shard has a table, it fetches nothing else; otherwise it reads the tar from
the start and skips over the others. The batches of a rank do not depend on the number of workers.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.annotation import Template
from whisper_aut.data.augment import Augment
from whisper_aut.data.batch import Batch, Example, collate
from whisper_aut.data.filters import licence_id
from whisper_aut.data.reader import DEFAULT_POLICY, ReadPolicy, Sample, SkippedSample
from whisper_aut.data.sampler import Batching, Cursor, Order, batches_from
from whisper_aut.data.shards import ShardIndex, ShardReader
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import SkipSample, UserError


@dataclass
class ExampleBuilder:
    """Turns samples into examples for one decoder.

    Args:
        logmel: computes the features of the encoder.
        codec: makes the tokens of the decoder.
        limits: limits on accepted clips.
        augment: augmentation of training clips; None for validation.
        on_device: return waveforms; `DeviceFeatures` computes and masks the log-mel later.
    """

    logmel: LogMel
    codec: TextCodec
    limits: ClipLimits
    augment: Augment | None = None
    on_device: bool = False

    def __call__(self, sample: Sample, domain: str, position: int) -> Example | SkippedSample:
        """Build one example.

        Args:
            sample: an encoded clip and its annotation.
            domain: domain of the source, for samples that do not state their own.
            position: position of the sample in the order; it seeds all random draws for the sample.

        Returns:
            The example, or a `SkippedSample` if the sample cannot be used.
        """
        domain = sample.annotation.domain or domain
        try:
            # The text comes first: if it is rejected, the expensive audio decoding is not needed.
            target = self.codec.encode(sample.annotation, domain, position)
            waveform = load_waveform(sample.audio, self.limits)
        except SkipSample as refused:
            return SkippedSample(sample.shard, sample.key, refused.reason, refused.detail)
        if self.augment:
            waveform = self.augment.waveform(waveform, position)
        audio = waveform if self.on_device else self.logmel(waveform)
        if self.augment and not self.on_device:
            audio = self.augment.mel(audio, mel_frames(len(waveform)), position)
        return Example(
            audio=audio,
            mel_length=mel_frames(len(waveform)),
            target=target,
            domain=domain,
            key=sample.key,
            source=sample.shard.rsplit("/", 1)[0],
            position=position if self.augment else None,
        )


NOTHING = np.arange(0)


@dataclass(frozen=True)
class StreamSource:
    """A source of clips.

    Attributes:
        index: its shards.
        domain, licence: values for clips that do not state their own.
        text: template that makes a sample's text from its fields; None to use its `text`.
    """

    index: ShardIndex
    domain: str
    licence: str = ""
    text: Template | None = None

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by SPDX id, or by the licence as written if its id is unknown."""
        found: dict[str, dict[str, float]] = {}
        for written, counts in self.index.licences.items():
            written = written or self.licence
            total = found.setdefault(licence_id(written) or written, {"clips": 0, "seconds": 0.0})
            total["clips"] += counts["clips"]
            total["seconds"] = round(total["seconds"] + counts["seconds"], 3)
        return found


class BatchStream(IterableDataset[Batch]):
    """The next `count` micro-batches of one rank after a cursor, in order.

    Args:
        order: the order of clips.
        batching: cuts the order into micro-batches.
        sources: the sources, in the same sequence as in `order`.
        build: turns samples into examples.
        rank, ranks: this rank and the world size; they decide which micro-batches are taken.
        start: cursor at which the micro-batches of all ranks begin.
        end: position at which they end. After it, empty batches make up the rest of `count`, so
            that all ranks take the same number of steps.
        count: number of micro-batches of this rank.
        policy: retries and timeouts for reading shards.
    """

    def __init__(
        self,
        order: Order,
        batching: Batching,
        sources: Sequence[StreamSource],
        build: ExampleBuilder,
        *,
        rank: int = 0,
        ranks: int = 1,
        start: Cursor = Cursor(),  # noqa: B008 — immutable
        end: int | None = None,
        count: int,
        policy: ReadPolicy = DEFAULT_POLICY,
    ):
        self.order, self.batching, self.sources, self.build = order, batching, tuple(sources), build
        self.rank, self.ranks, self.start, self.end, self.count = rank, ranks, start, end, count
        self.shards = ShardReader(build.limits, policy)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = islice(self._steps(), offset, self.count, workers)
        while steps := list(islice(mine, self.batching.span_batches)):
            yield from self._span(steps)

    def _steps(self) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Yield the positions of this rank's micro-batches, without end.

        Each comes with the cursor after the micro-batches that all ranks take in that step.
        """
        row = batches_from(self.batching, self.start, self.end)
        next_cursor = self.start
        while True:
            step = list(islice(row, self.ranks))
            next_cursor = step[-1][1] if step else next_cursor
            yield (step[self.rank][0] if self.rank < len(step) else NOTHING), next_cursor

    def _span(self, steps: Sequence[tuple[np.ndarray, Cursor]]) -> Iterator[Batch]:
        """Yield the given micro-batches and read every window that they touch only once."""
        draws = [self._draws(positions) for positions, _ in steps]
        wanted: dict[tuple[int, int], set[int]] = {}
        for source, number in (draw for batch in draws for draw in batch):
            wanted.setdefault((source, self.order.window(source, number)[0]), set()).add(number)
        opened: dict[tuple[int, int], _Window] = {}
        for (positions, next_cursor), batch in zip(steps, draws, strict=True):
            items = []
            for position, (source, number) in zip(positions.tolist(), batch, strict=True):
                key = (source, self.order.window(source, number)[0])
                if key not in opened:
                    opened[key] = _Window(
                        self.order, source, self.sources[source].index, wanted[key], self.shards
                    )
                items.append(self._example(opened[key].take(number), source, position))
                if opened[key].exhausted:
                    del opened[key]
            yield collate(
                [item for item in items if isinstance(item, Example)],
                [item for item in items if isinstance(item, SkippedSample)],
                self.build.logmel.num_mel_bins,
                next_cursor,
            )

    def _draws(self, positions: np.ndarray) -> list[tuple[int, int]]:
        if not len(positions):
            return []
        start = int(positions[0])
        sources, numbers = self.order.draws(start, int(positions[-1]) + 1)
        return list(
            zip(
                sources[positions - start].tolist(),
                numbers[positions - start].tolist(),
                strict=True,
            )
        )

    def _example(
        self, item: Sample | SkippedSample, source: int, position: int
    ) -> Example | SkippedSample:
        if isinstance(item, SkippedSample):
            return item
        template = self.sources[source].text
        if template:
            item = replace(item, annotation=item.annotation.with_text(template))
        return self.build(item, self.sources[source].domain, position)


class _Window:
    """The encoded samples that a worker needs from one shuffle window, read in one pass."""

    def __init__(
        self, order: Order, source: int, index: ShardIndex, numbers: set[int], reader: ShardReader
    ):
        first, last = order.window(source, min(numbers))
        shards, ordinals = order.locate(source, first, last)
        places = {
            number: (int(shards[number - first]), int(ordinals[number - first]))
            for number in numbers
        }
        self._items = dict(reader.read(places, index))

    @property
    def exhausted(self) -> bool:
        return not self._items

    def take(self, number: int) -> Sample | SkippedSample:
        return self._items.pop(number)


PREFETCH_BATCHES = 4


def batch_loader(stream: BatchStream, workers: int) -> DataLoader[Batch]:
    """Return a DataLoader over a stream; worker processes, if any, prepare batches in advance."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
    )


class RunSegment(NamedTuple):
    """A segment of a run in which all optimizer steps have the same size.

    The total number of steps of a run is counted from its last segment.

    Attributes:
        step: optimizer steps taken before the segment.
        cursor: point in the data at which the segment begins.
    """

    step: int = 0
    cursor: Cursor = Cursor()


class TrainLoader:
    """The training loader. Every iteration over it is one epoch, or what remains of the epoch.

    Args:
        make_stream: returns the stream of this rank for `(start, end, count)`; see `BatchStream`.
        order, batching: the order of clips, and how it is cut into micro-batches.
        steps_per_epoch: optimizer steps per epoch of an endless order. Ignored if the order has
            epochs of its own.
        accumulate: micro-batches per optimizer step.
        ranks: world size.
        workers: worker processes of this rank.
        segment: the current segment, stored in checkpoints.
    """

    def __init__(
        self,
        make_stream: Callable[[Cursor, int | None, int], BatchStream],
        *,
        order: Order,
        batching: Batching,
        steps_per_epoch: int,
        accumulate: int,
        ranks: int,
        workers: int,
        segment: RunSegment = RunSegment(),  # noqa: B008 — immutable
    ):
        self.make_stream, self.order, self.batching = make_stream, order, batching
        self.steps_per_epoch, self.accumulate, self.ranks, self.workers = (
            steps_per_epoch,
            accumulate,
            ranks,
            workers,
        )
        self.segment, self.cursor, self.in_epoch = segment, Cursor(), 0
        # The epoch whose length is cached, and its number of batches.
        self._length: tuple[int, int] = (-1, 0)

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in the current epoch."""
        if not self.order.epoch_clips:
            return self.steps_per_epoch * self.accumulate
        epoch = self._epoch()
        if self._length[0] != epoch:
            begins = epoch * self.order.epoch_clips
            over = self.order.end is not None and begins >= self.order.end
            count = (
                0 if over else self.batching.count(Cursor(begins), begins + self.order.epoch_clips)
            )
            self._length = epoch, self._rows(count)
        return self._length[1]

    def __iter__(self) -> Iterator[Batch]:
        if not self.order.epoch_clips and self.in_epoch >= len(self):
            # A consumer that counts batches may have stopped the last epoch before this generator
            # ended and reset the counter.
            self.in_epoch = 0
        end, count = self._rest()
        batches = iter(batch_loader(self.make_stream(self.cursor, end, count), self.workers))
        while step := list(islice(batches, self.accumulate)):
            supervised = sum(batch.supervised for batch in step)
            for batch in step:
                self.cursor, self.in_epoch = batch.next_cursor, self.in_epoch + 1
                yield replace(batch, supervised_in_step=supervised)
        self.in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes, in plain values."""
        position, taken = self.cursor
        return {
            "position": position,
            "taken": taken,
            "in_epoch": self.in_epoch,
            "order": self.order.fingerprint(),
            "batching": self.batching.fingerprint(),
            "world": [self.ranks, self.accumulate],
            "segment": [self.segment.step, *self.segment.cursor],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where a checkpoint ended.

        The world size, the number of workers and the clips per batch may have changed since.

        Raises:
            UserError: the checkpoint belongs to a different order, or its cursor is inside a chunk
                that was planned with different limits in seconds.
        """
        if state["order"] != self.order.fingerprint():
            raise UserError(
                "The checkpoint was made with other training data, exclusions, shares, seed or "
                "window, so its position means nothing here. "
                "Resume with the config that stands in its run directory, "
                "or start anew from the exported weights."
            )
        if state["taken"] and state["batching"] != self.batching.fingerprint():
            raise UserError(
                "The checkpoint lies among batches that were planned with another "
                "data.batch_seconds or data.max_seconds. Resume "
                "with those that stand in its run directory."
            )
        self.cursor = Cursor(state["position"], state["taken"])
        same_world = state["world"] == [self.ranks, self.accumulate]
        self.in_epoch = state["in_epoch"] % max(1, len(self)) if same_world else 0

    def _rest(self) -> tuple[int | None, int]:
        """Return the end of the current epoch and the micro-batches of this rank until then."""
        if not self.order.epoch_clips:
            return None, len(self) - self.in_epoch
        end = (self._epoch() + 1) * self.order.epoch_clips
        if self.order.end is not None and end > self.order.end:
            return self.order.end, 0  # the last epoch is over
        return end, self._rows(self.batching.count(self.cursor, end))

    def _epoch(self) -> int:
        return self.cursor.position // (self.order.epoch_clips or 1)

    def _rows(self, batches: int) -> int:
        """Return the micro-batches per rank, rounded up to whole optimizer steps.

        Empty batches fill the last step.
        """
        return -(-batches // (self.ranks * self.accumulate)) * self.accumulate


def _outlive_signals(_: int) -> None:
    """Keep a worker alive until its main process ends it.

    Terminals, Slurm and systemd send a signal to all processes. Only the main process decides what
    to do about it, and workers follow.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    # macOS has no `sigwaitinfo`, which tells who sent a signal.
    if main is None or not hasattr(signal, "sigwaitinfo"):
        return
    # Threads that start later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: BaseProcess) -> None:
    """Exit at the first SIGTERM from the main process, or from anyone once that is gone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid and main.is_alive():
        pass
    os._exit(0)
