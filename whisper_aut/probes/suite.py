"""Score encoders on tasks: embed once, probe with every seed, compare encoders in pairs.

The protocol, `strict`: official splits and folds, pooling over valid frames, settings chosen on
validation clips only, the final probe fitted on the full training split, and each test part
scored once per seed. A stored score is reused only if encoder, data and settings have the same
hash.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from whisper_aut.data.shards import open_index
from whisper_aut.errors import Problems, UserError, nearest
from whisper_aut.probes.cache import Embeddings, cache_path, digest, group_numbers
from whisper_aut.probes.embed import (
    EmbedSettings,
    FrameEncoder,
    View,
    embed_task,
    folder_identity,
    open_parts,
    view_of,
)
from whisper_aut.probes.fit import FinalFit, SeedRun, class_names, rounds_of
from whisper_aut.probes.kinds import KINDS, kind_for, probe_rounds
from whisper_aut.probes.metrics import METRIC_VERSIONS
from whisper_aut.probes.results import (
    AVERAGE,
    NO_ASR,
    PROTOCOL,
    Comparison,
    Confusion,
    Scores,
    TaskScore,
    append_predictions,
    read_predictions,
)
from whisper_aut.probes.stats import GroupTotals, difference, holm
from whisper_aut.probes.tasks import ProbeTask

SEEDS = (0, 1, 2, 3, 4)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """Options shared by all scores of a run."""

    root: str | Path | None
    cache: str | Path
    seeds: tuple[int, ...]
    embedding: EmbedSettings
    kind: str
    device: str
    final_fit: FinalFit


def run_suite(
    encoders: Mapping[str, FrameEncoder],
    tasks: Sequence[ProbeTask],
    *,
    root: str | Path | None,
    cache: str | Path,
    seeds: Sequence[int] = SEEDS,
    against: Sequence[str] = (),
    embedding: EmbedSettings | None = None,
    scores_file: str | Path | None = None,
    kind: str = "",
    device: str = "cpu",
    final_fit: FinalFit = "train",
    predictions_file: str | Path | None = None,
) -> Scores:
    """Score every encoder on every task.

    Args:
        encoders: display name → encoder, in the order of the tables.
        tasks: the tasks, with distinct names.
        root: replaces `{root}` in the tasks' folders.
        cache: folder for embeddings.
        seeds: seeds for probes with random initialisation or order. The other probes are fitted
            once.
        against: names of the baselines: every other encoder is compared with each of them.
        embedding: how clips are embedded.
        scores_file: JSON file of scores. Valid scores are read from it, and it is written after
            each new one, so that an interrupted run resumes.
        kind: the probe kind, a key of `kinds.KINDS`. Empty for each task's own.
        device: where probes are fitted.
        final_fit: the clips that the final probe is fitted on, once its settings are chosen: the
            training split, or with `train+valid` the validation split too. With folds, always
            all other folds.
        predictions_file: JSON lines file, one line per test clip and seed, see
            `results.read_predictions`.

    Raises:
        UserError: if there is nothing to do, two tasks have one name, a name is unknown, a task
            or encoder does not support an option, or shards are missing. These are all reported
            at once, before any clip is embedded. Problems with a task's clips are raised later.
    """
    plan = _Plan(root, cache, tuple(seeds), embedding or EmbedSettings(), kind, device, final_fit)
    problems = _problems(encoders, tasks, seeds, against)
    find_problems(problems, encoders, tasks, root=root, embedding=plan.embedding, kind=kind)
    problems.raise_if_any("The probe")
    fingerprints = {name: encoder.fingerprint() for name, encoder in encoders.items()}
    known = _stored(scores_file, predictions_file)
    if predictions_file is not None:
        # Rewritten score by score, like the scores file.
        Path(predictions_file).unlink(missing_ok=True)
    scores = Scores((), (), tuple(seeds), _settings(plan))
    for task in tasks:
        for name, encoder in encoders.items():
            identity = _identity(encoder, fingerprints[name], task, plan)
            if identity not in known:
                known[identity] = _score(encoder, fingerprints[name], task, plan, identity)
            entry, rows = known[identity]
            entry = replace(entry, encoder=name, title=task.title, weight=task.weight)
            if predictions_file is not None:
                append_predictions(predictions_file, entry, rows)
            scores = replace(scores, entries=(*scores.entries, entry))
            if scores_file is not None:
                scores.save(scores_file)
    scores = replace(scores, comparisons=tuple(compare(scores, against)))
    if scores_file is not None:
        scores.save(scores_file)
    return scores


def find_problems(
    problems: Problems,
    encoders: Mapping[str, FrameEncoder],
    tasks: Sequence[ProbeTask],
    *,
    root: str | Path | None,
    embedding: EmbedSettings | None = None,
    kind: str = "",
) -> None:
    """Collect what would stop `run_suite`, as far as it can be known before clips are decoded.

    Args:
        problems: receives the problems.
        encoders, tasks, root, embedding, kind: see `run_suite`.
    """
    views = []
    for task in tasks:
        with problems.gather():
            views.append((task, KINDS[kind_for(kind, task)].view))
        open_parts(task, root, problems)
    for name, encoder in encoders.items():
        for task, view in views:
            with problems.gather(f"{name}: "):
                view_of(encoder, embedding or EmbedSettings(), view, task)


def compare(scores: Scores, against: Sequence[str]) -> list[Comparison]:
    """Compare every other encoder with each of `against`, on every task and on the weighted
    average.

    Holm's correction covers all comparisons: every task, average and pair of encoders.

    Raises:
        UserError: if two encoders were tested on different clips.
    """
    pairs = [
        (encoder, base)
        for number, base in enumerate(against)
        for encoder in scores.encoders
        if encoder not in against[: number + 1]
    ]
    found = [
        (encoder, base, task, difference(*question))
        for encoder, base in pairs
        for task, question in _questions(scores, encoder, base).items()
    ]
    adjusted = holm([one.p_value for *_, one in found])
    return [
        Comparison(encoder, base, task, d.value, d.low, d.high, d.p_value, p_holm)
        for (encoder, base, task, d), p_holm in zip(found, adjusted, strict=True)
    ]


def _questions(
    scores: Scores, encoder: str, base: str
) -> dict[str, tuple[list[GroupTotals], list[float]]]:
    """Return the paired differences and weights of the tasks in each comparison of two encoders."""
    differences: dict[str, GroupTotals] = {}
    both = [(scores.get(encoder, task), scores.get(base, task)) for task in scores.tasks]
    entries = [one for one, other in both if one is not None and other is not None]
    for one, other in ((one, other) for one, other in both if one and other):
        if (one.keys_sha256, one.groups) != (other.keys_sha256, other.groups):
            raise UserError(
                f"{encoder!r} and {base!r} were tested on different clips of {one.task!r}: probe "
                "both again."
            )
        differences[one.task] = one.compared_with(other)
    chosen = {entry.task: [entry] for entry in entries}
    if len(entries) > 1:
        chosen[AVERAGE] = entries
        others = [entry for entry in entries if entry.metric != "word_accuracy"]
        chosen |= {NO_ASR: others} if 0 < len(others) < len(entries) else {}
    return {
        name: ([differences[one.task] for one in listed], [one.weight for one in listed])
        for name, listed in chosen.items()
    }


def _score(
    encoder: FrameEncoder, fingerprint: str, task: ProbeTask, plan: _Plan, identity: str
) -> tuple[TaskScore, list[dict[str, Any]]]:
    """Return the score and its predictions per clip."""
    kind = kind_for(plan.kind, task)
    view = KINDS[kind].view
    parts = embed_task(encoder, task, plan.root, plan.cache, plan.embedding, fingerprint, view)
    classes = _check_classes(task, parts)
    rounds = rounds_of(parts, task)
    runs = probe_rounds(
        rounds, metric=task.metric, kind=kind, seeds=plan.seeds,
        segment_seconds=task.segment_seconds,
        device=plan.device, name=task.name, final_fit=plan.final_fit,
    )  # fmt: skip
    tested = [
        part for name, part in parts.items() if name == "test" or task.split.scheme == "folds"
    ]
    truth = [label for part in tested for label in part.labels]
    labels = Counter(truth) if task.answer == "class" else None
    keys = [key for part in tested for key in part.keys]
    group_names = [group for part in tested for group in part.groups]
    groups = group_numbers(group_names)
    if task.group and len(set(groups)) == len(groups):
        log.warning(
            "%s: no two test clips share a %s; each counts by itself.", task.name, task.group
        )
    entry = TaskScore(
        encoder="",
        task=task.name,
        title=task.title,
        domain=task.domain,
        weight=task.weight,
        metric=task.metric,
        classes=classes,
        scores=tuple(score for run in runs for score in run.scores),
        chosen=tuple(setting for run in runs for setting in run.settings),
        valid_scores=tuple(score for run in runs for score in run.valid_scores),
        seeds=tuple(run.seed for run in runs if run.seed is not None),
        final_fit=plan.final_fit if task.split.scheme == "splits" else "train",
        record=tuple(_record(run) for run in runs),
        units=tuple(len(units) for units in runs[0].units),
        keys_sha256=hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24],
        clips={name: len(part) for name, part in parts.items()},
        skipped={name: part.skipped for name, part in parts.items() if part.skipped},
        chance=labels.most_common(1)[0][1] / labels.total() if labels else None,
        pooling=view_of(encoder, plan.embedding, view, task).pooling,
        identity=identity,
        kind=kind,
        confusion=_confusion(runs, class_names(rounds, task.answer, task.name), truth)
        if labels
        else None,
        embedded=_embedded(fingerprint, task, plan, view_of(encoder, plan.embedding, view, task)),
        padding=getattr(encoder, "padding", ""),
        group=task.group,
        groups=" ".join(map(str, groups)) if len(set(groups)) < len(groups) else "",
    )
    return entry, _predictions(runs, keys, truth, group_names)


def _predictions(
    runs: Sequence[SeedRun], keys: Sequence[str], truth: Sequence[Any], groups: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row per test clip and seed, see `results.read_predictions`."""
    rows = []
    for run in runs:
        seed = {} if run.seed is None else {"seed": run.seed}
        predicted = [one for part in run.predicted for one in part]
        probabilities = [one for part in run.probabilities for one in part]
        for number, (key, true, guess) in enumerate(zip(keys, truth, predicted, strict=True)):
            row = {"key": key, **seed, "true": true, "predicted": guess}
            if probabilities:
                row["probability"] = probabilities[number]
            if groups[number]:
                row["group"] = groups[number]
            rows.append(row)
    return rows


