"""Finished runs → measures: probe scores, answers, the loss curve and the price of training.

In: an `Arm` and its finished run. Out: a `Measure`. Next: `experiments.results`. Encoders are scored by the same suite as everywhere,
protocol `strict`: penalties are chosen on validation clips, a test split is read once for each arm and seed, and chooses nothing.
"""

import json
import shlex
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whisper_aut.corpora.shards import open_index
from whisper_aut.errors import UserError
from whisper_aut.experiments.grid import Arm
from whisper_aut.experiments.results import Cost, Measure, Point, TaskResult
from whisper_aut.experiments.runs import Found
from whisper_aut.experiments.settings import AnswerSettings, ExperimentSettings, ProbeSetSettings
from whisper_aut.export.chat import evaluate
from whisper_aut.model.pretrained import load_encoder
from whisper_aut.pipeline import load_tasks, open_run
from whisper_aut.probes.baseline import BASELINE_NAME, LogMelBaseline
from whisper_aut.probes.cache import digest
from whisper_aut.probes.embed import EmbedSettings, FrameEncoder
from whisper_aut.probes.scores import TaskScore
from whisper_aut.probes.suite import run_suite
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.rundir import RunDirectory, write_whole


@dataclass(frozen=True)
class Bench:
    """Where and by what arms are measured.

    Attributes:
        conf: folder of `probe_tasks/`.
        work: scores, embeddings and answers are kept here.
        probes: the sets that are there.
    """

    settings: ExperimentSettings
    conf: Path
    work: Path
    probes: tuple[ProbeSetSettings, ...]

    @property
    def embeddings(self) -> Path:
        return Path(self.settings.runs) / "embeddings"


def measure_arm(bench: Bench, arm: Arm, seed: int, chain: Sequence[Found]) -> Measure:
    """Measure one arm with one seed, whose runs are all there.

    Args:
        chain: the arm's runs from the first start to its own.

    Raises:
        UserError: probe shards cannot be read.
    """
    own = chain[-1]
    assert own.directory is not None
    padding = arm.evaluate.padding or own.settings.model.padding
    export = str(own.export())
    encoder = load_encoder(export, padding=padding, random_init=arm.random, seed=seed)
    embedding = EmbedSettings(
        pooling=arm.evaluate.pooling or "mean",
        layers=() if arm.evaluate.layer is None else (arm.evaluate.layer,),
        quiet=True,
    )
    label = f"{arm.name.replace('/', '-')}-s{seed}"
    priced = bench.settings.price and not arm.random
    asked = (
        bench.settings.answers
        if priced and own.settings.decoder["name"] == "causal_lm"
        else AnswerSettings()
    )
    commands = [found.command for found in chain]
    commands += [_probe_command(bench, arm, probes, export, padding) for probes in bench.probes]
    return Measure(
        arm=arm.name,
        seed=seed,
        tasks=_scored(bench, label, encoder, embedding),
        answers=_answers(bench, own, asked),
        curve=tuple(curve_of(own.directory)) if priced else (),
        cost=cost_of(own.directory) if priced else None,
        commands=tuple(commands),
    )


def measure_baseline(bench: Bench) -> dict[str, TaskResult]:
    """Score log-mel statistics, which know nothing of training."""
    return _scored(
        bench, BASELINE_NAME.replace(" ", "-"), LogMelBaseline(), EmbedSettings(quiet=True)
    )


def cost_of(run: RunDirectory) -> Cost:
    """Return what a finished run took, from its own meters."""
    done = json.loads(run.done.read_text())
    figures = {name.removeprefix("throughput/"): value for name, value in done["metrics"].items()}
    return Cost(
        steps=done["steps"],
        audio_seconds=figures["total_audio_seconds"],
        teraflop=figures.get("total_teraflop"),
        seconds=figures["total_seconds"],
        padding_share=figures["padding_share"],
    )


def curve_of(run: RunDirectory) -> list[Point]:
    """Return the validation losses of a run beside what it had spent at each."""
    series = read_metrics(run.metrics)
    spent = {
        name: series.get(f"throughput/total_{name}", [])
        for name in ("audio_seconds", "teraflop", "seconds")
    }
    last, points = json.loads(run.done.read_text())["steps"], []
    for logged, loss in series.get("valid/loss", []):
        step = min(
            logged + 1, last
        )  # Lightning logs a validation under the number of the step before, counted from 0
        seconds, audio, work = (
            _until(spent[name], step) for name in ("seconds", "audio_seconds", "teraflop")
        )
        points.append(Point(int(step), loss, audio or 0.0, work, seconds or 0.0))
    return points


