"""Places → samples: fetches chosen samples of chosen shards, and refuses what a shard does not give.

In: an index, and shards and ordinals. Out: a `Sample` or a `Refusal` for each. Next: `data.stream` puts them in order, `data.augment`
takes noise. By a shard's table single samples are fetched; without one the tar is read from its start, skipping over the others.
"""

from collections.abc import Iterator, Mapping, Sequence

from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.remote import ReadPolicy, open_stream
from whisper_aut.corpora.sample_table import SampleTable
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.data.sample import Refusal, Sample, read_samples, read_shard
from whisper_aut.errors import Reason

TABLES_HELD = 256
Items = Iterator[tuple[int, Sample | Refusal]]


class ShardReader:
    """Reads chosen samples of chosen shards; what a damaged, vanished or unreachable shard does not give is refused."""

    def __init__(self, limits: ClipLimits, policy: ReadPolicy):
        self.limits, self.policy = limits, policy
        self._tables: dict[str, SampleTable | None] = {}

    def read(self, places: Mapping[int, tuple[int, int]], index: ShardIndex) -> Items:
        """Yield `(number, item)` for every number.

        Args:
            places: of each number the shard, and which of the shard's selected samples it is.
        """
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for number, (shard, selected) in places.items():
            by_shard.setdefault(shard, []).append((selected, number))
        for shard, chosen in by_shard.items():
            ordinals = index.ordinals(shard)
            numbers = {int(ordinals[selected]): number for selected, number in chosen}
            url = index.url(shard)
            damage = "the shard ends before this sample"
            try:
                for ordinal, item in self._items(index, shard, list(numbers)):
                    if ordinal in numbers:
                        yield numbers.pop(ordinal), item
                    elif isinstance(item, Refusal):
                        damage = item.detail
                    if not numbers:
                        break
            except OSError as error:
                damage = str(error)
            for ordinal, number in numbers.items():
                yield number, Refusal(url, f"#{ordinal}", Reason.BAD_TAR, damage)

    def _items(self, index: ShardIndex, shard: int, ordinals: Sequence[int]) -> Items:
        url, table = index.url(shard), self._table(index, shard)
        if table is not None:
            try:
                with open_stream(url, self.policy, whole=False) as stream:
                    yield from read_samples(stream, url, table, ordinals, self.limits)
                return
            except ValueError as error:  # not the tar that the table was made of
                if index.selection:  # which was made by the table too
                    hint = f"make its table again: whisper-aut data index {index.root}"
                    raise OSError(f"{error}; {hint}") from None
        with open_stream(url, self.policy) as stream:
            yield from read_shard(stream, url, set(ordinals), self.limits)

    def _table(self, index: ShardIndex, shard: int) -> SampleTable | None:
        url = index.url(shard)
        if index.has_tables and url not in self._tables:
            if len(self._tables) >= TABLES_HELD:
                self._tables.pop(next(iter(self._tables)))
            try:
                self._tables[url] = index.table(shard, self.policy)
            except (OSError, ValueError):
                self._tables[url] = None  # the tar can be read without
        return self._tables.get(url)
