"""The clips that a run must not train on: those of `exclude.jsonl`, and those whose licence is not allowed.

In: the list that `whisper-aut data audit` writes, or one made by hand: JSON lines with `fingerprint` (of the folder of shards, as its index
gives it), `shard` and `key`. Out: per folder, the samples that are excluded. Next: `data.stream` refuses them. Folders are known by
what they hold, so a list stays true when they move and is void when they are built anew.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.licences import allows
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.corpora.tables import read_lines
from whisper_aut.errors import Reason, UserError

Place = tuple[str, str]  # shard, key


@dataclass(frozen=True)
class Selection:
    """Which clips of a source are wanted: all but the `excluded`, and of these the ones whose licence is one of `allowed`, if any.

    `licence` is that of clips which state none.
    """

    excluded: frozenset[Place] = frozenset()
    allowed: tuple[str, ...] = ()
    licence: str = ""

    def refuses(self, url: str, key: str, annotation: Annotation) -> Reason | None:
        """Return why a clip is not wanted, or None where it is."""
        if self.excluded and (url.rpartition("/")[2], key) in self.excluded:
            return Reason.EXCLUDED
        return None if allows(self.allowed, annotation.licence or self.licence) else Reason.LICENCE


EVERYTHING = Selection()


class Exclusions:
    """Samples by the fingerprint of their folder."""

    def __init__(self, places: Iterable[tuple[str, str, str]] = ()):
        self._places: dict[str, set[Place]] = defaultdict(set)
        for fingerprint, shard, key in places:
            self._places[fingerprint].add((shard, key))

    @classmethod
    def load(cls, path: str | Path) -> "Exclusions":
        """Read a list.

        Raises:
            UserError: there is none, or a line is not of the form.
        """
        try:
            lines = read_lines(Path(path))
        except OSError as error:
            raise UserError(
                f"data.exclude: cannot read {path} ({error.strerror}). Write one: whisper-aut data audit TRAIN --against PROBE"
            ) from None
        places = []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                places.append((str(entry["fingerprint"]), str(entry["shard"]), str(entry["key"])))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"Line {number} of {path} is not an object with fingerprint, shard and key: {line[:80]!r}. "
                    "Write the list anew: whisper-aut data audit TRAIN --against PROBE"
                ) from None
        return cls(places)

    def of(self, index: ShardIndex) -> frozenset[Place]:
        """Return `(shard, key)` of the excluded samples of a folder."""
        return frozenset(self._places.get(index.fingerprint(), ()))

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))
