"""Order → batches: reads from the shards what the order asks for, decodes it, packs it.

In: an `Order` cut into micro-batches by a `Batching`, the shards it ranges over, an `ExampleBuilder`. Out: one `Batch` per micro-batch
of this rank, the same whatever the number of workers. Next: `data.loader` hands it to the Trainer. Rank r of R takes every R-th
micro-batch, worker w of W every W-th of those, and reads only the samples of its own: by the shard's table single samples, without
one by skipping over the others.
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
from whisper_aut.data.batch import Batch, Example, pack
from whisper_aut.data.filters import licence_id
from whisper_aut.data.reader import Refusal, Sample, ShardReader
from whisper_aut.data.remote import DEFAULT_POLICY, ReadPolicy
from whisper_aut.data.sampler import Batching, Cursor, Order, batches_from
from whisper_aut.data.shards import ShardIndex
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import SampleRefused, UserError


@dataclass
class ExampleBuilder:
    """Turns samples into examples for one decoder.

    Args:
        logmel: the features of the encoder.
        codec: the tokens of the decoder.
        limits: what clips are taken.
        augment: what is done to them; None for validation.
        on_device: leave the log-mel, and its masks, to `data.features`.
    """

    logmel: LogMel
    codec: TextCodec
    limits: ClipLimits
    augment: Augment | None = None
    on_device: bool = False

    def __call__(self, sample: Sample, domain: str, position: int) -> Example | Refusal:
        """Build one example.

        Args:
            domain: the source's, for samples that do not say their own.
            position: of the sample in the order of the run; what is drawn for it is drawn by this.
        """
        domain = sample.annotation.domain or domain
        try:
            target = self.codec.encode(
                sample.annotation, domain, position
            )  # first: it is cheap, and decoding is not
            waveform = load_waveform(sample.audio, self.limits)
        except SampleRefused as refused:
            return Refusal(sample.shard, sample.key, refused.reason, refused.detail)
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
    """Shards, and the domain and licence of clips that do not state their own."""

    index: ShardIndex
    domain: str
    licence: str = ""
    text: Template | None = None  # over the fields of a sample that holds its text elsewhere

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by SPDX id, or as written where that is unknown."""
        found: dict[str, dict[str, float]] = {}
        for written, counts in self.index.licences.items():
            written = written or self.licence
            total = found.setdefault(licence_id(written) or written, {"clips": 0, "seconds": 0.0})
            total["clips"] += counts["clips"]
            total["seconds"] = round(total["seconds"] + counts["seconds"], 3)
        return found


