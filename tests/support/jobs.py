"""Training jobs in processes of their own, on one or more ranks; `run_jobs.py` is what each rank
executes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support import REPOSITORY
from tests.support.training import settings_for
from whisper_aut.config import dump_settings
from whisper_aut.export.hf import read_checkpoint
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.run_dir import RunDirectory

STEPS = 20


class Jobs:
    """Collects training jobs and runs them on a number of ranks, in one go."""

    def __init__(self, tmp_path: Path, tiny_whisper: Path, tiny_shards: Path):
        self.tmp_path, self.inputs = tmp_path, (tiny_whisper, tiny_shards)
        self.jobs: list[dict[str, Any]] = []

    def add(
        self, name: str, *overrides: str, resume: str = "", fault: Any = None, file: str = ""
    ) -> RunDirectory:
        base = (
            f"trainer.max_steps={STEPS}",
            "trainer.valid_every_steps=10",
            "trainer.checkpoint_every_steps=10",
        )
        settings = settings_for(*self.inputs, self.tmp_path / name, *base, *overrides)
        config = self.tmp_path / f"{file or f'{name}-{len(self.jobs)}'}.yaml"
        config.write_text(dump_settings(settings))
        self.jobs.append({"config": str(config), "resume": resume, "fault": fault or {}})
        return RunDirectory(self.tmp_path / name / "smoke" / "job")

    def run(self, ranks: int) -> subprocess.CompletedProcess[str]:
        file = self.tmp_path / "jobs.json"
        file.write_text(json.dumps(self.jobs))
        self.jobs = []
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            if ranks > 1
            else []
        )
        command = [sys.executable, *launch, str(Path(__file__).with_name("run_jobs.py")), str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                output, errors = process.communicate(timeout=900)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun then ends its ranks
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def done(self, ranks: int) -> None:
        finished = self.run(ranks)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]


def curve(run: RunDirectory, name: str = "train/loss") -> list[float]:
    return [value for _, value in read_metrics(run.metrics)[name]]


def assert_close_weights(one: RunDirectory, other: RunDirectory, atol: float) -> None:
    first, second = (read_checkpoint(run.last_checkpoint) for run in (one, other))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        if isinstance(weight, torch.Tensor):
            torch.testing.assert_close(
                weight.float(), second[name].float(), atol=atol, rtol=0, msg=name
            )
