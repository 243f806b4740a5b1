"""The registry of probe kinds: what each needs of an embedding, which answers it gives, how it is fitted.

In: a kind's name and a round. Out: a `Learner`. Next: `probes.selection`. A new kind is one file and one line in `KINDS`.
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
    """What is asked of a learner beside its round."""

    metric: str
    classes: Sequence[str]
    segment_seconds: float
    device: str


@dataclass(frozen=True)
class ProbeKind:
    """One kind of probe.

    Attributes:
        title: what tables call it.
        answers: the kinds of answer that it can give.
        view: what it sees of a clip: one vector, one per layer, one per segment, or every frame.
        candidates: the settings among which validation chooses.
        version: raised when anything changes a score.
        seeded: it trains by epochs from a start and in an order that a seed decides. The others have one solution: they are fitted
            once, and seeds do not apply.
        learner: makes one for a round.
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
    "linear": ProbeKind("linear probes", ("class", "classes"), "pooled", modules.LINEAR_CANDIDATES, modules.LINEAR_VERSION,
        False, _linear),
    "knn": ProbeKind("nearest neighbours", ("class",), "pooled", knn.CANDIDATES, knn.KNN_VERSION, False, _class_learner(knn.KNNFitter.on)),
    "mlp": ProbeKind(
        "one hidden layer", ("class", "classes"), "pooled", modules.MLP_CANDIDATES, modules.MLP_VERSION, True,
        _class_learner(modules.mlp_fitter)
    ),
    "layers": ProbeKind(
        "linear probes over weighted layers", ("class", "classes"), "layers", modules.LAYERS_CANDIDATES, modules.LAYERS_VERSION, True,
        _class_learner(modules.layer_fitter),
    ),
    "attention": ProbeKind(
        "linear probes under attention pooling", ("class", "classes"), "frames", modules.ATTENTION_CANDIDATES,
        modules.ATTENTION_VERSION, True, _attention,
    ),
    # A segment is an item of any number of classes: logistic regressions on the mean frame of each.
    "frame": ProbeKind("linear probes of segments", ("events",), "segments", modules.LINEAR_CANDIDATES, modules.LINEAR_VERSION,
        False, _linear),
    "retrieval": ProbeKind(
        "audio-text retrieval", ("captions",), "pooled", retrieval.CANDIDATES, retrieval.RETRIEVAL_VERSION, True,
        _clip_learner(retrieval.RetrievalLearner),
    ),
    "transcription": ProbeKind(
        "CTC heads", ("text",), "frames", transcription.CANDIDATES, transcription.TRANSCRIPTION_VERSION, True,
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
    """Return the kind that is to answer a task: `name`, else the task's own, else the usual one for its metric.

    Raises:
        UserError: there is no such kind, or it does not answer such a task.
    """
    chosen = name or task.kind or DEFAULT_KINDS[task.answer]
    if chosen not in KINDS:
        raise UserError(f"There is no probe kind {chosen!r}. There are: {', '.join(KINDS)}.")
    if task.answer not in KINDS[chosen].answers:
        able = ", ".join(kind for kind, facts in KINDS.items() if task.answer in facts.answers)
        raise UserError(
            f"Probe task {task.name!r} is scored by {task.metric}, which a {chosen} probe does not give. Able to: {able}."
        )
    return chosen


@torch.inference_mode(
    False
)  # within a validation hook, tensors made in inference mode could not be trained on
@torch.enable_grad()
def probe_rounds(
    rounds: Sequence[Round], *, metric: str = "accuracy", kind: str = "", seeds: Sequence[int] = (0, 1, 2, 3, 4),
    candidates: Sequence[Setting] = (), segment_seconds: float = 0.0, device: str = "cpu", name: str = "task",
    final_fit: FinalFit = "train",
) -> list[SeedRun]:  # fmt: skip
    """Score the rounds of one task: once per seed, or once where the kind knows no seeds.

    Args:
        final_fit: what the tested probe is fitted on; in folds always on all other folds.
        kind: a key of `KINDS`; empty for the usual one of the metric.
        candidates: the settings among which validation chooses, in place of the kind's own.

    Raises:
        UserError: an empty split, a single class, or a class that is tested but never trained on.
    """
    check_rounds(rounds, name)
    chosen = KINDS[kind or DEFAULT_KINDS[ANSWERS[metric]]]
    question = Question(metric, class_names(rounds, ANSWERS[metric], name), segment_seconds, device)
    own_seeds = list(seeds) if chosen.seeded else [None]
    runs = []
    for one in rounds:
        groups = strata(one, ANSWERS[metric])
        # One thread: thousands of small products and scores; `fit` takes more where a step is worth it.
        with threads(1):
            learner, settings = chosen.learner(one, question), candidates or chosen.candidates
            runs.append(
                score_round(
                    learner, one, groups, settings, own_seeds, final_fit, by_epochs=chosen.seeded
                )
            )
    return join_rounds(runs)