def _until(series: Sequence[tuple[float, float]], step: float) -> float | None:
    """Return the last value at or before a step."""
    place = bisect_right([at for at, _ in series], step)
    return series[place - 1][1] if place else None


def _scored(
    bench: Bench, label: str, encoder: FrameEncoder, embedding: EmbedSettings
) -> dict[str, TaskResult]:
    found: dict[str, TaskResult] = {}
    for number, probes in enumerate(bench.probes):
        scores = run_suite(
            {label: encoder},
            load_tasks(probes.tasks, bench.conf),
            root=probes.root,
            cache=bench.embeddings,
            seeds=range(bench.settings.probe_seeds),
            embedding=embedding,
            scores_file=bench.work / "scores" / f"{label}-{number}.json",
        )
        found |= {
            entry.task: _result(entry, bench.settings.probe_seeds) for entry in scores.entries
        }
    return found


def _result(entry: TaskScore, probe_seeds: int) -> TaskResult:
    valid = [score for score in entry.valid_scores if score is not None]
    return TaskResult(
        title=entry.title,
        domain=entry.domain,
        score=round(entry.mean, 6),
        spread=None if entry.std is None else round(entry.std, 6),
        valid=round(sum(valid) / len(valid), 6) if valid else None,
        right=_digits(entry.record if entry.seeds else entry.record * probe_seeds),
        keys=entry.keys_sha256,
        test_clips=entry.test_clips,
    )


def _digits(record: Sequence[Any]) -> str:
    """Count per clip in how many probe seeds it was right; a probe without seeds is the same in each."""
    if not all(isinstance(seed, str) for seed in record):
        return ""
    return "".join(str(sum(map(int, clip))) for clip in zip(*record, strict=True))


@torch.inference_mode()
def _answers(bench: Bench, found: Found, asked: AnswerSettings) -> dict[str, float]:
    """Ask a run's language model about held-out clips, or find what it answered before."""
    if not asked.tasks:
        return {}
    assert found.directory is not None
    shards = {task: open_index(folder).fingerprint() for task, folder in asked.tasks.items()}
    done = json.loads(found.directory.done.read_text())
    identity = digest({"run": done["fingerprint"], "shards": shards, "limit": asked.limit})
    place = bench.work / "answers" / f"{found.run.name}.json"
    if (known := _read(place)).get("identity") == identity:
        return known["figures"]
    module, figures = open_run(found.directory.path), dict[str, float]()
    for task, folder in asked.tasks.items():
        result = evaluate(module, [folder], tasks=[task], limit=asked.limit, max_new_tokens=32)
        figures |= {
            name: round(value, 6)
            for name, value in result.figures.items()
            if not name.startswith("cer_")
        }
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, json.dumps({"identity": identity, "figures": figures}, indent=1))
    return figures


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _probe_command(
    bench: Bench, arm: Arm, probes: ProbeSetSettings, export: str, padding: str
) -> str:
    parts = [
        "whisper-aut",
        "probe",
        f"random:{export}" if arm.random else export,
        "--tasks",
        *probes.tasks,
    ]
    parts += [
        "--root",
        probes.root,
        "--seeds",
        str(bench.settings.probe_seeds),
        "--padding",
        padding,
    ]
    parts += ["--pooling", arm.evaluate.pooling] if arm.evaluate.pooling else []
    parts += ["--layers", str(arm.evaluate.layer)] if arm.evaluate.layer is not None else []
    return shlex.join([*parts, "--conf", str(bench.conf), "--out", str(bench.work / "probe")])


def probes_there(settings: ExperimentSettings) -> tuple[list[ProbeSetSettings], list[str]]:
    """Return the probe sets that can be read or built, and the manifests for lack of which optional ones cannot.

    Raises:
        UserError: what a set that is not optional is built from is not there.
    """
    found, lacking = [], []
    for probes in settings.probes:
        missing = [
            m.manifest
            for m in probes.manifests
            if not Path(m.manifest).is_file() and not Path(m.out).is_dir()
        ]
        if missing and not probes.optional:
            raise UserError(
                f"There is no {', '.join(missing)}. Give the folder that holds them: root=FOLDER"
            )
        lacking += missing
        found += [] if missing else [probes]
    return found, lacking
