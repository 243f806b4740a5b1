"""The plan against real steps: its memory against PyTorch's allocator, its parameters and work against the built model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.conftest import REPOSITORY, encode_audio
from tests.training.test_train import settings_for
from whisper_aut.cli import main
from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.shards import ShardFolder
from whisper_aut.data.logmel import frames_with_context
from whisper_aut.data.pack import Targets, TokenTarget
from whisper_aut.model.decoders.whisper import (
    WhisperDecoder,
    WhisperDecoderOptions,
    sketch_whisper_decoder,
)
from whisper_aut.model.encoder import PackedEncoder
from whisper_aut.model.flops import encoder_flops, whisper_decoder_flops
from whisper_aut.training.accelerators import ACCELERATORS
from whisper_aut.training.build import stored_audio
from whisper_aut.training.forecast import Forecast
from whisper_aut.training.plan import StepCost, StepShape, device_memory, step_cost

MEL_LENGTHS, TEXT_LENGTHS = (300, 501, 770, 120), (12, 30, 7, 20)


def config(width: int = 64) -> WhisperConfig:
    sizes = {
        "d_model": width,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1
    )
    return WhisperConfig(**sizes, **heads, **tokens, vocab_size=2000, num_mel_bins=80)


def sketch(config: WhisperConfig, gradient_checkpointing: bool) -> torch.nn.Module:
    return sketch_whisper_decoder(config, WhisperDecoderOptions(), gradient_checkpointing)


def measured_peak_bytes(checkpointing: bool) -> int:
    """What PyTorch's allocator handed out at the worst moment of a real step, gradients included."""
    model = WhisperForConditionalGeneration(config()).train()
    encoder = PackedEncoder(model.model.encoder, "none", checkpointing).train()
    decoder = WhisperDecoder(model.model.decoder, 1, checkpointing).train()
    mel = torch.randn(sum(map(frames_with_context, MEL_LENGTHS)), 80)
    clips = [torch.ones(length, dtype=torch.long) for length in TEXT_LENGTHS]
    targets = Targets.pack([TokenTarget(clip, torch.arange(len(clip)) > 0, 1) for clip in clips])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        frames = encoder(mel, MEL_LENGTHS)
        decoder.loss(frames.values, frames.lengths, targets).total.backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_real_step_takes(checkpointing: bool):
    cost = step_cost(
        config(), sketch, StepShape(MEL_LENGTHS, TEXT_LENGTHS, gradient_checkpointing=checkpointing)
    )
    planned = cost.live_bytes + 4 * cost.trainable
    assert planned == pytest.approx(measured_peak_bytes(checkpointing), rel=0.15)


