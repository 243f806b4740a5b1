"""Exports load strictly in transformers and give the frames of the training encoder."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
    WhisperProcessor,
)

from tests.support.numeric import assert_frames_close
from whisper_aut import load_encoder
from whisper_aut.errors import UserError
from whisper_aut.export.hf import ExportKind, export_checkpoint, find_checkpoint, read_checkpoint
from whisper_aut.inference.encoder import AudioEncoder
from whisper_aut.models.encoder import PackedEncoder
from whisper_aut.models.pretrained import PretrainedWhisper


@pytest.fixture(scope="module")
def checkpoint(life_size_whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights differ from the pretrained ones, with values of real size."""
    model = PretrainedWhisper(str(life_size_whisper)).model
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for prefix, module in (
        ("encoder.whisper.", model.model.encoder),
        ("decoder.whisper.", model.model.decoder),
    ):
        for name, weight in module.state_dict().items():
            weights[prefix + name] = weight + 0.02 * torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": weights}, path)
    return path


def training_encoder(checkpoint: Path, tiny_whisper: Path, padding: str) -> AudioEncoder:
    encoder = PackedEncoder(PretrainedWhisper(str(tiny_whisper)).encoder, padding)  # pyright: ignore[reportArgumentType]
    weights = {
        n.removeprefix("encoder."): w
        for n, w in read_checkpoint(checkpoint).items()
        if n.startswith("encoder.")
    }
    encoder.load_state_dict(weights)
    return AudioEncoder(encoder)


def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        generator.standard_normal(samples).astype(np.float32) * 0.1 for samples in (5_000, 32_000)
    ]


