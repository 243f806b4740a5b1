"""Small models for tests, the demo and machines without a network.

`make_whisper` writes a randomly initialised Whisper that loads like `openai/whisper-tiny`.
`make_language_model` trains a small Qwen3 on the texts of shards.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from whisper_aut import __version__
from whisper_aut.audio.decode import ClipLimits
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import TokenTarget
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import ShardIndex, iter_samples, open_index
from whisper_aut.data.targets import AUDIO, ChatText, Instructions
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.models.language import packed_states
from whisper_aut.models.losses import chunked_cross_entropy
from whisper_aut.models.pretrained import (
    PretrainedWhisper,
    quiet_loading,
    seeded,
    set_prompt_tokens,
)
from whisper_aut.utils import file_lock

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


def whisper_config_of_size(
    width: int,
    encoder_layers: int,
    decoder_layers: int,
    heads: int,
    num_mel_bins: int,
    vocabulary: int,
) -> WhisperConfig:
    """Return the configuration of a Whisper with these sizes.

    All its special tokens are the last token of the vocabulary until they are set.
    """
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


def load_whisper_config(path: str, revision: str = "") -> WhisperConfig:
    """Return the configuration of a Whisper: from a directory, `KNOWN_SHAPES` or the hub.

    Args:
        path: directory or hub id.
        revision: branch, tag or commit on the hub. Empty for the default branch.

    Raises:
        UserError: there is no such directory or model.
    """
    if not Path(path).is_dir() and path in KNOWN_SHAPES:
        return whisper_config_of_size(*KNOWN_SHAPES[path])
    return PretrainedWhisper(path, revision).config


END, START = "<|endoftext|>", "<|startoftranscript|>"
# In the order of OpenAI's tokenizers: WhisperTokenizer computes language ids from the start token.
WHISPER_SPECIAL_TOKENS = (
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
    """Train a byte-level BPE and append Whisper's special tokens.

    Args:
        texts: the texts to train on.
        vocabulary: the most text tokens.
    """
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
    vocab = {token: number for number, token in enumerate([*ordered, *WHISPER_SPECIAL_TOKENS])}
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = WhisperTokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=list(WHISPER_SPECIAL_TOKENS[1:]),
        pad_token=END,
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
    """Write a randomly initialised Whisper to a directory in Hugging Face's format.

    Args:
        out: the directory.
        texts: the texts to train the tokenizer on.
        d_model: width D.
        encoder_layers, decoder_layers: number of layers.
        heads: attention heads of encoder and decoder.
        num_mel_bins: M, the number of mel bins.
        vocabulary: the most text tokens; special tokens are added.
        seed: seed of the weights.

    Returns:
        `out`.
    """
    tokenizer = train_tokenizer(texts, vocabulary)
    vocab = tokenizer.get_vocab()
    start, end = vocab[START], vocab[END]
    config = whisper_config_of_size(
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


END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LANGUAGE_SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, "<think>", "</think>")
# ChatML, with the empty <think> block that Qwen3 writes if thinking is disabled.
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MAX_POSITIONS = 2048
WARMUP_SHARE = 0.1
# Probability of each fact besides the requested one: real audio does not reveal everything either.
OTHER_FACTS = 0.5


@dataclass
class LanguageScratch:
    """Sizes and training options of the small language model.

    The model is trained on chats in which text about a clip replaces the clip's audio.

    Attributes:
        texts: folders of the shards whose texts it is trained on.
        out: the folder to save it in, in a subfolder named by a hash of everything that
            determines the model.
        width: width W of the embeddings.
        layers: number of layers.
        heads: number of attention heads.
        vocabulary: size of the tokenizer's vocabulary.
        stretch: repeat each token that replaces audio 1 to this many times, because sounds span
            several frames.
        noise: the largest fraction of noise power in the embeddings that replace audio, drawn for
            each chat. It imitates adapter outputs, which have the scale of token embeddings but
            match a token only partly. From pure noise the model learns to predict what is likely,
            so that it is not confidently wrong with an untrained adapter.
        steps, batch_texts, lr: training steps, chats per step, and peak learning rate.
        seed: seed of weights and training data.
    """

    texts: list[str]
    out: str
    width: int = 128
    layers: int = 3
    heads: int = 4
    vocabulary: int = 1200
    stretch: int = 2
    noise: float = 1.0
    steps: int = 600
    batch_texts: int = 16
    lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class _Text:
    annotation: Annotation
    domain: str


@dataclass(frozen=True)
class _Chat:
    """A chat of L tokens.

    Attributes:
        tokens: `[L]`.
        supervised: `[L]` bool, the tokens to predict.
        heard: `[L]` bool, the tokens that replace the audio.
    """

    tokens: torch.Tensor
    supervised: torch.Tensor
    heard: torch.Tensor


@dataclass
class _Reader:
    """Draws random chats in which text about a clip replaces its audio."""

    codec: ChatText
    texts: Sequence[_Text]
    stretch: int
    rng: random.Random
    drawn: int = field(default=0)

    def batch(self, size: int) -> "Iterator[_Chat]":
        while size:
            text = self.rng.choice(self.texts)
            self.drawn += 1
            try:
                chat = self.codec.encode(text.annotation, text.domain, self.drawn)
            except SkipSample:
                continue
            size -= 1
            yield self._written_out(chat, self._facts(text, chat))

    def _facts(self, text: _Text, chat: TokenTarget) -> list[str]:
        """Return the requested fact and about half of the clip's other facts, shuffled and unique.

        A fact is the answer to a task.
        """
        known = self.codec.instructions.answers(text.annotation, text.domain)
        # A sample's own question has no entry. Its fact is the answer.
        asked = known.pop(chat.task, chat.text)
        told = list(
            dict.fromkeys(
                [asked, *(fact for fact in known.values() if self.rng.random() < OTHER_FACTS)]
            )
        )
        self.rng.shuffle(told)
        return told

    def _written_out(self, chat: TokenTarget, facts: list[str]) -> "_Chat":
        """Replace the audio token with facts, one per line.

        A word after a line break has the same tokens as at the start of an answer.
        """
        tokens = self.codec.tokenizer(
            "\n".join(facts), add_special_tokens=False, split_special_tokens=True
        ).input_ids
        spoken = torch.tensor(
            [token for token in tokens for _ in range(self.rng.randint(1, self.stretch))]
        )
        at = int((chat.tokens == AUDIO).nonzero()[0])
        tokens = torch.cat([chat.tokens[:at], spoken, chat.tokens[at + 1 :]])
        supervised = torch.cat(
            [torch.zeros(len(tokens) - len(chat.tokens), dtype=torch.bool), chat.supervised]
        )
        places = torch.arange(len(tokens))
        return _Chat(tokens, supervised, (places >= at) & (places < at + len(spoken)))


def make_language_model(scratch: LanguageScratch, instructions: Instructions) -> str:
    """Train the small language model, unless the same one was trained before.

    Args:
        scratch: sizes and training options.
        instructions: the tasks to train on.

    Returns:
        The directory of the model.

    Raises:
        UserError: the shards cannot be read, or no instruction fits any of their texts.
    """
    indexes = [open_index(folder) for folder in scratch.texts]
    asked = {name: asdict(entry) for name, entry in instructions.entries.items()}
    facts = [
        __version__,
        asdict(scratch) | {"out": ""},
        asked,
        [index.fingerprint() for index in indexes],
    ]
    out = (
        Path(scratch.out)
        / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    )
    with file_lock(out):
        if not out.exists():  # `_make` moves a complete model there
            _make(out, scratch, instructions, indexes)
    return str(out)


def _make(
    out: Path, scratch: LanguageScratch, instructions: Instructions, indexes: Sequence[ShardIndex]
) -> None:
    items = (item for index in indexes for item in iter_samples(index, ClipLimits()))
    annotations = [
        item.annotation
        for item in items
        if isinstance(item, Sample) and item.annotation.text.strip()
    ]
    texts = [_Text(annotation, annotation.domain) for annotation in annotations]
    texts = [text for text in texts if instructions.fitting(text.annotation, text.domain)]
    if not texts:
        raise UserError(
            f"No text in {', '.join(scratch.texts)} fits an instruction, so no language model can "
            "be trained on them."
        )
    prompts = [prompt for entry in instructions.entries.values() for prompt in entry.prompts]
    tokenizer = train_chat_tokenizer(
        [*prompts, *(text.annotation.text for text in texts)], scratch.vocabulary
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with seeded(scratch.seed):
        reader = _Reader(
            ChatText(tokenizer, instructions), texts, scratch.stretch, random.Random(scratch.seed)
        )
        config = scratch_config(scratch, len(tokenizer))
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id  # pyright: ignore
        model = _trained(Qwen3ForCausalLM(config), reader, scratch)
    with quiet_loading():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def train_chat_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with special tokens and a chat template like Qwen3's.

    Args:
        texts: the texts to train on.
        vocabulary: size of the vocabulary, special tokens included.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(LANGUAGE_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The chat template writes the names of the roles, so they are part of the training text.
    bpe.train_from_iterator(["user\nassistant\n\n", *texts] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=END_OF_TEXT
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(LANGUAGE_SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def scratch_config(scratch: LanguageScratch, vocabulary: int) -> Qwen3Config:
    """Return the configuration of the small language model, a Qwen3."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=scratch.width,
        intermediate_size=3 * scratch.width,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=max(1, scratch.heads // 2),
        head_dim=scratch.width // scratch.heads,
        # Embeddings start with norm 1. At the usual 0.02, half of a short training is spent on
        # growing them.
        initializer_range=scratch.width**-0.5,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )


