"""Results of a probe run as data: every score with its seeds, hashes and per-clip record, stored
as JSON.

Every mean, average, interval and p-value can be computed again from the JSON.
"""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveFloat, TypeAdapter

from whisper_aut.errors import UserError
from whisper_aut.probes.encoders import EncoderCost
from whisper_aut.probes.stats import GroupTotals, interval, mean_std
from whisper_aut.utils import parse_json, write_text

SCORES_VERSION = 5  # of the file; increase it also whenever a change affects all scores
PROTOCOL = "strict"
AVERAGE = "average"  # name of the average over all tasks
# Speech recognition alone has a quarter of the total weight in X-ARES.
NO_ASR = "average without recognition"


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix: `counts[true][predicted]`, in the order of `classes`."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TaskScore:
    """The score of one encoder on one task.

    Attributes:
        encoder: display name.
        task, title, domain, weight, metric: see `tasks.ProbeTask`.
        classes: number of classes; 0 for captions and transcripts.
        scores: the metric on the test part, 0 … 1. For each seed, one value per fold; a task
            with splits has one.
        chosen: the setting of each score, with `epochs` if the probe trains by epochs.
        valid_scores: the validation score of each setting; None if there was nothing to choose.
        seeds: seeds that were trained. Empty for a probe without a random start, which is fitted
            once.
        final_fit: what the final probe was fitted on, `train` or `train+valid`. With folds,
            always all other folds.
        record: the units whose weighted mean is the score, per seed or once without seeds, in
            the order of `keys_sha256`: the contribution of each test clip, or of each group of
            test clips. A string of `0` and `1` if clips are either right or wrong.
        units: number of units per test part.
        keys_sha256: hash of the test clips' names in order. Two records with equal hashes are
            paired.
        clips: number of clips used, per split or fold.
        skipped: number of clips not used, per split or fold and reason.
        chance: fraction of test clips in the most common class; None if clips have no single
            class.
        pooling: how frames were pooled.
        identity: hash of encoder, data and settings. A stored score is reused only if this is
            equal.
        kind: the probe kind, a key of `probes.fit.PROBES`.
        protocol: the protocol of the score.
        confusion: for tasks with one class per clip, the counts over all seeds and folds.
        embedded: names of the cache files that hold the test clips' embeddings.
        padding: padding mode of the encoder, `none` or `30s`. Empty for features without
            padding.
        trained_padding: padding that the encoder was trained with. Empty if unknown.
        group: the field that groups test clips. Empty if each clip counts by itself.
        groups: the group number of each test clip, in the order of `keys_sha256`, joined by
            spaces. Empty if no two clips share a group.
        shots: number of training clips per class, drawn by each seed; 0 for all clips.
        layers: the layers whose vectors the probe saw; empty for the output.
        layer_weights: learned weight of each layer, averaged over seeds and folds. Empty if the
            probe learns none.
    """

    encoder: str
    task: str
    title: str
    domain: str
    weight: PositiveFloat
    metric: str
    classes: int
    scores: tuple[float, ...]
    chosen: tuple[dict[str, float], ...]
    valid_scores: tuple[float | None, ...]
    seeds: tuple[int, ...]
    final_fit: Literal["train", "train+valid"]
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
    trained_padding: str = ""
    group: str = ""
    groups: str = ""
    shots: int = 0
    layers: tuple[int, ...] = ()
    layer_weights: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean of all scores, 0 … 1."""
        return mean_std(self.scores)[0]

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds of the mean over folds; None without seeds."""
        return mean_std(self.per_seed())[1]

    @property
    def folds(self) -> int:
        """Number of test parts that each seed was scored on."""
        return len(self.scores) // len(self.record)

    @property
    def epochs(self) -> float | None:
        """Mean number of epochs of the final probes; None if they are not trained by epochs."""
        found = [candidate["epochs"] for candidate in self.chosen if "epochs" in candidate]
        return float(np.mean(found)) if found else None

    @property
    def test_clips(self) -> int:
        """Number of test clips; with folds, the clips of all folds."""
        return self.clips["test"] if "test" in self.clips else sum(self.clips.values())

    def per_seed(self) -> list[float]:
        """Return the mean over folds for each seed; one value without seeds."""
        return np.reshape(self.scores, (-1, self.folds)).mean(1).tolist()

    def per_fold(self) -> list[float]:
        """Return the mean over seeds for each test part."""
        return np.reshape(self.scores, (-1, self.folds)).mean(0).tolist()

    def per_unit(self) -> np.ndarray:
        """Return the contribution `[U]` of each unit, averaged over seeds. Their mean is `mean`,
        in which all folds have the same weight.
        """
        units = [list(map(float, seed)) for seed in self.record]
        return np.mean(units, axis=0) * self._unit_weights()

    def compared_with(self, other: "TaskScore") -> GroupTotals:
        """Return the paired differences to another score on the same clips."""
        return self._by_group(self.per_unit() - other.per_unit())

    @cached_property
    def totals(self) -> GroupTotals:
        """Contribution of each group of test clips to the score."""
        return self._by_group(self.per_unit())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the score over the choice of test clips, or of their groups."""
        return interval([self.totals])

    @property
    def group_count(self) -> int:
        """Number of groups of test clips; the number of clips if each counts by itself."""
        return len(set(self.groups.split())) if self.groups else self.test_clips

    def _unit_weights(self) -> np.ndarray:
        """Return `[U]`, with mean 1: folds weigh the same, whatever their size."""
        total = sum(self.units)
        return np.repeat([total / (len(self.units) * count) for count in self.units], self.units)

    def _by_group(self, values: np.ndarray) -> GroupTotals:
        # Units that are not clips come from a jackknife that already left out whole groups.
        groups = np.array(self.groups.split(), dtype=int)
        own = groups if len(groups) == len(values) else None
        # Tasks are averaged, so their draws must differ.
        seed = zlib.crc32(self.task.encode())
        return GroupTotals.of(values, self._unit_weights(), own, seed)

    def check(self) -> None:
        """Raise a ValueError if parts of the score are missing."""
        seeds, units = max(1, len(self.seeds)), sum(self.units)
        if not (
            len(self.scores) == len(self.chosen) == len(self.valid_scores) > 0
            and len(self.record) == seeds
            and len(self.scores) % seeds == 0
            and all(len(seed) == units for seed in self.record)
            and all(set(seed) <= {"0", "1"} for seed in self.record if isinstance(seed, str))
            and len(self.groups.split()) in (0, self.test_clips)
        ):
            raise ValueError(f"the record of {self.task} is incomplete")


@dataclass(frozen=True)
class Comparison:
    """`encoder` − `against` on one task, or on a weighted average such as `AVERAGE`: difference,
    95 % interval, p-value, p-value after Holm's correction; and as in `stats.Difference`, effect
    size and detectable difference.
    """

    encoder: str
    against: str
    task: str
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    effect_size: float | None = None
    detectable: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the p-value after Holm's correction is below 0.05."""
        return self.p_holm < 0.05


