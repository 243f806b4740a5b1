"""How language models run on batches: every architecture packed, padded or rejected, and no clip
sees another.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.decoders import frames_and_lengths, targets_of
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.language_model import (
    find_layout,
    greedy_tokens,
    load_language_model,
    sequence_states,
)
from whisper_aut.models.pretrained import PretrainedWhisper, whisper_config_of_size
from whisper_aut.training.plan import StepShape, step_cost

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
PACKED = {
    "qwen3": HEADS,
    "llama": GROUPED,
    "mistral": HEADS | {"sliding_window": 4},
    "gemma3_text": HEADS | LOCAL | {"query_pre_attn_scalar": 8},
    "gpt2": GPT,
    "gpt_neox": SIZES | {"max_position_embeddings": 128},
    "qwen3_moe": HEADS | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
PADDED = {
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 128,
    },
    "mamba": STATE,
    "rwkv": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "context_length": 64,
    },
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "falcon": SIZES | {"new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": GROUPED | {"mamba_d_ssm": 64, **MAMBA_HEADS},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": HEADS | LOCAL | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_5_text": HEADS
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
REJECTED = {
    "gemma2": (HEADS | {"query_pre_attn_scalar": 8}, "final_logit_softcapping"),
    "cohere": (GROUPED, "logit_scale"),
    "phi": (SIZES, "an output bias"),
}
LENGTHS = (9, 3, 14, 6)


def random_model(kind: str, options: dict[str, Any], vocabulary: int = 120) -> PreTrainedModel:
    """A tiny model whose every weight matters: at the usual small weights a leak is as small."""
    torch.manual_seed(0)
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **tokens, **options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def alone(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """The model's own forward pass on one sequence `[L, W]`."""
    return model.base_model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
@torch.no_grad()
def test_a_sequence_has_the_same_states_and_answer_alone_and_in_a_batch(kind: str):
    model = random_model(kind, (PACKED | PADDED)[kind])
    embed: Any = model.get_input_embeddings()
    embeddings = embed(torch.randint(120, (sum(LENGTHS),)))
    expected = [alone(model, sequence) for sequence in embeddings.split(LENGTHS)]
    continued = [_naive_greedy(model, sequence) for sequence in embeddings.split(LENGTHS)]
    layout = find_layout(kind, model)
    assert layout.packed == (kind in PACKED)
    states = sequence_states(model, embeddings, LENGTHS, layout)
    assert_close(states, torch.cat(expected), atol=2e-5, rtol=1e-5)
    options = {"end": 2, "max_new_tokens": 5}
    assert greedy_tokens(model, embeddings, LENGTHS, layout, **options) == continued


def _naive_greedy(model: PreTrainedModel, sequence: Tensor) -> list[int]:
    answer: list[int] = []
    embed: Any = model.get_input_embeddings()
    while len(answer) < 5:
        best = int(model(inputs_embeds=sequence[None], use_cache=False).logits[0, -1].argmax())
        if best == 2:
            break
        answer.append(best)
        sequence = torch.cat([sequence, embed(torch.tensor([best]))])
    return answer


@pytest.mark.parametrize("kind", ["gpt_neo", "mamba", "lfm2"])
def test_the_check_sees_the_leaks_of_half_precision_models_too(kind: str):
    assert not find_layout(kind, random_model(kind, PADDED[kind]).bfloat16()).packed
    assert find_layout("qwen3", random_model("qwen3", PACKED["qwen3"]).bfloat16()).packed


@pytest.mark.parametrize("kind", REJECTED)
def test_models_that_change_their_logits_are_rejected_with_the_setting(kind: str):
    options, why = REJECTED[kind]
    with pytest.raises(UserError, match=rf"org/{kind}: its logits are not hidden states .*{why}"):
        find_layout(f"org/{kind}", random_model(kind, options))


