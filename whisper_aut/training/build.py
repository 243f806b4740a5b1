"""Settings → the objects of a run. The only module of the training stage that reads settings.

In: checked `Settings`. Out: the data module, the LightningModule, the Trainer's arguments. Next: `training.train` puts them together.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import WhisperConfig

from whisper_aut import __version__
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel
from whisper_aut.config import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    ScratchSettings,
    Settings,
    SourceSettings,
)
from whisper_aut.data.annotation import text_template
from whisper_aut.data.augment import Augment, SpecAugment
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import ExampleBuilder, StreamSource
from whisper_aut.data.filters import Exclusions, select
from whisper_aut.data.reader import Sample, iter_samples
from whisper_aut.data.remote import ReadPolicy
from whisper_aut.data.sampler import mixture_shares
from whisper_aut.data.shards import open_index
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import UserError
from whisper_aut.locks import file_lock
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import PackedEncoder, longest_clip_seconds, too_long
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import Start
from whisper_aut.models.tiny import WHISPER_SPECIAL_TOKENS, config_of, make_whisper, shaped_config
from whisper_aut.training.callbacks.stopping import BYTES_OF_STATE, check_compilable
from whisper_aut.training.optim import optimizer_factory
from whisper_aut.training.plan import (
    FLAC_BYTES_PER_SECOND,
    Forecast,
    StepCost,
    StepShape,
    step_cost,
)
from whisper_aut.training.strategies import DEEPSPEED, OFFLOAD, resolved_precision

SAMPLE_BYTES, SAMPLES = (
    1 << 16,
    1 << 12,
)  # of files beyond their product, as many samples are hashed

ASSUMED_CLIP_SECONDS, ASSUMED_TOKENS = 10.0, 32  # of a plan, where no shards tell


def clip_limits(data: DataSettings) -> ClipLimits:
    return ClipLimits(min_seconds=data.min_seconds, max_seconds=data.max_seconds)


def read_policy(data: DataSettings) -> ReadPolicy:
    return ReadPolicy(
        retries=data.retries, timeout_seconds=data.timeout_seconds, allow_pipe=data.allow_pipe
    )


def open_sources(sources: Sequence[SourceSettings], policy: ReadPolicy) -> list[StreamSource]:
    """Open the index of every source.

    Raises:
        UserError: listing every source that cannot be read.
    """
    opened, problems = [], []
    for source in sources:
        try:
            index = open_index(source.path, policy)
            text = text_template(source.text) if source.text else None
            opened.append(StreamSource(index, source.domain, source.licence, text))
        except UserError as error:
            problems.append(f"  - {error}")
    if problems:
        raise UserError("Sources that cannot be read:\n" + "\n".join(problems))
    return opened


def run_fingerprint(settings: Settings) -> str:
    """Return a hash of everything that decides what a run computes, but not of the place of outputs.

    That is the config, the release, the shards it reads, and the files of models that lie in local directories.

    Raises:
        UserError: a source of the data cannot be read.
    """
    values, data, policy = asdict(settings), settings.data, read_policy(settings.data)
    for name in ("runs", "probe", "export"):
        values.pop(name)
    values["decoder"].pop("date", None)  # set when a run starts; see `same_chat_date`
    hardware = settings.hardware
    values["hardware"]["precision"], _ = resolved_precision(
        hardware.precision, hardware.accelerator
    )
    excluded = Path(data.exclude).read_text() if Path(data.exclude).is_file() else ""
    read = open_sources(data.train, policy) + open_sources(data.valid, policy)
    shards = [source.index.fingerprint() for source in read] + [
        open_index(f, policy).fingerprint() for f in data.augment.noise
    ]
    models = [settings.model.path, str(settings.decoder.get("language_model", ""))]
    facts = [
        __version__,
        values,
        shards,
        excluded,
        [_files(Path(place)) for place in models if place],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _files(folder: Path) -> list[list[Any]]:
    """Return name, size and hash of every file of a local model; large ones by samples, as other weights differ everywhere."""
    found = []
    for path in (
        sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else ()
    ):
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            for place in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
        found.append([path.name, size, digest.hexdigest()])
    return found


def build_start(settings: Settings) -> Start:
    """Return the checkpoint that the run starts from; a scratch model is made where it has not been."""
    model = settings.model
    if model.scratch is None:
        return Start(model.path, model.revision, model.random_init)
    key = hashlib.sha256(json.dumps([asdict(model.scratch), settings.seed, __version__]).encode())
    policy = read_policy(settings.data)
    if model.scratch.texts:
        indexes = [open_index(folder, policy) for folder in model.scratch.texts]
    else:
        indexes = [source.index for source in open_selected(settings.data)]
    for index in indexes:
        key.update(index.selected_fingerprint().encode())
    out = Path(settings.runs) / settings.name / f".scratch-{key.hexdigest()[:12]}"
    with file_lock(out):
        if not out.exists():  # it is moved there when whole
            limits = clip_limits(settings.data)
            items = (item for index in indexes for item in iter_samples(index, limits, policy))
            texts = [
                item.annotation.text
                for item in items
                if isinstance(item, Sample) and item.annotation.text
            ]
            _make_scratch(out, texts, model.scratch, settings.seed)
    return Start(str(out))


def build_data(settings: Settings, codec: TextCodec, num_mel_bins: int) -> ShardDataModule:
    data = settings.data
    policy = read_policy(data)
    train, valid = open_selected(data), open_sources(data.valid, policy)
    empty = [source.index.name for source in train if not source.index.samples]
    if empty:
        raise UserError(f"Training sources without a single sample: {', '.join(empty)}.")
    return ShardDataModule(
        train,
        valid,
        _shares(data, [source.index.samples for source in train]),
        ExampleBuilder(
            LogMel(num_mel_bins), codec, clip_limits(data), on_device=data.features == "device"
        ),
        seed=settings.seed,
        window=data.window,
        batch_clips=data.batch_clips,
        batch_seconds=data.batch_seconds,
        epochs=settings.trainer.max_epochs if data.mode == "epochs" else None,
        samples_per_epoch=data.samples_per_epoch,
        valid_clips=data.valid_clips,
        accumulate=settings.trainer.accumulate,
        workers=data.workers,
        policy=policy,
        augment=build_augment(settings, policy),
    )


def _shares(data: DataSettings, samples: Sequence[int]) -> list[float]:
    """Return the share of each training source among the clips that are drawn, given how many clips it holds."""
    weights = [
        float(clips) if source.weight is None else source.weight
        for source, clips in zip(data.train, samples, strict=True)
    ]
    return mixture_shares(
        [source.domain for source in data.train], weights, data.domains, data.temperature
    )


def build_augment(settings: Settings, policy: ReadPolicy) -> Augment:
    """Return what is done to training clips.

    Raises:
        UserError: noise shards that cannot be read, are empty, or lack the tables by which single clips are found.
    """
    chosen = settings.data.augment
    opened = [StreamSource(open_index(folder, policy), "sound") for folder in chosen.noise]
    noise = [source.index for source in _selected(settings.data, opened)]
    unfit = [index.root for index in noise if not index.samples or not index.has_tables]
    if unfit:
        raise UserError(
            f"Noise shards without clips or sample tables: {', '.join(unfit)}. Run: whisper-aut data index FOLDER"
        )
    return Augment(
        seed=settings.seed,
        spectrum=SpecAugment() if chosen.spec else None,
        gain_db=chosen.gain_db,
        speeds=tuple(chosen.speeds),
        noise=noise,
        noise_share=chosen.noise_share,
        snr_db=(chosen.snr_db[0], chosen.snr_db[1]),
        max_seconds=settings.data.max_seconds,
        policy=policy,
    )


def open_selected(data: DataSettings) -> list[StreamSource]:
    """Open the training sources without clips that are excluded or whose licence is not allowed.

    Raises:
        UserError: sources that cannot be read, or of which nothing is left; no exclusion list where
            one is named.
    """
    return _selected(data, open_sources(data.train, read_policy(data)))


def _selected(data: DataSettings, sources: Sequence[StreamSource]) -> list[StreamSource]:
    exclusions = Exclusions.load(data.exclude) if data.exclude else Exclusions()
    chosen, empty = [], []
    for source in sources:
        excluded, allowed = exclusions.of(source.index), data.licences.allow
        index = select(source.index, excluded, allowed, source.licence, read_policy(data))
        chosen.append(replace(source, index=index))
        if source.index.samples and not index.samples:
            stated = ", ".join(name or "none stated" for name in source.licences)
            empty.append(f"{index.name} ({stated})")
    if empty:
        raise UserError(
            f"data.licences.allow ({', '.join(data.licences.allow) or 'everything'}) and "
            f"data.exclude ({data.exclude or 'nothing'}) leave nothing of {'; '.join(empty)}. Take "
            "these sources out of the config, or allow their licences; a source of data.train "
            "whose clips state none takes the `licence` of its entry."
        )
    return chosen


def fix_chat_date(settings: Settings, before: Path | None) -> Settings:
    """Set the day that a chat template may write as today: that of the run which goes on, else today.

    Prompts of a run thus stay what they were, however long it takes and whenever it is asked something.

    Args:
        before: the recorded config of the run that goes on.
    """
    _, options = check_decoder(settings.decoder)
    if getattr(options, "date", None) != "":  # set by the user, or a decoder without a chat
        return settings
    recorded = yaml.safe_load(before.read_text()) if before and before.is_file() else {}
    day = recorded.get("decoder", {}).get("date") or datetime.now().date().isoformat()
    return replace(settings, decoder={**settings.decoder, "date": day})


def same_chat_date(settings: Settings, config: Path) -> bool:
    """Return whether a recorded run had the chat date that these settings name, if they name one."""
    date = settings.decoder.get("date")
    return not date or yaml.safe_load(config.read_text())["decoder"].get("date") == date


def build_decoder(settings: Settings, start: Start) -> tuple[Any, TextCodec]:
    entry, options = check_decoder(settings.decoder)
    return entry.build(start, options, settings.model.gradient_checkpointing)


def build_module(
    settings: Settings, start: Start, decoder: Any, codec: TextCodec, total_steps: int
) -> AudioTextModule:
    model = settings.model
    seconds = WINDOW_SECONDS if model.padding == "30s" else settings.data.max_seconds
    if seconds > longest_clip_seconds(start.config):
        raise UserError(too_long(start.config, model.padding, seconds))
    if model.compile:
        check_compilable(settings.strategy.name)
    encoder = PackedEncoder(
        start.encoder, model.padding, model.gradient_checkpointing, model.compile
    )
    if model.freeze_encoder:
        encoder.requires_grad_(False)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        if parameter.requires_grad:  # AdamW's small steps are lost in 16-bit weights
            parameter.data = parameter.data.float()
    factory = _optimizer(
        settings.optim, total_steps, offload=settings.strategy.name.endswith(OFFLOAD)
    )
    return AudioTextModule(
        encoder,
        decoder,
        codec,
        factory,
        generate_clips=settings.trainer.generate_clips,
        generate_tokens=settings.trainer.generate_tokens,
        encoder_after_step=settings.optim.encoder_after_step,
    )


def build_trained(settings: Settings, weights: dict[str, Any]) -> AudioTextModule:
    """Return the module of a run with the weights of one of its checkpoints, in eval mode."""
    settings = replace(
        settings, model=replace(settings.model, compile=False)
    )  # not worth it for a few clips
    start = build_start(settings)
    decoder, codec = build_decoder(settings, start)
    module = build_module(settings, start, decoder, codec, total_steps=1)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def trainer_arguments(settings: Settings, total_steps: int) -> dict[str, Any]:
    """Return the arguments of `lightning.Trainer` that a config decides."""
    trainer, hardware = settings.trainer, settings.hardware
    return {
        "accelerator": hardware.accelerator,
        "devices": hardware.devices,
        "num_nodes": hardware.nodes,
        "precision": hardware.precision,
        "max_steps": total_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": trainer.accumulate,
        # Elsewhere `Guard` clips, which has the norm already.
        "gradient_clip_val": (settings.optim.gradient_clip or None)
        if settings.strategy.name.startswith(DEEPSPEED)
        else None,
        "val_check_interval": min(trainer.valid_every_steps, total_steps) * trainer.accumulate,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": min(trainer.log_every_steps, total_steps),
        "num_sanity_val_steps": 0,
        "deterministic": trainer.deterministic,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }


def build_forecast(settings: Settings, config: WhisperConfig) -> Forecast:
    """Plan a run of a model of these sizes; reads the shards' indexes where they are there, and nothing else.

    Raises:
        UserError: the decoder cannot be planned.
    """
    entry, options = check_decoder(settings.decoder)
    if entry.sketch is None:
        raise UserError(
            f"The decoder {settings.decoder['name']!r} brings no sketch, so a run with it cannot be planned."
        )
    sketch, data, hardware, trainer = (
        entry.sketch,
        settings.data,
        settings.hardware,
        settings.trainer,
    )
    stored, assumptions = stored_audio(data)
    ranks = (hardware.devices if isinstance(hardware.devices, int) else 1) * hardware.nodes
    precision = hardware.precision
    if precision == "auto":  # every device of the tables computes in bfloat16
        precision = "32-true" if hardware.accelerator == "cpu" else "bf16-mixed"
    batch_clips = (
        max(1, round(data.batch_seconds / stored.clip_seconds))
        if data.batch_seconds
        else data.batch_clips
    )

    @cache
    def cost(half_weights: bool, checkpointing: bool) -> StepCost:
        autocast = not precision.startswith("32")
        shape = StepShape(
            mel_lengths=(max(1, round(100 * stored.clip_seconds)),) * batch_clips,
            text_lengths=(ASSUMED_TOKENS,) * batch_clips,
            padding=settings.model.padding,
            compute="bfloat16" if half_weights else "autocast" if autocast else "float32",
            gradient_checkpointing=checkpointing,
            train_encoder=not settings.model.freeze_encoder,
        )
        return step_cost(
            config, lambda config, checkpointing: sketch(config, options, checkpointing), shape
        )

    clips = data.samples_per_epoch or stored.clips
    epochs = (
        trainer.max_epochs * (clips // (batch_clips * ranks * trainer.accumulate))
        if clips
        else None
    )
    steps = min((count for count in (epochs, trainer.max_steps) if count), default=None)
    strategy = settings.strategy.name
    return Forecast(
        cost_of=cost,
        ranks=ranks,
        stage=int(strategy.removeprefix(DEEPSPEED)[0]) if strategy.startswith(DEEPSPEED) else 0,
        offload=strategy.endswith(OFFLOAD),
        precision=precision,
        checkpointing=settings.model.gradient_checkpointing,
        micro_batches=trainer.accumulate,
        steps=steps,
        step_audio_seconds=stored.clip_seconds * batch_clips * trainer.accumulate,
        bytes_per_audio_second=stored.bytes_per_second,
        assumptions=(
            *assumptions,
            f"{ASSUMED_TOKENS} text tokens a clip, all clips of the mean length",
            *(["the host updates the weights in no time"] if strategy.endswith(OFFLOAD) else []),
        ),
    )


def planned_checkpoint_bytes(settings: Settings) -> int:
    """Return about what a checkpoint of a run would take; 0 where nothing can be planned."""
    try:
        return (
            BYTES_OF_STATE * build_forecast(settings, planned_config(settings.model)).cost.trainable
        )
    except UserError:
        return 0


@dataclass(frozen=True)
class StoredAudio:
    """What the training shards hold: clips (0 where it is not known), the mean length of those that are drawn, and bytes for a second."""

    clips: int
    clip_seconds: float
    bytes_per_second: float


def stored_audio(data: DataSettings) -> tuple[StoredAudio, tuple[str, ...]]:
    """Read the indexes of the training sources; return what they hold, and what had to be assumed where one cannot be read."""
    try:
        opened = open_sources(data.train, read_policy(data))
    except UserError:
        opened = []
    indexes = [source.index for source in _selected(data, opened)] if opened else []
    if not indexes or not all(index.samples and index.seconds for index in indexes):
        assumption = f"clips of {ASSUMED_CLIP_SECONDS:g} s as 16 kHz FLAC: the training shards are not there to be looked at"
        return StoredAudio(0, ASSUMED_CLIP_SECONDS, FLAC_BYTES_PER_SECOND), (assumption,)
    samples = [index.samples for index in indexes]
    shares = samples if data.mode == "epochs" else _shares(data, samples)
    drawn = list(
        zip(shares, indexes, strict=True)
    )  # a corpus that is drawn often counts often, however small
    seconds = sum(share * index.seconds / index.samples for share, index in drawn)
    stored = sum(
        share
        * sum(shard.bytes for shard in index.shards)
        / sum(shard.samples for shard in index.shards)
        for share, index in drawn
    )
    return StoredAudio(sum(samples), seconds / sum(shares), stored / seconds), ()


def planned_config(model: ModelSettings) -> WhisperConfig:
    """Return the sizes of the model that a run starts from, without its weights."""
    if model.scratch is None:
        return config_of(model.path, model.revision)
    scratch = model.scratch
    vocabulary = scratch.vocabulary + len(WHISPER_SPECIAL_TOKENS)  # at most; few texts give fewer
    sizes = (scratch.d_model, scratch.encoder_layers, scratch.decoder_layers, scratch.heads)
    return shaped_config(*sizes, scratch.num_mel_bins, vocabulary)


def _optimizer(optim: OptimSettings, total_steps: int, offload: bool) -> Any:
    return optimizer_factory(
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        layer_decay=optim.layer_decay,
        total_steps=total_steps,
        warmup_steps=min(optim.warmup_steps, total_steps),
        schedule=optim.schedule,
        final_share=optim.final_lr_share,
        encoder_lr=optim.encoder_lr,
        encoder_after_step=optim.encoder_after_step,
        cpu_offload=offload,
    )


def _make_scratch(out: Path, texts: Sequence[str], scratch: ScratchSettings, seed: int) -> None:
    if not texts:
        raise UserError("The training shards hold no text to make a tokenizer from.")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_whisper(
        partial,
        texts,
        d_model=scratch.d_model,
        encoder_layers=scratch.encoder_layers,
        decoder_layers=scratch.decoder_layers,
        heads=scratch.heads,
        num_mel_bins=scratch.num_mel_bins,
        vocabulary=scratch.vocabulary,
        seed=seed,
    )
    partial.rename(out)
