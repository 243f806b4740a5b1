"""Causal language models from the hub, run on sequences of different lengths.

Any architecture of `transformers` works whose logits are hidden states times the output embedding.
Models that mix positions only through the attention interface of `transformers` (Qwen, Llama,
Mistral, …) run packed. Models with a recurrent state or their own attention (Mamba, LFM2, GPT-Neo,
…) would leak from one sequence to the next, so they run on padded batches. `find_layout` tests
which layout works. Weights load strictly, from safetensors only; no remote code runs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whisper_aut.errors import UserError
from whisper_aut.models.attention import (
    Segments,
    clip_attention,
    compile_layer,
    draws_random_numbers,
    upload,
)
from whisper_aut.models.pretrained import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    check_loaded_weights,
    check_not_adapter,
    find_cached,
    load_pretrained,
    uninitialized,
)

# Sequence lengths and relative tolerances of `find_layout`. A leak changes hidden states by about
# their own size, rounding only by the precision of the dtype.
CHECK_LENGTHS = (7, 12, 5)
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
# Raised by architectures that do not support a call.
NOT_RUNNABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
PACKED = "whisper_aut_packed"  # name of our attention implementation in transformers

# Copied from the model's config.json, so that runs can be planned without access to the hub.
KNOWN_CONFIGS = {
    "Qwen/Qwen3-0.6B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
}


def load_language_config(path: str, revision: str = "") -> Any:
    """Return the configuration of a language model: from a directory, `KNOWN_CONFIGS` or the hub.

    Raises:
        UserError: there is no such directory or model.
    """
    if not Path(path).is_dir() and path in KNOWN_CONFIGS:
        return KNOWN_CONFIGS[path]
    return _load(AutoConfig, path, revision, CONFIG)


def load_language_model(
    path: str, revision: str = "", dtype: torch.dtype = torch.float32, *, empty: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a directory or the hub.

    With `empty`, its weights are left uninitialized; see `PretrainedWhisper`.

    Raises:
        UserError: there is no usable model, it is a PEFT adapter, weights are missing or
            unexpected, or the tokenizer has more tokens than the model.
    """
    if Path(path).is_dir():
        check_not_adapter(path)
    if empty:
        config = _load(AutoConfig, path, revision, CONFIG)
        model = uninitialized(
            AutoModelForCausalLM.from_config, config, dtype=dtype, trust_remote_code=False
        )
        return model, _load(AutoTokenizer, path, revision, *TOKENIZER)
    options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    model, info = _load(AutoModelForCausalLM, path, revision, CONFIG, WEIGHTS, **options)
    tokenizer = _load(AutoTokenizer, path, revision, *TOKENIZER)
    # Check adapters on the hub only now: the load above has reported an unreachable hub.
    check_not_adapter(find_cached(path, revision, CONFIG, WEIGHTS), revision)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    check_loaded_weights(path, info, tied, kind="language model")
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(
            f"The tokenizer of {path} has the token {tokenizer.convert_ids_to_tokens(last)!r} with "
            f"id {last}, but the model has {rows} embeddings. Add the missing ones: "
            "model.resize_token_embeddings(len(tokenizer)), then save the model."
        )
    return model, tokenizer


_load = partial(
    load_pretrained, what="language model", example="Qwen/Qwen3-0.6B", trust_remote_code=False
)


@dataclass(frozen=True)
class SequenceLayout:
    """How a language model runs on a batch of sequences.

    Attributes:
        packed: run sequences end to end, with attention within each. Otherwise run a padded batch
            with the model's own attention mask.
        longest_packed: the longest sequence that can be packed, which is the model's attention
            window; None for any length. Batches with a longer sequence are padded, because the
            model applies the window in its own mask.
        attention: name of the model's own attention implementation.
    """

    packed: bool = True
    longest_packed: int | None = None
    attention: str = "sdpa"


