"""The result of a probe run, as data: every score with its seeds, hashes and per-clip record, and back from JSON.

In: what `probes.suite` measured. Out: plain JSON, from which every mean, average, interval and p-value can be computed again.
Next: `report.tables`, `report.plots`.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whisper_aut.errors import UserError
from whisper_aut.probes.stats import GroupTotals, interval, mean_std

SCORES_VERSION = 4
PROTOCOL = "strict"
AVERAGE = "average"  # the name under which a comparison over all tasks stands
NO_ASR = "average without recognition"  # which alone carries a quarter of X-ARES's weight


@dataclass(frozen=True)
class Confusion:
    """What was taken for what: `counts[true][predicted]`, in the order of `classes`."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TaskScore:
    """One encoder on one task.

    Attributes:
        kind: of probe, a key of `probes.kinds.KINDS`.
        scores: the metric on the test part, 0 … 1: for each seed, one per fold (a task in splits has one).
        chosen, valid_scores: the setting of each of them, with `epochs` where a probe trains by epochs, and its score on validation
            clips (None where nothing was to be chosen).
        seeds: those that were trained; none for a probe without a random start, which is fitted once.
        final_fit: what the tested probe was fitted on, `train` or `train+valid`; for a task in folds all other folds.
        units: how many units of the record each test part has.
        record: for each seed, or once without seeds, the units of which the scores are means, in the order of `keys_sha256`: what
            each test clip, or each group of test clips, adds. A text of `0` and `1` where clips are right or wrong.
        keys_sha256: hash of the test clips' names in order; equal hashes make two records paired.
        group: the field by which test clips belong together; empty where each counts by itself.
        groups: with it, the number of each test clip's group, in the order of `keys_sha256`, as one text.
        clips: used, per split or fold. skipped: not used, per split or fold and reason.
        chance: the share of the commonest class among the test clips; None where clips have no single class.
        confusion: where clips have one class: the classes, and counts over all seeds and folds, a row per true class.
        embedded: names of the cache files that hold the test clips' embeddings.
        padding: what the encoder ran at, `none` or `30s`; empty for features that know no padding.
        identity: hash of encoder, data and settings. A stored score counts only while it is the same.
    """

    encoder: str
    task: str
    title: str
    domain: str
    weight: float
    metric: str
    classes: int
    scores: tuple[float, ...]
    chosen: tuple[dict[str, float], ...]
    valid_scores: tuple[float | None, ...]
    seeds: tuple[int, ...]
    final_fit: str
    record: tuple[str | tuple[float, ...], ...]
    units: tuple[int, ...]
    keys_sha256: str
    clips: dict[str, int]
    skipped: dict[str, dict[str, int]]
    chance: float | None
    pooling: str
    identity: str
    kind: str = "linear"
    protocol: str = PROTOCOL
    confusion: "Confusion | None" = None
    embedded: tuple[str, ...] = ()
    padding: str = ""
    group: str = ""
    groups: str = ""

    @property
    def mean(self) -> float:
        return mean_std(self.scores)[0]

    @property
    def std(self) -> float | None:
        """The deviation over seeds, of means over folds; None for a probe that is fitted once."""
        return mean_std(self.per_seed())[1]

    @property
    def folds(self) -> int:
        """How many test parts each seed was scored on."""
        return len(self.scores) // len(self.record)

    @property
    def epochs(self) -> float | None:
        """The mean number of epochs that the tested probes were trained for; None where they are not trained by epochs."""
        found = [setting["epochs"] for setting in self.chosen if "epochs" in setting]
        return float(np.mean(found)) if found else None

    @property
    def test_clips(self) -> int:
        return self.clips["test"] if "test" in self.clips else sum(self.clips.values())

    def per_seed(self) -> list[float]:
        """Return each seed's mean over the folds; one value without seeds."""
        return np.reshape(self.scores, (-1, self.folds)).mean(1).tolist()

    def per_fold(self) -> list[float]:
        """Return the mean over seeds on each test part."""
        return np.reshape(self.scores, (-1, self.folds)).mean(0).tolist()

    def per_unit(self) -> np.ndarray:
        """Return `[U]`: what each unit adds to the score, a mean over seeds; the mean of all is `mean`, folds weighing alike."""
        return np.mean([_numbers(seed) for seed in self.record], axis=0) * self._weights()

    def compared_with(self, other: "TaskScore") -> GroupTotals:
        """Return the paired differences to another score of the same clips."""
        return self._by_group(self.per_unit() - other.per_unit())

    @cached_property
    def totals(self) -> GroupTotals:
        """What each group of test clips adds to the score."""
        return self._by_group(self.per_unit())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score over the choice of test clips, or of their groups."""
        return interval([self.totals])

    @property
    def group_count(self) -> int:
        """How many groups the test clips form; as many as there are clips where each counts by itself."""
        return len(set(self.groups.split())) if self.groups else self.test_clips

    def _weights(self) -> np.ndarray:
        """Return `[U]`, the weight of each unit, 1 on the mean: folds weigh alike, whatever their size."""
        total = sum(self.units)
        return np.repeat([total / (len(self.units) * count) for count in self.units], self.units)

    def _by_group(self, values: np.ndarray) -> GroupTotals:
        # Where units are no clips, groups were left out whole when they were made.
        groups = np.array(self.groups.split(), dtype=int)
        own = groups if len(groups) == len(values) else None
        seed = zlib.crc32(
            self.task.encode()
        )  # tasks are averaged: their draws must not be the same
        return GroupTotals.of(values, self._weights(), own, seed)


@dataclass(frozen=True)
class Comparison:
    """`encoder` − `against` on one task, or on the weighted `AVERAGE`: difference, 95 % interval, p-value, Holm's p-value."""

    encoder: str
    against: str
    task: str
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm < 0.05


