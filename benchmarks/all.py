"""Runs the benchmarks of this folder and rewrites their sections of RESULTS.md. A benchmark is a
script that calls `pairs.main`.

`python benchmarks/all.py [--runs N] [NAME …]`: all of them, or those named, whose sections alone
are replaced. A folder of recordings in the variable DATA goes to those that take `--data`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pairs import DEFAULT_RUNS, machine

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
HEAD = """# Measured

By `make bench`. Medians of interleaved runs; a ratio above one means that ours is better.

The other side is what is usually run, which is often slower than what a careful user would run.
Rows that compare with the latter, once measured with the present benchmarks:

- probes: `Adam in memory` and `scikit-learn`, and X-ARES's trainer, which reads tars of embeddings
  in every epoch.
- logmel: `unpadded`. The extractor's cost for short clips is mostly the padding to 30 s.
- encoder: `pad to longest`, with positions cut, which changes frames at clip ends.
- uniwhisper_step: `answers only`, logits at the supervised positions.

Without such a row: `aut_step`, `embed`, `epoch` and `esc10 end to end` pad every clip to 30 s as
Hugging Face's recipe does, so their ratios for short clips are mostly that; `labels to 448` pads
labels that need no padding, and so does the other side of `30 s short labels`; `loss memory` is
against logits of all positions, and logits at the answers alone would need what ours needs. `dense`
and all ratios on AMD processors profit from oneDNN where PyTorch's own choice, MKL, is slow; on
Intel processors it is not.
"""
COLUMNS = ("case", "ours", "theirs", "unit", "ratio", "runs", "against")


def scripts() -> list[Path]:
    return [path for path in sorted(FOLDER.glob("*.py")) if "    main(cases" in path.read_text()]


def measured(script: Path, runs: int, folder: Path) -> list[dict[str, Any]] | None:
    """Return the rows of one benchmark, or None where it failed."""
    out = folder / f"{script.stem}.json"
    data = os.environ.get("DATA")
    extra = ["--data", data] if data and "--data" in script.read_text() else []
    done = subprocess.run(
        [sys.executable, str(script), "--json", str(out), "--runs", str(runs), *extra], check=False
    )
    return json.loads(out.read_text()) if not done.returncode and out.exists() else None


def section(rows: list[dict[str, Any]] | None) -> str:
    """Return one benchmark's rows as a table, with what they were measured on."""
    if rows is None:
        return f"{machine()}: failed\n"
    lines = [
        f"{machine()}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|:---|---:|---:|:---|---:|---:|:---|",
    ]
    for row in rows:
        cells = (
            f"{row[column]:.4g}" if isinstance(row[column], float) else str(row[column])
            for column in COLUMNS
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def merged(before: str, sections: dict[str, str]) -> str:
    """Put sections in the place of those of the same name; the others stay as they were."""
    kept = {
        name: body.strip() + "\n"
        for name, _, body in (part.partition("\n") for part in before.split("\n## ")[1:])
    }
    return HEAD + "".join(
        f"\n## {name}\n{body}" for name, body in sorted({**kept, **sections}.items())
    )


def run() -> int:
    parser = argparse.ArgumentParser(description="Run all benchmarks and rewrite RESULTS.md")
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS)
    parser.add_argument("names", nargs="*", help="only these; the other sections stay")
    options = parser.parse_args()
    chosen = [script for script in scripts() if not options.names or script.stem in options.names]
    with TemporaryDirectory() as folder:
        results = {script.stem: measured(script, options.runs, Path(folder)) for script in chosen}
    before = RESULTS.read_text() if RESULTS.exists() else ""
    RESULTS.write_text(merged(before, {name: section(rows) for name, rows in results.items()}))
    return any(rows is None for rows in results.values())


if __name__ == "__main__":
    sys.exit(run())
