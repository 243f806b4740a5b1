"""Tar → samples: the members of one shard, grouped, bounded and checked.

In: an open tar and the ordinals that are wanted. Out: per ordinal a `Sample` (still encoded) or a `Refusal`. Next:
`data.waveform` decodes it, `data.stream` puts samples in order. Grouping and key rules are WebDataset's own; member sizes
are checked here, before a byte of the body is read.
"""

import tarfile
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from webdataset.tariterators import base_plus_ext, group_by_keys

from whisper_aut.corpora.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.corpora.audio import AUDIO_SUFFIXES, ClipLimits
from whisper_aut.corpora.shards import ShardIndex, tar_members
from whisper_aut.errors import Reason, SampleRefused


@dataclass(frozen=True)
class Sample:
    """One clip as it lies in a shard: `audio` is the encoded file whose kind `suffix` names."""

    key: str
    shard: str
    audio: bytes
    suffix: str
    annotation: Annotation


@dataclass(frozen=True)
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
    members = _Members(stream, url, wanted, limits)
    for ordinal, group in enumerate(group_by_keys(members, handler=_refuse_duplicates)):
        if wanted is None or ordinal in wanted:
            yield ordinal, _sample_of(group, url)
    if members.damage:
        yield -1, Refusal(url, "", Reason.BAD_TAR, members.damage)


def iter_samples(index: ShardIndex, limits: ClipLimits) -> Iterator[Sample | Refusal]:
    """Yield every sample of an index once, in the order in which the shards hold them."""
    for number in range(len(index.shards)):
        url = index.url(number)
        with fsspec.open(url, "rb") as stream:
            for _, item in read_shard(stream, url, None, limits):  # pyright: ignore[reportArgumentType]
                yield item


class _Members:
    """The `{fname, data}` stream that WebDataset groups; remembers what stopped it."""

    def __init__(self, stream: BinaryIO, url: str, wanted: Container[int] | None, limits: ClipLimits):
        self.stream, self.url, self.wanted, self.limits = stream, url, wanted, limits
        self.damage = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ordinal, last = -1, None
        try:
            for tar, member in tar_members(self.stream):
                key, suffix = base_plus_ext(member.name)
                if key is None or suffix is None:
                    continue
                if key != last:
                    ordinal, last = ordinal + 1, key
                data = self._body(tar, member, suffix) if self.wanted is None or ordinal in self.wanted else b""
                yield {"fname": member.name, "data": data, "__url__": self.url}
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = str(error)

    def _body(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> bytes | SampleRefused:
        limit = MAX_JSON_BYTES if suffix.lower() == "json" else self.limits.max_bytes
        if member.size > limit:
            return SampleRefused(Reason.TOO_LARGE, f"{member.name}: {member.size} bytes, limit {limit}")
        file = tar.extractfile(member)
        body = file.read() if file else b""
        if len(body) < member.size:
            raise tarfile.ReadError(f"{member.name} ends after {len(body)} of {member.size} bytes")
        return body


def _refuse_duplicates(error: Exception) -> bool:
    # A key with two members of one suffix: WebDataset raises; the first one stands and the stream goes on.
    return isinstance(error, ValueError)


def _sample_of(group: dict[str, Any], url: str) -> Sample | Refusal:
    key = group["__key__"]
    try:
        bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
        for body in bodies.values():
            if isinstance(body, SampleRefused):
                raise body
        suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
        if "json" not in bodies:
            raise SampleRefused(Reason.BAD_JSON, "no .json member")
        if suffix is None:
            raise SampleRefused(Reason.NO_AUDIO, f"members: {', '.join(sorted(bodies))}")
        return Sample(key, url, bodies[suffix], suffix, Annotation.from_json(bodies["json"]))
    except SampleRefused as refused:
        return Refusal(url, key, refused.reason, refused.detail)
