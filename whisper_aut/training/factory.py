"""Builds the objects of a run from `Settings`: data module, LightningModule, Trainer arguments.

Also builds the forecast that `whisper-aut plan` prints.
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
from whisper_aut.data.filters import Exclusions, select_samples
from whisper_aut.data.reader import ReadPolicy, Sample
from whisper_aut.data.sampler import mixture_weights
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import PackedEncoder, clip_too_long_message, max_clip_seconds
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.models.tiny import (
    WHISPER_SPECIAL_TOKENS,
    load_whisper_config,
    make_whisper,
    whisper_config_of_size,
)
from whisper_aut.onednn import use_onednn
from whisper_aut.training.callbacks.stopping import BYTES_OF_STATE, check_compilable
from whisper_aut.training.optim import optimizer_factory
from whisper_aut.training.plan import (
    FLAC_BYTES_PER_SECOND,
    Forecast,
    StepCost,
    StepShape,
    step_cost,
)
from whisper_aut.training.strategies import DEEPSPEED, OFFLOAD, resolve_precision
from whisper_aut.utils import file_lock

# `_files` hashes at most about SAMPLES blocks of SAMPLE_BYTES from each file. Files smaller than
# the product of the two are hashed in full.
SAMPLE_BYTES, SAMPLES = 1 << 16, 1 << 12

# What a forecast assumes when the training shards cannot be read.
ASSUMED_CLIP_SECONDS, ASSUMED_TOKENS = 10.0, 32


def clip_limits(data: DataSettings) -> ClipLimits:
    """Return the limits on clip lengths of a config."""
    return ClipLimits(min_seconds=data.min_seconds, max_seconds=data.max_seconds)


def read_policy(data: DataSettings) -> ReadPolicy:
    """Return how a config reads shards: retries and timeout."""
    return ReadPolicy(data.retries, data.timeout_seconds)


def open_sources(sources: Sequence[SourceSettings], policy: ReadPolicy) -> list[StreamSource]:
    """Open the shard index of every source.

    Raises:
        UserError: If any source cannot be read. The message lists all of them.
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
    """Return a hash of everything that determines what a run computes.

    The hash covers the config, the release, the shards, the exclusion list, and the files of
    models in local directories. It does not cover output paths or the settings for probes and
    exports.

    Raises:
        UserError: If a data source cannot be read.
    """
    values, data, policy = asdict(settings), settings.data, read_policy(settings.data)
    for name in ("runs", "probe", "export"):
        values.pop(name)
    # The date is set when a run starts; `same_chat_date` compares it separately.
    values["decoder"].pop("date", None)
    hardware = settings.hardware
    values["hardware"]["precision"], _ = resolve_precision(hardware.precision, hardware.accelerator)
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
    """Return the name, size and hash of every file in a local model directory.

    Large files are hashed by evenly spaced blocks. That is enough: two sets of weights differ
    throughout the file.
    """
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


def build_pretrained(settings: Settings) -> PretrainedWhisper:
    """Return the pretrained checkpoint that the run starts from.

    With `model.scratch`, a new model and tokenizer are created in the folder of the run's name.
    Later runs with the same sizes, seed, release and texts reuse them.

    Raises:
        UserError: If a source of the tokenizer's texts cannot be read or contains no text.
    """
    model = settings.model
    if model.scratch is None:
        return PretrainedWhisper(model.path, model.revision, model.random_init)
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
        if not out.exists():  # `_make_scratch` renames it to this path once it is complete
            limits = clip_limits(settings.data)
            items = (item for index in indexes for item in iter_samples(index, limits, policy))
            texts = [
                item.annotation.text
                for item in items
                if isinstance(item, Sample) and item.annotation.text
            ]
            _make_scratch(out, texts, model.scratch, settings.seed)
    return PretrainedWhisper(str(out))


def build_data(settings: Settings, codec: TextCodec, num_mel_bins: int) -> ShardDataModule:
    """Return the data module of a run.

    Args:
        settings: Config of the run.
        codec: Turns annotations into tokens.
        num_mel_bins: Mel bins M of the pretrained checkpoint.

    Raises:
        UserError: If a source cannot be read or a training source is empty.
    """
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
    """Return the sampling weight of each training source, given its number of clips."""
    weights = [
        float(clips) if source.weight is None else source.weight
        for source, clips in zip(data.train, samples, strict=True)
    ]
    return mixture_weights(
        [source.domain for source in data.train], weights, data.domains, data.temperature
    )


