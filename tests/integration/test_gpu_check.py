"""The CPU rehearsal of `benchmarks/gpu_check.sh`, which has to work when a GPU is lent."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu_check.sh"
MAX_SECONDS = 480


def limits() -> dict[str, int]:
    found = re.search(r"^limits=\((.*)\)$", SCRIPT.read_text(), re.M)
    assert found
    return {name: int(limit) for name, limit in re.findall(r"(\w+)=(\d+)", found.group(1))}


def test_all_parts_together_stay_under_eight_minutes():
    assert sum(limits().values()) <= MAX_SECONDS
    parts = SCRIPT.with_suffix(".py").read_text()
    for name in limits():
        assert f"\ndef {name}(check: Check) -> None:" in parts
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes_on_a_cpu(tmp_path: Path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "GPU_CHECK_LIMITS": "10",  # times the limits, for a busy machine
    }
    command = [str(SCRIPT), str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    failed = {row["part"]: row["value"] for row in rows if row["figure"] == "failed"}
    logs = [(tmp_path / "out" / f"{part}.log").read_text()[-2000:] for part in failed]
    assert not failed, (failed, logs)
    assert {row["part"] for row in rows} == {"machine", *limits()}, done.stdout[-2000:]
    assert "## gpu_check" in done.stdout
    assert (tmp_path / "out" / "aut-trace-rank0.json").exists()
