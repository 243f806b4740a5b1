"""A small Whisper from nothing, as a directory in Hugging Face's format.

In: texts to train a byte-level BPE on, and sizes. Out: a directory with config, random weights, tokenizer, feature extractor
and generation config, which loads like `openai/whisper-tiny` does. Next: `model.start`. It stands in for a released checkpoint
where none can be had: in tests, in the demo, on machines without a network.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from whisper_aut.model.seeding import seeded
from whisper_aut.model.shapes import shaped_config
from whisper_aut.model.start import set_prompt_tokens

END, START = "<|endoftext|>", "<|startoftranscript|>"
# The order is the released tokenizers': WhisperTokenizer counts language tokens from the start token on.
SPECIAL_TOKENS = (
    END,
    START,
    *(f"<|{code}|>" for code in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
MAX_TEXT_TOKENS = 448


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> WhisperTokenizer:
    """Train a byte-level BPE of at most `vocabulary` text tokens and add Whisper's special tokens behind it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False, special_tokens=[END]
    )
    bpe.train_from_iterator(texts, trainer)
    trained = bpe.get_vocab()
    ordered = sorted((token for token in trained if token != END), key=trained.__getitem__)
    vocab = {token: number for number, token in enumerate([*ordered, *SPECIAL_TOKENS])}
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = WhisperTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=list(SPECIAL_TOKENS[1:]), pad_token=END
    )
    tokenizer.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    return tokenizer


def make_whisper(
    out: Path,
    texts: Iterable[str],
    *,
    d_model: int,
    encoder_layers: int,
    decoder_layers: int,
    heads: int,
    num_mel_bins: int,
    vocabulary: int,
    seed: int,
) -> Path:
    """Write a randomly initialised Whisper to `out` and return it."""
    tokenizer = train_tokenizer(texts, vocabulary)
    vocab = tokenizer.get_vocab()
    start, end = vocab[START], vocab[END]
    config = shaped_config(
        d_model, encoder_layers, decoder_layers, heads, num_mel_bins, len(tokenizer)
    )
    config.decoder_start_token_id = start
    config.bos_token_id = config.eos_token_id = config.pad_token_id = end
    with seeded(seed):
        model = WhisperForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer, start, end)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=num_mel_bins).save_pretrained(out)
    return out


def _generation_config(tokenizer: WhisperTokenizer, start: int, end: int) -> GenerationConfig:
    config = GenerationConfig(
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_length=MAX_TEXT_TOKENS,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    set_prompt_tokens(config, tokenizer, multilingual=True)
    return config
