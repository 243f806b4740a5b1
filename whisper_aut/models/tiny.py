"""Small models for tests, the demo and machines without a network.

`make_whisper` writes a randomly initialised Whisper that loads like `openai/whisper-tiny`.
`make_language_model` trains a small Qwen3 on the texts of shards.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
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
from whisper_aut.data.shards import iter_samples, open_index
from whisper_aut.data.targets import AUDIO, ChatText, Instructions
from whisper_aut.errors import SkipSample, UserError
from whisper_aut.models.language_model import packed_states
from whisper_aut.models.losses import chunked_cross_entropy
from whisper_aut.models.pretrained import (
    quiet_loading,
    seeded,
    set_prompt_tokens,
    whisper_config_of_size,
)
from whisper_aut.utils import file_lock, progress_bar

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
TURN_END = "<|im_end|>"
CHAT_SPECIAL_TOKENS = (END, "<|im_start|>", TURN_END, "<think>", "</think>")
# ChatML, with the empty <think> block that Qwen3 writes if thinking is disabled.
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Probability of each fact besides the requested one: real audio does not reveal everything either.
OTHER_FACT_PROBABILITY = 0.5


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
    """Write a randomly initialised Whisper to a directory in Hugging Face's format; return it.

    Its tokenizer is trained on `texts`. It has at most `vocabulary` text tokens, and the special
    tokens.
    """
    tokenizer = train_whisper_tokenizer(texts, vocabulary)
    ids = tokenizer.get_vocab()
    tokens = {"decoder_start_token_id": ids[START]} | dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), ids[END]
    )
    config = whisper_config_of_size(
        d_model, encoder_layers, decoder_layers, heads, num_mel_bins, len(tokenizer)
    )
    for name, value in tokens.items():
        setattr(config, name, value)
    with seeded(seed):
        model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_length=config.max_target_positions,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **tokens,
    )
    set_prompt_tokens(model.generation_config, tokenizer, multilingual=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=num_mel_bins).save_pretrained(out)
    return out


def train_whisper_tokenizer(texts: Iterable[str], vocabulary: int) -> WhisperTokenizer:
    """Train a byte-level BPE on texts and append Whisper's special tokens."""
    bpe = _train_bpe(texts, vocabulary, [END])
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