def _trained(
    model: Qwen3ForCausalLM, reader: _Reader, scratch: LanguageScratch
) -> Qwen3ForCausalLM:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=scratch.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=scratch.lr,
        total_steps=scratch.steps,
        pct_start=WARMUP_SHARE,
        cycle_momentum=False,
    )
    columns = (
        TextColumn("Language model"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("steps", total=scratch.steps, loss="")
        for _ in range(scratch.steps):
            loss = _loss(model, list(reader.batch(scratch.batch_texts)), scratch.noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, loss=f"loss {loss.item():.2f}")
    return model


def _loss(model: Qwen3ForCausalLM, chats: Sequence["_Chat"], noise: float) -> torch.Tensor:
    """Return the mean next-token loss on the answers of a batch, as in `decoders.causal_lm`."""
    tokens = torch.cat([chat.tokens for chat in chats])
    predicted = torch.cat([chat.supervised for chat in chats]).nonzero()[:, 0]
    embeddings = model.get_input_embeddings()(tokens)
    size = embeddings.detach().square().mean().sqrt()
    shares = torch.cat([(torch.rand(1) * noise) * chat.heard for chat in chats])[:, None]
    embeddings = (1 - shares).sqrt() * embeddings + shares.sqrt() * size * torch.randn_like(
        embeddings
    )
    states = packed_states(model, embeddings, [len(chat.tokens) for chat in chats])
    total, _, _ = chunked_cross_entropy(
        states[predicted - 1], model.lm_head.weight, tokens[predicted]
    )
    return total / len(predicted)
