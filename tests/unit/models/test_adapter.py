"""Adapters: windows stay inside clips, and the convolution is a convolution."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from whisper_aut.errors import UserError
from whisper_aut.models.adapters import (
    ADAPTERS,
    AdapterOptions,
    ConvAdapter,
    LayerFusion,
    StackAdapter,
    build_adapter,
    embedding_scale,
    windows,
)
from whisper_aut.schema import build

LENGTHS = (7, 1, 12)


def frames(width: int = 6) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("hop", [1, 4, 5])
def test_stacked_windows_equal_a_loop_over_clips(hop: int):
    stacked, counts = windows(frames(), LENGTHS, hop, hop)
    expected = []
    for clip in frames().split(LENGTHS):
        padded = torch.cat([clip, clip.new_zeros(-len(clip) % hop, clip.shape[1])])
        expected.append(padded.view(-1, hop * clip.shape[1]))
    assert counts == tuple(len(part) for part in expected)
    assert_close(stacked, torch.cat(expected))


def test_fused_layers_are_a_softmax_weighted_sum_of_normalised_states():
    states, fusion = torch.stack([frames(), 30 * frames() + 7], dim=1), LayerFusion(2)
    fusion.scores.data = torch.tensor([0.4, -1.0])
    weights = [math.exp(score) / (math.exp(0.4) + math.exp(-1.0)) for score in (0.4, -1.0)]
    expected = torch.zeros_like(frames())
    for index, weight in enumerate(weights):
        for frame, state in enumerate(states[:, index].double()):
            normed = (state - state.mean()) / (state.var(unbiased=False) + 1e-5).sqrt()
            expected[frame] += weight * normed
    assert_close(fusion(states), expected, atol=1e-5, rtol=1e-5)
    fusion(states).square().mean().backward()
    assert fusion.scores.grad is not None
    assert LayerFusion(4).scores.softmax(0).tolist() == [0.25] * 4


def test_the_conv_adapter_is_a_strided_convolution():
    torch.manual_seed(1)
    hop, adapter = 4, ConvAdapter(6, 8, hop=4, hidden=10, scale=0.5)
    out, counts = adapter(frames(), LENGTHS)
    convolution = nn.Conv1d(6, 10, kernel_size=2 * hop, stride=hop)
    linear = adapter.layers[0]
    convolution.weight.data = linear.weight.data.view(10, 2 * hop, 6).transpose(1, 2)
    convolution.bias.data = linear.bias.data
    expected = []
    for clip, count in zip(frames().split(LENGTHS), counts, strict=True):
        normed = adapter.norm_in(clip)
        padded = nn.functional.pad(normed.T, (hop // 2, count * hop + hop // 2 - len(clip)))
        expected.append(adapter.norm_out(adapter.layers[1:](convolution(padded[None])[0].T)))
    assert_close(out, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_clip_has_the_same_embeddings_alone_and_in_a_batch_at_the_scale_of_tokens(name: str):
    torch.manual_seed(0)
    embed = nn.Embedding.from_pretrained(torch.randn(50, 16) * 0.03)
    adapter = build_adapter(AdapterOptions(name, frames=5), 6, 16, embedding_scale(embed))
    out, counts = adapter(frames(), LENGTHS)
    assert counts == (2, 1, 3)
    alone = [adapter(clip, (len(clip),))[0] for clip in frames().split(LENGTHS)]
    assert_close(out, torch.cat(alone))
    if name != "linear":  # which has no norms
        assert float(out.detach().square().mean().sqrt()) == pytest.approx(
            float(embed.weight.square().mean().sqrt()), rel=0.02
        )


def test_the_linear_adapter_is_one_matrix_product():
    torch.manual_seed(0)
    adapter = build_adapter(AdapterOptions("linear", frames=1), 6, 16, 0.1)
    weight, bias = adapter.parameters()
    out, counts = adapter(frames(), LENGTHS)
    assert counts == LENGTHS
    assert_close(out, frames() @ weight.T + bias)


def test_the_initial_scale_is_that_of_the_embedding_layers_outputs():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=5000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    embed = Gemma3ForCausalLM(config).get_input_embeddings()
    returned = embed(torch.arange(5000)).detach()
    assert embedding_scale(embed) == pytest.approx(float(returned.square().mean().sqrt()), rel=1e-5)
    weights = float(embed.weight.detach().square().mean().sqrt())
    assert embedding_scale(embed) == pytest.approx(8 * weights, rel=1e-5)  # √64: Gemma's own factor


def test_bad_options_are_user_errors():
    with pytest.raises(UserError, match="Did you mean 'stack'"):
        build(AdapterOptions, {"name": "stac"}, "the adapter")
    with pytest.raises(UserError, match="frames: must be greater than 0"):
        build(AdapterOptions, {"frames": 0}, "the adapter")
    assert isinstance(build_adapter(AdapterOptions(), 6, 4, 1.0), StackAdapter)
