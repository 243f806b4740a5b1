"""The typed config of a run, and how the YAML files of `conf/` become one.

Hydra picks one file per group (`defaults` lists, `decoder=causal_lm`), OmegaConf merges dotted
overrides (`optim.lr=1e-4`), and pydantic checks types, ranges and unknown keys. All problems of a
config are reported in one error.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass

from whisper_aut.corpora.manifest import ManifestSpec
from whisper_aut.data.annotation import DOMAINS
from whisper_aut.data.settings import DataSettings, Domain, Fraction
from whisper_aut.data.targets import LossSettings
from whisper_aut.errors import UserError, nearest
from whisper_aut.schema import STRICT, Text, build, check_yaml

LOCAL_CONF = Path("conf")  # relative to the working directory
PACKAGE_CONF = Path(__file__).parent / "conf"


def find_config(name: str | Path, near: Path = Path(), kind: str = "") -> Path:
    """Return the first file found for a config, or `near / name` if there is none.

    Args:
        name: a path, or a name such as `aut`. `.yaml` may be omitted.
        near: searched first, before `conf/` of the working directory and that of the package.
        kind: the subfolder of those two, such as `experiments` or `probe_tasks`.
    """
    given = Path(name)
    paths = [near / given, LOCAL_CONF / kind / given, PACKAGE_CONF / kind / given]
    if given.parts[:1] == LOCAL_CONF.parts:  # `conf/aut.yaml` also works outside a checkout
        paths.append(PACKAGE_CONF / given.relative_to(LOCAL_CONF))
    files = (file for path in paths for file in (path, path.parent / f"{path.name}.yaml"))
    return next((file for file in files if file.is_file()), near / given)


def compose(path: str | Path, overrides: Sequence[str] = (), kind: str = "") -> dict[str, Any]:
    """Merge a config with its `defaults` list and the overrides, and resolve interpolations.

    Overrides are `key=value` or `group=choice`. For `path` and `kind`, see `find_config`.

    Raises:
        UserError: a missing or invalid file, an unknown choice, or a malformed override.
    """
    path = find_config(path, kind=kind)
    if not path.is_file():
        found = (path.parent, LOCAL_CONF / kind, PACKAGE_CONF / kind)
        known = sorted({file.stem for folder in found for file in folder.glob("[!.]*.yaml")})
        hint = nearest(path.name.removesuffix(".yaml"), known)
        raise UserError(f"There is no config {path}.{hint} Known configs: {', '.join(known)}.")
    if path.suffix != ".yaml":
        raise UserError(f"{path}: the name of a config must end in .yaml.")
    folders = _search_path(path, kind)
    choices, values = _split_overrides(overrides, folders)
    try:
        check_yaml(path.read_text(encoding="utf-8"))
        config = _compose_groups(path, folders, choices)
        # Hydra's override grammar cannot take all values (paths with `=`, commas or spaces), and
        # stops at the first unknown key.
        OmegaConf.set_struct(config, False)
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(values))
        return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore[reportReturnType]
    except HydraException as error:
        message = str(error) or str(error.__cause__)
        reason = " ".join(message.partition("Config search path")[0].split())
    except RecursionError:
        reason = "it is nested too deeply, or its `defaults` list leads back to the config itself."
    except TypeError:  # OmegaConf raises it when a mapping is merged into a list
        reason = (
            "an override reaches inside a list, or puts keys where there are none. "
            "Give the list whole, as in data.train=[…]."
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = f"not readable as YAML: {error}"
    except (OmegaConfBaseException, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(f"{path}: {reason}")


class ConfFolders(SearchPathPlugin):
    """Lets Hydra find configs and groups in `folders`, the first one first."""

    folders: ClassVar[Sequence[Path]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.folders):
            search_path.prepend("whisper_aut", f"file://{folder}")


Plugins.instance().register(ConfFolders)


def _compose_groups(path: Path, folders: Sequence[Path], choices: Mapping[str, str]) -> Any:
    name = path.name.removesuffix(".yaml")
    ConfFolders.folders = folders
    try:
        with (
            warnings.catch_warnings(),
            hydra.initialize_config_dir(str(path.parent.resolve()), version_base="1.3"),
        ):
            # Without `_self_`, a config overrides its defaults, as users expect.
            warnings.filterwarnings("ignore", message=".*Defaults list is missing `_self_`")
            picks = [f"{key}={choice}" for key, choice in choices.items()]
            try:
                return hydra.compose(name, picks)
            except ConfigCompositionException:  # groups without a default are added with `+`
                known = hydra.compose(name, return_hydra_config=True).hydra.runtime.choices
                signs = ["" if key in known else "+" for key in choices]
                return hydra.compose(name, [f"{a}{b}" for a, b in zip(signs, picks, strict=True)])
    finally:
        ConfFolders.folders = ()  # for other users of Hydra in this process


def _search_path(path: Path, kind: str) -> list[Path]:
    """Return the folders in which configs and groups are found, the first one first."""
    folders = [LOCAL_CONF / kind, PACKAGE_CONF / kind]
    found = next((folder / path.name for folder in folders if (folder / path.name).is_file()), None)
    if not found or not found.samefile(path):
        folders.insert(0, path.parent)
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def _split_overrides(
    overrides: Sequence[str], folders: Sequence[Path]
) -> tuple[dict[str, str], list[str]]:
    """Split overrides into choices of groups, which are checked, and dotted keys with values."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            groups.setdefault(file.parent.name, set()).add(file.stem)
    choices, values = {}, []
    malformed = [item for item in overrides if "=" not in item or item.startswith(("=", "-"))]
    if malformed:
        raise UserError(f"Overrides are written key=value, not {', '.join(malformed)}.")
    for item in overrides:
        key, value = item.split("=", 1)
        if key not in groups:
            values.append(item)
        elif value not in groups[key]:
            raise UserError(
                f"{key}={value}: there is no such choice.{nearest(value, groups[key])} "
                f"Choices: {', '.join(sorted(groups[key]))}."
            )
        else:
            choices[key] = value
    return choices, values


