"""Causal language models from the hub, run on sequences of different lengths.

Any architecture of `transformers` works whose logits are hidden states times the output embedding.
Models that mix positions only through the attention interface of `transformers` (Qwen, Llama,
Mistral, …) run packed. Models with a recurrent state or their own attention (Mamba, LFM2, GPT-Neo,
…) would leak from one sequence to the next, so they run on padded batches. `check_layout` tests
which layout works. Weights load strictly, from safetensors only; no remote code runs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from whisper_aut.models.attention import Segments, clip_attention
from whisper_aut.models.pretrained import (
    UNLOADABLE,
    check_loaded_weights,
    check_not_adapter,
    describe_missing,
    quiet_loading,
)

# Sequence lengths and relative tolerances of `check_layout`. A leak changes hidden states by about
# their own size, rounding only by the precision of the dtype.
CHECK_LENGTHS = (7, 12, 5)
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1
# Raised by architectures that do not support a call.
NOT_RUNNABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")
PACKED = "whisper_aut_packed"  # name of our attention implementation in transformers
KIND, EXAMPLE = "language model", "Qwen/Qwen3-0.6B"  # for error messages
OUTPUT_EMBEDDING = "lm_head.weight"  # missing from checkpoints with tied embeddings


# Copied from the model's config.json, so that runs can be planned without access to the hub.
KNOWN_SHAPES: dict[str, Any] = {
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


def language_config(path: str, revision: str = "") -> Any:
    """Return the configuration of a language model: from a directory, `KNOWN_SHAPES` or the hub.

    Args:
        path: directory or hub id.
        revision: branch, tag or commit on the hub. Empty for the default branch.

    Raises:
        UserError: there is no such directory or model.
    """
    if not Path(path).is_dir() and path in KNOWN_SHAPES:
        return KNOWN_SHAPES[path]
    try:
        with quiet_loading():
            return AutoConfig.from_pretrained(
                path, revision=revision or "main", trust_remote_code=False
            )
    except UNLOADABLE as error:
        raise UserError(describe_missing(path, error, kind=KIND, example=EXAMPLE)) from None


def load_language_model(
    path: str, revision: str = "", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        path: directory or hub id.
        revision: branch, tag or commit on the hub. Empty for the default branch.
        dtype: dtype of the weights.

    Raises:
        UserError: there is no usable model, it is a PEFT adapter, or weights are missing or
            unexpected.
    """
    if Path(path).is_dir():
        check_not_adapter(path)
    try:
        with quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                revision=revision or "main",
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
                output_loading_info=True,
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=revision or "main", trust_remote_code=False
            )
    except UNLOADABLE as error:
        raise UserError(describe_missing(path, error, kind=KIND, example=EXAMPLE)) from None
    # Check adapters on the hub only now: the load above has reported an unreachable hub.
    check_not_adapter(path, revision)
    tied = {OUTPUT_EMBEDDING} if model.config.tie_word_embeddings else set()
    check_loaded_weights(path, info, tied, kind=KIND)
    return model, tokenizer


@dataclass(frozen=True)
class SequenceLayout:
    """How a language model runs on a batch of sequences.

    Attributes:
        packed: run sequences end to end, with attention within each. Otherwise run a padded batch
            with the model's own attention mask.
        longest_packed: the longest sequence that can be packed, which is the model's attention
            window; None for any length. Batches with a longer sequence are padded, because the
            model applies the window in its own mask.
        generates: whether `generate` of transformers gives the same output for a padded batch as
            for each sequence alone.
        attention: name of the model's own attention implementation.
    """

    packed: bool = True
    longest_packed: int | None = None
    generates: bool = True
    attention: str = "sdpa"


def check_layout(path: str, model: PreTrainedModel) -> SequenceLayout:
    """Run a language model on three random sequences and return a layout that it supports.

    A layout is supported if every sequence has the same hidden states in a batch as alone. The
    packed layout is preferred.

    Args:
        path: name of the model, for error messages.
        model: the loaded model, in eval mode.

    Raises:
        UserError: the model does not run from embeddings, its logits are not hidden states times
            the output embedding, or it supports neither layout.
    """
    embed: Any = model.get_input_embeddings()
    window = _attention_window(model.config)
    lengths = [min(length, window or length) for length in CHECK_LENGTHS]
    ids = torch.randint(
        embed.num_embeddings, (2, sum(lengths)), generator=torch.Generator().manual_seed(0)
    )
    tolerance = TOLERANCE if embed.weight.dtype == torch.float32 else HALF_TOLERANCE
    model.generation_config = GenerationConfig()  # the model's own may enable sampling
    own_attention: Any = model.config._attn_implementation
    with torch.no_grad():
        embeddings, others = embed(ids[0]), embed(ids[1])
        alone = _states_alone(path, model, embeddings, lengths)
        _refuse_unknown_head(path, model, embeddings[: lengths[0]], alone[: lengths[0]], tolerance)
        last = slice(-lengths[-1], None)
        others[last] = embeddings[last]  # the same sequence, after two different ones
        for packed in (True, False):
            layout = SequenceLayout(packed, window, attention=own_attention)
            try:
                states, after_others = (
                    sequence_states(model, batch, lengths, layout) for batch in (embeddings, others)
                )
            except NOT_RUNNABLE:
                continue
            as_alone = _distance(states, alone) <= tolerance
            # Both batches have the same shapes and thus the same rounding, so a stricter tolerance
            # also finds small leaks.
            separate = _distance(after_others[last], states[last]) <= tolerance / 10
            if as_alone and separate:
                generates = _generates(model, embeddings, lengths, layout, tolerance)
                return replace(layout, generates=generates)
    raise UserError(
        f"{path} ({model.config.model_type}) gives other states for sequences in a batch than for "
        "each alone, packed and padded, so clips would leak into each other. Pick another language "
        "model."
    )


