"""An open tar → groups of members, one group a sample: bounded before a body is read, and never dying of what is in the tar.

In: a tar stream, the ordinals that are wanted, limits. Out: the members of each sample, which belong
together by `shards.sample_members`, and what damage stopped the iteration. Next: `data.sample` makes
samples of the groups, `corpora.inspect` facts.
"""

import tarfile
from collections.abc import Container, Iterator
from typing import Any, BinaryIO

from whisper_aut.corpora.annotation import MAX_JSON_BYTES, Annotation
from whisper_aut.corpora.audio import AUDIO_SUFFIXES, ClipLimits
from whisper_aut.corpora.shards import sample_members
from whisper_aut.errors import Reason, SampleRefused

Group = dict[str, Any]


class MemberGroups:
    """Iterates over `(ordinal, group)`; bodies of samples that are not wanted are skipped over and left empty.

    Args:
        stream: the tar.
        limits: members above its bytes are not read; a `SampleRefused` stands in their place.
        wanted: ordinals of samples; None for all.
        suffixes: members whose bodies are read; None for all.

    Attributes:
        damage: what stopped the iteration, empty after a sound tar.
    """

    def __init__(
        self,
        stream: BinaryIO,
        limits: ClipLimits,
        wanted: Container[int] | None = None,
        suffixes: Container[str] | None = None,
    ):
        self.stream, self.limits, self.wanted, self.suffixes = stream, limits, wanted, suffixes
        self.damage = ""

    def __iter__(self) -> Iterator[tuple[int, Group]]:
        ordinal = -1
        group: Group = {}
        try:
            for number, key, suffix, tar, member in sample_members(self.stream):
                is_wanted = self.wanted is None or number in self.wanted
                is_read = is_wanted and (self.suffixes is None or suffix in self.suffixes)
                body = self._body(tar, member, suffix) if is_read else b""
                if number != ordinal:
                    if group:
                        yield ordinal, group
                    ordinal, group = number, {"__key__": key}
                group[suffix] = body
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            self.damage = str(error) or type(error).__name__
        if group:
            yield ordinal, group

    def _body(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str
    ) -> bytes | SampleRefused:
        limit = MAX_JSON_BYTES if suffix in ("json", "txt") else self.limits.max_bytes
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


def audio_and_annotation(group: Group) -> tuple[str, bytes, Annotation]:
    """Return the audio member's suffix, its bytes, and the annotation of `.json` and `.txt` members.

    Raises:
        SampleRefused: there is no audio, or neither JSON nor text; a member is too large, or not
            what its name says.
    """
    bodies = {suffix: body for suffix, body in group.items() if not suffix.startswith("__")}
    for body in bodies.values():
        if isinstance(body, SampleRefused):
            raise body
    suffix = next((suffix for suffix in AUDIO_SUFFIXES if suffix in bodies), None)
    listed = f"members: {', '.join(f'.{suffix}' for suffix in sorted(bodies))}"
    if "json" not in bodies and "txt" not in bodies:
        raise SampleRefused(Reason.BAD_JSON, f"no .json or .txt member; {listed}{_dots(group)}")
    if suffix is None:
        raise SampleRefused(Reason.NO_AUDIO, f"{listed}{_dots(group)}")
    try:
        text = bodies.get("txt", b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleRefused(Reason.BAD_JSON, f"the .txt member is not UTF-8: {error}") from None
    return suffix, bodies[suffix], Annotation.from_json(bodies.get("json", b"{}"), text)


def _dots(group: Group) -> str:
    """Return the cause where a name with dots in it hides what its last suffix says."""
    known = (*AUDIO_SUFFIXES, "json", "txt")
    hidden = [suffix for suffix in group if "." in suffix and suffix.rpartition(".")[2] in known]
    if not hidden:
        return ""
    key = group["__key__"]
    return (
        f". WebDataset ends a key at the first dot, so {f'{key}.{hidden[0]}'!r} is the member "
        f"{f'.{hidden[0]}'!r} of {key!r}: rename the files with no dot but the suffix's"
    )
