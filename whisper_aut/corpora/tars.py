"""The same work over every tar of many folders: by several processes, in order, and not twice.

In: folders with their tars, and a function of one of them. Out: `(tar, result)` in order, with at most a few under way. Next:
`corpora.audit`, which keeps what a tar gave in a `Journal`, so that work which was stopped goes on.
"""

import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whisper_aut.corpora.ingest import obey_parent
from whisper_aut.corpora.overlap import Match, Place, ShardFindings
from whisper_aut.corpora.tables import read_lines
from whisper_aut.errors import UserError

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
                Match(Place(*train), Place(*probe), tuple(evidence))
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


def _place(place: Place) -> list[str]:
    return [place.folder, place.shard, place.key]
