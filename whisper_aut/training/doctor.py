"""Checks of `whisper-aut doctor`: can this machine run a config?

Each check returns a `Finding`. No check leaves files on the machine.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.table import Table
from rich.text import Text

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.reader import DEFAULT_POLICY, ReadPolicy, Sample
from whisper_aut.data.shards import ShardIndex, iter_samples
from whisper_aut.errors import UserError
from whisper_aut.training.callbacks.stopping import check_disk_space, find_compiler

Status = Literal["ok", "warn", "fail"]
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
PACKAGES = ("torch", "torchaudio", "lightning", "transformers", "deepspeed", "webdataset")
REDUCE_TIMEOUT = timedelta(seconds=60)
LOW_DISK_GIB = 20.0
DRY_RUN_MINUTES = 60.0  # includes the download of the model in a first run
LAUNCHERS = re.compile(
    "SLURM_|TORCHELASTIC_|MASTER_"
    "|(RANK|LOCAL_RANK|NODE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK)$"
)


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: What was checked.
        status: `ok`, `warn` or `fail`.
        detail: What was found and, if something is wrong, what to do.
    """

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
            yield Finding(
                name,
                "fail",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            )


def build_table(findings: Sequence[Finding]) -> Table:
    """Return the findings as a table for the console."""
    table = Table(title="whisper-aut doctor", title_justify="left")
    for column in ("what", "", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.name,
            Text(finding.status, style=STYLES[finding.status]),
            finding.detail,
        )
    return table


