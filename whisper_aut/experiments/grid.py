"""The typed schema under `conf/experiments/*.yaml`.

In: an experiment's file and overrides. Out: `ExperimentSettings`, checked to the last key. Next: `experiments.grid` lays out its arms.
A file may say `extends: base.yaml`; lists replace those of the base, mappings are merged.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from whisper_aut.config import (
    CorporaSettings,
    ManifestSettings,
    Settings,
    build,
    compose,
    find_config,
    load_settings,
)
from whisper_aut.errors import UserError, nearest
from whisper_aut.models.decoders import check_decoder
from whisper_aut.pipeline import Story, prepare_corpora, run_pipeline
from whisper_aut.training.factory import build_forecast, planned_config, run_fingerprint
from whisper_aut.training.run_dir import RunDirectory, list_runs
from whisper_aut.utils import file_lock

RANDOM = "random:"  # before the name of a start: its shape, new weights


@dataclass
class StartSettings:
    """A run that arms start from, or are compared by: a config, what is changed in it, and the start that it has itself.

    Starts are shared: by all arms of a seed, and by experiments that define them alike.
    """

    config: str
    set: dict[str, Any] = field(default_factory=dict)
    start: str = ""


@dataclass
class EvaluateSettings:
    """How an arm's encoder is heard by the probes, where that is not as it was trained.

    Attributes:
        padding: `none` or `30s`; empty for the padding of its training.
        pooling: over a clip's own frames: `mean` or `mean_std`.
        layer: of the encoder, 0 for what enters the first; null for its output.
    """

    padding: Literal["", "none", "30s"] = ""
    pooling: str = ""
    layer: int | None = None


@dataclass
class ChoiceSettings:
    """One choice of an axis: what it changes in training, where it starts, how it is heard."""

    title: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


@dataclass
class ProbeSetSettings:
    """Probe tasks that lie under one `root`, and the manifests from which their shards are built.

    Attributes:
        optional: left out, which is said, where the manifests are not there.
    """

    root: str
    tasks: list[str]
    manifests: list[ManifestSettings] = field(default_factory=list)
    optional: bool = False


@dataclass
class PrimarySettings:
    """The one comparison that the experiment is for, named before anything is trained.

    Attributes:
        arm: that is compared with the reference.
        endpoint: a domain of the probes, `answers`, `loss` (the final validation loss) or `compute`
            (FLOPs to the lowest threshold that every training reaches).
    """

    arm: str = ""
    endpoint: Literal["", "speech", "sound", "music", "answers", "loss", "compute"] = ""


@dataclass
class AnswerSettings:
    """Questions that arms with a language model are asked after training: task of `conf/instructions` → shards of a test split."""

    tasks: dict[str, str] = field(default_factory=dict)
    limit: int | None = None


@dataclass
class PaddedSettings:
    """Budget and probes of runs that pad every clip to 30 s: steps, clips a step, probe sets that are small enough to be padded too."""

    steps: int = 0
    clips: int = 0
    probes: list[ProbeSetSettings] = field(default_factory=list)


@dataclass
class DataSettings:
    """What an experiment trains and tests on, picked by `data=NAME` from its folder `data/`; other keys refer to these.

    Attributes:
        suffix: of the experiment's name, so that results on other data lie beside each other.
        speech, aut, uniwhisper: run configs of the speech model and of its two adaptations.
        steps: budgets, by what they are for.
        padding: what the experiment on padding runs on.
    """

    name: str
    speech: str
    aut: str
    uniwhisper: str
    steps: dict[str, int]
    suffix: str = ""
    probes: list[ProbeSetSettings] = field(default_factory=list)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    padding: PaddedSettings = field(default_factory=PaddedSettings)
    thresholds: list[float] = field(default_factory=list)


@dataclass
class FigureSettings:
    """What the figure shows: the axis along x, the axes told by colour and by line; loss curves where `curves` is set.

    Attributes:
        ordered: whether the choices along x have an order; if so, points are joined.
    """

    x: str
    colour: str = ""
    line: str = ""
    curves: bool = False
    ordered: bool = True


@dataclass
class ExperimentSettings:
    """One experiment.

    Attributes:
        config: what every arm trains, beside the folder `conf`; empty where arms are encoders of the starts, which are only measured.
        axes: name → choices; the arms are all combinations of one choice of each.
        leave_out: arms that are not run, by name.
        reference: the arm that all others are compared with.
        primary: the comparison that is tested by itself, before all others; without one all are
            corrected together.
        margin: an arm that is worse by less, in points, counts as no worse; null makes no such claim.
        set: what is changed in the config of every arm. everywhere: in that of every run, starts included.
        seeds: each of which every arm is trained with; a claim needs five.
        probe_seeds: of probes with a random start, for each arm and seed; linear probes are fitted once.
        thresholds: validation losses whose price is read off.
        price: show what the arms' own runs cost.
        log_mel: score plain log-mel statistics beside the arms.
        data: where probes, answers and configs above come from, if they name it.
        conf: folder of run configs and `probe_tasks/`, from here.
        root: the user's own corpora; manifests refer to it.
    """

    name: str
    title: str
    question: str
    figure: FigureSettings
    axes: dict[str, dict[str, ChoiceSettings]]
    seeds: list[int]
    reference: str
    primary: PrimarySettings = field(default_factory=PrimarySettings)
    margin: float | None = None
    config: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    everywhere: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, StartSettings] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)
    corpora: CorporaSettings = field(default_factory=CorporaSettings)
    probes: list[ProbeSetSettings] = field(default_factory=list)
    probe_seeds: int = 3
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    thresholds: list[float] = field(default_factory=list)
    price: bool = True
    log_mel: bool = True
    data: DataSettings | None = None
    conf: str = ".."
    runs: str = "runs/experiments"
    root: str = "data/corpora"


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentSettings:
    """Read an experiment and check all that needs neither data nor weights.

    Raises:
        UserError: listing all problems.
    """
    settings = build(ExperimentSettings, compose(path, overrides, "experiments"), str(path))
    problems = [
        *_number_problems(settings),
        *_start_problems(settings),
        *_figure_problems(settings),
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{path} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{listed}")
    return settings


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys with dots between them: `{trainer: {max_steps: 3}}` → `{trainer.max_steps: 3}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        )
    return flat


def _number_problems(settings: ExperimentSettings) -> list[str]:
    problems = []
    if not settings.seeds:
        problems.append("seeds: at least 1 is needed")
    if len(set(settings.seeds)) < len(settings.seeds) or any(seed < 0 for seed in settings.seeds):
        problems.append(f"seeds: {settings.seeds} are not different numbers from 0 on")
    if not 1 <= settings.probe_seeds <= 9:
        problems.append(f"probe_seeds: {settings.probe_seeds} is not between 1 and 9")
    if bool(settings.primary.arm) != bool(settings.primary.endpoint):
        problems.append("primary: needs both an arm and an endpoint")
    if settings.margin is not None and settings.margin <= 0:
        problems.append(
            f"margin: {settings.margin:g} is not above 0; null makes no claim of no worse"
        )
    if not settings.probes and not settings.answers.tasks:
        problems.append("probes: nothing is measured; name probe tasks or answers")
    return problems


def _start_problems(settings: ExperimentSettings) -> list[str]:
    """Say which starts are named but not defined, lead back to themselves, or compete."""
    problems = [
        f"axes.{axis}: has no choice" for axis, choices in settings.axes.items() if not choices
    ]
    used = {f"starts.{name}.start": start.start for name, start in settings.starts.items()}
    givers = [
        axis
        for axis, choices in settings.axes.items()
        if any(choice.start for choice in choices.values())
    ]
    for axis in givers:
        used |= {
            f"axes.{axis}.{name}.start": choice.start
            for name, choice in settings.axes[axis].items()
        }
    for place, start in used.items():
        name = start.removeprefix(RANDOM)
        if name and name not in settings.starts:
            known = ", ".join(settings.starts) or "none"
            problems.append(
                f"{place}: there is no start {name!r}.{nearest(name, settings.starts)} There are: {known}"
            )
    if len(givers) > 1:
        problems.append(f"axes: only one axis can say where arms start; {' and '.join(givers)} do")
    if not settings.config and not givers:
        problems.append(
            "config: missing; without one, an axis must say by `start` which encoders are measured"
        )
    for name in settings.starts:
        seen, current = [name], settings.starts[name].start.removeprefix(RANDOM)
        while current in settings.starts and current not in seen:
            seen.append(current)
            current = settings.starts[current].start.removeprefix(RANDOM)
        if current in seen:
            problems.append(
                f"starts.{name}: leads back to itself by {' → '.join([*seen, current])}"
            )
    return problems


def _figure_problems(settings: ExperimentSettings) -> list[str]:
    shown = {"x": settings.figure.x, "colour": settings.figure.colour, "line": settings.figure.line}
    return [
        f"figure.{place}: there is no axis {axis!r}.{nearest(axis, settings.axes)} There are: {', '.join(settings.axes)}"
        for place, axis in shown.items()
        if (axis or place == "x") and axis not in settings.axes
    ]


BETWEEN = "/"  # the choices of an arm's name


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        config: path of its YAML.
        overrides: `key=value`, without its start, whose place is known only when it is there.
        start: the run whose export it starts from; None where the config says its own.
        random: take the shape of the start, but new weights.
    """

    name: str
    config: Path
    overrides: tuple[str, ...]
    start: "Run | None" = None
    random: bool = False

    def chain(self) -> "list[Run]":
        """Return all runs that have to be there for this one, itself last."""
        return [*(self.start.chain() if self.start else []), self]


