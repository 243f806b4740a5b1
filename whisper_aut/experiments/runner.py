"""Run an experiment: train what is missing of its grid, measure every encoder, save the results."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import cast

from rich.console import Console

from whisper_aut.config import CorporaSettings, Domain, load_settings
from whisper_aut.corpora.audit import AUDIT_NAME, read_audit, run_audit, unaudited
from whisper_aut.data.shards import open_index
from whisper_aut.errors import Interrupted, UserError
from whisper_aut.experiments.analysis import Measurement, Progress, Results, TaskMetadata
from whisper_aut.experiments.grid import (
    SEPARATOR,
    Arm,
    Experiment,
    ExperimentSettings,
    FoundRun,
    ProbeSetSettings,
    QuestionSettings,
    Run,
    find_run,
    make_run,
)
from whisper_aut.inference.chat import evaluate
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.loading import load_tasks, open_run
from whisper_aut.pipeline import check_before_corpora, prepare_corpora
from whisper_aut.probes.embed import EmbedSettings, digest
from whisper_aut.probes.encoders import FrameEncoder, LogMelBaseline
from whisper_aut.probes.stats import MIN_TRAININGS, detectable_difference
from whisper_aut.probes.suite import run_suite
from whisper_aut.report.plots import read_metrics
from whisper_aut.report.tables import BLANK, Table
from whisper_aut.training.plan import build_forecast, planned_config
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.utils import read_json, write_json

ENVIRONMENT_KEYS = ("python", "cpus", "gpus", "packages", "git")


def run_experiment(experiment: Experiment, out: Path, console: Console) -> Path:
    """Train what is missing, measure all arms, and write the results to `out/NAME.json`.

    Raises:
        UserError: A config has a mistake, or data is missing.
        Interrupted: The user stopped; the same command resumes.
    """
    settings, runs = experiment.settings, experiment.runs
    probe_sets, missing = available_probes(settings)
    if missing:
        console.print(
            f"Skipped probes whose manifests are missing: {', '.join(missing)}. "
            "Set root=FOLDER to the folder that contains them."
        )
    evaluator = Evaluator(settings, experiment.conf, probe_sets)
    evaluator.check_primary()
    manifests = [manifest for one in probe_sets for manifest in one.manifests]
    configs = {run: load_settings(run.config, run.overrides) for run in runs}
    for run, config in configs.items():
        if not run.pretrained:  # the others start from its model
            check_before_corpora(config, run.config)
    prepare_corpora(CorporaSettings(None, manifests), console)
    for config in configs.values():
        prepare_corpora(config.corpora, console)
    found = _make_all(settings.name, runs, console)
    measurements = []
    for seed, arm in product(settings.seeds, experiment.arms):
        console.print(f"Measuring {arm.name}, seed {seed}")
        measurements.append(evaluator.measure(arm, seed, found[arm.runs[seed].name]))
    environment = read_json(found[runs[-1].name].directory.environment, default={})
    results = Results(
        **{one.name: getattr(settings, one.name) for one in fields(QuestionSettings)},
        arms={arm.name: arm.titles for arm in experiment.arms},
        measurements=tuple(measurements),
        baseline=evaluator.score("log-mel", LogMelBaseline(), EmbedSettings(quiet=True)),
        tasks=evaluator.tasks,
        audits=tuple(evaluator.audit(list(found.values()))),
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
        end = training_curve(made[run.name].directory)[-1]
        progress = f"[{number}/{len(runs)}] {run.name}"
        console.print(f"{progress}: {end.step} steps in {end.seconds:.0f} s", markup=False)
    return made


def available_probes(settings: ExperimentSettings) -> tuple[list[ProbeSetSettings], list[str]]:
    """Return the probes that can be read or built, and the missing manifests of optional ones.

    Raises:
        UserError: A manifest of probes that are not optional is missing.
    """
    available, all_missing = [], []
    for probes in settings.probes:
        missing = [
            str(one.manifest)
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


class Evaluator:
    """Measures arms. Scores, embeddings and answers are stored on disk and reused.

    Attributes:
        tasks: What is known about the tasks that were scored so far.
    """

    def __init__(
        self, settings: ExperimentSettings, conf: Path, probes: Sequence[ProbeSetSettings]
    ):
        self.settings, self.answers = settings, settings.answers
        self.probes = [(one.root, load_tasks(one.tasks, conf)) for one in probes]
        self.folder = Path(settings.runs) / settings.name
        self.tasks: dict[str, TaskMetadata] = {}
        self._test_clips: dict[str, str] = {}  # task → hash of the names of its test clips

    def check_primary(self) -> None:
        """Check before training that the primary comparison will be measured."""
        measured = {task.domain for _, tasks in self.probes for task in tasks}
        measured |= {"answers"} if self.answers.tasks else set()
        measured |= {"loss", "compute"} if self.settings.thresholds else set()
        endpoint = self.settings.primary.endpoint
        if endpoint and endpoint not in measured:
            raise UserError(
                f"primary.endpoint: {endpoint} is not measured. "
                f"Measured: {', '.join(sorted(measured))}."
            )

    def measure(self, arm: Arm, seed: int, found: FoundRun) -> Measurement:
        """Measure one arm with one seed, whose run is finished."""
        options, scores = arm.evaluate, {}
        if self.probes:
            padding = options.padding or found.settings.model.padding
            encoder = load_encoder(
                str(found.export), padding=padding, random_init=arm.random, seed=seed
            )
            layers = () if options.layer is None else (options.layer,)
            embedding = EmbedSettings(pooling=options.pooling or "mean", layers=layers, quiet=True)
            label = f"{arm.name.replace(SEPARATOR, '-')}-s{seed}"
            scores = self.score(label, encoder, embedding)
        if arm.random:
            return Measurement(arm.name, seed, scores)
        curve, metrics = training_curve(found.directory), read_json(found.directory.done)["metrics"]
        padding = metrics["throughput/padding_fraction"]
        return Measurement(arm.name, seed, scores, self._answer(found), curve, padding)

    def score(
        self, label: str, encoder: FrameEncoder, embedding: EmbedSettings
    ) -> dict[str, float]:
        """Return the score of each probe task.

        Raises:
            UserError: The test clips are not those of the encoders before.
        """
        found: dict[str, float] = {}
        for number, (root, tasks) in enumerate(self.probes):
            scores = run_suite(
                {label: encoder},
                tasks,
                root=root,
                cache=Path(self.settings.runs) / "embeddings",
                embedding=embedding,
                scores_file=self.folder / "scores" / f"{label}-{number}.json",
            )
            for entry in scores.entries:
                domain = cast(Domain, entry.domain)
                self.tasks[entry.task] = TaskMetadata(entry.title, domain, entry.test_clips)
                clips = self._test_clips.setdefault(entry.task, entry.keys_sha256)
                if clips != entry.keys_sha256:
                    raise UserError(
                        f"Arms were tested on different clips of {entry.task!r}, because its "
                        "shards have changed. Run the experiment again."
                    )
                found[entry.task] = round(entry.mean, 6)
        return found

    def _answer(self, found: FoundRun) -> dict[str, float]:
        """Return the metrics of a language model's answers about test clips."""
        if not self.answers.tasks or found.settings.decoder["name"] != "causal_lm":
            return {}
        options = {"limit": self.answers.limit, "max_new_tokens": self.answers.max_new_tokens}
        tasks = self.answers.tasks
        shards = {
            task: [open_index(folder).fingerprint() for folder in folders]
            for task, folders in tasks.items()
        }
        fingerprint = read_json(found.directory.done)["fingerprint"]
        identity = digest({"run": fingerprint, "shards": shards, **options})
        path = self.folder / "answers" / f"{found.run.name}.json"
        stored = read_json(path, default={})
        if stored.get("identity") == identity:
            return stored["metrics"]
        device = "cpu" if found.settings.hardware.accelerator == "cpu" else "auto"
        module = open_run(found.directory.path, device=device)
        metrics: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for task, folders in tasks.items():
            out = path.with_name(f"{found.run.name}-{task}.jsonl")
            result = evaluate(module, folders, tasks=[task], out=out, **options)
            for name, value in result.metrics.items():
                metrics |= {} if name.startswith("cer_") else {name: round(value, 6)}
        write_json(path, {"identity": identity, "metrics": metrics})
        return metrics

    def audit(self, found: Sequence[FoundRun]) -> list[str]:
        """Compare all training sources with each set of probes, and return one line for each."""
        train = sorted({source.path for one in found for source in one.settings.data.train})
        lines = []
        for number, (root, tasks) in enumerate(self.probes):
            tested = sorted({folder for task in tasks for folder in task.test_folders(root)})
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


