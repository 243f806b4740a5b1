"""Clips in languages that Whisper has no token for: trained, counted, and warned of once."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.support.audio import TEXTS, encode_audio, tone
from tests.support.training import SignalAt, add_callbacks, settings_for
from whisper_aut.corpora.inspect import inspect_shards
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import Interrupted
from whisper_aut.inference.chat import evaluate
from whisper_aut.loading import open_run
from whisper_aut.training.train import train

CLIPS = 24


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Speech of which every second clip is German, every fourth Klingon, under several writings."""
    languages = ["deu", "klingon", "German", ""]
    noise = 0.01 * np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    with ShardWriter(tmp_path / "mixed") as shards:
        for number in range(CLIPS):
            annotation = Annotation(
                TEXTS[number % len(TEXTS)],
                "speech",
                language=languages[number % 4],
                duration_seconds=0.5,
                id=str(number),
            )
            audio = encode_audio(tone(0.5, 300.0 + 10 * number) + noise)
            shards.write(f"speech-{number:02d}", "flac", audio, annotation)
    return tmp_path / "mixed"


def overrides(mixed: Path) -> list[str]:
    source = f"[{{path: {mixed}, domain: speech}}]"
    return [
        f"data.train={source}",
        f"data.valid={source}",
        "data.domains={speech: 1, sound: 0, music: 0}",
        "data.mode=epochs",
        "trainer.max_epochs=1",
        "data.batch_clips=4",
        "trainer.valid_every_steps=3",
        "trainer.checkpoint_every_steps=3",
    ]


def test_unknown_languages_are_counted_and_warned_of_once_with_the_number_of_clips(
    tiny_whisper: Path, tiny_shards: Path, mixed: Path, tmp_path: Path
):
    console = Console(file=StringIO(), width=400)
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs", *overrides(mixed))
    run = train(settings, console).run
    assert json.loads(run.done.read_text())["unknown_languages"] == {"klingon": CLIPS // 4}
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert printed.count("has no token") == 1
    assert "clips have a language for which this Whisper has no token ('klingon': " in printed
    assert f"{CLIPS // 4} clips were trained without a language token" in printed
    result = evaluate(open_run(run.path), [str(mixed)])
    assert result.unknown_languages == {"klingon": CLIPS // 4}
    assert result.clips == CLIPS
    warnings = inspect_shards(mixed).warnings
    assert any("'klingon': 6" in warning for warning in warnings)


def test_the_count_goes_on_over_a_resume(
    tiny_whisper: Path,
    tiny_shards: Path,
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs", *overrides(mixed))
    with monkeypatch.context() as patch:
        add_callbacks(patch, SignalAt(3, 15))
        with pytest.raises(Interrupted):
            train(settings, Console(quiet=True))
    run: Any = train(settings, Console(quiet=True), resume="auto").run
    assert json.loads(run.done.read_text())["unknown_languages"] == {"klingon": CLIPS // 4}
