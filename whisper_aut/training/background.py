"""One piece of work at a time in a thread, such as writing a checkpoint while training goes on."""

import atexit
import os
import sys
import threading
from collections.abc import Callable


class Background:
    """Runs the work it is given in a thread; `wait` raises what the work raised."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Start, once the earlier work is done. Raises what that raised."""
        self.wait()
        # A daemon: after a second Ctrl-C the interpreter does not wait for it.
        self._thread = threading.Thread(
            target=self._do, args=(work,), name="background", daemon=True
        )
        self._thread.start()
        atexit.register(self._end_process)

    def wait(self) -> None:
        """Wait until the work is done, and raise what went wrong, once."""
        if self._thread:
            self._thread.join()
            self._thread = None
            atexit.unregister(self._end_process)
        problem, self._problem = self._problem, None
        if problem:
            raise problem

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as problem:  # whatever it is, `wait` raises it
            self._problem = problem

    def _end_process(self) -> None:
        """End the process at exit if the work goes on: nobody waits for it after a second Ctrl-C.

        The interpreter cannot end with a thread inside C++ code (PyTorch, gloo, safetensors): that
        aborts with "terminate called without an active exception".
        """
        if self.busy:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
