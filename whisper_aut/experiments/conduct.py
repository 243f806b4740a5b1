"""An experiment from its YAML to its table: what is missing is run, all of it is measured, and the results are written down.

In: `ExperimentSettings`. Out: `OUT/NAME.json`, `NAME.md`, `NAME.png` and `NAME.commands.md`. Next: people, `docs/results.md`, the
notebooks. Stopped anywhere, the same command goes on.
"""

import json
import os
import platform
import shlex
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from whisper_aut.corpora.audit import AUDIT_NAME, read_audit, run_audit, unaudited
from whisper_aut.data.shards import open_index
from whisper_aut.errors import Interrupted, UserError
from whisper_aut.experiments.analysis import (
    MIN_TRAININGS,
    ArmFacts,
    Cost,
    Measure,
    Point,
    Results,
    TaskResult,
    detectable_difference,
)
from whisper_aut.experiments.grid import (
    AnswerSettings,
    Arm,
    Expected,
    ExperimentSettings,
    Found,
    ProbeSetSettings,
    Run,
    all_runs,
    arms_of,
    conf_folder,
    expected_cost,
    find,
    make,
    prepare,
)
from whisper_aut.experiments.tables import commands_page, draw, page, sheets
from whisper_aut.inference.chat import evaluate
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.pipeline import load_tasks, open_run
from whisper_aut.probes.cache import digest
from whisper_aut.probes.embed import BASELINE_NAME, EmbedSettings, FrameEncoder, LogMelBaseline
from whisper_aut.probes.results import TaskScore
from whisper_aut.probes.suite import run_suite
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import write_text


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
        padding_fraction=figures["padding_fraction"],
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
    write_text(place, json.dumps({"identity": identity, "figures": figures}, indent=1))
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


QUIET = Console(quiet=True)  # of the single runs, whose reports lie beside them
PACKAGES = ("whisper-aut", "torch", "transformers", "numpy", "scipy")


@dataclass(frozen=True)
class Conducted:
    """What an experiment wrote."""

    results: Results
    page: Path
    json: Path


def conduct(settings: ExperimentSettings, path: Path, out: Path, console: Console) -> Conducted:
    """Run what is missing of an experiment, measure everything, and write table, figure and JSON to `out`.

    Raises:
        UserError: a mistake in a config, or data that is not there.
        Interrupted: it was asked to stop; what is finished is kept.
    """
    arms = arms_of(settings, path)
    runs = all_runs(arms)
    probes, lacking = probes_there(settings)
    if lacking:
        console.print(
            f"Left out: probe tasks built from {', '.join(lacking)}, which are not there; root=FOLDER names their folder."
        )
    _check_primary(settings, probes, conf_folder(settings, path))
    for corpora in probes:
        settings.corpora.manifests += corpora.manifests
    prepare(settings, runs, console)
    found = _make_all(settings, runs, console)
    bench = Bench(
        settings, conf_folder(settings, path), Path(settings.runs) / settings.name, tuple(probes)
    )
    results = _results(settings, arms, found, bench, console)
    return _write(results, out, console)


def _check_primary(
    settings: ExperimentSettings, probes: Sequence[ProbeSetSettings], conf: Path
) -> None:
    """A primary comparison that is never measured is found before anything is trained."""
    measured = {task.domain for one in probes for task in load_tasks(one.tasks, conf)}
    measured |= {"answers"} if settings.answers.tasks else set()
    measured |= {"loss", "compute"} if settings.thresholds and settings.price else set()
    endpoint = settings.primary.endpoint
    if endpoint and endpoint not in measured:
        raise UserError(
            f"primary.endpoint: {endpoint} is not measured. "
            f"Measured: {', '.join(sorted(measured))}."
        )


def _make_all(
    settings: ExperimentSettings, runs: Sequence[Run], console: Console
) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for number, run in enumerate(runs, 1):
        known = find(run)
        try:
            found[run.name] = known if known.state == "done" else make(run, QUIET)
        except (Interrupted, KeyboardInterrupt) as stop:
            kind = type(stop) if isinstance(stop, Interrupted) else Interrupted
            raise kind(
                f"{settings.name} stopped at run {number} of {len(runs)}, {run.name}; what was reached is saved. "
                "The same command goes on."
            ) from None
        if known.state != "done":
            directory = found[run.name].directory
            assert directory is not None
            cost = cost_of(directory)
            console.print(
                f"[{number}/{len(runs)}] {run.name}: {cost.steps} steps in {cost.seconds:.0f} s"
            )
    return found


def _results(
    settings: ExperimentSettings,
    arms: Sequence[Arm],
    found: dict[str, Found],
    bench: Bench,
    console: Console,
) -> Results:
    measures: list[Measure] = []
    for seed in settings.seeds:
        for arm in arms:
            console.print(f"Measuring {arm.name}, seed {seed}")
            measures.append(
                measure_arm(bench, arm, seed, [found[run.name] for run in arm.runs[seed].chain()])
            )
    return Results(
        name=settings.name,
        title=settings.title,
        question=settings.question,
        reference=settings.reference,
        seeds=tuple(settings.seeds),
        probe_seeds=settings.probe_seeds,
        arms=tuple(ArmFacts(arm.name, arm.titles, arm.choices) for arm in arms),
        measures=tuple(
            sorted(measures, key=lambda measure: [arm.name for arm in arms].index(measure.arm))
        ),
        baseline=measure_baseline(bench) if settings.log_mel and bench.probes else {},
        audits=tuple(_audit(list(found.values()), bench)),
        environment=_environment(),
        settings=_published(settings),
    )


