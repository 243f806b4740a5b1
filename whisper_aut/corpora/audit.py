"""Training shards × probe shards → which clips of the one are in the other.

In: folders of shards to train on and folders that probes test on. Out: `OUT/audit.json` (settings, counts, every match with its evidence)
and `OUT/exclude.jsonl`. Next: `data.exclude` in a config names the list, `corpora.exclusion` leaves its clips out, and the run directory
keeps the audit. The probes' side is held in memory, the training side is read once, tar by tar, by as many processes as there are cores;
finished tars are written down, so an audit that was stopped goes on.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whisper_aut import __version__
from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits, decode
from whisper_aut.corpora import fingerprint as sound
from whisper_aut.corpora.build import obey_parent
from whisper_aut.corpora.fingerprint import Fingerprint, FingerprintIndex, Stretch, fingerprint
from whisper_aut.corpora.inspect import open_indices
from whisper_aut.data.annotation import Annotation, read_lines
from whisper_aut.data.remote import beside, open_stream
from whisper_aut.data.shards import Group, MemberGroups, ShardIndex, audio_and_annotation
from whisper_aut.errors import Reason, SampleRefused, UserError

FREESOUND_FIELDS = ("freesound_id", "fsid", "fsID", "fs_id")
YOUTUBE_FIELDS = ("youtube_id", "ytid")
FREESOUND_SOURCES = re.compile(r"freesound|fsd50k|fsd18|fsdkaggle", re.I)
YOUTUBE_SOURCES = re.compile(r"audioset|audiocaps|musiccaps|musicbench|vggsound", re.I)
ESC_NAME = re.compile(r"[1-5]-(\d+)-[A-Z]-\d+")  # fold, Freesound id, take, class
URBANSOUND_NAME = re.compile(r"(\d+)-\d+-\d+-\d+")  # Freesound id, class, occurrence, slice
YOUTUBE_NAME = re.compile(r"Y?([\w-]{11})(?:_\d+)*")
GENERIC_NAME = re.compile(r"[a-z]*_?\d+|\D*")  # clip_0012, or no number at all
MIN_NAME_CHARACTERS = 8
_SUFFIX = re.compile(rf"\.({'|'.join(AUDIO_SUFFIXES)})$", re.I)


def names_of(key: str, annotation: Annotation) -> frozenset[str]:
    """Return the names of one clip: `file:NAME`, `SOURCE:ID`, `freesound:ID`, `youtube:ID`."""
    names: set[str] = set()
    for written in {key, annotation.id} - {""}:
        name = _SUFFIX.sub("", written.rpartition("/")[2])
        if annotation.source:
            names.add(f"{_plain(annotation.source)}:{_plain(name)}")
        if len(name) >= MIN_NAME_CHARACTERS and not GENERIC_NAME.fullmatch(_plain(name)):
            names.add(f"file:{_plain(name)}")
        names |= _origins(name, annotation.source)
    for site, fields in (("freesound", FREESOUND_FIELDS), ("youtube", YOUTUBE_FIELDS)):
        names |= {
            f"{site}:{annotation.extra[field]}"
            for field in fields
            if annotation.extra.get(field) not in (None, "")
        }
    return frozenset(names)


def _origins(name: str, source: str) -> set[str]:
    if found := ESC_NAME.fullmatch(name):
        return {f"freesound:{found[1]}"}
    if "urbansound" in source.lower() and (found := URBANSOUND_NAME.fullmatch(name)):
        return {f"freesound:{found[1]}"}
    if FREESOUND_SOURCES.search(source) and name.isdecimal():
        return {f"freesound:{name}"}
    if YOUTUBE_SOURCES.search(source) and (found := YOUTUBE_NAME.fullmatch(name)):
        return {f"youtube:{found[1]}"}
    return set()


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


LIMITS = ClipLimits(
    min_seconds=0.0, max_seconds=3600.0
)  # probe sets hold clips that training would refuse
HASH_BYTES = 12
MATCHES_PER_CLIP = 20  # a name may be shared by every slice of a recording
_NO_DOUBT = np.zeros((0, 0), np.uint32)


@dataclass(frozen=True)
class ClipLocation:
    """Where a clip lies: the folder of shards, the tar in it, the key in that."""

    folder: str
    shard: str
    key: str


@dataclass(frozen=True)
class ClipFacts:
    """What is compared: `encoded` and `samples` are hashes of the file and of what it decodes to."""

    place: ClipLocation
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

    train: ClipLocation
    probe: ClipLocation
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
        place=ClipLocation(folder, shard, group["__key__"]),
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


Tar = tuple[str, str]  # folder, name

_shared: list[Any] = [
    None
]  # what a worker process was given when it began: too large to send with every tar


def _begin(shared: Any) -> None:
    _shared[0] = shared
    obey_parent()


def _call(work: Callable[[Tar, Any], Any], tar: Tar) -> Any:
    return work(tar, _shared[0])


def over_tars(
    work: Callable[[Tar, Any], Any],
    tars: Sequence[Tar],
    workers: int,
    shared: Any,
    what: str,
    progress: bool,
) -> Iterator[tuple[Tar, Any]]:
    """Yield `(tar, result)` for every tar, in order, with at most a few of them under way."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        bar.add_task(what, total=len(tars))
        if min(workers, len(tars)) <= 1:
            for tar in tars:
                yield tar, work(tar, shared)
                bar.advance(bar.task_ids[0])
            return
        context = get_context(
            "fork" if sys.platform == "linux" else None
        )  # children share the index's pages
        pool = ProcessPoolExecutor(
            min(workers, len(tars)), context, initializer=_begin, initargs=(shared,)
        )
        pending: deque = deque()
        try:
            for tar in tars:
                pending.append((tar, pool.submit(_call, work, tar)))
                if len(pending) > 2 * workers:
                    yield pending[0][0], pending.popleft()[1].result()
                    bar.advance(bar.task_ids[0])
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
                bar.advance(bar.task_ids[0])
        except BrokenProcessPool:
            raise UserError(
                "A process of the audit died, for want of memory or over a file that breaks the decoder. Run again with --workers 1: "
                "finished tars are not read again, and the one at fault is the next."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Journal:
    """What has been compared so far, a line per tar; void as soon as settings or folders change."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> dict[Tar, ShardFindings]:
        done: dict[Tar, ShardFindings] = {}
        try:
            lines = read_lines(self.path)
        except OSError:
            lines = []
        if not lines or lines[0] != self.key:
            self.path.write_text(self.key + "\n", encoding="utf-8")
            return {}
        for line in lines[1:]:
            try:
                tar, clips, seconds, refused, matches = json.loads(line)
            except ValueError:  # cut short by whatever stopped it
                continue
            found = [
                Match(ClipLocation(*train), ClipLocation(*probe), tuple(evidence))
                for train, probe, evidence in matches
            ]
            done[tar[0], tar[1]] = ShardFindings(clips, seconds, Counter(refused), found)
        return done

    def write(self, tar: Tar, findings: ShardFindings) -> None:
        matches = [
            [_place(match.train), _place(match.probe), match.evidence] for match in findings.matches
        ]
        line = json.dumps([tar, findings.clips, findings.seconds, findings.refused, matches])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _place(place: ClipLocation) -> list[str]:
    return [place.folder, place.shard, place.key]


AUDIT_NAME, EXCLUDE_NAME, JOURNAL_NAME = "audit.json", "exclude.jsonl", ".audit.jsonl"
AUDIT_VERSION = 1
SETTINGS = {
    "version": AUDIT_VERSION,
    "rate_hz": sound.RATE_HZ,
    "window_samples": sound.WINDOW_SAMPLES,
    "hop_samples": sound.HOP_SAMPLES,
    "bands_hz": [sound.LOWEST_HZ, sound.HIGHEST_HZ],
    "bits": sound.BITS,
    "words_and_tolerated_bit_error": sound.TOLERATED,
}


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        train, probes: what was compared, folder by folder: root, fingerprint, clips, seconds, refused.
        matches: the pairs found.
        seconds_taken: of wall clock, for the tars that were read this time.
    """

    train: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    matches: list[Match]
    seconds_taken: float
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))

    @property
    def excluded(self) -> dict[ClipLocation, list[Match]]:
        """The matches by training clip."""
        found: dict[ClipLocation, list[Match]] = defaultdict(list)
        for match in self.matches:
            found[match.train].append(match)
        return found

    def counts(self) -> dict[str, Any]:
        """Return how much was compared and how much overlaps, over all and by kind of evidence and probe folder."""
        by_kind = Counter(
            kind for match in self.matches for kind in {reason["kind"] for reason in match.evidence}
        )
        heard = {match.probe for match in self.matches}
        by_probe = Counter(place.folder for place in heard)
        return {
            "train_clips": sum(folder["clips"] for folder in self.train),
            "train_hours": round(sum(folder["seconds"] for folder in self.train) / 3600, 3),
            "probe_clips": sum(folder["clips"] for folder in self.probes),
            "train_clips_that_overlap": len(self.excluded),
            "probe_clips_in_training": len(heard),
            "probe_clips_in_training_by_folder": {
                folder["root"]: by_probe[folder["root"]] for folder in self.probes
            },
            "pairs": len(self.matches),
            "pairs_by_evidence": dict(by_kind),
        }

    def summary(self) -> str:
        """Return one paragraph for people."""
        counts = self.counts()
        text = (
            f"{counts['train_clips']} training clips ({counts['train_hours']:.2f} h) against {counts['probe_clips']} probe clips: "
            f"{counts['train_clips_that_overlap']} overlap"
        )
        if self.matches:
            kinds = ", ".join(
                f"{count} by {kind}" for kind, count in counts["pairs_by_evidence"].items()
            )
            text += f" with {counts['probe_clips_in_training']} probe clips (pairs: {kinds})"
        unread = sum(sum(folder["refused"].values()) for folder in (*self.train, *self.probes))
        return text + (
            f". {unread} clips could not be read and were not compared." if unread else "."
        )