@dataclass(frozen=True)
class Average:
    """Weighted average of one encoder over the tasks of a domain, or over all tasks (`AVERAGE`,
    `NO_ASR`), as in X-ARES and UniWhisper.

    Attributes:
        encoder: display name.
        domain: a domain, `AVERAGE` or `NO_ASR`.
        mean: the average, 0 … 1.
        std: standard deviation over seeds; None if no probe has seeds.
        tasks: number of tasks.
        interval: 95 % interval over test clips.
    """

    encoder: str
    domain: str
    mean: float
    std: float | None
    tasks: int
    interval: tuple[float, float]

    @classmethod
    def of(cls, encoder: str, domain: str, entries: Sequence[TaskScore]) -> "Average":
        weights = [entry.weight for entry in entries]
        mean = float(np.average([entry.mean for entry in entries], weights=weights))
        # The deviation over seeds is that of the average, rather than an average of deviations. A
        # single score counts for every seed. Tasks with more seeds than others use the first ones.
        seeds = min((len(entry.record) for entry in entries if len(entry.record) > 1), default=1)
        per_seed = [np.broadcast_to(entry.per_seed()[:seeds], seeds) for entry in entries]
        _, std = mean_std(np.average(per_seed, axis=0, weights=weights).tolist())
        ends = interval([entry.totals for entry in entries], weights)
        return cls(encoder, domain, mean, std, len(entries), ends)


