"""What a probe task is: one YAML that names shard folders, splits, label, metric and terms.

In: `conf/probe_tasks/NAME.yaml`, or any path. Out: a checked `ProbeTask`. Next: `probes.embed` reads its folders, `probes.suite`
scores it. A new task is one YAML and nothing else. Splits are stated, never drawn: official folds stay as they were published.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from whisper_aut.config import SHIPPED, build, find_config
from whisper_aut.errors import UserError, nearest
from whisper_aut.probes.metrics import ANSWERS, METRICS, Answer

SPLITS = ("train", "valid", "test")

__all__ = [
    "METRICS",
    "SPLITS",
    "ProbeTask",
    "SplitScheme",
    "expand_suites",
    "list_tasks",
    "load_task",
    "task_from_mapping",
]


@dataclass(frozen=True)
class SplitScheme:
    """How a task's clips are divided: by `splits`, which the task's `train`, `valid` and `test` name, or by official `folds`,
    each a folder (or URL, or pattern of tars), each tested on once by probes that learned from the others."""

    scheme: Literal["splits", "folds"] = "splits"
    folds: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ProbeTask:
    """One task over shards.

    Attributes:
        name, title: for commands and files; for tables.
        domain: by which averages are taken.
        train, valid, test: shard folders, URLs, or patterns of tars (`FOLDER/test-*.tar`); `{root}` stands for the run's data folder.
            Without `valid`, a stratified share of `train` is held out to select settings. Empty for a task in folds.
        split: splits or folds.
        metric: a key of `METRICS`; it says what kind of answer the task wants.
        kind: the probe that answers it, a key of `probes.kinds.KINDS`; empty for the usual one of its metric.
        label: annotation field, or field of the sample's own JSON, that holds the class, the classes, the events, or the
            transcript; for captions a pattern of fields, such as `caption*`.
        separator: between the classes that one text holds, e.g. `;`.
        event: the fields of an event: start, end (seconds) and class.
        select: keep only clips whose field has one of the values.
        group: annotation field, or field of the sample's JSON, that says which clips belong together: speaker, source recording, song.
            Intervals and tests then count each group once. `key` is the sample's name. A clip without the field counts by itself.
        group_pattern: a regular expression of which the first group, or the match, is taken of the field, e.g. `^(\\d+)-` of `key`.
        weight: share in weighted averages; test clips, where nothing better is agreed.
        classes: how many classes there must be, where that is known.
        crop_seconds: only so much of a clip's beginning is heard.
        segment_seconds: for events, the grid on which they are scored.
    """

    name: str
    title: str
    domain: Literal["speech", "sound", "music"]
    train: list[str]
    test: list[str]
    valid: list[str] = field(default_factory=list)
    split: SplitScheme = field(default_factory=SplitScheme)
    metric: Literal[
        "accuracy", "mAP", "segment_f1_macro", "segment_f1_micro", "recall@1", "word_accuracy"
    ] = "accuracy"
    kind: str = ""
    label: str = "label"
    separator: str = ""
    event: list[str] = field(default_factory=lambda: ["onset", "offset", "label"])
    select: dict[str, list[str]] = field(default_factory=dict)
    group: str = ""
    group_pattern: str = ""
    weight: float = 1.0
    source: str = ""
    licence: str = ""
    classes: int | None = None
    crop_seconds: float | None = None
    segment_seconds: float = 0.0

    @property
    def answer(self) -> Answer:
        return ANSWERS[self.metric]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the splits, or of the folds."""
        if self.split.scheme == "folds":
            return tuple(f"fold {number}" for number in range(1, len(self.split.folds) + 1))
        return SPLITS

    def folders(self, part: str, root: str | Path | None) -> list[str]:
        """Return the folders of a split, or of a fold, with `{root}` filled in.

        Raises:
            UserError: a folder needs `{root}` and none was given.
        """
        folded = self.split.scheme == "folds"
        listed: list[str] = (
            [self.split.folds[self.parts.index(part)]] if folded else getattr(self, part)
        )
        if root is None and any("{root}" in folder for folder in listed):
            raise UserError(
                f"Probe task {self.name!r} lies under {{root}}: say which data folder that is."
            )
        return [folder.replace("{root}", str(root).rstrip("/")) for folder in listed]

    def tested_folders(self, root: str | Path | None) -> list[str]:
        """Return the folders that scores are read on: the test split, or every fold."""
        parts = self.parts if self.split.scheme == "folds" else ("test",)
        return [folder for part in parts for folder in self.folders(part, root)]


@dataclass(frozen=True)
class ProbeSuites:
    """Names for lists of tasks (`conf/probe.yaml`)."""

    suites: dict[str, list[str]] = field(default_factory=dict)