def find_layout(path: str, model: PreTrainedModel) -> SequenceLayout:
    """Run a language model on three random sequences and return a layout that it supports.

    A layout is supported if every sequence has the same hidden states in a batch as alone. The
    packed layout is preferred.

    Raises:
        UserError: the model does not run from embeddings, its logits are not hidden states times
            the output embedding, or it supports neither layout.
    """
    embed: Any = model.get_input_embeddings()
    packed, padded = _layouts(model)
    lengths = [min(length, packed.longest_packed or length) for length in CHECK_LENGTHS]
    ids = torch.randint(
        embed.num_embeddings, (2, sum(lengths)), generator=torch.Generator().manual_seed(0)
    )
    tolerance = TOLERANCE if embed.weight.dtype == torch.float32 else HALF_TOLERANCE
    with torch.no_grad():
        embeddings, others = embed(ids[0]), embed(ids[1])
        alone = _states_alone(path, model, embeddings, lengths)
        _check_output_layer(path, model, embeddings[: lengths[0]], alone[: lengths[0]], tolerance)
        last = slice(-lengths[-1], None)
        others[last] = embeddings[last]  # the same sequence, after two different ones
        for layout in (packed, padded):
            try:
                states = sequence_states(model, embeddings, lengths, layout)
                after_others = sequence_states(model, others, lengths, layout)
            except NOT_RUNNABLE:
                continue
            # Both batches have the same shapes and thus the same rounding, so the second
            # comparison can be stricter: it also finds small leaks.
            if (
                _distance(states, alone) <= tolerance
                and _distance(after_others[last], states[last]) <= tolerance / 10
            ):
                return layout
    raise UserError(
        f"{path} ({model.config.model_type}) gives a sequence other hidden states in a batch than "
        "alone, packed and padded, so clips would leak into each other. Use another language model."
    )


def layout_without_weights(model: PreTrainedModel, width: int) -> SequenceLayout:
    """Return a layout for a model of fake tensors, for planning: packed if that does not raise.

    Raises:
        UserError: the model runs neither packed nor padded.
    """
    for layout in _layouts(model):
        try:
            sequence_states(model, torch.zeros(sum(CHECK_LENGTHS), width), CHECK_LENGTHS, layout)
        except NOT_RUNNABLE:
            continue
        return layout
    raise UserError(
        f"A run with a {model.config.model_type!r} language model cannot be planned: it does not "
        "run without its weights."
    )


def _layouts(model: PreTrainedModel) -> tuple[SequenceLayout, SequenceLayout]:
    """Return the packed and the padded layout of a model."""
    windows = (getattr(model.config, name, None) for name in WINDOWS)
    window = min((window for window in windows if isinstance(window, int)), default=None)
    attention: Any = model.config._attn_implementation
    return SequenceLayout(True, window, attention), SequenceLayout(False, window, attention)


def sequence_states(
    model: PreTrainedModel, embeddings: Tensor, lengths: Sequence[int], layout: SequenceLayout
) -> Tensor:
    """Run a language model on separate sequences that are stored end to end.

    Args:
        embeddings: `[ΣL, W]`, with L in `lengths`.
        layout: see `find_layout`.

    Returns:
        The last hidden states `[ΣL, W]`.
    """
    longest = max(lengths)
    if layout.packed and longest <= (layout.longest_packed or longest):
        return packed_states(model, embeddings, lengths)
    # Do not restore this after the call: layers that are recomputed in the backward pass need it.
    model.config._attn_implementation = layout.attention
    # Pad on the right: causal layers then never see the padding, even if they ignore the mask.
    padded = pad_sequence(list(embeddings.split(list(lengths))), batch_first=True)
    mask = upload(_mask(lengths, "right"), embeddings.device)
    states = model.base_model(inputs_embeds=padded, attention_mask=mask, use_cache=False)
    rows = [torch.arange(length) + i * longest for i, length in enumerate(lengths)]
    rows = upload(torch.cat(rows), embeddings.device)
    own = states.last_hidden_state.flatten(0, 1).index_select(0, rows)
    return own.to(embeddings.dtype)  # Mamba returns float32