def _check_folder_name(name: str) -> str:
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{name!r} cannot be the name of a folder")
    return name


def _check_finite(options: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(options, allow_nan=False)
    except ValueError:
        raise ValueError("all numbers must be finite") from None
    return options


def _check_loggers(names: list[str]) -> list[str]:
    if "csv" not in names:
        raise ValueError("must contain csv, from which reports are drawn")
    return names


FolderName = Annotated[Text, AfterValidator(_check_folder_name)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Options = Annotated[dict[str, Any], AfterValidator(_check_finite)]  # checked elsewhere
Logger = Literal["csv", "tensorboard", "wandb", "mlflow"]


@dataclass(config=STRICT)
class ScratchSettings:
    """A new small Whisper. Its tokenizer is trained on the shards `texts`, or the training data."""

    d_model: PositiveInt = 128
    encoder_layers: PositiveInt = 4
    decoder_layers: PositiveInt = 4
    heads: PositiveInt = 4
    num_mel_bins: PositiveInt = 80
    vocabulary: PositiveInt = 1500
    texts: list[Text] = field(default_factory=list)


@dataclass(config=STRICT)
class ModelSettings:
    """The pretrained model. Exactly one of `path`, `scratch` and `after` is given.

    Attributes:
        path: a hub id (with its `revision`) or a directory in Hugging Face's Whisper format.
        after: a config whose exported model is used. It is trained first if necessary.
        random_init: replace the weights by random ones.
        padding: `none` encodes each clip at its own length, `30s` pads it as Hugging Face does.
        pad_to_30s: probability that a training clip is padded to 30 s although `padding` is `none`.
            The encoder then serves both modes.
        gradient_checkpointing: save most of the activation memory for a third more compute. `auto`
            does so on a GPU on which the run would not fit otherwise, by the forecast of `plan`.
        lora_rank: train low-rank updates of the linear layers in place of the encoder's weights; 0
            for none. They are merged into the weights of exports.
        lora_alpha: their scale is `lora_alpha / lora_rank`.
        interpolate: fraction of the trained weights in exports, see `export.hf.interpolated`; the
            rest are pretrained weights. Validation sees the trained weights. To change it after
            training, give `whisper-aut export --interpolate`: another value here is another run.
        compile: compile the layers of encoder and decoder with `torch.compile`, which needs a C++
            compiler.
    """

    path: Text = ""
    revision: Text = ""
    scratch: ScratchSettings | None = None
    after: Text = ""
    random_init: bool = False
    padding: Literal["none", "30s"] = "none"
    pad_to_30s: Fraction = 0.0
    gradient_checkpointing: bool | Literal["auto"] = False
    freeze_encoder: bool = False
    lora_rank: NonNegativeInt = 0
    lora_alpha: PositiveInt = 32
    interpolate: Fraction = 1.0
    compile: bool = False

    @property
    def starts_at_random(self) -> bool:
        return self.random_init or self.scratch is not None

    @model_validator(mode="after")
    def check_source(self) -> Self:
        given = [name for name in ("path", "scratch", "after") if getattr(self, name)]
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise ValueError(f"give exactly one of path, scratch, after; given: {names}")
        if self.pad_to_30s and self.padding == "30s":
            raise ValueError("pad_to_30s: needs padding=none; with 30s, all clips are padded")
        if self.interpolate != 1 and self.starts_at_random:
            raise ValueError("interpolate: a model that starts from random weights has no others")
        if self.lora_rank and (self.freeze_encoder or self.compile):
            raise ValueError("lora_rank: does not go with freeze_encoder or compile")
        return self


@dataclass(config=STRICT)
class DistillationSettings:
    """Keep the encoder close to the pretrained one, see `models.distillation`.

    Attributes:
        weight: of the distance, relative to the decoder's loss per token; 0 for none.
        layers: the hidden states to compare; empty for the encoder's output.
        domains: the domains whose clips are compared.
    """

    weight: NonNegativeFloat = 0.0
    layers: list[NonNegativeInt] = field(default_factory=list)
    domains: list[Domain] = field(default_factory=lambda: ["speech"])


@dataclass(config=STRICT)
class DemoSettings:
    """The synthetic corpus of `whisper-aut data demo`. `scale` is relative to the default size."""

    out: Text
    seed: NonNegativeInt = 0
    scale: PositiveFloat = 1.0


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ManifestSettings(ManifestSpec):
    """The options of one `whisper-aut data build`, and the folder `out` for its shards."""

    out: Text


@dataclass(config=STRICT)
class CorporaSettings:
    """Corpora to build before training, unless they already exist."""

    demo: DemoSettings | None = None
    manifests: list[ManifestSettings] = field(default_factory=list)


@dataclass(config=STRICT)
class OptimSettings:
    """AdamW and its schedule. Steps are optimizer steps.

    Attributes:
        lr: learning rate of decoder or adapter, and of the encoder if `encoder_lr` is null.
        encoder_after_step: train only the decoder or adapter before this step.
        final_lr_fraction: the learning rate at the end, as a fraction of `lr`.
        ema_decay: keep an exponential moving average of the weights with this decay per step, for
            validation, probes and exports; 0 for none.
        layer_decay: each encoder layer has this factor times the rate of the layer above, averaged
            over three bands of layers.
    """

    lr: PositiveFloat = 1e-5
    encoder_lr: NonNegativeFloat | None = None
    encoder_after_step: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    warmup_steps: NonNegativeInt = 500
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_fraction: Fraction = 0.0
    ema_decay: Beta = 0.0
    layer_decay: PositiveFloat = 1.0
    gradient_clip: NonNegativeFloat = 1.0


@dataclass(config=STRICT)
class TrainerSettings:
    """Training length, logging, checkpoints and stopping. Steps are optimizer steps.

    Attributes:
        accumulate: micro-batches per optimizer step.
        keep_checkpoints: newest checkpoints to keep, plus the best one by validation loss.
        async_checkpoints: write in the background, from a copy of each rank's part in main memory.
        generate_clips, generate_tokens: texts per domain and task at each validation; their length.
        deterministic: raise an error for nondeterministic operations; slower on GPUs.
        profile_after: record three micro-batches with PyTorch's profiler after this many; 0: none.
            Traces and a table of the slowest operations are in the folder `profile` of the run.
        max_bad_steps: skip steps without a finite gradient; stop after this many in a row.
        spike_factor: robust deviations above the running median that make a loss a spike; 0: off.
        on_spike: warn, or return to the last checkpoint and skip the data since then.
    """

    max_epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    accumulate: PositiveInt = 1
    valid_every_steps: PositiveInt = 1000
    checkpoint_every_steps: PositiveInt = 1000
    log_every_steps: PositiveInt = 25
    loggers: Annotated[list[Logger], AfterValidator(_check_loggers)] = field(
        default_factory=lambda: ["csv", "tensorboard"]
    )
    keep_checkpoints: PositiveInt = 2
    async_checkpoints: bool = False
    generate_clips: NonNegativeInt = 4
    generate_tokens: PositiveInt = 64
    deterministic: bool = False
    profile_after: NonNegativeInt = 0
    max_bad_steps: PositiveInt = 25
    spike_factor: NonNegativeFloat = 0.0
    on_spike: Literal["warn", "rewind"] = "warn"


@dataclass(config=STRICT)
class HardwareSettings:
    """Devices and precision.

    Attributes:
        accelerator, devices, nodes: as in Lightning; devices per node.
        precision: as in Lightning. `auto` is bf16-mixed on a GPU that supports bfloat16, else
            32-true. Trained weights are always float32; DeepSpeed computes with 16-bit copies.
        threads: CPU threads for training on a CPU; 0 for all.
    """

    accelerator: Text = "auto"
    devices: PositiveInt | Literal["auto"] = "auto"
    nodes: PositiveInt = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    threads: NonNegativeInt = 0


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


@dataclass(config=STRICT)
class StrategySettings:
    """The distributed strategy.

    Attributes:
        name: one device or DDP (`auto`), DDP, PyTorch's FSDP2 (`fsdp`), or a ZeRO stage of
            DeepSpeed; `_offload` moves the optimizer state to the CPU.
        timeout_minutes: how long a rank waits for the others before the job ends.
        deepspeed: options of DeepSpeed's own config, which override those of `name`, such as
            `{zero_optimization: {reduce_bucket_size: 50000000}}`.
    """

    name: Literal[
        "auto",
        "ddp",
        "fsdp",
        "deepspeed_stage_1",
        "deepspeed_stage_2",
        "deepspeed_stage_3",
        "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    ] = "auto"
    timeout_minutes: PositiveFloat = 30.0
    deepspeed: Options = field(default_factory=dict)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; 0 without DeepSpeed."""
        stage = self.name.removeprefix("deepspeed_stage_")[0]
        return int(stage) if stage.isdecimal() else 0

    @property
    def offload(self) -> bool:
        """Whether the optimizer state is in host memory."""
        return self.name.endswith("_offload")

    @model_validator(mode="after")
    def check_deepspeed(self) -> Self:
        if self.deepspeed and not self.name.startswith("deepspeed"):
            raise ValueError(f"deepspeed: strategy.name is {self.name!r}, which is not DeepSpeed")
        problems = [
            f"deepspeed.{name}: set {own} instead"
            for name, own in SET_ELSEWHERE.items()
            if OmegaConf.select(OmegaConf.create(self.deepspeed), name) is not None
        ]
        zero = self.deepspeed.get("zero_optimization")
        if isinstance(zero, dict) and "offload_optimizer" in zero and "offload" not in self.name:
            problems.append(
                "deepspeed.zero_optimization.offload_optimizer: needs a strategy.name that ends in "
                "_offload, which picks the optimizer for it"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


@dataclass(config=STRICT)
class DuringSettings:
    """Probes during training, for monitoring. Off without tasks.

    Attributes:
        tasks: names or paths of small tasks, which are embedded again for each measurement.
        every_steps: optimizer steps between measurements; the first is before training.
        guarded_domain: the domain to monitor for forgetting.
        max_drop: how far (0 to 1) its mean score may fall below the first one.
    """

    tasks: list[Text] = field(default_factory=list)
    every_steps: PositiveInt = 1000
    kind: Text = "knn"
    guarded_domain: Domain = "speech"
    max_drop: NonNegativeFloat = 0.05
    on_drop: Literal["warn", "stop"] = "warn"


@dataclass(config=STRICT)
class ProbeSettings:
    """The probes after and during training.

    Attributes:
        root: the folder that replaces `{root}` in the tasks.
        seeds: number of seeds for probes with random initialization; others are fitted once.
        final_fit: fit the tested probe on the training split, or on training and validation.
        random_encoder, logmel_baseline: also probe random weights, and log-mel statistics.
    """

    root: Text = "data"
    tasks: list[Text] = field(default_factory=list)
    seeds: PositiveInt = 3
    final_fit: Literal["train", "train+valid"] = "train"
    random_encoder: bool = True
    logmel_baseline: bool = True
    during: DuringSettings = field(default_factory=DuringSettings)


@dataclass(config=STRICT)
class Settings:
    """The config of one run."""

    name: FolderName
    model: ModelSettings
    decoder: Options
    data: DataSettings
    seed: NonNegativeInt = 0
    runs: Text = "runs"
    corpora: CorporaSettings = field(default_factory=CorporaSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    export: list[Literal["encoder", "whisper"]] = field(default_factory=lambda: ["encoder"])
    probe: ProbeSettings = field(default_factory=ProbeSettings)

    @model_validator(mode="after")
    def check_groups(self) -> Self:
        """Check what settings of different groups need of each other, such as known domains."""
        decoder, known = self.decoder, list(dict.fromkeys([*DOMAINS, *self.data.domains]))
        used = {"distillation.domains": self.distillation.domains}
        used["loss.domains"] = list(self.loss.domains)
        for name in ("prompts", "supervise_prompt"):
            if isinstance(named := decoder.get(name), (dict, list)):
                used[f"decoder.{name}"] = list(named)
        if isinstance(tasks := decoder.get("instructions"), dict):
            for name, task in tasks.items():
                if isinstance(task, dict) and isinstance(found := task.get("domains"), list):
                    used[f"decoder.instructions.{name}.domains"] = found
        problems = [
            f"{path}: {domain!r} is not one of {', '.join(known)}; data.domains names others."
            f"{nearest(str(domain), known)}"
            for path, domains in used.items()
            for domain in domains
            if domain not in known
        ]
        model = self.model
        if self.strategy.name == "fsdp" and self.hardware.precision == "16-mixed":
            problems.append(
                "hardware.precision: strategy=fsdp does not scale losses, which 16-mixed needs. "
                "Use bf16-mixed, or another strategy"
            )
        if self.probe.tasks and "encoder" not in self.export:
            problems.append(
                "probe.tasks: probes score the exported encoder. Add encoder to export, or give "
                "probe.tasks=[]"
            )
        if self.distillation.weight and (model.freeze_encoder or model.starts_at_random):
            problems.append("distillation.weight: needs pretrained weights and a trained encoder")
        if self.data.batch_seconds is not None and model.padding == "30s":
            problems.append(
                "data.batch_seconds: with model.padding=30s every clip costs 30 s; give "
                "data.batch_clips"
            )
        if self.optim.ema_decay and self.strategy.zero_stage == 3:
            name = self.strategy.name
            problems.append(f"optim.ema_decay: {name} shards the weights; use fsdp or ZeRO stage 2")
        if model.pad_to_30s and (self.data.batch_seconds or 30) < 30:
            problems.append(
                f"data.batch_seconds: {self.data.batch_seconds:g} is below the 30 s of a clip that "
                "model.pad_to_30s pads"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Load a config with overrides, and check all that needs neither data nor weights.

    Raises:
        UserError: lists all problems.
    """
    return build(Settings, compose(path, overrides), str(path))


def first_model(model: ModelSettings, config: Path) -> ModelSettings:
    """Return the model of the first config in the chain of `model.after` that ends at `config`."""
    chain = [config.resolve()]
    while model.after:
        config = find_config(model.after, config.parent)
        if config.resolve() in chain:
            raise UserError(f"model.after: {config} would be trained before itself.")
        chain.append(config.resolve())
        model = load_settings(config).model
    return model


def dump_settings(settings: Settings) -> str:
    """Return the resolved config as YAML that `load_settings` can read."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(asdict(settings))))


def _escape(value: Any) -> Any:
    """Escape `${` in all texts, so that OmegaConf does not take it for an interpolation."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        case dict():
            return {key: _escape(item) for key, item in value.items()}
        case list() | tuple():
            return [_escape(item) for item in value]
    return value
