"""`whisper-aut evaluate` on a Whisper that this project has not trained."""

import io
import json
from pathlib import Path

import pytest
import soundfile
import torch
from torchmetrics.functional.text import word_error_rate
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from whisper_aut.audio.decode import ClipLimits
from whisper_aut.cli import main
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index


def test_a_released_whisper_scores_what_transformers_generates(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards, out = tiny_shards / "speech", tmp_path / "answers.jsonl"
    command = ["evaluate", str(tiny_whisper), str(shards), "--limit", "4", "--out", str(out)]
    command += ["--max-new-tokens", "64"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    samples = list(iter_samples(open_index(shards), ClipLimits()))[:4]

    processor = WhisperProcessor.from_pretrained(tiny_whisper)
    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper).eval()
    normalize = BasicTextNormalizer()
    written, meant = [], []
    for sample, answer in zip(samples, answers, strict=True):
        assert isinstance(sample, Sample)
        waveform, rate = soundfile.read(io.BytesIO(sample.audio), dtype="float32")
        inputs = processor(waveform, sampling_rate=rate, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(
                inputs.input_features, language="en", task="transcribe", max_new_tokens=64
            )
        text = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        assert answer["generated"] == text
        written.append(normalize(text).strip())
        meant.append(normalize(sample.annotation.text).strip())
    expected = float(word_error_rate(written, meant))
    assert f"wer_transcription            {expected:.4f}" in printed


def test_padding_of_a_released_whisper_is_a_choice_and_of_a_run_is_not(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = str(tiny_shards / "speech")
    texts = []
    for padding in ("none", "30s"):
        out = tmp_path / f"{padding}.jsonl"
        name = f"{tiny_whisper}@{padding}"
        assert main(["evaluate", name, shards, "--limit", "2", "--out", str(out)]) == 0
        texts.append(out.read_text())
    assert texts[0] != texts[1]
    run = tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text("{}")
    assert main(["evaluate", f"{run}@none", shards]) == 1
    assert "a run uses the padding of its training" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/missing/latest", "no/such/folder/at/all"])
def test_a_model_that_does_not_exist_is_one_clear_line(
    name: str, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", name, str(tiny_shards / "speech")]) == 1
    error = capsys.readouterr().err
    assert name in error
    assert "Traceback" not in error