def test_the_encoder_export_loads_strictly_and_gives_the_training_frames(
    checkpoint: Path, tiny_whisper: Path, tmp_path: Path
):
    out = export_checkpoint(
        checkpoint, PretrainedWhisper(str(tiny_whisper)), tmp_path / "encoder", "encoder"
    )
    model, info = WhisperModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(AutoModel.from_pretrained(out), WhisperModel)
    assert len(model.decoder.layers) == 0
    assert sum(p.numel() for p in model.decoder.parameters()) < 200
    features = WhisperFeatureExtractor.from_pretrained(out)(
        clips(), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    with torch.no_grad():
        frames = model.eval().encoder(features).last_hidden_state
    expected = training_encoder(checkpoint, tiny_whisper, "30s").encode(clips(), 16_000)
    for clip, reference in zip(expected, frames, strict=True):
        assert_frames_close(clip, reference[: len(clip)])
    packed = load_encoder(str(out)).encode(clips(), 16_000)
    for clip, reference in zip(
        packed,
        training_encoder(checkpoint, tiny_whisper, "none").encode(clips(), 16_000),
        strict=True,
    ):
        assert torch.equal(clip, reference)


@pytest.mark.parametrize("kind", ["encoder", "whisper"])
def test_an_export_is_run_as_it_was_trained(
    kind: ExportKind, checkpoint: Path, tiny_whisper: Path, tmp_path: Path
):
    out = export_checkpoint(
        checkpoint, PretrainedWhisper(str(tiny_whisper)), tmp_path / "padded", kind, padding="30s"
    )
    assert (load_encoder(out).padding, load_encoder(out, padding="none").padding) == ("30s", "none")
    assert load_encoder(out, random_init=True).padding == "30s"
    frames = zip(
        load_encoder(out).encode(clips(), 16_000),
        load_encoder(out, padding="30s").encode(clips(), 16_000),
        strict=True,
    )
    assert all(torch.equal(clip, padded) for clip, padded in frames)
    again = export_checkpoint(
        checkpoint, PretrainedWhisper(str(out)), tmp_path / "again", "encoder", padding="none"
    )  # trained on at its length
    assert load_encoder(again).padding == "none"


def test_the_whisper_export_keeps_decoder_tokenizer_and_generation(
    checkpoint: Path, tiny_whisper: Path, tmp_path: Path
):
    out = export_checkpoint(
        checkpoint, PretrainedWhisper(str(tiny_whisper)), tmp_path / "whisper", "whisper"
    )
    model, info = WhisperForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = read_checkpoint(checkpoint)
    assert torch.equal(
        model.model.decoder.embed_tokens.weight, weights["decoder.whisper.embed_tokens.weight"]
    )
    assert model.proj_out.weight.data_ptr() == model.model.decoder.embed_tokens.weight.data_ptr()
    processor = WhisperProcessor.from_pretrained(out)
    features = processor(clips(), sampling_rate=16_000, return_tensors="pt").input_features
    texts = processor.batch_decode(
        model.generate(features, language="en", task="transcribe", max_new_tokens=4)
    )
    assert len(texts) == 2
    assert PretrainedWhisper(str(out)).multilingual


def test_an_encoder_export_cannot_start_the_whisper_decoder(
    checkpoint: Path, tiny_whisper: Path, tmp_path: Path
):
    out = export_checkpoint(
        checkpoint, PretrainedWhisper(str(tiny_whisper)), tmp_path / "encoder", "encoder"
    )
    with pytest.raises(UserError, match="encoder without a decoder"):
        _ = PretrainedWhisper(str(out)).model


def test_an_old_export_is_replaced_whole(
    checkpoint: Path, tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "encoder"
    out.mkdir()
    (out / "stale.txt").touch()
    with pytest.raises(UserError, match="would be lost"):  # no export: perhaps somebody's work
        export_checkpoint(checkpoint, PretrainedWhisper(str(tiny_whisper)), out, "encoder")
    (out / "config.json").touch()  # anybody's may be called so
    with pytest.raises(UserError, match="would be lost"):
        export_checkpoint(checkpoint, PretrainedWhisper(str(tiny_whisper)), out, "encoder")
    shutil.rmtree(out)
    export_checkpoint(checkpoint, PretrainedWhisper(str(tiny_whisper)), out, "encoder")
    (out / "stale.txt").touch()
    with pytest.raises(UserError, match="started from"):
        export_checkpoint(checkpoint, PretrainedWhisper(str(out)), out, "encoder")
    export_checkpoint(checkpoint, PretrainedWhisper(str(tiny_whisper)), out, "encoder")
    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    before = sorted(out.iterdir())
    (tmp_path / "link").symlink_to(out)
    export_checkpoint(
        checkpoint, PretrainedWhisper(str(tiny_whisper)), tmp_path / "link", "encoder"
    )
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="is the working directory"):
        export_checkpoint(checkpoint, PretrainedWhisper(str(tiny_whisper)), Path(), "encoder")
    assert sorted(out.iterdir()) == before


def test_precisions(checkpoint: Path, tiny_whisper: Path, tmp_path: Path):
    pretrained = PretrainedWhisper(str(tiny_whisper))
    for dtype in (torch.bfloat16, torch.float16):
        out = export_checkpoint(
            checkpoint, pretrained, tmp_path / str(dtype), "encoder", dtype=dtype
        )
        assert WhisperModel.from_pretrained(out).dtype == dtype
        rough = load_encoder(out, padding="30s").encode(clips(), 16_000)
        for clip, exact in zip(
            rough,
            training_encoder(checkpoint, tiny_whisper, "30s").encode(clips(), 16_000),
            strict=True,
        ):
            cosine = torch.nn.functional.cosine_similarity(clip, exact)
            assert cosine.median() > 0.999
            assert cosine.min() > 0.9
    with pytest.raises(UserError, match="float32"):
        export_checkpoint(checkpoint, pretrained, tmp_path / "onnx", "onnx", dtype=torch.float16)
    assert not list(tmp_path.glob("*onnx*"))


@pytest.mark.parametrize("kind", ["encoder", "whisper"])
def test_interpolated_weights_are_between_pretrained_and_trained(
    kind: ExportKind, checkpoint: Path, life_size_whisper: Path, tmp_path: Path
):
    start = PretrainedWhisper(str(life_size_whisper))
    trained = read_checkpoint(checkpoint)
    library = WhisperModel if kind == "encoder" else WhisperForConditionalGeneration
    for fraction in (0.0, 0.25, 1.0):
        out = tmp_path / str(fraction)
        export_checkpoint(checkpoint, start, out, kind, interpolate=fraction)
        loaded: Any = library.from_pretrained(out)
        model = loaded if kind == "encoder" else loaded.model
        reference = start.model.model
        pairs = [("encoder.whisper.", model.encoder, reference.encoder)]
        if kind == "whisper":
            pairs.append(("decoder.whisper.", model.decoder, reference.decoder))
        for prefix, found, before in pairs:
            for name, weight in found.state_dict().items():
                expected = (1 - fraction) * before.state_dict()[name] + fraction * (
                    trained[prefix + name]
                )
                torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)


def test_the_trained_encoder_with_the_pretrained_decoder(
    checkpoint: Path, life_size_whisper: Path, tmp_path: Path
):
    start = PretrainedWhisper(str(life_size_whisper))
    out = export_checkpoint(checkpoint, start, tmp_path / "out", "whisper", decoder="pretrained")
    model: Any = WhisperForConditionalGeneration.from_pretrained(out)
    trained, before = read_checkpoint(checkpoint), start.model.model.decoder.state_dict()
    for name, weight in model.model.encoder.state_dict().items():
        assert torch.equal(weight, trained["encoder.whisper." + name])
    for name, weight in model.model.decoder.state_dict().items():
        assert torch.equal(weight, before[name])
    assert any(not torch.equal(before[name], trained["decoder.whisper." + name]) for name in before)
    assert load_encoder(out).padding == "30s"


def test_damaged_and_foreign_checkpoints_are_user_errors(checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:5_000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(broken)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="does not contain an encoder"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="neither a run directory"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[", '{"pretrained": {"path": 3}}'])
def test_a_damaged_environment_is_a_user_error(tmp_path: Path, content: str):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UserError, match=r"environment\.json"):
        find_checkpoint(checkpoint)


class _Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"encoder.whisper.x": _Hostile()}}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "owned").exists()