def training_curve(run: RunDirectory) -> tuple[Progress, ...]:
    """Return a finished run at each of its validations and at its end."""
    done, series = read_json(run.done), read_metrics(run.metrics)
    last = done["steps"]
    # Lightning logs a validation with the number of the step before it, counted from 0.
    losses: dict[float, float | None] = {
        min(logged + 1, last): loss for logged, loss in series.get("valid/loss", [])
    }
    losses.setdefault(last, None)

    def total(name: str, step: float) -> float | None:
        if losses[step] is None:
            return done["metrics"].get(name)
        points = series.get(name, [])
        index = bisect_right(points, step, key=lambda point: point[0])
        return points[index - 1][1] if index else None

    return tuple(
        Progress(
            step=int(step),
            loss=loss,
            audio_seconds=total("throughput/total_audio_seconds", step) or 0.0,
            teraflop=total("throughput/total_teraflop", step),
            seconds=total("throughput/total_seconds", step) or 0.0,
        )
        for step, loss in losses.items()
    )


def plan_table(experiment: Experiment) -> Table:
    """Return all runs with their state and expected cost."""
    found, rows = [find_run(run) for run in experiment.runs], []
    costs: dict[str, tuple[str, str, str]] = {}
    for one in found:
        arm = one.run.name.rpartition("-s")[0]  # all its seeds cost the same
        costs[arm] = costs.get(arm) or _expected_cost(one)
        origin = one.run.pretrained.name if one.run.pretrained else "its config"
        origin = f"random weights of {origin}" if one.run.random else origin
        rows.append((one.run.name, one.state, origin, *costs[arm]))
    missing, seeds = sum(one.state != "done" for one in found), len(experiment.settings.seeds)
    power = f"Fewer than {MIN_TRAININGS} seeds: the results will not support any claim."
    if seeds >= MIN_TRAININGS:
        power = (
            f"{seeds} runs detect a primary difference of {detectable_difference(1, seeds):.1f} "
            "standard deviations between runs with a probability of 80 %."
        )
    return Table(
        f"{experiment.settings.title}: {len(experiment.arms)} arms × {seeds} seeds, "
        f"{len(found)} runs",
        ("run", "state", "starts from", "steps", "audio (s)", "TFLOP"),
        tuple(rows),
        text_columns=3,
        caption=f"{missing} of {len(found)} runs to train, then to measure. {power}",
    )


def _expected_cost(found: FoundRun) -> tuple[str, str, str]:
    """Return steps, audio seconds and TFLOP, as `whisper-aut plan` predicts them."""
    first = found.run.chain()[0]  # a missing checkpoint has the size of the first one in the chain
    model = load_settings(first.config, first.overrides).model
    try:
        forecast = build_forecast(found.settings, planned_config(model))
    except UserError:
        return str(found.settings.trainer.max_steps or BLANK), BLANK, BLANK
    if forecast.steps is None:
        return BLANK, BLANK, BLANK
    teraflop = forecast.steps * forecast.micro_batches * forecast.cost.model_flops / 1e12
    audio_seconds = forecast.steps * forecast.step_audio_seconds
    return str(forecast.steps), f"{audio_seconds:.0f}", f"{teraflop:.2f}"
