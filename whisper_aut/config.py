"""Loads YAML configs into typed dataclasses and reports all problems of a config at once.

A config may `extends` another one, and its `defaults` pick one file per group:
`defaults: {decoder: whisper}` puts `decoder/whisper.yaml` under the key `decoder`. On the command
line, `decoder=NAME` picks another file of the group and `decoder.key=value` changes one value. A
group file may have both too: its own values override the files that its `defaults` pick, and a list
of choices is merged. OmegaConf does the merging and interpolation.
"""

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from whisper_aut.data.annotation import DOMAINS, text_template
from whisper_aut.data.filters import parse_allowed_licence
from whisper_aut.errors import UserError, nearest

T = TypeVar("T")
MAX_EXTENDS = 8
LOCAL = Path("conf")  # relative to the working directory
SHIPPED = Path(__file__).parent / "conf"  # part of the package


def find_config(name: str | Path, near: Path = Path(), kind: str = "") -> Path:
    """Return the first file found for a config, or `near / name` if there is none.

    Args:
        name: a path, or a name such as `aut`. `.yaml` may be omitted.
        near: searched first, before `conf/` of the working directory and that of the package.
        kind: the subfolder of those two, such as `experiments` or `probe_tasks`.
    """
    given = Path(name)
    paths = [near / given, LOCAL / kind / given, SHIPPED / kind / given]
    if given.parts[:1] == LOCAL.parts:  # `conf/aut.yaml` also works outside a checkout
        paths.append(SHIPPED / given.relative_to(LOCAL))
    files = (file for path in paths for file in (path, path.with_name(f"{path.name}.yaml")))
    return next((file for file in files if file.is_file()), near / given)


def compose(path: str | Path, overrides: Sequence[str] = (), kind: str = "") -> dict[str, Any]:
    """Merge a config with its parents, groups and overrides, and resolve interpolations.

    Args:
        path: path or name of the config, see `find_config`.
        overrides: `key=value` or `group=choice`.
        kind: the subfolder of `conf/` for configs of this kind, such as `experiments`.

    Raises:
        UserError: a missing or invalid file, an unknown choice, or a malformed override.
    """
    path = find_config(path, kind=kind)
    layers = _layers(path, kind)
    shelves = [LOCAL / kind, SHIPPED / kind]
    groups = _groups(shelves if path.parent in shelves else [path.parent, *shelves])
    choices = {
        name: choice for layer in layers for name, choice in layer.pop("defaults", {}).items()
    }
    picked, values = _split_overrides(overrides, groups)
    choices |= picked
    merged = OmegaConf.create({})
    for group, choice in choices.items():
        merged[group] = _read_group(group, choice, groups, f"{kind}/{group}")
    try:
        result = OmegaConf.merge(merged, *layers, OmegaConf.from_dotlist(values))
        container = OmegaConf.to_container(result, resolve=True)
    except TypeError:  # OmegaConf raises it when a mapping is merged into a list
        raise UserError(
            f"{path}: an override reaches inside a list, or puts keys where there are none. "
            "Give the list whole, as in data.train=[…]."
        ) from None
    except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    return container  # pyright: ignore[reportReturnType]


def build(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a mapping, with recursive type checks.

    Args:
        schema: a dataclass of plain types, literals, dataclasses, lists, dicts and unions.
        values: the resolved mapping.
        where: the origin of the values, for the error message.

    Raises:
        UserError: lists all unknown keys (with the nearest known), wrong types and missing keys.
    """
    problems: list[str] = []
    result = _convert(schema, values, "", problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(
            f"{where} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{listed}"
        )
    return result


def _layers(path: Path, kind: str) -> list[DictConfig]:
    """Return the config and its parents, the most distant parent first."""
    layers: list[DictConfig] = []
    current: Path | None = path
    while current is not None:
        if len(layers) == MAX_EXTENDS:
            raise UserError(
                f"{path} extends more than {MAX_EXTENDS} configs in a row; is there a circle?"
            )
        layer = _read_yaml(current)
        parent = layer.pop("extends", None)
        layers.insert(0, layer)
        current = find_config(str(parent), current.parent, kind) if parent else None
    return layers


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        folder = path.parent if any(path.parent.glob("[!.]*.yaml")) else SHIPPED
        known = sorted(file.name for file in folder.glob("[!.]*.yaml"))
        raise UserError(
            f"There is no config {path}.{nearest(path.name, known) or nearest(path.stem, known)} "
            f"{folder} has: {', '.join(known)}."
        )
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values, not a list.")
    return loaded


Groups = Mapping[str, Mapping[str, Path]]


def _groups(folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Return group → choice → file. The first folder that has a choice wins."""
    groups: dict[str, dict[str, Path]] = {}
    for folder in reversed(folders):
        for file in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, {})[file.stem] = file
    return groups


