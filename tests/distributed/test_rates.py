"""A resumed run uses the learning rates of its config, and reports a change."""

from pathlib import Path
from typing import Any

import lightning
import pytest
from rich.console import Console

from tests.support.training import settings_for
from whisper_aut.training.train import train

SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("ddp", *(f"deepspeed_stage_{stage}" for stage in (1, 2, 3)))
]


class _Rates(lightning.Callback):
    """Writes down the rates of all groups before each step, as the innermost optimiser has them."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        optimizer = trainer.optimizers[0]
        while hasattr(optimizer, "optimizer"):  # DeepSpeed's holds the real one
            optimizer = optimizer.optimizer
        self.by_step[trainer.global_step] = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("strategy", ["auto", *SLOW])
def test_a_resumed_run_takes_the_rates_of_its_config(
    strategy: str,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    steps = (
        "trainer.checkpoint_every_steps=3",
        "trainer.keep_checkpoints=9",
        "optim.layer_decay=0.5",
        "optim.warmup_steps=2",
    )

    def rates(folder: str, lr: float, resume: str = "", *overrides: str) -> dict[int, list[float]]:
        chosen = (*steps, f"strategy={strategy}", f"optim.lr={lr}", f"optim.encoder_lr={lr / 4}")
        chosen = (*chosen, *overrides)
        watch = _Rates()
        settings = settings_for(tiny_whisper, tiny_shards, tmp_path / folder, *chosen)
        train(settings, Console(width=400), resume=resume, callbacks=[watch])
        return watch.by_step

    high, low = rates("parts", 1e-3), rates("whole", 1e-5)
    assert len(set(high[4])) > 3, "no groups of rates of their own"
    (checkpoint,) = (tmp_path / "parts").glob("smoke/2*/checkpoints/step-0000003.ckpt")
    capsys.readouterr()
    lowered = rates("parts", 1e-5, resume=str(checkpoint))
    assert lowered == {step: low[step] for step in (3, 4, 5)}
    assert capsys.readouterr().out.count("this config sets it to") == 1
    (checkpoint,) = (tmp_path / "parts").glob("smoke/2*/checkpoints/step-0000003.ckpt")
    again = rates("parts", 1e-3, resume=str(checkpoint))
    assert again == {step: high[step] for step in (3, 4, 5)}
    assert "this config sets it to" not in capsys.readouterr().out
    # Fewer groups of parameters: checkpoints know parameters by name.
    (checkpoint,) = (tmp_path / "parts").glob("smoke/2*/checkpoints/step-0000003.ckpt")
    flat = rates("parts", 1e-3, str(checkpoint), "optim.layer_decay=1")
    assert flat.keys() == {3, 4, 5}
    assert len(flat[4]) < len(high[4])
    assert max(flat[4]) == max(high[4])
