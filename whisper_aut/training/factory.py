"""Builds the objects of a run from its config: pretrained checkpoint, data, decoder, module."""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from whisper_aut import __version__
from whisper_aut.audio.augment import Augment
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.audio.logmel import WINDOW_SECONDS, LogMel
from whisper_aut.config import DistillationSettings, Settings
from whisper_aut.corpora.manifest import read_annotations
from whisper_aut.data.annotation import FieldMapping
from whisper_aut.data.datamodule import ShardDataModule
from whisper_aut.data.dataset import ExampleBuilder, ShardNoise, StreamSource
from whisper_aut.data.filters import excluded_from, read_exclusions, select_samples, unmatched_ids
from whisper_aut.data.reader import ReadPolicy, Sample
from whisper_aut.data.sampler import MixedPadding, mixture_weights, usable_partitions
from whisper_aut.data.settings import DataSettings, SourceSettings
from whisper_aut.data.shards import ShardIndex, iter_samples, open_index
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import Problems, UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.distillation import Distillation
from whisper_aut.models.encoder import (
    PackedEncoder,
    add_lora,
    clip_too_long_message,
    max_clip_seconds,
)
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.models.tiny import make_whisper
from whisper_aut.onednn import use_onednn
from whisper_aut.training.doctor import check_compilable
from whisper_aut.training.optim import optimizer_factory
from whisper_aut.training.strategies import resolve_precision
from whisper_aut.utils import file_lock, file_sha256

log = logging.getLogger(__name__)
# Large files are hashed in HASH_BLOCKS evenly spaced blocks of HASH_BLOCK_BYTES. That is enough:
# two sets of weights differ throughout the file.
HASH_BLOCK_BYTES, HASH_BLOCKS = 1 << 16, 1 << 12