@dataclass(frozen=True)
class Arm:
    """One combination of choices.

    Attributes:
        name: the choices' names, joined.
        titles: what tables call each choice, axis by axis.
        choices: axis → choice.
        evaluate: how its encoders are heard.
        runs: seed → the run that gives its encoder.
        random: the encoder has the shape of the run's, but new weights: nothing is trained.
    """

    name: str
    titles: tuple[str, ...]
    choices: dict[str, str]
    evaluate: EvaluateSettings
    runs: dict[int, Run]
    random: bool


def arms_of(settings: ExperimentSettings, path: Path) -> list[Arm]:
    """Lay out all arms of an experiment.

    Args:
        path: of its YAML; configs are found from there.

    Raises:
        UserError: the reference, the primary arm, or an arm that is left out is not among them.
    """
    arms = []
    for combination in product(*(choices.items() for choices in settings.axes.values())):
        name = BETWEEN.join(choice for choice, _ in combination)
        if name not in settings.leave_out:
            arms.append(_arm(settings, path, name, combination))
    names = [arm.name for arm in arms]
    for key, name in (("reference", settings.reference), ("primary.arm", settings.primary.arm)):
        if name not in names and (name or key == "reference"):
            raise UserError(
                f"{path}: {key}: there is no arm {name!r}.{nearest(name, names)} "
                f"Arms: {', '.join(names) or 'none'}."
            )
    if settings.primary.arm == settings.reference:
        raise UserError(
            f"{path}: primary.arm: {settings.reference} is the reference; "
            "name an arm to compare with it."
        )
    everything = [BETWEEN.join(combination) for combination in product(*settings.axes.values())]
    unknown = [name for name in settings.leave_out if name not in everything]
    if unknown:
        raise UserError(
            f"{path}: leave_out: there is no arm {unknown[0]!r}.{nearest(unknown[0], everything)}"
        )
    return arms


