"""The ledger records every skipped sample in a file and counts them by source and reason.

A run stops if too large a fraction of a source is skipped, because it would no longer train on the
data of its config. `training.callbacks.data.DataMonitor` sums the counts over ranks and
saves them in checkpoints.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from whisper_aut.data.reader import SkippedSample
from whisper_aut.errors import UserError

MIN_SEEN = 200  # with fewer samples, the skipped fraction of a source is not reliable
MIN_SEEN_AT_END = 20  # lower at the end of a run, because small sources may have few samples
MAX_LINES = 100_000

ByReason = Counter[tuple[str, str]]  # (source, reason) → samples


@dataclass
class Counts:
    """Numbers of samples by source folder.

    Attributes:
        read: training samples, including skipped ones but not those that the config filters out.
        skipped: training samples by source and reason.
        skipped_in_validation: validation samples by source and reason.
    """

    read: Counter[str] = field(default_factory=Counter)
    skipped: ByReason = field(default_factory=Counter)
    skipped_in_validation: ByReason = field(default_factory=Counter)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.read + other.read,
            self.skipped + other.skipped,
            self.skipped_in_validation + other.skipped_in_validation,
        )

    @property
    def all_skipped(self) -> ByReason:
        """Skipped samples of training and validation together."""
        return self.skipped + self.skipped_in_validation

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain dictionaries, for a checkpoint."""
        return {
            "read": dict(self.read),
            "skipped": by_source(self.skipped),
            "skipped_in_validation": by_source(self.skipped_in_validation),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Counts":
        """Restore counts from `state_dict`."""
        return cls(
            Counter(state["read"]),
            _by_reason(state["skipped"]),
            _by_reason(state["skipped_in_validation"]),
        )


class Ledger:
    """Counts skipped samples and immediately writes each one to a JSON Lines file.

    A process stops writing, but not counting, after about `MAX_LINES` skipped samples.

    Args:
        path: the file; None to count only.
        max_fraction: the fraction of a source's samples that may be skipped.

    Attributes:
        earlier: counts of the run before this process started, summed over all ranks.
        validated: whether the run has completed and recorded a validation.
    """

    def __init__(self, path: Path | None, max_fraction: float = 1.0):
        self.path, self.max_fraction = path, max_fraction
        self.earlier, self.validated = Counts(), False
        self._own = Counts()
        self._file: TextIO | None = None

    def record(self, sources: Iterable[str], skipped: Sequence[SkippedSample]) -> None:
        """Count one training batch.

        Args:
            sources: the source folder of each clip in the batch.
            refusals: the samples that were skipped while the batch was filled.
        """
        self._own.read.update(sources)
        for sample in skipped:
            self._own.read[_folder(sample)] += 1
            self._own.skipped[_folder(sample), str(sample.reason)] += 1
            self._write(sample)

    def record_validation(self, skipped: Sequence[SkippedSample]) -> None:
        """Count the skipped samples of a validation batch; `max_fraction` does not apply."""
        for sample in skipped:
            self._own.skipped_in_validation[_folder(sample), str(sample.reason)] += 1
            self._write(sample)

    def resume(self, earlier: Counts, validated: bool) -> None:
        """Restore the counts that a checkpoint saved.

        Does nothing if this process has already counted samples, as after a rewind: a rewind reads
        no sample twice.

        Args:
            earlier: counts of the run up to the checkpoint.
            validated: see `Ledger.validated`.
        """
        if not self._own.read:
            self.earlier, self.validated = earlier, validated

    def note(self, sample: SkippedSample) -> None:
        """Write a line for a clip that caused trouble in training; it does not count as skipped."""
        self._write(sample)

    @property
    def counts(self) -> Counts:
        """The counts of this rank in this process.

        An interrupted validation is left out. It is repeated after resuming and counted then.
        """
        if self.validated:
            return self._own
        return Counts(self._own.read, self._own.skipped)

    def check(self, counts: Counts, *, at_end: bool = False) -> None:
        """Check that no source exceeds `max_fraction`.

        Args:
            counts: counts of the whole run, summed over all ranks.
            at_end: whether the run has ended. Then sources with few samples are checked too, and
                sources with any number of samples if all of them were skipped.

        Raises:
            UserError: more than `max_fraction` of a source's samples were skipped.
        """
        for source, read in counts.read.items():
            reasons = {
                reason: count for (name, reason), count in counts.skipped.items() if name == source
            }
            skipped = sum(reasons.values())
            enough = read >= (MIN_SEEN_AT_END if at_end else MIN_SEEN)
            if skipped > self.max_fraction * read and (enough or (at_end and skipped == read)):
                listed = ", ".join(
                    f"{reason}: {count}"
                    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
                )
                where = f" {self.path.parent}/ledger*.jsonl lists them." if self.path else ""
                raise UserError(
                    f"{skipped} of {read} samples of {source} were skipped ({listed}); "
                    f"data.max_skipped_fraction allows {self.max_fraction:.1%}.{where} "
                    "Fix the source, or raise data.max_skipped_fraction."
                )

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, sample: SkippedSample) -> None:
        if self.path is None or self._own.all_skipped.total() > MAX_LINES:
            return
        if self._file is None:
            # File names may contain bytes that are not UTF-8.
            self._file = self.path.open(
                "a", buffering=1, encoding="utf-8", errors="backslashreplace"
            )
        line = {
            "shard": sample.source,
            "key": sample.key,
            "reason": str(sample.reason),
            "detail": sample.detail,
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


def by_source(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Nest counts by source, then by reason, as stored in files."""
    result: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(counts.items()):
        result.setdefault(source, {})[reason] = count
    return result


def _by_reason(counts: Mapping[str, Mapping[str, int]]) -> ByReason:
    return Counter(
        {(source, reason): n for source, reasons in counts.items() for reason, n in reasons.items()}
    )


def _folder(sample: SkippedSample) -> str:
    return sample.source.rsplit("/", 1)[0]
