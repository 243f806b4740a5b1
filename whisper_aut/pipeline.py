"""Runs a config from start to end: corpora, start model, training, export, probes and report.

Each step is also a command. Results of earlier runs are reused if nothing has changed.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from whisper_aut.audio.windows import BATCH_SECONDS
from whisper_aut.config import (
    LOCAL,
    CorporaSettings,
    ManifestSettings,
    Settings,
    find_config,
    load_settings,
)
from whisper_aut.corpora.audit import AUDIT_NAME, EXCLUDE_NAME, read_audit, unaudited
from whisper_aut.corpora.build import build_shards
from whisper_aut.corpora.manifest import ManifestSpec
from whisper_aut.corpora.synth.corpus import DemoOptions, build_demo
from whisper_aut.errors import Interrupted, Problems, UserError
from whisper_aut.export.card import write_card
from whisper_aut.export.hf import ExportKind, export_checkpoint, find_checkpoint, read_checkpoint
from whisper_aut.inference.demo import DemoModels
from whisper_aut.inference.encoder import (
    DTYPES,
    AudioEncoder,
    device_name,
    load_encoder,
    resolve_device,
    split_padding,
)
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import Padding
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.probes.callback import ForgettingGuard, ProbeDuringTraining
from whisper_aut.probes.embed import (
    BASELINE_NAME,
    EmbedSettings,
    FrameEncoder,
    LogMelBaseline,
)
from whisper_aut.probes.fit import FinalFit
from whisper_aut.probes.suite import (
    embed_on_ranks,
    find_problems,
    process_group,
    rank_and_world_size,
    run_suite,
)
from whisper_aut.probes.tasks import ProbeTask, expand_suites, load_task
from whisper_aut.report.html import build_report
from whisper_aut.training.doctor import check_accelerator
from whisper_aut.training.factory import build_pretrained, build_trained
from whisper_aut.training.plan import build_forecast, forecast_tables, planned_config
from whisper_aut.training.run_dir import RunDirectory, is_first_rank, list_runs, wait_for_all_ranks
from whisper_aut.training.train import TrainResult, train
from whisper_aut.utils import file_lock

# Names of encoders on a command line: log-mel statistics, and a prefix for random weights.
LOGMEL, RANDOM_PREFIX = "logmel", "random:"


@dataclass(frozen=True)
class Story:
    """How to run a config.

    Attributes:
        config: path of the config. Configs that it names are searched next to it first.
        overrides: the `key=value` overrides of the command line, for the command that resumes.
        resume, fresh: see `training.train`.
        report: write the report of the run. `whisper-aut report RUN` writes it later.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    resume: str = ""
    fresh: bool = False
    report: bool = True

    @property
    def tasks_folder(self) -> Path:
        """Searched for probe tasks before the package: the config's folder, else `conf`."""
        near = self.config.parent
        return near if (near / "probe_tasks").is_dir() else LOCAL


def run_config(
    config: str | Path, overrides: Sequence[str] = (), console: Console | None = None
) -> RunDirectory:
    """Load a config and run it, like `whisper-aut train CONFIG key=value …`.

    Args:
        config: path or name of the config, see `config.find_config`.
        overrides: `key=value` or `group=choice`.
        console: for messages. By default, only progress bars are shown.

    Returns:
        The finished run directory.

    Raises:
        UserError: a mistake in the config or the data.
        Interrupted: training was stopped by a signal.
    """
    path = find_config(config)
    settings = load_settings(path, overrides)
    return run_pipeline(settings, Story(path, tuple(overrides)), console or Console(quiet=True))


