"""The LightningDataModule: training and validation loaders in which all ranks take equal steps."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch

from whisper_aut.audio.augment import Augment
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel, mel_frames
from whisper_aut.data.batch import Batch
from whisper_aut.data.dataset import (
    BatchStream,
    ExampleBuilder,
    StreamSource,
    batch_loader,
    fit_tokens,
)
from whisper_aut.data.reader import is_local
from whisper_aut.data.sampler import (
    ByClips,
    BySeconds,
    Cursor,
    EpochOrder,
    MixedPadding,
    MixtureOrder,
    SequentialOrder,
    SourceShape,
    TokenLimit,
)
from whisper_aut.data.targets import LossSettings
from whisper_aut.errors import UserError

log = logging.getLogger(__name__)
MIN_FULLNESS = 0.8  # of batches by seconds, without a warning


@dataclass
class DeviceFeatures:
    """Computes log-mels on the device of the batch, and applies SpecAugment to training clips."""

    logmel: LogMel
    augment: Augment | None = None

    def __post_init__(self) -> None:
        # A copy, because it moves to the device while the workers keep using the original.
        self.logmel = deepcopy(self.logmel)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with `mel` in place of `waveforms`; unchanged if it has none."""
        waveforms = batch.waveforms
        if waveforms is None:
            return batch
        logmel = self.logmel.to(waveforms.bits.device)
        clips = []
        for waveform, position in zip(waveforms.clips(), waveforms.positions, strict=True):
            mel = logmel(waveform)
            if self.augment and position is not None:
                mel = self.augment.mel(mel, mel_frames(len(waveform)), position)
            clips.append(mel)
        return replace(batch, mel=torch.cat(clips), waveforms=None)


class RunSegment(NamedTuple):
    """A segment of a run in which all optimizer steps have the same size.

    The total number of steps of a run is counted from its last segment.
    """

    step: int = 0  # optimizer steps taken before the segment
    cursor: Cursor = Cursor()  # at which the segment begins


