"""Encoders × tasks → `Scores`: embed once, probe with every seed, compare in pairs.

In: encoders by name (log-mel statistics are one more), tasks, seeds. Out: `Scores`, protocol `strict`: official splits, pooling
over valid frames, the penalty chosen on validation only, the test split read once a seed. Next: `report`. A score that a file
already holds is taken from it only if encoder, data and settings hash to the same.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whisper_aut.corpora.shards import open_index
from whisper_aut.errors import UserError, nearest
from whisper_aut.probes.cache import Embeddings, digest
from whisper_aut.probes.embed import EmbedSettings, FrameEncoder, embed_task, folder_identity, pooling_of
from whisper_aut.probes.linear import LINEAR_VERSION, PENALTIES, TRAIN_SHARE, probe_linear
from whisper_aut.probes.scores import AVERAGE, PROTOCOL, Comparison, Scores, TaskScore
from whisper_aut.probes.stats import holm, paired_difference
from whisper_aut.probes.tasks import SPLITS, ProbeTask

SEEDS = (0, 1, 2, 3, 4)

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
    device: str = "cpu",
) -> Scores:
    """Score every encoder on every task.

    Args:
        encoders: display name → encoder, in the order of the tables.
        root: what `{root}` stands for in the tasks' folders.
        cache: folder for embeddings.
        against: names of encoders that all others are compared with, pair by pair.
        scores_file: read for scores that still hold, and written after each new one, so that an interrupted run goes on.
        device: where probes are fitted.

    Raises:
        UserError: nothing to do, two tasks of one name, an unknown name in `against`, or whatever is wrong with a task.
    """
    _check(encoders, tasks, seeds, against)
    embedding = embedding or EmbedSettings()
    fingerprints = {name: encoder.fingerprint() for name, encoder in encoders.items()}
    known = {entry.identity: entry for entry in _stored(scores_file)}
    scores = Scores((), (), tuple(seeds), _settings(embedding, root))
    for task in tasks:
        for name, encoder in encoders.items():
            fingerprint, pooling = fingerprints[name], pooling_of(encoder, embedding)
            identity = _identity(fingerprint, pooling, task, root, seeds, embedding)
            entry = known.get(identity)
            if entry is None:
                splits = embed_task(encoder, task, root, cache, embedding, fingerprint)
                entry = _score(name, task, splits, seeds, device, pooling, identity)
            entry = TaskScore(**{**entry.__dict__, "encoder": name, "title": task.title, "weight": task.weight})
            scores = Scores((*scores.entries, entry), (), scores.seeds, scores.settings)
            if scores_file is not None:
                scores.save(scores_file)
    scores = Scores(scores.entries, tuple(compare(scores, against)), scores.seeds, scores.settings)
    if scores_file is not None:
        scores.save(scores_file)
    return scores


def compare(scores: Scores, against: Sequence[str]) -> list[Comparison]:
    """Compare every other encoder with each of `against`, task by task and on the weighted average.

    Holm's correction covers the tasks of one pair of encoders; the average is one question of its own and stays as it is.

    Raises:
        UserError: two encoders were tested on different clips.
    """
    found = []
    for base in against:
        for encoder in (name for name in scores.encoders if name not in against[: against.index(base) + 1]):
            found += _compare_pair(scores, encoder, base)
    return found


def _compare_pair(scores: Scores, encoder: str, base: str) -> list[Comparison]:
    pairs = [(scores.get(encoder, task), scores.get(base, task)) for task in scores.tasks]
    pairs = [(one, other) for one, other in pairs if one is not None and other is not None]
    for one, other in pairs:
        if one.keys_sha256 != other.keys_sha256:
            raise UserError(f"{encoder!r} and {base!r} were tested on different clips of {one.task!r}: probe both again.")
    records = [(one.correctness(), other.correctness(), one.weight) for one, other in pairs]
    questions = [(one.task, [record]) for (one, _), record in zip(pairs, records, strict=True)]
    if len(records) > 1:
        questions.append((AVERAGE, records))
    differences = [paired_difference(*zip(*chosen, strict=True)) for _, chosen in questions]
    adjusted = holm([difference.p_value for difference in differences[: len(pairs)]])
    adjusted += [difference.p_value for difference in differences[len(pairs) :]]
    return [
        Comparison(encoder, base, task, d.value, d.low, d.high, d.p_value, p_holm)
        for (task, _), d, p_holm in zip(questions, differences, adjusted, strict=True)
    ]


def _score(
    name: str, task: ProbeTask, splits: dict[str, Embeddings], seeds: Sequence[int], device: str, pooling: str, identity: str
) -> TaskScore:
    classes = len(set(splits["train"].labels))
    if task.classes is not None and classes != task.classes and classes:
        listed = ", ".join(sorted(set(splits["train"].labels))[:12])
        raise UserError(
            f"Probe task {task.name!r} should have {task.classes} classes; its training clips have {classes}: {listed}. "
            f"Check the field {task.label!r} of the shards, or the task's `classes`."
        )
    results = probe_linear(splits, metric=task.metric, seeds=seeds, device=device, name=task.name)
    test = splits["test"]
    return TaskScore(
        encoder=name,
        task=task.name,
        title=task.title,
        domain=task.domain,
        weight=task.weight,
        metric=task.metric,
        classes=classes,
        scores=tuple(result.score for result in results),
        penalties=tuple(result.penalty for result in results),
        valid_scores=tuple(result.valid_score for result in results),
        correct=tuple("".join("01"[int(right)] for right in result.correct) for result in results),
        keys_sha256=hashlib.sha256("\n".join(test.keys).encode()).hexdigest()[:24],
        clips={split: len(part) for split, part in splits.items()},
        skipped={split: part.skipped for split, part in splits.items() if part.skipped},
        chance=Counter(test.labels).most_common(1)[0][1] / len(test),
        pooling=pooling,
        identity=identity,
    )


def _identity(
    fingerprint: str, pooling: str, task: ProbeTask, root: str | Path | None, seeds: Sequence[int], embedding: EmbedSettings
) -> str:
    """Hash all that a score depends on; a task's title and weight are not among it."""
    data = {
        split: [
            folder_identity(fingerprint, pooling, open_index(folder), task, embedding) for folder in task.folders(split, root)
        ]
        for split in SPLITS
    }
    probe = {
        "version": LINEAR_VERSION,
        "penalties": PENALTIES,
        "share": TRAIN_SHARE,
        "seeds": list(seeds),
        "protocol": PROTOCOL,
    }
    return digest({"data": data, "probe": probe, "task": [task.name, task.domain, task.metric, task.classes]})


