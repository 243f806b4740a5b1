"""Optional packages of training: loggers by one word, DeepSpeed, and messages without them."""

import sqlite3
import sys
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.support.training import QUIET, settings_for
from whisper_aut.errors import UserError
from whisper_aut.training.doctor import check_deepspeed, check_versions
from whisper_aut.training.train import train
from whisper_aut.utils import read_json


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


@pytest.mark.parametrize(
    ("package", "extra", "override"),
    [
        ("tensorboard", "train", "trainer.loggers=[csv,tensorboard]"),
        ("wandb", "wandb", "trainer.loggers=[csv,wandb]"),
        ("mlflow", "mlflow", "trainer.loggers=[csv,mlflow]"),
        ("deepspeed", "train", "strategy=deepspeed_stage_2"),
    ],
)
def test_training_names_a_missing_package_and_the_config_loads(
    package: str,
    extra: str,
    override: str,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("whisper_aut.errors.find_spec", lambda _: None)
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.loggers=[csv]", override)
    message = rf"{package} is not installed. Run: pip install 'whisper-aut\[{extra}\]'"
    with pytest.raises(UserError, match=message):
        train(settings, QUIET)
    assert not list(tmp_path.iterdir())


def test_training_needs_neither_deepspeed_nor_tensorboard(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def version_without_train(name: str) -> str:
        if name in ("deepspeed", "tensorboard"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("whisper_aut.utils.version", version_without_train)
    for name in [name for name in sys.modules if name.startswith(("deepspeed", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("deepspeed", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    run = trained_with("csv", tiny_whisper, tiny_shards, tmp_path)
    assert "deepspeed" not in read_json(run / "environment.json")["packages"]
    assert check_versions().status == "ok"
    assert check_deepspeed("auto").status == "ok"
    assert check_deepspeed("deepspeed_stage_2").status == "fail"


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
