"""A causal language model of the hub, run on packed sequences.

In: a hub id or directory. Out: model and tokenizer; hidden states of sequences laid end to end. Next: `model.decoders.causal_lm`. Any
architecture of `transformers` fits that uses its attention interface and ends in a plain output embedding (Qwen, Llama, Mistral, …).
Weights load strictly and from safetensors only; no remote code runs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from whisper_aut.errors import UserError
from whisper_aut.model.attention import Segments, clip_attention
from whisper_aut.model.start import UNLOADABLE, describe_missing, quiet_loading, refuse_gaps
from whisper_aut.model.transfer import sent

PACKED = "whisper_aut_packed"  # our name among the attention implementations of transformers
KIND, EXAMPLE = "language model", "Qwen/Qwen3-0.6B"  # for messages
OUTPUT_EMBEDDING = "lm_head.weight"  # left out of checkpoints where it is the token embedding


# So that a run can be planned where the hub is out of reach; from the model's own config.json.
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
    """Return a language model's configuration: a directory's own, a known shape, or else what the hub says.

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

    Raises:
        UserError: nothing usable there, weights missing, or an output layer that `model.loss` does not compute.
    """
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
    tied = {OUTPUT_EMBEDDING} if model.config.tie_word_embeddings else set()
    refuse_gaps(path, info, tied, kind=KIND)
    _refuse_unknown_head(path, model)
    return model, tokenizer


def packed_states(model: PreTrainedModel, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run the model on sequences laid end to end, each on its own: `[ΣL, W]` → last hidden states `[ΣL, W]`.

    Raises:
        UserError: a sequence is longer than the model's attention window.
    """
    window = getattr(model.config, "sliding_window", None)
    if window and max(lengths) > window:
        raise UserError(
            f"A sequence of {max(lengths)} positions exceeds the language model's attention window of {window}."
        )
    # Set for good, not for this call: a layer that is recomputed in the backward pass must find it there.
    model.config._attn_implementation = PACKED
    positions = sent(torch.cat([torch.arange(length) for length in lengths]), embeddings.device)
    segments = Segments.of(lengths, lengths, embeddings.device)
    states = model.base_model(
        inputs_embeds=embeddings[None],
        position_ids=positions[None],
        use_cache=False,
        segments=segments,
    )
    return states.last_hidden_state[0]


@contextmanager
def padded_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model take padded batches and caches, as its own `generate` does."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before


def recompute_layers(model: PreTrainedModel) -> None:
    """Recompute every layer in the backward pass instead of keeping its activations.

    Hugging Face's own switch works only in training mode, and a frozen model is held in eval mode.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # pyright: ignore[reportAttributeAccessIssue]


def weights_hash(module: nn.Module) -> str:
    """Return a hash of all weights, whatever device they lie on."""
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
    """Hugging Face's attention interface on one packed row: `[1, H, N, d]` → `[1, N, H, d]`, causal inside each sequence."""
    groups = query.shape[1] // key.shape[1]  # query heads per key head
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    k, v = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (k, v))
    return clip_attention(q, k, v, segments, causal=True, dropout=dropout, scale=scaling)[
        None
    ], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _attend)


def _refuse_unknown_head(path: str, model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    changed = [
        name
        for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
        if getattr(model.config, name, None)
    ]
    if getattr(head, "bias", None) is not None:
        changed.append("an output bias")
    if changed:
        raise UserError(
            f"{path}: its logits are more than states times embeddings ({', '.join(changed)}); pick another model."
        )
