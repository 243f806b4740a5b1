"""Order → batches: reads from the shards what the order asks for, decodes it, packs it.

In: an `Order` cut into micro-batches by a `Batching`, the shards it ranges over, an `ExampleBuilder`. Out: one `Batch` per micro-batch
of this rank, the same whatever the number of workers. Next: `data.loader` hands it to the Trainer. Rank r of R takes every R-th
micro-batch, worker w of W every W-th of those, and reads only the samples of its own: by the shard's table single samples, without
one by skipping over the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from whisper_aut.corpora.licences import licence_id
from whisper_aut.corpora.remote import DEFAULT_POLICY, ReadPolicy
from whisper_aut.corpora.shards import ShardIndex
from whisper_aut.corpora.template import Template
from whisper_aut.data.batching import Batching, Cursor, batches_from
from whisper_aut.data.example import ExampleBuilder
from whisper_aut.data.order import Order
from whisper_aut.data.pack import Batch, Example, pack
from whisper_aut.data.reader import ShardReader
from whisper_aut.data.sample import Refusal, Sample

NOTHING = np.arange(0)


@dataclass(frozen=True)
class StreamSource:
    """Shards, and the domain and licence of clips that do not state their own."""

    index: ShardIndex
    domain: str
    licence: str = ""
    text: Template | None = None  # over the fields of a sample that holds its text elsewhere

    @property
    def licences(self) -> dict[str, dict[str, float]]:
        """Clips and seconds by SPDX id, or as written where that is unknown."""
        found: dict[str, dict[str, float]] = {}
        for written, counts in self.index.licences.items():
            written = written or self.licence
            total = found.setdefault(licence_id(written) or written, {"clips": 0, "seconds": 0.0})
            total["clips"] += counts["clips"]
            total["seconds"] = round(total["seconds"] + counts["seconds"], 3)
        return found


class BatchStream(IterableDataset[Batch]):
    """The next `count` micro-batches of one rank behind a cursor, in order.

    Args:
        order: what comes when.
        batching: how it is cut into micro-batches.
        sources: the shards, in the order's numbering.
        build: sample → example.
        rank, ranks: which of the micro-batches are taken.
        start: where the row of micro-batches begins, for all ranks.
        end: the position where it ends; what the count still lacks then is empty batches, so that all ranks step alike.
        count: micro-batches of this rank.
        policy: how patiently shards are read.
    """

    def __init__(
        self,
        order: Order,
        batching: Batching,
        sources: Sequence[StreamSource],
        build: ExampleBuilder,
        *,
        rank: int = 0,
        ranks: int = 1,
        start: Cursor = Cursor(),  # noqa: B008 — immutable
        end: int | None = None,
        count: int,
        policy: ReadPolicy = DEFAULT_POLICY,
    ):
        self.order, self.batching, self.sources, self.build = order, batching, tuple(sources), build
        self.rank, self.ranks, self.start, self.end, self.count = rank, ranks, start, end, count
        self.shards = ShardReader(build.limits, policy)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = islice(self._steps(), offset, self.count, workers)
        while steps := list(islice(mine, self.batching.span_batches)):
            yield from self._span(steps)

    def _steps(self) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Yield this rank's positions of every micro-batch, and the cursor behind what all ranks take of the row meanwhile."""
        row = batches_from(self.batching, self.start, self.end)
        behind = self.start
        while True:
            step = list(islice(row, self.ranks))
            behind = step[-1][1] if step else behind
            yield (step[self.rank][0] if self.rank < len(step) else NOTHING), behind

    def _span(self, steps: Sequence[tuple[np.ndarray, Cursor]]) -> Iterator[Batch]:
        """Yield the given micro-batches; every window that they touch is read once."""
        draws = [self._draws(positions) for positions, _ in steps]
        wanted: dict[tuple[int, int], set[int]] = {}
        for source, number in (draw for batch in draws for draw in batch):
            wanted.setdefault((source, self.order.window(source, number)[0]), set()).add(number)
        opened: dict[tuple[int, int], _Window] = {}
        for (positions, behind), batch in zip(steps, draws, strict=True):
            items = []
            for position, (source, number) in zip(positions.tolist(), batch, strict=True):
                key = (source, self.order.window(source, number)[0])
                if key not in opened:
                    opened[key] = _Window(
                        self.order, source, self.sources[source].index, wanted[key], self.shards
                    )
                items.append(self._example(opened[key].take(number), source, position))
                if opened[key].exhausted:
                    del opened[key]
            yield pack(
                [item for item in items if isinstance(item, Example)],
                [item for item in items if isinstance(item, Refusal)],
                self.build.logmel.num_mel_bins,
                behind,
            )

    def _draws(self, positions: np.ndarray) -> list[tuple[int, int]]:
        if not len(positions):
            return []
        start = int(positions[0])
        sources, numbers = self.order.draws(start, int(positions[-1]) + 1)
        return list(
            zip(
                sources[positions - start].tolist(),
                numbers[positions - start].tolist(),
                strict=True,
            )
        )

    def _example(self, item: Sample | Refusal, source: int, position: int) -> Example | Refusal:
        if isinstance(item, Refusal):
            return item
        template = self.sources[source].text
        if template:
            item = replace(item, annotation=item.annotation.told_by(template))
        return self.build(item, self.sources[source].domain, position)


class _Window:
    """The encoded samples of one shuffle window that a worker needs, read in one pass over the shards it spans."""

    def __init__(
        self, order: Order, source: int, index: ShardIndex, numbers: set[int], reader: ShardReader
    ):
        first, last = order.window(source, min(numbers))
        shards, ordinals = order.places(source, first, last)
        places = {
            number: (int(shards[number - first]), int(ordinals[number - first]))
            for number in numbers
        }
        self._items = dict(reader.read(places, index))

    @property
    def exhausted(self) -> bool:
        return not self._items

    def take(self, number: int) -> Sample | Refusal:
        return self._items.pop(number)
