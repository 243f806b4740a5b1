"""The LightningDataModule: training and validation loaders in which all ranks take equal steps."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.data.augment import Augment
from whisper_aut.data.batch import Batch
from whisper_aut.data.dataset import (
    BatchStream,
    ExampleBuilder,
    RunSegment,
    StreamSource,
    TrainLoader,
    batch_loader,
)
from whisper_aut.data.reader import DEFAULT_POLICY, ReadPolicy
from whisper_aut.data.sampler import (
    ByClips,
    BySeconds,
    Cursor,
    EpochOrder,
    MixtureOrder,
    SequentialOrder,
    SourceShape,
)
from whisper_aut.data.shards import ShardIndex
from whisper_aut.errors import UserError


@dataclass
class DeviceFeatures:
    """Computes log-mels on the device of the batch.

    Args:
        logmel: computes the features of the encoder.
        augment: applies SpecAugment to the clips that have a position.
    """

    logmel: LogMel
    augment: Augment | None = None

    def __post_init__(self) -> None:
        # A copy, because it moves to the device while the workers keep using the original.
        self.logmel = deepcopy(self.logmel)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with `mel` in place of `waveforms`; unchanged if it has none."""
        if batch.waveforms is None:
            return batch
        logmel = self.logmel.to(batch.waveforms.bits.device)
        clips = []
        for waveform, position in zip(
            batch.waveforms.clips(), batch.waveforms.positions, strict=True
        ):
            mel = logmel(waveform)
            if self.augment and position is not None:
                mel = self.augment.mel(mel, mel_frames(len(waveform)), position)
            clips.append(mel)
        return replace(batch, mel=torch.cat(clips), waveforms=None)


