"""Exceptions for expected failures: user errors, interruptions and unusable samples.

`cli.main` prints a `UserError` as one paragraph. The data pipeline counts a `SkipSample` and
records it in the ledger.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import StrEnum
from importlib.util import find_spec


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do."""


# The modules that the base install lacks, by the extra of this package that adds them. A test
# compares the table with pyproject.toml.
EXTRAS = {
    "data": ("braceexpand", "iso639", "webdataset"),
    "probe": (
        *("hydra", "jinja2", "jiwer", "lightning", "matplotlib", "omegaconf", "pydantic"),
        *("scipy", "sklearn", "torchaudio", "torchmetrics"),
    ),
    "train": ("deepspeed", "tensorboard"),
    "demo": ("espeakng_loader", "gradio"),
    "lora": ("peft",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "parquet": ("pyarrow",),
    "av": ("av",),
    "remote": ("aiohttp", "s3fs", "gcsfs"),
    "mteb": ("mteb",),
    "xares": ("xares",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


class MissingModule(UserError, ImportError):
    """A module is missing that one of `EXTRAS` installs."""

    def __init__(self, module: str):
        extra = next(name for name, modules in EXTRAS.items() if module in modules)
        super().__init__(f"{module} is not installed. Run: pip install 'whisper-aut[{extra}]'")


def require(*modules: str) -> None:
    """Check that modules of `EXTRAS` are installed.

    Raises:
        MissingModule: one is not. The message has the pip command.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingModule(module)


class Problems:
    """Collects user errors in order to report them all at once.

    Examples:
        >>> problems = Problems()
        >>> for name in ("one", "two"):
        ...     with problems.gather():
        ...         raise UserError(f"{name} is missing.")
        >>> problems.raise_if_any("The request")
        Traceback (most recent call last):
        whisper_aut.errors.UserError: The request has 2 problems:
          - one is missing.
          - two is missing.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def gather(self, prefix: str = "") -> Iterator[None]:
        """Record a `UserError` raised in the block with a prefix, and continue after the block."""
        try:
            yield
        except UserError as error:
            self.add(f"{prefix}{error}")

    def add(self, problem: str) -> None:
        """Add a message. Duplicates are ignored."""
        if problem not in self.found:
            self.found.append(problem)

    def raise_if_any(self, where: str) -> None:
        """Raise the collected problems as one error, if there are any.

        Raises:
            UserError: the message itself for one problem; a list with `where` for several.
        """
        if len(self.found) == 1:
            raise UserError(self.found[0])
        if self.found:
            listed = "\n".join(f"  - {problem}" for problem in self.found)
            raise UserError(f"{where} has {len(self.found)} problems:\n{listed}")


class Interrupted(Exception):
    """The user stopped the run. Progress is saved, and the message says how to resume."""


class Preempted(Interrupted):
    """The scheduler stopped the run with SIGTERM or SIGUSR1. The run should be restarted."""


class SkipReason(StrEnum):
    """Why a sample was skipped. Ledgers, logs and reports print the values."""

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
    # The config excludes these clips from the index, so they are never read.
    EXCLUDED = "excluded by an audit"
    LICENCE = "licence not allowed"


class SkipSample(Exception):
    """A sample cannot be used. It is skipped and the run continues.

    Attributes:
        reason: the category under which the sample is counted.
        detail: what exactly was wrong, for the ledger.
    """

    def __init__(self, reason: SkipReason, detail: str = ""):
        detail = detail.removesuffix(".")  # libraries end theirs with a full stop
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail

    # The default would rebuild the exception from its message, which is a single argument.
    def __reduce__(self):
        return type(self), (self.reason, self.detail)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'X'?` for the closest known name, or "" if none is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