def all_runs(arms: Sequence[Arm]) -> list[Run]:
    """Return every run once, starts before what starts from them, seed by seed: whatever is there after a stop can be compared."""
    seeds = list(dict.fromkeys(seed for arm in arms for seed in arm.runs))
    found: dict[str, Run] = {}
    for seed in seeds:
        for arm in arms:
            found |= {run.name: run for run in arm.runs[seed].chain()}
    return list(found.values())


def conf_folder(settings: ExperimentSettings, path: Path) -> Path:
    """Return the folder of run configs and probe tasks, as short as it can be said."""
    return Path(os.path.normpath(path.parent / settings.conf))


def _arm(
    settings: ExperimentSettings,
    path: Path,
    name: str,
    combination: Sequence[tuple[str, ChoiceSettings]],
) -> Arm:
    start = next((choice.start for _, choice in combination if choice.start), "")
    changing = [(chosen, choice) for chosen, choice in combination if choice.set or choice.start]
    heard = EvaluateSettings()
    for _, choice in combination:
        given = choice.evaluate
        heard = EvaluateSettings(
            given.padding or heard.padding,
            given.pooling or heard.pooling,
            heard.layer if given.layer is None else given.layer,
        )
    runs = {}
    for seed in settings.seeds:
        if settings.config:
            sets = [settings.set, *(choice.set for _, choice in changing)]
            slug = "-".join([settings.name, *(chosen for chosen, _ in changing)])
            runs[seed] = _run(settings, path, slug, settings.config, sets, start, seed)
        else:
            runs[seed] = _start(settings, path, start.removeprefix(RANDOM), seed)
    return Arm(
        name=name,
        titles=tuple(choice.title or chosen for chosen, choice in combination),
        choices=dict(zip(settings.axes, (chosen for chosen, _ in combination), strict=True)),
        evaluate=heard,
        runs=runs,
        random=not settings.config and start.startswith(RANDOM),
    )


