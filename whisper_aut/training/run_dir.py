"""The run directory `runs/<name>/<timestamp>/`, and the choice of the checkpoint to resume from.

A run directory contains the config, the environment, checkpoints, logs, ledger, exports, scores
and report. The link `runs/<name>/latest` points to the newest run.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import (
    LAST,
    checkpoints_in,
    find_damage,
    is_checkpoint,
    latest_valid,
    point_link,
    read_manifest,
)
from whisper_aut.utils import installed_versions, parse_json, write_text

AUTO = "auto"
RUN_VARIABLE = "WHISPER_AUT_RUN"  # the directory name of the run, the same on all ranks of a job
RECORDED_PACKAGES = (
    *("whisper-aut", "torch", "torchaudio", "lightning", "transformers", "webdataset", "deepspeed"),
)


@dataclass
class RunDirectory:
    """Paths of a run."""

    path: Path

    def __post_init__(self) -> None:
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.done = self.path / "done.json"
        self.metrics = self.path / "logs" / "metrics.csv"
        self.scores = self.path / "scores.json"
        self.predictions = self.path / "predictions.jsonl"
        self.report = self.path / "report"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint. If there is none, the path of the link `last.ckpt`."""
        return next(reversed(checkpoints_in(self.checkpoints)), self.checkpoints / LAST)

    def ledger(self, rank: int) -> Path:
        return self.path / ("ledger.jsonl" if not rank else f"ledger-rank{rank}.jsonl")

    def export(self, kind: str) -> Path:
        return self.path / "export" / kind

    @contextmanager
    def keep_metrics(self) -> Iterator[None]:
        """Rename the metrics file to `metrics.N.csv`, because a new logger would overwrite it.

        If nothing is logged inside the context, the file gets its name back.
        """
        if not self.metrics.exists():
            yield
            return
        kept = _rename_to_next(self.metrics)
        try:
            yield
        finally:
            if not self.metrics.exists():
                kept.rename(self.metrics)

    def record(self, config_yaml: str, metadata: Mapping[str, Any]) -> None:
        """Write the config and the environment of the run, and point `latest` to it.

        Files of a resumed run that would change are kept as `config.N.yaml` and
        `environment.N.json`.
        """
        environment = json.dumps({**_environment(), **metadata}, indent=1)
        for path, text in ((self.config, config_yaml), (self.environment, environment)):
            if path.exists() and path.read_text() != text:
                _rename_to_next(path)
            write_text(path, text)
        self.point_latest()

    def point_latest(self) -> None:
        """Point the link `latest`, next to the runs of this name, to this run."""
        point_link(self.path.with_name("latest"), self.path)

    def finished_with(self, fingerprint: str) -> bool:
        """Return whether this run finished with the fingerprint of `factory.run_fingerprint`."""
        try:
            return parse_json(self.done.read_text())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return False


def list_runs(root: Path, name: str) -> list[RunDirectory]:
    """Return the runs of a name, newest first, by the time their config was last written."""
    configs = [path for path in (root / name).glob("*/config.yaml") if not path.parent.is_symlink()]
    newest_first = sorted(
        configs, key=lambda path: (path.stat().st_mtime_ns, path.parent.name), reverse=True
    )
    return [RunDirectory(path.parent) for path in newest_first]


def is_first_rank() -> bool:
    """Return whether this process is rank 0, which writes the shared files."""
    return not rank_zero_only.rank


def wait_for_all_ranks() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def create_job_run(
    root: Path, name: str, config_yaml: str, metadata: Mapping[str, Any]
) -> RunDirectory:
    """Return the run directory of this job. Rank 0 creates it, and all ranks agree on its name.

    The `metadata` are added to `environment.json`.

    Raises:
        UserError: If the directory cannot be written, or this rank does not know its name.
    """
    shared_name, run = _shared_run_name(), None
    if is_first_rank():
        run = _create_run(root / name, config_yaml, metadata, shared_name)
    # In a later run of the same process, ranks are connected and rank 0 can send the name.
    if dist.is_initialized() and dist.get_world_size() > 1:
        names = [run.path.name if run else ""]
        dist.broadcast_object_list(names)
        return RunDirectory(root / name / names[0])
    if run is None and not shared_name:
        raise UserError(
            f"Rank {rank_zero_only.rank} does not know the name of the run. Under torchrun, set "
            f"{RUN_VARIABLE} to the same name for all ranks, or use --standalone or --rdzv-id."
        )
    return run or RunDirectory(root / name / str(shared_name))


@contextmanager
def share_run_name(run: RunDirectory) -> Iterator[None]:
    """Set `RUN_VARIABLE` in the environment, which ranks launched by Lightning inherit."""
    if RUN_VARIABLE in os.environ:
        yield
        return
    os.environ[RUN_VARIABLE] = run.path.name
    try:
        yield
    finally:
        del os.environ[RUN_VARIABLE]


