"""Export an encoder as the audio tower of a published audio language model, and load it there.

Towers are built with transformers' own classes. Every weight must match in name and shape, except
those that only the tower has.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AudioFlamingo3EncoderConfig,
    Qwen2_5OmniAudioEncoderConfig,
    Qwen2AudioEncoderConfig,
    VoxtralEncoderConfig,
    WhisperConfig,
)
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3Encoder
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder
from transformers.models.whisper.modeling_whisper import sinusoids

from whisper_aut.errors import UserError
from whisper_aut.utils import read_json

POSITIONS = "embed_positions.weight"
WEIGHTS, PARTIAL_WEIGHTS = "model.safetensors", "tower.safetensors"
CONFIG_KEYS = (
    *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins"),
    *("max_source_positions", "activation_function", "scale_embedding"),
    *("dropout", "attention_dropout", "activation_dropout"),
)


@dataclass(frozen=True)
class Tower:
    """An audio tower architecture.

    Attributes:
        config_class, model_class: Classes of transformers.
        renamed: Prefix of our weight names → the tower's prefix.
        own_weights: Weights that our encoders do not have. They keep the model's values.
        computes_positions: The tower computes the position embeddings, as Whisper's sinusoids.
        frames_per_token: How many frames the model's projector joins into one token, if it takes
            its input width from the feed-forward, which must then be as many times as wide as
            the model. 0 otherwise.
    """

    config_class: Any
    model_class: Any
    renamed: tuple[tuple[str, str], ...] = ()
    own_weights: tuple[str, ...] = ()
    computes_positions: bool = False
    frames_per_token: int = 0


TOWERS = {
    "qwen2-audio": Tower(Qwen2AudioEncoderConfig, Qwen2AudioEncoder),
    "qwen2.5-omni": Tower(
        Qwen2_5OmniAudioEncoderConfig,
        Qwen2_5OmniAudioEncoder,
        renamed=(("layer_norm.", "ln_post."),),
        own_weights=("audio_bos_eos_token.weight", "proj.bias", "proj.weight"),
        computes_positions=True,
    ),
    "audio-flamingo-3": Tower(AudioFlamingo3EncoderConfig, AudioFlamingo3Encoder),
    "voxtral": Tower(VoxtralEncoderConfig, VoxtralEncoder, frames_per_token=4),
}


def write_tower(
    name: str,
    weights: dict[str, Tensor],
    config: WhisperConfig,
    out: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an encoder as an audio tower: `config.json` and the weights.

    A tower with weights of its own is incomplete here, so it is written as `tower.safetensors`:
    `from_pretrained` would load a `model.safetensors` as a complete model.

    Args:
        name: A key of `TOWERS`.
        weights: The encoder's weights, with the names of `WhisperEncoder`.
        config: The config of the Whisper model that the encoder comes from.
        out: The folder to write.

    Raises:
        UserError: The encoder's architecture does not match the tower's.
    """
    kind = TOWERS[name]
    check_tower(name, weights, config)
    state = {}
    for key, weight in weights.items():
        for ours, theirs in kind.renamed:
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        if key != POSITIONS or not kind.computes_positions:
            state[key] = weight.to(dtype).contiguous()
    tower_config = kind.config_class(**{key: getattr(config, key) for key in CONFIG_KEYS})
    tower = kind.model_class(tower_config)
    load_strictly(tower, state, kind.own_weights)
    out.mkdir(parents=True, exist_ok=True)
    if kind.own_weights:
        tower_config.dtype = dtype
        tower_config.save_pretrained(out)
        save_file(state, out / PARTIAL_WEIGHTS, metadata={"format": "pt"})
    else:
        tower.to(dtype).save_pretrained(out)


def check_tower(name: str, weights: dict[str, Tensor], config: WhisperConfig) -> None:
    """Check that the tower would compute the same function as the encoder.

    Raises:
        UserError: It would not. The message lists every difference.
    """
    kind = TOWERS[name]
    problems = []
    if config.scale_embedding:
        problems.append("scale_embedding is set, which the tower ignores")
    if kind.frames_per_token and config.encoder_ffn_dim != kind.frames_per_token * config.d_model:
        problems.append(
            f"the feed-forward is {config.encoder_ffn_dim} wide, but the projector of {name} "
            f"needs {kind.frames_per_token} × {config.d_model}"
        )
    positions = weights[POSITIONS].float()
    if kind.computes_positions and not positions.allclose(sinusoids(*positions.shape), atol=1e-3):
        problems.append("the position embeddings are not Whisper's sinusoids")
    if problems:
        raise UserError(
            f"The encoder cannot be exported as {name}: {'; '.join(problems)}. "
            "Export it with --format encoder."
        )


def swap_tower(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load an exported tower into the audio tower of a model, in place, and return the model.

    Weights of the tower that our encoders do not have keep their values.

    Args:
        model: Qwen2-Audio, Voxtral, Audio Flamingo 3, Music Flamingo, Qwen2.5-Omni or its thinker,
            or any other model with one `audio_tower` of the exported architecture.
        directory: The folder that `whisper-aut export --format …` wrote.

    Raises:
        UserError: The directory has no tower, the model does not have exactly one tower of that
            architecture, or names or sizes differ.
    """
    folder = Path(directory)
    files = [folder / name for name in (WEIGHTS, PARTIAL_WEIGHTS) if (folder / name).is_file()]
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} does not contain an audio tower. "
            f"Write one: whisper-aut export RUN --format qwen2-audio --out {folder}"
        )
    model_type = read_json(folder / "config.json").get("model_type")
    towers = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "audio_tower"
        and getattr(getattr(module, "config", None), "model_type", None) == model_type
    ]
    if len(towers) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(towers)} audio towers of type {model_type!r}, the "
            f"type of {folder}, instead of one."
        )
    kinds = [kind for kind in TOWERS.values() if kind.config_class.model_type == model_type]
    load_strictly(towers[0], load_file(files[0]), kinds[0].own_weights if kinds else ())
    return model


def load_strictly(tower: nn.Module, state: dict[str, Tensor], optional: Collection[str]) -> None:
    """Load a state dict into a tower. Only the weights in `optional` may be missing from it.

    Raises:
        UserError: Names or shapes differ.
    """
    expected = tower.state_dict()
    differing = {
        "missing": [key for key in expected if key not in state and key not in optional],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            key for key in state if key in expected and state[key].shape != expected[key].shape
        ],
    }
    problems = [
        f"{len(keys)} weights are {problem}, first {keys[0]}"
        for problem, keys in differing.items()
        if keys
    ]
    if problems:
        raise UserError(
            f"The exported tower does not fit {type(tower).__name__}: {'; '.join(problems)}."
        )
    tower.load_state_dict(state, strict=False)
