"""Definition of a probe task: one YAML that names shard folders, splits, label, metric and
licence.

Adding a task takes one YAML in `conf/probe_tasks/` and no code. Splits are always stated, never
drawn, so official folds stay as published.
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
    """How the clips of a task are divided.

    Attributes:
        scheme: `splits` uses the task's `train`, `valid` and `test`. `folds` uses official
            folds: each fold is the test part once, for probes trained on the others.
        folds: one shard folder, URL or pattern of tars per fold.
    """

    scheme: Literal["splits", "folds"] = "splits"
    folds: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ProbeTask:
    """One probe task over shards.

    Attributes:
        name: identifier in commands and file names.
        title: name in tables.
        domain: scores are averaged within a domain.
        train, valid, test: shard folders, URLs, or patterns of tars (`FOLDER/test-*.tar`).
            `{root}` is replaced by the data folder of the run. Without `valid`, a stratified
            fraction of `train` is held out to select settings. Empty for a task with folds.
        split: splits or folds.
        metric: a key of `METRICS`. It determines the kind of answer.
        kind: the probe kind, a key of `probes.kinds.KINDS`. Empty selects the default for the
            metric.
        label: annotation field, or field of the sample's JSON, that holds the class, the
            classes, the events, or the transcript. For captions, a pattern of fields such as
            `caption*`.
        separator: separates several classes within one text, e.g. `;`.
        event: the fields of an event: start (seconds), end (seconds) and class.
        select: keep only clips whose field has one of these values.
        group: annotation field, or field of the sample's JSON, that says which clips belong
            together: speaker, source recording, song. Intervals and tests then count each group
            once. `key` is the sample's name. A clip without the field is its own group.
        group_pattern: regular expression applied to the group field, e.g. `^(\\d+)-` for `key`.
            Its first capturing group is used, or the whole match if it has none.
        weight: weight in weighted averages: the number of test clips, unless there is an agreed
            value.
        source: where the data comes from.
        licence: licence of the data.
        classes: the expected number of classes, if known.
        crop_seconds: use only the first `crop_seconds` of a clip.
        segment_seconds: length of the segments on which events are scored.
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
        """The kind of answer that the metric needs."""
        return ANSWERS[self.metric]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the splits or of the folds."""
        if self.split.scheme == "folds":
            return tuple(f"fold {number}" for number in range(1, len(self.split.folds) + 1))
        return SPLITS

    def folders(self, part: str, root: str | Path | None) -> list[str]:
        """Return the folders of a split or fold, with `{root}` filled in.

        Raises:
            UserError: if a folder needs `{root}` and `root` is None.
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
        """Return the folders that are scored: the test split, or every fold."""
        parts = self.parts if self.split.scheme == "folds" else ("test",)
        return [folder for part in parts for folder in self.folders(part, root)]


@dataclass(frozen=True)
class ProbeSuites:
    """Named lists of tasks (`conf/probe.yaml`)."""

    suites: dict[str, list[str]] = field(default_factory=dict)


def list_tasks(task_folder: str | Path) -> list[str]:
    """Return the sorted names of the tasks in `task_folder` and of those shipped with the
    package.
    """
    folders = (Path(task_folder), SHIPPED / "probe_tasks")
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_task(name_or_path: str | Path, task_folder: str | Path) -> ProbeTask:
    """Load and check a task by name or by the path of its YAML.

    Args:
        name_or_path: a name is looked up in `task_folder` first, then among the shipped tasks.
        task_folder: folder of task YAMLs.

    Raises:
        UserError: if there is no such task, the file is not YAML, or it has problems. All
            problems are listed.
    """
    given = str(name_or_path)
    is_path = given.endswith((".yaml", ".yml")) or "/" in given
    path = (
        Path(given) if is_path else find_config(f"{given}.yaml", Path(task_folder), "probe_tasks")
    )
    if not path.is_file():
        known = list_tasks(task_folder)
        raise UserError(
            f"There is no probe task {given!r}.{nearest(given, known)} Known tasks: "
            f"{', '.join(known) or 'none'}. "
            "The path of a YAML is taken too."
        )
    return task_from_mapping(_mapping(path, "the keys of a probe task"), str(path))


def expand_suites(names: Sequence[str], suites: str | Path) -> list[str]:
    """Replace each suite name by its tasks. Duplicates are dropped.

    Args:
        names: names of tasks or suites, or paths of tasks.
        suites: YAML that lists suites. The shipped suites are always available; this file
            overrides them.

    Raises:
        UserError: if the YAML has problems.
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
    """Check the keys and values of a task and build it.

    Args:
        values: the content of the YAML.
        where: origin of the values, for error messages.

    Raises:
        UserError: if there are problems. All of them are listed.
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
            f"segment_seconds: {task.metric} "
            f"{'needs a length' if task.answer == 'events' else 'takes none'}"
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