class TrainLoader:
    """The training loader. Every iteration over it is one epoch, or what remains of the epoch.

    Args:
        data: the data module, with the current segment of the run.
        make_stream: returns the stream of this rank for `(start, end, count)`; see `BatchStream`.
        ranks: world size.
        workers: worker processes of this rank.
    """

    def __init__(
        self,
        data: "ShardDataModule",
        make_stream: Callable[[Cursor, int | None, int], BatchStream],
        ranks: int,
        workers: int,
    ):
        self.data, self.make_stream, self.ranks, self.workers = data, make_stream, ranks, workers
        self.order, self.batching, self.accumulate = data.order, data.batching, data.accumulate
        self.steps_per_epoch = data.steps_per_epoch(ranks)
        self.cursor, self.in_epoch = Cursor(), 0
        # The epoch whose length is cached, and its number of batches.
        self._length: tuple[int, int] = (-1, 0)

    def __len__(self) -> int:
        """Return the number of micro-batches of this rank in the current epoch."""
        if not self.order.epoch_clips:
            return self.steps_per_epoch * self.accumulate
        epoch = self.cursor.position // self.order.epoch_clips
        if self._length[0] != epoch:
            self._length = epoch, self._rest_of_epoch(Cursor(epoch * self.order.epoch_clips))[1]
        return self._length[1]

    def __iter__(self) -> Iterator[Batch]:
        if not self.order.epoch_clips and self.in_epoch >= len(self):
            # A consumer that counts batches may have stopped the last epoch before this generator
            # ended and reset the counter.
            self.in_epoch = 0
        if self.order.epoch_clips:
            end, count = self._rest_of_epoch(self.cursor)
        else:
            end, count = None, len(self) - self.in_epoch
        batches = iter(batch_loader(self.make_stream(self.cursor, end, count), self.workers))
        while step := list(islice(batches, self.accumulate)):
            weight = math.fsum(w for batch in step for w in batch.targets.clip_weights())
            for batch in step:
                self.cursor, self.in_epoch = batch.next_cursor, self.in_epoch + 1
                yield replace(batch, step_weight=weight)
        self.in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes, in plain values."""
        position, taken = self.cursor
        return {
            "position": position,
            "taken": taken,
            "next_chunk": self.batching.next_chunk(position),
            "in_epoch": self.in_epoch,
            "order": self.order.fingerprint(),
            "partitions": self.order.partitions,
            "batching": self.batching.fingerprint(),
            "world": [self.ranks, self.accumulate],
            "segment": [self.data.segment.step, *self.data.segment.cursor],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where a checkpoint ended.

        The world size, the number of workers and the clips per batch may have changed since, see
        `ShardDataModule.resume`.

        Raises:
            UserError: the checkpoint belongs to a different order.
        """
        if state["order"] not in (self.order.fingerprint(), self.data.earlier_order):
            raise UserError(
                "The checkpoint was made with other training data, exclusions, weights, seed, "
                "window or partitions, so its position in the data is not valid here. Resume with "
                "the config of its run directory, or continue with new data: --allow-data-change."
            )
        self.cursor = Cursor(state["position"], state["taken"])
        same_world = state["world"] == [self.ranks, self.accumulate]
        self.in_epoch = state["in_epoch"] % max(1, len(self)) if same_world else 0

    def _rest_of_epoch(self, start: Cursor) -> tuple[int, int]:
        """Return the end of the epoch of a cursor, and the micro-batches of this rank until then.

        Empty batches fill the last optimizer step.
        """
        clips = self.order.epoch_clips or 1
        end = (start.position // clips + 1) * clips
        if self.order.end is not None and end > self.order.end:
            return self.order.end, 0  # the last epoch is over
        return end, self.data.count_steps(start, end, self.ranks) * self.accumulate


class ValidLoader:
    """The validation loader. Its worker ends with the last batch.

    Lightning does not ask for a batch after the last one, and keeps the iterator until the next
    validation. A worker holds a copy of the memory that its parent has changed since the fork: on a
    CPU, weights and optimizer state.
    """

    def __init__(self, stream: BatchStream, workers: int):
        self.stream, self.workers = stream, workers

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(batch_loader(self.stream, self.workers))
        for _ in range(len(self) - 1):
            yield next(batches)
        last = next(batches)
        del batches
        yield last


class ShardDataModule(lightning.LightningDataModule):
    """Training and validation loaders over shards.

    Args:
        train, valid: the sources.
        weights: weight of each training source in the mixture.
        schedule: other weights, each after a number of training clips.
        build: turns samples into examples.
        seed: seed of the training order.
        window, batch_clips, batch_seconds, batch_tokens: see `settings.DataSettings`.
        partitions: number of partitions of the training order, see `sampler.usable_partitions`.
        epochs: train on every clip of every source this many times and ignore `weights`; None for
            the endless mixture.
        samples_per_epoch, valid_clips, workers: see `settings.DataSettings`.
        accumulate: micro-batches per optimizer step.
        augment: augmentation of training clips.
        padding: draws the training clips that the encoder pads to 30 s; None for none.
        loss: weights of training clips in the loss.
    """

    def __init__(
        self,
        train: Sequence[StreamSource],
        valid: Sequence[StreamSource],
        weights: Sequence[float],
        build: ExampleBuilder,
        *,
        seed: int,
        window: int,
        partitions: int = 1,
        schedule: Sequence[tuple[int, Sequence[float]]] = (),
        batch_clips: int,
        batch_seconds: float | None = None,
        batch_tokens: int | None = None,
        epochs: int | None = None,
        samples_per_epoch: int | None = None,
        valid_clips: int | None = None,
        accumulate: int = 1,
        workers: int = 0,
        augment: Augment | None = None,
        padding: MixedPadding | None = None,
        loss: LossSettings | None = None,
    ):
        super().__init__()
        self.train, self.valid, self.build = tuple(train), tuple(valid), build
        shapes = _shapes(train, weights)
        self.order = (
            EpochOrder(shapes, seed, window, epochs, partitions)
            if epochs
            else MixtureOrder(shapes, seed, window, partitions, schedule)
        )
        self.valid_order = SequentialOrder(_shapes(valid, [1.0] * len(valid)), window, valid_clips)
        longest = build.limits.max_seconds
        valid_batch_clips = max(1, int(batch_seconds // longest)) if batch_seconds else batch_clips
        self.valid_batching = ByClips(self.valid_order, valid_batch_clips)
        self.batching: ByClips | BySeconds = ByClips(self.order, batch_clips)
        if batch_seconds:
            indexes = [source.index for source in train]
            if without := [index.root for index in indexes if not index.has_tables]:
                raise UserError(
                    "data.batch_seconds plans batches by the lengths of clips, which are in the "
                    f"sample tables of the shards. {', '.join(without)} have none. Write them "
                    "once: whisper-aut data index FOLDER"
                )
            # Lengths are planned at speed 1; a lower speed makes clips longer.
            slowest = min(1.0, *augment.options.speeds) if augment else 1.0
            limits = (batch_seconds * slowest, longest, padding, WINDOW_SECONDS * slowest)
            tokens = None
            if batch_tokens:
                lines = tuple(fit_tokens(source, build) for source in train)
                tokens = TokenLimit(batch_tokens, lines)
            self.batching = BySeconds(self.order, indexes, *limits, tokens)
        self.train_build = replace(build, augment=augment, padding=padding, loss=loss)
        self.features = DeviceFeatures(build.logmel, augment)
        self.accumulate, self.workers = accumulate, workers
        self.samples_per_epoch = samples_per_epoch or sum(source.index.samples for source in train)
        # Clips of each partition before the current chunk, which all ranks have trained on.
        self.position = 0
        self.segment = RunSegment()
        # Fingerprint of another order whose checkpoint is resumed, at a cursor in the new one.
        self.earlier_order = ""
        self._loader: TrainLoader | None = None

    @property
    def batch_name(self) -> str:
        """Size of a micro-batch, for display."""
        if isinstance(self.batching, ByClips):
            return f"{self.batching.clips} clips"
        return f"{self.batching.budget_ms / 1000:g} s"

    def steps_per_epoch(self, ranks: int) -> int:
        """Return the optimizer steps of an epoch.

        If the order has epochs of its own, this is the length of the first one. In an endless
        order, clips that do not fill a step are left for the next epoch.

        Raises:
            UserError: an epoch has less than one step.
        """
        if self.order.epoch_clips:
            return self.count_steps(Cursor(), self.order.epoch_clips, ranks)
        clips = self._mean_batch_clips
        step_clips = clips * ranks * self.accumulate
        steps = int(self.samples_per_epoch / step_clips)
        if not steps:
            raise UserError(
                f"An epoch of {self.samples_per_epoch} clips is shorter than one step of "
                f"{step_clips:g} ({clips:g} clips × {ranks} ranks × {self.accumulate} "
                "accumulated). Lower data.batch_clips or data.batch_seconds, or raise "
                "data.samples_per_epoch."
            )
        return steps

    def count_steps(self, start: Cursor, end: int, ranks: int) -> int:
        """Return the optimizer steps from a cursor to a position in its epoch, rounded up."""
        return -(-self.batching.count(start, end) // (ranks * self.accumulate))

    def total_steps(self, ranks: int, epochs: int) -> int:
        """Return the optimizer step at which a number of epochs ends.

        Steps before the current segment are counted as they were taken. The data from its start on
        is counted in steps of the current size.
        """
        step, cursor = self.segment
        if clips := self.order.epoch_clips:
            for epoch in range(cursor.position // clips, epochs):
                start = max(cursor, Cursor(epoch * clips))
                step += self.count_steps(start, (epoch + 1) * clips, ranks)
            return step
        clips_before = cursor.position * self.order.partitions
        clips_before += cursor.taken * self._mean_batch_clips
        steps_before = clips_before / (self._mean_batch_clips * ranks * self.accumulate)
        return step + max(0, math.ceil(epochs * self.steps_per_epoch(ranks) - steps_before))

    def resume(
        self,
        ranks: int,
        state: dict[str, Any],
        step: int,
        skip_to: Cursor | None = None,
        allow_change: bool = False,
    ) -> Cursor | None:
        """Set the segment from which the steps of a resumed run are counted.

        A new segment begins at the checkpoint if the size of a step has changed, or if the order
        has epochs of its own. In an endless order, skipped clips do not shorten the run.

        Args:
            ranks: world size.
            state: state of the loader in the checkpoint.
            step: optimizer steps taken so far.
            skip_to: cursor at which the data resumes, if not where the checkpoint ended.
            allow_change: resume a checkpoint of another order, after as many clips of this one, or
                one between batches that were planned together with other limits, after the rest of
                these batches.

        Returns:
            The cursor at which the data resumes, if not where the checkpoint ended.

        Raises:
            UserError: the order has changed, and has epochs of its own, or the limits of batches
                have changed within a chunk.
        """
        if allow_change and state["order"] != self.order.fingerprint():
            if self.order.epoch_clips:
                raise UserError(
                    "--allow-data-change does not work with data.mode=epochs: other data has other "
                    "epochs. Start a new run from the exported weights."
                )
            self.earlier_order = state["order"]
            # Clips of the round that had begun are not counted exactly.
            position = state["position"] + bool(state["taken"])
            position = -(-position * state["partitions"] // self.order.partitions)
            skip_to = skip_to or Cursor(position)
            self.position, self.segment = skip_to.position, RunSegment(step, skip_to)
            return skip_to
        same_world = state["world"] == [ranks, self.accumulate]
        same_batches = state["batching"] == self.batching.fingerprint()
        same_steps = same_world and same_batches
        if state["taken"] and not same_batches and not skip_to:
            if not allow_change:
                raise UserError(
                    "The checkpoint was saved between batches that were planned together with "
                    "another data.batch_clips, data.batch_seconds, data.batch_tokens or "
                    "data.max_seconds. Resume with the values of its run directory, or go on after "
                    "the rest of these batches: --allow-data-change."
                )
            skip_to = Cursor(state["next_chunk"])
        cursor = Cursor(state["position"], state["taken"])
        self.position = (skip_to or cursor).position
        if self.order.epoch_clips:
            self.segment = RunSegment(step, skip_to or cursor)
        elif same_steps:
            first_step, *first_cursor = state["segment"]
            self.segment = RunSegment(first_step, Cursor(*first_cursor))
        else:
            self.segment = RunSegment(step, cursor)
        return skip_to

    def source_epochs(self, position: int) -> dict[str, float]:
        """Return the epochs of each training source before a position, by name of its index."""
        partitions = range(self.order.partitions)
        counts = np.sum([self.order.draw_counts(k, position) for k in partitions], axis=0)
        return {
            source.index.name: float(count) / source.index.samples
            for source, count in zip(self.train, counts, strict=True)
        }

    def train_dataloader(self) -> TrainLoader:
        rank, ranks = self._rank_and_ranks()
        if self._loader is None:
            readers, partitions = ranks * max(1, self.workers), self.order.partitions
            remote = not all(is_local(source.index.tars) for source in self.train)
            if rank == 0 and remote and partitions % readers:
                log.warning(
                    f"Remote clips are fetched one by one, because {partitions} partitions cannot "
                    f"be divided evenly among {ranks} ranks × {max(1, self.workers)} workers. Set "
                    f"data.partitions to a multiple of {readers}. If the data is smaller than "
                    f"{readers} × 128 MB, set data.workers=0 or copy it to a disk."
                )
            if rank == 0 and partitions > 1 and isinstance(self.batching, BySeconds):
                fullness = self.batching.fullness(0)
                if fullness < MIN_FULLNESS:
                    log.warning(
                        f"The first batches use only {fullness:.0%} of data.batch_seconds, because "
                        "some tars have longer clips than others. Shuffle the clips before you "
                        "build the shards, or lower data.partitions."
                    )
            self._loader = TrainLoader(
                self, partial(self.train_stream, rank, ranks), ranks, self.workers
            )
        return self._loader

    def val_dataloader(self) -> "ValidLoader | list[Batch]":
        if not self.valid_order.end:
            return []
        return ValidLoader(self.valid_stream(*self._rank_and_ranks()), min(self.workers, 1))

    def train_stream(
        self, rank: int, ranks: int, start: Cursor, end: int | None, count: int
    ) -> BatchStream:
        """Return the training micro-batches of one rank; see `BatchStream`."""
        streamed = (self.order, self.batching, self.train, self.train_build)
        return BatchStream(*streamed, count, rank, ranks, start, end)

    def valid_stream(self, rank: int, ranks: int) -> BatchStream:
        """Return the validation micro-batches of one rank."""
        end = self.valid_order.end
        count = -(-self.valid_batching.count(Cursor(), end) // ranks)
        streamed = (self.valid_order, self.valid_batching, self.valid, self.build)
        return BatchStream(*streamed, count, rank, ranks, end=end)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.features(batch)

    @property
    def _mean_batch_clips(self) -> float:
        if isinstance(self.batching, ByClips):
            return self.batching.clips
        return self.batching.budget_ms / 1000 / self.batching.mean_seconds

    def _rank_and_ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _shapes(sources: Sequence[StreamSource], weights: Sequence[float]) -> list[SourceShape]:
    return [
        SourceShape(
            source.index.selected_fingerprint(),
            source.index.shard_samples,
            weight,
            source.index.sample_bytes,
        )
        for source, weight in zip(sources, weights, strict=True)
    ]
