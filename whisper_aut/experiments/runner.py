"""Run an experiment: train what is missing of its grid, measure every encoder, save the results."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from whisper_aut.config import CorporaSettings, load_settings
from whisper_aut.corpora.audit import AUDIT_NAME, read_audit, run_audit, unaudited
from whisper_aut.data.shards import open_index
from whisper_aut.errors import Interrupted, UserError
from whisper_aut.experiments.analysis import (
    MIN_RUNS,
    Cost,
    Measurement,
    Results,
    TaskMetadata,
    Validation,
    detectable_difference,
)
from whisper_aut.experiments.grid import (
    SEPARATOR,
    Arm,
    ExperimentSettings,
    FoundRun,
    ProbeSetSettings,
    Run,
    all_runs,
    arms_of,
    conf_folder,
    find_run,
    make_run,
)
from whisper_aut.inference.chat import evaluate
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.loading import load_tasks, open_run
from whisper_aut.pipeline import prepare_corpora
from whisper_aut.probes.embed import EmbedSettings, FrameEncoder, LogMelBaseline, digest
from whisper_aut.probes.results import Scores
from whisper_aut.probes.suite import run_suite
from whisper_aut.report.plots import Series, read_metrics
from whisper_aut.training.plan import build_forecast, planned_config
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import read_json, write_json

ENVIRONMENT_KEYS = ("python", "cpus", "gpus", "packages", "git")


def run_experiment(settings: ExperimentSettings, path: Path, out: Path, console: Console) -> Path:
    """Train what is missing, measure all arms, and write the results to `out/NAME.json`.

    Raises:
        UserError: A config has a mistake, or data is missing.
        Interrupted: The user stopped; the same command resumes.
    """
    arms, conf = arms_of(settings, path), conf_folder(path)
    runs = all_runs(arms)
    probes, missing = available_probes(settings)
    if missing:
        console.print(
            f"Skipped probes whose manifests are missing: {', '.join(missing)}. "
            "Set root=FOLDER to the folder that contains them."
        )
    _check_primary(settings, probes, conf)
    prepare_corpora(CorporaSettings(None, [m for one in probes for m in one.manifests]), console)
    for run in runs:
        prepare_corpora(load_settings(run.config, run.overrides).corpora, console)
    found = _make_all(settings.name, runs, console)
    evaluator = ArmEvaluator(settings, conf, probes)
    measurements = []
    for seed, arm in product(settings.seeds, arms):
        console.print(f"Measuring {arm.name}, seed {seed}")
        measurements.append(evaluator.measure(arm, seed, found[arm.runs[seed].name]))
    environment = read_json(found[runs[-1].name].directory.environment, default={})
    results = Results(
        name=settings.name,
        title=settings.title,
        question=settings.question,
        reference=settings.reference,
        arms={arm.name: arm.titles for arm in arms},
        tasks=evaluator.tasks,
        measurements=tuple(measurements),
        baseline=evaluator.score("log-mel", LogMelBaseline(), EmbedSettings(quiet=True)),
        audits=tuple(evaluator.audit(list(found.values()))),
        settings={
            name: asdict(settings)[name] for name in ("primary", "margin", "thresholds", "figure")
        },
        environment={
            "date": datetime.now(UTC).date().isoformat(),
            **{key: environment.get(key) for key in ENVIRONMENT_KEYS},
        },
    )
    results.save(out / f"{settings.name}.json")
    return out / f"{settings.name}.json"


def _make_all(name: str, runs: Sequence[Run], console: Console) -> dict[str, FoundRun]:
    made: dict[str, FoundRun] = {}
    for number, run in enumerate(runs, 1):
        made[run.name] = find_run(run)
        if made[run.name].state == "done":
            continue
        try:
            made[run.name] = make_run(run, Console(quiet=True))
        except (Interrupted, KeyboardInterrupt) as stop:
            kind = type(stop) if isinstance(stop, Interrupted) else Interrupted
            raise kind(
                f"{name} stopped at run {number} of {len(runs)}, {run.name}. Progress is saved; "
                "run the same command to resume."
            ) from None
        cost = cost_of(made[run.name].directory)
        progress = f"[{number}/{len(runs)}] {run.name}"
        console.print(f"{progress}: {cost.steps} steps in {cost.seconds:.0f} s", markup=False)
    return made


def available_probes(settings: ExperimentSettings) -> tuple[list[ProbeSetSettings], list[str]]:
    """Return the probes that can be read or built, and the missing manifests of optional ones.

    Raises:
        UserError: A manifest of probes that are not optional is missing.
    """
    available, all_missing = [], []
    for probes in settings.probes:
        missing = [
            one.manifest
            for one in probes.manifests
            if not Path(one.manifest).is_file() and not Path(one.out).is_dir()
        ]
        if missing and not probes.optional:
            raise UserError(
                f"There is no {', '.join(missing)}. Set root=FOLDER to the folder that contains it."
            )
        all_missing += missing
        available += [] if missing else [probes]
    return available, all_missing


def _check_primary(
    settings: ExperimentSettings, probes: Sequence[ProbeSetSettings], conf: Path
) -> None:
    """Check before training that the primary comparison will be measured."""
    measured = {task.domain for one in probes for task in load_tasks(one.tasks, conf)}
    measured |= {"answers"} if settings.answers.tasks else set()
    measured |= {"loss", "compute"} if settings.thresholds else set()
    endpoint = settings.primary.endpoint
    if endpoint and endpoint not in measured:
        raise UserError(
            f"primary.endpoint: {endpoint} is not measured. "
            f"Measured: {', '.join(sorted(measured))}."
        )


class ArmEvaluator:
    """Measures arms. Scores, embeddings and answers are stored on disk and reused."""

    def __init__(
        self, settings: ExperimentSettings, conf: Path, probes: Sequence[ProbeSetSettings]
    ):
        self.settings, self.conf, self.probes = settings, conf, probes
        self.folder = Path(settings.runs) / settings.name
        self.tasks: dict[str, TaskMetadata] = {}
        self._test_clips: dict[str, str] = {}  # task → hash of the names of its test clips

    def measure(self, arm: Arm, seed: int, found: FoundRun) -> Measurement:
        """Measure one arm with one seed, whose run is finished."""
        options = arm.evaluate
        encoder = load_encoder(
            str(found.export),
            padding=options.padding or found.settings.model.padding,
            random_init=arm.random,
            seed=seed,
        )
        layers = () if options.layer is None else (options.layer,)
        embedding = EmbedSettings(pooling=options.pooling or "mean", layers=layers, quiet=True)
        label = f"{arm.name.replace(SEPARATOR, '-')}-s{seed}"
        trained = not arm.random
        return Measurement(
            arm=arm.name,
            seed=seed,
            scores=self.score(label, encoder, embedding),
            answers=self._answer(found) if trained else {},
            curve=tuple(loss_curve(found.directory)) if trained else (),
            cost=cost_of(found.directory) if trained else None,
        )

    def score(
        self, label: str, encoder: FrameEncoder, embedding: EmbedSettings
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, probes in enumerate(self.probes):
            scores = run_suite(
                {label: encoder},
                load_tasks(probes.tasks, self.conf),
                root=probes.root,
                cache=Path(self.settings.runs) / "embeddings",
                embedding=embedding,
                scores_file=self.folder / "scores" / f"{label}-{number}.json",
            )
            self._check_clips(scores)
            found |= {entry.task: round(entry.mean, 6) for entry in scores.entries}
        return found

    def _check_clips(self, scores: Scores) -> None:
        for entry in scores.entries:
            self.tasks[entry.task] = TaskMetadata(entry.title, entry.domain, entry.test_clips)
            first = self._test_clips.setdefault(entry.task, entry.keys_sha256)
            if first != entry.keys_sha256:
                raise UserError(
                    f"Arms were tested on different clips of {entry.task!r}, because its shards "
                    "have changed. Run the experiment again."
                )

    def _answer(self, found: FoundRun) -> dict[str, float]:
        """Return the metrics of a language model's answers about test clips."""
        answers = self.settings.answers
        if not answers.tasks or found.settings.decoder["name"] != "causal_lm":
            return {}
        shards = {task: open_index(folder).fingerprint() for task, folder in answers.tasks.items()}
        fingerprint = read_json(found.directory.done)["fingerprint"]
        identity = digest({"run": fingerprint, "shards": shards, "limit": answers.limit})
        path = self.folder / "answers" / f"{found.run.name}.json"
        stored = read_json(path, default={})
        if stored.get("identity") == identity:
            return stored["metrics"]
        module = open_run(found.directory.path)
        metrics: dict[str, float] = {}
        for task, folder in answers.tasks.items():
            result = evaluate(
                module, [folder], tasks=[task], limit=answers.limit, max_new_tokens=32
            )
            metrics |= {name: round(value, 6) for name, value in result.metrics.items()}
        metrics = {name: value for name, value in metrics.items() if not name.startswith("cer_")}
        write_json(path, {"identity": identity, "metrics": metrics})
        return metrics

    def audit(self, found: Sequence[FoundRun]) -> list[str]:
        """Compare all training sources with each set of probes, and return one line for each."""
        train = sorted({source.path for one in found for source in one.settings.data.train})
        lines = []
        for number, probes in enumerate(self.probes):
            tasks = load_tasks(probes.tasks, self.conf)
            tested = sorted({f for task in tasks for f in task.test_folders(probes.root)})
            out = self.folder / f"audit-{number}"
            audit = read_audit(out / AUDIT_NAME)
            if not audit or unaudited(audit, "train", train) or unaudited(audit, "probes", tested):
                audit = run_audit(train, tested, out)
            counts = audit["counts"]
            lines.append(
                f"{counts['train_clips']} training clips ({', '.join(train)}) and "
                f"{counts['probe_clips']} test clips ({', '.join(tested)}): "
                f"{counts['train_clips_that_overlap']} training clips overlap"
            )
        return lines


