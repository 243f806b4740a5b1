"""The registry of decoders: a name in a config → its options and its builder. A new decoder is one file and one line here.

In: a start checkpoint and the `decoder` group of a config. Out: a `Decoder` module and its `TextCodec`. Next: `training.build`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import WhisperConfig

from whisper_aut.config import build
from whisper_aut.data.targets import TextCodec
from whisper_aut.errors import UserError, nearest
from whisper_aut.models.decoders.causal_lm import CausalLMOptions, build_causal_lm, sketch_causal_lm
from whisper_aut.models.decoders.whisper import (
    WhisperDecoderOptions,
    build_whisper_decoder,
    sketch_whisper_decoder,
)
from whisper_aut.models.pretrained import Start


@dataclass(frozen=True)
class DecoderEntry:
    """One line of the registry.

    Attributes:
        options: the schema of the decoder's options.
        build: `(start, options, gradient_checkpointing)` → decoder and codec.
        exports: what a run with it can be exported as.
        sketch: `(encoder config, options, gradient_checkpointing)` → the same module from sizes alone, without reading a weight or
            a tokenizer; `training.plan` makes it of tensors without memory. None where nothing can be planned.
    """

    options: type
    build: Callable[[Start, Any, bool], tuple[nn.Module, TextCodec]]
    exports: tuple[str, ...] = ("encoder",)
    sketch: Callable[[WhisperConfig, Any, bool], nn.Module] | None = None


DECODERS: dict[str, DecoderEntry] = {
    "whisper": DecoderEntry(
        WhisperDecoderOptions,
        build_whisper_decoder,
        exports=("encoder", "whisper"),
        sketch=sketch_whisper_decoder,
    ),
    "causal_lm": DecoderEntry(CausalLMOptions, build_causal_lm, sketch=sketch_causal_lm),
}


def check_decoder(values: Mapping[str, Any]) -> tuple[DecoderEntry, Any]:
    """Check the `decoder` group of a config against the schema that its name stands for.

    Raises:
        UserError: no such decoder, or options that it does not have.
    """
    name = str(values.get("name", ""))
    if name not in DECODERS:
        raise UserError(
            f"decoder.name: there is no decoder {name!r}.{nearest(name, DECODERS)} There are: {', '.join(DECODERS)}."
        )
    entry = DECODERS[name]
    return entry, build(entry.options, values, f"decoder ({name})")