@dataclass(frozen=True)
class Scores:
    """All scores and comparisons of one run.

    Attributes:
        entries: one score per encoder and task.
        comparisons: paired comparisons of encoders.
        seeds: the requested seeds.
        settings: the settings of the run.
        protocol: the protocol of the run.
    """

    entries: tuple[TaskScore, ...]
    comparisons: tuple[Comparison, ...] = ()
    seeds: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    protocol: str = PROTOCOL
    costs: dict[str, EncoderCost] = field(default_factory=dict)

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders, in the order of the entries."""
        return list(dict.fromkeys(entry.encoder for entry in self.entries))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the entries."""
        return list(dict.fromkeys(entry.task for entry in self.entries))

    @property
    def domains(self) -> list[str]:
        """Domains, in the order of the entries."""
        return list(dict.fromkeys(entry.domain for entry in self.entries))

    def get(self, encoder: str, task: str) -> TaskScore | None:
        """Return the score of an encoder on a task, or None."""
        found = (one for one in self.entries if (one.encoder, one.task) == (encoder, task))
        return next(found, None)

    def label(self, encoder: str) -> str:
        """Return the name of an encoder in tables: its name and its padding mode."""
        entry = next((entry for entry in self.entries if entry.encoder == encoder), None)
        mark = f"@{entry.padding}" if entry and entry.padding else ""
        return encoder if encoder.endswith(mark) else f"{encoder}{mark}"

    def averages(self) -> list[Average]:
        """Return the weighted averages of each encoder that has a score of every task in them:
        per domain, over all tasks (`AVERAGE`), and over all tasks but speech recognition
        (`NO_ASR`) if there are both.
        """
        groups = {
            domain: {entry.task for entry in self.entries if entry.domain == domain}
            for domain in self.domains
        }
        groups[AVERAGE] = set(self.tasks)
        others = {entry.task for entry in self.entries if entry.metric != "word_accuracy"}
        if others < groups[AVERAGE]:
            groups[NO_ASR] = others
        found = []
        for encoder, (name, tasks) in product(self.encoders, groups.items()):
            own = [one for one in self.entries if one.encoder == encoder and one.task in tasks]
            if 0 < len(own) == len(tasks):
                found.append(Average.of(encoder, name, own))
        return found

    def to_json(self) -> str:
        """Return the scores as JSON. Means, intervals and averages are added for readers;
        `from_json` ignores them.
        """
        values = {"version": SCORES_VERSION, **asdict(self)}
        for entry, written in zip(self.entries, values["entries"], strict=True):
            written |= {"mean": entry.mean, "std": entry.std, "interval": entry.interval}
        values["averages"] = [asdict(average) for average in self.averages()]
        return json.dumps(values, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Scores":
        """Read the output of `to_json`.

        Raises:
            UserError: the text is not JSON of this version, or is damaged.
        """
        try:
            data = parse_json(text)
            if data["version"] != SCORES_VERSION:
                raise UserError(
                    f"The scores have version {data['version']}; this release reads "
                    f"{SCORES_VERSION}. Probe again."
                )
            scores = TypeAdapter(cls).validate_python(data)
            for entry in scores.entries:
                entry.check()
            return scores
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"These are not probe scores, or they are damaged ({error}). Probe again."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the scores to a JSON file atomically."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read a file of scores.

        Raises:
            UserError: the file is missing, unreadable, or does not hold scores.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read scores from {path}: {error}.") from None
        return cls.from_json(text)


def read_predictions(path: str | Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of a predictions file by (encoder, task). A missing file has no rows.

    Each line of the file has `encoder`, `task`, `key` (tar and sample), `true` and `predicted`.
    It also has `seed` if the probe has seeds, `probability` of each predicted class if the probe
    gives probabilities, and `group` if the clip has one.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if not Path(path).exists():
        return found
    with Path(path).open("rb") as file:
        for line in file:
            # An interrupted run may leave half a line or letter, which no stored score needs.
            with suppress(ValueError, KeyError, AttributeError):
                row = parse_json(line)
                found.setdefault((row.pop("encoder"), row.pop("task")), []).append(row)
    return found


def append_predictions(path: str | Path, entry: TaskScore, rows: Sequence[dict[str, Any]]) -> None:
    """Append the predictions of a score to a file, one per line.

    Raises:
        UserError: the file cannot be written.
    """
    names = {"encoder": entry.encoder, "task": entry.task}
    try:
        with Path(path).open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(names | row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"Cannot write predictions to {path}: {error.strerror}.") from None
