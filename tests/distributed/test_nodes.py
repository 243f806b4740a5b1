"""The launch commands of docs/scale.md on two "nodes": processes of this machine, one rank each."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support import REPOSITORY
from tests.support.jobs import curve
from tests.support.pages import blocks_of
from tests.support.training import settings_for
from whisper_aut.config import dump_settings
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.training.train import train

BLOCKS = blocks_of(REPOSITORY / "docs" / "scale.md")
NODES = ("hardware.devices=1", "hardware.nodes=2", "strategy=ddp", "data.workers=0")
# Starts its command once for each of two nodes, as Slurm does.
SRUN = """#!/bin/bash
for node in 0 1; do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" > "$LOGS/node-$node" 2>&1 &
    ranks+=($!)
done
for rank in "${ranks[@]}"; do wait "$rank" || status=$?; done
exit ${status:-0}
"""


@pytest.fixture
def config(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path) -> Path:
    """The config of two ranks; that of one rank with the same steps has been trained."""
    short = ("trainer.max_steps=3", "probe.tasks=[]", "export=[]")
    train(
        settings_for(tiny_whisper, tiny_shards, tmp_path / "one", *short, "data.batch_clips=4"),
        Console(quiet=True),
    )
    settings = settings_for(
        *(tiny_whisper, tiny_shards, tmp_path / "two", *short, *NODES), "data.batch_clips=2"
    )
    path = tmp_path / "nodes.yaml"
    path.write_text(dump_settings(settings))
    return path


def check_losses(folder: Path) -> None:
    one, two = ((folder / name / "smoke" / "latest").resolve() for name in ("one", "two"))
    assert curve(RunDirectory(two)) == pytest.approx(curve(RunDirectory(one)), abs=1e-4)
    assert len(list((two / "checkpoints" / "last.ckpt").glob("weights-*"))) == 2


@pytest.mark.slow
def test_one_torchrun_per_node(config: Path, tmp_path: Path):
    (command,) = (
        words for block in BLOCKS for words in block.commands if any("--nnodes" in w for w in words)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    changed = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "--nnodes=8": ["--nnodes=2", "--local-addr=127.0.0.1"],
        "--nproc-per-node=8": ["--nproc-per-node=1"],
        "--rdzv-endpoint=$HEAD:29500": [f"--rdzv-endpoint={endpoint}"],
        "conf/aut.yaml": [str(config)],
        "hardware=8x8gpu": [],
    }
    assert changed.keys() <= set(command), "the command of the page has changed"
    words = [new for word in command for new in changed.get(word, [word])]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    logs = [(tmp_path / f"agent-{node}").open("w+") for node in (0, 1)]
    agents = [
        subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=tmp_path)
        for log in logs
    ]
    try:
        statuses = [agent.wait(timeout=900) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert statuses == [0, 0], [Path(log.name).read_text()[-3000:] for log in logs]
    check_losses(tmp_path)


def run_slurm_script(folder: Path, program: str, config: Path) -> subprocess.CompletedProcess[str]:
    """Run the script of the page with programs in the place of Slurm's."""
    (script,) = (block.text for block in BLOCKS if "scontrol" in block.text)
    words = "conf/aut.yaml hardware=8x8gpu data.root=/data"
    assert words in script
    script = script.replace(words, shlex.quote(str(config)))
    for name, text in (
        ("srun", SRUN),
        ("whisper-aut", f"#!/bin/bash\n{program}\n"),
        ("scontrol", '#!/bin/bash\necho "scontrol $*"\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "aut", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "LOGS": str(folder)}
    environment = os.environ | job | own | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        ["bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_slurm_script_trains_on_all_nodes(config: Path, tmp_path: Path):
    program = f'exec {shlex.quote(sys.executable)} -m whisper_aut.cli "$@"'
    done = run_slurm_script(tmp_path, program, config)
    logs = [(tmp_path / f"node-{node}").read_text()[-3000:] for node in (0, 1)]
    assert done.returncode == 0, (done.stderr, *logs)
    assert "scontrol" not in done.stdout
    assert (tmp_path / "two" / "smoke" / "slurm-4711").is_dir(), "the run is named after the job"
    check_losses(tmp_path)


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (0, False)])
def test_the_slurm_script_requeues_itself_only_when_it_was_preempted(
    status: int, requeued: bool, tmp_path: Path
):
    done = run_slurm_script(tmp_path, f"exit {status}", tmp_path / "config.yaml")
    assert ("scontrol requeue 4711" in done.stdout) is requeued
