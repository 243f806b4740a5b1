"""What `whisper-aut plan` says of a step, against the step itself on this CPU: time and memory.

Each round first measures what the machine does in a second, by a product, an addition and a tiny
addition that are no part of the step; the plan turns that into a prediction of the step, which is
timed next, both in seconds of one core. Memory is how far the process's resident size rises in a
step above model and optimiser state. `ours` is planned, `theirs` is measured; a ratio of 1 means
that the plan is right. It should lie within 0.7 to 1.3 for time, and within 0.85 to 1.15 for
memory.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from memory import apart, peak_rise_megabytes
from pairs import Row, main
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.config import OptimSettings
from whisper_aut.models.decoders.causal_lm import CausalLMOptions, build_causal_lm_meta
from whisper_aut.models.decoders.whisper import WhisperDecoderOptions, build_whisper_decoder_meta
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.pretrained import load_whisper_config
from whisper_aut.models.tiny import LanguageScratch
from whisper_aut.onednn import product
from whisper_aut.training.optim import parameter_groups
from whisper_aut.training.plan import (
    UPDATE_BYTES,
    StepCost,
    StepShape,
    placeholder_targets,
    step_cost,
)

SIDE, NUMBERS = 1024, 1 << 24  # of the product and of the addition, which no cache holds
GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """A step: the checkpoint's name, seconds of its clips and tokens of their texts."""

    name: str
    checkpoint: str
    clip_seconds: tuple[float, ...]
    tokens: int
    checkpointing: bool = False
    language_model: bool = False

    @property
    def shape(self) -> StepShape:
        return StepShape(
            mel_lengths=tuple(round(100 * seconds) for seconds in self.clip_seconds),
            text_lengths=(self.tokens,) * len(self.clip_seconds),
            gradient_checkpointing=self.checkpointing,
        )

    def decoder(self, config: Any, checkpointing: bool) -> nn.Module:
        if not self.language_model:
            return build_whisper_decoder_meta(config, WhisperDecoderOptions(), checkpointing)
        sizes = LanguageScratch(texts=[], out="", width=512, layers=8, heads=8, vocabulary=50_000)
        return build_causal_lm_meta(config, CausalLMOptions(scratch=sizes), checkpointing)

    def planned(self) -> StepCost:
        return step_cost(load_whisper_config(self.checkpoint), self.decoder, self.shape)


CASES = (
    Case("AuT, tiny, 8 x 5 s", "openai/whisper-tiny", (5.0,) * 8, 32),
    Case("AuT, tiny, 2-14 s", "openai/whisper-tiny", (2.0, 3.5, 8.0, 14.0), 32),
    Case("AuT, tiny, 8 x 5 s, checkpointing", "openai/whisper-tiny", (5.0,) * 8, 32, True),
    Case("AuT, base, 8 x 5 s", "openai/whisper-base", (5.0,) * 8, 32),
    Case("UniWhisper, tiny, 8 x 5 s", "openai/whisper-tiny", (5.0,) * 8, 60, False, True),
)


class Step:
    """A real optimiser step of a case, with random weights."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        config, shape = load_whisper_config(case.checkpoint), case.shape
        encoder = PackedEncoder(WhisperEncoder(config), "none", case.checkpointing)
        decoder: Any = case.decoder(config, case.checkpointing)
        self.encoder, self.decoder = encoder.train(), decoder.train()
        self.mel_lengths = shape.mel_lengths
        self.mel = torch.randn(sum(map(frames_with_context, shape.mel_lengths)), 80)
        self.targets = placeholder_targets(shape.text_lengths)
        groups = parameter_groups(encoder, decoder, OptimSettings())
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)

    def run(self) -> None:
        frames = self.encoder(self.mel, self.mel_lengths)
        self.decoder.loss(frames.values, frames.lengths, self.targets).total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def cases(runs: int) -> Iterator[Row]:
    torch.set_num_threads(1)
    # Every tensor is mapped by itself, or the holes in malloc's heap would count as the step's.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for case in CASES:
        cost, step = case.planned(), Step(case)
        step.run()
        rounds = [(predicted_seconds(cost), seconds(step.run)) for _ in range(runs)]
        yield row(case.name, "s", rounds, "seconds of a step")
        planned = cost.peak_bytes / 2**20
        measured = [apart(step_megabytes, case) for _ in range(min(runs, 2))]  # it hardly varies
        yield row(case.name, "MiB", [(planned, one) for one in measured], "memory of a step")


def row(name: str, unit: str, rounds: list[tuple[float, float]], against: str) -> Row:
    """Return the median of the rounds' ratios: planned and measured of a round belong together."""
    planned, measured = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratio = statistics.median(theirs / ours for ours, theirs in rounds)
    return Row(f"{name}: {unit}", planned, measured, unit, ratio, len(rounds), against)


def predicted_seconds(cost: StepCost) -> float:
    """Return what the plan says of a step on the machine as it is just now."""
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    numbers, one = torch.randn(NUMBERS), torch.randn(1)
    flops = 2 * SIDE**3 / seconds(lambda: product(left, right), 5)
    moved = 3 * numbers.nbytes / seconds(lambda: numbers + numbers, 5)
    launch = seconds(lambda: one + one, 1_000)
    update = cost.trainable * UPDATE_BYTES / moved
    return cost.seconds(flops, moved) + cost.launches * launch + update


def seconds(action: Callable[[], object], times: int = 1) -> float:
    start = time.process_time()  # whatever else runs on this machine
    for _ in range(times):
        action()
    return (time.process_time() - start) / times


def step_megabytes(case: Case) -> float:
    """Return how far the resident size rises in a step, once the optimiser has its state."""
    torch.set_num_threads(1)
    step = Step(case)
    step.run()
    return peak_rise_megabytes(step.run)


if __name__ == "__main__":
    main(cases, "The plan of a step against the step")