def _shared_run_name() -> str | None:
    """Return a name that all ranks know: the user's, or the job id of Slurm or torchrun."""
    if name := os.environ.get(RUN_VARIABLE):
        return name
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm-{os.environ['SLURM_JOB_ID']}"
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if torchrun == "none" else f"torchrun-{torchrun}"


def _create_run(
    folder: Path, config_yaml: str, metadata: Mapping[str, Any], name: str | None
) -> RunDirectory:
    """Create a run directory, named by the time if no name is given, and record the config."""
    run = RunDirectory(folder / name if name else _unused_path(folder))
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=name is not None)
        if checkpoints_in(run.checkpoints):
            raise UserError(
                f"{run.path} contains checkpoints of an earlier run. Continue it with --resume "
                f"{run.path}, or set {RUN_VARIABLE} to another name."
            )
        run.record(config_yaml, metadata)
    except OSError as error:
        raise UserError(
            f"Cannot write the run directory {run.path}: {error.strerror}. Set runs=FOLDER to "
            "write elsewhere."
        ) from None
    return run


def _unused_path(folder: Path) -> Path:
    """Return a path that does not exist, since two runs may begin in the same second."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (stamp, *(f"{stamp}-{number}" for number in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


def _rename_to_next(path: Path) -> Path:
    """Rename `NAME.EXT` to `NAME.N.EXT`, with the next free number N, and return the new path."""
    middles = (
        other.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
        for other in path.parent.iterdir()
    )
    number = max((int(middle) for middle in middles if middle.isdecimal()), default=-1) + 1
    return path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))


def _environment() -> dict[str, Any]:
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": installed_versions(RECORDED_PACKAGES),
        "git": _git_revision(),
    }


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            [*command, "--abbrev=12"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def check_resume(resume: str, folder: Path) -> Path | None:
    """Check the path given to `--resume` without reading tensors, and return it.

    None is returned if it is empty or `auto`. `folder` contains all runs of this name.

    Raises:
        UserError: If there is no checkpoint, or it is from a run with another name.
    """
    if resume in ("", AUTO):
        return None
    path = Path(resume).resolve()
    if (path / "checkpoints").is_dir():
        run = RunDirectory(path)
        if not checkpoints_in(run.checkpoints):
            raise UserError(f"{path} has no checkpoint yet. Run again without --resume.")
    elif is_checkpoint(path):
        run = RunDirectory(path.parent.parent)
    else:
        problem = "is not a checkpoint" if path.exists() else "does not exist"
        raise UserError(
            f"Cannot resume: {path} {problem}. Give a run directory, a checkpoint "
            f"{folder}/…/checkpoints/step-….ckpt, or --resume auto."
        )
    name, config = folder.name, run.config
    run_name = yaml.safe_load(config.read_text())["name"] if config.is_file() else name
    if run_name != name:  # other configs may start from that run
        raise UserError(
            f"{path} belongs to a run named {run_name!r}, but this config is named {name!r}. "
            f"To continue that run, add name={run_name}. To start another run from its weights, "
            f"use whisper-aut export {run.path} --format whisper --out FOLDER and set "
            "model.path=FOLDER."
        )
    return path


def find_resume_checkpoint(
    resume: str, newest: RunDirectory | None, folder: Path, warn: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run.

    `resume` and `folder` are those of `check_resume`. `newest` is the newest run of this name that
    has finished or has a checkpoint. `warn` is called for each damaged checkpoint.

    Raises:
        UserError: If there is no such checkpoint, none is valid, or it is from a run with another
            name.
    """
    path = check_resume(resume, folder)
    if path is None and (not resume or newest is None or newest.done.exists()):
        return None
    hashes = is_first_rank()  # `load_checkpoint` broadcasts the choice of rank 0 to all ranks
    if path is None or not is_checkpoint(path):
        run = RunDirectory(path) if path else newest
        assert run
        return latest_valid(run.checkpoints, warn, hashes=hashes)
    if damage := find_damage(path, hashes=hashes):
        raise UserError(
            f"{path} is damaged: {damage}. --resume auto uses the newest valid checkpoint."
        )
    return path


def check_step_size(checkpoint: Path, batch_clips: int, ranks: int, accumulate: int) -> None:
    """Check that a resumed run keeps the number of clips in an optimizer step.

    With another number, the learning rate schedule and the position in the data would not match.

    Raises:
        UserError: If the numbers differ. If possible, the message says which accumulation gives the
            same steps on these ranks.
    """
    saved, now = read_manifest(checkpoint).clips_per_step, batch_clips * ranks * accumulate
    if saved in (0, now):  # 0 if steps were measured in seconds of audio
        return
    micro_batches, rest = divmod(saved, batch_clips * ranks)
    advice = (
        f"choose data.batch_clips and trainer.accumulate so that batch_clips × {ranks} × "
        f"accumulate = {saved}"
        if rest
        else f"set trainer.accumulate={micro_batches}"
    )
    raise UserError(
        f"{checkpoint} was trained with {saved} clips per step, but this config has {now} "
        f"({batch_clips} clips × {ranks} ranks × {accumulate} accumulated). To continue, {advice}."
    )
