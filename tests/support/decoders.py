"""Frames and targets for decoder tests, tiny configurations, and a `causal_lm` decoder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, WhisperConfig

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Targets
from whisper_aut.data.targets import TextCodec
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.pretrained import PretrainedWhisper

TEXTS = ("a dog barks twice", "rain falls", "a slow tune on a piano")
CAPTION = {"caption": {"prompts": ["Describe it.", "What is it?"]}}


def tiny_configs(layers: int) -> tuple[WhisperConfig, Qwen3Config]:
    whisper = WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=80,
        pad_token_id=0,
    )
    language = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return whisper, language


def frames_and_lengths(width: int = 32) -> tuple[Tensor, tuple[int, ...]]:
    lengths = (27, 61, 42)
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(0)), lengths


def targets_of(codec: TextCodec, texts: tuple[str, ...] = TEXTS) -> Targets:
    return Targets.pack([codec.encode(Annotation(text=text), "sound", 0) for text in texts])


def build_causal_lm(
    tiny_whisper: Path, language_model: Path, *, checkpointing: bool = False, **options: Any
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    values = {
        "name": "causal_lm",
        "language_model": str(language_model),
        "instructions": CAPTION,
        **options,
    }
    entry, checked = check_decoder(values)
    return entry.build(PretrainedWhisper(str(tiny_whisper)), checked, checkpointing)