def run_audit(
    train: Sequence[str],
    probes: Sequence[str],
    out: str | Path,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Audit:
    """Compare folders of shards (or folders of such folders) and write what was found to `out`.

    Raises:
        UserError: no shards, no clip that could be read, `out` cannot be written, or a process died.
    """
    started, out = time.monotonic(), Path(out)
    workers = workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    trained, tested = _indices(train), _indices(probes)
    clips: list[ClipFacts] = []
    heard: dict[Tar, ShardFindings] = {}
    for tar, (findings, facts) in over_tars(
        _read_probe, _tars(tested), workers, None, "probe shards", progress
    ):
        heard[tar] = findings
        clips += facts
    if not clips:
        raise UserError(
            f"Not one clip of {', '.join(probes)} could be read, so there is nothing to compare with."
        )
    searched = ProbeClips(clips)
    clips.clear()
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out / JOURNAL_NAME, _key(trained, tested))
        done = journal.read()
        remaining = [tar for tar in _tars(trained) if tar not in done]
        for tar, findings in over_tars(
            _read_train, remaining, workers, searched, "training shards", progress
        ):
            done[tar] = findings
            journal.write(tar, findings)
        matches = [match for tar in _tars(trained) for match in done[tar].matches]
        audit = Audit(
            _folders(trained, done),
            _folders(tested, heard),
            matches,
            round(time.monotonic() - started, 1),
        )
        _write(audit, out)
        journal.remove()
    except OSError as error:
        raise UserError(
            f"Cannot read the shards, or write to {out}: {error.strerror or error}."
        ) from None
    return audit


