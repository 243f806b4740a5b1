"""Find the clips that training shards and probe shards have in common.

An audit writes `OUT/audit.json` (settings, counts, and every match with its evidence) and
`OUT/exclude.jsonl`, the list that `data.exclude` of a config takes. The probe clips are kept in
memory, and the training tars are read once, in parallel. Finished tars are recorded, so an
interrupted audit resumes where it stopped.
"""

import hashlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from whisper_aut import __version__
from whisper_aut.audio.decode import AUDIO_SUFFIXES, ClipLimits, decode
from whisper_aut.corpora import fingerprint as fingerprints
from whisper_aut.corpora.fingerprint import Fingerprint, FingerprintIndex, fingerprint
from whisper_aut.corpora.inspect import open_indices
from whisper_aut.data.annotation import AUDIO_ONLY, Annotation, read_lines
from whisper_aut.data.reader import MemberGroups, audio_and_annotation, open_stream
from whisper_aut.data.shards import ShardIndex
from whisper_aut.errors import SkipReason, SkipSample, UserError
from whisper_aut.utils import (
    available_cores,
    parallel_map,
    parse_json,
    progress_bar,
    read_json,
    write_json,
    write_text,
)

AUDIT_NAME, EXCLUDE_NAME, JOURNAL_NAME = "audit.json", "exclude.jsonl", ".audit.jsonl"
AUDIT_VERSION = 2
SETTINGS = {
    "version": AUDIT_VERSION,
    "rate_hz": fingerprints.RATE_HZ,
    "window_samples": fingerprints.WINDOW_SAMPLES,
    "hop_samples": fingerprints.HOP_SAMPLES,
    "bands_hz": [fingerprints.LOWEST_HZ, fingerprints.HIGHEST_HZ],
    "bits": fingerprints.BITS,
    "words_and_tolerated_bit_error": fingerprints.TOLERATED,
}
# Wider than the limits of training: probe sets contain clips that training would skip.
LIMITS = ClipLimits(min_seconds=0.0, max_seconds=3600.0)
HASH_BYTES = 12
MATCHES_PER_CLIP = 20  # all slices of a recording may share a name

ID_FIELDS = {
    "freesound": ("freesound_id", "fsid", "fsID", "fs_id"),
    "youtube": ("youtube_id", "ytid"),
}
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
    source = annotation.source
    for written in {key, annotation.id} - {""}:
        name = _SUFFIX.sub("", written.rpartition("/")[2])
        plain = _plain(name)
        if source:
            names.add(f"{_plain(source)}:{plain}")
        if len(name) >= MIN_NAME_CHARACTERS and not GENERIC_NAME.fullmatch(plain):
            names.add(f"file:{plain}")
        scheme = URBANSOUND_NAME if "urbansound" in source.lower() else ESC_NAME
        if found := ESC_NAME.fullmatch(name) or scheme.fullmatch(name):
            names.add(f"freesound:{found[1]}")
        elif FREESOUND_SOURCES.search(source) and name.isdecimal():
            names.add(f"freesound:{name}")
        elif YOUTUBE_SOURCES.search(source) and (found := YOUTUBE_NAME.fullmatch(name)):
            names.add(f"youtube:{found[1]}")
    for site, fields in ID_FIELDS.items():
        values = [annotation.extra.get(name) for name in fields]
        names |= {f"{site}:{value}" for value in values if value not in (None, "")}
    return frozenset(names)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@dataclass(frozen=True)
class ClipMetadata:
    """What the audit compares of a clip, and the folder, tar and key where the clip is."""

    location: dict[str, str]
    seconds: float
    names: frozenset[str]  # see `names_of`
    file_hash: bytes  # of the encoded file
    sample_hash: bytes  # of the decoded samples and their rate
    fingerprint: Fingerprint


Tar = tuple[str, ...]  # folder of its index, name, path or URL
# The locations `train` and `probe` of two clips that overlap, and `evidence`, the reasons.
Match = dict[str, Any]
Folder = dict[str, Any]  # `root`, `fingerprint`, `clips`, `seconds` and `skipped`


