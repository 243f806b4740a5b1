"""Two sides of a claim, measured in turn on equal work: what every benchmark here is made of.

In: two callables a case, and a check that their outputs are equal. Out: rows `{"case", "ours",
"theirs", "unit", "ratio", "runs", "against"}`, medians over interleaved runs, printed as a table
and written as JSON with `--json FILE`. A ratio above one means that ours is better. Interleaving
lets a slow spell of the machine hit both sides alike.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DEFAULT_RUNS = 5


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        ours, theirs: medians, in `unit`.
        ratio: how many times better ours is.
        runs: interleaved runs behind the medians.
        against: what the other side is.
    """

    case: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    runs: int
    against: str


def compare(
    case: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    against: str,
    check: Callable[[Any, Any], None] | None = None,
    runs: int = DEFAULT_RUNS,
    steps: bool = False,
) -> Row:
    """Time both sides in turn; lower is better.

    Args:
        steps: a side is one of many steps that follow each other, so that each turn begins with
            one that is not timed.
        check: given both outputs once, before anything is timed; raises where they differ. That
            call also warms both sides up.
    """
    outputs = ours(), theirs()
    if check:
        check(*outputs)
    turns = (lambda side=side: _seconds(side, warm_up=steps) for side in (ours, theirs))
    return compare_values(case, *turns, unit="s", against=against, runs=runs)


def compare_values(
    case: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    *,
    unit: str,
    against: str,
    runs: int = DEFAULT_RUNS,
) -> Row:
    """Compare numbers that both sides measure themselves (seconds, megabytes); lower is better."""
    (row,) = compare_all({case: ours}, theirs, unit=unit, against={case: against}, runs=runs)
    return row


def compare_all(
    ours: Mapping[str, Callable[[], float]],
    theirs: Callable[[], float],
    *,
    unit: str,
    against: Mapping[str, str],
    runs: int,
) -> list[Row]:
    """Compare several cases with one other side, which is measured once a round."""
    rounds = [({case: side() for case, side in ours.items()}, theirs()) for _ in range(runs)]
    other = statistics.median(their for _, their in rounds)
    medians = {case: statistics.median(mine[case] for mine, _ in rounds) for case in ours}
    return [
        Row(case, mine, other, unit, other / mine, runs, against[case])
        for case, mine in medians.items()
    ]


def main(cases: Callable[[int], Iterable[Row]], description: str) -> None:
    """Run the cases of one benchmark, print each as it comes, write them with `--json`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--runs", type=int, default=DEFAULT_RUNS, help="interleaved runs per case")
    options = parser.parse_args()
    print(f"{description}\n{machine()}, {torch.get_num_threads()} threads at the start")
    rows = list(_printed(cases(options.runs)))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def machine() -> str:
    """Say on what and with what a figure was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "lightning")
    )
    return f"{date.today()}, {device}, {os.cpu_count()} cores, {versions}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _printed(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        print(
            f"{row.case:<40} ours {row.ours:10.4g} {row.unit:<4} "
            f"theirs {row.theirs:10.4g} {row.unit:<4} ratio {row.ratio:6.2f}x"
        )
        yield row


def _seconds(side: Callable[[], Any], warm_up: bool) -> float:
    if warm_up:
        side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    side()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
