"""An experiment → its arms and the runs that they need, in the order in which they can be made.

In: `ExperimentSettings`. Out: `Arm`s, each with one `Run` a seed; a run is a config, overrides and a start, which is a run itself. Next:
`experiments.runs` makes what is missing. Arms that differ only in how they are heard share their runs.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from whisper_aut.errors import UserError, nearest
from whisper_aut.experiments.settings import (
    RANDOM,
    ChoiceSettings,
    EvaluateSettings,
    ExperimentSettings,
    flatten,
)
from whisper_aut.schema import find_config

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


def runs_of(arms: Sequence[Arm]) -> list[Run]:
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
