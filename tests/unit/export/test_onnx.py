"""The ONNX graph computes the encoder's frames, for short and long clips."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.numeric import assert_frames_close
from whisper_aut import load_encoder
from whisper_aut.audio.logmel import MAX_SAMPLES
from whisper_aut.cli import main
from whisper_aut.export.onnx import GRAPH, MIN_SAMPLES, WaveformEncoder, write_onnx
from whisper_aut.models.encoder import Padding

# The shortest, an odd one, 0.5 s, 5 s, two whose last windows reach the reflect padding, and 30 s.
LENGTHS = (MIN_SAMPLES, 1_601, 8_000, 80_000, MAX_SAMPLES - 240, MAX_SAMPLES - 1, MAX_SAMPLES)


def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    loud = [(generator.standard_normal(samples) * 0.1).astype(np.float32) for samples in LENGTHS]
    return [*loud, loud[3] / 1000]  # the silence after a quiet clip is less far below it


@pytest.mark.parametrize("padding", ["none", "30s"])
@torch.no_grad()
def test_the_traced_encoder_is_the_encoder(life_size_whisper: Path, padding: Padding):
    encoder = load_encoder(life_size_whisper, padding=padding)
    traced = WaveformEncoder(encoder.encoder.whisper, padding).eval()
    for clip, expected in zip(clips(), encoder.encode(clips(), 16_000), strict=True):
        assert_frames_close(traced(torch.from_numpy(clip)), expected)


def test_the_command_writes_a_graph_and_a_card_whose_snippet_runs_it(
    in_pipeline_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    runtime, out = pytest.importorskip("onnxruntime"), tmp_path / "graph"
    assert main(["export", "runs/aut_tiny/latest", "--out", str(out), "--format", "onnx"]) == 0
    assert "onnxruntime.InferenceSession" in capsys.readouterr().out
    session = runtime.InferenceSession(out / GRAPH, providers=["CPUExecutionProvider"])
    for clip, expected in zip(
        clips(), load_encoder("runs/aut_tiny/latest").encode(clips(), 16_000), strict=True
    ):
        (frames,) = session.run(None, {"waveform": clip})
        assert_frames_close(frames, expected)
    card = (out / "README.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)
    monkeypatch.chdir(tmp_path)  # the card names the graph by its folder
    Path("clip.wav").symlink_to(in_pipeline_run / "clip.wav")
    found = {}
    exec(compile(snippet, "card", "exec"), found)
    assert found["frames"].shape[-2:] == (50, 32)


@pytest.mark.parametrize("padding", ["none", pytest.param("30s", marks=pytest.mark.slow)])
def test_a_graph_of_values_of_real_size_computes_the_encoders_frames(
    life_size_whisper: Path, tmp_path: Path, padding: Padding
):
    runtime = pytest.importorskip("onnxruntime")
    encoder = load_encoder(life_size_whisper, padding=padding)
    path = write_onnx(encoder.encoder.whisper, padding, tmp_path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for clip, expected in zip(clips(), encoder.encode(clips(), 16_000), strict=True):
        assert_frames_close(session.run(None, {"waveform": clip})[0], expected)
