"""A process ends by itself: no thread and no process group is left that would abort it."""

import os
import subprocess
import sys

from tests.support import REPOSITORY

# A thread inside PyTorch when the interpreter ends, as after a second Ctrl-C.
BUSY = """
import threading, torch
from whisper_aut.training.strategies import Background
began, square = threading.Event(), torch.randn(300, 300)
def work():
    began.set()
    while True:
        square @ square
Background().start(work)
began.wait()
print("last line")
"""
# `report` is registered first, so it is called last.
GROUP = """
import atexit, torch.distributed as dist
atexit.register(lambda: print("group at exit:", dist.is_initialized()))
from whisper_aut.config import StrategySettings
from whisper_aut.training.strategies import build_strategy
build_strategy(StrategySettings(name="ddp", timeout_minutes=1.0), ranks=1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.new_group(backend="gloo")
"""


def ended(script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )


def test_a_busy_writer_thread_does_not_abort_the_interpreter():
    process = ended(BUSY)
    assert process.returncode == 1, process.stderr[-2000:]
    assert process.stdout == "last line\n"
    assert "terminate called" not in process.stderr


def test_process_groups_are_destroyed_before_the_interpreter_ends():
    assert ended(GROUP).stdout == "group at exit: False\n"
