"""Compiled layers: results of the eager ones, and one graph per kind of layer for all lengths.

On a GPU, packed attention is one operator of PyTorch. Here, an operator on the CPU with the same
arguments takes its place.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperDecoder as HFWhisperDecoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.support.decoders import tiny_configs
from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.models import attention
from whisper_aut.models.adapters import AdapterOptions, build_adapter
from whisper_aut.models.decoders.causal_lm import CausalLMDecoder
from whisper_aut.models.decoders.whisper import WhisperDecoder
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.training.doctor import find_compiler
from whisper_aut.training.plan import placeholder_targets

WHISPER, LANGUAGE = tiny_configs(layers=3)
# Mel frames and text tokens of the clips of each batch.
BATCHES = (
    ((120, 40, 40), (7, 9, 9)),
    ((64,), (11,)),
    ((30, 90, 200, 16), (6, 8, 7, 12)),
    ((100, 100), (8, 8)),
    ((33, 47, 61, 75, 75, 9), (9, 6, 7, 8, 12, 5)),
)


def clips(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor) -> Iterator[Any]:
    """Yield queries, keys and values of each clip, `[H, L, d]` float32, with a head per query."""
    groups = query.shape[1] // key.shape[1]
    for one in range(len(cu_q) - 1):
        rows = [slice(int(cu[one]), int(cu[one + 1])) for cu in (cu_q, cu_k, cu_k)]
        q, k, v = (
            x[row].float().transpose(0, 1) for x, row in zip((query, key, value), rows, strict=True)
        )
        yield rows, q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)


def probabilities(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = scale * q @ k.transpose(1, 2)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@torch.library.custom_op("whisper_aut_test::varlen", mutates_args=())
def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> Tensor:
    out = torch.empty_like(query).contiguous()
    for (rows, *_), q, k, v in clips(query, key, value, cu_q, cu_k):
        out[rows] = (probabilities(q, k, causal, scale) @ v).transpose(0, 1).to(out.dtype)
    return out


@torch.library.custom_op("whisper_aut_test::varlen_backward", mutates_args=())
def varlen_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = tuple(torch.empty_like(x).contiguous() for x in (query, key, value))
    heads = key.shape[1]
    for rows, q, k, v in clips(query, key, value, cu_q, cu_k):
        weights = probabilities(q, k, causal, scale)
        above = gradient[rows[0]].float().transpose(0, 1)
        inner = weights * (above @ v.transpose(1, 2))
        scores = inner - weights * inner.sum(-1, keepdim=True)
        of_keys = (scale * scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ above)
        grouped = (x.unflatten(0, (heads, -1)).sum(1) for x in of_keys)
        for to, row, value_ in zip(out, rows, (scale * scores @ k, *grouped), strict=True):
            to[row] = value_.transpose(0, 1).to(to.dtype)
    return out[0], out[1], out[2]


varlen.register_fake(lambda query, *_: torch.empty_like(query).contiguous())
varlen_backward.register_fake(
    lambda gradient, q, k, v, *_: tuple(torch.empty_like(x).contiguous() for x in (q, k, v))
)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.causal, ctx.scale = inputs[7:]


def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    gradients = varlen_backward(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return (*gradients, *[None] * 6)


varlen.register_autograd(backward, setup_context=save)


def varlen_attn(query: Tensor, *others: Any, window_size: Any, scale: float | None) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return varlen(query, *others, window_size == (-1, 0), scale)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run the graphs without generating code, and count them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)


def build(kind: str, checkpointing: bool) -> nn.ModuleList:
    torch.manual_seed(0)
    encoder = PackedEncoder(WhisperEncoder(WHISPER), gradient_checkpointing=checkpointing)
    if kind == "whisper":
        decoder: Any = WhisperDecoder(HFWhisperDecoder(WHISPER), 0, checkpointing)
    else:
        model = AutoModelForCausalLM.from_config(LANGUAGE).requires_grad_(False)
        adapter = build_adapter(AdapterOptions(), WHISPER.d_model, LANGUAGE.hidden_size, 1.0)
        decoder = CausalLMDecoder(model, adapter, 3, 0, {}, gradient_checkpointing=checkpointing)
    return nn.ModuleList([encoder, decoder]).to(torch.bfloat16).train()


def step(parts: nn.ModuleList, mel_lengths: Sequence[int], texts: Sequence[int]) -> Tensor:
    encoder, decoder = parts
    generator = torch.Generator().manual_seed(sum(mel_lengths))
    mel = torch.randn(sum(map(frames_with_context, mel_lengths)), 80, generator=generator)
    frames = encoder(mel, mel_lengths)
    return decoder.loss(frames.values, frames.lengths, placeholder_targets(texts)).total


def gradients(parts: nn.ModuleList, batch: tuple[Any, Any]) -> Tensor:
    """Return the gradients of a step as one float32 vector."""
    parts.zero_grad()
    step(parts, *batch).backward()
    found = [p.grad for p in parts.parameters() if p.grad is not None]
    return torch.cat([gradient.float().flatten() for gradient in found])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    # The first layer of a language model gets a view of the embeddings, and thus its own graph.
    [("whisper", 2), ("language model", 3)],
)
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # all that torch.compile does before it generates code
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler"),
        ),
    ],
)
def test_batches_of_all_lengths_share_one_graph_per_kind_of_layer(
    backend: str,
    kind: str,
    expected: int,
    checkpointing: bool,
    flash: None,
    graphs: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    exact, eager, compiled = (build(kind, checkpointing) for _ in range(3))
    exact.float()  # which takes SDPA instead of the operator
    for part in compiled:
        part.compile_layers()
    for batch in BATCHES:
        reference, *halves = (gradients(parts, batch) for parts in (exact, eager, compiled))
        errors = [float((half - reference).norm() / reference.norm()) for half in halves]
        assert errors[1] < 1.5 * errors[0] < 0.05, "compiled as exact as not, in bfloat16"
    assert graphs["unique_graphs"] == expected


def test_a_decoder_layer_with_flash_attention_is_one_graph_for_all_lengths(
    flash: None, graphs: Any
):
    parts = build("whisper", False)
    expected = [step(parts, *batch) for batch in BATCHES]
    parts[1].compile_layers()
    losses = [step(parts, *batch) for batch in BATCHES]
    assert_close(torch.stack(losses), torch.stack(expected), rtol=0.02, atol=0.02)
    assert graphs["unique_graphs"] == 1


def test_without_flash_attention_layers_are_not_compiled(graphs: Any):
    parts = build("whisper", False)
    expected = step(parts, *BATCHES[0])
    for part in parts:
        part.compile_layers()
    assert_close(step(parts, *BATCHES[0]), expected, rtol=0, atol=0)
    assert not graphs["unique_graphs"]
