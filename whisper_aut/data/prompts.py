"""Annotation → what a language model is asked about a clip, and the answer it should give.

In: the entries of `conf/instructions/*.yaml` and an annotation. Out: a `Question`: one of the tasks that the annotation can serve, one of
its paraphrases, the natural answer. Next: `data.chat` turns it into tokens. Source: UniWhisper (arXiv 2602.21772), where every task
is instruction → answer. What is drawn for a sample is drawn by its position in the order, so a resumed run asks the same.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from whisper_aut.corpora.annotation import DOMAINS, Annotation
from whisper_aut.corpora.languages import language_name
from whisper_aut.corpora.tables import Row
from whisper_aut.corpora.template import Template
from whisper_aut.data.text import Metric
from whisper_aut.errors import Reason, SampleRefused, UserError, nearest

OWN_TASK = "question"  # of samples that bring their own instruction and answer
CANDIDATE = "candidate"


@dataclass
class Instruction:
    """One task of `conf/instructions`, in templates over an annotation's fields (`corpora.template`).

    Attributes:
        asks: paraphrases of the instruction.
        answer: the answer; a sample that lacks a field of it does not serve the task.
        tasks: the values of a sample's `task` that it serves, beside its own name; empty for any.
        domains: the domains that it serves; empty for any.
        weight: share among the tasks that one sample can serve.
        metric: what generated answers are measured by.
        others: makes it a yes/no task: `{candidate}` in `asks` is the filled `answer` (yes), or one of these (no).
    """

    asks: list[str]
    answer: str = "{text}"
    tasks: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    weight: float = 1.0
    metric: Metric = "exact"
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """What is asked about one clip: the task's name, the instruction, the answer."""

    task: str
    ask: str
    answer: str


class Instructions:
    """The tasks of a run.

    Args:
        entries: by name.

    Raises:
        UserError: listing every entry that cannot be used.
    """

    def __init__(self, entries: Mapping[str, Instruction]):
        problems = [
            problem for name, entry in entries.items() for problem in _problems(name, entry)
        ]
        if not entries:
            problems.append("there is no task at all")
        if problems:
            raise UserError(
                "Instructions that cannot be used:\n"
                + "\n".join(f"  - {problem}" for problem in problems)
            )
        self.entries = dict(entries)
        self._answers = {name: Template(entry.answer) for name, entry in entries.items()}
        self._asks = {
            name: [Template(ask) for ask in entry.asks] for name, entry in entries.items()
        }

    @property
    def metrics(self) -> dict[str, Metric]:
        """What each task is measured by."""
        return {OWN_TASK: "caption", **{name: entry.metric for name, entry in self.entries.items()}}

    def only(self, names: Iterable[str]) -> "Instructions":
        """Return these tasks alone, for samples that are to be asked one thing.

        Raises:
            UserError: no such task.
        """
        names = list(names)
        for name in names:
            if name not in self.entries:
                known = ", ".join(sorted(self.entries))
                raise UserError(
                    f"There is no task {name!r}.{nearest(name, self.entries)} Tasks of this run: {known}."
                )
        return Instructions({name: self.entries[name] for name in names})

    def fitting(self, annotation: Annotation, domain: str) -> list[str]:
        """Return the tasks that a sample can serve."""
        row = _row(annotation)
        return [
            name
            for name, entry in self.entries.items()
            if self._fits(name, entry, annotation.task, domain, row)
        ]

    def facts(self, annotation: Annotation, domain: str) -> dict[str, str]:
        """Return what can be answered about a sample, by task; of a yes/no task what it asks about."""
        row = _row(annotation)
        return {name: self._answers[name].fill(row) for name in self.fitting(annotation, domain)}

    def draw(self, annotation: Annotation, domain: str, position: int) -> Question:
        """Pick a task and a paraphrase for one sample; its own instruction and answer are used as they are.

        Raises:
            SampleRefused: no task fits.
        """
        if annotation.instruction.strip() and annotation.answer.strip():
            return Question(OWN_TASK, annotation.instruction.strip(), annotation.answer.strip())
        names = self.fitting(annotation, domain)
        if not names:
            has = ", ".join(name for name, value in _row(annotation).items() if value) or "nothing"
            raise SampleRefused(
                Reason.NO_TASK, f"task {annotation.task!r}, domain {domain!r}, has {has}"
            )
        rng = random.Random(
            f"{position} {annotation.source} {annotation.id}"
        )  # text seeds are the same in every process
        name = rng.choices(names, [self.entries[name].weight for name in names])[0]
        row = _row(annotation)
        ask, answer = rng.choice(self._asks[name]), self._answers[name].fill(row)
        if others := self.entries[name].others:
            candidate, answer = _candidate(answer, others, rng)
            row = {**row, CANDIDATE: candidate}
        return Question(name, ask.fill(row), answer)

    def _fits(self, name: str, entry: Instruction, task: str, domain: str, row: Row) -> bool:
        right_place = (not entry.tasks or task in (name, *entry.tasks)) and (
            not entry.domains or domain in entry.domains
        )
        if not right_place or not entry.weight or not self._answers[name].fill(row):
            return False
        given = {**row, CANDIDATE: "any"}
        return all(ask.fill(given) for ask in self._asks[name])


def _row(annotation: Annotation) -> Row:
    """Return the fields that templates may use; several labels stand in alphabetical order, each once."""
    label = (
        sorted(set(annotation.label)) if isinstance(annotation.label, list) else annotation.label
    )
    own = {
        "text": " ".join(annotation.text.split()),
        "label": label,
        "language_name": language_name(annotation.language),
        "instruction": annotation.instruction,
        "answer": annotation.answer,
    }
    return {**annotation.extra, **own}


def _candidate(answer: str, others: list[str], rng: random.Random) -> tuple[str, str]:
    """Return what a yes/no question asks about and its answer. Several labels are one by one candidates for a yes; for a no, what
    has no word of theirs: waves are heard in sea waves."""
    true, heard = [part.strip() for part in answer.split(",")], _words(answer)
    false = [other for other in others if not _words(other) & heard]
    if not false or rng.random() < 0.5:
        return rng.choice(true), "yes"
    return rng.choice(false), "no"


def _words(label: str) -> set[str]:
    """Return the words of a label in lower case, without the `s` of a plural."""
    words = re.findall(r"[^\W_]+", label.lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words}


def _problems(name: str, entry: Instruction) -> Iterator[str]:
    if not entry.asks:
        yield f"{name}.asks: give at least one instruction"
    for where, text in (("answer", entry.answer), *(("asks", ask) for ask in entry.asks)):
        template = Template(text)
        if template.fault:
            yield f"{name}.{where}: {text!r}: {template.fault}"
        elif not text.strip():
            yield f"{name}.{where}: empty"
    asks_candidate = any(CANDIDATE in Template(ask).columns for ask in entry.asks)
    if asks_candidate != bool(entry.others):
        yield f"{name}: a yes/no task has both {{{CANDIDATE}}} in `asks` and a list of `others`"
    for domain in entry.domains:
        if domain not in DOMAINS:
            yield f"{name}.domains: {domain!r} is not one of {', '.join(DOMAINS)}"
    if entry.weight < 0:
        yield f"{name}.weight: {entry.weight} is negative"
