"""For random shards, windows, worlds and kill points: a resumed run sees what an uninterrupted one
would have, and an epoch is every clip once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.utils.data._utils import worker as torch_worker

from tests.support.audio import encode_audio, tone
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.datamodule import ShardDataModule, TrainLoader
from whisper_aut.data.dataset import BatchStream, ExampleBuilder, StreamSource
from whisper_aut.data.filters import select_samples
from whisper_aut.data.sampler import fill_batches
from whisper_aut.data.shards import HAS_TABLES, open_index
from whisper_aut.data.targets import WhisperText
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.models.pretrained import PretrainedWhisper

TEXT = "a tone of an organ, soft, then louder, and its echo"
SIZES = {
    "many": [1] * 7 + [2],
    "few": [13],
    "mixed": [5, 1, 9, 2],
}  # clips of each shard of a source
ODD_CLIPS = frozenset(
    (f"shard-{number:06d}.tar", f"{name}-{number}-{clip}")
    for name, sizes in SIZES.items()
    for number, size in enumerate(sizes)
    for clip in range(1, size, 2)
)
Batches = list[tuple[str, ...]]


@pytest.fixture(scope="module")
def build(tiny_whisper: Path) -> ExampleBuilder:
    limits = ClipLimits(min_seconds=0.02, max_seconds=0.3)
    return ExampleBuilder(
        LogMel(80), WhisperText(PretrainedWhisper(str(tiny_whisper)).tokenizer), limits
    )


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources whose shards hold very few or many clips, of 30 to 300 ms and 1 to 12 words."""
    root, generator = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for name, sizes in SIZES.items():
        with ShardWriter(root / name) as shards:
            for number, size in enumerate(sizes):
                for clip in range(size):
                    seconds = float(generator.uniform(0.03, 0.3))
                    words = int(generator.integers(1, 12))
                    text = " ".join(TEXT.split()[:words])
                    annotation = Annotation(text=text, domain="sound", duration_seconds=seconds)
                    shards.write(
                        f"{name}-{number}-{clip}", "flac", encode_audio(tone(seconds)), annotation
                    )
                shards.finish_tar()
    return root


worlds = st.fixed_dictionaries(
    {"ranks": st.integers(1, 5), "workers": st.integers(1, 4), "accumulate": st.integers(1, 2)}
)
plans = st.fixed_dictionaries(
    {
        "sources": st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3, unique=True),
        "seed": st.integers(0, 5),
        "window": st.integers(1, 40),
        "batch_clips": st.integers(1, 6),
        "batch_seconds": st.sampled_from([None, 0.3, 0.7, 2.0]),
        "batch_tokens": st.sampled_from([None, None, 30, 60]),
        "epochs": st.sampled_from([None, 1, 2, 3]),
        "partitions": st.sampled_from([1, 1, 2, 3, 4, 8, 40]),
        "tables": st.booleans(),
        "selected": st.booleans(),
    }
)


class World:
    """All ranks of a run, each with its workers, in one process: the loaders are the real ones,
    torch's worker id is set by hand.
    """

    def __init__(
        self, root: Path, build: ExampleBuilder, plan: dict[str, Any], world: dict[str, int]
    ):
        self.ranks, self.workers = world["ranks"], world["workers"]
        indexes = [open_index(root / name) for name in plan["sources"]]
        if not plan["tables"] and plan["batch_seconds"] is None:
            indexes = [
                replace(index, metadata={**index.metadata, HAS_TABLES: False}) for index in indexes
            ]
        if plan["selected"]:
            indexes = [select_samples(index, ODD_CLIPS) for index in indexes]
        sources = [StreamSource(index, "sound") for index in indexes]
        options = {
            name: plan[name]
            for name in ("seed", "window", "partitions", "batch_clips", "batch_seconds", "epochs")
        }
        options["batch_tokens"] = plan["batch_tokens"] if plan["batch_seconds"] else None
        self.module = ShardDataModule(
            sources, [], [1.0] * len(sources), build, accumulate=world["accumulate"], **options
        )
        self.clips = sum(index.samples for index in indexes)
        self.loaders = [self._loader(rank, world) for rank in range(self.ranks)]

    def _loader(self, rank: int, world: dict[str, int]) -> TrainLoader:
        return TrainLoader(
            self.module,
            lambda start, end, count: WorkedStream(
                self.module.train_stream(rank, self.ranks, start, end, count), self.workers
            ),  # pyright: ignore
            self.ranks,
            workers=0,
        )

    def rows(self, epochs: int) -> Iterator[list[tuple[str, ...]]]:
        """Yield per micro-batch what each rank gets; fails where ranks differ in steps."""
        for _ in range(epochs):
            for row in zip(*self.loaders, strict=True):
                yield [batch.keys for batch in row]

    def resume(self, state: dict[str, Any]) -> None:
        for loader in self.loaders:
            loader.load_state_dict(state)


