"""Find the clips that training shards and probe shards have in common.

An audit writes `OUT/audit.json` (settings, counts, and every match with its evidence) and
`OUT/exclude.jsonl`, the list that `data.exclude` of a config takes. The probe clips are kept in
memory, and the training tars are read once, in parallel. Finished tars are recorded, so an
interrupted audit resumes where it stopped.
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
from whisper_aut.data.reader import (
    Group,
    MemberGroups,
    audio_and_annotation,
    open_stream,
    sibling_url,
)
from whisper_aut.data.shards import ShardIndex
from whisper_aut.errors import SkipReason, SkipSample, UserError

FREESOUND_FIELDS = ("freesound_id", "fsid", "fsID", "fs_id")
YOUTUBE_FIELDS = ("youtube_id", "ytid")
FREESOUND_SOURCES = re.compile(r"freesound|fsd50k|fsd18|fsdkaggle", re.I)
YOUTUBE_SOURCES = re.compile(r"audioset|audiocaps|musiccaps|musicbench|vggsound", re.I)
ESC_NAME = re.compile(r"[1-5]-(\d+)-[A-Z]-\d+")  # fold, Freesound id, take, class
URBANSOUND_NAME = re.compile(r"(\d+)-\d+-\d+-\d+")  # Freesound id, class, occurrence, slice
YOUTUBE_NAME = re.compile(r"Y?([\w-]{11})(?:_\d+)*")
GENERIC_NAME = re.compile(r"[a-z]*_?\d+|\D*")  # such as clip_0012, or a name without a digit
MIN_NAME_CHARACTERS = 8
_SUFFIX = re.compile(rf"\.({'|'.join(AUDIO_SUFFIXES)})$", re.I)


def names_of(key: str, annotation: Annotation) -> frozenset[str]:
    """Return the names that identify a clip across corpora.

    They are `file:NAME` (unless the name is short or generic), `SOURCE:NAME`, `freesound:ID` and
    `youtube:ID`. The ids come from the annotation's fields or from the naming scheme of a known
    source.
    """
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


# Wider than the limits of training: probe sets contain clips that training would skip.
LIMITS = ClipLimits(min_seconds=0.0, max_seconds=3600.0)
HASH_BYTES = 12
MATCHES_PER_CLIP = 20  # all slices of a recording may share a name
_NO_DOUBT = np.zeros((0, 0), np.uint32)


@dataclass(frozen=True)
class ClipLocation:
    """Identifies a clip by its folder of shards, the tar in that folder and the key in that tar."""

    folder: str
    shard: str
    key: str


@dataclass(frozen=True)
class ClipMetadata:
    """What the audit compares of a clip.

    Attributes:
        place: the clip's location.
        seconds: duration.
        names: see `names_of`.
        encoded: hash of the encoded file.
        samples: hash of the decoded samples and their rate.
        sound: acoustic fingerprint.
    """

    place: ClipLocation
    seconds: float
    names: frozenset[str]
    encoded: bytes
    samples: bytes
    sound: Fingerprint


@dataclass
class ShardFindings:
    """The result for one tar.

    Attributes:
        clips: number of clips compared.
        seconds: their total duration.
        refused: number of clips that could not be read, by reason.
        matches: the overlaps found.
    """

    clips: int = 0
    seconds: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    matches: list["Match"] = field(default_factory=list)


@dataclass(frozen=True)
class Match:
    """A training clip that overlaps a probe clip, with the evidence for it."""

    train: ClipLocation
    probe: ClipLocation
    evidence: tuple[dict[str, Any], ...]


def read_facts(folder: str, shard: str, findings: ShardFindings) -> Iterator[ClipMetadata]:
    """Yield the facts of every clip in a tar that decodes; count the others in `findings`."""
    with open_stream(sibling_url(folder, shard)) as stream:
        groups = MemberGroups(stream, LIMITS)
        for _, group in groups:
            try:
                facts = _facts(folder, shard, group)
            except SkipSample as refused:
                findings.refused[refused.reason] += 1
                continue
            findings.clips += 1
            findings.seconds += facts.seconds
            yield facts
        if groups.damage:
            findings.refused[SkipReason.BAD_TAR] += 1


def _facts(folder: str, shard: str, group: Group) -> ClipMetadata:
    _, audio, annotation = audio_and_annotation(group)
    clip = decode(audio, LIMITS)
    samples = hashlib.blake2b(clip.samples.tobytes(), digest_size=HASH_BYTES)
    samples.update(str(clip.sample_rate_hz).encode())
    return ClipMetadata(
        place=ClipLocation(folder, shard, group["__key__"]),
        seconds=clip.seconds,
        names=names_of(group["__key__"], annotation),
        encoded=hashlib.blake2b(audio, digest_size=HASH_BYTES).digest(),
        samples=samples.digest(),
        sound=fingerprint(clip.samples, clip.sample_rate_hz),
    )


def indexed_part(facts: ClipMetadata) -> ClipMetadata:
    """Return a copy without the doubtful bits.

    Only a searched clip needs them; dropping them means less data to send between processes.
    """
    sound = Fingerprint(facts.sound.words, facts.sound.heard, _NO_DOUBT)
    return ClipMetadata(
        facts.place, facts.seconds, facts.names, facts.encoded, facts.samples, sound
    )


class ProbeClips:
    """A searchable index of the clips that must not be in the training data.

    Args:
        clips: the facts of all probe clips.
    """

    def __init__(self, clips: Sequence[ClipMetadata]):
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
        """Memory of the fingerprint index, in bytes."""
        return self._sounds.bytes

    def matches(self, clip: ClipMetadata) -> list[Match]:
        """Return the probe clips that `clip` overlaps, those with the strongest evidence first.

        At most `MATCHES_PER_CLIP` are returned.
        """
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

# What a worker process receives once, at its start. It is too large to send with every tar.
_shared: list[Any] = [None]


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
    """Call `work` on every tar in a process pool and yield `(tar, result)` in order.

    Args:
        work: function of a tar and `shared`.
        tars: the tars to process.
        workers: number of processes; with 1 the work is done in this process.
        shared: an object that every worker receives once.
        what: description for the progress bar.
        progress: whether to show the progress bar.

    Raises:
        UserError: a worker process died.
    """
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
        # Forked children share the memory pages of the index.
        context = get_context("fork" if sys.platform == "linux" else None)
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
                "A process of the audit died, for want of memory or over a file that breaks the "
                "decoder. Run again with --workers 1: finished tars are not read again, and the "
                "one at fault is the next."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Journal:
    """The findings of an unfinished audit, one line per tar.

    The first line is a key made of the settings, the release and the folders' fingerprints. A
    journal with another key is discarded.

    Args:
        path: the journal file.
        key: the key of this audit.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> dict[Tar, ShardFindings]:
        """Return the findings of all recorded tars, or start a new journal if the key differs."""
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
            except ValueError:  # a line truncated by the interruption
                continue
            found = [
                Match(ClipLocation(*train), ClipLocation(*probe), tuple(evidence))
                for train, probe, evidence in matches
            ]
            done[tar[0], tar[1]] = ShardFindings(clips, seconds, Counter(refused), found)
        return done

    def write(self, tar: Tar, findings: ShardFindings) -> None:
        """Append the findings of one tar."""
        matches = [
            [_place(match.train), _place(match.probe), match.evidence] for match in findings.matches
        ]
        line = json.dumps([tar, findings.clips, findings.seconds, findings.refused, matches])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def remove(self) -> None:
        """Delete the journal."""
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
        train, probes: one entry per folder compared, with the keys `root`, `fingerprint`, `clips`,
            `seconds` and `refused`.
        matches: the overlapping pairs.
        seconds_taken: wall-clock time of this run. Tars from the journal of an interrupted audit
            are not included.
        settings: parameters of the fingerprints and the version of the format.
    """

    train: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    matches: list[Match]
    seconds_taken: float
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))

    @property
    def excluded(self) -> dict[ClipLocation, list[Match]]:
        """The matches, grouped by training clip."""
        found: dict[ClipLocation, list[Match]] = defaultdict(list)
        for match in self.matches:
            found[match.train].append(match)
        return found

    def counts(self) -> dict[str, Any]:
        """Return how much was compared and how much overlaps.

        Overlaps are counted in total, by kind of evidence and by probe folder.
        """
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
        """Return a human-readable summary of one paragraph."""
        counts = self.counts()
        text = (
            f"{counts['train_clips']} training clips ({counts['train_hours']:.2f} h) against "
            f"{counts['probe_clips']} probe clips: {counts['train_clips_that_overlap']} overlap"
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
    """Compare training shards with probe shards and write the result to `out`.

    Args:
        train: folders of training shards, or folders of such folders.
        probes: folders of probe shards, likewise.
        out: folder for `audit.json` and `exclude.jsonl`.
        workers: number of processes; by default one per available core.
        progress: whether to show progress bars.

    Raises:
        UserError: there are no shards, no probe clip could be read, `out` cannot be written, or a
            worker process died.
    """
    started, out = time.monotonic(), Path(out)
    workers = workers or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    trained, tested = _indices(train), _indices(probes)
    clips: list[ClipMetadata] = []
    heard: dict[Tar, ShardFindings] = {}
    for tar, (findings, facts) in over_tars(
        _read_probe, _tars(tested), workers, None, "probe shards", progress
    ):
        heard[tar] = findings
        clips += facts
    if not clips:
        raise UserError(
            f"Not one clip of {', '.join(probes)} could be read, so there is nothing to compare "
            "with."
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
    """Return the content of an `audit.json`.

    The result is empty if the file is missing, is damaged or has another version.
    """
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
    """Return the folders that an audit did not compare in their present state.

    Args:
        audit: the content of an `audit.json`.
        side: `train` or `probes`.
        roots: folders to look up.
    """
    known = {folder["fingerprint"] for folder in audit.get(side, ())}
    if not known:
        return list(roots)  # no need to open any index
    return [
        root
        for root in roots
        if not all(known & index.identities() for _, index in open_indices(root))
    ]


def _indices(roots: Sequence[str]) -> list[ShardIndex]:
    return [index for root in dict.fromkeys(roots) for _, index in open_indices(root)]


def _tars(indices: Sequence[ShardIndex]) -> list[Tar]:
    return [(index.root, shard.name) for index in indices for shard in index.shards]


def _read_probe(tar: Tar, _: None) -> tuple[ShardFindings, list[ClipMetadata]]:
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
