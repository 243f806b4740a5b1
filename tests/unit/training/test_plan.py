"""The plan against real steps: its memory against PyTorch's allocator, its parameters and work
against the built model.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.support import REPOSITORY
from tests.support.audio import encode_audio
from tests.support.training import settings_for
from whisper_aut.audio.logmel import frames_with_context
from whisper_aut.cli import main
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.batch import Targets, TokenTarget
from whisper_aut.data.writer import ShardWriter
from whisper_aut.models.decoders.whisper import (
    WhisperDecoder,
    WhisperDecoderOptions,
    build_whisper_decoder_meta,
)
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.flops import encoder_flops, whisper_decoder_flops
from whisper_aut.training.factory import build_decoder, build_module, build_pretrained
from whisper_aut.training.plan import (
    ACCELERATORS,
    Accelerator,
    Compute,
    DeviceMemory,
    Forecast,
    StepCost,
    StepCounter,
    StepShape,
    build_forecast,
    needs_checkpointing,
    planned_config,
    step_cost,
    stored_audio,
)

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


def build_meta(config: WhisperConfig, gradient_checkpointing: bool) -> torch.nn.Module:
    return build_whisper_decoder_meta(config, WhisperDecoderOptions(), gradient_checkpointing)


def real_step(shape: StepShape) -> Callable[[], None]:
    """Return the forward and backward pass that a plan of this shape describes, on real tensors."""
    checkpointing, half = shape.gradient_checkpointing, shape.compute == "bfloat16"
    model = WhisperForConditionalGeneration(config()).train()
    encoder = PackedEncoder(model.model.encoder, "none", checkpointing).train()
    decoder = WhisperDecoder(model.model.decoder, 1, checkpointing).train()
    mel = torch.randn(sum(map(frames_with_context, MEL_LENGTHS)), 80)
    if half:
        encoder, decoder, mel = encoder.bfloat16(), decoder.bfloat16(), mel.bfloat16()
    clips = [torch.ones(length, dtype=torch.long) for length in TEXT_LENGTHS]
    targets = Targets.pack([TokenTarget(clip, torch.arange(len(clip)) > 0, 1) for clip in clips])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=shape.compute == "autocast"):
            frames = encoder(mel, MEL_LENGTHS)
            loss = decoder.loss(frames.values, frames.lengths, targets).total
        loss.backward()

    return step


def measured_peak_bytes(step: Callable[[], None]) -> int:
    """What PyTorch's allocator handed out at the worst moment of a real step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("compute", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_real_step_takes(checkpointing: bool, compute: Compute):
    shape = StepShape(
        MEL_LENGTHS, TEXT_LENGTHS, compute=compute, gradient_checkpointing=checkpointing
    )
    cost, step = step_cost(config(), build_meta, shape), real_step(shape)
    assert cost.peak_bytes == pytest.approx(measured_peak_bytes(step), rel=0.15)
    # The second micro-batch of a step finds the gradients of the first one.
    assert cost.activation_bytes == pytest.approx(measured_peak_bytes(step), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kernels_are_those_of_a_real_step(checkpointing: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("whisper_aut.onednn.mkl_is_slow", lambda: False)  # PyTorch's products
    shape = StepShape(MEL_LENGTHS, TEXT_LENGTHS, gradient_checkpointing=checkpointing)
    counted = StepCounter()
    step = real_step(shape)
    with counted:
        step()
    planned = step_cost(config(), build_meta, shape)
    assert planned.launches == pytest.approx(counted.kernels.total(), rel=0.01)
    assert planned.flops == sum(flops * times for (flops, _), times in counted.kernels.items())


def test_what_computes_nothing_is_no_kernel():
    with FakeTensorMode():
        x = torch.ones(4, 6)
        with StepCounter() as counter:
            assert x.device.type == "cpu"  # a question to the host, of fake tensors an operation
            y = x.view(2, 12).t()[1:]
            torch.empty_like(y)
            torch.empty(3)
            assert not counter.kernels
            y.add_(1)
            (x @ x.t()).relu()
    assert counter.kernels == {(0, 2 * 88): 1, (2 * 4 * 6 * 4, 2 * 96 + 64): 1, (0, 2 * 64): 1}


def test_parameters_and_work_are_the_models():
    cost = step_cost(config(), build_meta, StepShape(MEL_LENGTHS, TEXT_LENGTHS))
    model = WhisperForConditionalGeneration(config())
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.trainable == cost.parameters - 1500 * 64  # the encoder's positions are fixed
    frames = [-(-length // 2) for length in MEL_LENGTHS]
    useful = encoder_flops(config(), MEL_LENGTHS, frames)
    useful += whisper_decoder_flops(
        config(), frames, TEXT_LENGTHS, sum(TEXT_LENGTHS) - len(TEXT_LENGTHS)
    )
    assert cost.model_flops == useful
    # Attention computes its scores again in the backward pass.
    assert useful < cost.flops < 1.1 * useful
    again = step_cost(
        config(), build_meta, StepShape(MEL_LENGTHS, TEXT_LENGTHS, gradient_checkpointing=True)
    )
    # Every layer runs forward once more, a third of its work, but for its last product, whose
    # result no gradient needs. None of that is useful.
    bare = config()
    bare.encoder_layers = bare.decoder_layers = 0
    layers = useful - encoder_flops(bare, MEL_LENGTHS, frames)
    layers -= whisper_decoder_flops(
        bare, frames, TEXT_LENGTHS, sum(TEXT_LENGTHS) - len(TEXT_LENGTHS)
    )
    last_products = 2 * 64 * 256 * (3 * sum(frames) + 2 * sum(TEXT_LENGTHS))
    assert again.flops - cost.flops == layers / 3 - last_products
    assert again.model_flops == useful
    assert again.activation_bytes < cost.activation_bytes
    frozen = step_cost(
        config(), build_meta, StepShape(MEL_LENGTHS, TEXT_LENGTHS, train_encoder=False)
    )
    assert frozen.trainable == frozen.decoder
    assert 0.9 * frozen.flops < frozen.model_flops < frozen.flops
    assert frozen.model_flops < 0.6 * useful


COST = StepCost(
    encoder=600,
    decoder=400,
    trainable=900,
    model_flops=0.0,
    kernels=((0.0, 0, 1),),
    activation_bytes=50,
    peak_bytes=3_650,
)


def forecast(cost_of: Any, **changes: Any) -> Forecast:
    run = {
        "ranks": 1,
        "stage": 0,
        "offload": False,
        "precision": "bf16-mixed",
        "checkpointing": False,
        "micro_batches": 1,
        "steps": 10,
        "step_audio_seconds": 1.0,
        "bytes_per_audio_second": 1.0,
    }
    return Forecast(cost_of, **(run | changes))


def memory(stage: int, ranks: int = 8, **changes: Any) -> DeviceMemory:
    """Return the memory of a device with `COST`; the weights have 16 bits with any ZeRO stage."""
    return forecast(lambda *_: COST, ranks=ranks, **changes).memory(stage, checkpointing=False)


def test_zero_stages_share_what_they_say():
    plain = memory(0)
    assert (plain.weights, plain.gradients, plain.optimizer, plain.activations) == (
        4000,
        3600,
        7200,
        50,
    )
    one, two, three = map(memory, (1, 2, 3))
    # Gradients are summed in float32.
    assert (one.weights, one.gradients, one.optimizer) == (2000, 3600, 12 * 900 / 8)
    assert two.gradients == 450
    assert three.weights == 250
    offloaded = memory(2, offload=True)
    assert offloaded.gradients == offloaded.optimizer == 0


def test_gradients_count_twice_only_where_they_outlive_a_micro_batch():
    alone = memory(0, ranks=1)
    assert alone.gradients + alone.activations == COST.peak_bytes
    accumulating = memory(0, ranks=1, micro_batches=2)
    assert accumulating.gradients + accumulating.activations == 3600 + COST.activation_bytes


@pytest.mark.parametrize(("gib", "needed"), [(1, True), (100, False)])
def test_auto_recomputes_activations_where_a_run_would_not_fit(
    gib: int,
    needed: bool,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    chosen = ("model.gradient_checkpointing=auto", "hardware.accelerator=auto")
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen)
    assert not needs_checkpointing(settings), "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert needs_checkpointing(settings) == needed
    model = replace(settings.model, gradient_checkpointing=not needed)
    assert needs_checkpointing(replace(settings, model=model)) == (not needed)


def test_time_is_bound_by_products_by_memory_or_by_launches():
    card = Accelerator("card", "card", 80.0, 100.0, 50.0, terabytes_per_second=1.0)

    def step_seconds(*kernels: tuple[float, int, int], **changes: Any) -> float:
        cost = replace(COST, kernels=kernels, trainable=0)
        return forecast(lambda *_: cost, **changes).step_seconds(card)

    products, traffic = (60e12, 8, 2), (0.0, 800 * 10**9, 3)
    assert step_seconds(products) == pytest.approx(2.0)  # at 0.6 of 100 TFLOP/s
    assert step_seconds(products, precision="32-true") == pytest.approx(4.0)
    assert step_seconds(traffic) == pytest.approx(3.0)  # at 0.8 of 1 TB/s
    assert step_seconds(products, traffic, micro_batches=4) == pytest.approx(4 * 5.0)
    assert step_seconds((0.0, 8, 100_000)) == pytest.approx(1.0)
    trained = replace(COST, trainable=2 * 10**10)
    seconds = forecast(lambda *_: trained).step_seconds(card)
    assert seconds == pytest.approx(1.1, rel=1e-4)  # 44 bytes per parameter
    shared = forecast(lambda *_: trained, ranks=4, stage=2)
    assert shared.step_seconds(card) == pytest.approx(0.275, rel=1e-3)


def test_what_is_computed_again_is_utilisation_and_no_mfu():
    card = Accelerator("card", "card", 80.0, 100.0, 50.0, terabytes_per_second=1.0)
    cost = replace(COST, model_flops=90e12, kernels=((120e12, 1, 1),), trainable=0)
    useful, computed = forecast(lambda *_: cost, micro_batches=2).utilisation(card)
    assert (useful, computed) == (pytest.approx(0.45), pytest.approx(0.6))


def test_the_papers_recipe_is_planned_from_known_sizes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    batch = ["data.batch_seconds=null", "data.batch_clips=2"]
    small = ["model.path=openai/whisper-tiny", *batch, "strategy=deepspeed_stage_2"]
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


@pytest.mark.parametrize("chosen", ["decoder.train=lora", "model.lora_rank=4"])
def test_low_rank_updates_are_planned_as_they_are_trained(
    chosen: str, tiny_whisper: Path, tiny_language_model: Path, tiny_shards: Path, tmp_path: Path
):
    options = ("decoder=causal_lm", f"decoder.language_model={tiny_language_model}")
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *options, chosen)
    cost = build_forecast(settings, planned_config(settings.model)).cost
    pretrained = build_pretrained(settings)
    module = build_module(settings, pretrained, *build_decoder(settings, pretrained), 1)
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    assert cost.trainable == sum(trained)
    assert cost.parameters == sum(p.numel() for p in module.parameters())
    plain = settings_for(tiny_whisper, tiny_shards, tmp_path, *options)
    whole = build_forecast(plain, planned_config(plain.model)).cost
    more = chosen == "decoder.train=lora"  # low-rank updates come on top of a frozen model
    assert (cost.trainable > whole.trainable) is more
    assert (cost.model_flops > whole.model_flops) is more


def test_a_frozen_language_model_in_16_bits_takes_half_the_memory(
    tiny_whisper: Path, tiny_language_model: Path, tiny_shards: Path, tmp_path: Path
):
    options = ("decoder=causal_lm", f"decoder.language_model={tiny_language_model}")
    weights, frozen = {}, 0
    for dtype in ("float32", "bfloat16"):
        chosen = (*options, f"decoder.dtype={dtype}")
        settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen)
        pretrained = build_pretrained(settings)
        decoder, _ = build_decoder(settings, pretrained)
        frozen = sum(p.numel() for p in decoder.parameters() if not p.requires_grad)
        forecast = build_forecast(settings, planned_config(settings.model))
        weights[dtype] = forecast.memory(0, checkpointing=False).weights
    assert weights["float32"] - weights["bfloat16"] == 2 * frozen > 0


def test_a_moving_average_is_planned_as_a_float32_copy_of_the_trained_weights():
    plain = memory(2)
    for ranks in (1, 8):
        averaged = memory(2, average_ranks=ranks)
        assert averaged.total - plain.total == pytest.approx(4 * COST.trainable / ranks)


def test_what_fits_names_the_least_measure():
    def cards(plain_gib: int, checkpointed_gib: int, chosen: Any = False) -> dict[str, str]:
        def cost_of(half_weights: bool, checkpointing: bool) -> StepCost:
            size = (checkpointed_gib if checkpointing else plain_gib) * 2**30
            return replace(
                COST,
                encoder=10**9,
                decoder=0,
                trainable=10**9,
                activation_bytes=size,
                peak_bytes=size,
            )

        plan = forecast(cost_of, ranks=8, checkpointing=chosen)
        return {device.name: plan.what_fits(device) for device in ACCELERATORS}

    assert cards(10, 1)["A100 40 GB"] == "fits as it is"
    assert cards(10, 1)["RTX 4090 24 GB"] == "one device or ddp + gradient checkpointing"
    assert cards(10, 1, "auto")["RTX 4090 24 GB"] == "fits with gradient checkpointing"
    assert cards(1, 1, "auto")["RTX 4090 24 GB"] == "fits as it is"
    assert cards(1024, 1024)["H200 141 GB"].startswith("too large")


def test_clips_count_as_often_as_they_are_drawn(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    for domain, clips, seconds in (("speech", 30, 0.5), ("sound", 5, 3.0)):
        with ShardWriter(tmp_path / domain) as shards:
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
