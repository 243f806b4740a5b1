"""The run directory `runs/<name>/<timestamp>/` and what is written into it before the first step.

In: the resolved config. Out: a `RunDirectory`. Next: checkpoints, logs, ledger, exports, scores and report land in it. `latest` beside
the timestamps points to the newest run.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from whisper_aut.errors import UserError

RECORDED_PACKAGES = ("whisper-aut", "torch", "torchaudio", "lightning", "transformers", "webdataset", "deepspeed", "omegaconf")


@dataclass(frozen=True)
class RunDirectory:
    """Names the places of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def done(self) -> Path:
        return self.path / "done.json"

    @property
    def metrics(self) -> Path:
        return self.path / "logs" / "metrics.csv"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def export(self, kind: str) -> Path:
        return self.path / "export" / kind

    def finished_with(self, fingerprint: str) -> bool:
        """Return whether this run went to its end with the config and data that `fingerprint` stands for."""
        try:
            return json.loads(self.done.read_text())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return False


def create_run(root: Path, name: str, config_yaml: str, facts: Mapping[str, Any]) -> RunDirectory:
    """Make a new run directory and record config, environment and data in it.

    Raises:
        UserError: the directory cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = RunDirectory(root / name / stamp)
    number = 1
    while run.path.exists():
        number += 1
        run = RunDirectory(root / name / f"{stamp}-{number}")
    try:
        run.checkpoints.mkdir(parents=True)
        run.config.write_text(config_yaml)
        (run.path / "environment.json").write_text(json.dumps({**_environment(), **facts}, indent=1))
        _point_latest(root / name, run.path.name)
    except OSError as error:
        raise UserError(
            f"Cannot write the run directory {run.path}: {error.strerror}. Set runs=FOLDER to write elsewhere."
        ) from None
    return run


def latest_run(root: Path, name: str) -> RunDirectory | None:
    """Return the newest run of a name, if there is one."""
    folder = root / name
    stamps = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()) if folder.is_dir() else []
    return RunDirectory(stamps[-1]) if stamps else None


def _point_latest(folder: Path, target: str) -> None:
    link = folder / "latest"
    partial = folder / f".latest-{os.getpid()}"
    try:
        partial.symlink_to(target)
        os.replace(partial, link)
    except OSError:  # a file system without links: the timestamps still sort
        partial.unlink(missing_ok=True)


def _environment() -> dict[str, Any]:
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: version(name) for name in RECORDED_PACKAGES},
        "git": _git_revision(),
    }


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
