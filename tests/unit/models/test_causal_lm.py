"""The language model as a decoder: equal to a naive pass over one whole sequence after another, and
frozen where it says so.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support import REPOSITORY
from tests.support.decoders import TEXTS, build_causal_lm, frames_and_lengths, targets_of
from whisper_aut.data.batch import Targets
from whisper_aut.data.targets import AUDIO
from whisper_aut.errors import UserError
from whisper_aut.models.language_model import load_language_model, weights_hash


@pytest.fixture(scope="module")
def tiny_llama(tiny_language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another architecture: no norms on queries, an output embedding of its own, every head with
    its own keys.
    """
    _, tokenizer = load_language_model(str(tiny_language_model))
    out = tmp_path_factory.mktemp("llama") / "tiny"
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes)
    ).save_pretrained(out)  # pyright: ignore
    tokenizer.save_pretrained(out)
    return out


def naive_losses(
    model: Any, adapter: Any, frames: Tensor, lengths: tuple[int, ...], targets: Targets
) -> list[Tensor]:
    """One clip at a time through the whole model, all logits, the labels that are not to be learned
    masked by -100.
    """
    losses = []
    clips = zip(
        frames.split(lengths),
        targets.tokens.split(targets.lengths),
        targets.supervised.split(targets.lengths),
        strict=True,
    )
    for clip, tokens, supervised in clips:
        at = tokens.tolist().index(AUDIO)
        audio, _ = adapter(clip, (len(clip),))
        embed = model.get_input_embeddings()
        sequence = torch.cat([embed(tokens[:at]), audio, embed(tokens[at + 1 :])])
        labels = torch.full((len(sequence),), -100)
        labels[len(sequence) - len(tokens) + at + 1 :] = torch.where(supervised, tokens, -100)[
            at + 1 :
        ]
        logits = model(inputs_embeds=sequence[None]).logits[0].float()
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
            )
        )
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_loss_and_gradients_equal_a_naive_pass(
    architecture: str,
    checkpointing: bool,
    tiny_whisper: Path,
    tiny_language_model: Path,
    tiny_llama: Path,
):
    path = tiny_language_model if architecture == "qwen3" else tiny_llama
    decoder, codec = build_causal_lm(tiny_whisper, path, checkpointing=checkpointing)
    frames, lengths = frames_and_lengths()
    frames.requires_grad_(True)
    targets = targets_of(codec)
    loss = decoder.loss(frames, lengths, targets)
    loss.total.backward()
    ours = {
        "frames": frames.grad,
        **{name: p.grad for name, p in decoder.adapter.named_parameters()},
    }

    again = frames.detach().clone().requires_grad_(True)
    decoder.adapter.zero_grad()
    reference = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False).eval()
    expected = naive_losses(reference, decoder.adapter, again, lengths, targets)
    torch.stack(expected).sum().backward()
    per_clip = torch.stack([part.sum() for part in loss.token_nll.split(loss.counts)])
    assert_close(per_clip, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    theirs = {
        "frames": again.grad,
        **{name: p.grad for name, p in decoder.adapter.named_parameters()},
    }
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-5 * max(float(grad.norm()), 1e-2), name


def test_generation_equals_the_model_clip_by_clip(tiny_whisper: Path, tiny_language_model: Path):
    decoder, codec = build_causal_lm(tiny_whisper, tiny_language_model)
    frames, lengths = frames_and_lengths()
    prompts = targets_of(codec).prompts()
    written = decoder.generate(frames, lengths, prompts, max_new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    for clip, prompt, answer in zip(frames.split(lengths), prompts, written, strict=True):
        at, embed = prompt.tolist().index(AUDIO), model.get_input_embeddings()
        audio, _ = decoder.adapter(clip, (len(clip),))
        sequence = torch.cat([embed(prompt[:at]), audio, embed(prompt[at + 1 :])])
        expected: list[int] = []
        while len(expected) < 6:
            best = int(model(inputs_embeds=sequence[None]).logits[0, -1].argmax())
            if best == decoder.end_token:
                break
            expected.append(best)
            sequence = torch.cat([sequence, embed(torch.tensor([best]))])
        assert answer == expected


def test_in_half_precision_it_answers_too(tiny_whisper: Path, tiny_language_model: Path):
    """As `whisper-aut chat --dtype bf16` runs it."""
    decoder, codec = build_causal_lm(tiny_whisper, tiny_language_model)
    frames, lengths = frames_and_lengths()
    prompts = targets_of(codec).prompts()
    written = decoder.to(torch.bfloat16).generate(frames.bfloat16(), lengths, prompts, 6)
    assert len(written) == len(prompts)
    assert all(len(answer) <= 6 for answer in written)


def test_frozen_weights_do_not_change_and_are_not_in_the_state_dict(
    tiny_whisper: Path, tiny_language_model: Path
):
    decoder, codec = build_causal_lm(tiny_whisper, tiny_language_model)
    before = weights_hash(AutoModelForCausalLM.from_pretrained(tiny_language_model))
    frames, lengths = frames_and_lengths()
    optimizer = torch.optim.AdamW(decoder.trainable_parameters(), lr=1e-2)
    decoder.train()
    assert decoder.adapter.training
    assert not any(module.training for module in decoder.model.modules())
    for _ in range(3):
        decoder.loss(frames, lengths, targets_of(codec)).total.backward()
        optimizer.step()
    assert all(p.grad is None for p in decoder.model.parameters())
    state = decoder.state_dict()
    assert {name.split(".")[0] for name in state} == {"adapter", "_extra_state"}
    assert state["_extra_state"]["language_model"] == str(tiny_language_model)
    fresh, _ = build_causal_lm(tiny_whisper, tiny_language_model)
    assert weights_hash(fresh.model) == weights_hash(fresh.model)
    fresh.load_state_dict(state)
    for name, parameter in decoder.model.named_parameters():
        assert_close(parameter, dict(fresh.model.named_parameters())[name], rtol=0, atol=0)
    assert_close(fresh.adapter.state_dict(), decoder.adapter.state_dict())
    assert before == state["_extra_state"]["weights"]


def test_a_checkpoint_needs_its_language_model(
    tiny_whisper: Path, tiny_language_model: Path, tiny_llama: Path
):
    decoder, _ = build_causal_lm(tiny_whisper, tiny_language_model)
    other, _ = build_causal_lm(tiny_whisper, tiny_llama)
    with pytest.raises(UserError, match=r"but .* has weights"):
        other.load_state_dict(decoder.state_dict())


def test_a_random_language_model_is_the_same_one_every_time(
    tiny_whisper: Path, tiny_language_model: Path
):
    one, _ = build_causal_lm(tiny_whisper, tiny_language_model, random_init=True)
    torch.randn(3)
    other, _ = build_causal_lm(tiny_whisper, tiny_language_model, random_init=True)
    pretrained, _ = build_causal_lm(tiny_whisper, tiny_language_model)
    assert one.identity["weights"] == other.identity["weights"] != pretrained.identity["weights"]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_trained_parts_learn_and_travel_in_the_state(
    train: str, tiny_whisper: Path, tiny_language_model: Path
):
    decoder, codec = build_causal_lm(
        tiny_whisper, tiny_language_model, train=train, lora={"rank": 4}
    )
    trained = [name for name, p in decoder.model.named_parameters() if p.requires_grad]
    assert all(("lora_" in name) == (train == "lora") for name in trained)
    frames, lengths = frames_and_lengths()
    optimizer = torch.optim.AdamW(decoder.trainable_parameters(), lr=1e-2)
    first = decoder.loss(frames, lengths, targets_of(codec)).total.item()
    for _ in range(5):
        optimizer.zero_grad()
        decoder.loss(frames, lengths, targets_of(codec)).total.backward()
        optimizer.step()
    state = decoder.state_dict()
    kept = {name.removeprefix("model.") for name in state if name.startswith("model.")} - {
        "lm_head.weight"
    }
    assert kept == set(trained)
    fresh, _ = build_causal_lm(tiny_whisper, tiny_language_model, train=train, lora={"rank": 4})
    fresh.load_state_dict(state)
    again = fresh.loss(frames, lengths, targets_of(codec)).total.item()
    assert again == pytest.approx(
        decoder.loss(frames, lengths, targets_of(codec)).total.item(), rel=1e-6
    )
    assert again < first


def test_lora_dropout_acts_in_training_only(tiny_whisper: Path, tiny_language_model: Path):
    lora = {"rank": 4, "dropout": 0.5}
    decoder, codec = build_causal_lm(tiny_whisper, tiny_language_model, train="lora", lora=lora)
    for name, weight in decoder.model.named_parameters():
        if "lora_B" in name:  # which is zero at first
            torch.nn.init.normal_(weight)
    inputs = (*frames_and_lengths(), targets_of(codec))
    losses = [decoder.train(mode).loss(*inputs).total.item() for mode in (True, True, False, False)]
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


def test_unusable_language_models_are_user_errors(
    tiny_whisper: Path, tiny_language_model: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="is neither a local directory nor a model"):
        build_causal_lm(tiny_whisper, Path("nobody/nothing-1b"))
    with pytest.raises(UserError, match="not a usable language model"):
        build_causal_lm(tiny_whisper, tmp_path)
    with pytest.raises(UserError, match="no task at all"):
        build_causal_lm(tiny_whisper, tiny_language_model, instructions={})


def test_empty_audio_never_moves_text_between_clips(tiny_whisper: Path, tiny_language_model: Path):
    """Clips of one frame with long ones: every loss is read from its own chat."""
    decoder, codec = build_causal_lm(tiny_whisper, tiny_language_model)
    lengths = (1, 90, 3)
    frames = torch.randn(94, 32, generator=torch.Generator().manual_seed(5))
    together = decoder.loss(frames, lengths, targets_of(codec))
    alone = [
        decoder.loss(clip, (len(clip),), targets_of(codec, (text,))).token_nll
        for clip, text in zip(frames.split(lengths), TEXTS, strict=True)
    ]
    assert_close(together.token_nll, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_qwen3_at_its_real_size_takes_a_step_within_12_gb(
    tiny_whisper: Path, tiny_language_model: Path, tmp_path: Path
):
    """The architecture of Qwen/Qwen3-0.6B with random weights, from a local directory, in a process
    whose memory is measured.
    """
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    }
    config = Qwen3Config(
        vocab_size=151_936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **sizes
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)  # pyright: ignore
    AutoTokenizer.from_pretrained(tiny_language_model).save_pretrained(tmp_path)
    script = f"""
import resource, torch
from pathlib import Path
from tests.support.decoders import build_causal_lm, targets_of
decoder, codec = build_causal_lm(Path({str(tiny_whisper)!r}), Path({str(tmp_path)!r}))
assert sum(p.numel() for p in decoder.model.parameters()) == 596_049_920
frames = torch.randn(1200, 32, requires_grad=True)
optimizer = torch.optim.AdamW(decoder.trainable_parameters())
decoder.loss(frames, (400, 400, 400), targets_of(codec)).total.backward()
optimizer.step()
assert frames.grad.abs().sum() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    peak_gib = float(finished.stdout.split()[-1])
    assert peak_gib < 12, peak_gib
