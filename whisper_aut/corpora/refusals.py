"""The rows that gave no clip: counted, exemplified, listed.

In: `RefusedRow` items. Out: counts by reason and split, a table for messages, and `OUT/refused.jsonl`, one JSON object a line
with `line, path, reason, detail, split`. Next: `corpora.build` decides by them whether the build stands.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from whisper_aut.corpora.manifest import RefusedRow

REFUSED_NAME = "refused.jsonl"


@dataclass
class Refusals:
    """Rows that gave no clip, by reason and by split, with an example of each reason; written to `log` if there is one."""

    log: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)
    by_split: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, RefusedRow] = field(default_factory=dict)

    def add(self, row: RefusedRow) -> None:
        """Count a row, and log it."""
        self.counts[row.reason] += 1
        self.by_split[row.split][row.reason] += 1
        self.examples.setdefault(row.reason, row)
        if self.log:
            self.log.write(
                json.dumps(asdict(row)) + "\n"
            )  # ASCII: a path may hold what UTF-8 does not

    def table(self) -> str:
        """Return one line per reason, the most frequent first."""
        lines = []
        for reason, count in self.counts.most_common():
            row = self.examples[reason]
            example = ": ".join(part for part in (row.path, row.detail) if part)
            lines.append(f"  {count:>7}  {reason}, first in line {row.line}: {example}")
        return "\n".join(lines)


@contextmanager
def refusal_log(out: Path) -> Iterator[TextIO]:
    """Open `OUT/refused.jsonl`; it is kept if the build fails, since it tells why, and only if there is a line in it."""
    partial = out / f".{REFUSED_NAME}.partial"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="ascii") as file:
            yield file
    finally:
        if partial.stat().st_size:
            os.replace(partial, out / REFUSED_NAME)
        else:
            partial.unlink()
            (out / REFUSED_NAME).unlink(missing_ok=True)
