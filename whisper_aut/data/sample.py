"""Tar → samples: the members of one shard, grouped, bounded and checked.

In: an open tar and the ordinals that are wanted. Out: per ordinal a `Sample` (still encoded) or a `Refusal`. Next:
`data.waveform` decodes it, `data.stream` puts samples in order. Which members belong together: `corpora.shards.sample_members`.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from whisper_aut.corpora.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.members import Group, MemberGroups, audio_and_annotation
from whisper_aut.corpora.remote import DEFAULT_POLICY, ReadPolicy, is_local, open_stream
from whisper_aut.corpora.sample_table import SampleTable, text_hash
from whisper_aut.corpora.shards import ShardIndex
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
