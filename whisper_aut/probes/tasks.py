"""Definition of a probe task: one YAML that names shard folders, splits, label, metric and
licence.

Adding a task takes one YAML in `conf/probe_tasks/` and no code. Splits are always stated, never
drawn, so official folds stay as published.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from whisper_aut.config import PACKAGE_CONF, find_config
from whisper_aut.data.annotation import Annotation, has_value
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import ShardIndex, open_index
from whisper_aut.errors import Problems, UserError, nearest
from whisper_aut.probes.metrics import ANSWERS, Answer
from whisper_aut.schema import Text, build, check_yaml

SPLITS = ("train", "valid", "test")


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
            `{root}` is replaced by the data folder of the run. Without `valid`, a fraction of
            `train` is held out, see `splits.inner_folds`. Empty for a task with folds.
        split: splits or folds.
        metric: a key of `ANSWERS`. It determines the kind of answer.
        kind: the probe kind, a key of `probes.fit.PROBES`. Empty for the metric's default.
        label: annotation field, or field of the sample's JSON, that holds the class, the
            classes, the events, or the transcript. For captions, a pattern of fields such as
            `caption*`, which may hold lists.
        separator: separates several classes within one text, e.g. `;`.
        event: the fields of an event: start (seconds), end (seconds) and class.
        select: keep only clips whose field has one of these values.
        group: annotation field, or field of the sample's JSON, that says which clips belong
            together: speaker, source recording, song. Intervals and tests then count each group
            once. `key` is the sample's name. A clip without the field is its own group.
        group_pattern: regular expression applied to the group field, e.g. `^(\\d+)-` for `key`.
            Its first capturing group is used, or the whole match if it has none.
        weight: weight in averages: the number of test clips, unless there is an agreed value.
        source: where the data comes from.
        licence: licence of the data.
        classes: the expected number of classes, if known.
        crop_seconds: use only the first `crop_seconds` of a clip.
        segment_seconds: length of the segments on which events are scored.
        prompt: what a language model is asked in the LALM probe. By default, made from the title.
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
    select: dict[str, list[Text]] = field(default_factory=dict)
    group: str = ""
    group_pattern: str = ""
    weight: float = 1.0
    source: str = ""
    licence: str = ""
    classes: int | None = None
    crop_seconds: float | None = None
    segment_seconds: float = 0.0
    prompt: str = ""

    @property
    def answer(self) -> Answer:
        """The kind of answer that the metric needs."""
        return ANSWERS[self.metric]

    @property
    def folded(self) -> bool:
        """Whether the task has folds instead of splits."""
        return self.split.scheme == "folds"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the splits or of the folds."""
        if self.folded:
            return tuple(f"fold {number}" for number in range(1, len(self.split.folds) + 1))
        return SPLITS

    @property
    def test_parts(self) -> tuple[str, ...]:
        """Names of the parts that are scored: the test split, or every fold."""
        return self.parts if self.folded else ("test",)

    def folders(self, part: str, root: str | Path | None) -> list[str]:
        """Return the folders of a split or fold, with `{root}` filled in.

        Raises:
            UserError: a folder needs `{root}` and `root` is None.
        """
        listed: list[str] = (
            [self.split.folds[self.parts.index(part)]] if self.folded else getattr(self, part)
        )
        if root is None and any("{root}" in folder for folder in listed):
            raise UserError(
                f"Probe task {self.name!r} is below {{root}}: name the data folder (--root)."
            )
        return [folder.replace("{root}", str(root).rstrip("/")) for folder in listed]

    def test_folders(self, root: str | Path | None) -> list[str]:
        """Return the folders of the parts that are scored."""
        return [folder for part in self.test_parts for folder in self.folders(part, root)]

    def label_of(self, annotation: Annotation) -> Any:
        """Return a clip's label in the form that the metric needs, or None if it has none.

        Raises:
            UserError: the label has another form.
        """
        if self.answer == "captions":
            fields = {**annotation.extra, "text": list(annotation.texts)}
            names = sorted(name for name in fields if fnmatchcase(name, self.label))
            return tuple(text for name in names for text in _values(fields[name])) or None
        if self.answer in ("class", "text"):
            return _single_value(annotation, self.label)
        value = _field_value(annotation, self.label)
        if self.answer == "events":
            return None if value is None else self._events(value)
        return tuple(self._class_names(value)) if has_value(value) else None

    def group_of(self, sample: Sample) -> str:
        """Return the group of a clip; empty for none."""
        if not self.group:
            return ""
        value = sample.key
        if self.group != "key":
            value = _single_value(sample.annotation, self.group) or ""
        if not self.group_pattern:
            return value
        match = re.search(self.group_pattern, value)
        return (match[1] if match.re.groups else match[0]) or "" if match else ""

    def selects(self, annotation: Annotation) -> bool:
        """Return whether a clip has one of the values of `select`."""
        return all(
            _single_value(annotation, name) in values for name, values in self.select.items()
        )

    def _events(self, value: Any) -> tuple[tuple[float, float, str], ...]:
        start, end, label = self.event
        try:
            events = tuple(
                (float(event[start]), float(event[end]), name)
                for event in value
                for name in self._class_names(event[label])
            )
            if not all(-inf < begins <= ends < inf for begins, ends, _ in events):
                raise ValueError
            return events
        except (TypeError, KeyError, ValueError):
            raise UserError(
                f"Probe task {self.name!r}: {self.label!r} must be a list of events with {label}, "
                f"{start} and a later {end}, not {value!r:.80}."
            ) from None

    def _class_names(self, value: Any) -> list[str]:
        split = (one.split(self.separator) if self.separator else [one] for one in _values(value))
        return [part.strip() for parts in split for part in parts if part.strip()]


