"""Runs a config from corpora to report.

Corpora → pretrained checkpoint → training → export → probes → report. Each step is also a command,
and results of earlier runs are reused if nothing has changed.
"""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from whisper_aut.config import (
    LOCAL_CONF,
    CorporaSettings,
    Settings,
    find_config,
    first_model,
    load_settings,
)
from whisper_aut.corpora.audit import AUDIT_NAME, EXCLUDE_NAME, read_audit, unaudited
from whisper_aut.corpora.build import build_shards
from whisper_aut.corpora.synth.corpus import build_demo
from whisper_aut.errors import Interrupted, Problems, UserError
from whisper_aut.export.card import write_card
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.loading import export_run, load_tasks, short_name
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.decoders.causal_lm import CausalLMOptions
from whisper_aut.models.language_model import load_language_config
from whisper_aut.models.pretrained import PretrainedWhisper, load_whisper_config
from whisper_aut.probes.callback import ProbeDuringTraining
from whisper_aut.probes.encoders import BASELINE_NAME, FrameEncoder, LogMelBaseline
from whisper_aut.probes.suite import find_problems, run_suite
from whisper_aut.probes.tasks import ProbeTask
from whisper_aut.report.html import build_report
from whisper_aut.training.factory import build_pretrained
from whisper_aut.training.run_dir import RunDirectory, is_first_rank, list_runs, wait_for_all_ranks
from whisper_aut.training.train import TrainResult, check_machine, train
from whisper_aut.utils import file_lock


@dataclass(frozen=True)
class PipelineOptions:
    """How to run a config.

    Attributes:
        config: path of the config. Configs that it names are searched next to it first.
        overrides: the `key=value` overrides of the command line, to print the resume command.
        resume, fresh, allow_data_change: see `training.train`.
        report: write the report of the run. `whisper-aut report RUN` can also write it later.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    resume: str = ""
    fresh: bool = False
    allow_data_change: bool = False
    report: bool = True

    @property
    def tasks_folder(self) -> Path:
        """Searched for probe tasks before the package: the config's folder, else `conf`."""
        near = self.config.parent
        return near if (near / "probe_tasks").is_dir() else LOCAL_CONF


def run_config(
    config: str | Path, overrides: Sequence[str] = (), console: Console | None = None
) -> RunDirectory:
    """Load a config and run it, like `whisper-aut train CONFIG key=value …`.

    Without a console, only progress bars are shown.

    Returns:
        The finished run directory.

    Raises:
        UserError: a mistake in the config or the data.
        Interrupted: training was stopped by a signal.
    """
    path = find_config(config)
    options = PipelineOptions(path, tuple(overrides))
    return run_pipeline(load_settings(path, overrides), options, console or Console(quiet=True))


def run_pipeline(settings: Settings, options: PipelineOptions, console: Console) -> RunDirectory:
    """Build corpora, train, export, probe and write the report.

    All ranks train. Only the first one exports, probes and reports.

    Returns:
        The finished run directory.

    Raises:
        UserError: a mistake in the config or the data.
        Interrupted: training was stopped by a signal.
    """
    check_before_corpora(settings, options.config)
    tasks = load_tasks(settings.probe.tasks, options.tasks_folder)
    prepare_corpora(settings.corpora, console)
    during = settings.probe.during
    watched = load_tasks(during.tasks, options.tasks_folder)
    callbacks = [ProbeDuringTraining(watched, settings.probe.root, during)] if watched else []
    if is_first_rank():
        _warn_if_not_audited(settings, tasks, console)
        _check_probes(settings, tasks, callbacks)

    if settings.model.after:
        settings = _train_pretrained(settings, options, console)
    try:
        trained = train(
            settings,
            console,
            resume=options.resume,
            fresh=options.fresh,
            allow_data_change=options.allow_data_change,
            callbacks=callbacks,
        )
    except Interrupted as interrupted:
        command = shlex.join([str(options.config), *options.overrides])
        raise type(interrupted)(
            f"{settings.name} {interrupted}.\n"
            f"Resume with: whisper-aut train {command} --resume auto"
        ) from None

    run, pretrained = trained.run, build_pretrained(settings)
    if is_first_rank():
        _export(settings, trained, console)
    wait_for_all_ranks()  # all ranks need the exports if another run starts from this one
    if not is_first_rank():
        return run
    if settings.data.exclude and not trained.reused:
        audit = Path(settings.data.exclude).with_name(AUDIT_NAME)
        if audit.exists():  # for the model cards
            shutil.copyfile(audit, run.path / AUDIT_NAME)
    if tasks:
        _probe(settings, run, pretrained, tasks)
    for kind in settings.export:  # after the probes, because the cards include the scores
        if run.export(kind).is_dir():
            write_card(run.path, run.export(kind), kind)
    if options.report:
        build_report([run.path], run.report, console)
    return run


# ---- Corpora ------------------------------------------------------------------------------------


def check_before_corpora(settings: Settings, config: Path) -> None:
    """Check what the training of a config needs besides data, which may take hours to build.

    A finished run can be reused without it.

    Raises:
        UserError: There is no such device, package, model or language model.
    """
    _, decoder = check_decoder(settings.decoder)
    first = first_model(settings.model, config)
    if any(run.done.exists() for run in list_runs(Path(settings.runs), settings.name)):
        return
    check_machine(settings)
    if first.path:
        load_whisper_config(first.path, first.revision)
    if isinstance(decoder, CausalLMOptions) and decoder.scratch is None:
        load_language_config(decoder.language_model, decoder.revision)


