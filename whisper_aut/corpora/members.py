"""An open tar → groups of members, one group a sample: bounded before a body is read, and never dying of what is in the tar.

In: a tar stream, the ordinals that are wanted, limits. Out: WebDataset's own grouping by key, and what damage stopped it. Next:
`data.sample` makes samples of the groups, `corpora.inspect` facts.
"""

import tarfile
from collections.abc import Container, Iterator
from typing import Any, BinaryIO

from webdataset.tariterators import base_plus_ext, group_by_keys

from whisper_aut.corpora.annotation import MAX_JSON_BYTES
from whisper_aut.corpora.audio import AUDIO_SUFFIXES, ClipLimits
from whisper_aut.corpora.shards import tar_members
from whisper_aut.errors import Reason, SampleRefused

Group = dict[str, Any]


class MemberGroups:
    """Iterates over `(ordinal, group)`; bodies of samples that are not wanted are skipped over and left empty.

    Args:
        stream: the tar.
        limits: members above its bytes are not read; a `SampleRefused` stands in their place.
        wanted: ordinals of samples; None for all.

    Attributes:
        damage: what stopped the iteration, empty after a sound tar.
    """

    def __init__(self, stream: BinaryIO, limits: ClipLimits, wanted: Container[int] | None = None):
        self.stream, self.limits, self.wanted = stream, limits, wanted
        self.damage = ""

    def __iter__(self) -> Iterator[tuple[int, Group]]:
        # A key with two members of one suffix: WebDataset raises ValueError; the first one stands and the stream goes on.
        return enumerate(
            group_by_keys(self._members(), handler=lambda error: isinstance(error, ValueError))
        )

    def _members(self) -> Iterator[dict[str, Any]]:
        ordinal, last = -1, None
        try:
            for tar, member in tar_members(self.stream):
                key, suffix = base_plus_ext(member.name)
                if key is None or suffix is None:
                    continue
                if key != last:
                    ordinal, last = ordinal + 1, key
                body = (
                    self._body(tar, member, suffix)
                    if self.wanted is None or ordinal in self.wanted
                    else b""
                )
                yield {"fname": member.name, "data": body, "__url__": ""}
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            self.damage = str(error) or type(error).__name__

    def _body(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str
    ) -> bytes | SampleRefused:
        limit = MAX_JSON_BYTES if suffix.lower() == "json" else self.limits.max_bytes
        if member.size > limit:
            return SampleRefused(
                Reason.TOO_LARGE, f"{member.name}: {member.size} bytes, limit {limit}"
            )
        if self.stream.seekable() and not member.issparse():
            self.stream.seek(
                member.offset_data
            )  # tarfile's own file object takes several times as long
            body = self.stream.read(member.size)
        else:
            file = tar.extractfile(member)
            body = file.read() if file else b""
        if len(body) < member.size:
            raise tarfile.ReadError(f"{member.name} ends after {len(body)} of {member.size} bytes")
        return body


def audio_and_json(group: Group) -> tuple[str, bytes, bytes]:
    """Return the audio member's suffix, its bytes, and the bytes of the `.json` member.

    Raises:
        SampleRefused: one of them is missing, or a member was too large to be read.
    """
    bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
    for body in bodies.values():
        if isinstance(body, SampleRefused):
            raise body
    suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
    if "json" not in bodies:
        raise SampleRefused(Reason.BAD_JSON, "no .json member")
    if suffix is None:
        raise SampleRefused(Reason.NO_AUDIO, f"members: {', '.join(sorted(bodies))}")
    return suffix, bodies[suffix], bodies["json"]
