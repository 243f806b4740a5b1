"""Training through a language model: swapped in by one word, frozen whatever the strategy, the
adapter first where asked.
"""

import json
import shutil
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.support.training import (
    QUIET,
    SignalAt,
    add_callbacks,
    assert_same_weights,
    settings_for,
    weights_of,
)
from whisper_aut.errors import Interrupted
from whisper_aut.loading import open_run
from whisper_aut.models.language_model import weights_hash
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.report.html import TEXT_FIELDS
from whisper_aut.training.run_dir import list_runs
from whisper_aut.training.train import train


@pytest.fixture
def language(tiny_language_model: Path) -> list[str]:
    return ["decoder=causal_lm", f"decoder.language_model={tiny_language_model}"]


def test_decoders_are_swapped_on_the_command_line_alone(
    tiny_whisper: Path, tiny_shards: Path, tiny_language_model: Path, tmp_path: Path
):
    chosen = {
        "whisper": ["decoder=whisper"],
        "causal_lm": ["decoder=causal_lm", f"decoder.language_model={tiny_language_model}"],
    }
    for name, overrides in chosen.items():
        run = train(settings_for(tiny_whisper, tiny_shards, tmp_path / name, *overrides), QUIET).run
        assert json.loads((run.path / "environment.json").read_text())["decoder"]["name"] == name
        parts = {key.split(".")[0] for key in weights_of(run)}
        assert parts == {"encoder", "decoder"}
        metrics = json.loads(run.done.read_text())["metrics"]
        assert {"valid/loss_speech", "valid/loss_sound", "valid/loss_music"} <= metrics.keys()
        assert any(key.startswith("tasks/loss_") for key in metrics)
        generated = [
            json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()
        ]
        assert generated[0].keys() == {"step", *TEXT_FIELDS}


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_2", marks=pytest.mark.slow),
    ],
)
def test_the_language_model_is_bit_identical_after_20_steps(
    strategy: str,
    language: list[str],
    tiny_whisper: Path,
    tiny_shards: Path,
    tiny_language_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    trainers = add_callbacks(monkeypatch)
    overrides = [
        *language,
        f"strategy={strategy}",
        "trainer.max_steps=20",
        "data.batch_clips=2",
        "trainer.valid_every_steps=20",
    ]
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET).run
    decoder: Any = trainers[0].lightning_module.decoder
    assert not decoder.model.training
    assert (
        weights_hash(AutoModelForCausalLM.from_pretrained(tiny_language_model))
        == decoder.identity["weights"]
    )
    frozen = AutoModelForCausalLM.from_pretrained(tiny_language_model).state_dict()
    for name, parameter in decoder.model.named_parameters():
        assert torch.equal(parameter, frozen[name]), name
    if strategy != "deepspeed_stage_2":
        assert not any(key.startswith("decoder.model.") for key in weights_of(run))


def test_the_adapter_learns_alone_first(
    language: list[str], tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    before = PretrainedWhisper(str(tiny_whisper)).encoder.state_dict()
    options = [*language, "trainer.max_steps=3", "optim.warmup_steps=1"]
    alone = train(
        settings_for(
            tiny_whisper, tiny_shards, tmp_path / "alone", *options, "optim.encoder_after_step=3"
        ),
        Console(file=(alone_says := StringIO()), width=200),
    ).run
    both = train(
        settings_for(
            tiny_whisper, tiny_shards, tmp_path / "both", *options, "optim.encoder_after_step=2"
        ),
        Console(file=(both_say := StringIO()), width=200),
    ).run
    warning = "the run ends before the encoder is trained"
    assert warning in alone_says.getvalue()
    assert warning not in both_say.getvalue()
    for name, weight in before.items():
        assert torch.equal(weights_of(alone)[f"encoder.whisper.{name}"], weight), name
    assert not torch.equal(weights_of(both)["encoder.whisper.conv1.weight"], before["conv1.weight"])
    changed = [
        key
        for key, weight in weights_of(alone).items()
        if key.startswith("decoder.adapter") and weight.ndim > 1
    ]
    assert len(changed) == 2


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("auto", "bf16-mixed"),
        pytest.param("deepspeed_stage_2", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_3", "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_encoder_stays(
    strategy: str,
    precision: str,
    language: list[str],
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
):
    """To the bit in its checkpoints, though DeepSpeed computes with a rounded copy of it."""
    chosen = [
        f"strategy={strategy}",
        f"hardware.precision={precision}",
        "model.freeze_encoder=true",
    ]
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *language, *chosen), QUIET).run
    before = PretrainedWhisper(str(tiny_whisper)).encoder.state_dict()
    assert all(
        torch.equal(weights_of(run)[f"encoder.whisper.{name}"], weight)
        for name, weight in before.items()
    )


