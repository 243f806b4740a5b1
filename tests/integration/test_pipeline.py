"""The pipeline of a config: checks before training, and what it shares with its `model.after`."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from tests.support import REPOSITORY
from tests.support.audio import TONES
from tests.support.training import QUIET, settings_for
from whisper_aut import load_encoder, pipeline
from whisper_aut.config import Settings, dump_settings, load_settings
from whisper_aut.errors import UserError
from whisper_aut.pipeline import PipelineOptions, run_pipeline
from whisper_aut.probes.encoders import BASELINE_NAME
from whisper_aut.probes.results import Scores
from whisper_aut.training.run_dir import RunDirectory


def test_probe_shards_that_are_missing_are_found_before_training(
    tiny_whisper: Path, tiny_shards: Path, pipeline_run: Path, tmp_path: Path
):
    task = f"[{pipeline_run / 'tones.yaml'}]"
    during = (f"probe.during.tasks={task}", "probe.during.kind=retrieval")
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path, f"probe.tasks={task}", "probe.root=nowhere", *during
    )
    with pytest.raises(UserError, match=r"The list of probes of .* has 3 problems") as raised:
        run_pipeline(settings, PipelineOptions(REPOSITORY / "conf" / "smoke.yaml"), QUIET)
    assert "no shards at nowhere/speech" in str(raised.value)
    assert "which a retrieval probe does not support" in str(raised.value)
    assert not any(tmp_path.iterdir()), "no run was begun"


def test_a_missing_device_is_reported_before_model_after_is_trained(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runs = tmp_path / "runs"
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        runs,
        "model.after=smoke_speech.yaml",
        "model.path=",
        "hardware.accelerator=cuda",
        "probe.tasks=[]",
    )
    with pytest.raises(UserError, match="PyTorch sees no such device"):
        run_pipeline(settings, PipelineOptions(REPOSITORY / "conf" / "smoke.yaml"), QUIET)
    assert not runs.exists()


def test_a_finished_run_is_reused_without_its_device(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = tmp_path / "runs"
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        runs,
        "model.after=smoke_speech.yaml",
        "model.path=",
        "hardware.accelerator=cuda",
        "probe.tasks=[]",
    )
    finished = RunDirectory(runs / settings.name / "1")
    finished.path.mkdir(parents=True)
    finished.config.touch()
    finished.done.touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *_: pytest.fail("reached", pytrace=False))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        run_pipeline(settings, PipelineOptions(REPOSITORY / "conf" / "smoke.yaml"), QUIET)


def test_model_after_reads_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Settings] = []

    def record(settings: Settings, options: PipelineOptions, console: Console) -> SimpleNamespace:
        seen.append(settings)
        return SimpleNamespace(export=lambda name: tmp_path / name)

    monkeypatch.setattr(pipeline, "run_pipeline", record)
    config = REPOSITORY / "conf" / "smoke.yaml"
    settings = load_settings(
        config, ["corpora.demo.scale=0.07", "corpora.demo.seed=5", f"data.shards={tmp_path}"]
    )
    started = pipeline._train_pretrained(settings, PipelineOptions(config), QUIET)
    assert (
        seen[0].corpora.demo == settings.corpora.demo
    )  # or one would overwrite what the other wrote
    assert started.model.path == str(tmp_path / "whisper")
    elsewhere = load_settings(
        config, ["corpora.demo.scale=0.07", f"corpora.demo.out={tmp_path / 'other'}"]
    )
    pipeline._train_pretrained(elsewhere, PipelineOptions(config), QUIET)
    assert (
        seen[1].corpora.demo
        == load_settings(REPOSITORY / "conf" / "smoke_speech.yaml").corpora.demo
    )


@pytest.mark.slow
def test_two_ranks_probe_during_and_after_training(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    """The first rank scores alone, while the other one waits or has ended."""
    (tmp_path / "tones.yaml").write_text(
        yaml.safe_dump({**TONES, "train": ["{root}/speech"], "test": ["{root}/sound"]})
    )
    task = f"[{tmp_path / 'tones.yaml'}]"
    probes = [
        f"probe.tasks={task}",
        f"probe.during.tasks={task}",
        "probe.during.every_steps=2",
        "probe.seeds=1",
    ]
    ranks = [
        "hardware.devices=2",
        "strategy=ddp",
        "strategy.timeout_minutes=1",
        "trainer.max_steps=2",
        "export=[encoder]",
    ]
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path / "runs", f"probe.root={tiny_shards}", *probes, *ranks
    )
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    command = [sys.executable, "-m", "whisper_aut.cli", "train", str(tmp_path / "config.yaml")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert finished.returncode == 0, finished.stderr[-2000:]
    run = RunDirectory(tmp_path / "runs" / "smoke" / "latest")
    assert {entry["task"] for entry in json.loads(run.scores.read_text())["entries"]} == {"tones"}
    assert "probe/tones" in run.metrics.read_text()
    assert (run.report / "report.html").exists()


def test_encoders_are_probed_on_the_device_of_training(monkeypatch: pytest.MonkeyPatch):
    settings = load_settings(REPOSITORY / "conf" / "smoke.yaml", ["hardware=1xgpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert pipeline._probe_device(settings) == "cuda:3"
    settings.hardware.accelerator = "cpu"
    assert pipeline._probe_device(settings) == "cpu"


def test_the_config_of_a_run_reuses_the_run(
    tiny_whisper: Path,
    tiny_language_model: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Its folder has no probe tasks, so those of `conf` are used. The export keeps its padding
    mode.
    """
    chosen = (
        "trainer.max_steps=1",
        "model.padding=30s",
        "export=[encoder, whisper]",
        "probe.seeds=1",
        "probe.tasks=[]",
    )
    language = (
        "decoder=causal_lm",
        f"decoder.language_model={tiny_language_model}",
        f"probe.root={tiny_shards}",
    )
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs", *chosen, *language)
    run = run_pipeline(
        settings,
        PipelineOptions(REPOSITORY / "conf" / "smoke.yaml", report=False),
        Console(width=400),
    )
    assert "Not exported: whisper. decoder=causal_lm has no such export." in capsys.readouterr().out
    assert load_encoder(run.path).padding == "30s"
    (tmp_path / "conf" / "probe_tasks").mkdir(parents=True)
    task = {**TONES, "train": ["{root}/speech"], "test": ["{root}/sound"]}
    (tmp_path / "conf" / "probe_tasks" / "tones.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.chdir(tmp_path)
    assert (
        run_pipeline(
            load_settings(run.config, ["probe.tasks=[tones]"]),
            PipelineOptions(run.config, report=False),
            QUIET,
        )
        == run
    )
    assert {
        entry.padding for entry in Scores.load(run.scores).entries if entry.encoder != BASELINE_NAME
    } == {"30s"}
