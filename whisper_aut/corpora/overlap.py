"""One clip → what may tell that it is another one: its names, its bytes, its samples, its sound.

In: shards. Out: `ClipFacts` per clip; from `ProbeClips`, the `Match`es of a training clip among the probes' clips. Next: `corpora.audit`
runs this over corpora. The side that is probed is held in memory, the other one is only passed through.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from whisper_aut.corpora.audio import ClipLimits, decode
from whisper_aut.corpora.fingerprint import Fingerprint, FingerprintIndex, Stretch, fingerprint
from whisper_aut.corpora.members import Group, MemberGroups, audio_and_annotation
from whisper_aut.corpora.provenance import names_of
from whisper_aut.corpora.remote import beside, open_stream
from whisper_aut.errors import Reason, SampleRefused

LIMITS = ClipLimits(
    min_seconds=0.0, max_seconds=3600.0
)  # probe sets hold clips that training would refuse
HASH_BYTES = 12
MATCHES_PER_CLIP = 20  # a name may be shared by every slice of a recording
_NO_DOUBT = np.zeros((0, 0), np.uint32)


@dataclass(frozen=True)
class Place:
    """Where a clip lies: the folder of shards, the tar in it, the key in that."""

    folder: str
    shard: str
    key: str


@dataclass(frozen=True)
class ClipFacts:
    """What is compared: `encoded` and `samples` are hashes of the file and of what it decodes to."""

    place: Place
    seconds: float
    names: frozenset[str]
    encoded: bytes
    samples: bytes
    sound: Fingerprint


@dataclass
class ShardFindings:
    """What one tar gave: clips compared, their seconds, those that could not be (by reason), and what was found in them."""

    clips: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    matches: list["Match"] = field(default_factory=list)


@dataclass(frozen=True)
class Match:
    """A training clip that is, or holds a part of, a probe clip, and why we say so."""

    train: Place
    probe: Place
    evidence: tuple[dict[str, Any], ...]


def read_facts(folder: str, shard: str, findings: ShardFindings) -> Iterator[ClipFacts]:
    """Yield the facts of every clip of one tar that decodes; what does not is counted in `findings`."""
    with open_stream(beside(folder, shard)) as stream:
        groups = MemberGroups(stream, LIMITS)
        for _, group in groups:
            try:
                facts = _facts(folder, shard, group)
            except SampleRefused as refused:
                findings.refused[refused.reason] += 1
                continue
            findings.clips += 1
            findings.seconds += facts.seconds
            yield facts
        if groups.damage:
            findings.refused[Reason.BAD_TAR] += 1


def _facts(folder: str, shard: str, group: Group) -> ClipFacts:
    _, audio, annotation = audio_and_annotation(group)
    clip = decode(audio, LIMITS)
    samples = hashlib.blake2b(clip.samples.tobytes(), digest_size=HASH_BYTES)
    samples.update(str(clip.sample_rate_hz).encode())
    return ClipFacts(
        place=Place(folder, shard, group["__key__"]),
        seconds=clip.seconds,
        names=names_of(group["__key__"], annotation),
        encoded=hashlib.blake2b(audio, digest_size=HASH_BYTES).digest(),
        samples=samples.digest(),
        sound=fingerprint(clip.samples, clip.sample_rate_hz),
    )


def indexed_part(facts: ClipFacts) -> ClipFacts:
    """Return the facts without what only a search needs, so that less travels between processes."""
    sound = Fingerprint(facts.sound.words, facts.sound.heard, _NO_DOUBT)
    return ClipFacts(facts.place, facts.seconds, facts.names, facts.encoded, facts.samples, sound)


class ProbeClips:
    """The clips that training must not have heard, ready to be searched.

    Args:
        clips: their facts.
    """

    def __init__(self, clips: Sequence[ClipFacts]):
        self._places = [clip.place for clip in clips]
        self._named: dict[str, list[int]] = defaultdict(list)
        self._encoded: dict[bytes, list[int]] = defaultdict(list)
        self._samples: dict[bytes, list[int]] = defaultdict(list)
        for number, clip in enumerate(clips):
            self._encoded[clip.encoded].append(number)
            self._samples[clip.samples].append(number)
            for name in clip.names:
                self._named[name].append(number)
        self._sounds = FingerprintIndex(clip.sound for clip in clips)

    @property
    def index_bytes(self) -> int:
        return self._sounds.bytes

    def matches(self, clip: ClipFacts) -> list[Match]:
        """Return the probe clips that this one overlaps, the most certain first."""
        evidence: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for number in self._encoded.get(clip.encoded, ()):
            evidence[number].append({"kind": "bytes"})
        for number in self._samples.get(clip.samples, ()):
            evidence[number].append({"kind": "samples"})
        for stretch in self._sounds.search(clip.sound):
            evidence[stretch.clip].append(_told(stretch))
        for name in sorted(clip.names):
            for number in self._named.get(name, ()):
                evidence[number].append({"kind": "name", "name": name})
        return [
            Match(clip.place, self._places[number], tuple(reasons))
            for number, reasons in list(evidence.items())[:MATCHES_PER_CLIP]
        ]


def _told(stretch: Stretch) -> dict[str, Any]:
    return {
        "kind": "sound",
        "bit_error": stretch.bit_error,
        "words": stretch.words,
        "seconds": stretch.seconds,
        "train_at_seconds": stretch.starts_at,
        "probe_at_seconds": stretch.indexed_starts_at,
    }
