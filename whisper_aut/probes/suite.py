"""Score encoders on tasks: embed once, probe with every seed, compare encoders in pairs.

The protocol, `strict`: official splits and folds, pooling over valid frames, settings selected on
validation clips only, the final probe trained on the full training split, and each test part
scored once per seed. A stored score is reused only if encoder, data and settings have the same
hash.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from whisper_aut.errors import Problems, UserError, nearest
from whisper_aut.probes.embed import (
    Embeddings,
    EmbedSettings,
    TaskEmbedder,
    cache_path,
    digest,
    feature_spec,
)
from whisper_aut.probes.encoders import EncoderCost, FrameEncoder, measure_cost
from whisper_aut.probes.fit import (
    PROBES,
    FinalFit,
    SeedRun,
    few_shot_splits,
    kind_for,
    probe_splits,
)
from whisper_aut.probes.results import (
    AVERAGE,
    NO_ASR,
    PROTOCOL,
    SCORES_VERSION,
    Comparison,
    Confusion,
    Scores,
    TaskScore,
    append_predictions,
    read_predictions,
)
from whisper_aut.probes.splits import class_names, classes_of, splits_of
from whisper_aut.probes.stats import GroupTotals, difference, holm
from whisper_aut.probes.tasks import ProbeTask, open_parts

SEEDS = (0, 1, 2, 3, 4)
# A rank that exits is noticed at once. This timeout is for ranks that have more to embed.
RANK_TIMEOUT = timedelta(hours=12)

log = logging.getLogger(__name__)


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
    shots: Sequence[int] = (),
) -> Scores:
    """Score every encoder on every task.

    Args:
        encoders: display name → encoder, in the order of the tables.
        tasks: the tasks, with distinct names.
        root: replaces `{root}` in the tasks' folders.
        cache: folder for embeddings.
        seeds: seeds for probes with random initialisation or order. The other probes are trained
            once.
        against: names of the baselines: every other encoder is compared with each of them.
        embedding: how clips are embedded.
        scores_file: JSON file of scores. Valid scores are read from it, and it is written after
            each new one, so that an interrupted run resumes.
        kind: the probe kind, a key of `fit.PROBES`. Empty for each task's own.
        device: where probes are trained.
        final_fit: the clips that the final probe is trained on, once its settings are selected:
            the training split, or with `train+valid` the validation split too. With folds, always
            all other folds.
        predictions_file: JSON lines file, one line per test clip and seed, see
            `results.read_predictions`.
        shots: numbers of training clips per class. Each encoder is then scored once for each
            number, under a name that ends with it, instead of with all training clips; see
            `fit.few_shot_splits`. Tasks with fewer clips per class are left out of that number.

    Raises:
        UserError: there is nothing to do, two tasks have one name, a name is unknown, a task or
            encoder does not support an option, or shards are missing. These are all reported at
            once, before any clip is embedded. Problems with a task's clips are raised later.
    """
    embedding, seeds = embedding or EmbedSettings(), tuple(seeds)
    problems = _request_problems(encoders, tasks, seeds, against)
    find_problems(
        problems, encoders, tasks, root=root, embedding=embedding, kind=kind, few_shot=bool(shots)
    )
    problems.raise_if_any("The probe")
    known, costs = _stored(scores_file, predictions_file)
    settings: dict[str, Any] = {
        "root": str(root),
        "cache": str(cache),
        "pooling": embedding.pooling,
        "layers": list(embedding.layers),
        "kind": kind or "each task's own",
        "final_fit": final_fit,
        "candidates": {name: list(probe.candidates) for name, probe in PROBES.items()},
    }
    scores = Scores((), (), seeds, settings)
    fingerprints = {name: encoder.fingerprint() for name, encoder in encoders.items()}
    for name, encoder in encoders.items() if scores_file is not None else ():
        fingerprint = fingerprints[name]
        costs[fingerprint] = costs.get(fingerprint) or measure_cost(encoder, fingerprint)
        scores.costs[name] = costs[fingerprint]
    jobs = []
    for task in tasks:
        own = kind_for(kind, task)
        for name, encoder in encoders.items():
            embedder = TaskEmbedder(
                encoder, task, root, cache, embedding, PROBES[own].features, fingerprints[name]
            )
            for count in shots or (0,):
                label = f"{name}, {count} a class" if count else name
                identity = _identity(embedder, own, seeds, final_fit, count)
                jobs.append((identity, label, embedder, own, count))
    if predictions_file is not None:
        # Rewritten score by score, like the scores file.
        Path(predictions_file).unlink(missing_ok=True)
    entries: dict[int, TaskScore] = {}
    # Stored scores come first, so that a run that is stopped later keeps them.
    for number in sorted(range(len(jobs)), key=lambda number: jobs[number][0] not in known):
        identity, label, embedder, own, count = jobs[number]
        task = embedder.task
        if identity not in known:
            found = _score(embedder, own, seeds, device, final_fit, count)
            if found is None:
                log.warning("%s: a class has less than %d clips.", task.name, count)
                continue
            known[identity] = replace(found[0], identity=identity), found[1]
        entry, rows = known[identity]
        entries[number] = replace(entry, encoder=label, title=task.title, weight=task.weight)
        if predictions_file is not None:
            append_predictions(predictions_file, entries[number], rows)
        scores = replace(scores, entries=tuple(entries[number] for number in sorted(entries)))
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
    few_shot: bool = False,
) -> None:
    """Collect what would stop `run_suite`, as far as it can be known before clips are decoded.

    With `few_shot`, probes are trained on few clips. For the other arguments, see `run_suite`.
    """
    for task in tasks:
        open_parts(task, root, problems)
        with problems.gather():
            chosen = kind_for(kind, task)
            features = PROBES[chosen].features
            if few_shot and (task.answer != "class" or PROBES[chosen].seeded):
                problems.add(
                    f"Probe task {task.name!r}: few clips per class need a task with one class per "
                    "clip and a linear or knn probe."
                )
            for name, encoder in encoders.items():
                with problems.gather(f"{name}: "):
                    feature_spec(encoder, task, embedding or EmbedSettings(), features)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as set by `torchrun`."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of all ranks, if there are several, and always leave it, so that the
    other ranks notice an error.
    """
    if rank_and_world_size()[1] == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=RANK_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def embed_on_ranks(
    encoders: Mapping[str, FrameEncoder],
    tasks: Sequence[ProbeTask],
    *,
    root: str | Path | None,
    cache: str | Path,
    embedding: EmbedSettings,
    kind: str = "",
) -> None:
    """Divide the embedding of all clips among the ranks, and join the results on rank 0.

    Must be called inside `process_group`, with the arguments of `run_suite`. A single process has
    nothing to divide.

    Raises:
        UserError: as in `TaskEmbedder.embed`, or another rank is gone, or the ranks do not share
            a cache folder.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return
    embedders = []
    for encoder in encoders.values():
        fingerprint = encoder.fingerprint()
        for task in tasks:
            features = PROBES[kind_for(kind, task)].features
            embedder = TaskEmbedder(
                encoder, task, root, cache, embedding, features, fingerprint, rank, world_size
            )
            embedder.embed()
            embedders.append(embedder)
    try:
        dist.barrier()
    except RuntimeError as error:
        raise UserError(
            f"Another rank is gone: {str(error).splitlines()[0][:300]}. Start again: finished "
            "embeddings are kept."
        ) from error
    if rank == 0:
        for embedder in embedders:
            embedder.join_ranks()


def compare(scores: Scores, against: Sequence[str], only: str = "") -> list[Comparison]:
    """Compare every other encoder with each of `against`, on every task and on the weighted
    average, or with `only` on this task or average.

    Holm's correction covers all comparisons: every task, average and pair of encoders.

    Raises:
        UserError: two encoders were tested on different clips.
    """
    found = []
    for number, base in enumerate(against):
        for encoder in scores.encoders:
            if encoder not in against[: number + 1]:
                for name, (differences, weights) in _pairs(scores, encoder, base).items():
                    if only in ("", name):
                        found.append((encoder, base, name, difference(differences, weights)))
    adjusted, rows = holm([one.p_value for *_, one in found]), []
    for (encoder, base, name, one), p_holm in zip(found, adjusted, strict=True):
        ends = one.value, one.low, one.high, one.p_value, p_holm
        rows.append(Comparison(encoder, base, name, *ends, one.effect_size, one.detectable))
    return rows


def _pairs(
    scores: Scores, encoder: str, base: str
) -> dict[str, tuple[list[GroupTotals], list[float]]]:
    """Return the paired differences and weights of the tasks in each comparison of two encoders."""
    differences: dict[str, GroupTotals] = {}
    entries: dict[str, TaskScore] = {}
    for task in scores.tasks:
        one, other = scores.get(encoder, task), scores.get(base, task)
        if one is None or other is None:
            continue
        if (one.keys_sha256, one.groups) != (other.keys_sha256, other.groups):
            raise UserError(
                f"{encoder!r} and {base!r} were tested on different clips of {task!r}: probe both "
                "again."
            )
        entries[task], differences[task] = one, one.compared_with(other)
    compared = {task: [task] for task in entries}
    if len(entries) > 1:
        compared[AVERAGE] = list(entries)
        others = [task for task, entry in entries.items() if entry.metric != "word_accuracy"]
        if 0 < len(others) < len(entries):
            compared[NO_ASR] = others
    return {
        name: ([differences[task] for task in tasks], [entries[task].weight for task in tasks])
        for name, tasks in compared.items()
    }


def _score(
    embedder: TaskEmbedder,
    kind: str,
    seeds: Sequence[int],
    device: str,
    final_fit: FinalFit,
    shots: int,
) -> tuple[TaskScore, list[dict[str, Any]]] | None:
    """Return the score of an encoder on a task, and its predictions per clip. None if a class has
    fewer clips than `shots`.
    """
    task, parts = embedder.task, embedder.embed()
    class_count = _check_classes(task, parts)
    splits = splits_of(parts, task)
    options: Any = {"name": task.name, "metric": task.metric}
    options |= {"kind": kind, "seeds": seeds, "device": device}
    if shots:
        runs = few_shot_splits(splits, shots, **options)
    else:
        options |= {"segment_seconds": task.segment_seconds, "final_fit": final_fit}
        runs = probe_splits(splits, **options)
    if not runs:
        return None
    tested = Embeddings.join([parts[part] for part in task.test_parts])
    groups = tested.group_numbers()
    grouped = len(set(groups)) < len(groups)
    if task.group and not grouped:
        log.warning(
            "%s: no two test clips share a %s; each counts by itself.", task.name, task.group
        )
    chance = confusion = None
    if task.answer == "class":
        chance = Counter(tested.labels).most_common(1)[0][1] / len(tested)
        confusion = _confusion(runs, class_names(splits, "class", task.name), tested.labels)
    identities = embedder.identities()
    entry = TaskScore(
        encoder="",
        task=task.name,
        title=task.title,
        domain=task.domain,
        weight=task.weight,
        metric=task.metric,
        classes=class_count,
        scores=tuple(score for run in runs for score in run.scores),
        chosen=tuple(candidate for run in runs for candidate in run.candidates),
        valid_scores=tuple(score for run in runs for score in run.valid_scores),
        seeds=tuple(run.seed for run in runs if run.seed is not None),
        final_fit="train" if task.folded else final_fit,
        record=tuple(_record(run) for run in runs),
        units=tuple(len(units) for units in runs[0].units),
        keys_sha256=hashlib.sha256("\n".join(tested.keys).encode()).hexdigest()[:24],
        clips={name: len(part) for name, part in parts.items()},
        skipped={name: part.skipped for name, part in parts.items() if part.skipped},
        chance=chance,
        pooling=embedder.spec.pooling,
        identity="",
        kind=kind,
        confusion=confusion,
        embedded=tuple(
            cache_path(embedder.cache, identity).name
            for part in task.test_parts
            for identity in identities[part]
        ),
        padding=getattr(embedder.encoder, "padding", ""),
        trained_padding=getattr(embedder.encoder, "trained_padding", ""),
        group=task.group,
        groups=" ".join(map(str, groups)) if grouped else "",
        shots=shots,
        layers=embedder.selected or embedder.spec.layers,
        layer_weights=tuple(np.mean([run.layer_weights for run in runs], axis=(0, 1)).tolist()),
    )
    return entry, _predictions(runs, tested)


def _predictions(runs: Sequence[SeedRun], tested: Embeddings) -> list[dict[str, Any]]:
    """Return a row per test clip and seed, see `results.read_predictions`."""
    rows = []
    for run in runs:
        predicted = [one for part in run.predicted for one in part]
        probabilities = [one for part in run.probabilities for one in part]
        for number, (key, true) in enumerate(zip(tested.keys, tested.labels, strict=True)):
            row = {"key": key} if run.seed is None else {"key": key, "seed": run.seed}
            row |= {"true": true, "predicted": predicted[number]}
            if probabilities:
                row["probability"] = probabilities[number]
            if tested.groups[number]:
                row["group"] = tested.groups[number]
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


def _record(run: SeedRun) -> str | tuple[float, ...]:
    units = np.concatenate(run.units)
    if np.isin(units, (0.0, 1.0)).all():
        return "".join("01"[int(unit)] for unit in units)
    return tuple(units.round(6).tolist())


def _check_classes(task: ProbeTask, parts: dict[str, Embeddings]) -> int:
    """Return the number of classes to learn, which must be the task's `classes`."""
    if task.answer in ("captions", "text"):
        return 0
    trained = [part for name, part in parts.items() if name not in ("valid", "test")]
    found = classes_of([label for part in trained for label in part.labels], task.answer)
    if task.classes is not None and len(found) != task.classes and found:
        raise UserError(
            f"Probe task {task.name!r} should have {task.classes} classes; its training clips "
            f"have {len(found)}: {', '.join(sorted(found)[:12])}. Check the field {task.label!r} "
            "of the shards, or the task's `classes`."
        )
    return len(found)