def prepare_corpora(corpora: CorporaSettings, console: Console) -> None:
    """Build the corpora of a config that do not exist yet."""
    if corpora.demo:
        demo = corpora.demo
        with file_lock(Path(demo.out)):
            build_demo(Path(demo.out), seed=demo.seed, scale=demo.scale)
    for manifest in corpora.manifests:
        out = Path(manifest.out)
        with file_lock(out):
            report = build_shards(manifest, out)
        if not report.reused:
            console.print(report.summary())


def _warn_if_not_audited(settings: Settings, tasks: Sequence[ProbeTask], console: Console) -> None:
    """Print which probe sets were not audited against the training shards, and the command."""
    data, root = settings.data, settings.probe.root
    sources = [source.path for source in data.train]
    try:
        audit = read_audit(Path(data.exclude).with_name(AUDIT_NAME)) if data.exclude else {}
        outdated = unaudited(audit, "train", sources)
        missing = [
            task
            for task in tasks
            if outdated or unaudited(audit, "probes", task.test_folders(root))
        ]
    except UserError:  # missing shards; reading them later reports the error
        return
    if missing:
        out = Path(data.shards) / "audit"
        tested = " ".join(folder for task in missing for folder in task.test_folders(root))
        console.print(
            f"Not audited: clips of {', '.join(task.name for task in missing)} may be in the "
            f"training shards. Find them with: whisper-aut data audit {' '.join(sources)} "
            f"--against {tested} --out {out}; then set data.exclude={out / EXCLUDE_NAME}"
        )


# ---- Pretrained checkpoint and export -----------------------------------------------------------


def _train_pretrained(settings: Settings, options: PipelineOptions, console: Console) -> Settings:
    """Run the config `model.after`, and return the settings with its export as `model.path`."""
    config = find_config(settings.model.after, options.config.parent)
    shared = {
        "seed": settings.seed,
        "hardware.threads": settings.hardware.threads,
        "runs": settings.runs,
        "data.root": settings.data.root,
        "data.shards": settings.data.shards,
        "data.exclude": settings.data.exclude,
        "trainer.loggers": list(settings.trainer.loggers),
    }
    overrides = tuple(f"{key}={value}" for key, value in shared.items())
    first = load_settings(config, overrides)
    demo, first_demo = settings.corpora.demo, first.corpora.demo
    if demo and first_demo and demo.out == first_demo.out:  # one folder holds one corpus
        first = replace(first, corpora=replace(first.corpora, demo=demo))
    decoder, _ = check_decoder(first.decoder)
    if "whisper" not in first.export or "whisper" not in decoder.exports:
        raise UserError(
            f"{config} must export `whisper`, because {settings.name} starts from its model."
        )
    run = run_pipeline(first, replace(options, config=config, overrides=overrides), console)
    model = replace(settings.model, path=str(run.export("whisper")), after="")
    return replace(settings, model=model)


def _export(settings: Settings, trained: TrainResult, console: Console) -> None:
    (decoder, _), run = check_decoder(settings.decoder), trained.run
    for kind in settings.export:
        if kind not in decoder.exports:
            name = settings.decoder["name"]
            console.print(f"Not exported: {kind}. decoder={name} has no such export.")
        elif not trained.reused or not run.export(kind).exists():
            export_run(run.path, run.export(kind), kind)


# ---- Probes -------------------------------------------------------------------------------------


def _check_probes(
    settings: Settings, tasks: Sequence[ProbeTask], callbacks: Sequence[ProbeDuringTraining]
) -> None:
    """Report problems of the probes before training, instead of hours later."""
    problems, root = Problems(), settings.probe.root
    find_problems(problems, {}, tasks, root=root)
    for callback in callbacks:
        find_problems(problems, {}, callback.tasks, root=root, kind=callback.settings.kind)
    problems.raise_if_any(f"The list of probes of {settings.name}")


def _probe(
    settings: Settings, run: RunDirectory, pretrained: PretrainedWhisper, tasks: Sequence[ProbeTask]
) -> None:
    """Score the trained encoder, the pretrained one, random weights and log-mels on the same clips.

    Each encoder uses the padding of its own training; the random one, that of the run.
    """
    device = _probe_device(settings)
    # Training may have enabled TF32. Scores must match those of `whisper-aut probe`.
    torch.set_float32_matmul_precision("highest")
    path, revision = pretrained.path, pretrained.revision
    encoders: dict[str, FrameEncoder] = {}
    if settings.probe.logmel_baseline:
        encoders[BASELINE_NAME] = LogMelBaseline(pretrained.config.num_mel_bins)
    if settings.probe.random_encoder:
        encoders["random"] = load_encoder(
            path,
            padding=settings.model.padding,
            revision=revision,
            random_init=True,
            seed=settings.seed,
            device=device,
        )
    before = short_name(path)
    before = f"{before} (pretrained)" if before in (settings.name, *encoders) else before
    encoders[before] = load_encoder(path, revision=revision, device=device)
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


def _probe_device(settings: Settings) -> str:
    """Return the device of the first rank, which is idle after training."""
    on_gpu = settings.hardware.accelerator != "cpu" and torch.cuda.is_available()
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
