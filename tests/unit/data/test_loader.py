"""Decoding processes and signals: a stop of the whole job leaves them at work, their own main
process ends them at once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.utils.data._utils
from torch.utils.data import IterableDataset, get_worker_info

from tests.support import REPOSITORY
from whisper_aut.data.dataset import batch_loader

# Counts what its workers give after everybody was asked to stop.
MAIN = """
import signal, sys, time
from tests.unit.data.test_loader import Numbers
from whisper_aut.data.dataset import batch_loader
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
count = 0
for _ in batch_loader(Numbers(100), workers=2):
    count += 1
    if count == 5:
        print("ready", flush=True)
        while not asked:
            time.sleep(0.05)
print(count)
sys.exit(75)
"""


class Numbers(IterableDataset):
    """So many numbers from each worker; the one behind the last takes `then_seconds` to come."""

    def __init__(self, count: int, then_seconds: float = 0.0):
        self.count, self.then_seconds = count, then_seconds

    def __iter__(self) -> Iterator[int]:
        assert get_worker_info() is not None
        yield from range(self.count)
        time.sleep(self.then_seconds)


def test_a_signal_to_all_processes_leaves_the_workers_at_work():
    """As Slurm and systemd send it; twice, as they may."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", MAIN]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, start_new_session=True, stdout=pipe, stderr=pipe, text=True, env=environment
    ) as main:
        assert main.stdout
        assert main.stdout.readline() == "ready\n"
        for _ in range(2):
            os.killpg(main.pid, signal.SIGTERM)
        output, errors = main.communicate(timeout=120)
    assert (main.returncode, output) == (75, "200\n"), errors[-2000:]


@pytest.mark.parametrize(
    "then_seconds", [0.0, 3600.0], ids=["at rest", "in the middle of a long read"]
)
def test_a_loader_that_is_dropped_ends_its_workers(
    then_seconds: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5
    )  # how long PyTorch waits before it terminates
    loader: Any = batch_loader(Numbers(2, then_seconds), workers=2)  # pyright: ignore[reportArgumentType]
    batches = iter(loader)
    assert [next(batches) for _ in range(4)] == [0, 0, 1, 1]
    workers = batches._workers
    del batches
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
