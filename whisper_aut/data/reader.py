"""Places → samples: fetches chosen samples of chosen shards, and refuses what a shard does not give.

In: an index, and shards and ordinals. Out: a `Sample` or a `Refusal` for each. Next: `data.stream` puts them in order, `data.augment`
takes noise. By a shard's table single samples are fetched; without one the tar is read from its start, skipping over the others.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO, TypeVar

from torch import Tensor

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.data.remote import DEFAULT_POLICY, ReadPolicy, is_local, open_stream
from whisper_aut.data.shards import (
    Group,
    MemberGroups,
    SampleTable,
    ShardIndex,
    audio_and_annotation,
    text_hash,
)
from whisper_aut.errors import Reason, SampleRefused

END_OF_TAR = bytes(1024)
LOCAL_RUN_BYTES = (
    1 << 19
)  # of neighbours fetched at once: no more than a cache holds, or each copy of them waits for memory
REMOTE_RUN_BYTES = 8 << 20  # where every fetch is a request


@dataclass(frozen=True)
class Sample:
    """One clip as it lies in a shard: `audio` is the encoded file whose kind `suffix` names."""

    key: str
    shard: str
    audio: bytes
    suffix: str
    annotation: Annotation


@dataclass
class Refusal:
    """One sample that was refused: where it lies and why. What the ledger records."""

    source: str
    key: str
    reason: Reason
    detail: str = ""


def read_shard(
    stream: BinaryIO, url: str, wanted: Container[int] | None, limits: ClipLimits
) -> Iterator[tuple[int, Sample | Refusal]]:
    """Yield `(ordinal, sample or refusal)` for the wanted samples of one tar, in the order they lie in.

    Bodies of samples that are not wanted are skipped over. A damaged tar gives the samples before the damage, then one
    `Refusal` with ordinal -1.
    """
    groups = MemberGroups(stream, limits, wanted)
    for ordinal, group in groups:
        if wanted is None or ordinal in wanted:
            yield ordinal, _sample_of(group, url)
    if groups.damage:
        yield -1, Refusal(url, "", Reason.BAD_TAR, groups.damage)


def read_samples(
    stream: BinaryIO, url: str, table: SampleTable, wanted: Sequence[int], limits: ClipLimits
) -> Iterator[tuple[int, Sample | Refusal]]:
    """Yield the wanted samples as `read_shard` does, fetching nothing but them; neighbours are fetched together.

    Raises:
        ValueError: the tar is not the one that the table was made of.
    """
    for first, last in _runs(
        sorted(wanted), table, LOCAL_RUN_BYTES if is_local(url) else REMOTE_RUN_BYTES
    ):
        start, end = int(table.starts[first]), int(table.starts[last])
        if last - first == 1 and end - start > limits.max_bytes + MAX_JSON_BYTES:
            yield (
                first,
                Refusal(
                    url,
                    f"#{first}",
                    Reason.TOO_LARGE,
                    f"{end - start} bytes, limit {limits.max_bytes}",
                ),
            )
            continue
        stream.seek(start)
        data = stream.read(end - start)
        count = 0
        for place, item in read_shard(BytesIO(data + END_OF_TAR), url, None, limits):
            if place >= 0:
                count += 1
                if text_hash(item.key) != table.keys[first + place]:
                    raise ValueError(f"{url} has another sample {item.key!r} than its table")
                yield first + place, item
            elif len(data) < end - start:
                yield -1, item  # the tar was cut
                return
        if count != last - first:
            raise ValueError(f"{count} samples where the table has {last - first}")


def _runs(wanted: Sequence[int], table: SampleTable, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Join neighbours into ranges `[first, last)` of at most `max_bytes`, unless a single sample is larger."""
    first, last = None, 0
    for number in wanted:
        if first is not None and (
            number != last or table.starts[number + 1] - table.starts[first] > max_bytes
        ):
            yield first, last
            first = None
        first, last = number if first is None else first, number + 1
    if first is not None:
        yield first, last


def iter_samples(
    index: ShardIndex, limits: ClipLimits, policy: ReadPolicy = DEFAULT_POLICY
) -> Iterator[Sample | Refusal]:
    """Yield every selected sample of an index once, in the order in which the shards hold them."""
    for number in range(len(index.shards)):
        url = index.url(number)
        wanted = set(index.ordinals(number).tolist()) if index.selection else None
        try:
            with open_stream(url, policy) as stream:
                for _, item in read_shard(stream, url, wanted, limits):
                    yield item
        except OSError as error:
            yield Refusal(url, "", Reason.BAD_TAR, str(error))


def _sample_of(group: Group, url: str) -> Sample | Refusal:
    key = group["__key__"]
    try:
        suffix, audio, annotation = audio_and_annotation(group)
        return Sample(key, url, audio, suffix, annotation)
    except SampleRefused as refused:
        return Refusal(url, key, refused.reason, refused.detail)


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


LOOKAHEAD_CLIPS, LOOKAHEAD_BYTES = 256, 64 << 20  # hours of audio in one file stay one at a time

Item = TypeVar("Item")


def decoded_ahead(
    items: Iterable[Item],
    load: Callable[[Item], Tensor],
    encoded_bytes: Callable[[Item], int],
    workers: int,
) -> Iterator[tuple[Item, Tensor | SampleRefused]]:
    """Yield each item with what `load` returns for it, or with the refusal that it raises."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    ahead: deque[tuple[Item, Future[Tensor]]] = deque()
    source, waiting = iter(items), 0
    try:
        while True:
            while not ahead or (len(ahead) < LOOKAHEAD_CLIPS and waiting < LOOKAHEAD_BYTES):
                try:
                    item = next(source)
                except StopIteration:
                    break
                ahead.append((item, pool.submit(load, item)))
                waiting += encoded_bytes(item)
            if not ahead:
                return
            item, future = ahead.popleft()
            waiting -= encoded_bytes(item)
            yield item, _outcome(future)
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(future: Future[Tensor]) -> Tensor | SampleRefused:
    try:
        return future.result()
    except SampleRefused as refused:
        return refused
