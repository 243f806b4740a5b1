"""Registry of probe kinds: the view of a clip that each needs, the answers it gives, and how it
is fitted.

To add a kind, write a learner and add an entry to `KINDS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from whisper_aut.errors import UserError
from whisper_aut.probes import knn, modules, retrieval, transcription
from whisper_aut.probes.fit import (
    ClassLearner,
    FinalFit,
    Learner,
    Round,
    SeedRun,
    Setting,
    check_rounds,
    class_names,
    items_of,
    join_rounds,
    score_round,
    strata,
    threads,
)
from whisper_aut.probes.metrics import ANSWERS, Answer
from whisper_aut.probes.tasks import ProbeTask

View = Literal["pooled", "layers", "segments", "frames"]


@dataclass(frozen=True)
class Question:
    """What a learner needs to know apart from its round."""

    metric: str
    classes: Sequence[str]
    segment_seconds: float
    device: str


@dataclass(frozen=True)
class ProbeKind:
    """One kind of probe.

    Attributes:
        title: name in tables.
        answers: the kinds of answer that it can give.
        view: what it sees of a clip: one vector, one per layer, one per segment, or every frame.
        candidates: the settings to choose from on validation clips.
        version: increased whenever a change affects scores.
        seeded: whether it is trained by epochs, with initial weights or batch order from a seed.
            Other kinds have a unique solution and are fitted once.
        learner: makes the learner of a round.
    """

    title: str
    answers: tuple[Answer, ...]
    view: View
    candidates: tuple[Setting, ...]
    version: int
    seeded: bool
    learner: Callable[[Round, Question], Learner] = field(repr=False)


def _class_learner(fitter: Callable) -> Callable[[Round, Question], Learner]:
    def make(round: Round, question: Question) -> Learner:
        answer = ANSWERS[question.metric]
        pool, test = (
            items_of(part, answer, question.classes, question.segment_seconds)
            for part in (round.pool, round.test)
        )
        made = fitter(pool, pool.of(round.train), len(question.classes), question.device)
        return ClassLearner(
            pool, test, tuple(question.classes), question.metric, made, question.segment_seconds
        )

    return make


def _clip_learner(made: Callable) -> Callable[[Round, Question], Learner]:
    return lambda round, question: made(round.pool, round.train, round.test, question.device)


def _attention(round: Round, question: Question) -> Learner:
    parts = round.pool, round.train, round.test
    return modules.attention_learner(*parts, question.metric, question.classes, question.device)


_linear = _class_learner(modules.LinearFitter.on)
KINDS: dict[str, ProbeKind] = {
    "linear": ProbeKind(
        "linear probes", ("class", "classes"), "pooled",
        modules.LINEAR_CANDIDATES, modules.LINEAR_VERSION, False, _linear,
    ),
    "knn": ProbeKind(
        "nearest neighbours", ("class",), "pooled",
        knn.CANDIDATES, knn.KNN_VERSION, False, _class_learner(knn.KNNFitter.on),
    ),
    "mlp": ProbeKind(
        "one hidden layer", ("class", "classes"), "pooled",
        modules.MLP_CANDIDATES, modules.MLP_VERSION, True, _class_learner(modules.mlp_fitter),
    ),
    "layers": ProbeKind(
        "linear probes over weighted layers", ("class", "classes"), "layers",
        modules.LAYERS_CANDIDATES, modules.LAYERS_VERSION, True,
        _class_learner(modules.layer_fitter),
    ),
    "attention": ProbeKind(
        "linear probes under attention pooling", ("class", "classes"), "frames",
        modules.ATTENTION_CANDIDATES, modules.ATTENTION_VERSION, True, _attention,
    ),
    # Each segment is an item with any number of classes: logistic regressions on its mean frame.
    "frame": ProbeKind(
        "linear probes of segments", ("events",), "segments",
        modules.LINEAR_CANDIDATES, modules.LINEAR_VERSION, False, _linear,
    ),
    "retrieval": ProbeKind(
        "audio-text retrieval", ("captions",), "pooled",
        retrieval.CANDIDATES, retrieval.RETRIEVAL_VERSION, True,
        _clip_learner(retrieval.RetrievalLearner),
    ),
    "transcription": ProbeKind(
        "CTC heads", ("text",), "frames",
        transcription.CANDIDATES, transcription.TRANSCRIPTION_VERSION, True,
        _clip_learner(transcription.TranscriptionLearner),
    ),
}  # fmt: skip
DEFAULT_KINDS: dict[Answer, str] = {
    "class": "linear",
    "classes": "linear",
    "events": "frame",
    "captions": "retrieval",
    "text": "transcription",
}


def kind_for(name: str, task: ProbeTask) -> str:
    """Return the probe kind for a task: `name` if given, else the task's own, else the default
    for its metric.

    Raises:
        UserError: if there is no such kind, or it cannot answer the task.
    """
    chosen = name or task.kind or DEFAULT_KINDS[task.answer]
    if chosen not in KINDS:
        raise UserError(f"There is no probe kind {chosen!r}. There are: {', '.join(KINDS)}.")
    if task.answer not in KINDS[chosen].answers:
        able = ", ".join(kind for kind, facts in KINDS.items() if task.answer in facts.answers)
        raise UserError(
            f"Probe task {task.name!r} is scored by {task.metric}, which a {chosen} probe does "
            f"not give. Able to: {able}."
        )
    return chosen


# In a validation hook, tensors created in inference mode could not be trained on.
@torch.inference_mode(False)
@torch.enable_grad()
def probe_rounds(
    rounds: Sequence[Round], *, metric: str = "accuracy", kind: str = "",
    seeds: Sequence[int] = (0, 1, 2, 3, 4), candidates: Sequence[Setting] = (),
    segment_seconds: float = 0.0, device: str = "cpu", name: str = "task",
    final_fit: FinalFit = "train",
) -> list[SeedRun]:  # fmt: skip
    """Score the rounds of one task: once per seed, or once if the kind does not use seeds.

    Args:
        rounds: the rounds.
        metric: a key of `METRICS`.
        kind: a key of `KINDS`. Empty for the default of the metric.
        seeds: seeds of the final probes.
        candidates: settings to choose from, instead of the kind's own.
        segment_seconds: segment length, for tasks with events.
        device: where probes are fitted.
        name: name of the task, for error messages.
        final_fit: what the final probe is fitted on. With folds, always all other folds.

    Raises:
        UserError: if a split is empty, there is a single class, or a class is tested but never
            trained on.
    """
    check_rounds(rounds, name)
    chosen = KINDS[kind or DEFAULT_KINDS[ANSWERS[metric]]]
    question = Question(metric, class_names(rounds, ANSWERS[metric], name), segment_seconds, device)
    own_seeds = list(seeds) if chosen.seeded else [None]
    runs = []
    for one in rounds:
        groups = strata(one, ANSWERS[metric])
        # One thread, for thousands of small products. `fit` uses more if a step is large enough.
        with threads(1):
            learner, settings = chosen.learner(one, question), candidates or chosen.candidates
            runs.append(
                score_round(
                    learner, one, groups, settings, own_seeds, final_fit, by_epochs=chosen.seeded
                )
            )
    return join_rounds(runs)