@pytest.mark.parametrize("chosen", ["frozen", "lora"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    chosen: str,
    language: list[str],
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """What a sample is asked, and the phase of training, are the same after a resume."""
    options = [*language, f"decoder.train={chosen}", "optim.encoder_after_step=2"]
    if chosen != "frozen":
        options += ["decoder.dtype=bfloat16", "hardware.precision=bf16-mixed"]
    whole = train(settings_for(tiny_whisper, tiny_shards, tmp_path / "whole", *options), QUIET).run
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "parts", *options)
    with monkeypatch.context() as patch:
        add_callbacks(patch, SignalAt(3, 15))
        with pytest.raises(Interrupted):
            train(settings, QUIET)
    resumed = train(settings, QUIET, resume="auto").run
    assert_same_weights(weights_of(whole), weights_of(resumed), atol=1e-6)


def test_a_date_in_the_chat_template_is_that_of_the_runs_start_however_late_it_goes_on(
    tiny_whisper: Path,
    tiny_shards: Path,
    tiny_language_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    dated = Path(shutil.copytree(tiny_language_model, tmp_path / "dated"))
    template = (dated / "chat_template.jinja").read_text()
    (dated / "chat_template.jinja").write_text("Today: {{ strftime_now('%d %b %Y') }}\n" + template)
    options = ["decoder=causal_lm", f"decoder.language_model={dated}"]
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *options)
    with monkeypatch.context() as patch:
        add_callbacks(patch, SignalAt(3, 15))
        with pytest.raises(Interrupted):
            train(settings, QUIET)
    (run,) = list_runs(Path(settings.runs), settings.name)
    config = yaml.safe_load(run.config.read_text())
    assert config["decoder"]["date"] == date.today().isoformat()
    config["decoder"]["date"] = "2025-02-03"  # as if it had begun then
    run.config.write_text(yaml.safe_dump(config))
    trainers = add_callbacks(monkeypatch)
    train(settings, QUIET, resume="auto")
    for module in (trainers[0].lightning_module, open_run(run.path)):
        opening = module.codec.tokenizer.decode(module.codec.frame.opening)
        assert opening.startswith("Today: 03 Feb 2025\n")


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        pytest.param("auto", "32-true", marks=pytest.mark.slow),
        ("auto", "bf16-mixed"),
        pytest.param("ddp", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_2", "32-true", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_2", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("deepspeed_stage_3", "bf16-mixed", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_all_that_is_trained_moves_though_the_language_model_is_in_bfloat16(
    trained: str,
    strategy: str,
    precision: str,
    language: list[str],
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """At the learning rate of a fine-tuning, whose steps are smaller than what bfloat16 can tell
    apart.
    """
    before: dict[str, torch.Tensor] = {}

    def remember(trainer: Any, module: Any) -> None:
        before.update(trainer.strategy.model_state().collect(rank=0, ranks=1).weights)

    trainers = add_callbacks(monkeypatch, LambdaCallback(on_train_start=remember))
    overrides = [
        *language,
        f"decoder.train={trained}",
        "decoder.dtype=bfloat16",
        f"strategy={strategy}",
        f"hardware.precision={precision}",
        "optim.lr=1e-6",
        "optim.weight_decay=0",
        "optim.warmup_steps=1",
        "trainer.max_steps=6",
        "data.batch_clips=2",
        "trainer.valid_every_steps=6",
    ]
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET).run
    after, module = weights_of(run), trainers[0].lightning_module
    learned = [name for name, p in module.named_parameters() if p.requires_grad and name in before]
    assert any(name.startswith("decoder.model.") for name in learned)
    assert [name for name in learned if torch.equal(after[name], before[name])] == []
    assert {after[name].dtype for name in learned} == {torch.float32}
    if trained == "lora" and strategy in ("auto", "ddp"):
        assert module.decoder.model.get_input_embeddings().weight.dtype == torch.bfloat16
