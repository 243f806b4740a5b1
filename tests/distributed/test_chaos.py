"""A job that is killed again and again ends where one that is left alone does; and ranks that die
do not hang the others.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import REPOSITORY
from tests.support.jobs import Jobs, assert_close_weights, curve
from tests.support.training import settings_for
from whisper_aut.config import dump_settings
from whisper_aut.training.checkpoint import checkpoints_in, read_manifest
from whisper_aut.training.run_dir import RunDirectory

STEPS = 60
START_SECONDS = 900  # imports, gloo and a first validation, on a machine that may be busy
OVERRIDES = (
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every_steps=5",
    "trainer.valid_every_steps=20",
    "trainer.accumulate=2",
    "data.batch_clips=2",
    "data.workers=1",
    "hardware.devices=2",
    "strategy=ddp",
)


def consumed(folder: Path, *names: str) -> dict[int, list[str]]:
    """Return the keys that each step read, over all ranks; of a step that a later job did again,
    the later time counts.
    """
    steps: dict[int, list[str]] = {}
    for name in names:
        read = defaultdict(list)
        for file in folder.glob(f"{name}-keys-rank*.jsonl"):
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                read[entry["step"]] += entry["keys"]
        steps |= {step: sorted(keys) for step, keys in read.items()}
    return steps


def on(ranks: int) -> tuple[str, ...]:
    """Return the overrides for a number of ranks with the same clips a step."""
    return (*OVERRIDES, f"hardware.devices={ranks}", f"trainer.accumulate={4 // ranks}")


SAME_RANKS: list[tuple[int, dict[str, Any]]] = [
    (2, {"kind": "SIGKILL", "rank": 1}),
    (2, {"while": "writing", "rank": 0}),
    (2, {"kind": "SIGTERM", "rank": 1}),
    (2, {"kind": "SIGKILL", "rank": "all"}),
    (2, {"kind": "SIGUSR1", "rank": 0}),
    (2, {"while": "writing", "rank": 1}),
    (2, {"kind": "SIGKILL", "rank": 0}),
    (2, {"kind": "SIGTERM", "rank": "all"}),
    (2, {}),
]
OTHER_RANKS: list[tuple[int, dict[str, Any]]] = [
    (2, {"kind": "SIGKILL", "rank": "all"}),
    (1, {"kind": "SIGUSR1", "rank": 0}),
    (2, {"while": "writing", "rank": 1}),
    (1, {}),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("plan", "tolerance", "asynchronous"),
    [(SAME_RANKS, 1e-6, False), (SAME_RANKS, 1e-6, True), (OTHER_RANKS, 1e-4, False)],
    ids=["2 ranks", "2 ranks, asynchronous checkpoints", "2, 1, 2, 1 ranks"],
)
def test_a_job_killed_at_random_moments_ends_as_if_nothing_had_happened(
    plan: list[tuple[int, dict[str, Any]]],
    tolerance: float,
    asynchronous: bool,
    jobs: Jobs,
    tmp_path: Path,
):
    """Another number of ranks adds the same numbers in another order: its weights are close, its
    clips are the same.
    """
    moments = [*sorted(random.Random(7).sample(range(3, STEPS - 3), len(plan) - 1)), 0]
    whole = jobs.add("whole", *OVERRIDES)
    jobs.done(ranks=2)
    for number, ((ranks, fault), step) in enumerate(zip(plan, moments, strict=True)):
        run = jobs.add(
            "parts",
            *on(ranks),
            f"trainer.async_checkpoints={asynchronous}",
            resume="auto",
            fault=fault | {"step": step} if fault else {},
            file=f"parts-{number}",
        )
        finished = jobs.run(ranks=ranks)
        assert (finished.returncode == 0) == (not fault), (
            fault,
            finished.stdout[-1000:],
            finished.stderr[-3000:],
        )
        assert ("Preempted" in finished.stdout) == (fault.get("kind") in ("SIGTERM", "SIGUSR1")), (
            finished.stdout[-1000:]
        )
    assert_close_weights(whole, run, atol=tolerance)
    assert curve(run) == pytest.approx(curve(whole), abs=tolerance)
    assert curve(run, "valid/loss") == pytest.approx(curve(whole, "valid/loss"), abs=tolerance)
    read = consumed(tmp_path, *(f"parts-{number}" for number in range(len(plan))))
    assert read == consumed(tmp_path, "whole-0")
    assert len(read) == len(curve(run)) == STEPS


@pytest.fixture
def two_ranks(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path) -> Path:
    """A config of two ranks that would take minutes."""
    rest = ("trainer.max_epochs=1000", "probe.tasks=[]", "export=[]")
    steps = (
        "trainer.max_steps=2000",
        "trainer.checkpoint_every_steps=1000",
        "trainer.valid_every_steps=1000",
    )
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs", *OVERRIDES, *steps, *rest)
    (tmp_path / "long.yaml").write_text(dump_settings(settings))
    return tmp_path / "long.yaml"


def start(config: Path, *launcher: str) -> tuple[subprocess.Popen[str], RunDirectory]:
    """Start the command line and wait until it makes steps."""
    command = [sys.executable, *launcher, "-m", "whisper_aut.cli", "train", str(config)]
    if launcher:
        command = [sys.executable, *launcher, "--module", "whisper_aut.cli", "train", str(config)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "WHISPER_AUT_RUN": "job", "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    run = RunDirectory(Path(yaml.safe_load(config.read_text())["runs"]) / "smoke" / "job")
    until = time.monotonic() + START_SECONDS
    while not (run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()[0][-3000:]
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no step was made: {process.communicate()[0][-3000:]}")
        time.sleep(0.2)
    return process, run


def descendants(pid: int) -> list[int]:
    """Return the processes below one, read from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [below for child in found for below in descendants(child)]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.slow
def test_a_dead_rank_ends_the_job(two_ranks: Path):
    process, _ = start(two_ranks)
    second = next(  # before the workers that it started
        pid
        for pid in descendants(process.pid)
        if "whisper_aut.cli train" in command_of(pid) and _is_rank(pid, "1")
    )
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - killed < 30
    assert "Traceback" not in output
    assert not descendants(process.pid)


@pytest.mark.slow
def test_slurm_style_preemption_under_torchrun_exits_with_its_code(two_ranks: Path):
    process, run = start(
        two_ranks, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    )
    ranks = [
        pid
        for pid in descendants(process.pid)
        if "whisper_aut.cli" in command_of(pid) and _is_rank(pid, "0")
    ]
    os.kill(ranks[0], signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert "exitcode  : 75" in output or "exitcode: 75" in output, output[-3000:]
    assert "--resume auto" in output
    (saved,) = checkpoints_in(run.checkpoints)
    assert read_manifest(saved).written_by["ranks"] == 2


@pytest.mark.slow
def test_sigterm_to_the_command_line_saves_and_exits_with_its_code(two_ranks: Path):
    process, run = start(two_ranks)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output[-3000:]
    assert len(checkpoints_in(run.checkpoints)) == 1
    assert "Traceback" not in output


def _is_rank(pid: int, rank: str) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    names = {entry.partition(b"=")[0]: entry.partition(b"=")[2].decode() for entry in environment}
    return names.get(b"RANK", names.get(b"LOCAL_RANK")) == rank and b"LOCAL_RANK" in names
