"""What `hardware.precision=auto` means on which machine."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.support.training import QUIET, settings_for
from whisper_aut.training.factory import run_fingerprint
from whisper_aut.training.strategies import NO_BFLOAT16, resolve_precision
from whisper_aut.training.train import train


@pytest.mark.parametrize(
    ("accelerator", "has_cuda", "has_bfloat16", "expected"),
    [
        ("auto", True, True, ("bf16-mixed", "")),
        ("gpu", True, True, ("bf16-mixed", "")),
        ("auto", True, False, ("32-true", NO_BFLOAT16)),
        ("auto", False, False, ("32-true", "")),
        ("cpu", True, True, ("32-true", "")),
        ("mps", False, False, ("32-true", "")),
    ],
)
def test_auto_is_bfloat16_where_a_gpu_computes_in_it(
    accelerator: str,
    has_cuda: bool,
    has_bfloat16: bool,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported",
        lambda including_emulation: has_bfloat16 or including_emulation,
    )
    assert resolve_precision("auto", accelerator) == expected
    assert resolve_precision("16-mixed", accelerator) == ("16-mixed", "")


def test_a_run_records_the_precision_that_auto_meant(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    chosen = ("hardware=auto", "hardware.accelerator=cpu", "trainer.max_steps=1")
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen)
    assert settings.hardware.precision == "auto"
    run = train(settings, QUIET).run
    assert yaml.safe_load(run.config.read_text())["hardware"]["precision"] == "32-true"
    assert train(settings, QUIET).reused
    float32 = replace(settings, hardware=replace(settings.hardware, precision="32-true"))
    assert run_fingerprint(settings) == run_fingerprint(float32)
