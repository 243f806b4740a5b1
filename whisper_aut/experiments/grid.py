"""The grid of an experiment: its config, its arms, and the training runs that they need.

One YAML file in `conf/experiments` describes an experiment. A run is found on disk by its config
and data, so that a stopped experiment resumes when the same command runs again.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass as schema
from rich.console import Console

from whisper_aut.config import ManifestSettings, Settings, compose, find_config, load_settings
from whisper_aut.errors import UserError, nearest
from whisper_aut.loading import RANDOM_PREFIX
from whisper_aut.models.decoders import check_decoder
from whisper_aut.pipeline import PipelineOptions, run_pipeline
from whisper_aut.schema import STRICT, build
from whisper_aut.training.factory import run_fingerprint
from whisper_aut.training.run_dir import RunDirectory, list_runs
from whisper_aut.utils import file_lock, read_json

SEPARATOR = "/"  # between the choices in an arm's name
EndpointName = Literal["", "speech", "sound", "music", "answers", "loss", "compute"]


@schema(config=STRICT)
class EvaluateSettings:
    """How probes run an arm's encoder. By default: padding as in training, mean pooling, output.

    `layer` 0 is the input of the first layer.
    """

    padding: Literal["none", "30s"] | None = None
    pooling: str | None = None
    layer: int | None = None


@schema(config=STRICT)
class ChoiceSettings:
    """One choice of an axis: config overrides, the pretraining run to start from, evaluation.

    `init_from: random:NAME` takes only the architecture of the run, with random weights.
    """

    title: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    init_from: str = ""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


@schema(config=STRICT)
class TrainingSettings:
    """A training: its config, overrides, and the pretraining run that it starts from.

    All arms of a seed share their pretraining runs, and so do other experiments.
    """

    config: str
    set: dict[str, Any] = field(default_factory=dict)
    init_from: str = ""


@schema(config=STRICT)
class ProbeSetSettings:
    """Probe tasks with the same `root`, and the manifests from which their shards are built.

    Optional ones are skipped, with a message, if the manifests are missing.
    """

    root: str
    tasks: list[str]
    manifests: list[ManifestSettings] = field(default_factory=list)
    optional: bool = False


@schema(config=STRICT)
class AnswerSettings:
    """What language models are asked about test shards.

    Attributes:
        tasks: Task of `conf/instructions` → folders of test shards.
        limit: Use only the first N clips of each folder.
        max_new_tokens: The longest answer, in tokens.
    """

    tasks: dict[str, list[str]] = field(default_factory=dict)
    limit: int | None = None
    max_new_tokens: PositiveInt = 32


@schema(config=STRICT)
class PrimarySettings:
    """The main comparison, chosen before training: an arm, and a domain of the probes, `answers`,
    `loss` (final validation loss) or `compute` (FLOPs to the lowest threshold that all runs reach).
    """

    arm: str = ""
    endpoint: EndpointName = ""


@schema(config=STRICT)
class FigureSettings:
    """Axes of the figure. `ordered`: join points along x. `curves`: draw validation losses."""

    x: str
    colour: str = ""
    curves: bool = False
    ordered: bool = True


@schema(config=STRICT, kw_only=True)
class QuestionSettings:
    """What an experiment asks, and how its arms are compared and drawn. Stored with its results.

    Attributes:
        reference: The arm that all others are compared with.
        primary: The comparison that is tested alone, before all others.
        margin: In points; worse by less than this is `no worse`.
        thresholds: Validation losses at which costs are compared.
    """

    name: str
    title: str
    question: str
    reference: str
    primary: PrimarySettings = field(default_factory=PrimarySettings)
    margin: PositiveFloat | None = None
    thresholds: list[float] = field(default_factory=list)
    figure: FigureSettings


@schema(config=STRICT, kw_only=True)
class ExperimentSettings(QuestionSettings):
    """One experiment.

    Attributes:
        config: What each arm trains. If empty, arms only measure pretraining runs.
        axes: Axis → choice → settings. Arms are all combinations of one choice per axis.
        set: Overrides for every arm. `everywhere` also applies to pretraining runs.
        data: Values for interpolation, from a file of `conf/experiments/data`.
        runs: Folder of the training runs.
        root: The user's corpora; manifests refer to it.
    """

    axes: dict[str, Annotated[dict[str, ChoiceSettings], Field(min_length=1)]]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    config: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    everywhere: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, TrainingSettings] = field(default_factory=dict)
    probes: list[ProbeSetSettings] = field(default_factory=list)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    data: dict[str, Any] = field(default_factory=dict)
    runs: str = "runs/experiments"
    root: str = "data/corpora"

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [*self._problems_of_arms(), *self._problems_of_pretraining()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems_of_arms(self) -> Iterator[str]:
        primary = self.primary
        arms = [SEPARATOR.join(names) for names in product(*self.axes.values())]
        for key, arm in (("reference", self.reference), ("primary.arm", primary.arm)):
            if arm not in arms and (arm or key == "reference"):
                hint = nearest(arm, arms)
                yield f"{key}: there is no arm {arm!r}.{hint} Arms: {', '.join(arms)}."
        if primary.arm == self.reference:
            yield f"primary.arm: {primary.arm} is the reference"
        if bool(primary.arm) != bool(primary.endpoint):
            yield "primary: give both arm and endpoint"
        for key, axis in (("x", self.figure.x), ("colour", self.figure.colour)):
            if (axis or key == "x") and axis not in self.axes:
                yield f"figure.{key}: there is no axis {axis!r}.{nearest(axis, self.axes)}"
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: {self.seeds} must be different"
        if not self.probes and not self.answers.tasks:
            yield "probes: nothing is measured; give probe tasks or answers"

    def _problems_of_pretraining(self) -> Iterator[str]:
        used = {f"pretraining.{name}": one.init_from for name, one in self.pretraining.items()}
        starting_axes = []
        for axis, choices in self.axes.items():
            used |= {f"axes.{axis}.{name}": choice.init_from for name, choice in choices.items()}
            starting_axes += [axis] if any(one.init_from for one in choices.values()) else []
        for key, value in used.items():
            name = value.removeprefix(RANDOM_PREFIX)
            if value and name not in self.pretraining:
                hint = nearest(name, self.pretraining)
                yield f"{key}.init_from: there is no pretraining run {name!r}.{hint}"
        if len(starting_axes) > 1:
            yield f"axes: only one axis can have init_from, not {' and '.join(starting_axes)}"
        if not self.config and not starting_axes:
            yield "config: missing; without it, one axis must have init_from"
        for name in self.pretraining:
            chain = [name]
            while chain[-1] in self.pretraining and chain.count(chain[-1]) == 1:
                chain.append(self.pretraining[chain[-1]].init_from.removeprefix(RANDOM_PREFIX))
            if chain[-1] in self.pretraining:
                yield f"pretraining.{name}: starts from itself: {' → '.join(chain)}"


@dataclass(frozen=True)
class Run:
    """A training run: a config with `key=value` overrides.

    Attributes:
        pretrained: The run whose export it starts from; None for the config's own checkpoint.
        random: Start from the architecture of `pretrained`, with random weights.
    """

    name: str
    config: Path
    overrides: tuple[str, ...]
    pretrained: "Run | None" = None
    random: bool = False

    def chain(self) -> "list[Run]":
        """Return the runs that this one needs, in the order of training, and this one."""
        return [*(self.pretrained.chain() if self.pretrained else []), self]


@dataclass(frozen=True)
class Arm:
    """A combination of choices.

    Attributes:
        name: The names of the choices, joined.
        titles: Axis → title of the choice.
        runs: Seed → the run whose encoder is measured.
        random: Measure the architecture of the run's encoder with random weights.
    """

    name: str
    titles: dict[str, str]
    evaluate: EvaluateSettings
    runs: dict[int, Run]
    random: bool


@dataclass(frozen=True)
class Experiment:
    """The settings of an experiment and what follows from them.

    Attributes:
        conf: The folder above its YAML file, in which configs and probe tasks are searched first.
        arms: All combinations of choices.
        runs: Every run once: seed by seed, pretraining before the runs that start from it.
    """

    settings: ExperimentSettings
    conf: Path
    arms: list[Arm]
    runs: list[Run]


@dataclass(frozen=True)
class FoundRun:
    """A run and its state on disk. Its settings include the path of the pretrained checkpoint."""

    run: Run
    settings: Settings
    state: Literal["done", "unfinished", "missing"]
    directory: RunDirectory

    @property
    def export(self) -> Path:
        """The exported model that other runs start from: with its decoder if it has one."""
        kind = "whisper" if "whisper" in _exports(self.settings) else "encoder"
        return self.directory.export(kind)


def load_experiment(name: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment and check what needs neither data nor weights.

    `name` is a YAML file, or the name of one in `conf/experiments`. Overrides are `key=value` or
    `data=choice`.

    Raises:
        UserError: Lists all problems.
    """
    path = find_config(name, kind="experiments")
    settings = build(ExperimentSettings, compose(path, overrides, "experiments"), str(path))
    conf = Path(os.path.normpath(path.parent / ".."))
    combinations = product(*(choices.items() for choices in settings.axes.values()))
    arms = [_build_arm(settings, conf, combination) for combination in combinations]
    runs: dict[str, Run] = {}
    for run in (run for seed in settings.seeds for arm in arms for run in arm.runs[seed].chain()):
        if runs.setdefault(run.name, run) != run:
            raise UserError(
                f"{path}: two different runs would have the name {run.name}. Give each choice a "
                "name of its own, also in different axes."
            )
    return Experiment(settings, conf, arms, list(runs.values()))


