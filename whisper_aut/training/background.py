"""One piece of work at a time beside the training, in a thread of its own.

In: a function that computes nothing that the training needs. Out: `wait`, which raises what it raised. Next: `training.strategy` writes
checkpoints with it.
"""

import threading
from collections.abc import Callable


class Background:
    """Does what it is given while the caller goes on."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, when what was given before is done. Raises what that raised."""
        self.wait()
        # A daemon: a second Ctrl-C ends the process without waiting for it.
        self._thread = threading.Thread(
            target=self._do, args=(work,), name="background", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being done, and raise what went wrong, once."""
        if self._thread:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem:
            raise problem

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as problem:  # whatever it is, `wait` hands it on
            self._problem = problem
