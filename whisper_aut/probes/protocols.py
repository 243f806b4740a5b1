"""The rules by which scores are made: ours, and those of two peers, flaws included, for figures that can be set beside theirs.

In: a task's embeddings. Out: `SeedRun`s. Next: `probes.suite`, which names the protocol in every result.

- `strict`: official splits and folds, pooling over the frames that hold the clip, settings chosen on validation clips only.
- `xares`: pooling over 30 s of mostly silence, ten epochs, the best of them chosen by the score that is reported.
- `maeb`: clips shuffled across official folds, logistic regression on eight clips a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from whisper_aut.errors import UserError, nearest
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.embed import EmbedSettings
from whisper_aut.probes.items import class_names
from whisper_aut.probes.kinds import KINDS, kind_for, probe_rounds
from whisper_aut.probes.peers import maeb_runs, xares_runs
from whisper_aut.probes.rounds import TRAIN_SHARE, Round, check_rounds, fold_rounds, split_round
from whisper_aut.probes.selection import SeedRun
from whisper_aut.probes.tasks import ProbeTask

PEERS_VERSION = 2  # raise it when anything in `probes.peers` changes a score


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
        return {
            "kind": kind,
            "version": facts.version,
            "candidates": list(facts.candidates),
            "share": TRAIN_SHARE,
        }

    def run(
        self,
        parts: dict[str, Embeddings],
        task: ProbeTask,
        kind: str,
        seeds: Sequence[int],
        device: str,
    ) -> list[SeedRun]:
        """Score a task, once per seed."""
        return probe_rounds(
            rounds_of(parts, task), metric=task.metric, kind=kind, seeds=seeds, segment_seconds=task.segment_seconds,
            device=device, name=task.name,
        )  # fmt: skip


def rounds_of(parts: dict[str, Embeddings], task: ProbeTask) -> list[Round]:
    """Return the rounds of a task: one for splits, one per fold for folds."""
    return (
        fold_rounds(list(parts.values())) if task.split.scheme == "folds" else [split_round(parts)]
    )


@dataclass(frozen=True)
class XaresProtocol(Protocol):
    """X-ARES's rules (release 0.1.3)."""

    name: str = "xares"
    description: str = (
        "X-ARES's rules, flaws included: pooling over padding, successive crops, few epochs, the best chosen by the score that is "
        "reported where a task has no validation split; nearest neighbours of features scaled across samples"
    )

    def embedding(self, settings: EmbedSettings) -> EmbedSettings:
        return replace(settings, hearing="padded", successive_crops=True)

    def kind_of(self, task: ProbeTask, kind: str) -> str:
        chosen = _known(kind or "mlp", ("mlp", "knn"), self.name)
        if task.answer not in (("class", "classes") if chosen == "mlp" else ("class",)):
            raise UserError(
                f"Protocol {self.name} scores no {task.metric} with {chosen}: leave out {task.name!r}, or use strict."
            )
        return chosen

    def identity(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "version": PEERS_VERSION}

    def run(
        self,
        parts: dict[str, Embeddings],
        task: ProbeTask,
        kind: str,
        seeds: Sequence[int],
        device: str,
    ) -> list[SeedRun]:
        rounds = rounds_of(parts, task)
        check_rounds(rounds, task.name)
        return xares_runs(rounds, task, class_names(rounds, task.answer, task.name), kind, seeds)


@dataclass(frozen=True)
class MaebProtocol(Protocol):
    """MAEB's rules (MTEB 2.26)."""

    name: str = "maeb"
    description: str = (
        "MAEB's rules, flaws included: clips shuffled across official folds, logistic regression with its default penalty on eight "
        "clips a class, five folds or ten repetitions"
    )

    def kind_of(self, task: ProbeTask, kind: str) -> str:
        if task.answer != "class":
            raise UserError(
                f"Protocol {self.name} scores no {task.metric}: leave out {task.name!r}, or use strict."
            )
        return _known(kind or "linear", ("linear",), self.name)

    def identity(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "version": PEERS_VERSION}

    def run(
        self,
        parts: dict[str, Embeddings],
        task: ProbeTask,
        kind: str,
        seeds: Sequence[int],
        device: str,
    ) -> list[SeedRun]:
        rounds = rounds_of(parts, task)
        check_rounds(rounds, task.name)
        return maeb_runs(rounds, class_names(rounds, task.answer, task.name), seeds)


def _known(kind: str, kinds: Sequence[str], protocol: str) -> str:
    if kind not in kinds:
        raise UserError(f"Protocol {protocol} has no {kind} probe; it has: {', '.join(kinds)}.")
    return kind


PROTOCOLS: dict[str, Protocol] = {
    rules.name: rules for rules in (Protocol(), XaresProtocol(), MaebProtocol())
}


def protocol_named(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(
            f"There is no protocol {name!r}.{nearest(name, PROTOCOLS)} There are: {', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[name]