def _audit(found: Sequence[Found], bench: Bench) -> list[str]:
    """Compare every training source of every run with every probe set, once, and return a line for each."""
    train = sorted({source.path for one in found for source in one.settings.data.train})
    lines = []
    for number, probes in enumerate(bench.probes):
        tested = sorted(
            {
                f
                for task in load_tasks(probes.tasks, bench.conf)
                for f in task.tested_folders(probes.root)
            }
        )
        out = bench.work / f"audit-{number}"
        audit = read_audit(out / AUDIT_NAME)
        if not audit or unaudited(audit, "train", train) or unaudited(audit, "probes", tested):
            run_audit(train, tested, out)
            audit = read_audit(out / AUDIT_NAME)
        counts = audit["counts"]
        lines.append(
            f"{counts['train_clips']} training clips ({', '.join(train)}) against {counts['probe_clips']} test clips "
            f"({', '.join(tested)}): {counts['train_clips_that_overlap']} overlap"
        )
    return lines


def _write(results: Results, out: Path, console: Console) -> Conducted:
    out.mkdir(parents=True, exist_ok=True)
    stored = out / f"{results.name}.json"
    results.save(stored)
    (out / f"{results.name}.commands.md").write_text(commands_page(results), encoding="utf-8")
    return analyse(stored, console)


def analyse(stored: Path, console: Console) -> Conducted:
    """Write the page and the figure of stored results into their folder, and print the tables.

    Raises:
        UserError: the file holds no results of this release.
    """
    results = Results.load(stored)
    text = stored.with_name(f"{results.name}.md")
    draw(results, stored.with_name(f"{results.name}.png"))
    text.write_text(
        f"# {results.title}\n\n{results.question}\n\n{page(results, f'{results.name}.png')}",
        encoding="utf-8",
    )
    for sheet in sheets(results):
        console.print(sheet.to_rich())
    return Conducted(results, text, stored)


def plan_table(settings: ExperimentSettings, path: Path) -> Table:
    """Return what would be run: every run, whether it is there, and what it is expected to cost.

    Raises:
        UserError: a mistake in the experiment or in a config of it.
    """
    arms = arms_of(settings, path)
    runs = all_runs(arms)
    found = {run.name: find(run) for run in runs}
    rates = [
        cost.teraflop / cost.seconds
        for one in found.values()
        if (cost := _known_cost(one)) and cost.teraflop and cost.seconds
    ]
    rate = sorted(rates)[len(rates) // 2] if rates else None
    table = Table(
        title=f"{settings.title}: {len(arms)} arms × {len(settings.seeds)} seeds, {len(runs)} runs"
    )
    for name in ("run", "state", "starts from", "steps", "audio heard (s)", "TFLOP", "about"):
        words = name in ("run", "state", "starts from")
        table.add_column(
            name,
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=name in ("run", "state"),
        )
    left = 0.0
    for run in runs:
        expected = expected_cost(run)
        seconds = expected.teraflop / rate if rate and expected.teraflop else None
        left += seconds or 0.0 if found[run.name].state != "done" else 0.0
        origin = (
            f"{'random weights of ' * run.random}{run.start.name}" if run.start else "its config"
        )
        table.add_row(run.name, found[run.name].state, origin, *_expected_cells(expected, seconds))
    to_do = sum(one.state != "done" for one in found.values())
    time = (
        f", about {left / 60:.0f} min of training on this machine"
        if rate
        else "; time is told once a run is done"
    )
    table.caption = f"{to_do} of {len(runs)} runs to make{time}. Measuring comes on top."
    table.caption += f" {_power(len(settings.seeds))}"
    return table


def _power(trainings: int) -> str:
    if trainings < MIN_TRAININGS:
        return f"Fewer than {MIN_TRAININGS} seeds: differences are shown, and nothing is claimed."
    smallest = detectable_difference(1, trainings)
    return (
        f"{trainings} trainings find a primary difference of {smallest:.1f} standard deviations "
        "between trainings with a probability of 80 %."
    )


def _known_cost(found: Found) -> Any:
    return cost_of(found.directory) if found.state == "done" and found.directory else None


def _expected_cells(expected: Expected, seconds: float | None) -> tuple[str, ...]:
    numbers = (
        (expected.steps, "{:.0f}"),
        (expected.audio_seconds, "{:.0f}"),
        (expected.teraflop, "{:.2f}"),
        (seconds, "{:.0f} s"),
    )
    return tuple("–" if value is None else written.format(value) for value, written in numbers)


def _published(settings: ExperimentSettings) -> dict[str, Any]:
    """Return the settings without the places of this machine."""
    values = asdict(settings)
    for name in ("root", "runs", "corpora", "conf", "data"):
        values.pop(name)
    for probes in values["probes"]:
        probes.pop("manifests")
    return json.loads(json.dumps(values))


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
