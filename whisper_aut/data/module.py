"""The LightningDataModule: training mixture and validation clips for any number of ranks.

In: sources with their shards, shares, and an `ExampleBuilder`. Out: loaders in which every rank takes the same number of steps.
Next: the Trainer.
"""

from collections.abc import Sequence
from typing import Any

import lightning
from torch.utils.data import DataLoader

from whisper_aut.data.example import ExampleBuilder
from whisper_aut.data.loader import TrainLoader, batch_loader
from whisper_aut.data.order import MixtureOrder, SequentialOrder, SourceShape
from whisper_aut.data.pack import Batch
from whisper_aut.data.stream import BatchStream, StreamSource
from whisper_aut.errors import UserError


class ShardDataModule(lightning.LightningDataModule):
    """Training and validation loaders over shards.

    Args:
        train, valid: the sources.
        shares: the share of each training source.
        build: sample → example.
        seed, window: of the training order.
        batch_clips: clips per rank and micro-batch.
        samples_per_epoch: clips per epoch over all ranks; None for as many as the training shards hold.
        valid_clips: the first so many clips of each validation source; None for all.
        accumulate: micro-batches per optimiser step.
        workers: decoding processes per rank.
    """

    def __init__(
        self,
        train: Sequence[StreamSource],
        valid: Sequence[StreamSource],
        shares: Sequence[float],
        build: ExampleBuilder,
        *,
        seed: int,
        window: int,
        batch_clips: int,
        samples_per_epoch: int | None = None,
        valid_clips: int | None = None,
        accumulate: int = 1,
        workers: int = 0,
    ):
        super().__init__()
        self.train, self.valid, self.build = tuple(train), tuple(valid), build
        self.order = MixtureOrder(_shapes(train, shares), seed, window)
        self.valid_order = SequentialOrder(_shapes(valid, [1.0] * len(valid)), valid_clips)
        self.batch_clips, self.accumulate, self.workers = batch_clips, accumulate, workers
        self.samples_per_epoch = samples_per_epoch or sum(source.index.samples for source in train)
        self._loader: TrainLoader | None = None

    def steps_per_epoch(self, ranks: int) -> int:
        """Return the optimiser steps of an epoch; what does not fill a step is left for the next epoch.

        Raises:
            UserError: an epoch holds less than one step.
        """
        clips = self.batch_clips * ranks * self.accumulate
        steps = self.samples_per_epoch // clips
        if not steps:
            raise UserError(
                f"An epoch of {self.samples_per_epoch} clips holds no step of {clips} ({self.batch_clips} clips × {ranks} ranks "
                f"× {self.accumulate} accumulated). Lower data.batch_clips or raise data.samples_per_epoch."
            )
        return steps

    def train_dataloader(self) -> TrainLoader:
        rank, ranks = self._place()
        if self._loader is None:
            self._loader = TrainLoader(
                lambda first, last: self._stream(self.order, self.train, rank, ranks, first, last),
                steps_per_epoch=self.steps_per_epoch(ranks),
                accumulate=self.accumulate,
                workers=self.workers,
                clips_per_batch=self.batch_clips * ranks,
                fingerprint=self.order.fingerprint(),
            )
        return self._loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        rank, ranks = self._place()
        if not len(self.valid_order):
            return []
        batches = -(-len(self.valid_order) // (self.batch_clips * ranks))
        return batch_loader(self._stream(self.valid_order, self.valid, rank, ranks, 0, batches), min(self.workers, 1))

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _stream(self, order: Any, sources: Sequence[StreamSource], rank: int, ranks: int, first: int, last: int) -> BatchStream:
        return BatchStream(order, sources, self.build, clips=self.batch_clips, rank=rank, ranks=ranks, first=first, last=last)


def _shapes(sources: Sequence[StreamSource], shares: Sequence[float]) -> list[SourceShape]:
    return [
        SourceShape(source.index.fingerprint(), tuple(shard.samples for shard in source.index.shards), share)
        for source, share in zip(sources, shares, strict=True)
    ]