def run_pipeline(settings: Settings, story: Story, console: Console) -> RunDirectory:
    """Build corpora, train, export, probe and write the report.

    All ranks train. Only the first one exports, probes and reports.

    Returns:
        The finished run directory.

    Raises:
        UserError: a mistake in the config or the data.
        Interrupted: training was stopped by a signal.
    """
    decoder, _ = check_decoder(settings.decoder)
    tasks = load_tasks(settings.probe.tasks, story.tasks_folder)
    prepare_corpora(settings.corpora, console)
    _warn_of_unaudited(settings, tasks, console)
    watching = _probes_during(settings, story.tasks_folder)
    if is_first_rank():
        _check_probes(settings, tasks, watching)
    if settings.model.after:
        runs = list_runs(Path(settings.runs), settings.name)
        # Check the device before training the start model. A finished run may be reused on a
        # machine without its device.
        if not any(run.done.exists() for run in runs):
            check_accelerator(settings.hardware.accelerator)
        settings = _start_after(settings, story, console)
    try:
        trained = train(
            settings, console, resume=story.resume, fresh=story.fresh, callbacks=watching
        )
    except Interrupted as interrupted:
        command = " ".join([str(story.config), *story.overrides])
        raise type(interrupted)(
            f"{settings.name} {interrupted}.\nGo on with: whisper-aut train {command} --resume auto"
        ) from None
    start = build_pretrained(settings)
    if is_first_rank():
        if left := [kind for kind in settings.export if kind not in decoder.exports]:
            console.print(
                f"Not exported: {', '.join(left)}, which a run with "
                f"decoder={settings.decoder['name']} has no decoder for."
            )
        _export(
            [kind for kind in settings.export if kind in decoder.exports],
            trained,
            start,
            settings.model.padding,
        )
    # A run that starts from this one needs the exports on all ranks.
    wait_for_all_ranks()
    if not is_first_rank():
        return trained.run
    if not trained.reused:
        _keep_audit(settings.data.exclude, trained.run)
    if tasks:
        _probe(settings, trained.run, start, tasks)
    for kind in settings.export:  # after the probes, because the cards include the scores
        if trained.run.export(kind).is_dir():
            write_card(trained.run.path, trained.run.export(kind), kind)
    if story.report:
        build_report([trained.run.path], trained.run.report, console)
    return trained.run


def run_plan(settings: Settings, config: Path, console: Console) -> None:
    """Print the resources that a run would need, without loading or building anything.

    Raises:
        UserError: the start checkpoint or the decoder cannot be planned.
    """
    model, after = settings.model, config
    while model.after:  # the last config of the chain gives model sizes or a checkpoint
        after = find_config(model.after, after.parent)
        model = load_settings(after).model
    for part in forecast_tables(build_forecast(settings, planned_config(model))):
        console.print(part)


@dataclass(frozen=True)
class ProbeRequest:
    """The options of `whisper-aut probe`.

    Attributes:
        encoder: path, hub id, `logmel`, or `random:PATH` for random weights.
        against: encoders to compare with, named in the same way.
        tasks: names of tasks or suites, or paths.
        seeds: number of seeds for probes with random initialization.
        conf: folder of `probe_tasks/` and `probe.yaml`.
        root: replaces `{root}` in the tasks.
        out: folder for scores, predictions, embeddings and the report.
        padding: for encoders whose name has no `@none` or `@30s`.
        kind: kind of probe; empty for that of each task.
        pooling, layers, batch_seconds: see `probes.embed.EmbedSettings`.
        device, dtype: see `models.pretrained.load_encoder`.
        final_fit: fit the tested probe on the training split, or on training and validation.
    """

    encoder: str
    against: Sequence[str]
    tasks: Sequence[str]
    seeds: int
    conf: Path
    root: str
    out: Path
    padding: Padding | None = None
    kind: str = ""
    pooling: str = "mean"
    layers: tuple[int, ...] = ()
    device: str = "auto"
    dtype: str = "fp32"
    batch_seconds: float = BATCH_SECONDS
    final_fit: FinalFit = "train"


def run_probe(request: ProbeRequest, console: Console) -> Path:
    """Score an encoder and those to compare it with, and write scores and report to `request.out`.

    Under `torchrun`, all ranks embed clips and the first one scores.

    Returns:
        The page of the report; on other ranks than the first, `request.out`.

    Raises:
        UserError: encoders, tasks or shards cannot be loaded or do not fit the options. All
            problems are reported at once, before the first clip is embedded.
    """
    (rank, _), device = rank_and_world_size(), device_name(request.device)
    embedding = EmbedSettings(
        pooling=request.pooling,
        layers=request.layers,
        batch_seconds=request.batch_seconds,
        quiet=rank > 0,
    )
    cache = request.out / "embeddings"
    with process_group():  # if a rank fails in this block, the others stop too
        tasks, encoders = _find_all(request, device, embedding)
        request.out.mkdir(parents=True, exist_ok=True)
        embed_on_ranks(
            encoders,
            tasks,
            root=request.root,
            cache=cache,
            embedding=embedding,
            kind=request.kind,
        )
    if rank:
        return request.out
    run_suite(
        encoders,
        tasks,
        root=request.root,
        cache=cache,
        seeds=range(request.seeds),
        against=list(encoders)[: len(request.against)],
        embedding=embedding,
        scores_file=request.out / "scores.json",
        predictions_file=request.out / "predictions.jsonl",
        kind=request.kind,
        device=device,
        final_fit=request.final_fit,
    )
    return build_report([request.out], request.out, console)