class BatchStream(IterableDataset[Batch]):
    """The next `count` micro-batches of one rank behind a cursor, in order.

    Args:
        order: what comes when.
        batching: how it is cut into micro-batches.
        sources: the shards, in the order's numbering.
        build: sample → example.
        rank, ranks: which of the micro-batches are taken.
        start: where the row of micro-batches begins, for all ranks.
        end: the position where it ends; what the count still lacks then is empty batches, so that all ranks step alike.
        count: micro-batches of this rank.
        policy: how patiently shards are read.
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
        """Yield this rank's positions of every micro-batch, and the cursor behind what all ranks take of the row meanwhile."""
        row = batches_from(self.batching, self.start, self.end)
        behind = self.start
        while True:
            step = list(islice(row, self.ranks))
            behind = step[-1][1] if step else behind
            yield (step[self.rank][0] if self.rank < len(step) else NOTHING), behind

    def _span(self, steps: Sequence[tuple[np.ndarray, Cursor]]) -> Iterator[Batch]:
        """Yield the given micro-batches; every window that they touch is read once."""
        draws = [self._draws(positions) for positions, _ in steps]
        wanted: dict[tuple[int, int], set[int]] = {}
        for source, number in (draw for batch in draws for draw in batch):
            wanted.setdefault((source, self.order.window(source, number)[0]), set()).add(number)
        opened: dict[tuple[int, int], _Window] = {}
        for (positions, behind), batch in zip(steps, draws, strict=True):
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
            yield pack(
                [item for item in items if isinstance(item, Example)],
                [item for item in items if isinstance(item, Refusal)],
                self.build.logmel.num_mel_bins,
                behind,
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

    def _example(self, item: Sample | Refusal, source: int, position: int) -> Example | Refusal:
        if isinstance(item, Refusal):
            return item
        template = self.sources[source].text
        if template:
            item = replace(item, annotation=item.annotation.told_by(template))
        return self.build(item, self.sources[source].domain, position)


class _Window:
    """The encoded samples of one shuffle window that a worker needs, read in one pass over the shards it spans."""

    def __init__(
        self, order: Order, source: int, index: ShardIndex, numbers: set[int], reader: ShardReader
    ):
        first, last = order.window(source, min(numbers))
        shards, ordinals = order.places(source, first, last)
        places = {
            number: (int(shards[number - first]), int(ordinals[number - first]))
            for number in numbers
        }
        self._items = dict(reader.read(places, index))

    @property
    def exhausted(self) -> bool:
        return not self._items

    def take(self, number: int) -> Sample | Refusal:
        return self._items.pop(number)


PREFETCH_BATCHES = 4


def batch_loader(stream: BatchStream, workers: int) -> DataLoader[Batch]:
    """Return a DataLoader over a stream; with workers, batches are decoded ahead in processes of their own."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
    )


class Stretch(NamedTuple):
    """Steps of one size: behind which optimiser step they begin, and where in the data. The steps of a whole run are counted by it."""

    step: int = 0
    cursor: Cursor = Cursor()


class TrainLoader:
    """One epoch after another of the training stream.

    Args:
        make_stream: `(start, end, count)` → stream of this rank; see `BatchStream`.
        order, batching: what the stream reads and how it is cut.
        steps_per_epoch: optimiser steps of an epoch of an endless order, where epochs are nothing but a length; an order that
            has epochs of its own decides itself.
        accumulate: micro-batches per optimiser step.
        ranks: processes that share each row of micro-batches.
        workers: decoding processes.
        stretch: the present one, for checkpoints.
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
        stretch: Stretch = Stretch(),  # noqa: B008 — immutable
    ):
        self.make_stream, self.order, self.batching = make_stream, order, batching
        self.steps_per_epoch, self.accumulate, self.ranks, self.workers = (
            steps_per_epoch,
            accumulate,
            ranks,
            workers,
        )
        self.stretch, self.cursor, self.in_epoch = stretch, Cursor(), 0
        self._length: tuple[int, int] = (-1, 0)  # of which epoch, and how many batches

    def __len__(self) -> int:
        """Micro-batches of this rank in the epoch that the cursor stands in."""
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
            self.in_epoch = (
                0  # who counted the batches of the last epoch need not have asked for one more
            )
        end, count = self._rest()
        batches = iter(batch_loader(self.make_stream(self.cursor, end, count), self.workers))
        while step := list(islice(batches, self.accumulate)):
            supervised = sum(batch.supervised for batch in step)
            for batch in step:
                self.cursor, self.in_epoch = batch.behind, self.in_epoch + 1
                yield replace(batch, supervised_in_step=supervised)
        self.in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        position, taken = self.cursor
        return {
            "position": position,
            "taken": taken,
            "in_epoch": self.in_epoch,
            "order": self.order.fingerprint(),
            "batching": self.batching.fingerprint(),
            "world": [self.ranks, self.accumulate],
            "stretch": [self.stretch.step, *self.stretch.cursor],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stands, whatever the ranks, workers and clips a batch were that wrote it.

        Raises:
            UserError: it stands in another order, or inside a chunk that was planned with another budget of seconds.
        """
        if state["order"] != self.order.fingerprint():
            raise UserError(
                "The checkpoint was made with other training data, exclusions, shares, seed or window, "
                "so its position means nothing here. "
                "Resume with the config that stands in its run directory, or start anew from the exported weights."
            )
        if state["taken"] and state["batching"] != self.batching.fingerprint():
            raise UserError(
                "The checkpoint lies among batches that were planned with another data.batch_seconds or data.max_seconds. Resume "
                "with those that stand in its run directory."
            )
        self.cursor = Cursor(state["position"], state["taken"])
        same_world = state["world"] == [self.ranks, self.accumulate]
        self.in_epoch = state["in_epoch"] % max(1, len(self)) if same_world else 0

    def _rest(self) -> tuple[int | None, int]:
        """Return where the epoch ends that the cursor stands in, and how many micro-batches this rank has until then."""
        if not self.order.epoch_clips:
            return None, len(self) - self.in_epoch
        end = (self._epoch() + 1) * self.order.epoch_clips
        if self.order.end is not None and end > self.order.end:
            return self.order.end, 0  # the last epoch is over
        return end, self._rows(self.batching.count(self.cursor, end))

    def _epoch(self) -> int:
        return self.cursor.position // (self.order.epoch_clips or 1)

    def _rows(self, batches: int) -> int:
        """Share micro-batches out to ranks in whole optimiser steps; what is lacking will be empty batches."""
        return -(-batches // (self.ranks * self.accumulate)) * self.accumulate


def _outlive_signals(_: int) -> None:
    """Leave it to the main process what happens: terminals, Slurm and systemd send a signal to all processes, workers only follow."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main is None or not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by all threads to come
    Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: BaseProcess) -> None:
    """End this process at the first SIGTERM that its main process sends, or that comes when that one is gone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid and main.is_alive():
        pass
    os._exit(0)