def packed_states(model: PreTrainedModel, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run a language model packed: embeddings `[ΣL, W]` → last hidden states `[ΣL, W]`."""
    # Do not restore this after the call: layers that are recomputed in the backward pass need it.
    model.config._attn_implementation = PACKED
    positions = torch.cat([torch.arange(length) for length in lengths])
    states = model.base_model(
        inputs_embeds=embeddings[None],
        position_ids=upload(positions[None], embeddings.device),
        use_cache=False,
        segments=Segments.of(lengths, lengths, embeddings.device),
    )
    return states.last_hidden_state[0]


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    segments: Segments,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each packed sequence: `[1, H, ΣL, d]` → `[1, ΣL, H, d]`.

    Implements the attention interface of transformers.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = clip_attention(q, k, v, segments, causal=True, dropout=dropout, scale=scaling)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _packed_attention)


def greedy_tokens(
    model: PreTrainedModel,
    embeddings: Tensor,
    lengths: Sequence[int],
    layout: SequenceLayout,
    *,
    end: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each sequence by greedy decoding with `generate` of transformers.

    Args:
        embeddings: embeddings of the packed prompts, `[ΣL, W]`, with L in `lengths`.
        layout: see `find_layout`. Models that cannot run packed continue one sequence at a time,
            because left padding would enter their state.
        end: the token at which a sequence stops.

    Returns:
        The new tokens of each sequence, without `end`.
    """
    sequences = list(embeddings.split(list(lengths)))
    batches = [sequences] if layout.packed else [[sequence] for sequence in sequences]
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
    )
    before = model.config._attn_implementation
    model.config._attn_implementation = layout.attention
    answers: list[list[int]] = []
    try:
        for batch in batches:
            padded = pad_sequence(batch, batch_first=True, padding_side="left")
            mask = _mask([len(sequence) for sequence in batch], "left").to(padded.device)
            try:
                tokens: Any = model.generate(  # pyright: ignore[reportCallIssue]
                    inputs_embeds=padded,
                    attention_mask=mask,
                    generation_config=greedy,
                    # Ranks generate different numbers of texts. Each has the whole model here.
                    synced_gpus=False,
                )
                answers += tokens.tolist()
            except ValueError:  # Falcon-H1, for example, cannot generate from embeddings
                answers += [_greedy_without_cache(model, one, end, max_new_tokens) for one in batch]
    finally:
        model.config._attn_implementation = before
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]


def _greedy_without_cache(
    model: PreTrainedModel, sequence: Tensor, end: int, max_new_tokens: int
) -> list[int]:
    """Continue a sequence `[L, W]` by running all of its positions for each token."""
    embed: Any = model.get_input_embeddings()
    answer: list[int] = []
    while len(answer) < max_new_tokens and end not in answer:
        logits = model(inputs_embeds=sequence[None], use_cache=False).logits[0, -1]
        answer.append(int(logits.argmax()))
        token = torch.tensor(answer[-1:], device=sequence.device)
        sequence = torch.cat([sequence, embed(token)])
    return answer


def recompute_layers(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing of every layer.

    Hugging Face's own switch works only in training mode, but a frozen model stays in eval mode.
    """
    options = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(model)}
    for layer in _layers(model):
        layer.forward = partial(checkpoint, layer.forward, **options)


def compile_layers(model: PreTrainedModel) -> None:
    """Run every layer through `torch.compile`; see `attention.compile_layer`."""
    for layer in _layers(model):
        forward = layer.forward
        if isinstance(forward, partial):  # of `recompute_layers`
            compiled = compile_layer(*forward.args)
            layer.forward = partial(forward.func, compiled, **forward.keywords)
        else:
            layer.forward = compile_layer(forward)


def _layers(model: PreTrainedModel) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def weights_hash(module: nn.Module) -> str:
    """Return a hash of all weights, which does not depend on their device."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _states_alone(
    path: str, model: PreTrainedModel, embeddings: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Run the model's own forward pass on each sequence alone and concatenate the states."""
    try:
        alone = [
            model.base_model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0]
            for sequence in embeddings.split(list(lengths))
        ]
    except NOT_RUNNABLE as error:
        raise UserError(
            f"{path} ({model.config.model_type}) gives no hidden states for embeddings: {error}. "
            "Use another language model."
        ) from None
    return torch.cat(alone).to(embeddings.dtype)


def _check_output_layer(
    path: str, model: PreTrainedModel, embeddings: Tensor, states: Tensor, tolerance: float
) -> None:
    """Raise `UserError` if the model's logits are not hidden states times the output embedding.

    The error names settings that cause this, such as logit scaling, soft-capping or an output bias.
    """
    head: Any = model.get_output_embeddings()
    causes = [
        name
        for name, value in model.config.to_dict().items()
        if "logit" in name and ("cap" in name or "scal" in name) and value not in (None, 0, 1)
    ]
    if getattr(head, "bias", None) is not None:
        causes.append("an output bias")
    logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    ours = states @ head.weight.T
    if causes or ours.shape != logits.shape or _distance(ours, logits) > tolerance:
        raise UserError(
            f"{path}: its logits are not hidden states times the output embedding "
            f"({', '.join(causes) or model.config.model_type}). Use another language model."
        )


def _mask(lengths: Sequence[int], padding_side: str) -> Tensor:
    ones = [torch.ones(length, dtype=torch.long) for length in lengths]
    return pad_sequence(ones, batch_first=True, padding_side=padding_side)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest L2 distance between two vectors, relative to the norm of `other`'s.

    NaN counts as infinite.
    """
    one, other = one.float(), other.float()
    distance = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-9)
    return float(distance.nan_to_num(nan=float("inf")).max())
