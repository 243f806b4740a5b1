"""A run that goes on with other ranks or micro-batches: Lightning's own count of batches means nothing then, the loader's place does.

In: a checkpoint. Out: what the loader wrote into it, and a checkpoint whose epoch begins anew for Lightning while the loader goes on
at its clip. Next: the steps that are left are worked out from it (`data.module`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning

from whisper_aut.training.checkpoint import read_state


@dataclass(frozen=True)
class LoaderState:
    """Where the training loader stood, and after how many optimiser steps."""

    state: dict[str, Any]
    step: int


def loader_state(checkpoint: Path) -> LoaderState | None:
    """Read a checkpoint's loader state; the weights stay on the disk. None where it has none."""
    content = read_state(checkpoint)
    states = _loaders(content)
    return LoaderState(states[0], int(content["global_step"])) if states else None


class AnotherWorld(lightning.Callback):
    """Begins Lightning's epoch anew where the checkpoint was written by other ranks or with another accumulation."""

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        states = _loaders(checkpoint)
        if not states or states[0]["world"] == [
            trainer.world_size,
            trainer.accumulate_grad_batches,
        ]:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # Lightning counts a batch as completed after the hooks that write checkpoints, and makes up for it on restart.
        uncounted = progress["total"]["processed"] - progress["total"]["completed"]
        progress["current"] = dict.fromkeys(progress["current"], 0) | {"completed": -uncounted}
        progress["is_last_batch"] = False


def _loaders(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    return (
        checkpoint.get("loops", {})
        .get("fit_loop", {})
        .get("state_dict", {})
        .get("combined_loader", [])
    )
