"""The rules by which scores are made: ours, and those of two peers, flaws included, for figures that can be set beside theirs.

In: a task's embeddings. Out: `SeedRun`s. Next: `probes.suite`, which names the protocol in every result.

- `strict`: official splits and folds, pooling over the frames that hold the clip, settings chosen on validation clips only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.kinds import KINDS, kind_for, probe_rounds
from whisper_aut.probes.rounds import TRAIN_SHARE, Round, fold_rounds, split_round
from whisper_aut.probes.selection import SeedRun
from whisper_aut.probes.tasks import ProbeTask


@dataclass(frozen=True)
class Protocol:
    """The strict rules, which others vary."""

    name: str = "strict"
    description: str = "official splits, pooling over valid frames, settings chosen on validation only, test read once a seed"

    def embedding(self, settings: EmbedSettings) -> EmbedSettings:
        """Return how clips are embedded, given what the run asked for."""
        return settings

    def kind_of(self, task: ProbeTask, kind: str) -> str:
        """Return the kind of probe for a task, given what the run asked for; raises where it cannot answer the task."""
        return kind_for(kind or task.kind, task.metric, task.name)

    def view_of(self, kind: str) -> str:
        return KINDS[kind].view

    def identity(self, kind: str) -> dict[str, Any]:
        """Return what of the rules a score depends on."""
        facts = KINDS[kind]
        return {"kind": kind, "version": facts.version, "candidates": list(facts.candidates), "share": TRAIN_SHARE}

    def run(self, parts: dict[str, Embeddings], task: ProbeTask, kind: str, seeds: Sequence[int], device: str) -> list[SeedRun]:
        """Score a task, once per seed."""
        return probe_rounds(
            rounds_of(parts, task), metric=task.metric, kind=kind, seeds=seeds, segment_seconds=task.segment_seconds,
            device=device, name=task.name,
        )  # fmt: skip


def rounds_of(parts: dict[str, Embeddings], task: ProbeTask) -> list[Round]:
    """Return the rounds of a task: one for splits, one per fold for folds."""
    return fold_rounds(list(parts.values())) if task.split.scheme == "folds" else [split_round(parts)]


PROTOCOLS: dict[str, Protocol] = {"strict": Protocol()}