def check_versions() -> Finding:
    """Check that all packages are installed and that torch and torchaudio match."""
    found, missing = [f"Python {sys.version.split()[0]}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("versions", "fail", f"missing: {', '.join(missing)}; run make setup")
    if (
        version("torch").split("+")[0].rsplit(".", 1)[0]
        != version("torchaudio").split("+")[0].rsplit(".", 1)[0]
    ):
        return Finding(
            "versions",
            "fail",
            f"torch and torchaudio do not fit: {', '.join(found)}; run make setup",
        )
    return Finding("versions", "ok", ", ".join(found))


def check_devices(accelerator: str, devices: int | str) -> Finding:
    """Compare the available GPUs with those that a config needs, and run a product on one.

    Args:
        accelerator: Lightning's accelerator name.
        devices: Number of devices, or `auto`.
    """
    count = torch.cuda.device_count()
    wanted = devices if isinstance(devices, int) else 1
    if accelerator in ("gpu", "cuda") and count < wanted:
        return Finding(
            "devices",
            "fail",
            f"the config asks for {wanted} GPUs and PyTorch sees {count}; hardware=cpu runs on "
            "the CPU",
        )
    if not count:
        return Finding("devices", "ok", f"no GPU; {os.cpu_count()} CPU cores")
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    probe = torch.ones(256, 256, device="cuda")
    assert float((probe @ probe)[0, 0]) == 256.0
    memory = [torch.cuda.mem_get_info(number)[0] / 2**30 for number in range(count)]
    free = ", ".join(f"{name}: {gib:.0f} GiB free" for name, gib in zip(names, memory, strict=True))
    return Finding("devices", "ok", f"CUDA {torch.version.cuda}; {free}")


def check_collectives() -> Finding:
    """Run an all-reduce between two processes: over NCCL if there are two GPUs, else over gloo."""
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_reduce, args=(backend, port), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    note = (
        "; NCCL needs two GPUs to be tried"
        if backend == "gloo" and torch.cuda.is_available()
        else ""
    )
    return Finding("collectives", "ok", f"{backend}: two ranks of this machine sum up{note}")


def check_deepspeed(strategy: str) -> Finding:
    """Import DeepSpeed and check whether its CPU Adam, which offloading needs, can be built.

    Args:
        strategy: Strategy name of the config.
    """
    import deepspeed

    compatible = deepspeed.ops.op_builder.CPUAdamBuilder().is_compatible(verbose=False)  # pyright: ignore[reportAttributeAccessIssue]
    compiler = find_compiler()
    if strategy.endswith("_offload") and not (compatible and compiler):
        return Finding(
            "DeepSpeed",
            "fail",
            "offloading compiles DeepSpeed's CPU Adam, which needs a C++ compiler",
        )
    note = (
        "CPU Adam can be built"
        if compatible and compiler
        else "CPU Adam cannot be built, so no offloading"
    )
    return Finding(
        "DeepSpeed", "ok" if compatible and compiler else "warn", f"{deepspeed.__version__}; {note}"
    )


def check_disk(folder: Path, checkpoint_bytes: int = 0, kept: int = 0) -> Finding:
    """Check that the folder of runs is writable and has room for the checkpoints.

    Args:
        folder: Folder of the runs.
        checkpoint_bytes: Size of one checkpoint; 0 if unknown.
        kept: Number of checkpoints that a run keeps.

    Raises:
        UserError: If the folder is not writable or two checkpoints do not fit.
    """
    warning = check_disk_space(folder, checkpoint_bytes, kept)
    place = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    free = shutil.disk_usage(place).free / 2**30
    detail = f"{folder} can be written, {free:.1f} GiB free"
    detail += (
        f"; a checkpoint takes about {checkpoint_bytes / 2**30:.1f} GiB" if checkpoint_bytes else ""
    )
    if warning:
        return Finding("disk", "warn", warning)
    return Finding("disk", "ok" if free > LOW_DISK_GIB or checkpoint_bytes else "warn", detail)


def check_shards(
    indexes: Sequence[ShardIndex], limits: ClipLimits, policy: ReadPolicy = DEFAULT_POLICY
) -> Finding:
    """Read the first sample of every source, local or remote."""
    for index in indexes:
        first = next(iter_samples(index, limits, policy), None)
        if not isinstance(first, Sample):
            why = "it holds no sample" if first is None else f"{first.reason}: {first.detail}"
            return Finding(
                "shards",
                "fail",
                f"{index.root}: the first sample cannot be read ({why}); whisper-aut data "
                "inspect says more",
            )
    clips, hours = (
        sum(index.samples for index in indexes),
        sum(index.seconds for index in indexes) / 3600,
    )
    return Finding(
        "shards",
        "ok",
        f"{len(indexes)} sources, {clips:,} clips, {hours:,.1f} hours; the first sample of each "
        "was read",
    )


def check_dry_run(config_yaml: str, minutes: float = DRY_RUN_MINUTES) -> Finding:
    """Train a config in a separate process and delete the run.

    The process does not inherit the variables of Slurm or torchrun. With them, it would wait for
    ranks that nobody starts.

    Args:
        config_yaml: The config, which must be limited to two steps.
        minutes: Time limit.
    """
    with TemporaryDirectory(prefix="whisper-aut-doctor-") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(config_yaml)
        command = [
            sys.executable,
            "-m",
            "whisper_aut.cli",
            "train",
            str(config),
            f"runs={folder}/runs",
        ]
        pipe = subprocess.PIPE
        alone = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
        with subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=alone
        ) as process:
            try:
                output, errors = process.communicate(timeout=60 * minutes)
            except BaseException as error:
                # Kills the ranks and data workers that it started as well.
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                why = (
                    f"two steps were not done after {minutes:g} minutes; whisper-aut train on "
                    "this node alone shows where it waits"
                )
                return Finding("dry run", "fail", why)
        if process.returncode:
            return Finding(
                "dry run", "fail", f"two steps failed: {(errors.strip() or output.strip())[-800:]}"
            )
        line = next((line for line in output.splitlines() if line.startswith("Trained at")), "")
    return Finding("dry run", "ok", f"two steps, a validation and a checkpoint. {line}")


def _reduce(rank: int, backend: str, port: int) -> None:
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=REDUCE_TIMEOUT,
    )
    value = torch.ones(1, device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    dist.all_reduce(value)
    dist.destroy_process_group()
    if float(value) != 2.0:
        raise RuntimeError(f"two ranks summed to {float(value)}")