def _confusion(runs: Sequence[SeedRun], classes: Sequence[str], truth: Sequence[str]) -> Confusion:
    """Count the predictions for each true class, over all seeds and folds."""
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    true = np.searchsorted(classes, truth)
    for run in runs:
        predicted = [name for part in run.predicted for name in part]
        np.add.at(counts, (true, np.searchsorted(classes, predicted)), 1)
    return Confusion(tuple(classes), tuple(map(tuple, counts.tolist())))


def _embedded(fingerprint: str, task: ProbeTask, plan: _Plan, view: View) -> tuple[str, ...]:
    tested = task.parts if task.split.scheme == "folds" else ("test",)
    folders = [folder for part in tested for folder in task.folders(part, plan.root)]
    identities = (
        folder_identity(fingerprint, view, open_index(folder), task, plan.embedding)
        for folder in folders
    )
    return tuple(cache_path(plan.cache, identity).name for identity in identities)


def _record(run: SeedRun) -> str | tuple[float, ...]:
    units = np.concatenate(run.units)
    if np.isin(units, (0.0, 1.0)).all():
        return "".join("01"[int(unit)] for unit in units)
    return tuple(units.round(6).tolist())


def _check_classes(task: ProbeTask, parts: dict[str, Embeddings]) -> int:
    """Return the number of classes to learn.

    Raises:
        UserError: if it differs from the task's `classes`.
    """
    if task.answer in ("captions", "text"):
        return 0
    learned = [
        label
        for name, part in parts.items()
        if name not in ("valid", "test")
        for label in part.labels
    ]
    if task.answer == "class":
        found = set(learned)
    else:
        found = {
            item if task.answer == "classes" else item[2] for label in learned for item in label
        }
    if task.classes is not None and len(found) != task.classes and found:
        listed = ", ".join(sorted(found)[:12])
        raise UserError(
            f"Probe task {task.name!r} should have {task.classes} classes; its training clips "
            f"have {len(found)}: {listed}. "
            f"Check the field {task.label!r} of the shards, or the task's `classes`."
        )
    return len(found)