def _identity(
    embedder: TaskEmbedder, kind: str, seeds: Sequence[int], final_fit: FinalFit, shots: int
) -> str:
    """Hash everything a score depends on. A task's title and weight do not affect it."""
    task, module = embedder.task, PROBES[kind]
    probe = {"kind": kind, "version": module.version, "candidates": list(module.candidates)}
    used_seeds = list(seeds) if module.seeded or shots else []
    probe |= {"final_fit": final_fit, "seeds": used_seeds, "protocol": PROTOCOL}
    if shots or embedder.selected:
        probe |= {"shots": shots, "layers": embedder.selected, "default": module.default}
    scored = [task.name, task.domain, task.metric, task.classes, task.segment_seconds]
    if task.group and not task.valid and len(task.parts) < 4:  # a fraction is held out
        scored.append("whole groups")
    data = embedder.identities()
    return digest({"version": SCORES_VERSION, "data": data, "probe": probe, "task": scored})


def _stored(
    scores_file: str | Path | None, predictions_file: str | Path | None
) -> tuple[dict[str, tuple[TaskScore, list[dict[str, Any]]]], dict[str, EncoderCost]]:
    """Return stored scores with their predictions, by identity, and costs, by fingerprint. If the
    run keeps predictions, scores without a full set of them are left out.
    """
    if scores_file is None or not Path(scores_file).exists():
        return {}, {}
    try:
        scores = Scores.load(scores_file)
    except UserError as error:
        log.warning("%s: %s", scores_file, error)
        return {}, {}
    rows, stored = read_predictions(predictions_file) if predictions_file else {}, {}
    for entry in scores.entries:
        own = rows.get((entry.encoder, entry.task), [])
        if predictions_file is None or len(own) == entry.test_clips * len(entry.record):
            stored[entry.identity] = entry, own
    return stored, {cost.fingerprint: cost for cost in scores.costs.values()}


def _request_problems(
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
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            problems.add(f"Two probe tasks have the name {name!r}. Give each its own.")
    for name in against:
        if name not in encoders:
            problems.add(
                f"Cannot compare against {name!r}: it is not probed.{nearest(name, encoders)} "
                f"Probed: {', '.join(encoders)}."
            )
    return problems
