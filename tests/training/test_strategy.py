"""Which strategy a config gets, by what it asks for and what the machine and the launcher are."""

import os

import pytest

from whisper_aut.errors import UserError
from whisper_aut.training import train
from whisper_aut.training.strategy import _CPUDeepSpeed, _DeepSpeed, build_strategy


def test_deepspeed_runs_where_the_config_says_not_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert isinstance(
        build_strategy("deepspeed_stage_2", timeout_minutes=1, ranks=2, accelerator="cpu"),
        _CPUDeepSpeed,
    )
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(UserError, match="no GPU is used here"):
        build_strategy("deepspeed_stage_2_offload", timeout_minutes=1, ranks=2, accelerator="cpu")
    assert (
        type(build_strategy("deepspeed_stage_2", timeout_minutes=1, ranks=2, accelerator="auto"))
        is _DeepSpeed
    )


@pytest.mark.parametrize(
    ("launcher", "by_slurm"), [({}, True), ({"TORCHELASTIC_RUN_ID": "7"}, False)]
)
def test_torchrun_within_a_slurm_job_knows_the_ranks(
    launcher: dict[str, str], by_slurm: bool, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", **launcher}.items():
        monkeypatch.setenv(name, value)
    assert train._launched_by_slurm() == by_slurm