class ShardDataModule(lightning.LightningDataModule):
    """Training and validation loaders over shards.

    Args:
        train, valid: the sources.
        weights: weight of each training source in the mixture.
        build: turns samples into examples.
        seed: seed of the training order.
        window: clips per shuffle window of a training source. Validation reads as many together.
        batch_clips: clips per micro-batch of a rank.
        batch_seconds: maximum seconds of audio per micro-batch of a rank; replaces `batch_clips`.
        epochs: train on every clip of every source this many times and ignore `weights`; None for
            the endless mixture.
        samples_per_epoch: clips per epoch over all ranks; None for the number of training clips.
        valid_clips: validate on this many clips from the beginning of each source; None for all.
        accumulate: micro-batches per optimizer step.
        workers: worker processes per rank.
        policy: retries and timeouts for reading shards.
        augment: augmentation of training clips.
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
        batch_clips: int,
        batch_seconds: float | None = None,
        epochs: int | None = None,
        samples_per_epoch: int | None = None,
        valid_clips: int | None = None,
        accumulate: int = 1,
        workers: int = 0,
        policy: ReadPolicy = DEFAULT_POLICY,
        augment: Augment | None = None,
    ):
        super().__init__()
        self.train, self.valid, self.build, self.policy = tuple(train), tuple(valid), build, policy
        shapes = _shapes(train, weights)
        self.order = (
            EpochOrder(shapes, seed, window, epochs)
            if epochs
            else MixtureOrder(shapes, seed, window)
        )
        self.valid_order = SequentialOrder(_shapes(valid, [1.0] * len(valid)), window, valid_clips)
        longest = build.limits.max_seconds
        self.valid_batching = ByClips(
            self.valid_order,
            max(1, int(batch_seconds // longest)) if batch_seconds else batch_clips,
        )
        self.batching: ByClips | BySeconds = ByClips(self.order, batch_clips)
        if batch_seconds:
            indexes = [source.index for source in train]
            _check_tables(indexes)
            # Lengths are planned at speed 1; a lower speed makes clips longer.
            slowest = min(augment.speeds) if augment else 1.0
            self.batching = BySeconds(
                self.order, indexes, batch_seconds * min(1.0, slowest), longest, policy
            )
        self.train_build = replace(build, augment=augment)
        self.features = DeviceFeatures(build.logmel, augment)
        self.accumulate, self.workers = accumulate, workers
        self.samples_per_epoch = samples_per_epoch or sum(source.index.samples for source in train)
        # Clips of the order that all ranks have trained on; with `batch_seconds`, those before the
        # current chunk.
        self.position = 0
        self.segment = RunSegment()
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

        Args:
            ranks: world size.

        Raises:
            UserError: an epoch has less than one step.
        """
        if self.order.epoch_clips:
            return self._steps_of_epochs(ranks, 1, Cursor())
        clips = self._batch_clips
        steps = int(self.samples_per_epoch / (clips * ranks * self.accumulate))
        if not steps:
            raise UserError(
                f"An epoch of {self.samples_per_epoch} clips holds no step of "
                f"{clips * ranks * self.accumulate:g} ({clips:g} clips × "
                f"{ranks} ranks × {self.accumulate} accumulated). "
                "Lower data.batch_clips or data.batch_seconds, or raise data.samples_per_epoch."
            )
        return steps

    def total_steps(self, ranks: int, epochs: int) -> int:
        """Return the optimizer step at which a number of epochs ends.

        Steps before the current segment (`RunSegment`) are counted as they were taken. The data from
        its start on is counted in steps of the current size.
        """
        step, cursor = self.segment
        if self.order.epoch_clips:
            return step + self._steps_of_epochs(ranks, epochs, cursor)
        clips_before = cursor.position + cursor.taken * self._batch_clips
        steps_before = clips_before / (self._batch_clips * ranks * self.accumulate)
        return step + max(0, math.ceil(epochs * self.steps_per_epoch(ranks) - steps_before))

    def resume(
        self, ranks: int, state: dict[str, Any], step: int, skip_to: Cursor | None = None
    ) -> None:
        """Set the segment from which the steps of a resumed run are counted.

        A new segment begins at the checkpoint if the size of a step has changed, or if the order
        has epochs of its own. In an endless order, skipped clips do not shorten the run.

        Args:
            ranks: world size.
            state: state of the loader in the checkpoint.
            step: optimizer steps taken so far.
            skip_to: cursor at which the data resumes, if not where the checkpoint ended.
        """
        same_steps = (
            state["world"] == [ranks, self.accumulate]
            and state["batching"] == self.batching.fingerprint()
        )
        here = Cursor(state["position"], state["taken"])
        if self.order.epoch_clips:
            self.segment = RunSegment(step, skip_to or here)
        elif same_steps:
            begun, *place = state.get("segment", (0, 0, 0))
            self.segment = RunSegment(begun, Cursor(*place))
        else:
            self.segment = RunSegment(step, here)

    def source_epochs(self, position: int) -> dict[str, float]:
        """Return the epochs of each training source before a position, by name of its index."""
        drawn = self.order.draw_counts(position)
        return {
            source.index.name: float(count) / source.index.samples
            for source, count in zip(self.train, drawn, strict=True)
        }

    def train_dataloader(self) -> TrainLoader:
        rank, ranks = self._place()
        if self._loader is None:
            self._loader = TrainLoader(
                lambda start, end, count: self._stream(rank, ranks, start, end, count),
                order=self.order,
                batching=self.batching,
                steps_per_epoch=self.steps_per_epoch(ranks),
                accumulate=self.accumulate,
                ranks=ranks,
                workers=self.workers,
                segment=self.segment,
            )
        return self._loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        rank, ranks = self._place()
        if not len(self.valid_order):
            return []
        return batch_loader(self._valid_stream(rank, ranks), min(self.workers, 1))

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.features(batch)

    @property
    def _batch_clips(self) -> float:
        """Mean number of clips per micro-batch."""
        batching = self.batching
        return (
            batching.clips
            if isinstance(batching, ByClips)
            else batching.budget_ms / 1000 / batching.mean_seconds
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _steps_of_epochs(self, ranks: int, epochs: int, cursor: Cursor) -> int:
        clips, row = self.order.epoch_clips or 1, ranks * self.accumulate
        return sum(
            -(-self.batching.count(max(cursor, Cursor(epoch * clips)), (epoch + 1) * clips) // row)
            for epoch in range(cursor.position // clips, epochs)
        )

    def _stream(
        self, rank: int, ranks: int, start: Cursor, end: int | None, count: int
    ) -> BatchStream:
        return BatchStream(
            self.order,
            self.batching,
            self.train,
            self.train_build,
            rank=rank,
            ranks=ranks,
            start=start,
            end=end,
            count=count,
            policy=self.policy,
        )

    def _valid_stream(self, rank: int, ranks: int) -> BatchStream:
        end = self.valid_order.end
        return BatchStream(
            self.valid_order,
            self.valid_batching,
            self.valid,
            self.build,
            rank=rank,
            ranks=ranks,
            end=end,
            count=-(-self.valid_batching.count(Cursor(), end) // ranks),
            policy=self.policy,
        )


def _shapes(sources: Sequence[StreamSource], weights: Sequence[float]) -> list[SourceShape]:
    return [
        SourceShape(source.index.selected_fingerprint(), source.index.shard_samples, weight)
        for source, weight in zip(sources, weights, strict=True)
    ]


def _check_tables(indexes: Sequence[ShardIndex]) -> None:
    without = [index.root for index in indexes if not index.has_tables]
    if without:
        raise UserError(
            "data.batch_seconds plans batches by the lengths of clips, "
            "which stand in the tables beside the shards. There are none at:\n"
            + "\n".join(f"  - {root}" for root in without)
            + "\nMake them, once: whisper-aut data index FOLDER"
        )
