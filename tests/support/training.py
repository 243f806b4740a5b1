"""Short trainings of the tiny models: settings, weights, signals."""

import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from tests.support import REPOSITORY
from whisper_aut.config import Settings, load_settings
from whisper_aut.export.hf import read_checkpoint
from whisper_aut.training import train as train_module

QUIET = Console(quiet=True)


def settings_for(tiny_whisper: Path, tiny_shards: Path, runs: Path, *overrides: str) -> Settings:
    """Return `conf/smoke.yaml` over the tiny shards: six steps, logged each step."""
    sources = ", ".join(
        f"{{path: {tiny_shards / domain}, domain: {domain}}}"
        for domain in ("speech", "sound", "music")
    )
    return load_settings(
        REPOSITORY / "conf" / "smoke.yaml",
        [
            "corpora.demo=null",
            "model.after=",
            f"model.path={tiny_whisper}",
            f"data.train=[{sources}]",
            f"data.valid=[{sources}]",
            f"runs={runs}",
            "trainer.max_steps=6",
            "trainer.log_every_steps=1",
            *overrides,
        ],
    )


def weights_of(run: Any, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return read_checkpoint(run.checkpoints / name)


def assert_same_weights(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert_close(one[name], other[name], atol=atol, rtol=0, msg=name)
        else:
            assert one[name] == other[name]


def add_callbacks(monkeypatch: pytest.MonkeyPatch, *callbacks: Any) -> list[Any]:
    """Insert callbacks into the trainers that `train` builds; return the list of those trainers."""
    original, trainers = train_module.build_trainer, []

    def make(*arguments: Any) -> Any:
        trainer = original(*arguments)
        trainer.callbacks[:0] = callbacks  # pyright: ignore[reportAttributeAccessIssue]
        trainers.append(trainer)
        return trainer

    monkeypatch.setattr(train_module, "build_trainer", make)
    return trainers


class SignalAt(lightning.Callback):
    """Sends this process a signal in the middle of a step, as a terminal or a scheduler would."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)