def _identity(encoder: FrameEncoder, fingerprint: str, task: ProbeTask, plan: _Plan) -> str:
    """Hash everything a score depends on. A task's title and weight do not affect it."""
    kind = KINDS[kind_for(plan.kind, task)]
    view = view_of(encoder, plan.embedding, kind.view, task)
    data = {
        part: [
            folder_identity(fingerprint, view, open_index(folder), task, plan.embedding)
            for folder in task.folders(part, plan.root)
        ]
        for part in task.parts
    }
    probe = {
        "kind": kind_for(plan.kind, task),
        "version": kind.version,
        "candidates": list(kind.candidates),
        "final_fit": plan.final_fit,
        "seeds": list(plan.seeds) if kind.seeded else [],
        "protocol": PROTOCOL,
    }
    metric = METRIC_VERSIONS.get(task.metric, task.metric)
    facts = [task.name, task.domain, metric, task.classes, task.segment_seconds]
    return digest({"data": data, "probe": probe, "task": facts})


def _settings(plan: _Plan) -> dict[str, Any]:
    embedding = asdict(plan.embedding)
    speed = ("batch_seconds", "workers", "max_skipped_fraction", "quiet")
    return {
        "root": str(plan.root),
        "cache": str(plan.cache),
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in embedding.items()
            if name not in speed
        },
        "kind": plan.kind or "each task's own",
        "final_fit": plan.final_fit,
        "candidates": {name: list(kind.candidates) for name, kind in KINDS.items()},
    }