def _find_all(
    request: ProbeRequest, device: str, embedding: EmbedSettings
) -> tuple[list[ProbeTask], dict[str, FrameEncoder]]:
    """Return the tasks, and the encoders by display name, with those of `against` first.

    Raises:
        UserError: lists all problems of tasks, encoders and options.
    """
    problems = Problems()
    tasks = _find_tasks(request.tasks, request.conf, problems)
    named: list[str] = []
    for name in (*request.against, request.encoder):
        with problems.gather():
            split_padding(name)
            named.append(name)
    encoders: dict[str, FrameEncoder] = {}
    with problems.gather():
        for name, short in encoder_names(named).items():
            with problems.gather():
                encoders[short] = open_encoder(
                    name, request.padding, device=device, dtype=request.dtype
                )
    find_problems(
        problems, encoders, tasks, root=request.root, embedding=embedding, kind=request.kind
    )
    problems.raise_if_any("The probe")
    return tasks, encoders


def export_run(path: Path, out: Path, kind: ExportKind, dtype: str = "fp32", **card: str) -> Path:
    """Export a trained model with a model card.

    Args:
        path: a run directory or one of its checkpoints.
        out: the directory to write.
        kind: the format, see `export.hf.ExportKind`.
        dtype: of the weights: `fp32`, `bf16` or `fp16`.
        card: `name` and `licence`, see `write_card`.

    Raises:
        UserError: `path` is not a run, or the run cannot be exported as `kind`.
    """
    checkpoint, start = find_checkpoint(path)
    run = RunDirectory(checkpoint.parent.parent)
    padding = load_settings(run.config).model.padding
    export_checkpoint(checkpoint, start, out, kind, dtype=DTYPES[dtype], padding=padding)
    write_card(run.path, out, kind, dtype, **card)
    return out


def open_run(path: Path, *, device: str = "cpu", dtype: str = "fp32") -> AudioTextModule:
    """Load a trained model with its decoder from a run directory or one of its checkpoints.

    Args:
        path: the run directory or the checkpoint.
        device: where the model runs; `auto` uses a GPU if there is one.
        dtype: of all weights. With `fp32`, a frozen language model keeps its own dtype.

    Raises:
        UserError: `path` is not a run, files that it needs are missing, or the device is missing.
    """
    checkpoint, _ = find_checkpoint(path)
    place = resolve_device(device)
    settings = load_settings(RunDirectory(checkpoint.parent.parent).config)
    module = build_trained(settings, read_checkpoint(checkpoint))
    return module.to(device=place, dtype=None if dtype == "fp32" else DTYPES[dtype])


def open_demo_models(
    name: str,
    against: str,
    padding: Padding | None,
    *,
    device: str = "cpu",
    dtype: str = "fp32",
) -> DemoModels:
    """Load the models for the page of `whisper-aut demo`.

    Args:
        name: a run, which is loaded with its decoder, or an encoder.
        against: an encoder to compare with; for a run, empty stands for its start checkpoint.
        padding: for encoders whose name has no padding. A run keeps that of its training.

    Raises:
        UserError: there is no run or encoder of that name.
    """
    encoders: dict[str, AudioEncoder] = {}
    path, module = Path(split_padding(name)[0]), None
    if RunDirectory(path).environment.is_file() or path.suffix == ".ckpt":
        _, start = find_checkpoint(path)
        module = open_run(path, device=device, dtype=dtype)
        if not against:
            encoders["before"] = load_encoder(
                start.path, revision=start.revision, device=device, dtype=dtype
            )
    if against:
        encoders["before"] = _load_encoder(against, padding, device=device, dtype=dtype)
    after = (
        AudioEncoder(module.encoder).to(module.device)
        if module
        else _load_encoder(name, padding, device=device, dtype=dtype)
    )
    encoders["after" if encoders else "encoder"] = after
    return DemoModels(encoders, module)


def open_encoder(name: str, padding: Padding | None, **how: Any) -> FrameEncoder:
    """Load an encoder by its name on the command line.

    Args:
        name: path, hub id, `logmel`, or `random:PATH` for random weights.
        padding: for encoders whose name has no padding.
        how: `device` and `dtype` of `load_encoder`.

    Raises:
        UserError: there is no such encoder, or `logmel` is given a padding.
    """
    path, marked = split_padding(name)
    if path == LOGMEL:
        if marked:
            raise UserError(f"{name}: log-mel statistics know no padding. Write {LOGMEL}.")
        return LogMelBaseline()
    random = name.startswith(RANDOM_PREFIX)
    return _load_encoder(name.removeprefix(RANDOM_PREFIX), padding, random_init=random, **how)


