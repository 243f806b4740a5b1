"""Each kind of addition works as docs/extend.md describes it, without a change in the package."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import whisper_aut
from tests.support.pages import DOCS, blocks_of, follow
from whisper_aut.cli import main
from whisper_aut.data.shards import open_index
from whisper_aut.export.hf import read_checkpoint
from whisper_aut.probes.results import Scores

PAGE = DOCS / "extend.md"


@pytest.fixture
def follow_section(reader_folder: Path) -> Any:
    """Follow a section of the page, after the one that writes `conf/mine.yaml`."""
    follow(blocks_of(PAGE, "Add a config"), commands=False)
    return lambda section: follow(blocks_of(PAGE, section), commands=True)


def files_written(section: str) -> list[str]:
    return [block.title for block in blocks_of(PAGE, section) if block.title]


def test_a_config_can_be_planned(follow_section: Any):
    follow_section("Add a config")


def test_a_decoder_trains_and_its_encoder_loads(follow_section: Any):
    names = follow_section("Add a decoder")
    assert files_written("Add a decoder") == ["ctc_decoder.py", "conf/decoder/ctc.yaml"]
    run: Any = names["run"]
    assert json.loads(run.done.read_text())["steps"] == 2
    assert "decoder.head.weight" in read_checkpoint(run.last_checkpoint)
    (frames,) = whisper_aut.load_encoder(run.path).encode([torch.randn(16_000).numpy()], 16_000)
    assert frames.isfinite().all()


def test_an_adapter_trains_with_a_language_model(
    follow_section: Any, tiny_language_model: Path, reader_folder: Path
):
    follow_section("Add an adapter")
    assert files_written("Add an adapter") == ["mean_adapter.py"]
    language_model = f"decoder.language_model={tiny_language_model}"
    chosen = ["decoder=causal_lm", language_model, "decoder.adapter.name=mean", "name=with_mean"]
    assert main(["train", "conf/mine.yaml", *chosen]) == 0
    weights = read_checkpoint(Path("runs/with_mean/latest/checkpoints/last.ckpt"))
    assert {name for name in weights if "adapter.layer" in name}


def test_an_instruction_task_is_trained_and_evaluated(follow_section: Any):
    follow_section("Add an instruction task")
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert answers


def test_a_probe_task_scores_encoders(follow_section: Any):
    follow_section("Add a probe task")
    assert files_written("Add a probe task") == ["conf/probe_tasks/tones.yaml"]
    scores = Scores.load("runs/tones/scores.json")
    assert {entry.task for entry in scores.entries} == {"tones"}


def test_a_corpus_recipe_builds_shards(follow_section: Any):
    follow_section("Add a corpus recipe")
    assert files_written("Add a corpus recipe") == ["tones.yaml", "tones.py"]
    assert open_index("shards/tones/test").samples == 1


def test_an_augmentation_changes_training(follow_section: Any):
    run: Any = follow_section("Add an augmentation")["run"]
    assert files_written("Add an augmentation") == ["echo.py"]
    assert json.loads(run.done.read_text())["steps"] == 2
    assert "custom:\n      echo:\n        delay_seconds: 0.2" in run.config.read_text()
