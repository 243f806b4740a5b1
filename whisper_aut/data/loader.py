"""Stream → the loader that the Trainer iterates: whole optimiser steps, and a position that goes into checkpoints.

In: a way to make the stream from any cursor. Out: batches on which `supervised_in_step` is set; `state_dict` with the cursor. Next:
`data.module`. The cursor is that of the last batch handed out, never of those prefetched, so a resumed run starts exactly behind the
last batch that was trained on. It counts clips of the order, not steps: another number of ranks or workers, or batches of
another size, go on at the same clip, and none is lost or repeated.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from whisper_aut.data.batching import Batching, Cursor
from whisper_aut.data.order import Order
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