def test_parameters_and_work_are_the_models():
    cost = step_cost(config(), sketch, StepShape(MEL_LENGTHS, TEXT_LENGTHS))
    model = WhisperForConditionalGeneration(config())
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.trainable == cost.parameters - 1500 * 64  # the encoder's positions are fixed
    frames = [-(-length // 2) for length in MEL_LENGTHS]
    useful = encoder_flops(config(), MEL_LENGTHS, frames)
    useful += whisper_decoder_flops(
        config(), frames, TEXT_LENGTHS, sum(TEXT_LENGTHS) - len(TEXT_LENGTHS)
    )
    assert (
        useful < cost.flops < 1.1 * useful
    )  # attention computes its scores again in the backward pass
    again = step_cost(
        config(), sketch, StepShape(MEL_LENGTHS, TEXT_LENGTHS, gradient_checkpointing=True)
    )
    # Every layer runs forward once more, a third of its work, but for its last product, whose result no gradient needs.
    bare = config()
    bare.encoder_layers = bare.decoder_layers = 0
    layers = useful - encoder_flops(bare, MEL_LENGTHS, frames)
    layers -= whisper_decoder_flops(
        bare, frames, TEXT_LENGTHS, sum(TEXT_LENGTHS) - len(TEXT_LENGTHS)
    )
    last_products = 2 * 64 * 256 * (3 * sum(frames) + 2 * sum(TEXT_LENGTHS))
    assert again.flops - cost.flops == layers / 3 - last_products
    assert again.live_bytes < cost.live_bytes


def test_zero_stages_share_what_they_say():
    cost = StepCost(encoder=600, decoder=400, trainable=900, flops=0.0, operations=1, live_bytes=50)
    plain = device_memory(cost, stage=0, ranks=8, half_weights=False)
    assert (plain.weights, plain.gradients, plain.optimizer, plain.activations) == (
        4000,
        3600,
        7200,
        50,
    )
    one, two, three = (
        device_memory(cost, stage=stage, ranks=8, half_weights=True) for stage in (1, 2, 3)
    )
    assert (one.weights, one.gradients, one.optimizer) == (2000, 1800, 12 * 900 / 8)
    assert two.gradients == 225
    assert three.weights == 250
    assert device_memory(cost, stage=2, ranks=8, half_weights=True, offload=True).optimizer == 0


def test_the_papers_recipe_is_planned_from_known_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    small = ["model.path=openai/whisper-tiny", "data.batch_clips=2", "strategy=deepspeed_stage_2"]
    assert main(["plan", str(REPOSITORY / "conf" / "aut.yaml"), *small]) == 0
    shown = capsys.readouterr().out
    # 39 M in the paper's table, of which the encoder's 1,500 fixed positions are not trained.
    assert "encoder 8.2 M, decoder 29.6 M, trainable 37.2 M" in shown
    assert "2,500,000 steps" in shown  # two epochs of 20 M clips in steps of 2 × 8
    for device in ("H200", "H100", "A100 40", "RTX 4090"):
        assert device in shown


def test_a_chain_of_configs_is_planned_from_its_first_sizes(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(REPOSITORY / "conf" / "smoke.yaml")]) == 0
    assert "4 steps" in capsys.readouterr().out


def test_a_plan_with_lora_says_what_to_plan_instead(
    tiny_whisper: Path, tiny_language_model: Path, capsys: pytest.CaptureFixture[str]
):
    config = [
        str(REPOSITORY / "conf" / "aut.yaml"),
        "decoder=causal_lm",
        f"model.path={tiny_whisper}",
    ]
    config += [
        f"decoder.language_model={tiny_language_model}",
        "data.batch_clips=2",
        "strategy=auto",
    ]
    assert main(["plan", *config]) == 0
    assert main(["plan", *config, "decoder.train=lora"]) == 1
    assert "Plan with decoder.train=frozen" in " ".join(capsys.readouterr().err.split())


def test_what_fits_names_the_least_measure():
    cost = StepCost(
        encoder=10**9, decoder=0, trainable=10**9, flops=1e12, operations=1, live_bytes=10 * 2**30
    )
    lean = replace(cost, live_bytes=2**30)
    rest = {
        "offload": False,
        "precision": "bf16-mixed",
        "micro_batches": 1,
        "steps": 10,
        "step_audio_seconds": 1.0,
    }
    plan = Forecast(cost, cost, lean, ranks=8, stage=0, bytes_per_audio_second=1.0, **rest)
    cards = {device.name: plan.what_fits(device) for device in ACCELERATORS}
    assert cards["A100 40 GB"] == "fits as it is"
    assert cards["RTX 4090 24 GB"] == "one device or ddp + gradient checkpointing"
    huge = replace(
        plan,
        plain=replace(cost, live_bytes=2**40),
        checkpointed=replace(cost, live_bytes=2**40),
        cost=replace(cost, live_bytes=2**40),
    )
    assert huge.what_fits(ACCELERATORS[0]).startswith("too large")


def test_clips_count_as_often_as_they_are_drawn(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    for domain, clips, seconds in (("speech", 30, 0.5), ("sound", 5, 3.0)):
        with ShardFolder(tmp_path / domain) as shards:
            for number in range(clips):
                clip = encode_audio(np.zeros(round(16_000 * seconds), dtype=np.float32))
                shards.write(
                    f"{number}",
                    "wav",
                    clip,
                    Annotation(text="x", domain=domain, duration_seconds=seconds),
                )
    sources = ", ".join(
        f"{{path: {tmp_path / domain}, domain: {domain}}}" for domain in ("speech", "sound")
    )
    chosen = (f"data.train=[{sources}]", "data.domains={speech: 1, sound: 3, music: 0}")
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen)
    stored, assumptions = stored_audio(settings.data)
    assert (stored.clips, assumptions) == (35, ())
    assert stored.clip_seconds == pytest.approx(0.25 * 0.5 + 0.75 * 3.0)
    settings.data.mode = "epochs"  # every clip once
    assert stored_audio(settings.data)[0].clip_seconds == pytest.approx((30 * 0.5 + 5 * 3.0) / 35)
    settings.data.train[0].path = str(tmp_path / "nowhere")
    assert stored_audio(settings.data)[1] != ()