def _start(settings: ExperimentSettings, path: Path, name: str, seed: int) -> Run:
    chosen = settings.starts[name]
    return _run(settings, path, f"start-{name}", chosen.config, [chosen.set], chosen.start, seed)


def _run(
    settings: ExperimentSettings,
    path: Path,
    name: str,
    config: str,
    sets: Sequence[dict[str, Any]],
    start: str,
    seed: int,
) -> Run:
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-s{seed}"
    places = {"name": name, "seed": seed, "runs": settings.runs, "probe.tasks": []}
    return Run(
        name=name,
        config=find_config(config, conf_folder(settings, path)),
        overrides=tuple(
            _written(pair) for pair in _pairs({**_merged([settings.everywhere, *sets]), **places})
        ),
        start=_start(settings, path, start.removeprefix(RANDOM), seed) if start else None,
        random=start.startswith(RANDOM),
    )


def _merged(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for values in sets:
        merged |= flatten(values)
    return merged


def _pairs(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield groups, which have no dot, first: what is set inside one would be lost where it is picked later."""
    yield from sorted(values.items(), key=lambda pair: "." in pair[0])


def _written(pair: tuple[str, Any]) -> str:
    key, value = pair
    if isinstance(value, str):
        return f"{key}={value}"
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix('...' + chr(10)).strip()}"


State = Literal["done", "begun", "missing"]


@dataclass(frozen=True)
class Found:
    """A run as it lies on disk.

    Attributes:
        overrides: all of them, the start included.
        directory: of the finished or unfinished run; None where there is neither.
    """

    run: Run
    settings: Settings
    overrides: tuple[str, ...]
    state: State
    directory: RunDirectory | None

    @property
    def command(self) -> str:
        """The command that makes this run by itself."""
        return shlex.join(["whisper-aut", "train", str(self.run.config), *self.overrides])

    @property
    def kind(self) -> Literal["encoder", "whisper"]:
        """What others start from: with its decoder, where it exports that."""
        whole = (
            "whisper" in self.settings.export
            and "whisper" in check_decoder(self.settings.decoder)[0].exports
        )
        return "whisper" if whole else "encoder"

    def export(self) -> Path:
        """Return the exported model of a finished run."""
        assert self.directory is not None, self.run.name
        return self.directory.export(self.kind)


def find(run: Run) -> Found:
    """Look for a run under its name, whatever its place in time: an older one that fits is as good as the newest.

    Raises:
        UserError: a mistake in its config.
    """
    start = find(run.start) if run.start else None
    overrides = run.overrides + (_start_overrides(run, start) if start else ())
    settings = load_settings(run.config, overrides)
    if start and start.state != "done":
        return Found(run, settings, overrides, "missing", None)
    try:
        fingerprint = run_fingerprint(settings)
    except UserError:  # its shards are not built yet
        return Found(run, settings, overrides, "missing", None)
    exports = [
        kind for kind in settings.export if kind in check_decoder(settings.decoder)[0].exports
    ]
    begun = None
    for directory in list_runs(Path(settings.runs), settings.name):
        if directory.finished_with(fingerprint) and all(
            directory.export(kind).is_dir() for kind in exports
        ):
            return Found(run, settings, overrides, "done", directory)
        if begun is None and _begun_with(directory, fingerprint):
            begun = directory
    return Found(run, settings, overrides, "begun" if begun else "missing", begun)


def make(run: Run, console: Console) -> Found:
    """Make a run, or go on with it, where it is not done; its start must be there.

    Raises:
        UserError: a mistake in its config or data.
        Interrupted: it was asked to stop.
    """
    place = find(run).settings
    with file_lock(Path(place.runs) / run.name):  # another process may be at the same experiment
        found = find(run)
        if found.state == "done":
            return found
        resume = (
            str(found.directory.path)
            if found.directory and _has_checkpoint(found.directory)
            else ""
        )
        story = Story(run.config, found.overrides, resume, report=False)
        run_pipeline(found.settings, story, console)
        found = find(run)
    if found.state != "done":
        raise UserError(
            f"{run.name} was trained, and its config or data changed meanwhile. Run the same command again: the rest is kept."
        )
    return found


def prepare(settings: ExperimentSettings, runs: Sequence[Run], console: Console) -> None:
    """Build the corpora of all runs and probes that are not there yet.

    Raises:
        UserError: a manifest is missing, or what is there cannot be used.
    """
    prepare_corpora(settings.corpora, console)
    seen: list[CorporaSettings] = []
    for run in runs:
        corpora = load_settings(run.config, run.overrides).corpora
        if corpora not in seen:
            prepare_corpora(corpora, console)
            seen.append(corpora)


@dataclass(frozen=True)
class Expected:
    """What a run would cost: optimiser steps, seconds of audio heard, and FLOPs; None where it cannot be told."""

    steps: int | None
    audio_seconds: float | None
    teraflop: float | None


def expected_cost(run: Run) -> Expected:
    """Plan a run as `whisper-aut plan` does; a start that is not there yet is taken for what its config says."""
    settings = load_settings(run.config, run.overrides)
    origin = run
    while origin.start:
        origin = origin.start
    first = load_settings(origin.config, origin.overrides)
    try:
        forecast = build_forecast(settings, planned_config(first.model))
    except UserError:
        return Expected(settings.trainer.max_steps, None, None)
    if forecast.steps is None:
        return Expected(None, None, None)
    times = forecast.steps * forecast.micro_batches
    return Expected(
        forecast.steps,
        forecast.steps * forecast.step_audio_seconds,
        times * forecast.cost.model_flops / 1e12,
    )


def _start_overrides(run: Run, start: Found) -> tuple[str, ...]:
    """Return the overrides that put the exported start in the place of the config's own."""
    path = (
        str(start.export())
        if start.state == "done"
        else f"{start.settings.runs}/{start.run.name}/…/export/{start.kind}"
    )
    return (
        f"model.path={path}",
        "model.after=",
        "model.scratch=null",
        *(("model.random_init=true",) if run.random else ()),
    )


def _begun_with(directory: RunDirectory, fingerprint: str) -> bool:
    """Return whether a run was begun with this config and data."""
    try:
        return json.loads(directory.environment.read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_checkpoint(directory: RunDirectory) -> bool:
    return directory.last_checkpoint.exists() and not directory.done.exists()
