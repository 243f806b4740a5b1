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
from importlib.metadata import version
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
    read_manifest,
)
from whisper_aut.utils import write_text

RUN_VARIABLE = "WHISPER_AUT_RUN"  # the directory name of the run, the same on all ranks of a job
RECORDED_PACKAGES = (
    "whisper-aut",
    "torch",
    "torchaudio",
    "lightning",
    "transformers",
    "webdataset",
    "deepspeed",
    "omegaconf",
)


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run.

    Attributes:
        path: The run directory.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint. If there is none, the path of the link `last.ckpt`."""
        return next(reversed(checkpoints_in(self.checkpoints)), self.checkpoints / LAST)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def done(self) -> Path:
        return self.path / "done.json"

    @property
    def metrics(self) -> Path:
        return self.path / "logs" / "metrics.csv"

    @contextmanager
    def metrics_aside(self) -> Iterator[None]:
        """Rename the metrics file to `metrics.N.csv`, because a new logger would overwrite it.

        If nothing is logged inside the context, the file gets its name back.
        """
        if not self.metrics.exists():
            yield
            return
        kept = _put_aside(self.metrics)
        try:
            yield
        finally:
            if not self.metrics.exists():
                kept.rename(self.metrics)

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def ledger(self, rank: int) -> Path:
        return self.path / ("ledger.jsonl" if not rank else f"ledger-rank{rank}.jsonl")

    def export(self, kind: str) -> Path:
        return self.path / "export" / kind

    def record(self, config_yaml: str, facts: Mapping[str, Any]) -> None:
        """Write the config and the environment of the run, and point `latest` to it.

        Files of a resumed run that would change are kept as `config.N.yaml` and
        `environment.N.json`.

        Args:
            config_yaml: The resolved config.
            facts: Metadata to add to `environment.json`.
        """
        environment = json.dumps({**_environment(), **facts}, indent=1)
        for path, text in ((self.config, config_yaml), (self.environment, environment)):
            if path.exists() and path.read_text() != text:
                _put_aside(path)
            write_text(path, text)
        self.point_latest()

    def point_latest(self) -> None:
        """Point the link `latest`, next to the runs of this name, to this run."""
        link, partial = self.path.with_name("latest"), self.path.with_name(f".latest-{os.getpid()}")
        try:
            partial.symlink_to(self.path.name)
            os.replace(partial, link)
        except OSError:  # the file system has no links; the newest timestamp is still the last
            partial.unlink(missing_ok=True)

    def finished_with(self, fingerprint: str) -> bool:
        """Return whether this run finished with the config and data of this fingerprint.

        Args:
            fingerprint: From `training.factory.run_fingerprint`.
        """
        try:
            return json.loads(self.done.read_text())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return False


def is_first_rank() -> bool:
    """Return whether this process is rank 0, which writes the shared files."""
    return not rank_zero_only.rank


def create_job_run(
    root: Path, name: str, config_yaml: str, facts: Mapping[str, Any]
) -> RunDirectory:
    """Return the run directory of this job. Rank 0 creates it, and all ranks agree on its name.

    Args:
        root: Folder of all runs.
        name: Name of the run in the config.
        config_yaml: The resolved config.
        facts: Metadata to add to `environment.json`.

    Raises:
        UserError: If the directory cannot be written, or this rank does not know its name.
    """
    given = _given_name()
    run = create_run(root, name, config_yaml, facts, given) if is_first_rank() else None
    # In a later run of the same process, ranks are connected and rank 0 can send the name.
    if dist.is_initialized() and dist.get_world_size() > 1:
        told = [run.path.name if run else ""]
        dist.broadcast_object_list(told)
        return RunDirectory(root / name / told[0])
    if run is None and not given:
        raise UserError(
            f"Rank {rank_zero_only.rank} does not know the run's name. Under torchrun, set "
            f"{RUN_VARIABLE} to one name for all "
            "ranks, or use --standalone or --rdzv-id."
        )
    return run or RunDirectory(root / name / str(given))


def wait_for_all_ranks() -> None:
    """Wait until all ranks have called this. Returns at once if there is only one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _given_name() -> str | None:
    """Return a name that all ranks know: the user's, or the job id of Slurm or torchrun."""
    environment = os.environ
    if environment.get(RUN_VARIABLE):
        return environment[RUN_VARIABLE]
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm-{environment['SLURM_JOB_ID']}"
    torchrun = environment.get("TORCHELASTIC_RUN_ID", "none")
    return None if torchrun == "none" else f"torchrun-{torchrun}"


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


def create_run(
    root: Path, name: str, config_yaml: str, facts: Mapping[str, Any], given: str | None = None
) -> RunDirectory:
    """Create a run directory and record the config, the environment and the data in it.

    Args:
        root: Folder of all runs.
        name: Name of the run in the config.
        config_yaml: The resolved config.
        facts: Metadata to add to `environment.json`.
        given: Directory name; a timestamp by default.

    Raises:
        UserError: If the directory cannot be written, or already contains checkpoints.
    """
    folder = root / name
    run = RunDirectory(
        folder / given if given else _unused(folder, datetime.now().strftime("%Y%m%d-%H%M%S"))
    )
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=given is not None)
        if checkpoints_in(run.checkpoints):
            raise UserError(
                f"{run.path} holds the checkpoints of an earlier run of this name. Go on with "
                f"it by --resume {run.path}, or set "
                f"{RUN_VARIABLE} to another name."
            )
        run.record(config_yaml, facts)
    except OSError as error:
        raise UserError(
            f"Cannot write the run directory {run.path}: {error.strerror}. Set runs=FOLDER to "
            "write elsewhere."
        ) from None
    return run


