"""Loading checkpoints: strict, from safetensors, with errors that say what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from whisper_aut import load_encoder
from whisper_aut.errors import UserError
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.decoders.whisper import WhisperDecoderOptions
from whisper_aut.models.language_model import load_language_model
from whisper_aut.models.pretrained import PretrainedWhisper


@pytest.fixture
def copy(tiny_whisper: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_whisper, tmp_path / "copy"))


def test_the_encoder_alone_equals_the_encoder_of_the_whole(tiny_whisper: Path):
    alone, whole = (
        PretrainedWhisper(str(tiny_whisper)).encoder,
        PretrainedWhisper(str(tiny_whisper)).model.model.encoder,
    )
    weights = whole.state_dict()
    assert alone.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in alone.state_dict().items())


def test_drawing_weights_touches_no_global_generator(
    tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch
):
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    before = torch.get_rng_state()
    load_encoder(str(tiny_whisper), random_init=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert reseeded == []


def test_random_init_keeps_the_shape_and_follows_the_seed(tiny_whisper: Path):
    clip = [np.random.default_rng(0).standard_normal(8000).astype(np.float32)]
    frames = [
        load_encoder(str(tiny_whisper), random_init=True, seed=seed).encode(clip, 16_000)[0]
        for seed in (5, 5, 6)
    ]
    assert torch.equal(frames[0], frames[1])
    assert not torch.allclose(frames[0], frames[2])
    assert not torch.allclose(frames[0], load_encoder(str(tiny_whisper)).encode(clip, 16_000)[0])


def test_missing_weights_are_named(copy: Path):
    weights = load_file(copy / "model.safetensors")
    weights.pop("model.encoder.layers.1.fc1.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights.*layers\.1\.fc1\.weight"):
        _ = PretrainedWhisper(str(copy)).encoder
    with pytest.raises(UserError, match=r"lacks 1 weights.*layers\.1\.fc1\.weight"):
        _ = PretrainedWhisper(str(copy)).model


def test_a_pickled_checkpoint_is_not_opened(copy: Path):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a usable Whisper checkpoint"):
        _ = PretrainedWhisper(str(copy)).encoder


def test_a_file_cut_short_is_a_user_error(copy: Path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"not a usable Whisper checkpoint: .*not fully covered"):
        load_encoder(copy)
    with pytest.raises(UserError, match="not a usable Whisper checkpoint"):
        _ = PretrainedWhisper(str(copy)).model


def test_other_models_and_missing_places_are_user_errors(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"encoder_layerdrop": 0.1}))
    with pytest.raises(UserError, match="layer dropout"):
        _ = PretrainedWhisper(str(copy)).config
    with pytest.raises(UserError, match="There is no model directory"):
        load_encoder(str(tmp_path / "nowhere"))
    (tmp_path / "runs" / "aut_tiny" / "latest").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"There is no runs/aut_tny\. Did you mean 'aut_tiny'\? runs contains: aut_tiny",
    ):
        load_encoder("runs/aut_tny")  # and no hub is asked
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="The directory contains nothing"):
        load_encoder(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="padding must be one of"):
        load_encoder("org/never-asked-for", padding="60s")  # pyright: ignore[reportArgumentType]
    (copy / "config.json").write_text(json.dumps(config | {"trained_padding": "60s"}))
    with pytest.raises(UserError, match="padding must be one of"):
        load_encoder(copy)


def test_encode_equals_hugging_face_in_30s_mode(tiny_whisper: Path):
    generator = np.random.default_rng(0)
    clips = [
        generator.standard_normal(samples).astype(np.float32) * 0.1 for samples in (16_000, 40_123)
    ]
    features = WhisperFeatureExtractor.from_pretrained(tiny_whisper)(
        clips, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    with torch.no_grad():
        expected = (
            WhisperModel.from_pretrained(tiny_whisper).eval().encoder(features).last_hidden_state
        )
    frames = load_encoder(str(tiny_whisper), padding="30s").encode(clips, sample_rate_hz=16_000)
    assert [len(clip) for clip in frames] == [50, 126]
    for clip, reference in zip(frames, expected, strict=True):
        torch.testing.assert_close(clip, reference[: len(clip)], atol=1e-5, rtol=0)


def test_a_checkpoint_without_a_record_of_its_training_runs_padded_unless_marked(
    copy: Path, tmp_path: Path
):
    """As every released Whisper was trained."""
    assert load_encoder(copy).padding == "30s"
    assert load_encoder(copy, random_init=True).padding == "30s"
    assert load_encoder(f"{copy}@none").padding == "none"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"trained_padding": "none"}))
    assert load_encoder(copy).padding == "none"
    assert load_encoder(f"{copy}@30s").padding == "30s"
    assert load_encoder(f"{copy}@30s", padding="30s").padding == "30s"
    with pytest.raises(UserError, match="names padding 30s, but padding='none' was given"):
        load_encoder(f"{copy}@30s", padding="none")
    with pytest.raises(UserError, match=r"must be one of none, 30s, not '3s'\. Did you mean '30s'"):
        load_encoder(f"{copy}@3s")
    strange = copy.rename(tmp_path / "model@none")  # a folder whose name has an @ is a folder
    assert load_encoder(strange).padding == "none"
    assert load_encoder(f"{strange}@30s").padding == "30s"


def test_encode_takes_other_rates_and_channels_and_refuses_what_it_cannot_take(tiny_whisper: Path):
    encoder = load_encoder(str(tiny_whisper))
    stereo = np.random.default_rng(0).standard_normal((48_000, 2)).astype(np.float32)
    assert encoder.encode([stereo], sample_rate_hz=48_000)[0].shape == (50, 32)
    assert encoder.encode([], sample_rate_hz=16_000) == []
    for bad, message in (
        (np.zeros(0, np.float32), "with samples"),
        (np.full(100, np.nan, np.float32), "NaN"),
        (np.zeros(100, np.int16), "give floats"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode([bad], sample_rate_hz=16_000)


def test_fingerprints_follow_weights_and_padding(tiny_whisper: Path):
    prints = {
        load_encoder(str(tiny_whisper), **options).fingerprint()
        for options in ({}, {"padding": "none"}, {"random_init": True, "seed": 5})
    }
    assert len(prints) == 3
    assert load_encoder(str(tiny_whisper)).fingerprint() in prints


@pytest.fixture
def adapter(tiny_whisper: Path, tmp_path: Path) -> Path:
    """A PEFT adapter that changes what the encoder gives, and beside it, merged into the model."""
    peft = pytest.importorskip("peft")
    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper)
    updates = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, updates)
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter"


def test_an_adapter_as_a_start_is_named_in_one_line(
    adapter: Path, tiny_whisper: Path, tiny_language_model: Path
):
    message = rf"{adapter} is a PEFT adapter of {tiny_whisper}, not a model\. Merge it first: "
    for part in ("config", "model"):
        with pytest.raises(UserError, match=message) as caught:
            getattr(PretrainedWhisper(str(adapter)), part)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        load_language_model(str(adapter))
    for file in Path(tiny_whisper).glob("*token*"):  # as people add them to it
        shutil.copy(file, adapter)
    with pytest.raises(UserError, match=message):
        check_decoder({"name": "whisper"})[0].build(
            PretrainedWhisper(str(adapter)), WhisperDecoderOptions(), False
        )


def test_an_encoder_with_an_adapter_is_the_merged_encoder(adapter: Path, tiny_whisper: Path):
    clip = [np.random.default_rng(0).standard_normal(8000).astype(np.float32)]
    adapted, merged, base = (
        load_encoder(path).encode(clip, 16_000)[0]
        for path in (adapter, adapter.with_name("merged"), tiny_whisper)
    )
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted, base, atol=1e-2)
