"""The registry of decoders: `decoder.name` of a config selects the options and the builder.

To add a decoder, write a module and add an entry to `DECODERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import WhisperConfig

from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import UserError, nearest
from whisper_aut.models.decoders.causal_lm import (
    CausalLMOptions,
    build_causal_lm,
    build_causal_lm_meta,
)
from whisper_aut.models.decoders.whisper import (
    WhisperDecoderOptions,
    build_whisper_decoder,
    build_whisper_decoder_meta,
)
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.schema import build


@dataclass(frozen=True)
class DecoderEntry:
    """One entry of the registry.

    Attributes:
        options: the dataclass of the decoder's options.
        build: `(pretrained checkpoint, options, gradient_checkpointing)` → the decoder and its
            codec. With `pretrained.empty`, all weights and the attributes that the decoder names
            in `from_first_rank` are replaced by those of the first rank.
        exports: the formats that a run with this decoder can be exported to.
        build_meta: `(encoder config, options, gradient_checkpointing)` → the same module built
            from its configuration, without weights or a tokenizer, for `training.plan`. None if
            runs with this decoder cannot be planned.
    """

    options: type
    build: Callable[[PretrainedWhisper, Any, bool], tuple[nn.Module, TextCodec]]
    exports: tuple[str, ...] = ("encoder",)
    build_meta: Callable[[WhisperConfig, Any, bool], nn.Module] | None = None


DECODERS: dict[str, DecoderEntry] = {
    "whisper": DecoderEntry(
        WhisperDecoderOptions,
        build_whisper_decoder,
        exports=("encoder", "whisper"),
        build_meta=build_whisper_decoder_meta,
    ),
    "causal_lm": DecoderEntry(CausalLMOptions, build_causal_lm, build_meta=build_causal_lm_meta),
}


def check_decoder(values: Mapping[str, Any]) -> tuple[DecoderEntry, Any]:
    """Validate the `decoder` group of a config.

    Returns:
        The registry entry of `decoder.name`, and the parsed options.

    Raises:
        UserError: the name is unknown, or the options do not fit the decoder's schema.
    """
    name = str(values.get("name", ""))
    if name not in DECODERS:
        raise UserError(
            f"decoder.name: there is no decoder {name!r}.{nearest(name, DECODERS)} "
            f"The decoders are {', '.join(DECODERS)}."
        )
    entry = DECODERS[name]
    return entry, build(entry.options, values, f"decoder ({name})")
