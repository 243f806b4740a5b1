"""A rank whose batch is empty: weights are those of one process on the same clips."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.testing import assert_close

from tests.support.ranks import on_ranks
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import LogMel
from whisper_aut.config import StrategySettings
from whisper_aut.data.batch import Batch, Example, collate
from whisper_aut.data.dataset import ExampleBuilder
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.checkpoint import read_weights
from whisper_aut.training.strategies import build_strategy

STEPS, RANKS, BATCH_CLIPS = 4, 2, 2
PARTS = ("encoder.", "decoder.adapter.", "decoder.whisper.")  # what is trained
ZERO = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


@dataclass(frozen=True)
class Case:
    """One short training in which the second rank gets no clips in one step.

    Attributes:
        empty_step: of the accumulated micro-batches of this step, the rank gets the first at most.
        language_model: train through this causal language model; empty for Whisper's decoder.
    """

    strategy: str = "deepspeed_stage_2"
    accumulate: int = 1
    empty_step: int = 1
    encoder_after_step: int = 0
    freeze_encoder: bool = False
    gradient_checkpointing: bool = False
    language_model: str = ""

    def has_clips(self, rank: int, step: int, micro: int) -> bool:
        full = rank == 0 or step != self.empty_step
        return full or (self.accumulate > 1 and micro == 0)


class Loader:
    """Gives its batches once; no DataLoader, of which DeepSpeed would ask the batch size."""

    def __init__(self, batches: list[Batch]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Saver(lightning.Callback):
    def __init__(self, path: Path):
        self.path = path

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def parts(case: Case, whisper: str) -> tuple[AudioTextModule, Any]:
    torch.manual_seed(0)  # an adapter starts at random
    start = PretrainedWhisper(whisper)
    options: dict[str, Any] = {"name": "whisper"}
    if case.language_model:
        instructions = {"caption": {"prompts": ["Describe it.", "What is it?"]}}
        options = {"name": "causal_lm", "language_model": case.language_model}
        options["instructions"] = instructions
    entry, options_of = check_decoder(options)
    decoder, codec = entry.build(start, options_of, case.gradient_checkpointing)
    encoder = PackedEncoder(
        start.encoder, gradient_checkpointing=case.gradient_checkpointing
    ).requires_grad_(not case.freeze_encoder)

    def optimizer(encoder: Any, decoder: Any) -> torch.optim.Optimizer:
        trained = [p for part in (encoder, decoder) for p in part.parameters() if p.requires_grad]
        # A large epsilon: updates are as accurate as gradients are, however small.
        return torch.optim.AdamW(trained, lr=1e-2, eps=0.1)

    module = AudioTextModule(
        encoder, decoder, codec, optimizer, encoder_after_step=case.encoder_after_step
    )
    return module.train(), codec


def examples(codec: Any, shards: Path) -> list[Example]:
    build = ExampleBuilder(LogMel(80), codec, ClipLimits())
    index = open_index(str(shards / "speech"))
    items = [item for item in iter_samples(index, ClipLimits()) if isinstance(item, Sample)]
    made = [build(item, "speech", position) for position, item in enumerate(items)]
    return [example for example in made if isinstance(example, Example)]


def batches(case: Case, clips: list[Example], ranks: int) -> list[list[list[Batch]]]:
    """Return the micro-batches of each rank and step; one rank gets all clips of a step at once."""
    given: list[list[list[Batch]]] = [[] for _ in range(ranks)]
    following = 0
    for step in range(STEPS):
        packed: list[list[list[Example]]] = [[] for _ in range(RANKS)]
        for micro, rank in product(range(case.accumulate), range(RANKS)):
            taken = BATCH_CLIPS if case.has_clips(rank, step, micro) else 0
            places = range(following, following + taken)
            packed[rank].append([clips[place % len(clips)] for place in places])
            following += taken
        if ranks == 1:
            packed = [[[clip for rank in packed for micro in rank for clip in micro]]]
        for rank, micros in enumerate(packed):
            made = [collate(micro, [], 80) for micro in micros]
            tokens = sum(sum(batch.targets.counts) for batch in made)
            given[rank].append([replace(batch, step_weight=tokens) for batch in made])
    return given


def train_case(case: Case, whisper: str, shards: Path, path: Path, ranks: int) -> None:
    module, codec = parts(case, whisper)
    rank = int(os.environ["RANK"]) if ranks > 1 else 0
    own = [b for step in batches(case, examples(codec, shards), ranks)[rank] for b in step]
    name = case.strategy if ranks > 1 else "auto"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=build_strategy(
            StrategySettings(name=name, timeout_minutes=2.0),  # pyright: ignore[reportArgumentType]
            ranks=ranks,
            accelerator="cpu",
        ),
        accumulate_grad_batches=case.accumulate if ranks > 1 else 1,
        max_steps=STEPS,
        callbacks=[Saver(path)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Loader(own))  # pyright: ignore[reportArgumentType]


def train_cases(cases: list[Case], whisper: str, shards: Path, folder: Path) -> str:
    for number, case in enumerate(cases):
        train_case(case, whisper, shards, folder / f"{number}.ckpt", RANKS)
    return "done"


def assert_as_one_process(cases: list[Case], whisper: Path, shards: Path, folder: Path) -> None:
    ends = on_ranks(train_cases, cases, str(whisper), shards, folder)
    assert ends == ["done"] * RANKS, "\n".join(ends)
    started = {}
    for number, case in enumerate(cases):
        alone = replace(case, strategy="ddp")
        if alone not in started:
            started[alone] = folder / f"one-{number}.ckpt"
            train_case(case, str(whisper), shards, started[alone], ranks=1)
        weights, expected = (
            {name: value for name, value in read_weights(path).items() if name.startswith(PARTS)}
            for path in (folder / f"{number}.ckpt", started[alone])
        )
        message = ("{}\n" + str(case)).format
        assert_close(weights, expected, atol=1e-5, rtol=0, msg=message)


def test_a_rank_without_clips_trains_what_one_process_does(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    cases = [Case("deepspeed_stage_2", empty_step=0), Case("ddp", accumulate=3)]
    assert_as_one_process(cases, tiny_whisper, tiny_shards, tmp_path)


@pytest.mark.slow
def test_every_strategy_trains_the_same_wherever_a_rank_has_no_clips(
    tiny_whisper: Path, tiny_shards: Path, tiny_language_model: Path, tmp_path: Path
):
    cases = [
        Case(strategy, accumulate, empty_step)
        for strategy in ("ddp", *ZERO)
        for accumulate in (1, 3)
        for empty_step in (0, 1, STEPS - 1)
    ]
    for strategy in ("ddp", *ZERO):
        cases += [
            Case(strategy, encoder_after_step=2, accumulate=3, empty_step=0),
            Case(strategy, encoder_after_step=2, empty_step=2),
            Case(strategy, freeze_encoder=True, empty_step=0),
            Case(strategy, gradient_checkpointing=True, empty_step=0),
            Case(strategy, language_model=str(tiny_language_model), empty_step=0),
        ]
    assert_as_one_process(cases, tiny_whisper, tiny_shards, tmp_path)