def test_a_model_that_leaks_even_padded_is_rejected():
    model = random_model("llama", PACKED["llama"])
    # Every sequence of a batch takes in the mean of the others.
    norm: Any = model.base_model.norm
    norm.register_forward_hook(lambda module, inputs, out: out + out.mean(dim=(0, 1)))
    with pytest.raises(
        UserError, match=r"org/llama \(llama\) gives a sequence other hidden states.*leak"
    ):
        find_layout("org/llama", model)


def test_the_check_leaves_the_global_generator_and_the_model_as_they_were():
    model = random_model("llama", PACKED["llama"])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_layout("llama", model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", "bloom", "lfm2", "mamba"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_clips_loss_gradient_and_answer_do_not_depend_on_its_batch(
    kind: str,
    checkpointing: bool,
    tiny_whisper: Path,
    tiny_language_model: Path,
    tmp_path: Path,
):
    """The whole decoder: loss per token, gradients of frames, texts, in a batch and alone."""
    _, tokenizer = load_language_model(str(tiny_language_model))
    sizes = (PACKED | PADDED)[kind] | {"tie_word_embeddings": True}
    random_model(kind, sizes, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    values = {
        "name": "causal_lm",
        "language_model": str(tmp_path),
        "instructions": {"caption": {"prompts": ["Describe it."]}},
    }
    entry, options = check_decoder(values)
    decoder, codec = entry.build(PretrainedWhisper(str(tiny_whisper)), options, checkpointing)
    frames, lengths = frames_and_lengths()
    frames.requires_grad_(True)
    texts = ("rain falls", "a dog barks twice", "seven")
    together = decoder.loss(frames, lengths, targets_of(codec, texts))
    together.total.backward()
    gradient, frames.grad = frames.grad, None
    losses = []
    for clip, text in zip(frames.split(lengths), texts, strict=True):
        loss = decoder.loss(clip, (len(clip),), targets_of(codec, (text,)))
        loss.total.backward()
        losses.append(loss.token_nll)
    assert_close(together.token_nll, torch.cat(losses), atol=1e-4, rtol=1e-4)
    assert_close(gradient, frames.grad, atol=1e-4, rtol=1e-3)
    assert decoder.flops(lengths, targets_of(codec, texts)) > 0
    prompts = targets_of(codec, texts).prompts()
    clips = frames.detach().split(lengths)
    answers = [
        decoder.generate(clip, (len(clip),), [prompt], max_new_tokens=5)[0]
        for clip, prompt in zip(clips, prompts, strict=True)
    ]
    assert decoder.generate(frames.detach(), lengths, prompts, max_new_tokens=5) == answers


@torch.no_grad()
def test_a_batch_with_a_sequence_beyond_the_attention_window_is_padded():
    model = random_model("mistral", PACKED["mistral"])
    embed: Any = model.get_input_embeddings()
    embeddings = embed(torch.randint(120, (sum(LENGTHS),)))
    expected = torch.cat([alone(model, part) for part in embeddings.split(LENGTHS)])
    layout = find_layout("mistral", model)
    assert (layout.packed, layout.longest_packed) == (True, 4)
    unlimited = sequence_states(model, embeddings, LENGTHS, replace(layout, longest_packed=None))
    assert not torch.allclose(unlimited, expected, atol=1e-2)
    states = sequence_states(model, embeddings, LENGTHS, layout)
    assert_close(states, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "falcon", "lfm2"])
def test_a_run_can_be_planned_whatever_the_layout(kind: str, tmp_path: Path):
    random_model(kind, (PACKED | PADDED)[kind]).config.save_pretrained(tmp_path)
    values = {
        "name": "causal_lm",
        "language_model": str(tmp_path),
        "instructions": {"caption": {"prompts": ["Describe it."]}},
    }
    entry, options = check_decoder(values)
    config = whisper_config_of_size(32, 2, 2, 2, 80, 320)
    shape = StepShape(mel_lengths=(300, 300), text_lengths=(20, 20))
    assert entry.build_meta is not None
    build_meta = entry.build_meta
    cost = step_cost(config, lambda config, again: build_meta(config, options, again), shape)
    assert cost.flops > 0
