"""The environment variables of users and clusters do not decide whether a test passes."""

import os
import subprocess
import sys

import pytest

from tests.support import REPOSITORY
from tests.support.environment import OURS, clean

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


def test_variables_of_users_and_clusters_are_removed():
    environment = {"PATH": "/bin", "HOME": "/home/x"} | HOSTILE
    clean(environment)
    assert environment == {"PATH": "/bin", "HOME": "/home/x"} | OURS
    assert OURS.items() <= os.environ.items(), "conftest.py cleans before torch is imported"


@pytest.mark.slow
def test_a_hostile_environment_changes_no_test():
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "mistake or help or torchrun",
    ]
    files = [
        "integration/test_cli.py",
        "unit/training/test_strategy.py",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in files)],
        cwd=REPOSITORY,
        env=os.environ | HOSTILE,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
