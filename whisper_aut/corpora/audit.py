"""Training shards × probe shards → which clips of the one are in the other.

In: folders of shards to train on and folders that probes test on. Out: `OUT/audit.json` (settings, counts, every match with its evidence)
and `OUT/exclude.jsonl`. Next: `data.exclude` in a config names the list, `corpora.exclusion` leaves its clips out, and the run directory
keeps the audit. The probes' side is held in memory, the training side is read once, tar by tar, by as many processes as there are cores;
finished tars are written down, so an audit that was stopped goes on.
"""

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whisper_aut import __version__
from whisper_aut.corpora import fingerprint as sound
from whisper_aut.corpora.inspect import open_indices
from whisper_aut.corpora.overlap import (
    ClipFacts,
    Match,
    Place,
    ProbeClips,
    ShardFindings,
    indexed_part,
    read_facts,
)
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.corpora.tars import Journal, Tar, over_tars
from whisper_aut.errors import UserError

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
    def excluded(self) -> dict[Place, list[Match]]:
        """The matches by training clip."""
        found: dict[Place, list[Match]] = defaultdict(list)
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
