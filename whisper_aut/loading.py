"""Loads encoders, trained runs and probe tasks by the names that commands take.

An encoder is a run, a directory in Hugging Face's format or a hub id, with an optional padding mode
(`NAME@30s`) and layers (`NAME#7`). It can also be `random:NAME` for its architecture with random
weights, `FILE.py:CLASS` for a class in the form that X-ARES takes, or `logmel`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whisper_aut.config import load_settings
from whisper_aut.errors import Problems, UserError
from whisper_aut.export.card import write_card
from whisper_aut.export.hf import (
    DecoderWeights,
    ExportKind,
    export_checkpoint,
    find_checkpoint,
    read_checkpoint,
)
from whisper_aut.inference.demo import DemoModels
from whisper_aut.inference.encoder import (
    DTYPES,
    AudioEncoder,
    load_encoder,
    resolve_device,
    split_padding,
    trained_padding,
)
from whisper_aut.inference.other_encoders import (
    MODEL_TYPES,
    load_custom_encoder,
    load_other_encoder,
    model_type,
)
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import PackedEncoder, Padding
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.probes.encoders import (
    BASELINE_NAME,
    FrameEncoder,
    LogMelBaseline,
    layer_indices,
    select_layers,
)
from whisper_aut.probes.tasks import ProbeTask, expand_suites, load_task
from whisper_aut.training.factory import build_trained
from whisper_aut.training.run_dir import RunDirectory

LOGMEL, CUSTOM, WHISPER, RANDOM_PREFIX = "logmel", "custom", "whisper", "random:"


def open_run(path: Path, *, device: str = "cpu", dtype: str = "fp32") -> AudioTextModule:
    """Load a trained model with its decoder.

    Args:
        path: a run directory or one of its checkpoints.
        device: where the model runs; `auto` uses a GPU if there is one.
        dtype: of all weights. With `fp32`, a frozen language model keeps its own dtype.

    Raises:
        UserError: `path` is not a run, files that it needs are missing, or the device is missing.
    """
    checkpoint, _ = find_checkpoint(path)
    target = resolve_device(device)
    settings = load_settings(RunDirectory(checkpoint.parent.parent).config)
    module = build_trained(settings, read_checkpoint(checkpoint))
    return module.to(device=target, dtype=None if dtype == "fp32" else DTYPES[dtype])


def open_generator(name: str, *, device: str = "cpu", dtype: str = "fp32") -> AudioTextModule:
    """Load a model that writes text: a trained one, see `open_run`, or a Whisper.

    Args:
        name: a run directory, one of its checkpoints, or a Whisper checkpoint: a directory in
            Hugging Face's format or a hub id, with an optional padding mode (`NAME@none`).
        device, dtype: see `open_run`.

    Raises:
        UserError: there is no such model, or it has no decoder.
    """
    path, padding = split_padding(name)
    if is_run(Path(path)):
        if padding:
            raise UserError(f"{name}: a run uses the padding of its training. Write {path}.")
        return open_run(Path(path), device=device, dtype=dtype)
    pretrained = PretrainedWhisper(path)
    entry, options = check_decoder({"name": "whisper"})
    decoder, codec = entry.build(pretrained, options, False)
    encoder = PackedEncoder(pretrained.encoder, padding or trained_padding(pretrained.config))
    module = AudioTextModule(encoder, decoder, codec).eval()
    return module.to(device=resolve_device(device), dtype=DTYPES[dtype])


def is_run(path: Path) -> bool:
    """Return whether a path is a run directory or a checkpoint in one."""
    return RunDirectory(path).environment.is_file() or path.suffix == ".ckpt"


def export_run(
    path: Path,
    out: Path,
    kind: ExportKind,
    dtype: str = "fp32",
    *,
    interpolate: float | None = None,
    decoder: DecoderWeights = "trained",
    **card: str,
) -> Path:
    """Export a trained model with a model card.

    `path` is a run directory or one of its checkpoints. `dtype` is `fp32`, `bf16` or `fp16`.
    `interpolate` is the fraction of the trained weights, see `export.hf.interpolated`, and defaults
    to `model.interpolate` of the run's config. `decoder` is that of the format `whisper`. `card`
    may contain `name` and `licence`, see `write_card`.

    Raises:
        UserError: `path` is not a run, or the run cannot be exported as `kind`, or it has no
            pretrained weights to use.
    """
    checkpoint, pretrained = find_checkpoint(path)
    run = RunDirectory(checkpoint.parent.parent)
    model = load_settings(run.config).model
    interpolate = model.interpolate if interpolate is None else interpolate
    if decoder == "pretrained" and kind != "whisper":
        raise UserError(f"{kind} has no decoder. Use --decoder pretrained with --format whisper.")
    if (interpolate != 1 or decoder == "pretrained") and model.starts_at_random:
        raise UserError(f"{run.path} started from random weights: it has no pretrained ones.")
    export_checkpoint(
        checkpoint,
        pretrained,
        out,
        kind,
        dtype=DTYPES[dtype],
        padding=model.padding,
        pad_to_30s=model.pad_to_30s,
        interpolate=interpolate,
        decoder=decoder,
    )
    options: Any = {"interpolate": interpolate, "decoder": decoder, "checkpoint": checkpoint}
    write_card(run.path, out, kind, dtype, **options | card)
    return out


def split_layers(name: str) -> tuple[str, str]:
    """Split `NAME#7`, `NAME#all` or `NAME#last` into a name and its layers; empty for none.

    Raises:
        UserError: the suffix is none of these.

    Examples:
        >>> split_layers("openai/whisper-tiny@30s#7"), split_layers("runs/aut_tiny/latest")
        (('openai/whisper-tiny@30s', '7'), ('runs/aut_tiny/latest', ''))
    """
    path, mark, layers = name.rpartition("#")
    if not mark or "/" in layers or Path(name).exists():  # paths may contain `#` too
        return name, ""
    if layers not in ("all", "last") and not layers.isdecimal():
        raise UserError(f"{name}: after # comes a layer's number, all or last, not {layers!r}.")
    return path, layers


def open_encoder(name: str, padding: Padding | None, **options: Any) -> FrameEncoder:
    """Load an encoder by its name on the command line.

    Args:
        name: a run, path or hub id of a Whisper or of another model of transformers,
            `random:PATH`, `FILE.py:CLASS` (see `load_custom_encoder`), or `logmel`. `#7` after it
            selects a layer, `#all` all of them, side by side, and `#last` the output.
        padding: for Whispers whose name has no padding mode.
        options: `device` and `dtype` of `load_encoder`.

    Raises:
        UserError: there is no such encoder, it lacks the layer, or one other than a Whisper is
            given a padding mode.
    """
    name, layers = split_layers(name)
    if layers not in ("", "last"):
        encoder = open_encoder(name, padding, **options)
        known = layer_indices(encoder)
        return select_layers(encoder, known if layers == "all" else [int(layers)])
    path, given_padding = split_padding(name)
    random_init, path = path.startswith(RANDOM_PREFIX), path.removeprefix(RANDOM_PREFIX)
    kind = _encoder_kind(path)
    if kind == WHISPER:
        padding = given_padding or padding
        return load_encoder(path, padding=padding, random_init=random_init, **options)
    if given_padding:
        raise UserError(f"{name}: only Whispers have a padding mode. Write {path}.")
    if kind == LOGMEL:
        return LogMelBaseline()
    if kind == CUSTOM:
        return load_custom_encoder(path, **options)
    if kind in MODEL_TYPES:
        return load_other_encoder(path, random_init=random_init, **options)
    raise UserError(
        f"{path} is a {kind!r} model. Encoders can be {WHISPER}, {', '.join(MODEL_TYPES)}, or any "
        "class FILE.py:CLASS that takes audio [B, S] and returns frames [B, T, D]."
    )


def _encoder_kind(path: str) -> str:
    """Return `LOGMEL`, `CUSTOM` or a model type."""
    if path == LOGMEL:
        return LOGMEL
    if ".py:" in path:
        return CUSTOM
    run = is_run(Path(path)) or (Path(path) / "export" / "encoder").is_dir()
    return WHISPER if run else model_type(path) or WHISPER


def encoder_names(given: Sequence[str]) -> dict[str, str]:
    """Return the display name of each encoder: a short name, or the full one if it is ambiguous.

    Raises:
        UserError: the same encoder is given twice.
    """
    counts = Counter(name.rstrip("/") for name in given)
    for name, times in counts.items():
        if times > 1:
            raise UserError(f"{name} is named twice. Compare an encoder with other encoders.")
    short = {name: short_name(name) for name in given}
    ambiguous = {name for name, times in Counter(short.values()).items() if times > 1}
    return {
        name: name.rstrip("/") if label in ambiguous else label for name, label in short.items()
    }


def short_name(name: str) -> str:
    """Return the run's name for a run or its export, else the last part of the path.

    A padding mode in the given name is kept.
    """
    name, layers = split_layers(name)
    if layers:
        return f"{short_name(name)}#{layers}"
    if name == LOGMEL:
        return BASELINE_NAME
    given, padding = split_padding(name)
    path = Path(given.removeprefix(RANDOM_PREFIX)).absolute()  # the name of `.` is empty
    run = path.parent.parent if path.parent.name == "export" else path
    is_of_run = RunDirectory(run).config.is_file()
    short = run.resolve().parent.name if is_of_run else path.name.lstrip(".")
    short = f"{short}@{padding}" if padding else short
    return f"random {short}" if name.startswith(RANDOM_PREFIX) else short


def open_demo_models(
    name: str, against: str, padding: Padding | None, **options: Any
) -> DemoModels:
    """Load the models for the page of `whisper-aut demo`.

    Args:
        name: a run, which is loaded with its decoder, or an encoder.
        against: an encoder to compare with; for a run, the default is its pretrained checkpoint.
        padding: for encoders whose name has no padding mode. A run keeps that of its training.
        options: `device` and `dtype` of `load_encoder`.

    Raises:
        UserError: there is no run or encoder of that name.
    """

    def load(encoder: str) -> AudioEncoder:
        return load_encoder(encoder, padding=split_padding(encoder)[1] or padding, **options)

    path, module = Path(split_padding(name)[0]), None
    encoders: dict[str, AudioEncoder] = {}
    if against:
        encoders["before"] = load(against)
    if is_run(path):
        module = open_run(path, **options)
        if not against:
            _, base = find_checkpoint(path)
            base_options = {"revision": base.revision, "padding": padding, **options}
            encoders["before"] = load_encoder(base.path, **base_options)
    after = AudioEncoder(module.encoder).to(module.device) if module else load(name)
    encoders["after" if encoders else "encoder"] = after
    return DemoModels(encoders, module)


def load_tasks(
    names: Sequence[str], folder: Path, problems: Problems | None = None
) -> list[ProbeTask]:
    """Load probe tasks.

    `names` are tasks in `folder/probe_tasks`, suites in `folder/suites`, or paths. After
    `folder`, the package is searched. `problems` collects errors, which are raised otherwise.

    Raises:
        UserError: lists the problems of all tasks.
    """
    found, tasks = problems or Problems(), []
    with found.gather():
        for name in expand_suites(names, folder / "suites"):
            with found.gather():
                tasks.append(load_task(name, folder / "probe_tasks"))
    if problems is None:
        found.raise_if_any("The list of probe tasks")
    return tasks
