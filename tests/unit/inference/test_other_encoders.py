"""Encoders other than Whisper return what transformers computes for each clip alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from whisper_aut.errors import UserError
from whisper_aut.loading import open_encoder
from whisper_aut.probes.encoders import FrameEncoder, hop_seconds_of, measure_cost

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CONV: dict[str, Any] = {
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WAVEFORM_MODELS: dict[str, Callable[[], Any]] = {
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES, **CONV)),
    "wav2vec2 with layer norm": lambda: Wav2Vec2Model(
        Wav2Vec2Config(**SIZES, **CONV, feat_extract_norm="layer", do_stable_layer_norm=True)
    ),
    "hubert": lambda: HubertModel(HubertConfig(**SIZES, **CONV)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**SIZES, **CONV)),
    "data2vec": lambda: Data2VecAudioModel(Data2VecAudioConfig(**SIZES, conv_dim=(8,) * 7)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)  # not the seed of random weights


def noise(*seconds: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(round(16_000 * s), generator=generator) for s in seconds]


def saved(folder: Path, model: Any, extractor: Any) -> FrameEncoder:
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return open_encoder(str(folder), None)


@pytest.mark.parametrize("name", WAVEFORM_MODELS)
@torch.no_grad()
def test_models_on_samples(name: str, tmp_path: Path):
    model = WAVEFORM_MODELS[name]().eval()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    encoder = saved(tmp_path, model, extractor)
    clips = noise(1.0, 0.4, 1.0, 2.3)
    frames = encoder.encode(clips, 16_000)
    layers = encoder.encode(clips, 16_000, (0, 2, 3))
    for clip, found, hidden in zip(clips, frames, layers, strict=True):
        inputs = extractor(clip.numpy(), sampling_rate=16_000, return_tensors="pt")
        expected = model(**inputs, output_hidden_states=True)
        assert_close(found, expected.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        for layer, state in zip((0, 2), hidden, strict=False):
            assert_close(state, expected.hidden_states[layer][0], atol=1e-5, rtol=1e-5)
        assert_close(hidden[2], found)
    assert len(frames[0]) == 49  # a frame every 20 ms, of 25 ms each
    assert hop_seconds_of(encoder) == pytest.approx(0.02, rel=1e-9)
    assert measure_cost(encoder, "").parameters == model.num_parameters()


def test_a_clip_shorter_than_one_frame_gives_one(tmp_path: Path):
    encoder = saved(tmp_path, WAVEFORM_MODELS["hubert"](), Wav2Vec2FeatureExtractor())
    (frames,) = encoder.encode(noise(0.01), 16_000)
    assert frames.shape == (1, 16)
    assert frames.isfinite().all()


@torch.no_grad()
def test_the_spectrogram_transformer(tmp_path: Path):
    config = ASTConfig(**SIZES, max_length=256, num_mel_bins=32)
    model, extractor = ASTModel(config).eval(), ASTFeatureExtractor(num_mel_bins=32, max_length=256)
    encoder = saved(tmp_path, model, extractor)
    (long, short), layers = noise(2.575, 0.5), (1, 3)
    frames, states = encoder.encode([long, short], 16_000), encoder.encode([short], 16_000, layers)

    def patches(clip: Tensor) -> Tensor:
        inputs = extractor(clip.numpy(), sampling_rate=16_000, return_tensors="pt")
        return model(**inputs).last_hidden_state[0, 2:]

    rows, columns = 2, 25  # of 16 × 16 patches, 10 apart, in 32 bins × 256 spectra
    assert_close(frames[0], patches(long).reshape(rows, columns, 16).mean(0), atol=1e-5, rtol=1e-5)
    # 48 spectra in half a second: the last patch that ends within them starts at 30.
    expected = patches(short).reshape(rows, columns, 16).mean(0)[:4]
    assert_close(frames[1], expected, atol=1e-5, rtol=1e-5)
    assert_close(states[0][1], frames[1])
    assert states[0].shape == (2, 4, 16)
    # A longer clip is cut into pieces of the model's length.
    piece = 255 * 160 + 400
    first, rest = torch.cat([long, long])[:piece], torch.cat([long, long])[piece:]
    whole = encoder.encode([torch.cat([long, long])], 16_000)[0]
    assert_close(whole, torch.cat(encoder.encode([first, rest], 16_000)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_audio_tower_of_clap(tmp_path: Path):
    audio = ClapAudioConfig(
        patch_embeds_hidden_size=8, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1]
    )
    text = ClapTextConfig(**SIZES, vocab_size=20)
    config = ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict())
    model = ClapModel(config).eval()
    extractor = ClapFeatureExtractor(truncation="rand_trunc")
    encoder = saved(tmp_path, model, extractor)
    clips = noise(10.0, 2.0, 13.0)
    frames = encoder.encode(clips, 16_000)
    assert [clip.shape for clip in frames] == [(32, 64), (7, 64), (32 + 10, 64)]
    resampled = soxr.resample(clips[0].numpy(), 16_000, 48_000)
    inputs = extractor(resampled, sampling_rate=48_000, return_tensors="pt")
    expected = model.audio_model(**inputs).pooler_output[0]
    assert_close(frames[0].mean(0), expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(encoder, "layers")


def test_heads_are_ignored_and_missing_weights_are_an_error(tmp_path: Path):
    settings: dict[str, Any] = SIZES | CONV | {"codevector_dim": 8, "proj_codevector_dim": 8}
    config = Wav2Vec2Config(**settings)
    pretraining = Wav2Vec2ForPreTraining(config)
    encoder = saved(tmp_path / "heads", pretraining, Wav2Vec2FeatureExtractor())
    assert encoder.encode(noise(1.0), 16_000)[0].shape == (49, 16)
    settings["num_hidden_layers"] = 4
    deeper = Wav2Vec2Config(**settings)
    deeper.save_pretrained(tmp_path / "heads")
    with pytest.raises(UserError, match=r"lacks \d+ weights of a model of this type"):
        open_encoder(str(tmp_path / "heads"), None)


def test_random_weights_differ_from_the_checkpoint_and_fingerprints_tell_them_apart(tmp_path: Path):
    trained = saved(tmp_path, WAVEFORM_MODELS["wav2vec2"](), Wav2Vec2FeatureExtractor())
    random = open_encoder(f"random:{tmp_path}", None)
    again = open_encoder(str(tmp_path), None)
    half = open_encoder(str(tmp_path), None, dtype="bf16")
    names = [encoder.fingerprint() for encoder in (trained, random, half)]
    assert len(set(names)) == 3
    assert again.fingerprint() == names[0]
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    assert open_encoder(str(tmp_path), None).fingerprint() not in names
    assert half.encode(noise(0.5), 16_000)[0].dtype == torch.float32


CUSTOM = """
import torch
class Encoder(torch.nn.Module):
    sampling_rate, output_dim, hop_size_in_ms = 8_000, 2, 100
    def forward(self, audio):
        cut = audio[:, : audio.shape[1] // 800 * 800].unflatten(1, (-1, 800))
        return torch.stack([cut.mean(-1), cut.std(-1)], dim=-1)
class Wrong(Encoder):
    def forward(self, audio):
        return audio
class NoModule:
    pass
"""


DATACLASS = """
from dataclasses import dataclass
@dataclass
class Options:
    width: int = 2
"""


def test_a_class_in_a_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(CUSTOM)
    encoder = open_encoder(f"{file}:Encoder", None)
    clips = noise(1.0, 0.5)
    frames = encoder.encode(clips, 16_000)
    assert [clip.shape for clip in frames] == [(10, 2), (5, 2)]
    expected = soxr.resample(clips[0].numpy(), 16_000, 8_000).reshape(10, 800)
    assert np.allclose(frames[0][:, 0], expected.mean(1), atol=1e-6)
    first = encoder.fingerprint()
    file.write_text(CUSTOM.replace("mean(-1)", "amax(-1)"))
    assert open_encoder(f"{file}:Encoder", None).fingerprint() != first
    file.write_text(f"from __future__ import annotations\n{CUSTOM}{DATACLASS}")
    assert open_encoder(f"{file}:Encoder", None).fingerprint() != first
    with pytest.raises(UserError, match=r"Wrong.forward returned \[1, 8000\]"):
        open_encoder(f"{file}:Wrong", None).encode(noise(1.0), 16_000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/none.py:Encoder", "there is no file"),
        ("{folder}/mine.py:Missing", "has no class Missing"),
        ("{folder}/mine.py:NoModule", "must be a torch.nn.Module"),
        ("{folder}/mine.py:Encoder@30s", "only Whispers have a padding mode"),
        ("{folder}/wav2vec2@none", "only Whispers have a padding mode"),
        ("{folder}/bert", "is a 'bert' model. Encoders can be whisper, wav2vec2"),
        ("{folder}/empty", "is not a usable Whisper checkpoint"),
        ("{folder}/absent", "There is no"),
    ],
)
def test_what_is_no_encoder_is_one_clear_error(name: str, message: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(CUSTOM)
    saved(tmp_path / "wav2vec2", WAVEFORM_MODELS["wav2vec2"](), Wav2Vec2FeatureExtractor())
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_encoder(name.format(folder=tmp_path), None)
