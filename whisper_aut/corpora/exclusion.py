"""Leave out of an index the clips of `exclude.jsonl`, and those whose licence is not allowed.

The list is what `whisper-aut data audit` writes, or one made by hand: JSON lines with `fingerprint`
(of the folder of shards, as its index gives it), `shard` and `key`. Folders are known by what they
hold, so a list stays true when they move and is void when they are built again. What is left out
never enters the order of clips, so the mixture's weights hold among the rest.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from whisper_aut.corpora.index import table_of
from whisper_aut.corpora.licences import allows
from whisper_aut.corpora.remote import DEFAULT_POLICY, ReadPolicy, is_local, open_stream
from whisper_aut.corpora.sample_table import SampleTable, TableWriter, text_hash
from whisper_aut.corpora.shards import FolderCounts, Selection, ShardIndex
from whisper_aut.corpora.tables import read_lines
from whisper_aut.errors import Reason, UserError

READERS = 16
Place = tuple[str, str]  # shard, key


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
        return frozenset().union(*(self._places[one] for one in index.identities()))

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))


def select(
    index: ShardIndex,
    excluded: Collection[Place] = (),
    allowed: Sequence[str] = (),
    licence: str = "",
    policy: ReadPolicy = DEFAULT_POLICY,
) -> ShardIndex:
    """Return an index without the excluded samples and those whose licence is not allowed.

    Sample tables tell which these are. A local folder without tables is read through for them, its
    audio left aside.

    Args:
        excluded: shard and key of each.
        allowed: licences, see `licences.allows`; empty for all.
        licence: of samples that state none.

    Raises:
        UserError: a remote folder without tables, or tables that cannot be read.
    """
    all_allowed = not allowed or (
        index.has_tables and all(allows(allowed, name or licence) for name in index.licences)
    )
    if all_allowed and not excluded:
        return index
    if not index.has_tables and not is_local(index.root):
        raise UserError(
            f"{index.root} has no sample tables, which data.exclude and data.licences.allow go by. "
            "Make them where the tars are on a disk: whisper-aut data index FOLDER"
        )
    keys: dict[str, list[int]] = defaultdict(list)
    for shard, key in excluded:
        keys[shard].append(text_hash(key))

    def choose(number: int) -> tuple[np.ndarray, Counter[str], list[tuple[str, int, float]]]:
        table, licences = _table(index, number, policy)
        names = {text_hash(name): name for name in licences}
        admitted = [own for own, name in names.items() if allows(allowed, name or licence)]
        listed = np.isin(table.keys, keys.get(index.shards[number].name, []))
        barred = ~np.isin(table.licences, admitted) & ~listed & bool(allowed)
        rows = np.flatnonzero(~listed & ~barred).astype(np.uint32)
        left_out = {Reason.EXCLUDED: int(listed.sum()), Reason.LICENCE: int(barred.sum())}
        counts = [
            (names.get(own, "unknown"), clips, seconds)
            for own, clips, seconds in table.licence_counts(rows)
        ]
        return rows, Counter({str(why): count for why, count in left_out.items()}), counts

    try:
        with ThreadPoolExecutor(READERS) as pool:  # an object store takes a while for each
            chosen = list(pool.map(choose, range(len(index.shards))))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The sample tables of {index.root} cannot be read ({error}), and data.exclude and "
            f"data.licences.allow go by them. Make them again: whisper-aut data index {index.root}"
        ) from None
    kept = FolderCounts()
    for name, clips, seconds in (count for *_, counts in chosen for count in counts):
        kept.add("", name, seconds, clips)
    selection = Selection(
        ordinals=tuple(rows for rows, *_ in chosen),
        seconds=sum(counts["seconds"] for counts in kept.licences.values()),
        licences=kept.facts()["licences"],
        left_out=dict(sum((counts for _, counts, _ in chosen), Counter())),
    )
    return replace(index, selection=selection)


def _table(
    index: ShardIndex, number: int, policy: ReadPolicy
) -> tuple[SampleTable, Collection[str]]:
    """Return the table of a shard, read or made, and the licences that may be in it as written."""
    if index.has_tables:
        return index.table(number, policy), index.licences
    if not index.shards[number].samples:  # damaged from the start
        return TableWriter().finish(0), ()
    counts = FolderCounts()
    with open_stream(index.url(number)) as stream:
        return table_of(stream, counts, audio=False), counts.licences