def layout_for_meta(model: PreTrainedModel, width: int) -> SequenceLayout:
    """Return a layout for a model of fake tensors, for planning: packed if that does not raise.

    Args:
        model: the model.
        width: width W of its embeddings.

    Raises:
        UserError: the model runs neither packed nor padded.
    """
    attention: Any = model.config._attn_implementation
    for packed in (True, False):
        layout = SequenceLayout(packed, _attention_window(model.config), attention=attention)
        try:
            sequence_states(model, torch.zeros(sum(CHECK_LENGTHS), width), CHECK_LENGTHS, layout)
        except NOT_RUNNABLE:
            continue
        return layout
    raise UserError(
        f"A run with a {model.config.model_type!r} language model cannot be planned: it does not "
        "run without its weights."
    )


def sequence_states(
    model: PreTrainedModel, embeddings: Tensor, lengths: Sequence[int], layout: SequenceLayout
) -> Tensor:
    """Run a language model on separate sequences that are stored end to end.

    Args:
        model: the language model.
        embeddings: `[ΣL, W]`.
        lengths: L per sequence.
        layout: how to run the model, see `check_layout`.

    Returns:
        The last hidden states `[ΣL, W]`.
    """
    if layout.packed and max(lengths) <= (layout.longest_packed or max(lengths)):
        return packed_states(model, embeddings, lengths)
    # Do not restore this after the call: layers that are recomputed in the backward pass need it.
    model.config._attn_implementation = layout.attention
    # Pad on the right: causal layers then never see the padding, even if they ignore the mask.
    padded = pad_sequence(embeddings.split(list(lengths)), batch_first=True)  # pyright: ignore[reportArgumentType]
    mask = _mask(lengths, "right").to(embeddings.device, non_blocking=True)
    longest = max(lengths)
    rows = [torch.arange(length) + i * longest for i, length in enumerate(lengths)]
    rows = torch.cat(rows).to(embeddings.device, non_blocking=True)
    states = model.base_model(inputs_embeds=padded, attention_mask=mask, use_cache=False)
    own = states.last_hidden_state.flatten(0, 1).index_select(0, rows)
    return own.to(embeddings.dtype)  # Mamba returns float32


def packed_states(model: PreTrainedModel, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run a language model packed: embeddings `[ΣL, W]` → last hidden states `[ΣL, W]`."""
    # Do not restore this after the call: layers that are recomputed in the backward pass need it.
    model.config._attn_implementation = PACKED
    positions = torch.cat([torch.arange(length) for length in lengths]).to(
        embeddings.device, non_blocking=True
    )
    segments = Segments.of(lengths, lengths, embeddings.device)
    states = model.base_model(
        inputs_embeds=embeddings[None],
        position_ids=positions[None],
        use_cache=False,
        segments=segments,
    )
    return states.last_hidden_state[0]


def greedy_tokens(
    model: PreTrainedModel,
    embeddings: Tensor,
    lengths: Sequence[int],
    layout: SequenceLayout,
    *,
    end: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each sequence by greedy decoding.

    Args:
        model: the language model.
        embeddings: embeddings of the packed prompts, `[ΣL, W]`.
        lengths: L per sequence.
        layout: how to run the model, see `check_layout`.
        end: the token at which a sequence stops.
        max_new_tokens: the most tokens to generate per sequence.

    Returns:
        The new tokens of each sequence, without `end`.
    """
    sequences = list(embeddings.split(list(lengths)))
    if layout.generates:
        written = _generated(model, sequences, layout, end, max_new_tokens).sequences.tolist()
        return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in written]
    # `generate` does not work for this model: run all positions for each token, without a cache.
    answers: list[list[int]] = [[] for _ in sequences]
    growing = list(range(len(sequences)))
    embed: Any = model.get_input_embeddings()
    weight: Any = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    for _ in range(max_new_tokens):
        parts = [sequences[i] for i in growing]
        states = sequence_states(model, torch.cat(parts), [len(part) for part in parts], layout)
        last = torch.tensor([len(part) for part in parts]).cumsum(0) - 1
        best = (states[last.to(states.device)] @ weight.T).argmax(-1)
        for i, token in zip(list(growing), best.tolist(), strict=True):
            if token == end:
                growing.remove(i)
                continue
            answers[i].append(token)
            sequences[i] = torch.cat([sequences[i], embed(best.new_tensor([token]))])
        if not growing:
            break
    return answers


