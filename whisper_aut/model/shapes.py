"""The sizes of released Whispers, so that a run can be planned where none of them can be had.

In: a hub id or a directory. Out: a `WhisperConfig`. Next: `training.plan`. Source: the config.json files of openai/whisper-* on the
Hugging Face hub, and table 1 of Radford et al. 2022.
"""

from pathlib import Path

from transformers import WhisperConfig

from whisper_aut.model.start import Start

# width, encoder layers, decoder layers, heads, mel bins, vocabulary
KNOWN_SHAPES = {
    "openai/whisper-tiny": (384, 4, 4, 6, 80, 51_865),
    "openai/whisper-base": (512, 6, 6, 8, 80, 51_865),
    "openai/whisper-small": (768, 12, 12, 12, 80, 51_865),
    "openai/whisper-medium": (1024, 24, 24, 16, 80, 51_865),
    "openai/whisper-large": (1280, 32, 32, 20, 80, 51_865),
    "openai/whisper-large-v2": (1280, 32, 32, 20, 80, 51_865),
    "openai/whisper-large-v3": (1280, 32, 32, 20, 128, 51_866),
    "openai/whisper-large-v3-turbo": (1280, 32, 4, 20, 128, 51_866),
}
FEED_FORWARD_RATIO = 4


def shaped_config(
    width: int,
    encoder_layers: int,
    decoder_layers: int,
    heads: int,
    num_mel_bins: int,
    vocabulary: int,
) -> WhisperConfig:
    """Return the configuration of a Whisper of these sizes; its special tokens are the vocabulary's last until they are set."""
    tokens = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), vocabulary - 1
    )
    return WhisperConfig(
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=width * FEED_FORWARD_RATIO,
        decoder_ffn_dim=width * FEED_FORWARD_RATIO,
        num_mel_bins=num_mel_bins,
        vocab_size=vocabulary,
        **tokens,
    )


def config_of(path: str, revision: str = "") -> WhisperConfig:
    """Return a checkpoint's configuration: a directory's own, a known shape, or else what the hub says.

    Raises:
        UserError: there is no such directory or model.
    """
    if not Path(path).is_dir() and path in KNOWN_SHAPES:
        return shaped_config(*KNOWN_SHAPES[path])
    return Start(path, revision).config
