"""Callbacks of a run: checkpoints, data counts, metrics, and what stops a run or skips a step."""

from typing import Any

import lightning
import torch.distributed as dist


def ends_step(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the last one of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def ends_logged_step(trainer: Any, batch_idx: int) -> bool:
    """Return whether a micro-batch ends an optimizer step at which metrics are due."""
    return ends_step(trainer, batch_idx) and trainer.global_step % trainer.log_every_n_steps == 0


def gather_objects(value: Any) -> list[Any]:
    """Return the value of every rank. Must be called on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
