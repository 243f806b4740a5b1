"""The two ways in which things go wrong that are not our bugs: a user's mistake, and a sample that cannot be used.

In: messages. Out: exceptions that `cli.main` turns into one clear paragraph (UserError) and that the data plane turns into a
counted line of the ledger (SampleRefused).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import StrEnum


class UserError(Exception):
    """A mistake that the user can mend. The message says what was given, what was expected, and what to run."""


class Problems:
    """Mistakes that are gathered, so that the user is told all of them at once.

    Examples:
        >>> problems = Problems()
        >>> for name in ("one", "two"):
        ...     with problems.gather():
        ...         raise UserError(f"{name} is missing.")
        >>> problems.tell("The request")
        Traceback (most recent call last):
        whisper_aut.errors.UserError: The request has 2 problems:
          - one is missing.
          - two is missing.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def gather(self, prefix: str = "") -> Iterator[None]:
        """Keep the mistake that ends the block, and go on after it."""
        try:
            yield
        except UserError as error:
            self.add(f"{prefix}{error}")

    def add(self, problem: str) -> None:
        if problem not in self.found:
            self.found.append(problem)

    def tell(self, where: str) -> None:
        """Do nothing where nothing was found.

        Raises:
            UserError: one problem as it is, several as a list under what `where` names.
        """
        if len(self.found) == 1:
            raise UserError(self.found[0])
        if self.found:
            listed = "\n".join(f"  - {problem}" for problem in self.found)
            raise UserError(f"{where} has {len(self.found)} problems:\n{listed}")


class Interrupted(Exception):
    """The user asked the run to stop; what was reached is saved. The message says how to go on."""


class Preempted(Interrupted):
    """The scheduler asked the run to stop, by SIGTERM or SIGUSR1; it is meant to be started again."""


class Reason(StrEnum):
    """Why a sample was refused. The values are what ledgers, logs and reports print."""

    UNDECODABLE = "undecodable audio"
    NO_AUDIO = "no audio member"
    EMPTY = "empty audio"
    NON_FINITE = "non-finite audio"
    OUT_OF_SCALE = "audio out of scale"
    JOINED = "several files in one"
    SILENT = "silent audio"
    TOO_LONG = "audio too long"
    TOO_SHORT = "audio too short"
    TOO_LARGE = "member too large"
    BAD_JSON = "bad or missing JSON"
    NO_TEXT = "no text"
    NO_TASK = "no instruction fits"
    LABEL_TOO_LONG = "label too long"
    NO_LABEL = "no label"
    NON_FINITE_LOSS = "non-finite loss"
    NON_FINITE_GRADIENT = "non-finite gradient"
    BAD_TAR = "bad tar"
    MISSING_FILE = "missing file"
    BAD_ROW = "bad manifest row"
    # Of clips that the config leaves out of the index; they are never read.
    EXCLUDED = "excluded by an audit"
    LICENCE = "licence not allowed"


class SampleRefused(Exception):
    """One sample cannot be used; the run goes on without it.

    Attributes:
        reason: the class of fault, under which it is counted.
        detail: what exactly was found, for the ledger's line.
    """

    def __init__(self, reason: Reason, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail

    def __reduce__(
        self,
    ):  # two arguments: the default would rebuild the exception from its one-line message
        return type(self), (self.reason, self.detail)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the known name closest to `word`, or an empty string where none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
