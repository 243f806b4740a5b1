"""One batch, one fit: Lightning's Trainer around a probe, without noise, threads that only wait, or a trace left behind.

In: a LightningModule and the tensors it trains on. Out: the module, trained. Used by every probe kind that trains.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

Setting = dict[str, float]  # what a probe is trained with, by name: a penalty, a learning rate
ONE_THREAD_FLOPS = (
    4e9  # a step: below it threads cost more than they bring, on a busy machine up to 30 times more
)

THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class FittedProbes:
    """J probes that were fitted together.

    Attributes:
        scores: features of I items → `[I, J, C]`.
        epochs: how many each was trained for; none where nothing trains by epochs.
    """

    scores: Callable[[Tensor], Tensor]
    epochs: Sequence[int] = ()


class OneBatch:
    """A loader of one batch that is there already: a `DataLoader` would copy it and warn of missing workers."""

    def __init__(self, batch: tuple[Tensor, ...]):
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield self.batch

    def __len__(self) -> int:
        return 1


@torch.inference_mode(
    False
)  # within a validation hook, parameters made in inference mode would silently never train
@torch.enable_grad()
def fit(
    probe: LightningModule, batch: tuple[Tensor, ...], device: str = "cpu", epochs: int = 1
) -> None:
    """Fit a probe on one full batch, `epochs` times over."""
    accelerator, _, number = device.partition(":")
    sizes = [parameter.numel() for parameter in probe.parameters()]
    step_flops = 4 * len(batch[0]) * max(sizes)
    assert not any(parameter.is_inference() for parameter in probe.parameters()), (
        "a probe made in inference mode never trains"
    )
    with _quiet_trainer(), threads(1 if step_flops < ONE_THREAD_FLOPS else THREADS):
        trainer = Trainer(
            accelerator=accelerator, devices=[int(number)] if number else 1, max_epochs=epochs, barebones=True,
            plugins=[LightningEnvironment()],  # alone, even inside a run that torchrun or Slurm started
        )  # fmt: skip
        trainer.fit(probe, OneBatch(batch))
    probe.eval()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; None leaves their number alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Mute Lightning's notices about devices, bare runs and loops that are not there: every fit makes a trainer."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def class_losses(scores: Tensor, answers: Tensor) -> Tensor:
    """Return `[I, J]` losses of `[I, J, C]` scores: cross-entropy of `[I]` classes, or the sum of C binary ones of `[I, C]` answers."""
    items, problems, _ = scores.shape
    if answers.ndim == 2:
        wanted = answers[:, None].to(scores.dtype).expand_as(scores)
        return F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").sum(2)
    each = F.cross_entropy(
        scores.flatten(0, 1), answers.repeat_interleave(problems), reduction="none"
    )
    return each.view(items, problems)