def _read_group(group: str, choice: str, groups: Groups, kind: str) -> DictConfig:
    layers = _layers(_group_file(group, choice, groups), kind.lstrip("/"))
    values = cast(DictConfig, OmegaConf.merge(*layers))
    within = OmegaConf.create({})
    for inner, choices in values.pop("defaults", {}).items():
        names = [choices] if isinstance(choices, str) else list(choices)
        within[inner] = OmegaConf.merge(
            *(_read_yaml(_group_file(inner, name, groups)) for name in names)
        )
    return OmegaConf.merge(within, values)  # pyright: ignore[reportReturnType]


def _group_file(group: str, choice: str, groups: Groups) -> Path:
    if group not in groups:
        raise UserError(
            f"There is no config group {group!r}.{nearest(group, groups)} "
            f"Groups: {', '.join(sorted(groups))}."
        )
    if choice not in groups[group]:
        raise UserError(
            f"{group}={choice}: no such choice.{nearest(str(choice), groups[group])} "
            f"There are: {', '.join(groups[group])}."
        )
    return groups[group][choice]


def _split_overrides(overrides: Sequence[str], groups: Groups) -> tuple[dict[str, str], list[str]]:
    bad = [item for item in overrides if "=" not in item or item.startswith(("=", "-"))]
    if bad:
        raise UserError(f"Overrides are written key=value; not understood: {', '.join(bad)}.")
    pairs = [(item, *item.split("=", 1)) for item in overrides]
    picked = {key: value for _, key, value in pairs if key in groups}
    return picked, [item for item, key, _ in pairs if key not in groups]


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert_union([a for a in arguments if a is not type(None)], value, path, problems)
    if is_dataclass(kind):
        return _convert_dataclass(kind, value, path, problems)
    if origin is Literal:
        if value not in arguments:
            suggestion = nearest(str(value), map(str, arguments))
            problems.append(
                f"{path}: {value!r} is not one of {', '.join(map(repr, arguments))}.{suggestion}"
            )
        return value
    if origin in (list, Sequence, tuple):
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path}: expected a list, got {value!r}")
            return value
        return [
            _convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)
        ]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{path}: expected keys and values, got {value!r}")
            return value
        return {
            str(key): _convert(arguments[1], item, f"{path}.{key}", problems)
            for key, item in value.items()
        }
    return _convert_scalar(kind, value, path, problems)


def _convert_union(kinds: Sequence[Any], value: Any, path: str, problems: list[str]) -> Any:
    """Convert to the first type that fits. If none fits, report the problems of the last one."""
    for kind in kinds[:-1]:
        found: list[str] = []
        converted = _convert(kind, value, path, found)
        if not found:
            return converted
    return _convert(kinds[-1], value, path, problems)


