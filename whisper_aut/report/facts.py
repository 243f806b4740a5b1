"""What a run recorded about itself → tables: where and how it ran, what it trained on, what was refused.

In: `environment.json` and `done.json` of a run directory. Out: `Sheet`s, or None where nothing was recorded. Next: `report.build`.
"""

import json
from pathlib import Path
from typing import Any

from whisper_aut.report.tables import Sheet

FIGURES = {
    "throughput/audio_seconds_per_second": ("audio-seconds a second", 1, 1),
    "throughput/clips_per_second": ("clips a second", 1, 1),
    "throughput/tokens_per_second": ("tokens a second", 1, 0),
    "throughput/data_wait_share": ("waiting for data, % of the time", 100, 1),
    "throughput/padding_share": ("padding, % of the frames", 100, 1),
    "throughput/teraflops": ("model TFLOP/s", 1, 3),
    "throughput/mfu": ("MFU, %", 100, 1),
    "throughput/peak_memory_gib": ("peak memory, GiB", 1, 2),
}


def run_sheet(run: Path) -> Sheet | None:
    """Lay out machine, versions and the run's own figures."""
    facts, done = _read(run / "environment.json"), _read(run / "done.json")
    if not facts:
        return None
    metrics = done.get("metrics", {})
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items())
    rows = [
        ("command", " ".join(facts.get("command", []))),
        ("revision", facts.get("git", "")),
        ("machine", f"{facts.get('machine', '')}, {facts.get('cpus', '?')} cores"),
        ("GPUs", ", ".join(facts.get("gpus", [])) or "none"),
        ("packages", f"Python {facts.get('python', '')}, {packages}"),
        ("start", _place(facts.get("start", {}))),
        (
            "decoder",
            ", ".join(
                f"{name} {value}" for name, value in facts.get("decoder", {}).items() if value
            ),
        ),
        ("steps", str(done.get("steps", f"stopped before {facts.get('steps', '?')}"))),
    ]
    rows += [
        (title, f"{scale * metrics[name]:,.{digits}f}")
        for name, (title, scale, digits) in FIGURES.items()
        if name in metrics
    ]
    return Sheet("Where and how it ran", "", ("", ""), tuple(row for row in rows if row[1]), 2)


def data_sheet(run: Path) -> Sheet | None:
    """Lay out the sources that were trained on: what they hold, how often each was gone through, and its share of what was heard."""
    sources, epochs = (
        _read(run / "environment.json").get("data", []),
        _read(run / "done.json").get("sources", {}),
    )
    if not sources:
        return None
    heard = [epochs.get(source.get("root"), 0) * source.get("clips", 0) for source in sources]
    rows = tuple(
        (
            source.get("root", ""), source.get("domain", ""), _licences(source), f"{source.get('clips', 0):,}",
            f"{source.get('seconds', 0) / 3600:,.2f}", _share(source.get("share", 0), [s.get("share", 0) for s in sources]),
            _share(clips, heard), f"{epochs[source['root']]:.2f}" if source.get("root") in epochs else "–",
        )
        for source, clips in zip(sources, heard, strict=True)
    )  # fmt: skip
    head = (
        "source",
        "domain",
        "licences",
        "clips",
        "hours",
        "share asked (%)",
        "share heard (%)",
        "epochs",
    )
    return Sheet(
        "What it was trained on",
        "Shares are by clips, of the mixture that was asked for and of what was drawn.",
        head,
        rows,
        3,
    )


def _licences(source: dict[str, Any]) -> str:
    return (
        ", ".join(source.get("licences") or ([source["licence"]] if source.get("licence") else []))
        or "–"
    )


def _share(part: float, parts: list[float]) -> str:
    return f"{100 * part / sum(parts):.1f}" if sum(parts) else "–"


def refusal_sheet(run: Path) -> Sheet | None:
    """Lay out refused samples by source and reason."""
    refused = _read(run / "done.json").get("refused", {})
    rows = tuple(
        (source, reason, f"{count:,}")
        for source, reasons in refused.items()
        for reason, count in reasons.items()
    )
    if not rows:
        return None
    return Sheet(
        "Refused samples",
        "`ledger.jsonl` lists each; `ledger-rankN.jsonl` of other ranks.",
        ("source", "reason", "samples"),
        rows,
        2,
    )


def _place(start: dict[str, Any]) -> str:
    return " at ".join(str(start[name]) for name in ("path", "revision") if start.get(name))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