def list_tasks(task_folder: str | Path) -> list[str]:
    """Return the names of all tasks in a folder of YAMLs, and of those that the package has."""
    folders = (Path(task_folder), SHIPPED / "probe_tasks")
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_task(name_or_path: str | Path, task_folder: str | Path) -> ProbeTask:
    """Load and check a task by its name, or by the path of its YAML.

    Args:
        name_or_path: a name is looked up in `task_folder`, then among the package's own tasks.

    Raises:
        UserError: no such task, not YAML, or a file with problems, which are all listed.
    """
    given = str(name_or_path)
    is_path = given.endswith((".yaml", ".yml")) or "/" in given
    path = (
        Path(given) if is_path else find_config(f"{given}.yaml", Path(task_folder), "probe_tasks")
    )
    if not path.is_file():
        known = list_tasks(task_folder)
        raise UserError(
            f"There is no probe task {given!r}.{nearest(given, known)} Known tasks: {', '.join(known) or 'none'}. "
            "The path of a YAML is taken too."
        )
    return task_from_mapping(_mapping(path, "the keys of a probe task"), str(path))


def expand_suites(names: Sequence[str], suites: str | Path) -> list[str]:
    """Put the tasks of a suite in its place, each task once.

    Args:
        names: of tasks, paths of tasks, or of suites.
        suites: the YAML that lists them; those of the package are known too.

    Raises:
        UserError: the YAML has problems.
    """
    listed: dict[str, list[str]] = {}
    for path in (SHIPPED / "probe.yaml", Path(suites)):
        if path.is_file():
            listed |= build(ProbeSuites, _mapping(path, "`suites`"), str(path)).suites
    return list(dict.fromkeys(task for name in names for task in listed.get(name, [name])))


def _mapping(path: Path, content: str) -> Mapping[str, Any]:
    try:
        config = OmegaConf.load(path)
        values = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} is not readable as YAML: {error}. Quote paths that begin with {{root}}."
        ) from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must hold {content}, not a list.")
    return values  # pyright: ignore[reportReturnType]


def task_from_mapping(values: Mapping[str, Any], where: str) -> ProbeTask:
    """Check a task's keys and values; `where` names their origin in the message.

    Raises:
        UserError: with every problem that was found.
    """
    scheme = values.get("split")
    if isinstance(scheme, Mapping) and scheme.get("scheme") == "folds":
        values = {"train": [], "test": [], **values}
    task = build(ProbeTask, values, where)
    problems = _split_problems(task) + _answer_problems(task)
    problems += [
        f"{key}: must not be empty"
        for key in ("name", "title", "label")
        if not getattr(task, key).strip()
    ]
    if not 0 < task.weight < float("inf"):
        problems.append(f"weight: must be above 0, got {task.weight:g}")
    if task.classes is not None and task.classes < 2:
        problems.append(f"classes: must be at least 2, got {task.classes}")
    problems += _folder_problems(task)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(
            f"{where} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{listed}"
        )
    return task


def _split_problems(task: ProbeTask) -> list[str]:
    if task.split.scheme == "splits":
        problems = [
            f"{split}: must name at least one shard folder"
            for split in ("train", "test")
            if not getattr(task, split)
        ]
        return problems + (["split.folds: needs split.scheme folds"] if task.split.folds else [])
    problems = [
        f"{split}: must be empty for a task in folds" for split in SPLITS if getattr(task, split)
    ]
    return problems + (
        ["split.folds: must name at least two folds"] if len(task.split.folds) < 2 else []
    )


def _answer_problems(task: ProbeTask) -> list[str]:
    problems = []
    if (task.answer == "events") != (task.segment_seconds > 0):
        problems.append(
            f"segment_seconds: {task.metric} {'needs a length' if task.answer == 'events' else 'takes none'}"
        )
    if len(task.event) != 3:
        problems.append("event: names three fields, those of start, end and class")
    if task.group_pattern and not task.group:
        problems.append("group_pattern: needs group, the field that it is looked for in")
    try:
        re.compile(task.group_pattern)
    except re.error as error:
        problems.append(f"group_pattern: {error}")
    if task.crop_seconds is not None and not task.crop_seconds > 0:
        problems.append(f"crop_seconds: must be above 0, got {task.crop_seconds:g}")
    return problems


def _folder_problems(task: ProbeTask) -> list[str]:
    problems, where = [], {}
    for split in task.parts:
        for folder in task.folders(split, "{root}"):
            if not _only_root(folder):
                problems.append(f"{split}: {folder!r} has another placeholder than {{root}}")
            first = where.setdefault(folder.rstrip("/"), split)
            if first != split:
                problems.append(f"{split}: {folder!r} is in {first} too")
    return problems


def _only_root(folder: str) -> bool:
    try:
        return all(
            name in (None, "root") and not spec and not how
            for _, name, spec, how in Formatter().parse(folder)
        )
    except ValueError:
        return False
