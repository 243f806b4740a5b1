"""Checks of the machine: those of `whisper-aut doctor`, and those before every run.

Each check of `whisper-aut doctor` returns a `Finding`. No check leaves files on the machine.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import ShardIndex, iter_samples
from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import check_disk_space, existing_parent
from whisper_aut.utils import installed_versions

Status = Literal["ok", "warn", "fail"]
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
PACKAGES = ("torch", "torchaudio", "lightning", "transformers", "webdataset")
LOW_DISK_GIB = 20.0
DRY_RUN_MINUTES = 60.0  # includes the download of the model in a first run
# Variables of Slurm and torchrun. With them, a dry run would wait for ranks that nobody starts.
LAUNCHERS = re.compile(
    "SLURM_|TORCHELASTIC_|MASTER_"
    "|(RANK|LOCAL_RANK|NODE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK)$"
)


@dataclass(frozen=True)
class Finding:
    """Result of one check: what was checked, and what was found or has to be done."""

    name: str
    status: Status
    detail: str


def examine(checks: Sequence[tuple[str, Callable[[], Finding]]]) -> Iterator[Finding]:
    """Run the checks one by one. A check that raises is reported as failed."""
    for name, check in checks:
        try:
            yield check()
        except UserError as error:
            yield Finding(name, "fail", str(error))
        except Exception as error:
            message = str(error).partition("\n")[0]
            yield Finding(name, "fail", f"{type(error).__name__}: {message}")


def build_table(findings: Sequence[Finding]) -> Table:
    """Return the findings as a table for the console."""
    table = Table("what", "", "found", title="whisper-aut doctor", title_justify="left")
    for finding in findings:
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(finding.name, status, finding.detail)
    return table


def check_versions() -> Finding:
    """Check that all packages are installed and that torch and torchaudio match."""
    found = installed_versions(PACKAGES)
    if missing := ", ".join(name for name in PACKAGES if name not in found):
        return Finding("versions", "fail", f"not installed: {missing}; run make setup")
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    minor = {found[name].split("+")[0].rpartition(".")[0] for name in ("torch", "torchaudio")}
    if len(minor) > 1:
        return Finding("versions", "fail", f"torch and torchaudio differ: {listed}; run make setup")
    return Finding("versions", "ok", f"Python {sys.version.split()[0]}, {listed}")


def check_devices(accelerator: str, devices: int | str) -> Finding:
    """Compare the available GPUs with those that a config needs, and run a product on one."""
    count = torch.cuda.device_count()
    wanted = devices if isinstance(devices, int) else 1
    if accelerator in ("gpu", "cuda") and count < wanted:
        detail = f"the config needs {wanted} GPUs, PyTorch sees {count}; hardware=cpu uses the CPU"
        return Finding("devices", "fail", detail)
    if not count:
        return Finding("devices", "ok", f"no GPU; {os.cpu_count()} CPU cores")
    ones = torch.ones(256, 256, device="cuda")
    assert float((ones @ ones)[0, 0]) == 256.0
    gpus = ", ".join(
        f"{torch.cuda.get_device_name(i)}: {torch.cuda.mem_get_info(i)[0] / 2**30:.0f} GiB free"
        for i in range(count)
    )
    return Finding("devices", "ok", f"CUDA {torch.version.cuda}; {gpus}")


def check_deepspeed(strategy: str) -> Finding:
    """Import DeepSpeed and check whether its CPU Adam, which offloading needs, can be built."""
    try:
        import deepspeed
    except ImportError:
        status = "fail" if strategy.startswith("deepspeed") else "ok"
        return Finding("DeepSpeed", status, "not installed; strategy=deepspeed_… needs it")

    compatible = deepspeed.ops.op_builder.CPUAdamBuilder().is_compatible(verbose=False)  # pyright: ignore[reportAttributeAccessIssue]
    if compatible and find_compiler():
        return Finding("DeepSpeed", "ok", f"{deepspeed.__version__}; CPU Adam can be built")
    status = "fail" if strategy.endswith("_offload") else "warn"
    detail = "offloading is not possible: it compiles CPU Adam, which needs a C++ compiler"
    return Finding("DeepSpeed", status, f"{deepspeed.__version__}; {detail}")


def check_disk(folder: Path, checkpoint_bytes: int = 0, kept: int = 0) -> Finding:
    """Check that the folder of runs is writable and has room for the checkpoints.

    Raises:
        UserError: If the folder is not writable or two checkpoints do not fit.
    """
    if warning := check_disk_space(folder, checkpoint_bytes, kept):
        return Finding("disk", "warn", warning)
    free = shutil.disk_usage(existing_parent(folder)).free / 2**30
    detail = f"{folder} is writable, {free:.1f} GiB free"
    if checkpoint_bytes:
        detail += f"; a checkpoint takes about {checkpoint_bytes / 2**30:.1f} GiB"
    enough = checkpoint_bytes or free > LOW_DISK_GIB
    return Finding("disk", "ok" if enough else "warn", detail)


def check_shards(indexes: Sequence[ShardIndex], limits: ClipLimits) -> Finding:
    """Read the first sample of every source, local or remote."""
    for index in indexes:
        first = next(iter_samples(index, limits), None)
        if not isinstance(first, Sample):
            why = f"{first.reason}: {first.detail}" if first else "there is none"
            detail = f"{index.root}: cannot read the first sample ({why}); try whisper-aut data "
            return Finding("shards", "fail", f"{detail}inspect")
    clips = sum(index.samples for index in indexes)
    hours = sum(index.seconds for index in indexes) / 3600
    detail = f"{len(indexes)} sources, {clips:,} clips, {hours:,.1f} hours; read the first of each"
    return Finding("shards", "ok", detail)


def check_dry_run(config_yaml: str, minutes: float = DRY_RUN_MINUTES) -> Finding:
    """Train a config, limited to two steps, in a separate process and delete the run."""
    with TemporaryDirectory(prefix="whisper-aut-doctor-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(config_yaml)
        program = [sys.executable, "-m", "whisper_aut.cli"]
        environment = {
            name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)
        }
        with subprocess.Popen(
            [*program, "train", str(config), f"runs={folder}/runs"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        ) as process:
            try:
                output, errors = process.communicate(timeout=60 * minutes)
            except BaseException as error:
                # Kills the ranks and data workers that it started as well.
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                detail = f"two steps did not finish within {minutes:g} minutes; run whisper-aut "
                return Finding("dry run", "fail", f"{detail}train on this node to see where it is")
    if process.returncode:
        message = (errors.strip() or output.strip())[-800:]
        return Finding("dry run", "fail", f"two steps failed: {message}")
    line = next((line for line in output.splitlines() if line.startswith("Trained at")), "")
    return Finding("dry run", "ok", f"two steps, a validation and a checkpoint. {line}")


def check_accelerator(accelerator: str) -> None:
    """Check that a device of the requested kind is available.

    Raises:
        UserError: If there is none.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(accelerator, True):
        raise UserError(
            f"hardware.accelerator={accelerator}, but PyTorch sees no such device. Use "
            "hardware=cpu, or hardware=auto for what this machine has; whisper-aut doctor checks "
            "drivers and devices."
        )


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, or None."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def check_compilable(strategy: str) -> None:
    """Check that `model.compile` can be used with a strategy.

    Raises:
        UserError: If there is no compiler, or under ZeRO-3, which fetches the weights of a layer
            while the layer runs.
    """
    if "stage_3" in strategy:
        raise UserError(
            f"model.compile does not work with strategy.name={strategy}: compiled layers cannot "
            "fetch their weights. Set model.compile=false or use another strategy."
        )
    if find_compiler() is None:
        raise UserError(
            "model.compile=true needs a C++ compiler, such as g++ or the one in CXX. Install one, "
            "or set model.compile=false."
        )