def _load_encoder(name: str, padding: Padding | None, **how: Any) -> AudioEncoder:
    """Load an encoder with the padding in its name, else `padding`, else that of its training."""
    return load_encoder(name, padding=split_padding(name)[1] or padding, **how)


def prepare_corpora(corpora: CorporaSettings, console: Console) -> None:
    """Build the corpora of a config that do not exist yet."""
    if corpora.demo:
        options = DemoOptions(seed=corpora.demo.seed).scaled(corpora.demo.scale)
        with file_lock(Path(corpora.demo.out)):
            build_demo(Path(corpora.demo.out), options)
    for manifest in corpora.manifests:
        with file_lock(Path(manifest.out)):
            report = build_shards(_manifest_spec(manifest), Path(manifest.out))
        if not report.reused:
            console.print(report.summary())


def _keep_audit(exclude: str, run: RunDirectory) -> None:
    """Copy the audit of the exclusion list into the run, for the model card."""
    audit = Path(exclude).with_name(AUDIT_NAME) if exclude else None
    if audit and audit.exists():
        shutil.copyfile(audit, run.path / AUDIT_NAME)


def _warn_of_unaudited(settings: Settings, tasks: Sequence[ProbeTask], console: Console) -> None:
    """Print which probe sets were not audited against the training shards, and the command."""
    if not tasks:
        return
    data, root = settings.data, settings.probe.root
    audit = read_audit(Path(data.exclude).with_name(AUDIT_NAME)) if data.exclude else {}
    sources = [source.path for source in data.train]
    try:
        stale = unaudited(audit, "train", sources)
        missing = [
            task for task in tasks if stale or unaudited(audit, "probes", task.test_folders(root))
        ]
    except UserError:  # missing shards; reading them later reports the error
        return
    if missing and is_first_rank():
        out = Path(data.shards) / "audit"
        tested = " ".join(folder for task in missing for folder in task.test_folders(root))
        console.print(
            f"Not audited: whether clips of {', '.join(task.name for task in missing)} are in the "
            f"training shards. Find out: whisper-aut data audit {' '.join(sources)} "
            f"--against {tested} --out {out}; then set data.exclude={out / EXCLUDE_NAME}"
        )


def load_tasks(names: Sequence[str], folder: Path) -> list[ProbeTask]:
    """Load probe tasks.

    Args:
        names: tasks in `folder/probe_tasks`, suites in `folder/probe.yaml`, or paths.
        folder: searched before the configs of the package.

    Raises:
        UserError: lists the problems of all tasks.
    """
    problems = Problems()
    tasks = _find_tasks(names, folder, problems)
    problems.raise_if_any("The list of probe tasks")
    return tasks


def _find_tasks(names: Sequence[str], folder: Path, problems: Problems) -> list[ProbeTask]:
    tasks: list[ProbeTask] = []
    with problems.gather():
        for name in expand_suites(names, folder / "probe.yaml"):
            with problems.gather():
                tasks.append(load_task(name, folder / "probe_tasks"))
    return tasks


def _start_after(settings: Settings, story: Story, console: Console) -> Settings:
    """Run the config `model.after`, and return the settings with its export as the start model."""
    config = find_config(settings.model.after, story.config.parent)
    places = {
        "seed": settings.seed,
        "hardware.threads": settings.hardware.threads,
        "runs": settings.runs,
        "data.root": settings.data.root,
        "data.shards": settings.data.shards,
        "data.exclude": settings.data.exclude,
    }
    overrides = tuple(f"{key}={value}" for key, value in places.items())
    before = load_settings(config, overrides)
    ours, theirs = settings.corpora.demo, before.corpora.demo
    if ours and theirs and ours.out == theirs.out:  # the same folder must hold the same corpus
        before = replace(before, corpora=replace(before.corpora, demo=ours))
    decoder, _ = check_decoder(before.decoder)
    if "whisper" not in before.export or "whisper" not in decoder.exports:
        raise UserError(
            f"{config} must train and export `whisper`: {settings.name} starts from the model that "
            "it trains."
        )
    run = run_pipeline(before, replace(story, config=config, overrides=overrides), console)
    return replace(
        settings, model=replace(settings.model, path=str(run.export("whisper")), after="")
    )