def build_augment(settings: Settings, policy: ReadPolicy) -> Augment:
    """Return the augmentation of training clips.

    Raises:
        UserError: If noise shards cannot be read, are empty, or have no sample tables, which are
            needed to read single clips.
    """
    chosen = settings.data.augment
    opened = [StreamSource(open_index(folder, policy), "sound") for folder in chosen.noise]
    noise = [source.index for source in _selected(settings.data, opened)]
    unfit = [index.root for index in noise if not index.samples or not index.has_tables]
    if unfit:
        raise UserError(
            f"Noise shards without clips or sample tables: {', '.join(unfit)}. Run: whisper-aut "
            "data index FOLDER"
        )
    return Augment(
        seed=settings.seed,
        spectrum=SpecAugment() if chosen.spec else None,
        gain_db=chosen.gain_db,
        speeds=tuple(chosen.speeds),
        noise=noise,
        noise_probability=chosen.noise_probability,
        snr_db=(chosen.snr_db[0], chosen.snr_db[1]),
        max_seconds=settings.data.max_seconds,
        policy=policy,
    )


def open_selected(data: DataSettings) -> list[StreamSource]:
    """Open the training sources, leaving out excluded clips and clips without an allowed licence.

    Raises:
        UserError: If a source cannot be read, if no clip of a source is left, or if the exclusion
            list that the config names does not exist.
    """
    return _selected(data, open_sources(data.train, read_policy(data)))


def _selected(data: DataSettings, sources: Sequence[StreamSource]) -> list[StreamSource]:
    exclusions = Exclusions.load(data.exclude) if data.exclude else Exclusions()
    chosen, empty = [], []
    for source in sources:
        excluded, allowed = exclusions.for_index(source.index), data.licences.allow
        index = select_samples(source.index, excluded, allowed, source.licence, read_policy(data))
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
    """Fix the date that a chat template may insert as "today".

    A resumed run keeps its recorded date, and a new run uses the current one. The prompts of a run
    therefore never change, however long it trains and whenever its model is used.

    Args:
        settings: Config of the run.
        before: Path of the recorded config of the run that is resumed.
    """
    _, options = check_decoder(settings.decoder)
    # The user set a date, or the decoder has no chat template.
    if getattr(options, "date", None) != "":
        return settings
    recorded = yaml.safe_load(before.read_text()) if before and before.is_file() else {}
    day = recorded.get("decoder", {}).get("date") or datetime.now().date().isoformat()
    return replace(settings, decoder={**settings.decoder, "date": day})


def same_chat_date(settings: Settings, config: Path) -> bool:
    """Return whether a recorded run has the chat date of these settings.

    Always true if the settings have no date.

    Args:
        settings: Config of the new run.
        config: Path of the recorded config.
    """
    date = settings.decoder.get("date")
    return not date or yaml.safe_load(config.read_text())["decoder"].get("date") == date


def build_decoder(settings: Settings, start: PretrainedWhisper) -> tuple[Any, TextCodec]:
    """Return the decoder that `settings.decoder` names, and its text codec."""
    entry, options = check_decoder(settings.decoder)
    return entry.build(start, options, settings.model.gradient_checkpointing)


def build_module(
    settings: Settings, start: PretrainedWhisper, decoder: Any, codec: TextCodec, total_steps: int
) -> AudioTextModule:
    """Return the LightningModule of a run. Trainable parameters are converted to float32.

    Args:
        settings: Config of the run.
        start: The pretrained checkpoint.
        decoder: From `build_decoder`.
        codec: From `build_decoder`.
        total_steps: Optimizer steps of the learning rate schedule.

    Raises:
        UserError: If the encoder is too short for the clips, or `model.compile` is not possible.
    """
    model = settings.model
    seconds = WINDOW_SECONDS if model.padding == "30s" else settings.data.max_seconds
    if seconds > max_clip_seconds(start.config):
        raise UserError(clip_too_long_message(start.config, model.padding, seconds))
    if model.compile:
        check_compilable(settings.strategy.name)
    encoder = PackedEncoder(
        start.encoder, model.padding, model.gradient_checkpointing, model.compile
    )
    if model.freeze_encoder:
        encoder.requires_grad_(False)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        if parameter.requires_grad:
            # 16-bit weights would round away AdamW's small updates.
            parameter.data = parameter.data.float()
    factory = _optimizer(
        settings.optim, total_steps, offload=settings.strategy.name.endswith(OFFLOAD)
    )
    module = AudioTextModule(
        encoder,
        decoder,
        codec,
        factory,
        generate_clips=settings.trainer.generate_clips,
        generate_tokens=settings.trainer.generate_tokens,
        encoder_after_step=settings.optim.encoder_after_step,
    )
    use_onednn(module)
    return module


