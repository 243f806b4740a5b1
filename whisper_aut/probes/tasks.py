"""What a probe task is: one YAML that names shard folders, splits, label, metric and terms.

In: `conf/probe_tasks/NAME.yaml`, or any path. Out: a checked `ProbeTask`. Next: `probes.embed` reads its folders, `probes.suite`
scores it. A new task is one YAML and nothing else. Splits are stated, never drawn: official folds stay as they were published.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from whisper_aut.errors import UserError, nearest
from whisper_aut.schema import build

SPLITS = ("train", "valid", "test")

# A metric's name is torchmetrics' own; the value makes one for C classes, fed with `[B, C]` scores and `[B]` classes.
METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro", validate_args=False),
}


@dataclass(frozen=True)
class ProbeTask:
    """One classification task over shards.

    Attributes:
        name, title: for commands and files; for tables.
        domain: by which averages are taken.
        train, valid, test: shard folders or URLs; `{root}` stands for the run's data folder. Without `valid`, a stratified
            share of `train` is held out to select the penalty.
        metric: a key of `METRICS`.
        label: annotation field, or field of the sample's own JSON, that holds the class.
        select: keep only clips whose field has one of the values.
        weight: share in weighted averages; test clips, where nothing better is agreed.
        classes: how many classes there must be, where that is known.
    """

    name: str
    title: str
    domain: Literal["speech", "sound", "music"]
    train: list[str]
    test: list[str]
    valid: list[str] = field(default_factory=list)
    metric: Literal["accuracy"] = "accuracy"
    label: str = "label"
    select: dict[str, list[str]] = field(default_factory=dict)
    weight: float = 1.0
    source: str = ""
    licence: str = ""
    classes: int | None = None

    def folders(self, split: str, root: str | Path | None) -> list[str]:
        """Return a split's folders with `{root}` filled in.

        Raises:
            UserError: a folder needs `{root}` and none was given.
        """
        listed: list[str] = getattr(self, split)
        if root is None and any("{root}" in folder for folder in listed):
            raise UserError(f"Probe task {self.name!r} lies under {{root}}: say which data folder that is.")
        return [folder.replace("{root}", str(root).rstrip("/")) for folder in listed]


def list_tasks(task_folder: str | Path) -> list[str]:
    """Return the names of all tasks in a folder of YAMLs."""
    return sorted(path.stem for path in Path(task_folder).glob("*.yaml"))


def load_task(name_or_path: str | Path, task_folder: str | Path) -> ProbeTask:
    """Load and check a task by its name in `task_folder`, or by the path of its YAML.

    Raises:
        UserError: no such task, not YAML, or a file with problems, which are all listed.
    """
    given = str(name_or_path)
    is_path = given.endswith((".yaml", ".yml")) or "/" in given
    path = Path(given) if is_path else Path(task_folder) / f"{given}.yaml"
    if not path.is_file():
        known = list_tasks(task_folder)
        raise UserError(
            f"There is no probe task {given!r}.{nearest(given, known)} Known tasks: {', '.join(known) or 'none'}. "
            "The path of a YAML is taken too."
        )
    try:
        config = OmegaConf.load(path)
        values = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}. Quote paths that begin with {{root}}.") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must hold the keys of a probe task, not a list.")
    return task_from_mapping(values, str(path))  # pyright: ignore[reportArgumentType]


def task_from_mapping(values: Mapping[str, Any], where: str) -> ProbeTask:
    """Check a task's keys and values; `where` names their origin in the message.

    Raises:
        UserError: with every problem that was found.
    """
    task = build(ProbeTask, values, where)
    problems = [f"{split}: must name at least one shard folder" for split in ("train", "test") if not getattr(task, split)]
    problems += [f"{key}: must not be empty" for key in ("name", "title", "label") if not getattr(task, key).strip()]
    if not 0 < task.weight < float("inf"):
        problems.append(f"weight: must be above 0, got {task.weight:g}")
    if task.classes is not None and task.classes < 2:
        problems.append(f"classes: must be at least 2, got {task.classes}")
    problems += _folder_problems(task)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{where} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{listed}")
    return task


def _folder_problems(task: ProbeTask) -> list[str]:
    problems, where = [], {}
    for split in SPLITS:
        for folder in getattr(task, split):
            if not _only_root(folder):
                problems.append(f"{split}: {folder!r} has another placeholder than {{root}}")
            first = where.setdefault(folder.rstrip("/"), split)
            if first != split:
                problems.append(f"{split}: {folder!r} is in {first} too")
    return problems


def _only_root(folder: str) -> bool:
    try:
        return all(name in (None, "root") and not spec and not how for _, name, spec, how in Formatter().parse(folder))
    except ValueError:
        return False
