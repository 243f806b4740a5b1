"""The packed encoder against Hugging Face's, clip by clip."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.support.numeric import assert_frames_close, enlarge
from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.errors import UserError
from whisper_aut.models.encoder import PackedEncoder, add_lora, encoder_frames, merge_lora
from whisper_aut.models.pretrained import PretrainedWhisper

SECONDS = (1.0, 5.0, 0.11, 30.0, 29.99, 7.3135, 2.0)


@pytest.fixture(scope="module")
def waveforms() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(round(16_000 * seconds), generator=generator) * 0.1 for seconds in SECONDS]


@pytest.fixture(scope="module", params=[80, 128])
def model(request: pytest.FixtureRequest) -> WhisperModel:
    torch.manual_seed(0)
    sizes = {
        "d_model": 64,
        "encoder_layers": 3,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    model = WhisperModel(
        WhisperConfig(**sizes, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=request.param)
    ).eval()
    enlarge(model.encoder)
    return model


def packed(waveforms: Sequence[Tensor], bins: int) -> tuple[Tensor, list[int]]:
    logmel = LogMel(bins)
    return torch.cat([logmel(waveform) for waveform in waveforms]), [
        mel_frames(len(waveform)) for waveform in waveforms
    ]


def reference_features(waveforms: Sequence[Tensor], bins: int) -> Tensor:
    extractor = WhisperFeatureExtractor(feature_size=bins)
    arrays = [waveform.numpy() for waveform in waveforms]
    return extractor(arrays, sampling_rate=16_000, return_tensors="pt").input_features


@torch.no_grad()
def test_the_model_of_these_tests_has_values_of_a_released_encoders_size(
    model: WhisperModel, waveforms: list[Tensor]
):
    """whisper-base: up to 510 between layers, 11 to 24 in the frames of a clip."""
    features = reference_features(waveforms[:2], model.config.num_mel_bins)
    found = model.encoder(features, output_hidden_states=True)
    assert max(float(hidden.abs().max()) for hidden in found.hidden_states[:-1]) > 200
    assert 11 < found.last_hidden_state.abs().max() < 40


@torch.no_grad()
def test_30s_mode_equals_hugging_face(model: WhisperModel, waveforms: list[Tensor]):
    bins = model.config.num_mel_bins
    expected = model.encoder(reference_features(waveforms, bins)).last_hidden_state
    frames = PackedEncoder(model.encoder, "30s")(*packed(waveforms, bins))
    assert frames.lengths == (1500,) * len(waveforms)
    assert_frames_close(frames.values.view_as(expected), expected)
    for clip, waveform, reference in zip(frames.valid(), waveforms, expected, strict=True):
        valid = encoder_frames(mel_frames(len(waveform)))
        assert_frames_close(clip, reference[:valid])


@torch.no_grad()
def test_chosen_clips_of_a_batch_are_padded_and_the_others_run_as_if_alone(
    model: WhisperModel, waveforms: list[Tensor]
):
    bins = model.config.num_mel_bins
    encoder, padded = PackedEncoder(model.encoder), [True, False, False, True, True, False, True]
    frames = encoder(*packed(waveforms, bins), padded=padded)
    whole = model.encoder(reference_features(waveforms, bins)).last_hidden_state
    clips = frames.values.split(frames.lengths)
    for waveform, pads, clip, reference in zip(waveforms, padded, clips, whole, strict=True):
        expected = reference if pads else encoder(*packed([waveform], bins)).values
        assert len(clip) == (1500 if pads else encoder_frames(mel_frames(len(waveform))))
        assert_frames_close(clip, expected)
    own = [encoder_frames(mel_frames(len(waveform))) for waveform in waveforms]
    assert frames.valid_lengths == tuple(own)


@torch.no_grad()
def test_a_clip_is_the_same_alone_and_in_any_batch(model: WhisperModel, waveforms: list[Tensor]):
    bins = model.config.num_mel_bins
    encoder = PackedEncoder(model.encoder, "none")
    together = encoder(*packed(waveforms, bins)).valid()
    backwards = encoder(*packed(waveforms[::-1], bins)).valid()[::-1]
    for waveform, clip, other in zip(waveforms, together, backwards, strict=True):
        alone = encoder(*packed([waveform], bins)).values
        assert_frames_close(clip, alone)
        assert_frames_close(other, alone)


@torch.no_grad()
def test_none_mode_equals_the_padded_run_with_masked_keys(
    model: WhisperModel, waveforms: list[Tensor]
):
    """The independent reference: Hugging Face's own layers on 30 s, all keys after the end of the
    clip masked.
    """
    bins = model.config.num_mel_bins
    frames = PackedEncoder(model.encoder, "none")(*packed(waveforms, bins)).valid()
    for waveform, clip in zip(waveforms, frames, strict=True):
        hidden = masked_reference(
            model, reference_features([waveform], bins), len(clip)
        ).last_hidden_state
        assert_frames_close(clip, hidden[0, : len(clip)])


def masked_reference(model: WhisperModel, features: Tensor, valid: int) -> BaseModelOutput:
    encoder = model.encoder
    hidden = torch.nn.functional.gelu(encoder.conv1(features))
    hidden = (
        torch.nn.functional.gelu(encoder.conv2(hidden)).permute(0, 2, 1)
        + encoder.embed_positions.weight
    )
    mask = torch.zeros(1, 1, 1, hidden.shape[1])
    mask[..., valid:] = float("-inf")
    for layer in encoder.layers:
        hidden = layer(hidden, mask)
    return BaseModelOutput(last_hidden_state=encoder.layer_norm(hidden))


def test_gradients_equal_a_loop_over_clips(model: WhisperModel, waveforms: list[Tensor]):
    bins = model.config.num_mel_bins
    encoder = PackedEncoder(model.encoder, "none")
    clips = [waveform[:48_000] for waveform in waveforms]
    weights = torch.randn(64, generator=torch.Generator().manual_seed(1))
    encoder(*packed(clips, bins)).values.matmul(weights).sum().backward()
    together = {
        name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None
    }
    encoder.zero_grad()
    for clip in clips:
        encoder(*packed([clip], bins)).values.matmul(weights).sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            assert_close(
                together[name],
                parameter.grad,
                atol=1e-5 * float(parameter.grad.abs().max().clamp(min=1)),
                rtol=1e-4,
            )
    encoder.zero_grad()


def test_ranks_with_equal_and_with_mixed_clips_call_the_same_modules(
    model: WhisperModel, waveforms: list[Tensor]
):
    """ZeRO-3 gathers weights at each call, on all ranks together: another call, or one less, and
    they wait or mix them up.
    """
    encoder = PackedEncoder(model.encoder)
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in encoder.named_modules()
        if list(module.parameters(recurse=False))
    ]
    orders = []
    for chosen in ([waveforms[0], waveforms[0]], [waveforms[0], waveforms[1]]):
        called.clear()
        encoder(*packed(chosen, encoder.num_mel_bins))
        orders.append(list(called))
    for hook in hooks:
        hook.remove()
    assert orders[0] == orders[1]
    assert {"whisper.conv1", "whisper.embed_positions", "whisper.layers.2.fc2"} <= set(called)


@torch.no_grad()
def test_low_rank_updates_are_merged_as_peft_merges_them(tiny_whisper: Path):
    encoder = PackedEncoder(PretrainedWhisper(str(tiny_whisper)).encoder)
    start = {f"encoder.{name}": value.clone() for name, value in encoder.state_dict().items()}
    assert merge_lora(start) is start
    add_lora(encoder, rank=3, alpha=12)
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 6 * len(encoder.whisper.layers)
    assert all(".lora_" in name for name in trained)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)
    mel, lengths = torch.randn(62, 80), [60]
    expected = encoder(mel, lengths).values
    merged = merge_lora({f"encoder.{name}": value for name, value in encoder.state_dict().items()})
    assert merged.keys() == start.keys()
    plain = PackedEncoder(PretrainedWhisper(str(tiny_whisper)).encoder)
    plain.load_state_dict({name.removeprefix("encoder."): w for name, w in merged.items()})
    assert_frames_close(plain(mel, lengths).values, expected)
    for module in encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    layer: Any = encoder.whisper.layers[0]
    assert_close(merged["encoder.whisper.layers.0.fc1.weight"], layer.fc1.base_layer.weight)
    assert not torch.equal(
        merged["encoder.whisper.layers.0.fc1.weight"], start["encoder.whisper.layers.0.fc1.weight"]
    )


def test_checkpointing_changes_no_gradient(model: WhisperModel, waveforms: list[Tensor]):
    bins = model.config.num_mel_bins
    grads = []
    for checkpointing in (False, True):
        encoder = PackedEncoder(model.encoder, "none", gradient_checkpointing=checkpointing).train()
        encoder(*packed(waveforms[:3], bins)).values.square().mean().backward()
        grads.append(model.encoder.conv1.weight.grad.clone())
        model.zero_grad()
    model.eval()
    assert_close(grads[0], grads[1])


def test_runs_in_bfloat16_under_autocast(model: WhisperModel, waveforms: list[Tensor]):
    encoder = PackedEncoder(model.encoder, "none")
    mel, lengths = packed(waveforms[:3], model.config.num_mel_bins)
    with torch.no_grad():
        exact = encoder(mel, lengths).values
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder(mel, lengths).values
    cosine = torch.nn.functional.cosine_similarity(rough.float(), exact)
    assert cosine.median() > 0.999
    assert cosine.min() > 0.9  # on whisper-base 0.95


def test_a_clip_beyond_the_encoders_positions_is_an_error_that_says_how_long_clips_may_be(
    tiny_whisper: Path,
):
    config = WhisperConfig.from_pretrained(tiny_whisper)
    config.max_source_positions = 500
    encoder = WhisperEncoder(config).eval()
    logmel = LogMel(80)
    fits, too_long = (torch.randn(16_000 * seconds) for seconds in (10, 15))
    assert PackedEncoder(encoder)(logmel(fits), [1000]).lengths == (500,)
    with pytest.raises(
        UserError, match=r"Clips of 15 s.* do not fit.*500 positions .* are 10 s.*max_seconds=10"
    ):
        PackedEncoder(encoder)(logmel(too_long), [1500])
    with pytest.raises(UserError, match="Use padding none"):
        PackedEncoder(encoder, "30s")(logmel(fits), [1000])
