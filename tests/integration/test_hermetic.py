"""What people and clusters set in the environment does not decide whether a test passes."""

import os
import subprocess
import sys

from tests.support import REPOSITORY

HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/nonexistent",
    "HF_TOKEN": "hf_not_ours",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "7",
    "CUDA_VISIBLE_DEVICES": "3",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "3",
    "MASTER_ADDR": "nowhere.invalid",
    "MASTER_PORT": "1",
    "RANK": "3",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "PYTHONWARNINGS": "error",
    "LANG": "tr_TR.ISO-8859-9",
    "LC_ALL": "C",
    "TZ": "Pacific/Kiritimati",
    "COLUMNS": "20",
    "FORCE_COLOR": "1",
    "HTTP_PROXY": "http://nowhere.invalid:1",
}


def test_a_hostile_environment_changes_no_test():
    tests = [
        "tests/unit/export/test_card.py::test_a_push_sends_every_file",
        "tests/unit/export/test_card.py::test_a_push_that_cannot_be_is_said",
        "tests/integration/test_cli.py",
        "tests/unit/training/test_strategy.py",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=REPOSITORY,
        env=os.environ | HOSTILE,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