def _single_value(annotation: Annotation, name: str) -> str | None:
    values = _values(_field_value(annotation, name))
    if len(values) > 1:
        raise UserError(
            f"A clip has {len(values)} values in {name!r} ({', '.join(values)}); a task needs one."
        )
    return values[0] if values else None


def _values(value: Any) -> list[str]:
    """Return the items of a list, or a single value, as texts; none for those without a value."""
    listed = value if isinstance(value, list) else [value]
    return [str(one) for one in listed if has_value(one)]


def _field_value(annotation: Annotation, name: str) -> Any:
    if name in annotation.__dataclass_fields__:
        return getattr(annotation, name)
    return annotation.extra.get(name)


@dataclass(frozen=True)
class ProbeSuite:
    """A list of tasks under one name (`conf/suites/NAME.yaml`)."""

    tasks: list[str]


def list_tasks(task_folder: str | Path) -> list[str]:
    """Return the sorted names of the tasks in `task_folder` and of the shipped tasks."""
    folders = (Path(task_folder), PACKAGE_CONF / "probe_tasks")
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def load_task(name_or_path: str | Path, task_folder: str | Path) -> ProbeTask:
    """Load and check a task by the path of its YAML, or by name.

    A name is looked up in `task_folder` first, then among the shipped tasks.

    Raises:
        UserError: there is no such task, the file is not YAML, or it has problems (all listed).
    """
    given = str(name_or_path)
    path = Path(given)
    if not given.endswith((".yaml", ".yml")) and "/" not in given:
        path = find_config(f"{given}.yaml", Path(task_folder), "probe_tasks")
    if not path.is_file():
        known = list_tasks(task_folder)
        raise UserError(
            f"There is no probe task {given!r}.{nearest(given, known)} Give the path of a YAML, or "
            f"one of: {', '.join(known)}."
        )
    return task_from_mapping(_read_mapping(path, "the keys of a probe task"), str(path))


def expand_suites(names: Sequence[str], suites: str | Path) -> list[str]:
    """Replace the names of suites by their tasks. Duplicates are dropped.

    Suites are searched in the folder `suites` before the shipped ones.

    Raises:
        UserError: the YAML of a suite has problems.
    """
    tasks: list[str] = []
    for name in names:
        path = find_config(f"{name}.yaml", Path(suites), "suites")
        if path.is_file():
            tasks += build(ProbeSuite, _read_mapping(path, "`tasks`"), str(path)).tasks
        else:
            tasks.append(name)
    return list(dict.fromkeys(tasks))