def recompute_layers(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing of every layer.

    Hugging Face's own switch works only in training mode, but a frozen model stays in eval mode.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # pyright: ignore[reportAttributeAccessIssue]


def weights_hash(module: nn.Module) -> str:
    """Return a hash of all weights, which does not depend on their device."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _attend(
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
    """Causal attention within each packed sequence: `[1, H, ΣL, d]` → `[1, ΣL, H, d]`.

    Implements the attention interface of transformers.
    """
    groups = query.shape[1] // key.shape[1]  # query heads per key head
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    k, v = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (k, v))
    return clip_attention(q, k, v, segments, causal=True, dropout=dropout, scale=scaling)[
        None
    ], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _attend)


def _refuse_unknown_head(
    path: str, model: PreTrainedModel, embeddings: Tensor, states: Tensor, tolerance: float
) -> None:
    """Raise `UserError` if the model's logits are not hidden states times the output embedding.

    The error names settings that cause this, such as logit scaling, soft-capping or an output bias.
    """
    head: Any = model.get_output_embeddings()
    changed = [
        name
        for name, value in model.config.to_dict().items()
        if "logit" in name and ("cap" in name or "scal" in name) and value not in (None, 0, 1)
    ]
    if getattr(head, "bias", None) is not None:
        changed.append("an output bias")
    logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    ours = states @ head.weight.T
    if changed or ours.shape != logits.shape or _distance(ours, logits) > tolerance:
        raise UserError(
            f"{path}: its logits are more than states times embeddings "
            f"({', '.join(changed) or model.config.model_type}); pick another model."
        )


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
            "Pick another language model."
        ) from None
    return torch.cat(alone).to(embeddings.dtype)


def _generates(
    model: PreTrainedModel,
    embeddings: Tensor,
    lengths: Sequence[int],
    layout: SequenceLayout,
    tolerance: float,
) -> bool:
    """Return whether two tokens from `generate` have the same logits as without a cache.

    The first token tests the padded prompt, the second one the cache.
    """
    sequences = embeddings.split(list(lengths))
    embed: Any = model.get_input_embeddings()
    try:
        written = _generated(model, sequences, layout, end=None, max_new_tokens=2)
    except NOT_RUNNABLE:
        return False
    longer = [
        torch.cat([sequence, embed(tokens[:1])])
        for sequence, tokens in zip(sequences, written.sequences, strict=True)
    ]
    longer_lengths = [length + 1 for length in lengths]
    states = sequence_states(model, torch.cat(longer), longer_lengths, layout).split(longer_lengths)
    weight: Any = model.get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    expected = torch.stack([own[-2:] @ weight.T for own in states])
    return _distance(torch.stack(written.logits, dim=1), expected) <= tolerance


def _generated(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    layout: SequenceLayout,
    end: int | None,
    max_new_tokens: int,
) -> Any:
    """Run `generate` of transformers on sequences `[L, W]`, as a left-padded batch with a mask."""
    padded = pad_sequence(list(sequences), batch_first=True, padding_side="left")
    mask = _mask([len(sequence) for sequence in sequences], "left").to(padded.device)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end or 0,
        use_cache=True,
        output_logits=end is None,
        return_dict_in_generate=True,
    )
    before = model.config._attn_implementation
    model.config._attn_implementation = layout.attention
    try:
        return model.generate(inputs_embeds=padded, attention_mask=mask, generation_config=greedy)  # pyright: ignore
    finally:
        model.config._attn_implementation = before


def _mask(lengths: Sequence[int], padding_side: str) -> Tensor:
    ones = [torch.ones(length, dtype=torch.long) for length in lengths]
    return pad_sequence(ones, batch_first=True, padding_side=padding_side)


def _attention_window(config: Any) -> int | None:
    windows = (getattr(config, name, None) for name in WINDOWS)
    return min((window for window in windows if isinstance(window, int)), default=None)


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest L2 distance between two vectors, relative to the norm of `other`'s.

    NaN counts as infinite.
    """
    one, other = one.float(), other.float()
    distance = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-9)
    return float(distance.nan_to_num(nan=float("inf")).max())