@dataclass
class ShardResult:
    """The result for one tar."""

    clips: int = 0  # number of clips compared
    seconds: float = 0.0  # their total duration
    skipped: Counter[str] = field(default_factory=Counter)  # unreadable clips by reason
    matches: list[Match] = field(default_factory=list)


def read_clip_metadata(tar: Tar, result: ShardResult) -> Iterator[ClipMetadata]:
    """Yield the metadata of every clip in a tar that decodes; count all clips in `result`."""
    folder, shard, url = tar
    with open_stream(url) as stream:
        groups = MemberGroups(stream, LIMITS)
        for _, group in groups:
            key = group["__key__"]
            try:
                _, audio, annotation = audio_and_annotation(group, AUDIO_ONLY)
                clip = decode(audio, LIMITS)
            except SkipSample as skip:
                result.skipped[skip.reason] += 1
                continue
            samples = hashlib.blake2b(clip.samples.tobytes(), digest_size=HASH_BYTES)
            samples.update(str(clip.sample_rate_hz).encode())
            result.clips += 1
            result.seconds += clip.seconds
            yield ClipMetadata(
                location={"folder": folder, "shard": shard, "key": key},
                seconds=clip.seconds,
                names=names_of(key, annotation),
                file_hash=hashlib.blake2b(audio, digest_size=HASH_BYTES).digest(),
                sample_hash=samples.digest(),
                fingerprint=fingerprint(clip.samples, clip.sample_rate_hz),
            )
        if groups.damage:
            result.skipped[SkipReason.BAD_TAR] += 1


class ProbeClips:
    """A searchable index of the clips that must not be in the training data."""

    def __init__(self, clips: Sequence[ClipMetadata]):
        self._locations = [clip.location for clip in clips]
        self._known: dict[bytes | str, list[int]] = defaultdict(list)  # by hash and by name
        for number, clip in enumerate(clips):
            for value in (clip.file_hash, clip.sample_hash, *clip.names):
                self._known[value].append(number)
        self._fingerprints = FingerprintIndex(clip.fingerprint for clip in clips)

    def find_matches(self, clip: ClipMetadata) -> list[Match]:
        """Return the probe clips that `clip` overlaps, those with the strongest evidence first.

        At most `MATCHES_PER_CLIP` are returned.
        """
        evidence: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for kind, value in (("bytes", clip.file_hash), ("samples", clip.sample_hash)):
            for number in self._known.get(value, ()):
                evidence[number].append({"kind": kind})
        for segment in self._fingerprints.search(clip.fingerprint):
            evidence[segment.clip].append(
                {
                    "kind": "sound",
                    "bit_error": segment.bit_error,
                    "words": segment.words,
                    "seconds": segment.seconds,
                    "train_at_seconds": segment.start_seconds,
                    "probe_at_seconds": segment.indexed_start_seconds,
                }
            )
        for name in sorted(clip.names):
            for number in self._known.get(name, ()):
                evidence[number].append({"kind": "name", "name": name})
        return [
            {"train": clip.location, "probe": self._locations[number], "evidence": reasons}
            for number, reasons in list(evidence.items())[:MATCHES_PER_CLIP]
        ]


def _read_probe(tar: Tar) -> tuple[ShardResult, list[ClipMetadata]]:
    result, clips = ShardResult(), []
    for clip in read_clip_metadata(tar, result):
        # Only a searched clip needs the uncertain bits: do not send them between processes.
        smaller = replace(clip.fingerprint, uncertain=np.zeros((0, 0), np.uint32))
        clips.append(replace(clip, fingerprint=smaller))
    return result, clips


def _read_train(tar: Tar, probes: ProbeClips) -> ShardResult:
    result = ShardResult()
    for clip in read_clip_metadata(tar, result):
        result.matches += probes.find_matches(clip)
    return result


