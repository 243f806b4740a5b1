"""What an experiment found, as data: per arm and seed the scores, answers, loss curve, price and commands; and back from JSON.

In: what `experiments.measure` measured. Out: plain JSON from which every table and figure is made again. Next: `experiments.statistics`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whisper_aut.errors import UserError
from whisper_aut.training.rundir import write_whole

RESULTS_VERSION = 1


@dataclass(frozen=True)
class Cost:
    """What a training run took: what it heard, what it computed, how long, and how much of what its encoder ran on was padding.

    Seconds are wall clock of the training loop, data wait included, validation and checkpoints not.
    """

    steps: int
    audio_seconds: float
    teraflop: float | None
    seconds: float
    padding_share: float


@dataclass(frozen=True)
class Point:
    """A validation: its loss, and what had been spent until then."""

    step: int
    loss: float
    audio_seconds: float
    teraflop: float | None
    seconds: float


@dataclass(frozen=True)
class TaskResult:
    """One encoder on one probe task.

    Attributes:
        score: mean over probe seeds, 0 … 1.
        spread: its deviation over probe seeds; None with one.
        valid: the score on validation clips by which the penalty was chosen; None where nothing was to be chosen.
        right: a digit for each test clip: in how many probe seeds it was right. Empty where clips are not right or wrong.
        keys: hash of the test clips' names: scores of equal hashes are of the same clips.
    """

    title: str
    domain: str
    score: float
    spread: float | None
    valid: float | None
    right: str
    keys: str
    test_clips: int


@dataclass(frozen=True)
class Measure:
    """One arm with one seed.

    Attributes:
        tasks: probe task → result. answers: figure → value, as `exact_sound_class`.
        curve: of its training; empty where nothing was trained.
        commands: that make and measure it, in order.
    """

    arm: str
    seed: int
    tasks: dict[str, TaskResult]
    answers: dict[str, float]
    curve: tuple[Point, ...]
    cost: Cost | None
    commands: tuple[str, ...]


@dataclass(frozen=True)
class ArmFacts:
    """What tables and figures call an arm: its choice and title on each axis."""

    name: str
    titles: tuple[str, ...]
    choices: dict[str, str]


@dataclass(frozen=True)
class Results:
    """An experiment's results.

    Attributes:
        settings: the experiment as it was run, without places of this machine.
        arms: in the order of the tables. measures: of each arm and seed; fewer where the experiment is not finished.
        baseline: log-mel statistics, which nothing trains.
        audits: what the audit of training shards against probe shards found, a line each.
        environment: versions, machine, date.
    """

    name: str
    title: str
    question: str
    reference: str
    seeds: tuple[int, ...]
    probe_seeds: int
    arms: tuple[ArmFacts, ...]
    measures: tuple[Measure, ...]
    baseline: dict[str, TaskResult]
    audits: tuple[str, ...]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, TaskResult]:
        """Return one result of each task, for its title and domain."""
        return {
            name: result
            for measure in reversed(self.measures)
            for name, result in measure.tasks.items()
        }

    @property
    def answers(self) -> list[str]:
        return list(dict.fromkeys(name for measure in self.measures for name in measure.answers))

    def of(self, arm: str) -> list[Measure]:
        """Return the measures of an arm, seed by seed."""
        return sorted(
            (measure for measure in self.measures if measure.arm == arm),
            key=lambda measure: measure.seed,
        )

    def to_json(self) -> str:
        return json.dumps(
            {"version": RESULTS_VERSION, **asdict(self)}, indent=1, ensure_ascii=False
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read `save`'s file.

        Raises:
            UserError: missing, of another version, or damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("version") != RESULTS_VERSION:
                raise ValueError("another version")
            tupled = {name: tuple(data[name]) for name in ("seeds", "audits")}
            arms = tuple(
                ArmFacts(arm["name"], tuple(arm["titles"]), arm["choices"]) for arm in data["arms"]
            )
            measures = tuple(_measure(measure) for measure in data["measures"])
            return cls(
                **data
                | tupled
                | {"arms": arms, "measures": measures, "baseline": _tasks(data["baseline"])}
            )
        except OSError as error:
            raise UserError(f"Cannot read results from {path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} does not hold results of this release ({error!r}). Run whisper-aut experiment again."
            ) from None


def _measure(data: dict[str, Any]) -> Measure:
    curve = tuple(Point(**point) for point in data["curve"])
    cost = Cost(**data["cost"]) if data["cost"] else None
    return Measure(
        **data
        | {
            "tasks": _tasks(data["tasks"]),
            "curve": curve,
            "cost": cost,
            "commands": tuple(data["commands"]),
        }
    )


def _tasks(data: dict[str, Any]) -> dict[str, TaskResult]:
    return {name: TaskResult(**result) for name, result in data.items()}