@dataclass(frozen=True)
class Average:
    """A weighted average of one encoder over the tasks of a domain, or over all (`AVERAGE`, `NO_ASR`), 0 … 1, as X-ARES and
    UniWhisper print it: mean, deviation over seeds where any probe has some, and 95 % interval over test clips."""

    encoder: str
    domain: str
    mean: float
    std: float | None
    tasks: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """All scores and comparisons of one run; `seeds` (those asked for) and `settings` hold for every one of them."""

    entries: tuple[TaskScore, ...]
    comparisons: tuple[Comparison, ...] = ()
    seeds: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: str = PROTOCOL

    @property
    def encoders(self) -> list[str]:
        return list(dict.fromkeys(entry.encoder for entry in self.entries))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry.task for entry in self.entries))

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(entry.domain for entry in self.entries))

    def get(self, encoder: str, task: str) -> TaskScore | None:
        return next(
            (entry for entry in self.entries if (entry.encoder, entry.task) == (encoder, task)),
            None,
        )

    def label(self, encoder: str) -> str:
        """Return what tables call an encoder: its name and the padding that it ran at."""
        entry = next((entry for entry in self.entries if entry.encoder == encoder), None)
        mark = f"@{entry.padding}" if entry and entry.padding else ""
        return encoder if encoder.endswith(mark) else f"{encoder}{mark}"

    def averages(self) -> list[Average]:
        """Return, for each encoder, the weighted average of every domain and, under `AVERAGE`, of all tasks; where recognition is
        among them, also of all others."""
        found = []
        for encoder in self.encoders:
            own = [entry for entry in self.entries if entry.encoder == encoder]
            spoken = [entry for entry in own if entry.metric != "word_accuracy"]
            for domain in [*self.domains, AVERAGE, *([NO_ASR] if len(spoken) < len(own) else [])]:
                chosen = (
                    spoken
                    if domain == NO_ASR
                    else [entry for entry in own if domain in (entry.domain, AVERAGE)]
                )
                if chosen:
                    mean, std = mean_std(_per_seed(chosen))
                    weights = [entry.weight for entry in chosen]
                    ends = interval([entry.totals for entry in chosen], weights)
                    found.append(Average(encoder, domain, mean, std, len(chosen), ends))
        return found

    def to_json(self) -> str:
        """Return the whole as JSON; means, intervals and averages are added for readers, and computed again by `from_json`."""
        values = {"version": SCORES_VERSION, **asdict(self)}
        for entry, written in zip(self.entries, values["entries"], strict=True):
            written |= {"mean": entry.mean, "std": entry.std, "interval": entry.interval}
        values["averages"] = [asdict(average) for average in self.averages()]
        return json.dumps(values, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Scores":
        """Read `to_json`'s text back.

        Raises:
            UserError: not JSON of this version, or damaged.
        """
        try:
            data = json.loads(text)
            if data["version"] != SCORES_VERSION:
                raise UserError(
                    f"The scores have version {data['version']}; this release reads {SCORES_VERSION}. Probe again."
                )
            entries = tuple(_entry(entry) for entry in data["entries"])
            if not all(_whole(entry) for entry in entries):
                raise ValueError("seeds and records differ in number")
            comparisons = tuple(Comparison(**comparison) for comparison in data["comparisons"])
            return cls(
                entries, comparisons, tuple(data["seeds"]), data["settings"], data["protocol"]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"These are not probe scores, or they are damaged ({error!r}). Probe again."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the JSON under a temporary name, then rename it."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.to_json(), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"Cannot write scores to {path}: {error.strerror}.") from None

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read a file of scores.

        Raises:
            UserError: missing, unreadable, or not scores.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read scores from {path}: {error}.") from None
        return cls.from_json(text)


def read_predictions(path: str | Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the lines of a file of predictions by encoder and task; none where there is no file.

    A line has `encoder`, `task`, `key` (tar and sample), `seed` where the probe has one, `true`, `predicted`, `probability`, that of
    each class predicted, where the probe gives one, and `group` where the task has them.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if not Path(path).exists():
        return found
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
                found.setdefault((row.pop("encoder"), row.pop("task")), []).append(row)
            except (ValueError, KeyError, AttributeError):
                continue  # half a line, written when a run was interrupted: no stored score needs it
    return found


def append_predictions(path: str | Path, entry: TaskScore, rows: Sequence[dict[str, Any]]) -> None:
    """Add the predictions of a score to a file, a line each.

    Raises:
        UserError: the file cannot be written.
    """
    names = {"encoder": entry.encoder, "task": entry.task}
    try:
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(names | row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"Cannot write predictions to {path}: {error.strerror}.") from None


def _per_seed(entries: Sequence[TaskScore]) -> list[float]:
    """Weighted average of each seed: its spread is that of the average, not the average of spreads.

    A score without seeds counts the same in every one.
    """
    most = max(len(entry.record) for entry in entries)
    scores = [np.broadcast_to(entry.per_seed(), most) for entry in entries]
    return np.average(scores, axis=0, weights=[entry.weight for entry in entries]).tolist()


def _numbers(record: str | tuple[float, ...]) -> np.ndarray:
    if isinstance(record, str):
        return np.frombuffer(record.encode(), dtype=np.uint8) - float(ord("0"))
    return np.array(record)


def _entry(written: dict[str, Any]) -> TaskScore:
    added = ("mean", "std", "interval")
    return TaskScore(**_tuples({k: value for k, value in written.items() if k not in added}))


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    values = {name: _tuple(value) for name, value in entry.items()}
    return (
        values | {"confusion": Confusion(**_tuples(entry["confusion"]))}
        if entry.get("confusion")
        else values
    )


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _whole(entry: TaskScore) -> bool:
    same = len(entry.scores) == len(entry.chosen) == len(entry.valid_scores) > 0 and len(
        entry.record
    ) == max(1, len(entry.seeds))
    units = sum(entry.units)
    return (
        same
        and (not entry.groups or len(entry.groups.split()) == entry.test_clips)
        and not len(entry.scores) % len(entry.record)
        and all(
            len(seed) == units and (not isinstance(seed, str) or set(seed) <= {"0", "1"})
            for seed in entry.record
        )
    )
