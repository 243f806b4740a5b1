"""Stream → the loader that the Trainer iterates: whole optimiser steps, and a position that goes into checkpoints.

In: a way to make the stream of any range of micro-batches. Out: batches on which `supervised_in_step` is set; `state_dict` with the
position. Next: `data.module`. The position counts micro-batches handed out, never those prefetched, so a resumed run starts
exactly behind the last batch that was trained on.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from whisper_aut.data.pack import Batch
from whisper_aut.data.stream import BatchStream
from whisper_aut.errors import UserError

PREFETCH_BATCHES = 4


def batch_loader(stream: BatchStream, workers: int) -> DataLoader[Batch]:
    """Return a DataLoader over a stream; with workers, batches are decoded ahead in processes of their own."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
    )


class TrainLoader:
    """One epoch after another of the training stream.

    Args:
        make_stream: `(first, last)` micro-batch numbers → stream of this rank.
        steps_per_epoch: optimiser steps of an epoch.
        accumulate: micro-batches per optimiser step.
        workers: decoding processes.
        clips_per_batch: clips of one micro-batch over all ranks; the unit in which the position is stored.
        fingerprint: of the order; a checkpoint of another order is refused.
    """

    def __init__(
        self,
        make_stream: Callable[[int, int], BatchStream],
        *,
        steps_per_epoch: int,
        accumulate: int,
        workers: int,
        clips_per_batch: int,
        fingerprint: str,
    ):
        self.make_stream, self.workers = make_stream, workers
        self.accumulate, self.batches_per_epoch = accumulate, steps_per_epoch * accumulate
        self.clips_per_batch, self.fingerprint = clips_per_batch, fingerprint
        self.position = 0

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        end = (self.position // self.batches_per_epoch + 1) * self.batches_per_epoch
        batches = iter(batch_loader(self.make_stream(self.position, end), self.workers))
        while step := list(islice(batches, self.accumulate)):
            supervised = sum(batch.supervised for batch in step)
            for batch in step:
                self.position += 1
                yield replace(batch, supervised_in_step=supervised)

    def state_dict(self) -> dict[str, Any]:
        return {"clips": self.position * self.clips_per_batch, "order": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["order"] != self.fingerprint:
            raise UserError(
                "The checkpoint was made with other training data, shares, seed or window, so its position means nothing here. "
                "Resume with the config that stands in its run directory, or start anew from the exported weights."
            )
        self.position, rest = divmod(state["clips"], self.clips_per_batch)
        if rest:
            raise UserError(
                f"The checkpoint lies {state['clips']} clips into the order, which is not a whole number of batches of "
                f"{self.clips_per_batch} clips over all ranks. Choose data.batch_clips and devices so that it is."
            )


def _ignore_interrupts(_: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides what happens, workers only follow.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