def _settings(embedding: EmbedSettings, root: str | Path | None) -> dict[str, Any]:
    return {
        "root": str(root),
        "pooling": embedding.pooling,
        "limits": asdict(embedding.limits),
        "penalties": list(PENALTIES),
        "train_share": TRAIN_SHARE,
        "probe": "multinomial logistic regression, L2, full-batch L-BFGS",
    }


def _stored(scores_file: str | Path | None) -> Sequence[TaskScore]:
    if scores_file is None or not Path(scores_file).exists():
        return ()
    try:
        return Scores.load(scores_file).entries
    except UserError as error:
        log.warning("%s: %s", scores_file, error)
        return ()


def _check(
    encoders: Mapping[str, FrameEncoder], tasks: Sequence[ProbeTask], seeds: Sequence[int], against: Sequence[str]
) -> None:
    if not (encoders and tasks and seeds):
        raise UserError(f"Nothing to probe: {len(encoders)} encoders, {len(tasks)} tasks, {len(seeds)} seeds.")
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise UserError(f"Two probe tasks have the name {twice[0]!r}. Give each its own.")
    for name in against:
        if name not in encoders:
            raise UserError(
                f"Cannot compare against {name!r}: it is not probed.{nearest(name, encoders)} Probed: {', '.join(encoders)}."
            )
