"""The LALM probe from the command line: a joint training on probe tasks over frozen encoders, with
generated answers and the cost to reach a loss.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.audio import TONES
from tests.support.training import weights_of
from whisper_aut.cli import main
from whisper_aut.config import load_settings
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.shards import open_index
from whisper_aut.data.targets import Instruction, Instructions
from whisper_aut.errors import UserError
from whisper_aut.experiments.analysis import Results
from whisper_aut.experiments.lalm import task_folders, write_lalm_probe
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.probes.tasks import ProbeTask, load_task, task_from_mapping
from whisper_aut.training.factory import build_data, build_decoder, build_pretrained
from whisper_aut.training.run_dir import list_runs

TASKS = {
    "tones": {"prompt": "Low or high?", "train": ["sound"], "valid": ["music"], "test": ["speech"]},
    "captions": {"metric": "recall@1", "label": "text", "train": ["sound"], "test": ["music"]},
    "words": {
        "metric": "word_accuracy",
        "label": "text",
        "domain": "speech",
        "train": ["speech"],
        "test": ["music"],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Three tasks on the tiny shards; two of them are trained on the same clips."""
    paths = []
    for name, values in TASKS.items():
        values = {**TONES, "title": f"About {name}", **values, "name": name}
        for part in ("train", "valid", "test"):
            values[part] = [f"{{root}}/{folder}" for folder in values.get(part, [])]
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(values))
    return list(map(str, paths))


@pytest.fixture
def overrides(tiny_language_model: Path) -> list[str]:
    return [
        f"decoder.language_model={tiny_language_model}",
        "trainer.max_steps=2",
        "trainer.valid_every_steps=1",
        "trainer.log_every_steps=1",
        "data.workers=0",
        "hardware=cpu",
    ]


def test_each_clip_is_asked_the_question_of_its_task(
    tiny_whisper: Path, tiny_shards: Path, tasks: list[str], overrides: list[str], tmp_path: Path
):
    loaded = [load_task(task, tmp_path) for task in tasks]
    write_lalm_probe(
        [str(tiny_whisper)],
        loaded,
        tmp_path / "out",
        root=str(tiny_shards),
        seeds=1,
        overrides=[*overrides, "data.batch_clips=45"],
    )
    settings = load_settings(tmp_path / "out" / "lalm.yaml")
    assert settings.model.freeze_encoder
    codec: Any
    decoder, codec = build_decoder(settings, build_pretrained(settings))
    assert isinstance(decoder.adapter.layers[0], torch.nn.Linear)
    batch = next(iter(build_data(settings, codec, 80).train_dataloader()))
    clips = list(zip(batch.tasks, batch.domains, batch.texts, strict=True))
    assert {(task, domain) for task, domain, _ in clips} == {
        ("tones", "sound"),
        ("captions", "sound"),
        ("words", "speech"),
    }
    assert all((task == "tones") == text.startswith("class ") for task, _, text in clips)
    assert min(batch.tasks.count(name) for name in TASKS) > 8  # each a third of the clips
    prompts = {
        name: codec.tokenizer.decode(prompt[prompt >= 0])
        for name, prompt in zip(batch.tasks, batch.targets.prompts(), strict=True)
    }
    assert "Low or high?" in prompts["tones"]
    assert "About words: transcribe the speech." in prompts["words"]


def test_encoders_are_compared_by_answers_and_cost(
    tiny_whisper: Path,
    tiny_shards: Path,
    tasks: list[str],
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("whisper_aut.experiments.lalm.MAX_TEXT_TOKENS", 4)
    out = tmp_path / "out"
    command = [
        *("lalm", f"random:{tiny_whisper}", *overrides, "--against", f"{tiny_whisper}@none"),
        *("--tasks", *tasks, "--root", str(tiny_shards), "--seeds", "1", "--losses", "100", "0.01"),
        *("--out", str(out)),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "LALM probe" in (out / "lalm.md").read_text()
    assert "XARES-LLM form" in (out / "lalm.md").read_text()
    assert "Cost to reach a validation loss" in printed
    results = Results.load(out / "lalm.json")
    assert [one.arm for one in results.measurements] == ["tiny@none", "random tiny"]
    for one in results.measurements:
        names = {"exact_tones", "rouge_captions", "bleu_captions", "wer_words"}
        assert set(one.answers) == names
        assert [point.step for point in one.curve] == [1, 2]
        assert one.curve[-1].teraflop
    assert {one.padding for one in map(_model, list_runs(out, "lalm-tiny_none-s0"))} == {"none"}
    assert {one.padding for one in map(_model, list_runs(out, "lalm-random_tiny-s0"))} == {"30s"}

    (run,) = list_runs(out, "lalm-tiny_none-s0")
    start = PretrainedWhisper(str(tiny_whisper)).encoder.state_dict()
    trained = weights_of(run)
    for name, weight in start.items():
        torch.testing.assert_close(trained[f"encoder.whisper.{name}"], weight, atol=0, rtol=0)
    assert any("lora_B" in name and weight.abs().sum() > 0 for name, weight in trained.items())
    answers = out / "lalm" / "answers"
    rows = [
        json.loads(line)
        for line in (answers / "lalm-tiny_none-s0-tones.jsonl").read_text().splitlines()
    ]
    assert len(rows) == open_index(str(tiny_shards / "speech")).samples
    assert {row["reference"] for row in rows} == {"class 0", "class 1"}


def _model(run):
    return load_settings(run.config).model


def test_all_unusable_encoders_and_tasks_are_listed(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    events = {"metric": "segment_f1_macro", "segment_seconds": 1.0, "label": "events"}
    picky = {"select": {"label": ["class 0"]}, "separator": "|", "test": ["{root}/nowhere"]}
    tasks = [
        task_from_mapping({**TONES, "name": "events", **events}, "events"),
        task_from_mapping({**TONES, "name": "picky", **picky}, "picky"),
    ]
    with pytest.raises(UserError) as raised:
        write_lalm_probe(
            ["logmel", str(tiny_whisper)], tasks, tmp_path, root=str(tiny_shards), seeds=1
        )
    for part in (
        "'events': a language model is not asked for events",
        "'picky': trainings cannot `select` clips",
        "'picky': labels must be separated by a comma or semicolon, not '|'",
        "nowhere",
        "The LALM probe takes Whispers: There is no model directory logmel.",
    ):
        assert part in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_loss_needs_a_validation_part(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    task = task_from_mapping(TONES, "tones")
    with pytest.raises(UserError, match="No task has a validation part"):
        write_lalm_probe(
            [str(tiny_whisper)], [task], tmp_path, root=str(tiny_shards), seeds=1, losses=[1.0]
        )


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        ("ab", (["a"], [], ["b"])),
        ("abcde", (["a", "b", "c"], ["d"], ["e"])),
    ],
)
def test_the_last_fold_is_tested(folds: str, expected: tuple[list[str], ...]):
    values = {name: value for name, value in TONES.items() if name not in ("train", "test")}
    task = task_from_mapping({**values, "split": {"scheme": "folds", "folds": [*folds]}}, "folds")
    assert isinstance(task, ProbeTask)
    assert task_folders(task, "") == expected


def test_the_language_of_a_clip_can_be_the_answer():
    asked = Instructions({"spoken": Instruction(["Which?"], "{language:words}", ["spoken"])})
    clip = Annotation(language="de", task="asr")
    assert asked.answers(clip, "speech") == {}
    assert asked.only(["spoken"]).draw(clip, "speech", 0).answer == "de"
