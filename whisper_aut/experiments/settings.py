"""The typed schema under `conf/experiments/*.yaml`.

In: an experiment's file and overrides. Out: `ExperimentSettings`, checked to the last key. Next: `experiments.grid` lays out its arms.
A file may say `extends: base.yaml`; lists replace those of the base, mappings are merged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from whisper_aut.errors import UserError, nearest
from whisper_aut.schema import build, compose
from whisper_aut.settings import CorporaSettings, ManifestSettings

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
