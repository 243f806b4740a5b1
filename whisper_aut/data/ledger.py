"""The ledger: every refused sample, counted by source and reason, and written down.

In: the `Refusal`s and sources that batches carry. Out: `ledger.jsonl` in the run directory and totals. Next: the log, the final
summary and the report. When too large a share of a source is refused, the run stops: it would not train on what its config says.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from whisper_aut.data.sample import Refusal
from whisper_aut.errors import WISHED, UserError

MIN_SEEN = 200  # below this many samples of a source its share of refusals says little yet
MIN_SEEN_AT_END = 20  # of a small source no more may ever come
MAX_LINES = 100_000


class Ledger:
    """Counts refusals and writes them down, one JSON object a line, as they come.

    Args:
        path: the file; None to count only.
        max_share: the share of a source's samples that may be refused.
    """

    def __init__(self, path: Path | None, max_share: float = 1.0):
        self.path, self.max_share = path, max_share
        self.seen: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.refused_in_validation: Counter[tuple[str, str]] = Counter()
        self.earlier: Counter[tuple[str, str]] = (
            Counter()
        )  # of the run before this process, over all ranks
        self.validated = False  # a validation of the run was recorded to its end
        self._file: TextIO | None = None

    def record(self, sources: Iterable[str], refusals: Sequence[Refusal]) -> None:
        """Count one batch: the source folder of each clip that was taken, and what was refused.

        Raises:
            UserError: a source exceeds the share that may be refused.
        """
        self.seen.update(sources)
        for refusal in refusals:
            self.seen[_folder(refusal)] += refusal.reason not in WISHED
            self.refused[_folder(refusal), str(refusal.reason)] += 1
            self._write(refusal)
        if refusals:
            self._check(lambda seen, refused: seen >= MIN_SEEN)

    def check_at_end(self) -> None:
        """Look once more, when all has been read: at small sources too, and at those that gave nothing.

        Raises:
            UserError: a source exceeds the share that may be refused.
        """
        self._check(lambda seen, refused: seen >= MIN_SEEN_AT_END or refused == seen)

    def record_validation(self, refusals: Sequence[Refusal]) -> None:
        """Count what a batch of validation refuses, apart: the share that may be refused is of training clips."""
        for refusal in refusals:
            self.refused_in_validation[_folder(refusal), str(refusal.reason)] += 1
            self._write(refusal)

    def go_on(self, refused: Mapping[str, Mapping[str, int]], validated: bool) -> None:
        """Add what the run had counted up to a checkpoint, unless this process counted it itself: a rewind reads nothing again."""
        if not self.seen:
            self.earlier = Counter(
                {
                    (source, reason): n
                    for source, counts in refused.items()
                    for reason, n in counts.items()
                }
            )
            self.validated = validated

    def note(self, refusal: Refusal) -> None:
        """Write down a clip that was trained on and gave trouble, without counting it as refused."""
        self._write(refusal)

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """Refusals of this rank in this process, by source and reason; a validation that is broken off comes again, and counts then."""
        return self.refused + self.refused_in_validation if self.validated else self.refused

    @property
    def total(self) -> int:
        return self.counts.total()

    def summary(self) -> dict[str, dict[str, int]]:
        """Return refusals by source and reason."""
        return by_source(self.counts)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _write(self, refusal: Refusal) -> None:
        if self.path is None or self.total > MAX_LINES:
            return
        if self._file is None:
            self._file = self.path.open(
                "a", buffering=1, encoding="utf-8", errors="backslashreplace"
            )  # names may be any bytes
        line = {
            "shard": refusal.source,
            "key": refusal.key,
            "reason": str(refusal.reason),
            "detail": refusal.detail,
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _check(self, says_enough: Callable[[int, int], bool]) -> None:
        for source, seen in self.seen.items():
            reasons = {
                reason: count
                for (name, reason), count in self.refused.items()
                if name == source and reason not in WISHED
            }
            refused = sum(reasons.values())
            if refused > self.max_share * seen and says_enough(seen, refused):
                listed = ", ".join(
                    f"{reason}: {count}"
                    for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
                )
                where = f" Each is listed in {self.path}." if self.path else ""
                raise UserError(
                    f"{refused} of {seen} samples of {source} were refused ({listed}); data.max_refused_share allows "
                    f"{self.max_share:.1%}.{where} Mend the source, or raise data.max_refused_share."
                )


def by_source(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return counts by source, then by reason, as files hold them."""
    result: dict[str, dict[str, int]] = {}
    for (source, reason), count in sorted(counts.items()):
        result.setdefault(source, {})[reason] = count
    return result


def _folder(refusal: Refusal) -> str:
    return refusal.source.rsplit("/", 1)[0]
