"""The runs of an experiment: which are there, which are missing, and making those.

In: `grid.Run`s. Out: their run directories. Next: `experiments.measure`. A run is what `whisper-aut train CONFIG key=value …` makes, by the
same function; it counts as done where `done.json` holds the fingerprint of config, data and release, and one that was interrupted goes
on from its last checkpoint.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from whisper_aut.errors import UserError
from whisper_aut.experiments.grid import Run
from whisper_aut.experiments.settings import ExperimentSettings
from whisper_aut.model.decoders import check_decoder
from whisper_aut.pipeline import Story, prepare_corpora, run_story
from whisper_aut.settings import CorporaSettings, Settings, load_settings
from whisper_aut.training.build import build_forecast, planned_config, run_fingerprint
from whisper_aut.training.rundir import RunDirectory, runs_of
from whisper_aut.turns import one_at_a_time

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
    for directory in runs_of(Path(settings.runs), settings.name):
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
    with one_at_a_time(
        Path(place.runs) / run.name
    ):  # another process may be at the same experiment
        found = find(run)
        if found.state == "done":
            return found
        resume = (
            str(found.directory.path)
            if found.directory and _has_checkpoint(found.directory)
            else ""
        )
        story = Story(run.config, found.overrides, resume, report=False)
        run_story(found.settings, story, console)
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
