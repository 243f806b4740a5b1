"""Loading checkpoints: strict, from safetensors, with errors that say what to do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    WhisperForConditionalGeneration,
)

from whisper_aut import load_encoder
from whisper_aut.errors import UserError
from whisper_aut.inference.other_encoders import model_type
from whisper_aut.models.decoders import check_decoder
from whisper_aut.models.decoders.whisper import WhisperDecoderOptions
from whisper_aut.models.language_model import load_language_model
from whisper_aut.models.pretrained import PretrainedWhisper, check_hub, find_cached


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


def test_a_cached_model_is_loaded_without_asking_the_hub(
    tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--nobody--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_whisper, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert PretrainedWhisper("nobody/tiny").tokenizer.name_or_path == str(snapshot)
    assert find_cached("nobody/tiny", "", "config.json", "model.safetensors") == str(snapshot)
    (snapshot / "model.safetensors").rename(snapshot / "other.safetensors")
    check_hub("nobody/tiny", "")  # perhaps its weights are several files, which transformers finds
    assert find_cached("nobody/tiny", "", "config.json", "model.safetensors") == "nobody/tiny"
    assert find_cached("nobody/tiny", "v2", "config.json") == "nobody/tiny"


def test_an_unreachable_hub_is_reported_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("The client tries again."))
    for load in (load_encoder, load_language_model, model_type):
        with pytest.raises(UserError, match=r"hub that can be reached.*\n.*hf download"):
            load("nobody/tiny")


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


def test_other_models_and_missing_paths_are_user_errors(
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


@pytest.fixture
def adapter(tiny_whisper: Path, tmp_path: Path) -> Path:
    """A PEFT adapter that changes the encoder; its sibling `merged` is the merged model."""
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


def test_a_peft_adapter_is_a_one_line_error_for_training(
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