class WorkedStream(torch.utils.data.IterableDataset):
    """A stream as several workers would read it, their batches in turn as DataLoader takes them."""

    def __init__(self, stream: BatchStream, workers: int):
        self.stream, self.workers = stream, workers

    def __iter__(self) -> Iterator[Any]:
        parts = [self._part(number) for number in range(self.workers)]
        number = 0
        while (batch := next(parts[number % self.workers], None)) is not None:
            yield batch
            number += 1

    def _part(self, number: int) -> Iterator[Any]:
        torch_worker._worker_info = torch_worker.WorkerInfo(
            id=number, num_workers=self.workers, seed=0, dataset=self.stream
        )
        batches = iter(self.stream)
        while True:
            torch_worker._worker_info = torch_worker.WorkerInfo(
                id=number, num_workers=self.workers, seed=0, dataset=self.stream
            )
            try:
                batch = next(batches, None)
            finally:
                torch_worker._worker_info = None
            if batch is None:
                return
            yield batch


def flat(rows: Iterator[list[tuple[str, ...]]] | list[list[tuple[str, ...]]]) -> Batches:
    """Interleave the micro-batches of all ranks; leave out the empty ones of an epoch's end."""
    return [batch for row in rows for batch in row if batch]


def check(
    root: Path,
    build: ExampleBuilder,
    plan: dict[str, Any],
    before: dict[str, int],
    after: dict[str, int],
    cut: int,
):
    reference = World(root, build, plan, {"ranks": 1, "workers": 1, "accumulate": 1})
    run = World(root, build, plan, before)
    if plan["epochs"]:
        whole = flat(reference.rows(plan["epochs"]))
        counts = Counter(key for batch in whole for key in batch)
        assert set(counts.values()) == {plan["epochs"]}
        assert len(counts) == reference.clips
        per_epoch = [key for batch in whole for key in batch]
        for start in range(0, len(per_epoch), reference.clips):
            assert len(set(per_epoch[start : start + reference.clips])) == reference.clips
    cut = cut * before["accumulate"]  # checkpoints are written between optimiser steps
    seen = list(islice(run.rows(plan["epochs"] or 10), cut))
    states = [loader.state_dict() for loader in run.loaders]
    assert all(state == states[0] for state in states)
    resumed = World(root, build, plan, after)
    resumed.resume(states[0])
    if plan["epochs"]:
        epoch = states[0]["position"] // run.module.order.epoch_clips
        rest = list(resumed.rows(plan["epochs"] - epoch))
        assert flat(seen) + flat(rest) == whole
    else:
        rest = list(islice(resumed.rows(20), 12))
        both = flat(seen) + flat(rest)
        assert both == flat(islice(reference.rows(1_000), len(both)))[: len(both)]
        assert len(both) == len(seen) * before["ranks"] + len(rest) * after["ranks"]


quick = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
long = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def holds_a_step(
    root: Path, build: ExampleBuilder, plan: dict[str, Any], *chosen: dict[str, int]
) -> bool:
    try:
        for world in chosen:
            World(root, build, plan, world)
    except UserError:
        return False
    return True


@quick
@given(plan=plans, before=worlds, after=worlds, cut=st.integers(0, 12))
def test_a_resumed_run_misses_and_repeats_nothing(
    corpora: Path, build: ExampleBuilder, plan, before, after, cut
):
    assume(holds_a_step(corpora, build, plan, before, after))
    check(corpora, build, plan, before, after, cut)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@long
@given(plan=plans, before=worlds, after=worlds, cut=st.integers(0, 30))
def test_a_resumed_run_misses_and_repeats_nothing_at_length(
    corpora: Path, build: ExampleBuilder, plan, before, after, cut
):
    assume(holds_a_step(corpora, build, plan, before, after))
    check(corpora, build, plan, before, after, cut)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=400), st.integers(30_000, 300_000))
def test_batches_by_seconds_keep_their_budget_and_are_even(lengths: list[int], budget: int):
    row = np.array(lengths)
    bins = fill_batches(row, budget)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(row)))
    totals = [int(row[items].sum()) for items in bins]
    assert max(totals) <= budget
    assert max(totals) - min(totals) <= max(lengths)
    assert len(bins) <= 2 * -(-sum(lengths) // budget)
