"""`load_encoder` and `AudioEncoder.encode`: padding modes, seeds, inputs, equality with Hugging
Face.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    WhisperFeatureExtractor,
    WhisperModel,
)

from whisper_aut import load_encoder
from whisper_aut.errors import UserError


@pytest.fixture
def copy(tiny_whisper: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_whisper, tmp_path / "copy"))


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


def test_encode_accepts_other_rates_and_channels_and_rejects_bad_arrays(tiny_whisper: Path):
    encoder = load_encoder(str(tiny_whisper))
    stereo = np.random.default_rng(0).standard_normal((48_000, 2)).astype(np.float32)
    assert encoder.encode([stereo], sample_rate_hz=48_000)[0].shape == (50, 32)
    assert encoder.encode([], sample_rate_hz=16_000) == []
    rounded = torch.from_numpy(stereo[:, 0]).bfloat16().requires_grad_()
    frames = encoder.encode([rounded, rounded.detach().float()], sample_rate_hz=16_000)
    assert torch.equal(*frames)
    for bad, message in (
        (np.zeros(0, np.float32), "with samples"),
        (np.zeros((9, 0), np.float32), "with samples"),
        (stereo.T, "channels come last"),  # as torchaudio loads a file
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
    precise = load_encoder(str(tiny_whisper), dtype=torch.float64)
    assert precise.fingerprint() not in prints
    assert precise.dtype == "torch.float64"


def test_fingerprints_follow_what_the_weights_do_not_tell(tiny_whisper: Path, tmp_path: Path):
    prints = {load_encoder(str(tiny_whisper)).fingerprint()}
    config = json.loads((tiny_whisper / "config.json").read_text())
    for name, change in (
        ("heads", {"encoder_attention_heads": 4}),
        ("relu", {"activation_function": "relu"}),
    ):
        folder = shutil.copytree(tiny_whisper, tmp_path / name)
        (folder / "config.json").write_text(json.dumps(config | change))
        prints.add(load_encoder(str(folder)).fingerprint())
    assert len(prints) == 3
