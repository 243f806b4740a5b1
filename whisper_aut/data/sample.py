"""Tar → samples: the members of one shard, grouped, bounded and checked.

In: an open tar and the ordinals that are wanted. Out: per ordinal a `Sample` (still encoded) or a `Refusal`. Next:
`data.waveform` decodes it, `data.stream` puts samples in order. Grouping and key rules are WebDataset's own (`corpora.members`).
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import fsspec

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.members import Group, MemberGroups, audio_and_json
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.errors import Reason, SampleRefused


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


def iter_samples(index: ShardIndex, limits: ClipLimits) -> Iterator[Sample | Refusal]:
    """Yield every sample of an index once, in the order in which the shards hold them."""
    for number in range(len(index.shards)):
        url = index.url(number)
        with fsspec.open(url, "rb") as stream:
            for _, item in read_shard(cast(BinaryIO, stream), url, None, limits):
                yield item


def _sample_of(group: Group, url: str) -> Sample | Refusal:
    key = group["__key__"]
    try:
        suffix, audio, facts = audio_and_json(group)
        return Sample(key, url, audio, suffix, Annotation.from_json(facts))
    except SampleRefused as refused:
        return Refusal(url, key, refused.reason, refused.detail)