def build_pretrained(settings: Settings, *, empty: bool = False) -> PretrainedWhisper:
    """Return the pretrained checkpoint that the run starts from; `empty` leaves out its weights.

    With `model.scratch`, a new model and tokenizer are created in the folder of the run's name.
    Later runs with the same sizes, seed, release and texts reuse them.

    Raises:
        UserError: If a source of the tokenizer's texts cannot be read or contains no text.
    """
    model = settings.model
    if model.scratch is None:
        return PretrainedWhisper(model.path, model.revision, model.random_init, empty)
    policy = read_policy(settings.data)
    if model.scratch.texts:
        indexes = [open_index(folder, policy) for folder in model.scratch.texts]
    else:
        indexes = [source.index for source in open_selected(settings.data)]
    key = hashlib.sha256(json.dumps([asdict(model.scratch), settings.seed, __version__]).encode())
    for index in indexes:
        key.update(index.selected_fingerprint().encode())
    out = Path(settings.runs) / settings.name / f".scratch-{key.hexdigest()[:12]}"
    with file_lock(out):
        if not out.exists():
            limits = clip_limits(settings.data)
            texts = [
                item.annotation.text
                for index in indexes
                for item in iter_samples(index, limits)
                if isinstance(item, Sample) and item.annotation.text
            ]
            if not texts:
                raise UserError("The training shards contain no text to train a tokenizer on.")
            sizes = asdict(model.scratch)
            sizes.pop("texts")
            partial = out.with_name(f"{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make_whisper(partial, texts, **sizes, seed=settings.seed)
            partial.rename(out)
    return PretrainedWhisper(str(out), empty=empty)


def build_decoder(settings: Settings, pretrained: PretrainedWhisper) -> tuple[Any, TextCodec]:
    entry, options = check_decoder(settings.decoder)
    return entry.build(pretrained, options, bool(settings.model.gradient_checkpointing))


def build_data(settings: Settings, codec: TextCodec, num_mel_bins: int) -> ShardDataModule:
    """Return the data module of a run.

    Raises:
        UserError: If a source cannot be read or a training source is empty.
    """
    data = settings.data
    train, valid = open_selected(data), open_sources(data.valid, read_policy(data))
    if empty := [source.index.name for source in train if not source.index.samples]:
        raise UserError(f"These training sources contain no samples: {', '.join(empty)}.")
    indexes = [source.index for source in train]
    weights = [(clips, source_weights(data, indexes, names)) for clips, names in data.mixtures]
    return ShardDataModule(
        train,
        valid,
        weights[0][1],
        ExampleBuilder(
            LogMel(num_mel_bins),
            codec,
            clip_limits(data),
            on_device=data.features == "device",
            long_clips=data.long_clips,
            domains=tuple(data.domains),
        ),
        seed=settings.seed,
        window=data.window,
        schedule=weights[1:],
        partitions=usable_partitions(
            data.partitions, sum(shard.bytes for source in train for shard in source.index.shards)
        ),
        batch_clips=data.batch_clips,
        batch_seconds=data.batch_seconds,
        batch_tokens=data.batch_tokens,
        epochs=settings.trainer.max_epochs if data.mode == "epochs" else None,
        samples_per_epoch=data.samples_per_epoch,
        valid_clips=data.valid_clips,
        accumulate=settings.trainer.accumulate,
        workers=data.workers,
        augment=build_augment(settings),
        padding=MixedPadding(pads, settings.seed) if (pads := settings.model.pad_to_30s) else None,
        loss=settings.loss,
    )


def build_augment(settings: Settings) -> Augment:
    """Return the augmentation of training clips.

    Raises:
        UserError: If noise shards cannot be read, are empty, or have no sample tables, which are
            needed to read single clips.
    """
    augment, policy = settings.data.augment, read_policy(settings.data)
    opened = [StreamSource(open_index(folder, policy), "sound") for folder in augment.noise]
    noise = [source.index for source in select_sources(settings.data, opened)]
    unusable = [index.root for index in noise if not index.samples or not index.has_tables]
    if unusable:
        raise UserError(
            f"These noise shards have no clips or no sample tables: {', '.join(unusable)}. Run "
            "whisper-aut data index FOLDER."
        )
    drawn = ShardNoise(noise) if noise else None
    return Augment(augment, settings.seed, drawn, settings.data.max_seconds)


def build_module(
    settings: Settings,
    pretrained: PretrainedWhisper,
    decoder: Any,
    codec: TextCodec,
    total_steps: int,
) -> AudioTextModule:
    """Return the LightningModule of a run. Trainable parameters are converted to float32.

    The learning rate schedule ends after `total_steps`.

    Raises:
        UserError: If the encoder is too short for the clips, or `model.compile` is not possible.
    """
    model = settings.model
    padding = "30s" if model.pad_to_30s else model.padding  # of the longest input
    seconds = WINDOW_SECONDS if padding == "30s" else settings.data.max_seconds
    if seconds > max_clip_seconds(pretrained.config):
        raise UserError(clip_too_long_message(pretrained.config, padding, seconds))
    encoder = PackedEncoder(pretrained.encoder, model.padding, bool(model.gradient_checkpointing))
    distillation = _distillation(settings, encoder) if settings.distillation.weight else None
    if model.freeze_encoder:
        encoder.requires_grad_(False)
    if model.lora_rank:
        add_lora(encoder, model.lora_rank, model.lora_alpha)
    if model.compile:
        check_compilable(settings.strategy.name)
        for part in (encoder, decoder):
            if hasattr(part, "compile_layers"):
                part.compile_layers()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        if parameter.requires_grad:
            # 16-bit weights would round away AdamW's small updates.
            parameter.data = parameter.data.float()
    module = AudioTextModule(
        encoder,
        decoder,
        codec,
        optimizer_factory(settings.optim, total_steps, cpu_offload=settings.strategy.offload),
        generate_clips=settings.trainer.generate_clips,
        generate_tokens=settings.trainer.generate_tokens,
        encoder_after_step=settings.optim.encoder_after_step,
        distillation=distillation,
        domains=tuple(settings.data.domains),
    )
    if settings.optim.ema_decay:
        module.average = {
            name: parameter.detach().clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
    use_onednn(module)
    return module


def _distillation(settings: Settings, encoder: PackedEncoder) -> Distillation:
    """Return a distillation whose teacher is a copy of the encoder, before it is trained."""
    wanted, last = settings.distillation, len(encoder.whisper.layers)
    if any(layer > last for layer in wanted.layers):
        raise UserError(
            f"distillation.layers: the encoder has layers 0 to {last}, not "
            f"{', '.join(map(str, wanted.layers))}."
        )
    teacher = PackedEncoder(copy.deepcopy(encoder.whisper), encoder.padding)
    use_onednn(teacher)
    return Distillation(teacher, wanted.weight, wanted.layers or [last], wanted.domains)


def build_trained(settings: Settings, weights: dict[str, Any]) -> AudioTextModule:
    """Return the module of a run in eval mode, with weights from `export.hf.read_checkpoint`."""
    # Compilation does not pay off for the few clips that are evaluated.
    settings = replace(
        settings,
        model=replace(settings.model, compile=False, lora_rank=0),
        distillation=DistillationSettings(),
    )
    pretrained = build_pretrained(settings)
    decoder, codec = build_decoder(settings, pretrained)
    module = build_module(settings, pretrained, decoder, codec, total_steps=1)
    module.load_state_dict(weights, strict=True)
    return module.eval()


def clip_limits(data: DataSettings) -> ClipLimits:
    return ClipLimits(min_seconds=data.min_seconds, max_seconds=data.max_seconds)


def read_policy(data: DataSettings) -> ReadPolicy:
    return ReadPolicy(data.retries, data.timeout_seconds)


def open_sources(
    sources: Sequence[SourceSettings], policy: ReadPolicy, *, mapped: bool = True
) -> list[StreamSource]:
    """Open the shard index of every source, with its fields and annotations if `mapped`.

    Raises:
        UserError: If any source cannot be read. The message lists all of them.
    """
    opened, problems = [], Problems()
    for source in sources:
        with problems.gather():
            index = open_index(source.path, policy)
            index = map_fields(index, source) if mapped else index
            opened.append(StreamSource(index, source.domain, source.licence))
    problems.raise_if_any("The data")
    return opened


def map_fields(index: ShardIndex, source: SourceSettings) -> ShardIndex:
    """Return an index whose samples have the fields and annotations that a source's entry names.

    Raises:
        UserError: If the annotations cannot be read.
    """
    fields = {**source.fields, **({"text": source.text} if source.text else {})}
    rows = read_annotations(source.annotations) if source.annotations else {}
    if not (fields or rows or source.task):
        return index
    if unmatched := unmatched_ids(index, rows):
        log.warning(
            f"{len(unmatched)} of {len(rows)} ids of {source.annotations} are not keys of "
            f"{source.path}: {', '.join(unmatched[:5])}{', …' if len(unmatched) > 5 else ''}. "
            "They are used only if samples have them in the field `id`."
        )
    return replace(index, mapping=FieldMapping(fields, rows, source.task))


def open_selected(data: DataSettings) -> list[StreamSource]:
    """Open the training sources, leaving out excluded clips and clips without an allowed licence.

    Raises:
        UserError: If a source cannot be read, if no clip of a source is left, or if the exclusion
            list that the config names does not exist.
    """
    return select_sources(data, open_sources(data.train, read_policy(data)))


def select_sources(data: DataSettings, sources: Sequence[StreamSource]) -> list[StreamSource]:
    """Leave out excluded clips and clips without an allowed licence; see `open_selected`."""
    exclusions = read_exclusions(data.exclude) if data.exclude else {}
    selected, empty = [], []
    for source in sources:
        excluded, allowed = excluded_from(source.index, exclusions), data.licences.allow
        index = select_samples(source.index, excluded, allowed, source.licence)
        selected.append(replace(source, index=index))
        if source.index.samples and not index.samples:
            licences = ", ".join(name or "no licence" for name in source.licences)
            empty.append(f"{index.name} ({licences})")
    if empty:
        raise UserError(
            f"data.licences.allow ({', '.join(data.licences.allow) or 'all'}) and data.exclude "
            f"({data.exclude or 'none'}) leave no clips of {'; '.join(empty)}. Remove these "
            "sources from the config, or allow their licences. If the clips of a source state no "
            "licence, set `licence` in its entry of data.train."
        )
    return selected


def source_weights(
    data: DataSettings, indexes: Sequence[ShardIndex], domain_weights: Mapping[str, float]
) -> list[float]:
    """Return the sampling weight of each training source, given its shards.

    Raises:
        UserError: If sources are to count by hours, and the lengths of one are not known.
    """
    weights = []
    for source, index in zip(data.train, indexes, strict=True):
        size = index.seconds if data.weigh_by == "hours" else index.samples
        if not size and source.weight is None and index.samples:
            raise UserError(
                f"data.weigh_by: the lengths of {index.name} are not known. Write them once: "
                f"whisper-aut data index {index.root}"
            )
        weights.append(float(size) if source.weight is None else source.weight)
    domains = [source.domain for source in data.train]
    return mixture_weights(domains, weights, domain_weights, data.temperature)


def run_fingerprint(settings: Settings) -> str:
    """Return a hash of everything that determines what a run computes.

    The hash covers the config, the release, the shards, the exclusion list, files of annotations,
    and the files of models in local directories. It does not cover output paths, and which exports
    and probes are made, except for probes that may stop the run.

    Raises:
        UserError: If a data source cannot be read.
    """
    values, data, policy = asdict(settings), settings.data, read_policy(settings.data)
    for name in ("runs", "probe", "export"):
        values.pop(name)
    if (during := settings.probe.during).tasks and during.on_drop == "stop":
        values["during"] = asdict(during)
    # The date is set when a run starts; `same_chat_date` compares it separately.
    values["decoder"].pop("date", None)
    hardware = settings.hardware
    values["hardware"]["precision"], _ = resolve_precision(hardware.precision, hardware.accelerator)
    sources = open_sources([*data.train, *data.valid], policy, mapped=False)
    scratch = [values[part].get("scratch") or {} for part in ("model", "decoder")]
    folders = [*data.augment.noise, *(path for made in scratch for path in made.get("texts", ()))]
    indexes = [*(one.index for one in sources), *(open_index(path, policy) for path in folders)]
    shards = [index.fingerprint() for index in indexes]
    files = [data.exclude, *(source.annotations for source in (*data.train, *data.valid))]
    listed = [file_sha256(path) for path in map(Path, files) if path.is_file()]
    models = [settings.model.path, str(settings.decoder.get("language_model", ""))]
    hashes = [_hash_files(Path(path)) for path in models if path]
    content = json.dumps([__version__, values, shards, listed, hashes], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fix_chat_date(settings: Settings, previous: Path | None) -> Settings:
    """Fix the date that a chat template may insert as "today".

    A resumed run keeps the date of its recorded config (`previous`), and a new run uses the current
    one. The prompts of a run therefore never change, however long it trains and whenever its model
    is used.
    """
    _, options = check_decoder(settings.decoder)
    # The user set a date, or the decoder has no chat template.
    if getattr(options, "date", None) != "":
        return settings
    recorded = yaml.safe_load(previous.read_text()) if previous and previous.is_file() else {}
    date = recorded.get("decoder", {}).get("date") or datetime.now().date().isoformat()
    return replace(settings, decoder={**settings.decoder, "date": date})


def same_chat_date(settings: Settings, config: Path) -> bool:
    """Return whether a recorded config has the chat date of these settings, if they have one."""
    date = settings.decoder.get("date")
    return not date or yaml.safe_load(config.read_text())["decoder"].get("date") == date


def _hash_files(folder: Path) -> list[list[Any]]:
    """Return the name, size and hash of every file in a local model directory."""
    hashes = []
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in filter(Path.is_file, paths):
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            for position in range(0, size, max(HASH_BLOCK_BYTES, size // HASH_BLOCKS)):
                file.seek(position)
                digest.update(file.read(HASH_BLOCK_BYTES))
        hashes.append([path.name, size, digest.hexdigest()])
    return hashes
