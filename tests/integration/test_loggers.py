"""Loggers by one word: what they write, what they need, and that they need no network."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.training import QUIET, settings_for
from whisper_aut.errors import UserError
from whisper_aut.training.train import train


def trained_with(loggers: str, tiny_whisper: Path, tiny_shards: Path, runs: Path) -> Path:
    overrides = [f"trainer.loggers=[{loggers}]", "trainer.max_steps=2"]
    return train(settings_for(tiny_whisper, tiny_shards, runs, *overrides), QUIET).run.path


def test_only_what_is_named_is_written(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    run = trained_with("csv", tiny_whisper, tiny_shards, tmp_path)
    assert "train/loss" in (run / "logs" / "metrics.csv").read_text()
    assert not (run / "tensorboard").exists()


def test_a_logger_that_cannot_be_is_refused_before_anything_is_loaded(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    with pytest.raises(UserError) as caught:
        settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.loggers=[tensorboard,comet]")
    assert "comet" in str(caught.value)
    with pytest.raises(UserError, match="must contain csv"):
        settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.loggers=[tensorboard]")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said(
    name: str,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("whisper_aut.config.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=rf"{name} is not installed. Run: pip install 'whisper-aut\[{name}\]'"
    ):
        settings_for(tiny_whisper, tiny_shards, tmp_path, f"trainer.loggers=[csv,{name}]")


def test_wandb_writes_offline(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb")
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    run = trained_with("csv,wandb", tiny_whisper, tiny_shards, tmp_path)
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_writes_into_the_run(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = trained_with("csv,mlflow", tiny_whisper, tiny_shards, tmp_path)
    with closing(sqlite3.connect(run / "mlflow.db")) as base:
        assert ("train/loss",) in base.execute("select distinct key from metrics").fetchall()
