"""Settings → the objects of a run. The only module of the training stage that reads settings.

In: checked `Settings`. Out: the data module, the LightningModule, the Trainer's arguments. Next: `training.train` puts them together.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whisper_aut import __version__
from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.corpora.shards import open_index
from whisper_aut.data.example import ExampleBuilder
from whisper_aut.data.logmel import LogMel
from whisper_aut.data.module import ShardDataModule
from whisper_aut.data.order import mixture_shares
from whisper_aut.data.sample import Sample, iter_samples
from whisper_aut.data.stream import StreamSource
from whisper_aut.data.text import TextCodec
from whisper_aut.errors import UserError
from whisper_aut.model.decoders import check_decoder
from whisper_aut.model.encoder import PackedEncoder
from whisper_aut.model.module import AudioTextModule
from whisper_aut.model.scratch import make_whisper
from whisper_aut.model.start import Start
from whisper_aut.settings import DataSettings, OptimSettings, ScratchSettings, Settings, SourceSettings
from whisper_aut.training.optim import optimizer_factory
from whisper_aut.training.strategy import OFFLOAD


def clip_limits(data: DataSettings) -> ClipLimits:
    return ClipLimits(min_seconds=data.min_seconds, max_seconds=data.max_seconds)


def open_sources(sources: Sequence[SourceSettings]) -> list[StreamSource]:
    """Open the index of every source.

    Raises:
        UserError: listing every source that cannot be read.
    """
    opened, problems = [], []
    for source in sources:
        try:
            opened.append(StreamSource(open_index(source.path), source.domain))
        except UserError as error:
            problems.append(f"  - {error}")
    if problems:
        raise UserError("Sources that cannot be read:\n" + "\n".join(problems))
    return opened


def run_fingerprint(settings: Settings, sources: Sequence[StreamSource]) -> str:
    """Return a hash of everything that decides what a run computes: config, data and release, but not the place of outputs."""
    values = asdict(settings)
    for name in ("runs", "probe", "export"):
        values.pop(name)
    facts = [__version__, values, [source.index.fingerprint() for source in sources]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def build_start(settings: Settings) -> Start:
    """Return the checkpoint that the run starts from; a scratch model is made where it has not been."""
    model = settings.model
    if model.scratch is None:
        return Start(model.path, model.revision, model.random_init)
    key = hashlib.sha256(json.dumps([asdict(model.scratch), settings.seed, __version__]).encode())
    folders = model.scratch.texts or [source.path for source in settings.data.train]
    indexes = [open_index(folder) for folder in folders]
    for index in indexes:
        key.update(index.fingerprint().encode())
    out = Path(settings.runs) / settings.name / f".scratch-{key.hexdigest()[:12]}"
    if not (out / "tokenizer.json").exists():  # written last
        limits = clip_limits(settings.data)
        items = (item for index in indexes for item in iter_samples(index, limits))
        texts = [item.annotation.text for item in items if isinstance(item, Sample) and item.annotation.text]
        _make_scratch(out, texts, model.scratch, settings.seed)
    return Start(str(out))


def build_data(settings: Settings, codec: TextCodec, num_mel_bins: int) -> ShardDataModule:
    data = settings.data
    train, valid = open_sources(data.train), open_sources(data.valid)
    empty = [source.index.root for source in train if not source.index.samples]
    if empty:
        raise UserError(f"Training sources without a single sample: {', '.join(empty)}.")
    weights = [
        float(opened.index.samples) if source.weight is None else source.weight
        for source, opened in zip(data.train, train, strict=True)
    ]
    shares = mixture_shares([source.domain for source in data.train], weights, data.domains)
    return ShardDataModule(
        train,
        valid,
        shares,
        ExampleBuilder(LogMel(num_mel_bins), codec, clip_limits(data)),
        seed=settings.seed,
        window=data.window,
        batch_clips=data.batch_clips,
        samples_per_epoch=data.samples_per_epoch,
        valid_clips=data.valid_clips,
        accumulate=settings.trainer.accumulate,
        workers=data.workers,
    )


def build_decoder(settings: Settings, start: Start) -> tuple[Any, TextCodec]:
    entry, options = check_decoder(settings.decoder)
    return entry.build(start, options, settings.model.gradient_checkpointing)


def build_module(settings: Settings, start: Start, decoder: Any, codec: TextCodec, total_steps: int) -> AudioTextModule:
    encoder = PackedEncoder(start.encoder, settings.model.padding, settings.model.gradient_checkpointing)
    if settings.model.freeze_encoder:
        encoder.requires_grad_(False)
    factory = _optimizer(settings.optim, total_steps, offload=settings.strategy.name.endswith(OFFLOAD))
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
        "gradient_clip_val": settings.optim.gradient_clip or None,
        "val_check_interval": min(trainer.valid_every_steps, total_steps) * trainer.accumulate,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": min(trainer.log_every_steps, total_steps),
        "num_sanity_val_steps": 0,
        "deterministic": trainer.deterministic,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }


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
    make_whisper(
        out,
        texts,
        d_model=scratch.d_model,
        encoder_layers=scratch.encoder_layers,
        decoder_layers=scratch.decoder_layers,
        heads=scratch.heads,
        num_mel_bins=scratch.num_mel_bins,
        vocabulary=scratch.vocabulary,
        seed=seed,
    )