def _read_mapping(path: Path, content: str) -> Mapping[str, Any]:
    try:
        check_yaml(path.read_text(encoding="utf-8"))
        config = OmegaConf.load(path)
        values = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{path} is not readable as YAML: {error}. Quote paths that begin with {{root}}."
        ) from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must hold {content}, not a list.")
    return values  # pyright: ignore[reportReturnType]


def task_from_mapping(values: Mapping[str, Any], where: str) -> ProbeTask:
    """Check the keys and values of a task and build it. Errors name `where` the values come from.

    Raises:
        UserError: lists all problems.
    """
    scheme = values.get("split")
    if isinstance(scheme, Mapping) and scheme.get("scheme") == "folds":
        values = {"train": [], "test": [], **values}
    task, problems = build(ProbeTask, values, where), Problems()
    for problem in _find_problems(task):
        problems.add(problem)
    if len(problems.found) == 1:
        raise UserError(f"{where}: {problems.found[0]}")
    problems.raise_if_any(where)
    return task


def _find_problems(task: ProbeTask) -> Iterator[str]:
    for key in ("name", "title", "label"):
        if not getattr(task, key).strip():
            yield f"{key}: must not be empty"
    if not 0 < task.weight < float("inf"):
        yield f"weight: must be above 0, got {task.weight:g}"
    if task.classes is not None and task.classes < 2:
        yield f"classes: must be at least 2, got {task.classes}"
    if task.crop_seconds is not None and not task.crop_seconds > 0:
        yield f"crop_seconds: must be above 0, got {task.crop_seconds:g}"
    if (task.answer == "events") != (task.segment_seconds > 0):
        needs = "needs a length" if task.answer == "events" else "takes none"
        yield f"segment_seconds: {task.metric} {needs}"
    if len(task.event) != 3:
        yield "event: must name three fields: start, end and class"
    if task.group_pattern and not task.group:
        yield "group_pattern: needs group, the field that it is applied to"
    try:
        re.compile(task.group_pattern)
    except re.error as error:
        yield f"group_pattern: {error}"
    if task.folded and len(task.split.folds) < 2:
        yield "split.folds: must name at least two folds"
    if task.split.folds and not task.folded:
        yield "split.folds: needs split.scheme folds"
    for split in SPLITS:
        if task.folded and getattr(task, split):
            yield f"{split}: must be empty for a task in folds"
        if not task.folded and split != "valid" and not getattr(task, split):
            yield f"{split}: must name at least one shard folder"
    seen: dict[str, str] = {}
    for part in task.parts:
        for folder in task.folders(part, "{root}"):
            if set("{}") & set(folder.replace("{root}", "")):
                yield f"{part}: {folder!r} has another placeholder than {{root}}"
            first = seen.setdefault(folder.rstrip("/"), part)
            if first != part:
                yield f"{part}: {folder!r} is in {first} too. Build one folder of shards per split"


def open_parts(
    task: ProbeTask, root: str | Path | None, problems: Problems
) -> dict[str, list[ShardIndex]]:
    """Return the shard indexes of each part of a task, whose `{root}` is replaced.

    `problems` collects missing shards, and tars that are in two parts.
    """
    indexes: dict[str, list[ShardIndex]] = {part: [] for part in task.parts}
    for part, listed in indexes.items():
        with problems.gather():
            for folder in task.folders(part, root):
                with problems.gather():
                    listed.append(open_index(folder))
    seen: dict[str, str] = {}
    for part, listed in indexes.items():
        for index in listed:
            for number, shard in enumerate(index.shards):
                # Without a checksum, at least the same file is recognised.
                name = shard.sha256 or index.url(number)
                if seen.setdefault(name, part) != part:
                    problems.add(
                        f"Probe task {task.name!r}: {index.url(number)} of {part!r} is in "
                        f"{seen[name]!r} too. A score on clips that were trained on means "
                        "nothing: check the task's folders."
                    )
    return indexes