def cost_of(run: RunDirectory) -> Cost:
    """Return the totals that a finished run logged."""
    done = read_json(run.done)
    logged = {name.removeprefix("throughput/"): value for name, value in done["metrics"].items()}
    return Cost(
        steps=done["steps"],
        audio_seconds=logged["total_audio_seconds"],
        teraflop=logged.get("total_teraflop"),
        seconds=logged["total_seconds"],
        padding_fraction=logged["padding_fraction"],
    )


def loss_curve(run: RunDirectory) -> list[Validation]:
    """Return the validation losses of a finished run, with the cost up to each."""
    series = read_metrics(run.metrics)
    last_step, curve = read_json(run.done)["steps"], []

    def total(name: str, step: float) -> float | None:
        points: Series = series.get(f"throughput/total_{name}", [])
        index = bisect_right([logged for logged, _ in points], step)
        return points[index - 1][1] if index else None

    for logged, loss in series.get("valid/loss", []):
        # Lightning logs a validation with the number of the step before it, counted from 0.
        step = min(logged + 1, last_step)
        audio, seconds = total("audio_seconds", step) or 0.0, total("seconds", step) or 0.0
        curve.append(Validation(int(step), loss, audio, total("teraflop", step), seconds))
    return curve


def plan_table(settings: ExperimentSettings, path: Path) -> Table:
    """Return all runs with their state and expected cost."""
    arms = arms_of(settings, path)
    found = [find_run(run) for run in all_runs(arms)]
    costs = [cost_of(one.directory) for one in found if one.state == "done"]
    rates = [cost.teraflop / cost.seconds for cost in costs if cost.teraflop and cost.seconds]
    rate = median(rates) if rates else None  # TFLOP per second
    table = Table(
        title=f"{settings.title}: {len(arms)} arms × {len(settings.seeds)} seeds, {len(found)} runs"
    )
    for name in ("run", "state", "starts from"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "audio (s)", "TFLOP", "seconds"):
        table.add_column(name, justify="right")
    remaining_seconds = 0.0
    for one in found:
        steps, audio_seconds, teraflop = _expected_cost(one.run)
        seconds = teraflop / rate if rate and teraflop else None
        remaining_seconds += seconds if seconds and one.state != "done" else 0.0
        origin = one.run.pretrained.name if one.run.pretrained else "its config"
        table.add_row(
            one.run.name,
            one.state,
            f"random weights of {origin}" if one.run.random else origin,
            *("–" if value is None else f"{value:.0f}" for value in (steps, audio_seconds)),
            "–" if teraflop is None else f"{teraflop:.2f}",
            "–" if seconds is None else f"{seconds:.0f}",
        )
    missing, runs = sum(one.state != "done" for one in found), len(settings.seeds)
    time = f", about {remaining_seconds / 60:.0f} min on this machine" if rate else ""
    power = f"Fewer than {MIN_RUNS} seeds: the results will not support any claim."
    if runs >= MIN_RUNS:
        power = (
            f"{runs} runs detect a primary difference of {detectable_difference(1, runs):.1f} "
            "standard deviations between runs with a probability of 80 %."
        )
    table.caption = f"{missing} of {len(found)} runs to train{time}, then to measure. {power}"
    return table


def _expected_cost(run: Run) -> tuple[float | None, float | None, float | None]:
    """Return steps, audio seconds and TFLOP, as `whisper-aut plan` predicts them."""
    settings = load_settings(run.config, run.overrides)
    first = run.chain()[0]  # a missing checkpoint has the size of the first one in the chain
    model = load_settings(first.config, first.overrides).model
    try:
        forecast = build_forecast(settings, planned_config(model))
    except UserError:
        return settings.trainer.max_steps, None, None
    if forecast.steps is None:
        return None, None, None
    flops = forecast.steps * forecast.micro_batches * forecast.cost.model_flops
    return forecast.steps, forecast.steps * forecast.step_audio_seconds, flops / 1e12