def read_audit(path: Path) -> dict[str, Any]:
    """Return an `audit.json`, or nothing where there is none that can be read."""
    try:
        audit = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return (
        audit
        if isinstance(audit, dict) and audit.get("settings", {}).get("version") == AUDIT_VERSION
        else {}
    )


def unaudited(audit: dict[str, Any], side: str, roots: Sequence[str]) -> list[str]:
    """Return those of the folders that an `audit.json` did not compare, as `side` (`train` or `probes`), in their present state."""
    known = {folder["fingerprint"] for folder in audit.get(side, ())}
    if not known:
        return list(roots)  # without opening a thing
    return [
        root
        for root in roots
        if not all(known & index.identities() for _, index in open_indices(root))
    ]


def _indices(roots: Sequence[str]) -> list[ShardIndex]:
    return [index for root in dict.fromkeys(roots) for _, index in open_indices(root)]


def _tars(indices: Sequence[ShardIndex]) -> list[Tar]:
    return [(index.root, shard.name) for index in indices for shard in index.shards]


def _read_probe(tar: Tar, _: None) -> tuple[ShardFindings, list[ClipFacts]]:
    findings = ShardFindings()
    return findings, [indexed_part(facts) for facts in read_facts(*tar, findings)]


def _read_train(tar: Tar, probes: ProbeClips) -> ShardFindings:
    findings = ShardFindings()
    for facts in read_facts(*tar, findings):
        findings.matches += probes.matches(facts)
    return findings


def _key(*sides: Sequence[ShardIndex]) -> str:
    facts = [[(index.root, index.fingerprint()) for index in indices] for indices in sides]
    return hashlib.sha256(json.dumps([facts, SETTINGS, __version__]).encode()).hexdigest()


def _folders(
    indices: Sequence[ShardIndex], found: Mapping[Tar, ShardFindings]
) -> list[dict[str, Any]]:
    folders = []
    for index in indices:
        parts = [found[tar] for tar in _tars([index])]
        folders.append(
            {
                "root": index.root,
                "fingerprint": index.fingerprint(),
                "clips": sum(part.clips for part in parts),
                "seconds": round(sum(part.seconds for part in parts), 3),
                "refused": dict(sum((part.refused for part in parts), Counter())),
            }
        )
    return folders


def _write(audit: Audit, out: Path) -> None:
    fingerprints = {folder["root"]: folder["fingerprint"] for folder in audit.train}
    lines = [
        {
            "fingerprint": fingerprints[place.folder],
            **asdict(place),
            "probe": matches[0].probe.key,
            "evidence": sorted({reason["kind"] for match in matches for reason in match.evidence}),
        }
        for place, matches in audit.excluded.items()
    ]
    whole = {
        "release": __version__,
        "settings": audit.settings,
        "counts": audit.counts(),
        "train": audit.train,
        "probes": audit.probes,
        "seconds_taken": audit.seconds_taken,
        "matches": [asdict(match) for match in audit.matches],
    }
    _replace(
        out / EXCLUDE_NAME, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    _replace(out / AUDIT_NAME, json.dumps(whole, indent=1, ensure_ascii=False))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