def train_chat_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary` tokens with a chat template like Qwen3's."""
    # The chat template writes the names of the roles, so they are part of the training text.
    bpe = _train_bpe(["user\nassistant\n\n", *texts], vocabulary, CHAT_SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=TURN_END, pad_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT_SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _train_bpe(texts: Iterable[str], vocabulary: int, special_tokens: Sequence[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


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
        max_repeats: repeat each token that replaces audio 1 to this many times, because sounds
            span several frames.
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
    max_repeats: int = 2
    noise: float = 1.0
    steps: int = 600
    batch_texts: int = 16
    lr: float = 3e-3
    seed: int = 0


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
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def make_language_model(scratch: LanguageScratch, instructions: Instructions) -> str:
    """Train the small language model, unless the same one was trained before.

    Returns:
        The directory of the model.

    Raises:
        UserError: the shards cannot be read, or no instruction fits any of their texts.
    """
    indexes = [open_index(folder) for folder in scratch.texts]
    identity = [
        __version__,
        asdict(scratch) | {"out": ""},
        {name: asdict(entry) for name, entry in instructions.entries.items()},
        [index.fingerprint() for index in indexes],
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    out = Path(scratch.out) / digest[:12]
    with file_lock(out):
        if out.exists():  # complete: it is renamed to this path at the end
            return str(out)
        samples = (sample for index in indexes for sample in iter_samples(index, ClipLimits()))
        annotations = [
            sample.annotation
            for sample in samples
            if isinstance(sample, Sample) and sample.annotation.text.strip()
        ]
        annotations = [a for a in annotations if instructions.answers(a, a.domain)]
        if not annotations:
            raise UserError(
                f"No text in {', '.join(scratch.texts)} fits an instruction, so no language model "
                "can be trained on them."
            )
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        train_language_model(partial, scratch, instructions, annotations)
        partial.rename(out)
    return str(out)


def train_language_model(
    out: Path,
    scratch: LanguageScratch,
    instructions: Instructions,
    annotations: Sequence[Annotation],
) -> None:
    """Train the small language model and save it, with its tokenizer, in a new directory."""
    prompts = [prompt for entry in instructions.entries.values() for prompt in entry.prompts]
    texts = [*prompts, *(annotation.text for annotation in annotations)]
    tokenizer = train_chat_tokenizer(texts, scratch.vocabulary)
    codec = ChatText(tokenizer, instructions)
    chats = draw_chats(codec, annotations, random.Random(scratch.seed), scratch.max_repeats)
    config = scratch_config(scratch, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id  # pyright: ignore
    with seeded(scratch.seed), progress_bar(text="{task.fields[loss]}") as bar:
        model = Qwen3ForCausalLM(config)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=scratch.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, scratch.lr, scratch.steps, pct_start=0.1, cycle_momentum=False
        )
        task = bar.add_task("Language model", total=scratch.steps, loss="")
        for _ in range(scratch.steps):
            loss = _chat_loss(model, list(islice(chats, scratch.batch_texts)), scratch.noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, loss=f"loss {loss.item():.2f}")
    with quiet_loading():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@dataclass(frozen=True)
class TextChat:
    """A chat of L tokens in which text replaces the audio.

    Attributes:
        tokens: `[L]`.
        supervised: `[L]` bool, the tokens to predict.
        replaces_audio: `[L]` bool, the tokens that replace the audio.
    """

    tokens: Tensor
    supervised: Tensor
    replaces_audio: Tensor


def draw_chats(
    codec: ChatText, annotations: Sequence[Annotation], rng: random.Random, max_repeats: int
) -> Iterator[TextChat]:
    """Yield random chats about clips without end.

    Facts about the clip replace its audio: always the answer to the instruction, and each answer
    to another instruction with a probability, in random order.
    """
    for position in count(1):
        annotation = rng.choice(annotations)
        try:
            target = codec.encode(annotation, annotation.domain, position)
        except SkipSample:
            continue
        answers = codec.instructions.answers(annotation, annotation.domain)
        # A sample's own question has no entry. Its fact is its answer.
        requested = answers.pop(target.task, target.text)
        others = [fact for fact in answers.values() if rng.random() < OTHER_FACT_PROBABILITY]
        facts = list(dict.fromkeys([requested, *others]))
        rng.shuffle(facts)
        yield replace_audio(codec, target, facts, rng, max_repeats)


def replace_audio(
    codec: ChatText,
    target: TokenTarget,
    facts: Sequence[str],
    rng: random.Random,
    max_repeats: int = 1,
) -> TextChat:
    """Replace the audio token of a chat with facts, one per line.

    A word after a line break has the same tokens as at the start of an answer.
    """
    tokens = codec.tokenizer(
        "\n".join(facts), add_special_tokens=False, split_special_tokens=True
    ).input_ids
    text = [token for token in tokens for _ in range(rng.randint(1, max_repeats))]
    start = int((target.tokens == AUDIO).nonzero()[0])
    before, after = target.tokens[:start], target.tokens[start + 1 :]
    unsupervised = torch.zeros(len(text) - 1, dtype=torch.bool)
    positions = torch.arange(len(before) + len(text) + len(after))
    return TextChat(
        torch.cat([before, torch.tensor(text), after]),
        torch.cat([unsupervised, target.supervised]),  # the prompt is not supervised
        (positions >= start) & (positions < start + len(text)),
    )


def _chat_loss(model: Qwen3ForCausalLM, chats: Sequence[TextChat], noise: float) -> Tensor:
    """Return the mean next-token loss on the answers of a batch, as in `decoders.causal_lm`."""
    tokens = torch.cat([chat.tokens for chat in chats])
    predicted = torch.cat([chat.supervised for chat in chats]).nonzero()[:, 0]
    embeddings = model.get_input_embeddings()(tokens)
    scale = embeddings.detach().square().mean().sqrt()
    fractions = [torch.rand(1) * noise * chat.replaces_audio for chat in chats]
    fraction = torch.cat(fractions)[:, None]
    random_part = scale * torch.randn_like(embeddings)
    embeddings = (1 - fraction).sqrt() * embeddings + fraction.sqrt() * random_part
    states = packed_states(model, embeddings, [len(chat.tokens) for chat in chats])
    total, _, _ = chunked_cross_entropy(
        states[predicted - 1], model.lm_head.weight, tokens[predicted]
    )
    return total / len(predicted)
