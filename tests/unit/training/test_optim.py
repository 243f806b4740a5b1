"""Parameter groups and the schedule."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as HFWhisperEncoder

from whisper_aut.config import OptimSettings
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.training.optim import lr_factor, optimizer_factory, parameter_groups

HALVED = OptimSettings(lr=1.0, weight_decay=0.1, layer_decay=0.5)


def test_every_trainable_parameter_is_in_one_group(tiny_whisper: Path):
    start = PretrainedWhisper(str(tiny_whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, _ = entry.build(start, options, False)
    encoder = PackedEncoder(start.encoder)
    groups = parameter_groups(encoder, decoder, HALVED)
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {
        id(p) for module in (encoder, decoder) for p in module.parameters() if p.requires_grad
    }
    assert len(placed) == len(set(placed))
    assert set(placed) == trainable
    assert not encoder.whisper.embed_positions.weight.requires_grad
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    layers = encoder.whisper.layers
    assert rate[id(layers[1].fc1.weight)] == 1.0
    assert rate[id(layers[0].fc1.weight)] == 0.5
    assert rate[id(encoder.whisper.conv1.weight)] == 0.25
    assert (
        rate[id(encoder.whisper.layer_norm.weight)]
        == rate[id(decoder.whisper.layers[0].fc1.weight)]
        == 1.0
    )
    assert decay[id(layers[0].fc1.weight)] == 0.1
    assert decay[id(layers[0].fc1.bias)] == decay[id(layers[0].final_layer_norm.weight)] == 0.0


def test_bands_of_a_deep_encoder_share_a_rate_and_groups_are_at_most_eight(tiny_whisper: Path):
    pretrained = PretrainedWhisper(str(tiny_whisper))
    config = WhisperConfig(
        d_model=8, encoder_layers=8, encoder_ffn_dim=8, encoder_attention_heads=1
    )
    encoder = PackedEncoder(HFWhisperEncoder(config))
    entry, options = check_decoder({"name": "whisper"})
    decoder, _ = entry.build(pretrained, options, False)
    groups = parameter_groups(encoder, decoder, HALVED)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    whisper = encoder.whisper
    by_depth = [whisper.conv1, *whisper.layers, whisper.layer_norm]
    by_depth = [rates[id(next(module.parameters()))] for module in by_depth]
    assert by_depth == [0.5**7] * 3 + [0.5**4] * 3 + [0.5] * 4
    # The product of all rates is that of separate rates of each layer.
    assert math.prod(by_depth[:9]) == math.prod(0.5**distance for distance in range(9))
    assert len(groups) == 8
    assert len(parameter_groups(encoder, decoder, OptimSettings())) == 4


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)]
)
def test_the_rate_warms_up_and_falls_to_its_final_fraction(schedule: Any, middle: float):
    optim = OptimSettings(warmup_steps=10, schedule=schedule, final_lr_fraction=0.1)

    def factor(step: int) -> float:
        return lr_factor(step, optim, total_steps=110)

    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(middle)
    assert factor(110) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_a_part_that_joins_later_has_no_rate_before_and_warms_up_from_there():
    optim = OptimSettings(warmup_steps=10, schedule="linear")

    def factor(step: int) -> float:
        return lr_factor(step, optim, total_steps=110, first_step=50)

    assert [factor(step) for step in (0, 49, 50, 59)] == pytest.approx([0.0, 0.0, 0.1, 1.0])
    assert factor(85) == pytest.approx(0.5)
    assert factor(110) == pytest.approx(0.0)
    late = replace(optim, warmup_steps=40)
    factors = [lr_factor(step, late, 110, first_step=90) for step in (89, 90, 99, 109)]
    assert factors == pytest.approx([0.0, 0.05, 0.5, 1.0])  # the warm-up is not cut off


def test_the_encoder_may_have_a_rate_of_its_own(tiny_whisper: Path):
    start = PretrainedWhisper(str(tiny_whisper))
    entry, options = check_decoder({"name": "whisper"})
    decoder, _ = entry.build(start, options, False)
    groups = parameter_groups(
        PackedEncoder(start.encoder), decoder, replace(HALVED, encoder_lr=0.2)
    )
    rates = {
        part: {group["lr"] for group in groups if group["part"] == part}
        for part in ("encoder", "decoder")
    }
    assert rates == {"encoder": {0.2, 0.1, 0.05}, "decoder": {1.0}}
    optim = OptimSettings(
        lr=1.0, encoder_lr=0.2, encoder_after_step=3, warmup_steps=1, schedule="constant"
    )
    made = optimizer_factory(optim, total_steps=10)(PackedEncoder(start.encoder), decoder)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(4):
        seen.append({group["part"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert seen == [{"encoder": 0.0, "decoder": 1.0}] * 3 + [{"encoder": 0.2, "decoder": 1.0}]
