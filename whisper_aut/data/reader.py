"""Read selected samples from shards, each as a `Sample`, or a `SkippedSample` if it is unreadable.

If a shard has a sample table, only the requested samples are fetched. Otherwise the tar is read
from its start and other samples are skipped.
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
from whisper_aut.errors import SkipReason, SkipSample

END_OF_TAR = bytes(1024)
# Adjacent samples are fetched together, up to these sizes. Locally, a larger run would not fit into
# the CPU cache, and every copy of it would wait for memory. Remotely, every fetch is a request.
LOCAL_RUN_BYTES = 1 << 19
REMOTE_RUN_BYTES = 8 << 20


@dataclass(frozen=True)
class Sample:
    """One clip as stored in a shard.

    Attributes:
        key: name of the sample in the shard.
        shard: path or URL of the shard.
        audio: the encoded audio file.
        suffix: file suffix of the audio, such as `flac`.
        annotation: the checked annotation.
    """

    key: str
    shard: str
    audio: bytes
    suffix: str
    annotation: Annotation


@dataclass
class SkippedSample:
    """One skipped sample, as recorded in the ledger.

    Attributes:
        source: path or URL of the shard.
        key: key of the sample, `#` and its index if the key is not known, or empty if the entry
            is about the whole shard.
        reason: why the sample was skipped.
        detail: what exactly was found.
    """

    source: str
    key: str
    reason: SkipReason
    detail: str = ""


def read_shard(
    stream: BinaryIO, url: str, wanted: Container[int] | None, limits: ClipLimits
) -> Iterator[tuple[int, Sample | SkippedSample]]:
    """Yield `(ordinal, sample or refusal)` for the wanted samples of one tar, in its order.

    A damaged tar yields the samples before the damage, then one `SkippedSample` with ordinal -1.

    Args:
        stream: the tar.
        url: path or URL of the tar, for samples and refusals.
        wanted: indices of the samples to read; None for all. Other bodies are skipped.
        limits: members larger than `max_bytes` are rejected.
    """
    groups = MemberGroups(stream, limits, wanted)
    for ordinal, group in groups:
        if wanted is None or ordinal in wanted:
            yield ordinal, _sample_of(group, url)
    if groups.damage:
        yield -1, SkippedSample(url, "", SkipReason.BAD_TAR, groups.damage)


def read_samples(
    stream: BinaryIO, url: str, table: SampleTable, wanted: Sequence[int], limits: ClipLimits
) -> Iterator[tuple[int, Sample | SkippedSample]]:
    """Yield the wanted samples like `read_shard`, but fetch only these, adjacent ones together.

    Args:
        stream: the tar, seekable.
        url: path or URL of the tar, for samples and refusals.
        table: the sample table of the tar.
        wanted: indices of the samples to read.
        limits: samples larger than `max_bytes` are rejected.

    Raises:
        ValueError: the table does not match the tar.
    """
    for first, last in _runs(
        sorted(wanted), table, LOCAL_RUN_BYTES if is_local(url) else REMOTE_RUN_BYTES
    ):
        start, end = int(table.starts[first]), int(table.starts[last])
        if last - first == 1 and end - start > limits.max_bytes + MAX_JSON_BYTES:
            yield (
                first,
                SkippedSample(
                    url,
                    f"#{first}",
                    SkipReason.TOO_LARGE,
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
                yield -1, item  # the tar is truncated
                return
        if count != last - first:
            raise ValueError(f"{count} samples where the table has {last - first}")


def _runs(wanted: Sequence[int], table: SampleTable, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Join adjacent indices into ranges `[first, last)` of at most `max_bytes`.

    A single sample may be larger.
    """
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
) -> Iterator[Sample | SkippedSample]:
    """Yield every selected sample of an index once, in the order of the shards.

    A shard that cannot be opened or read yields one `SkippedSample`.
    """
    for number in range(len(index.shards)):
        url = index.url(number)
        wanted = set(index.ordinals(number).tolist()) if index.selection else None
        try:
            with open_stream(url, policy) as stream:
                for _, item in read_shard(stream, url, wanted, limits):
                    yield item
        except OSError as error:
            yield SkippedSample(url, "", SkipReason.BAD_TAR, str(error))


def _sample_of(group: Group, url: str) -> Sample | SkippedSample:
    key = group["__key__"]
    try:
        suffix, audio, annotation = audio_and_annotation(group)
        return Sample(key, url, audio, suffix, annotation)
    except SkipSample as refused:
        return SkippedSample(url, key, refused.reason, refused.detail)


TABLES_HELD = 256
Items = Iterator[tuple[int, Sample | SkippedSample]]


class ShardReader:
    """Reads selected samples of an index. Caches the sample tables of up to `TABLES_HELD` shards.

    Args:
        limits: members larger than `max_bytes` are rejected.
        policy: how to retry reads.
    """

    def __init__(self, limits: ClipLimits, policy: ReadPolicy):
        self.limits, self.policy = limits, policy
        self._tables: dict[str, SampleTable | None] = {}

    def read(self, places: Mapping[int, tuple[int, int]], index: ShardIndex) -> Items:
        """Yield `(number, sample or skipped sample)` for every number, grouped by shard.

        A damaged, missing or unreachable shard yields a `SkippedSample` for each missing sample.

        Args:
            places: for each number, the index of the shard and the index of the sample among the
                shard's selected samples.
            index: the shards.
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
                    elif isinstance(item, SkippedSample):
                        damage = item.detail
                    if not numbers:
                        break
            except OSError as error:
                damage = str(error)
            for ordinal, number in numbers.items():
                yield number, SkippedSample(url, f"#{ordinal}", SkipReason.BAD_TAR, damage)

    def _items(self, index: ShardIndex, shard: int, ordinals: Sequence[int]) -> Items:
        url, table = index.url(shard), self._table(index, shard)
        if table is not None:
            try:
                with open_stream(url, self.policy, whole=False) as stream:
                    yield from read_samples(stream, url, table, ordinals, self.limits)
                return
            except ValueError as error:  # the table does not match the tar
                if index.selection:  # it was computed from the table, so it is wrong too
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
                self._tables[url] = None  # the tar is read without its table
        return self._tables.get(url)


# The byte limit makes files with hours of audio load one at a time.
LOOKAHEAD_CLIPS, LOOKAHEAD_BYTES = 256, 64 << 20

Item = TypeVar("Item")


def prefetch_decoded(
    items: Iterable[Item],
    load: Callable[[Item], Tensor],
    encoded_bytes: Callable[[Item], int],
    workers: int,
) -> Iterator[tuple[Item, Tensor | SkipSample]]:
    """Load items in threads and yield them in order.

    Args:
        items: what to load.
        load: returns the waveform of an item, or raises `SkipSample`.
        encoded_bytes: returns the encoded size of an item, to bound the memory for look-ahead.
        workers: number of threads.

    Yields:
        Each item with its waveform, or with the `SkipSample` that `load` raised.
    """
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


def _outcome(future: Future[Tensor]) -> Tensor | SkipSample:
    try:
        return future.result()
    except SkipSample as refused:
        return refused
