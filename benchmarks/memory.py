"""How much memory an action takes on top of what is there (Linux): the highest resident size while
it ran, less that before.
"""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path


def peak_rise_megabytes(action: Callable[[], object]) -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # what is free goes back, so that the action is seen to take it again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status_kilobytes("VmRSS")
    action()
    return (_status_kilobytes("VmHWM") - before) / 1024


def apart(measure: Callable[..., float], *arguments: object) -> float:
    """Run a measurement in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def _status_kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