def _manifest_spec(manifest: ManifestSettings) -> ManifestSpec:
    values = asdict(manifest)
    values.pop("out")
    audio_root = Path(manifest.audio_root) if manifest.audio_root else None
    return ManifestSpec(**values | {"manifest": Path(manifest.manifest), "audio_root": audio_root})


def _export(
    kinds: Sequence[ExportKind], trained: TrainResult, start: PretrainedWhisper, padding: Padding
) -> None:
    for kind in kinds:
        if not trained.reused or not trained.run.export(kind).exists():
            export_checkpoint(
                trained.run.last_checkpoint, start, trained.run.export(kind), kind, padding=padding
            )


def _probes_during(settings: Settings, conf: Path) -> list[ProbeDuringTraining]:
    during = settings.probe.during
    guard = ForgettingGuard(during.guarded_domain, during.max_drop, during.on_drop)
    tasks = load_tasks(during.tasks, conf)
    if not tasks:
        return []
    return [
        ProbeDuringTraining(
            tasks,
            settings.probe.root,
            every_steps=during.every_steps,
            kind=during.kind,
            guard=guard,
        )
    ]


def _check_probes(
    settings: Settings, tasks: Sequence[ProbeTask], watching: Sequence[ProbeDuringTraining]
) -> None:
    """Report problems of the probes before training, instead of hours later.

    Raises:
        UserError: lists all problems.
    """
    problems = Problems()
    find_problems(problems, {}, tasks, root=settings.probe.root)
    for callback in watching:
        kind = callback.kind
        find_problems(problems, {}, callback.tasks, root=settings.probe.root, kind=kind)
    problems.raise_if_any(f"What {settings.name} is to be probed on")


def _probe(
    settings: Settings, run: RunDirectory, start: PretrainedWhisper, tasks: Sequence[ProbeTask]
) -> None:
    """Score the trained encoder, its start, random weights and log-mels on the same clips.

    Each encoder uses the padding of its own training; the random one, that of the run.
    """
    device = _probing_device(settings)
    # Training may have enabled TF32. Scores must match those of `run_probe`, which runs without it.
    torch.set_float32_matmul_precision("highest")
    encoders: dict[str, FrameEncoder] = {}
    if settings.probe.logmel_baseline:
        encoders[BASELINE_NAME] = LogMelBaseline(start.config.num_mel_bins)
    if settings.probe.random_encoder:
        encoders["random"] = load_encoder(
            start.path,
            padding=settings.model.padding,
            revision=start.revision,
            random_init=True,
            seed=settings.seed,
            device=device,
        )
    before = _short_name(start.path)
    before = f"{before} (start)" if before in (settings.name, *encoders) else before
    encoders[before] = load_encoder(start.path, revision=start.revision, device=device)
    encoders[settings.name] = load_encoder(run.export("encoder"), device=device)
    run_suite(
        encoders,
        tasks,
        root=settings.probe.root,
        cache=Path(settings.runs) / "embeddings",
        seeds=range(settings.probe.seeds),
        against=[before],
        scores_file=run.scores,
        predictions_file=run.predictions,
        final_fit=settings.probe.final_fit,
        device=device,
    )


def _probing_device(settings: Settings) -> str:
    """Return the device of the first rank, which is idle after training."""
    on_gpu = settings.hardware.accelerator != "cpu" and torch.cuda.is_available()
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"


def encoder_names(given: Sequence[str]) -> dict[str, str]:
    """Return the display name of each encoder: a short name, or the full one if it is ambiguous.

    Raises:
        UserError: the same encoder is given twice.
    """
    twice = [
        name for name, times in Counter(name.rstrip("/") for name in given).items() if times > 1
    ]
    if twice:
        raise UserError(
            f"{twice[0]} is named twice: an encoder is compared with others, not with itself."
        )
    short = {name: _short_name(name) for name in given}
    shared = {name for name, times in Counter(short.values()).items() if times > 1}
    return {
        name: name.rstrip("/") if called in shared else called for name, called in short.items()
    }


def _short_name(name: str) -> str:
    """Return the run's name for a run or its export, else the last part of the path.

    A padding in the given name is kept.
    """
    if name == LOGMEL:
        return BASELINE_NAME
    given, marked = split_padding(name)
    path = Path(given.removeprefix(RANDOM_PREFIX))
    if path.parent.name == "export":
        short = path.resolve().parents[2].name
    elif RunDirectory(path).config.is_file():
        short = path.resolve().parent.name
    else:
        short = path.name.lstrip(".")
    short = f"{short}@{marked}" if marked else short
    return f"random {short}" if name.startswith(RANDOM_PREFIX) else short