def _stored(
    scores_file: str | Path | None, predictions_file: str | Path | None
) -> dict[str, tuple[TaskScore, list[dict[str, Any]]]]:
    """Return stored scores with their predictions, by identity. If the run keeps predictions,
    scores without a full set of them are left out.
    """
    if scores_file is None or not Path(scores_file).exists():
        return {}
    try:
        entries = Scores.load(scores_file).entries
    except UserError as error:
        log.warning("%s: %s", scores_file, error)
        return {}
    if predictions_file is None:
        return {entry.identity: (entry, []) for entry in entries}
    rows = read_predictions(predictions_file)
    found = {
        entry.identity: (entry, rows.get((entry.encoder, entry.task), [])) for entry in entries
    }
    return {
        identity: (entry, own)
        for identity, (entry, own) in found.items()
        if len(own) == entry.test_clips * len(entry.record)
    }


def _problems(
    encoders: Mapping[str, FrameEncoder],
    tasks: Sequence[ProbeTask],
    seeds: Sequence[int],
    against: Sequence[str],
) -> Problems:
    problems = Problems()
    if not (encoders and tasks and seeds):
        problems.add(
            f"Nothing to probe: {len(encoders)} encoders, {len(tasks)} tasks, {len(seeds)} seeds."
        )
    names = Counter(task.name for task in tasks)
    for name in (name for name, count in names.items() if count > 1):
        problems.add(f"Two probe tasks have the name {name!r}. Give each its own.")
    for name in (name for name in against if name not in encoders):
        problems.add(
            f"Cannot compare against {name!r}: it is not probed.{nearest(name, encoders)} "
            f"Probed: {', '.join(encoders)}."
        )
    return problems