def build_trained(settings: Settings, weights: dict[str, Any]) -> AudioTextModule:
    """Return the module of a run with the weights of one of its checkpoints, in eval mode.

    Args:
        settings: Config of the run.
        weights: State dict of the checkpoint.
    """
    # Compilation does not pay off for the few clips that are evaluated.
    settings = replace(settings, model=replace(settings.model, compile=False))
    start = build_pretrained(settings)
    decoder, codec = build_decoder(settings, start)
    module = build_module(settings, start, decoder, codec, total_steps=1)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def trainer_arguments(settings: Settings, total_steps: int) -> dict[str, Any]:
    """Return the arguments of `lightning.Trainer` that the config determines."""
    trainer, hardware = settings.trainer, settings.hardware
    return {
        "accelerator": hardware.accelerator,
        "devices": hardware.devices,
        "num_nodes": hardware.nodes,
        "precision": hardware.precision,
        "max_steps": total_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": trainer.accumulate,
        # Under other strategies, `Guard` clips: it has computed the norm already.
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
    """Forecast the cost of a run. Reads the shard indexes if they exist, and nothing else.

    Args:
        settings: Config of the run.
        config: Sizes of the pretrained checkpoint.

    Raises:
        UserError: If the decoder has no `build_meta`, or no clip of a training source is left.
    """
    entry, options = check_decoder(settings.decoder)
    if entry.build_meta is None:
        raise UserError(
            f"The decoder {settings.decoder['name']!r} has no `build_meta` in its "
            "registry entry, so a run with it cannot be planned."
        )
    build_meta, data, hardware, trainer = (
        entry.build_meta,
        settings.data,
        settings.hardware,
        settings.trainer,
    )
    stored, assumptions = stored_audio(data)
    ranks = (hardware.devices if isinstance(hardware.devices, int) else 1) * hardware.nodes
    precision = hardware.precision
    if precision == "auto":  # every device in the tables supports bfloat16
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
            config, lambda config, checkpointing: build_meta(config, options, checkpointing), shape
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
    """Return the approximate size of a checkpoint in bytes, or 0 if the run cannot be forecast."""
    try:
        return (
            BYTES_OF_STATE * build_forecast(settings, planned_config(settings.model)).cost.trainable
        )
    except UserError:
        return 0


@dataclass(frozen=True)
class StoredAudio:
    """Size of the training data.

    Attributes:
        clips: Number of clips; 0 if unknown.
        clip_seconds: Mean length of the clips that are drawn.
        bytes_per_second: Bytes on disk for a second of audio.
    """

    clips: int
    clip_seconds: float
    bytes_per_second: float


def stored_audio(data: DataSettings) -> tuple[StoredAudio, tuple[str, ...]]:
    """Return the size of the training data, and the assumptions made if it cannot be read."""
    try:
        opened = open_sources(data.train, read_policy(data))
    except UserError:
        opened = []
    indexes = [source.index for source in _selected(data, opened)] if opened else []
    if not indexes or not all(index.samples and index.seconds for index in indexes):
        assumption = (
            f"clips of {ASSUMED_CLIP_SECONDS:g} s as 16 kHz FLAC: the training shards are not "
            "there to be looked at"
        )
        return StoredAudio(0, ASSUMED_CLIP_SECONDS, FLAC_BYTES_PER_SECOND), (assumption,)
    samples = [index.samples for index in indexes]
    shares = samples if data.mode == "epochs" else _shares(data, samples)
    # Means are weighted by how often a source is drawn, not by its size.
    drawn = list(zip(shares, indexes, strict=True))
    seconds = sum(share * index.seconds / index.samples for share, index in drawn)
    stored = sum(
        share
        * sum(shard.bytes for shard in index.shards)
        / sum(shard.samples for shard in index.shards)
        for share, index in drawn
    )
    return StoredAudio(sum(samples), seconds / sum(shares), stored / seconds), ()


def planned_config(model: ModelSettings) -> WhisperConfig:
    """Return the config of the model that a run starts from, without loading its weights."""
    if model.scratch is None:
        return load_whisper_config(model.path, model.revision)
    scratch = model.scratch
    # An upper bound: a tokenizer trained on few texts has fewer tokens.
    vocabulary = scratch.vocabulary + len(WHISPER_SPECIAL_TOKENS)
    sizes = (scratch.d_model, scratch.encoder_layers, scratch.decoder_layers, scratch.heads)
    return whisper_config_of_size(*sizes, scratch.num_mel_bins, vocabulary)


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
        final_share=optim.final_lr_fraction,
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
