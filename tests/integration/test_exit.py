"""A process ends by itself: no thread and no process group is left that would abort it."""

import os
import subprocess
import sys

from tests.support import REPOSITORY

# A thread is inside PyTorch when the interpreter ends, as after a second Ctrl-C. What is registered
# first is called last: the report comes after the process groups, and before the thread's end.
SCRIPT = """
import atexit, threading, torch, torch.distributed as dist
from whisper_aut.config import StrategySettings
from whisper_aut.training.strategies import Background, build_strategy
began, square = threading.Event(), torch.randn(300, 300)
def work():
    began.set()
    while True:
        square @ square
Background().start(work)
began.wait()
atexit.register(lambda: print("group at exit:", dist.is_initialized()))
build_strategy(StrategySettings(name="ddp", timeout_minutes=1.0), ranks=1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.new_group(backend="gloo")
print("last line")
"""


def test_neither_process_groups_nor_a_busy_writer_thread_abort_the_interpreter():
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert process.returncode == 1, process.stderr[-2000:]
    assert process.stdout == "last line\ngroup at exit: False\n"
    assert "terminate called" not in process.stderr