def list_runs(root: Path, name: str) -> list[RunDirectory]:
    """Return the runs of a name, newest first, by the time their config was last written."""
    folder = root / name
    paths = (
        (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        if folder.is_dir()
        else ()
    )
    runs = [RunDirectory(path) for path in paths if (path / "config.yaml").exists()]
    return sorted(
        runs, key=lambda run: (run.config.stat().st_mtime_ns, run.path.name), reverse=True
    )


def _put_aside(path: Path) -> Path:
    """Rename `NAME.EXT` to `NAME.N.EXT`, with the next free number N, and return the new path."""
    middles = (
        other.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
        for other in path.parent.iterdir()
    )
    number = max((int(middle) for middle in middles if middle.isdecimal()), default=-1) + 1
    return path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))


def _unused(folder: Path, stamp: str) -> Path:
    """Return a path that does not exist, since two runs may begin in the same second."""
    names = (stamp, *(f"{stamp}-{number}" for number in range(2, 1000)))
    return next(folder / name for name in names if not (folder / name).exists())


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
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


AUTO = "auto"


def find_resume_checkpoint(
    resume: str, newest: RunDirectory | None, place: str, warn: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run.

    Args:
        resume: Empty, `auto`, a checkpoint, or a run directory.
        newest: The newest run of this name.
        place: Folder of the runs of this name. Its last part is the name of the run.
        warn: Called with a message for each damaged checkpoint that is skipped.

    Raises:
        UserError: If there is no such checkpoint, none is valid, or it is from a run with another
            name.
    """
    if not resume:
        return None
    if resume == AUTO:
        return (
            latest_valid_checkpoint(newest, warn) if newest and not newest.done.exists() else None
        )
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        found = latest_valid_checkpoint(RunDirectory(path), warn)
        if found is None:
            raise UserError(
                f"{path} has saved no checkpoint yet. Without --resume, the run begins anew."
            )
        _check_name(found, Path(place).name)
        return found
    if not is_checkpoint(path):
        kind = "is not a checkpoint" if path.exists() else "does not exist"
        raise UserError(
            f"There is no checkpoint {path}: it {kind}. Give a run directory, a step-….ckpt of "
            f"{place}/…/checkpoints, or "
            "--resume auto."
        )
    if damage := find_damage(path, hashes=is_first_rank()):
        raise UserError(
            f"{path} is damaged: {damage}. --resume auto takes the newest one that is not."
        )
    _check_name(path.resolve(), Path(place).name)
    return path.resolve()


def _check_name(checkpoint: Path, name: str) -> None:
    """Reject a checkpoint from a run of another name: other configs may start from that run."""
    config = RunDirectory(checkpoint.parent.parent).config
    began = yaml.safe_load(config.read_text())["name"] if config.is_file() else name
    if began != name:
        raise UserError(
            f"{checkpoint} is of a run of {began!r}; this config trains {name!r}. To go on with "
            f"that run, add name={began}; to begin "
            f"another from its weights, whisper-aut export {config.parent} --format whisper "
            "--out FOLDER and set model.path=FOLDER."
        )


def latest_valid_checkpoint(run: RunDirectory, warn: Callable[[str], None]) -> Path | None:
    """Return the newest valid checkpoint of a run, or None if it has not saved any.

    Args:
        run: The run.
        warn: Called with a message for each damaged checkpoint that is skipped.

    Raises:
        UserError: If all checkpoints are damaged.
    """
    # Only rank 0 compares hashes. `load_checkpoint` broadcasts its choice to all ranks.
    path, refused = latest_valid(run.checkpoints, hashes=is_first_rank())
    for line in refused:
        warn(line)
    if path is None and checkpoints_in(run.checkpoints):
        raise UserError(
            f"No checkpoint in {run.checkpoints} is whole:\n"
            + "\n".join(f"  - {line}" for line in refused)
        )
    return path.resolve() if path else None


def check_step_size(checkpoint: Path, batch_clips: int, ranks: int, accumulate: int) -> None:
    """Check that a resumed run keeps the number of clips in a step.

    With another number, the learning rate schedule and the position in the data would not match.

    Args:
        checkpoint: The checkpoint to resume from.
        batch_clips: Clips in a micro-batch.
        ranks: Number of ranks.
        accumulate: Micro-batches in an optimizer step.

    Raises:
        UserError: If the numbers differ. If possible, the message says which accumulation gives
            the same steps on these ranks.
    """
    before, now = read_manifest(checkpoint).clips_per_step, batch_clips * ranks * accumulate
    if before in (0, now):  # 0 if steps were measured in seconds of audio
        return
    micro_batch = batch_clips * ranks
    way = (
        f"set trainer.accumulate={before // micro_batch}"
        if before % micro_batch == 0
        else f"choose data.batch_clips and trainer.accumulate so that batch_clips × {ranks} × "
        f"accumulate = {before}"
    )
    raise UserError(
        f"{checkpoint} was written by steps of {before} clips; this config makes steps of {now} "
        f"({batch_clips} clips × {ranks} "
        f"ranks × {accumulate} accumulated). To go on as before, {way}."
    )