def _build_arm(
    settings: ExperimentSettings, conf: Path, combination: Sequence[tuple[str, ChoiceSettings]]
) -> Arm:
    names, choices = zip(*combination, strict=True)
    init_from = next((choice.init_from for choice in choices if choice.init_from), "")
    evaluation: dict[str, Any] = {}
    changes = flatten(settings.set)
    for choice in choices:
        evaluation |= {
            key: value for key, value in vars(choice.evaluate).items() if value is not None
        }
        changes |= flatten(choice.set)
    if settings.config:
        # Arms that differ only in evaluation share their run.
        trained = [name for name, choice in combination if choice.set or choice.init_from]
        name = "-".join([settings.name, *trained])
        training = TrainingSettings(settings.config, changes, init_from)
    else:
        name = init_from.removeprefix(RANDOM_PREFIX)
        name, training = f"pretrained-{name}", settings.pretraining[name]
    return Arm(
        name=SEPARATOR.join(names),
        titles={
            axis: choice.title or name
            for axis, (name, choice) in zip(settings.axes, combination, strict=True)
        },
        evaluate=EvaluateSettings(**evaluation),
        runs={seed: _build_run(settings, conf, name, training, seed) for seed in settings.seeds},
        random=not settings.config and init_from.startswith(RANDOM_PREFIX),
    )


