"""Which strategy a config gets, by what it asks for and what the machine and the launcher are."""

import os
from collections.abc import Iterator
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from tests.support.ranks import on_ranks
from whisper_aut.config import StrategySettings
from whisper_aut.errors import UserError
from whisper_aut.training import train
from whisper_aut.training.strategies import CPUDeepSpeed, DeepSpeed, build_strategy


def test_deepspeed_runs_where_the_config_says_not_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    stage_2 = StrategySettings(name="deepspeed_stage_2")
    assert isinstance(build_strategy(stage_2, ranks=2, accelerator="cpu"), CPUDeepSpeed)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    offload = StrategySettings(name="deepspeed_stage_2_offload")
    with pytest.raises(UserError, match="this run uses no GPU"):
        build_strategy(offload, ranks=2, accelerator="cpu")
    assert type(build_strategy(stage_2, ranks=2, accelerator="auto")) is DeepSpeed


@pytest.mark.parametrize(
    ("launcher", "by_slurm"), [({}, True), ({"TORCHELASTIC_RUN_ID": "7"}, False)]
)
def test_torchrun_within_a_slurm_job_knows_the_ranks(
    launcher: dict[str, str], by_slurm: bool, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", **launcher}.items():
        monkeypatch.setenv(name, value)
    assert train.launched_by_slurm() == by_slurm


class Ones:
    """Micro-batches of ones times a factor."""

    def __init__(self, factors: list[float]):
        self.factors = factors

    def __len__(self) -> int:
        return len(self.factors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.full((1, 8), factor) for factor in self.factors)


class Sum(lightning.LightningModule):
    """Its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1, bias=False)
        self.gradients: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.linear(batch.to(self.linear.weight.dtype)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.0)

    def on_train_end(self) -> None:
        from deepspeed.utils import safe_get_full_optimizer_state

        moment: Any = safe_get_full_optimizer_state(self.linear.weight, "exp_avg")
        self.gradients = (moment / 0.1).flatten().tolist()  # after one step


def fit_ones(
    name: str, factors: list[float], precision: str, options: dict[str, Any]
) -> tuple[list[float], dict[str, Any], list[str]]:
    """Train one step on this rank; return its gradient, DeepSpeed's options and the warnings."""
    warnings: list[str] = []
    strategy: Any = build_strategy(
        StrategySettings(name=name, timeout_minutes=2.0, deepspeed=options),  # pyright: ignore
        ranks=2,
        accelerator="cpu",
        warn=warnings.append,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        precision=precision,  # pyright: ignore[reportArgumentType]
        accumulate_grad_batches=len(factors),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = Sum()
    trainer.fit(module, Ones(factors))  # pyright: ignore[reportArgumentType]
    return module.gradients, dict(strategy.config), warnings


def fit_all(*arguments: Any) -> list[Any]:
    return [fit_ones(f"deepspeed_stage_{stage}", *arguments) for stage in (1, 2, 3)]


def test_deepspeed_sums_micro_batches_in_float32():
    """In bfloat16, 256 + 1 is 256: of 16 micro-batches the sum would keep the first alone."""
    factors = [256.0] + [1.0] * 15
    ends = on_ranks(fit_all, factors, "bf16-mixed", {})
    assert len(ends) == 2
    for stages in ends:
        assert isinstance(stages, list), stages
        for gradient, _, _ in stages:
            # Ranks exchange it in bfloat16, which rounds it once.
            assert gradient == pytest.approx([sum(factors) / 16**2] * 8, rel=0.005)


def test_any_deepspeed_option_is_passed_through_and_typos_are_named():
    options = {"zero_optimization": {"reduce_bucket_size": 1234}, "stepz_per_print": 7}
    ends = on_ranks(fit_ones, "deepspeed_stage_2", [1.0, 1.0], "32-true", options)
    for _, config, warnings in ends:
        assert config["zero_optimization"]["reduce_bucket_size"] == 1234
        assert config["zero_optimization"]["stage"] == 2
        assert warnings == [
            "DeepSpeed did not read these options of strategy.deepspeed: stepz_per_print. "
            "Check the spelling."
        ]


def test_an_option_that_deepspeed_rejects_is_a_mistake_of_the_config():
    options = {"zero_optimization": {"reduce_bucket_sise": 1234}}
    for end in on_ranks(fit_ones, "deepspeed_stage_2", [1.0], "32-true", options, ranks=2):
        assert "UserError: DeepSpeed rejects an option of strategy.deepspeed" in end
        assert "reduce_bucket_sise" in end