def _convert_dataclass(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if is_dataclass(value) and isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected keys and values, got {value!r}")
        return None
    hints = get_type_hints(kind)
    known = {one.name: one for one in fields(kind)}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in known:
            hint = nearest(str(key), known) or f" Known here: {', '.join(known)}."
            problems.append(f"{prefix}{key}: unknown key.{hint}")
    converted = {}
    before = len(problems)
    for name, one in known.items():
        if name in value:
            converted[name] = _convert(hints[name], value[name], prefix + name, problems)
        elif one.default is MISSING and one.default_factory is MISSING:
            problems.append(f"{prefix}{name}: missing")
    return kind(**converted) if len(problems) == before else None


def _convert_scalar(kind: type, value: Any, path: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 parses 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and value is None:  # `key=` on a command line
        return ""
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a name or a class label that is a number
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        problems.append(f"{path}: expected {names.get(kind, kind.__name__)}, got {value!r}")
    return value


# DeepSpeed options that have their own key in our config.
SET_ELSEWHERE = {
    "train_batch_size": "data.batch_clips",
    "train_micro_batch_size_per_gpu": "data.batch_clips",
    "gradient_accumulation_steps": "trainer.accumulate",
    "gradient_clipping": "optim.gradient_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16.enabled": "hardware.precision",
    "fp16.enabled": "hardware.precision",
    "zero_optimization.stage": "strategy.name",
}


@dataclass
class ScratchSettings:
    """A new small Whisper. Its tokenizer is trained on the shards `texts`, or the training data."""

    d_model: int = 128
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 4
    num_mel_bins: int = 80
    vocabulary: int = 1500
    texts: list[str] = field(default_factory=list)


@dataclass
class ModelSettings:
    """The model to start from. Exactly one of `path`, `scratch` and `after` is given.

    Attributes:
        path: a hub id or a directory in Hugging Face's Whisper format.
        revision: branch, tag or commit on the hub; empty for the default.
        scratch: a new small model.
        after: a config whose exported model is the start. It is trained first if necessary.
        random_init: keep the architecture and tokenizer of the start, with new random weights.
        padding: `none` encodes each clip at its own length, `30s` pads it as Hugging Face does.
        gradient_checkpointing: save most of the activation memory for a third more compute.
        freeze_encoder: train the decoder only.
        compile: compile the encoder's layers with `torch.compile`, which needs a C++ compiler.
    """

    path: str = ""
    revision: str = ""
    scratch: ScratchSettings | None = None
    after: str = ""
    random_init: bool = False
    padding: Literal["none", "30s"] = "none"
    gradient_checkpointing: bool = False
    freeze_encoder: bool = False
    compile: bool = False


@dataclass
class DemoSettings:
    """The synthetic corpus of `whisper-aut data demo`. `scale` is relative to the default size."""

    out: str
    seed: int = 0
    scale: float = 1.0


@dataclass
class ManifestSettings:
    """The options of one `whisper-aut data build`, see `corpora.manifest.ManifestSpec`."""

    manifest: str
    out: str
    audio_root: str = ""
    audio: str = ""
    text: str = ""
    label: str = ""
    offset: str = ""
    duration: str = ""
    domain: str = ""
    task: str = ""
    language: str = ""
    source: str = ""
    licence: str = ""
    where: dict[str, list[str]] = field(default_factory=dict)
    split_by: str = ""


@dataclass
class CorporaSettings:
    """Corpora to build before training, unless they already exist."""

    demo: DemoSettings | None = None
    manifests: list[ManifestSettings] = field(default_factory=list)


@dataclass
class SourceSettings:
    """A folder or URL of shards, its domain, and its sampling weight among sources of that domain.

    Weights are positive. All sources of a domain have one, or none has and each counts by its
    clips. `text` is the JSON field of the text, or a template over fields such as
    `{title}, played by {artist}`. By default the usual field names are tried.
    """

    path: str
    domain: Literal["speech", "sound", "music"]
    weight: float | None = None
    licence: str = ""
    text: str = ""


@dataclass
class AugmentSettings:
    """Augmentation of training clips. Validation clips are never augmented.

    Attributes:
        spec: apply SpecAugment to the log-mel.
        gain_db: the largest random gain, in either direction.
        speeds: speed factors, one drawn per clip, such as [0.9, 1.0, 1.1].
        noise: folders or URLs of shards, with sample tables, whose clips are mixed in as noise.
        noise_probability: fraction of the training clips that get noise.
        snr_db: lowest and highest signal-to-noise ratio.
    """

    spec: bool = True
    gain_db: float = 0.0
    speeds: list[float] = field(default_factory=lambda: [1.0])
    noise: list[str] = field(default_factory=list)
    noise_probability: float = 0.5
    snr_db: list[float] = field(default_factory=lambda: [5.0, 30.0])


@dataclass
class LicenceSettings:
    """Allowed licences of clips by SPDX id: `CC-BY-4.0`, or `CC-BY` for all its versions.

    An empty list allows all clips. Otherwise, clips with an unknown licence are excluded too. A
    clip without a licence of its own has that of its source.
    """

    allow: list[str] = field(default_factory=list)


@dataclass
class DataSettings:
    """The data of a run.

    Attributes:
        root: folder of the user's own corpora or shards, for use in configs.
        shards: folder for the shards that are built.
        train, valid: the sources.
        mode: `mixture` samples endlessly by weight; `epochs` reads each clip once per epoch.
        domains: weight of each domain among the training clips; any positive sum.
        temperature: weights are raised to 1 / temperature; above 1 makes them more even.
        batch_clips: clips per rank and micro-batch.
        batch_seconds: instead of `batch_clips`, the most seconds of audio per rank and micro-batch;
            needs sample tables (`whisper-aut data index`).
        samples_per_epoch: clips per epoch over all ranks; null for the size of the training data.
        valid_clips: use only the first N clips of each validation source; null for all.
        window: clips per shuffle window of a source; also the most clips read again on resume.
        workers: decoding processes per rank.
        features: compute log-mels in the workers or on the training device.
        min_seconds, max_seconds: shorter and longer clips are skipped.
        exclude: list of clips to exclude from training, as `whisper-aut data audit` writes it.
        licences: the licences that training clips may have.
        max_skipped_fraction: limit per source, over all ranks and resumes; above it the run stops.
        retries: attempts after a failed read of a remote shard, with pauses that double.
        timeout_seconds: a remote read fails after this long without data.
        augment: augmentation of training clips.
    """

    root: str = "data"
    shards: str = "data"
    train: list[SourceSettings] = field(default_factory=list)
    valid: list[SourceSettings] = field(default_factory=list)
    mode: Literal["mixture", "epochs"] = "mixture"
    domains: dict[str, float] = field(
        default_factory=lambda: {"speech": 0.8, "sound": 0.1, "music": 0.1}
    )
    temperature: float = 1.0
    batch_clips: int = 16
    batch_seconds: float | None = None
    samples_per_epoch: int | None = None
    valid_clips: int | None = None
    window: int = 1000
    workers: int = 2
    features: Literal["workers", "device"] = "workers"
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    exclude: str = ""
    licences: LicenceSettings = field(default_factory=LicenceSettings)
    max_skipped_fraction: float = 0.05
    retries: int = 6
    timeout_seconds: float = 30.0
    augment: AugmentSettings = field(default_factory=AugmentSettings)


@dataclass
class OptimSettings:
    """AdamW and its schedule. Steps are optimizer steps.

    Attributes:
        lr: learning rate of decoder or adapter, and of the encoder if `encoder_lr` is null.
        encoder_after_step: train only the decoder or adapter before this step.
        layer_decay: each encoder layer has this factor times the rate of the layer above.
    """

    lr: float = 1e-5
    encoder_lr: float | None = None
    encoder_after_step: int = 0
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    warmup_steps: int = 500
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_fraction: float = 0.0
    layer_decay: float = 1.0
    gradient_clip: float = 1.0


@dataclass
class TrainerSettings:
    """Training length, logging, checkpoints and stopping. Steps are optimizer steps.

    Attributes:
        keep_checkpoints: newest checkpoints to keep, plus the best one by validation loss.
        async_checkpoints: write in the background, from a copy of each rank's part in main memory.
        deterministic: raise an error for nondeterministic operations; slower on GPUs.
        max_bad_steps: skip steps without a finite gradient; stop after this many in a row.
        spike_factor: robust deviations above the running median that make a loss a spike; 0: off.
        on_spike: warn, or return to the last checkpoint and skip the data since then.
    """

    max_epochs: int = 1
    max_steps: int | None = None
    accumulate: int = 1
    valid_every_steps: int = 1000
    checkpoint_every_steps: int = 1000
    log_every_steps: int = 25
    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] = field(
        default_factory=lambda: ["csv", "tensorboard"]
    )
    keep_checkpoints: int = 2
    async_checkpoints: bool = False
    generate_clips: int = 4
    generate_tokens: int = 64
    deterministic: bool = False
    max_bad_steps: int = 25
    spike_factor: float = 0.0
    on_spike: Literal["warn", "rewind"] = "warn"


@dataclass
class HardwareSettings:
    """Devices and precision.

    Attributes:
        accelerator, devices, nodes: as in Lightning; devices per node.
        precision: as in Lightning. `auto` is bf16-mixed on a GPU that supports bfloat16, else
            32-true. Trained weights are always float32; DeepSpeed computes with 16-bit copies.
        threads: CPU threads for training on a CPU; 0 for all.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    nodes: int = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    threads: int = 0


@dataclass
class StrategySettings:
    """The distributed strategy.

    Attributes:
        name: one device or DDP (`auto`), DDP, or a ZeRO stage of DeepSpeed; `_offload` moves the
            optimizer state to the CPU.
        timeout_minutes: how long a rank waits for the others before the job ends.
        deepspeed: options of DeepSpeed's own config, which override those of `name`, such as
            `{zero_optimization: {reduce_bucket_size: 50000000}}`.
    """

    name: Literal[
        "auto",
        "ddp",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_3",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    ] = "auto"
    timeout_minutes: float = 30.0
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass
class DuringSettings:
    """Probes during training, for monitoring. Off without tasks.

    Attributes:
        tasks: names or paths of small tasks, which are embedded again for each measurement.
        every_steps: optimizer steps between measurements; the first is before training.
        kind: the kind of probe.
        guarded_domain: the domain to monitor for forgetting.
        max_drop: how far (0 to 1) its mean score may fall below the first one.
        on_drop: what to do when it falls further.
    """

    tasks: list[str] = field(default_factory=list)
    every_steps: int = 1000
    kind: str = "knn"
    guarded_domain: Literal["speech", "sound", "music"] = "speech"
    max_drop: float = 0.05
    on_drop: Literal["warn", "stop"] = "warn"


@dataclass
class ProbeSettings:
    """The probes after and during training.

    Attributes:
        root: the folder that replaces `{root}` in the tasks.
        seeds: number of seeds for probes with random initialization; others are fitted once.
        final_fit: fit the tested probe on the training split, or on training and validation.
        random_encoder, logmel_baseline: also probe random weights, and log-mel statistics.
    """

    root: str = "data"
    tasks: list[str] = field(default_factory=list)
    seeds: int = 3
    final_fit: Literal["train", "train+valid"] = "train"
    random_encoder: bool = True
    logmel_baseline: bool = True
    during: DuringSettings = field(default_factory=DuringSettings)


@dataclass
class Settings:
    """The config of one run."""

    name: str
    model: ModelSettings
    decoder: dict[str, Any]
    data: DataSettings
    seed: int = 0
    runs: str = "runs"
    corpora: CorporaSettings = field(default_factory=CorporaSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    export: list[Literal["encoder", "whisper"]] = field(default_factory=lambda: ["encoder"])
    probe: ProbeSettings = field(default_factory=ProbeSettings)


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Load a config with overrides, and check all that needs neither data nor weights.

    Raises:
        UserError: lists all problems.
    """
    settings = build(Settings, compose(path, overrides), str(path))
    problems = [
        *_model_problems(settings.model),
        *_data_problems(settings.data),
        *_weight_problems(settings.data.train),
        *_text_problems([*settings.data.train, *settings.data.valid]),
        *_number_problems(settings),
        *_not_finite(asdict(settings)),
    ]
    problems += _logger_problems(settings.trainer.loggers)
    problems += _strategy_problems(settings.strategy)
    if "name" not in settings.decoder:
        problems.append("decoder.name: missing; pick a decoder with decoder=whisper")
    if problems:
        raise UserError(
            f"{path} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return settings


def dump_settings(settings: Settings) -> str:
    """Return the resolved config as YAML that `load_settings` can read."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)


def _model_problems(model: ModelSettings) -> list[str]:
    given = [name for name in ("path", "scratch", "after") if getattr(model, name)]
    if len(given) != 1:
        return [
            f"model: give exactly one of path, scratch, after; given: {', '.join(given) or 'none'}"
        ]
    return []


def _data_problems(data: DataSettings) -> list[str]:
    problems = [
        f"data.domains.{name}: not a domain; there are {', '.join(DOMAINS)}"
        for name in data.domains
        if name not in DOMAINS
    ]
    problems += [
        f"data.domains.{name}: {share} is negative"
        for name, share in data.domains.items()
        if share < 0
    ]
    for entry in data.licences.allow:
        try:
            parse_allowed_licence(entry)
        except UserError as error:
            problems.append(str(error))
    if not sum(data.domains.values()) > 0:
        problems.append("data.domains: the shares sum to nothing")
    served = {source.domain for source in data.train}
    problems += [
        f"data.domains.{name}: has a share but no source in data.train"
        for name, share in data.domains.items()
        if share > 0 and name not in served and name in DOMAINS
    ]
    if not 0 < data.min_seconds <= data.max_seconds <= 30:
        problems.append(
            "data: need 0 < min_seconds <= max_seconds <= 30, "
            f"got {data.min_seconds} and {data.max_seconds}"
        )
    if data.batch_seconds is not None and data.batch_seconds < data.max_seconds:
        problems.append(
            f"data.batch_seconds: {data.batch_seconds:g} s hold no clip of data.max_seconds, "
            f"{data.max_seconds:g} s"
        )
    augment = data.augment
    if not augment.speeds or not all(0.5 <= speed <= 2 for speed in augment.speeds):
        problems.append(f"data.augment.speeds: {augment.speeds} are not factors between 0.5 and 2")
    if len(augment.snr_db) != 2 or augment.snr_db[0] > augment.snr_db[1]:
        problems.append(f"data.augment.snr_db: {augment.snr_db} is not [lowest, highest]")
    if augment.gain_db < 0 or not 0 <= augment.noise_probability <= 1:
        problems.append(
            "data.augment: gain_db must not be negative, and noise_probability lies between 0 and 1"
        )
    if data.mode == "epochs" and data.samples_per_epoch is not None:
        problems.append(
            "data.samples_per_epoch: with data.mode=epochs an epoch is every clip once; leave it "
            "null"
        )
    if data.temperature <= 0 or data.timeout_seconds <= 0:
        problems.append("data: temperature and timeout_seconds must be positive")
    return problems


def _text_problems(sources: Sequence[SourceSettings]) -> list[str]:
    return [
        f"data: the text {source.text!r} of {source.path} is no template: {fault}. "
        "Write {field} or {field:words}"
        for source in sources
        if source.text and (fault := text_template(source.text).fault)
    ]


def _weight_problems(sources: Sequence[SourceSettings]) -> list[str]:
    problems = [
        f"data.train: {source.path} has the weight {source.weight:g}; weights must be positive"
        for source in sources
        if source.weight is not None and source.weight <= 0
    ]
    for domain in DOMAINS:
        own = [source for source in sources if source.domain == domain]
        without = [source.path for source in own if source.weight is None]
        if 0 < len(without) < len(own):
            problems.append(
                f"data.train: some {domain} sources have a weight, but {', '.join(without)} "
                f"{'has' if len(without) == 1 else 'have'} none. Give one to every source of a "
                "domain, or to none: then each counts by its clips"
            )
    return problems


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Yield a problem for each NaN or infinity, which comparisons with a bound may accept."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: {value} is not a finite number"
    children = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
    for key, child in children:
        yield from _not_finite(child, f"{name}.{key}" if name else str(key))


def _strategy_problems(strategy: StrategySettings) -> list[str]:
    if strategy.deepspeed and not strategy.name.startswith("deepspeed"):
        return [f"strategy.deepspeed: strategy.name is {strategy.name!r}, which is not DeepSpeed"]
    problems = []
    for name, own in SET_ELSEWHERE.items():
        value: Any = strategy.deepspeed
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            problems.append(f"strategy.deepspeed.{name}: set {own} instead")
    zero = strategy.deepspeed.get("zero_optimization")
    if isinstance(zero, dict) and "offload_optimizer" in zero and "offload" not in strategy.name:
        problems.append(
            "strategy.deepspeed.zero_optimization.offload_optimizer: needs a strategy.name that "
            "ends in _offload, which picks the optimizer for it"
        )
    return problems


def _logger_problems(names: Sequence[str]) -> list[str]:
    problems = (
        []
        if "csv" in names
        else ["trainer.loggers: csv must be among them; reports are drawn from it"]
    )
    problems += [
        f"trainer.loggers: {name} is not installed; pip install 'whisper-aut[{name}]'"
        for name in ("wandb", "mlflow")
        if name in names and find_spec(name) is None
    ]
    return problems


def _number_problems(settings: Settings) -> list[str]:
    at_least = {
        "data.batch_clips": (settings.data.batch_clips, 1),
        "data.window": (settings.data.window, 1),
        "data.workers": (settings.data.workers, 0),
        "data.retries": (settings.data.retries, 0),
        "trainer.accumulate": (settings.trainer.accumulate, 1),
        "trainer.max_epochs": (settings.trainer.max_epochs, 1),
        "trainer.valid_every_steps": (settings.trainer.valid_every_steps, 1),
        "trainer.checkpoint_every_steps": (settings.trainer.checkpoint_every_steps, 1),
        "trainer.log_every_steps": (settings.trainer.log_every_steps, 1),
        "trainer.keep_checkpoints": (settings.trainer.keep_checkpoints, 1),
        "trainer.max_bad_steps": (settings.trainer.max_bad_steps, 1),
        "trainer.spike_factor": (settings.trainer.spike_factor, 0),
        "optim.encoder_after_step": (settings.optim.encoder_after_step, 0),
        "hardware.nodes": (settings.hardware.nodes, 1),
        "probe.seeds": (settings.probe.seeds, 1),
        "probe.during.every_steps": (settings.probe.during.every_steps, 1),
        "probe.during.max_drop": (settings.probe.during.max_drop, 0),
        "trainer.generate_clips": (settings.trainer.generate_clips, 0),
        "trainer.generate_tokens": (settings.trainer.generate_tokens, 1),
        "hardware.threads": (settings.hardware.threads, 0),
        "seed": (settings.seed, 0),
    }
    problems = [
        f"{name}: {value} is below {least}"
        for name, (value, least) in at_least.items()
        if value < least
    ]
    if settings.data.batch_seconds is not None and settings.model.padding == "30s":
        problems.append(
            "data.batch_seconds: with model.padding=30s every clip costs 30 s; "
            "give data.batch_clips"
        )
    steps, devices, betas = (
        settings.trainer.max_steps,
        settings.hardware.devices,
        settings.optim.betas,
    )
    if steps is not None and steps < 1:
        problems.append(
            f"trainer.max_steps: {steps} is below 1; null trains all of trainer.max_epochs"
        )
    if devices != "auto" and (not isinstance(devices, int) or devices < 1):
        problems.append(
            f"hardware.devices: {devices!r} is neither auto nor a whole number from 1 up"
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        problems.append(f"optim.betas: {betas} are not two numbers from 0 to below 1")
    if not 0 <= settings.data.max_skipped_fraction <= 1:
        problems.append(
            f"data.max_skipped_fraction: {settings.data.max_skipped_fraction} "
            "is not a fraction from 0 to 1"
        )
    if settings.name in ("", "..") or Path(settings.name).name != settings.name:
        problems.append(
            f"name: {settings.name!r} cannot be the name of a folder in {settings.runs}"
        )
    if settings.corpora.demo and settings.corpora.demo.scale <= 0:
        problems.append(f"corpora.demo.scale: {settings.corpora.demo.scale} is not positive")
    if settings.optim.lr <= 0:
        problems.append(f"optim.lr: {settings.optim.lr} is not positive")
    return problems
