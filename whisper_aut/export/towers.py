"""Export an encoder as the audio tower of a published audio language model, and load it there.

Towers are built with transformers' own classes and filled strictly: every weight must match in
name and shape, except those that `TOWERS` lists as the tower's own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniAudioEncoderConfig,
    Qwen2AudioEncoderConfig,
    VoxtralEncoderConfig,
    WhisperConfig,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

from whisper_aut.errors import UserError

POSITIONS = "embed_positions.weight"
WEIGHTS, PARTIAL_WEIGHTS = "model.safetensors", "tower.safetensors"
SIZES = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
)
BEHAVIOUR = (
    "activation_function",
    "scale_embedding",
    "dropout",
    "attention_dropout",
    "activation_dropout",
)


@dataclass(frozen=True)
class Tower:
    """An audio tower architecture.

    Attributes:
        config: Builds the tower's config from Whisper's settings.
        build: Builds the tower from its config.
        renamed: Pairs of a prefix of our weight names and the tower's prefix for it.
        computed: Weights of ours that the tower computes by formula. Ours must equal the formula.
        theirs: Weights of the tower that our encoders do not have. They keep the model's values.
        widths_per_token: How many frames the model's projector joins into one token. Such a
            projector takes its input width from the feed-forward, so the feed-forward must be
            this many times as wide as the model. 0 if there is no such constraint.
    """

    config: Callable[..., Any]
    build: Callable[[Any], PreTrainedModel]
    renamed: tuple[tuple[str, str], ...] = ()
    computed: tuple[str, ...] = ()
    theirs: tuple[str, ...] = ()
    widths_per_token: int = 0


TOWERS = {
    "qwen2-audio": Tower(Qwen2AudioEncoderConfig, Qwen2AudioEncoder),
    "qwen2.5-omni": Tower(
        Qwen2_5OmniAudioEncoderConfig,
        Qwen2_5OmniAudioEncoder,
        renamed=(("layer_norm.", "ln_post."),),
        computed=(POSITIONS,),
        theirs=("audio_bos_eos_token.weight", "proj.bias", "proj.weight"),
    ),
    "voxtral": Tower(VoxtralEncoderConfig, VoxtralEncoder, widths_per_token=4),
}


def write_tower(name: str, weights: dict[str, Tensor], config: WhisperConfig, out: Path) -> None:
    """Write an encoder as an audio tower: `config.json` and the weights.

    A tower with weights of its own is incomplete here, so it is written as `tower.safetensors`:
    `from_pretrained` would load a `model.safetensors` as a complete model.

    Args:
        name: A key of `TOWERS`.
        weights: The encoder's weights, with the names of `WhisperEncoder`.
        config: The config of the Whisper model that the encoder comes from.
        out: The folder to write, created if necessary.

    Raises:
        UserError: If the encoder's architecture does not match the tower's.
    """
    kind = TOWERS[name]
    check_matches(name, weights, config)
    tower_config = kind.config(**{key: getattr(config, key) for key in (*SIZES, *BEHAVIOUR)})
    tower = kind.build(tower_config)
    state = tower_state(name, weights)
    fill_strictly(tower, state, set(kind.theirs))
    out.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(weights.values())).dtype
    if kind.theirs:
        tower_config.dtype = dtype
        tower_config.save_pretrained(out)
        save_file(
            {key: weight.contiguous() for key, weight in state.items()},
            out / PARTIAL_WEIGHTS,
            metadata={"format": "pt"},
        )
    else:
        tower.to(dtype).save_pretrained(out)  # pyright: ignore[reportArgumentType]


def tower_state(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an encoder's weights to the tower's names, without those that the tower computes."""
    state = {}
    for key, weight in weights.items():
        if key in TOWERS[name].computed:
            continue
        for ours, theirs in TOWERS[name].renamed:
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        state[key] = weight
    return state


def check_matches(name: str, weights: dict[str, Tensor], config: WhisperConfig) -> None:
    """Check that the tower would compute the same function as the encoder.

    Raises:
        UserError: If it would not. The message lists every difference.
    """
    kind = TOWERS[name]
    problems = []
    if config.scale_embedding:
        problems.append(
            "it scales what enters the first layer (scale_embedding), which the tower does not do"
        )
    if kind.widths_per_token and config.encoder_ffn_dim != kind.widths_per_token * config.d_model:
        problems.append(
            f"its feed-forward is {config.encoder_ffn_dim} wide; "
            f"the tower's projector joins {kind.widths_per_token} frames of "
            f"{config.d_model} by that width"
        )
    if POSITIONS in kind.computed and not torch.allclose(
        weights[POSITIONS].float(), sinusoids(*weights[POSITIONS].shape), atol=1e-3
    ):
        problems.append(
            "its positions are not Whisper's sinusoids, which the tower computes by formula"
        )
    if problems:
        raise UserError(
            f"This encoder is no {name} tower: {'; '.join(problems)}. "
            "Export it with --format encoder."
        )


def sinusoids(length: int, width: int) -> Tensor:
    """Return Whisper's position embeddings `[length, width]`.

    The first half of the width holds sines, the second half cosines, both at timescales from 1
    to 10,000.
    """
    rates = torch.exp(
        -torch.log(torch.tensor(10_000.0)) / (width // 2 - 1) * torch.arange(width // 2)
    )
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def swap_tower(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an exported tower into the audio tower of a model, in place.

    Weights of the tower that our encoders do not have keep their values.

    Args:
        model: A `Qwen2AudioForConditionalGeneration`, a `VoxtralForConditionalGeneration`, a
            Qwen2.5-Omni model or thinker, or any other model with one `audio_tower` of the
            exported architecture.
        directory: The folder that `whisper-aut export --format …` wrote.

    Returns:
        The same model.

    Raises:
        UserError: If the directory has no tower, if the model does not have exactly one tower of
            that architecture, or if names or sizes differ.
    """
    folder = Path(directory)
    files = [folder / name for name in (WEIGHTS, PARTIAL_WEIGHTS) if (folder / name).is_file()]
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no audio tower. "
            f"Write one: whisper-aut export RUN --format qwen2-audio --out {folder}"
        )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    found = [
        module for name, module in model.named_modules() if name.rpartition(".")[2] == "audio_tower"
    ]
    towers = [
        module
        for module in found
        if getattr(getattr(module, "config", None), "model_type", None) == kind
    ]
    if len(towers) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(towers)} audio towers "
            f"of the kind {kind!r} that {folder} holds; one is needed."
        )
    theirs = next(
        (set(tower.theirs) for tower in TOWERS.values() if tower.config.model_type == kind), set()
    )  # pyright: ignore
    fill_strictly(towers[0], load_file(files[0]), theirs)
    return model


def fill_strictly(tower: nn.Module, state: dict[str, Tensor], theirs: set[str]) -> None:
    """Load a state dict into a tower. Only the weights in `theirs` may be missing from it.

    Raises:
        UserError: If names or shapes differ.
    """
    own = tower.state_dict()
    others = [key for key in state if key in own and state[key].shape != own[key].shape]
    lists = {
        "missing": sorted(set(own) - set(state) - theirs),
        "without a place": sorted(set(state) - set(own)),
        "of another shape": [
            f"{key} ({tuple(state[key].shape)}, there {tuple(own[key].shape)})" for key in others
        ],
    }
    problems = [
        f"{len(keys)} weights are {what}, first {keys[0]}" for what, keys in lists.items() if keys
    ]
    if problems:
        raise UserError(f"The encoder does not fit {type(tower).__name__}: {'; '.join(problems)}.")
    tower.load_state_dict(state, strict=False)