class Journal:
    """The results of an unfinished audit, one line per tar.

    The first line is a key made of the settings, the release and the folders' fingerprints. A
    journal with another key is discarded.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> dict[Tar, ShardResult]:
        """Return the results of all recorded tars, or start a new journal if the key differs."""
        lines = read_lines(self.path) if self.path.exists() else []
        if lines[:1] != [self.key]:
            self.path.write_text(self.key + "\n", encoding="utf-8")
            return {}
        done: dict[Tar, ShardResult] = {}
        for line in lines[1:]:
            try:
                tar, result = parse_json(line)
            except ValueError:  # a line truncated by the interruption
                continue
            result["skipped"] = Counter(result["skipped"])
            done[tuple(tar)] = ShardResult(**result)
        return done

    def add(self, tar: Tar, result: ShardResult) -> None:
        """Append the result of one tar."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([tar, vars(result)]) + "\n")


def run_audit(
    train: Sequence[str],
    probes: Sequence[str],
    out: str | Path,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare training shards with probe shards and write the result to `out`.

    Args:
        train: folders of training shards, or folders of such folders.
        probes: folders of probe shards, likewise.
        out: folder for `audit.json` and `exclude.jsonl`.
        workers: number of processes; by default one per available core.
        progress: whether to show progress bars.

    Returns:
        The content of `audit.json`: the settings, the folders compared (`train`, `probes`), the
        `matches`, their `counts`, and `seconds_taken` by this run, without the tars that an
        interrupted run had read.

    Raises:
        UserError: there are no shards, no probe clip could be read, `out` cannot be written, or a
            worker process died.
    """
    started, out = time.monotonic(), Path(out)
    workers = workers or available_cores()
    on_crash = "Run again with --workers 1: finished tars are not read again."
    train_indices, probe_indices = _open_all(train), _open_all(probes)
    clips: list[ClipMetadata] = []
    tested: dict[Tar, ShardResult] = {}
    with progress_bar(progress) as bar:
        tars = _tars(probe_indices)
        results = parallel_map(_read_probe, tars, min(workers, len(tars)), on_crash=on_crash)
        results = bar.track(results, total=len(tars), description="probe shards")
        for tar, (result, found) in zip(tars, results, strict=True):
            tested[tar] = result
            clips += found
        if not clips:
            raise UserError(f"No clip of {', '.join(probes)} could be read.")
        search = partial(_read_train, probes=ProbeClips(clips))
        clips.clear()
        try:
            out.mkdir(parents=True, exist_ok=True)
            journal = Journal(out / JOURNAL_NAME, _journal_key(train_indices, probe_indices))
            done = journal.read()
            tars = [tar for tar in _tars(train_indices) if tar not in done]
            results = parallel_map(search, tars, min(workers, len(tars)), on_crash=on_crash)
            with closing(results):  # if the journal cannot be written, the workers stop
                tracked = bar.track(results, total=len(tars), description="training shards")
                for tar, result in zip(tars, tracked, strict=True):
                    done[tar] = result
                    journal.add(tar, result)
            folders = _folders(train_indices, done), _folders(probe_indices, tested)
            matches = [match for tar in _tars(train_indices) for match in done[tar].matches]
            audit = {
                "release": __version__,
                "settings": SETTINGS,
                "counts": _count(*folders, matches),
                "train": folders[0],
                "probes": folders[1],
                "matches": matches,
                "seconds_taken": round(time.monotonic() - started, 1),
            }
            write_text(out / EXCLUDE_NAME, "".join(_exclusions(folders[0], matches)))
            write_json(out / AUDIT_NAME, audit)
            journal.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot read the shards, or write to {out}: {error.strerror or error}."
            ) from None
    return audit


def summarize(audit: dict[str, Any]) -> str:
    """Return a human-readable summary of an `audit.json`, one paragraph."""
    counts = audit["counts"]
    text = (
        f"{counts['train_clips']} training clips ({counts['train_hours']:.2f} h) against "
        f"{counts['probe_clips']} probe clips: {counts['train_clips_that_overlap']} overlap"
    )
    if counts["pairs"]:
        kinds = counts["pairs_by_evidence"].items()
        listed = ", ".join(f"{count} by {kind}" for kind, count in kinds)
        text += f" with {counts['probe_clips_in_training']} probe clips (pairs: {listed})"
    folders = (*audit["train"], *audit["probes"])
    if unread := sum(sum(folder["skipped"].values()) for folder in folders):
        text += f". {unread} clips could not be read and were not compared"
    return f"{text}."


def read_audit(path: Path) -> dict[str, Any]:
    """Return the content of an `audit.json`; empty if missing, damaged or of another version."""
    audit = read_json(path, default={})
    return audit if audit.get("settings", {}).get("version") == AUDIT_VERSION else {}


def unaudited(audit: dict[str, Any], side: str, roots: Sequence[str]) -> list[str]:
    """Return the folders that an audit did not compare in their present state.

    `audit` is the content of an `audit.json`, and `side` is `train` or `probes`.
    """
    known = {folder["fingerprint"] for folder in audit.get(side, ())}
    if not known:
        return list(roots)  # no need to open any index
    return [
        root
        for root in roots
        if not all(known & index.identities() for _, index in open_indices(root))
    ]


def _count(
    train: Sequence[Folder], probes: Sequence[Folder], matches: Sequence[Match]
) -> dict[str, Any]:
    """Return how much was compared and how much overlaps."""
    by_kind = Counter(kind for match in matches for kind in sorted(_kinds([match])))
    found = {tuple(match["probe"].values()) for match in matches}
    by_folder = Counter(folder for folder, *_ in found)
    return {
        "train_clips": sum(folder["clips"] for folder in train),
        "train_hours": round(sum(folder["seconds"] for folder in train) / 3600, 3),
        "probe_clips": sum(folder["clips"] for folder in probes),
        "train_clips_that_overlap": len(_by_train_clip(matches)),
        "probe_clips_in_training": len(found),
        "probe_clips_in_training_by_folder": {
            folder["root"]: by_folder[folder["root"]] for folder in probes
        },
        "pairs": len(matches),
        "pairs_by_evidence": dict(by_kind),
    }


def _exclusions(train: Sequence[Folder], matches: Sequence[Match]) -> Iterator[str]:
    """Yield the lines of `exclude.jsonl`, one for each training clip that overlaps."""
    fingerprints = {folder["root"]: folder["fingerprint"] for folder in train}
    for own in _by_train_clip(matches).values():
        location = own[0]["train"]
        line = {
            "fingerprint": fingerprints[location["folder"]],
            **location,
            "probe": own[0]["probe"]["key"],
            "evidence": sorted(_kinds(own)),
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _by_train_clip(matches: Sequence[Match]) -> dict[tuple[str, ...], list[Match]]:
    found: dict[tuple[str, ...], list[Match]] = defaultdict(list)
    for match in matches:
        found[tuple(match["train"].values())].append(match)
    return found


def _kinds(matches: Sequence[Match]) -> set[str]:
    return {reason["kind"] for match in matches for reason in match["evidence"]}


def _open_all(roots: Sequence[str]) -> list[ShardIndex]:
    return [index for root in dict.fromkeys(roots) for _, index in open_indices(root)]


def _tars(indices: Sequence[ShardIndex]) -> list[Tar]:
    return [
        (index.root, shard.name, index.url(number))
        for index in indices
        for number, shard in enumerate(index.shards)
    ]


def _journal_key(*sides: Sequence[ShardIndex]) -> str:
    identity = [[(index.root, index.fingerprint()) for index in indices] for indices in sides]
    return hashlib.sha256(json.dumps([identity, SETTINGS, __version__]).encode()).hexdigest()


def _folders(indices: Sequence[ShardIndex], results: Mapping[Tar, ShardResult]) -> list[Folder]:
    folders = []
    for index in indices:
        parts = [results[tar] for tar in _tars([index])]
        folders.append(
            {
                "root": index.root,
                "fingerprint": index.fingerprint(),
                "clips": sum(part.clips for part in parts),
                "seconds": round(sum(part.seconds for part in parts), 3),
                "skipped": dict(sum((part.skipped for part in parts), Counter())),
            }
        )
    return folders