def _build_run(
    settings: ExperimentSettings, conf: Path, name: str, training: TrainingSettings, seed: int
) -> Run:
    name, pretrained = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-s{seed}", None
    first = training.init_from.removeprefix(RANDOM_PREFIX)
    values = flatten(settings.everywhere) | flatten(training.set)
    values |= {"name": name, "seed": seed, "runs": settings.runs, "probe.tasks": []}
    overrides = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    ]
    # Groups, which have no dot, come first: choosing one resets the values inside it.
    overrides.sort(key=lambda override: "." in override.partition("=")[0])
    if first:
        before = settings.pretraining[first]
        pretrained = _build_run(settings, conf, f"pretrained-{first}", before, seed)
    config, is_random = find_config(training.config, conf), first != training.init_from
    return Run(name, config, tuple(overrides), pretrained, is_random)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys joined by dots: `{trainer: {max_steps: 3}}` → `{trainer.max_steps: 3}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def find_run(run: Run) -> FoundRun:
    """Look for a finished run with this config and data, however old, or one to resume."""
    overrides, pretrained = run.overrides, find_run(run.pretrained) if run.pretrained else None
    if pretrained:
        overrides += (f"model.path={pretrained.export}", "model.after=", "model.scratch=null")
        overrides += ("model.random_init=true",) if run.random else ()
    settings = load_settings(run.config, overrides)
    exports, root = _exports(settings), Path(settings.runs)
    missing = FoundRun(run, settings, "missing", RunDirectory(root / run.name / "…"))
    if pretrained and pretrained.state != "done":
        return missing
    try:
        fingerprint = run_fingerprint(settings)
    except UserError:  # its shards are not built yet
        return missing
    directories = list_runs(root, settings.name)
    for directory in directories:
        exported = all(directory.export(kind).is_dir() for kind in exports)
        if directory.finished_with(fingerprint) and exported:
            return replace(missing, state="done", directory=directory)
    for directory in directories:
        begun = read_json(directory.environment, default={}).get("fingerprint") == fingerprint
        if begun and directory.last_checkpoint.exists() and not directory.done.exists():
            return replace(missing, state="unfinished", directory=directory)
    return missing


def _exports(settings: Settings) -> list[str]:
    decoder, _ = check_decoder(settings.decoder)
    return [kind for kind in settings.export if kind in decoder.exports]


def make_run(run: Run, console: Console) -> FoundRun:
    """Train or resume a run that is not finished; its pretraining run must be finished."""
    folder = Path(find_run(run).settings.runs)
    with file_lock(folder / run.name):  # other processes may work on the same experiment
        found = find_run(run)
        if found.state != "done":
            resume = str(found.directory.path) if found.state == "unfinished" else ""
            options = PipelineOptions(run.config, resume=resume, report=False)
            directory = run_pipeline(found.settings, options, console)
            found = replace(found, state="done", directory=directory)
    return found
