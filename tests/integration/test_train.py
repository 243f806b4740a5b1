"""Training through the real entry point: losses, accumulation, resume, stops, and the files of a
run.
"""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import HalfPrecision
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchmetrics import Metric

from tests.support import REPOSITORY
from tests.support.training import (
    QUIET,
    SignalAt,
    add_callbacks,
    assert_same_weights,
    settings_for,
    weights_of,
)
from whisper_aut.cli import _rank, main
from whisper_aut.config import dump_settings, load_settings
from whisper_aut.data.shards import open_index
from whisper_aut.errors import Interrupted, Preempted, UserError
from whisper_aut.export.hf import read_checkpoint
from whisper_aut.models.module import AudioTextModule
from whisper_aut.models.pretrained import PretrainedWhisper
from whisper_aut.report.plots import read_metrics
from whisper_aut.training import train as train_module
from whisper_aut.training.checkpoint import checkpoints_in, read_manifest
from whisper_aut.training.factory import run_fingerprint
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.training.train import explain_errors, train

POSITIONS = "model.encoder.embed_positions.weight"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_features_on_the_device_train_the_same(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, precision: str
):
    def losses(features: str) -> list[float]:
        overrides = [
            f"data.features={features}",
            f"hardware.precision={precision}",
            "data.augment.spec=true",
            "trainer.max_steps=3",
        ]
        run = train(
            settings_for(tiny_whisper, tiny_shards, tmp_path / features, *overrides), QUIET
        ).run
        return [value for _, value in read_metrics(run.path / "logs" / "metrics.csv")["train/loss"]]

    by_workers, on_device = losses("workers"), losses("device")
    assert len(by_workers) == 3
    assert_close(on_device, by_workers, atol=0.0 if precision == "32-true" else 0.05, rtol=0)


def test_a_run_leaves_everything_behind_and_is_not_run_twice(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path)
    run = train(settings, QUIET).run
    for name in (
        "config.yaml",
        "environment.json",
        "done.json",
        "samples.jsonl",
        "logs/metrics.csv",
        "checkpoints/last.ckpt",
    ):
        assert (run.path / name).exists(), name
    assert any((run.path / "tensorboard").iterdir())
    done = json.loads(run.done.read_text())
    assert done["steps"] == 6
    assert {"train/loss", "train/grad_norm"} <= done["metrics"].keys()
    assert {f"valid/loss_{domain}" for domain in ("speech", "sound", "music")} <= done[
        "metrics"
    ].keys()
    facts = json.loads((run.path / "environment.json").read_text())
    assert sum(source["weight"] for source in facts["data"]) == pytest.approx(1.0)
    again = train(settings, QUIET)
    assert again.reused
    assert again.run == run
    other = train(settings_for(tiny_whisper, tiny_shards, tmp_path, "seed=1"), QUIET)
    assert not other.reused


def test_other_weights_at_the_same_path_are_another_run(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    whisper, language_model, valid = (tmp_path / name for name in ("whisper", "lm", "valid"))
    shutil.copytree(tiny_whisper, whisper)
    shutil.copytree(tiny_shards / "speech", valid)
    language_model.mkdir()
    (language_model / "model.safetensors").write_bytes(b"one")
    settings = settings_for(
        whisper,
        tiny_shards,
        tmp_path,
        f"data.valid=[{{path: {valid}, domain: speech}}]",
        "data.augment.noise=[]",
    )
    settings = replace(
        settings, decoder={**settings.decoder, "language_model": str(language_model)}
    )
    fingerprints = [run_fingerprint(settings)]
    assert run_fingerprint(settings) == fingerprints[0]
    weights = whisper / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    fingerprints.append(run_fingerprint(settings))
    (language_model / "model.safetensors").write_bytes(b"two")
    fingerprints.append(run_fingerprint(settings))
    shutil.rmtree(valid)
    shutil.copytree(tiny_shards / "sound", valid)
    fingerprints.append(run_fingerprint(settings))
    settings.data.augment.noise.append(str(valid))
    fingerprints.append(run_fingerprint(settings))
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize(
    "chosen",
    [
        ("model.path=", "model.scratch={texts: [TEXTS]}"),
        ("decoder=causal_lm", "decoder.scratch={texts: [TEXTS], out: TEXTS}"),
    ],
    ids=["whisper", "language model"],
)
def test_other_texts_of_a_scratch_model_are_another_run(
    chosen: tuple[str, ...], tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    texts = tmp_path / "texts"
    chosen = tuple(override.replace("TEXTS", str(texts)) for override in chosen)
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen)
    fingerprints = set()
    for domain in ("speech", "sound"):
        shutil.rmtree(texts, ignore_errors=True)
        shutil.copytree(tiny_shards / domain, texts)
        fingerprints.add(run_fingerprint(settings))
    assert len(fingerprints) == 2


def test_probes_are_part_of_a_run_only_if_they_may_stop_it(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def fingerprint(*chosen: str) -> str:
        return run_fingerprint(settings_for(tiny_whisper, tiny_shards, tmp_path, *chosen))

    stop, tasks = "probe.during.on_drop=stop", "probe.during.tasks=[esc10]"
    assert fingerprint() == fingerprint(tasks) == fingerprint(stop)
    assert len({fingerprint(), fingerprint(tasks, stop)}) == 2


def test_the_last_checkpoint_is_of_the_last_step(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    run = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.checkpoint_every_steps=4"), QUIET
    ).run
    assert read_manifest(run.last_checkpoint).step == 6


def test_the_module_trains_in_train_mode_with_fixed_positions(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    modes: list[bool] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            modes.extend(part.training for part in module.modules())

    settings = settings_for(tiny_whisper, tiny_shards, tmp_path)
    run = train(settings, QUIET, callbacks=[Watch()]).run
    assert modes
    assert all(modes)
    before = PretrainedWhisper(str(tiny_whisper)).encoder.state_dict()
    after = weights_of(run)
    assert torch.equal(
        after["encoder.whisper.embed_positions.weight"], before["embed_positions.weight"]
    )
    assert not torch.equal(after["encoder.whisper.conv1.weight"], before["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["whisper", "causal_lm"])
def test_two_cpu_ranks_equal_one_with_the_doubled_batch(
    decoder: str, tiny_whisper: Path, tiny_shards: Path, tiny_language_model: Path, tmp_path: Path
):
    """Through the real command line, where Lightning launches the second rank; texts differ in
    length between the ranks.
    """
    runs = []
    for name, overrides in (
        ("one", ["data.batch_clips=4"]),
        ("two", ["data.batch_clips=2", "hardware.devices=2", "strategy=ddp"]),
    ):
        language = (
            [f"decoder.language_model={tiny_language_model}"] if decoder == "causal_lm" else []
        )
        chosen = [f"decoder={decoder}", *language, *overrides, "export=[]", "probe.tasks=[]"]
        settings = settings_for(tiny_whisper, tiny_shards, tmp_path / name, *chosen)
        (tmp_path / f"{name}.yaml").write_text(dump_settings(settings))
        command = [sys.executable, "-m", "whisper_aut.cli", "train", str(tmp_path / f"{name}.yaml")]
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert finished.returncode == 0, finished.stderr[-2000:]
        (run,) = (path for path in (tmp_path / name / "smoke").glob("2*") if path.is_dir())
        runs.append(read_checkpoint(run / "checkpoints" / "last.ckpt"))
    assert_same_weights(runs[0], runs[1], atol=2e-5)


def test_two_runs_of_one_config_are_the_same(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    runs = [
        train(settings_for(tiny_whisper, tiny_shards, tmp_path / name), QUIET).run for name in "ab"
    ]
    assert_same_weights(weights_of(runs[0]), weights_of(runs[1]), atol=0)


def test_mixed_precision_clips(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    overrides = ("hardware.precision=bf16-mixed", "optim.gradient_clip=0.1", "trainer.max_steps=2")
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET).run
    assert {weight.dtype for weight in weights_of(run).values()} == {torch.float32}
    assert len(read_metrics(run.metrics)["train/grad_norm"]) == 2


@pytest.mark.parametrize(
    "strategy", ["auto", pytest.param("deepspeed_stage_2", marks=pytest.mark.slow)]
)
def test_validation_counts_in_float32_whatever_the_precision(
    strategy: str,
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[tuple[str, torch.Tensor]] = []
    modules: list[AudioTextModule] = []
    forward = AudioTextModule.forward

    def recorded(module: AudioTextModule, batch: Any) -> Any:
        frames, loss = forward(module, batch)
        modules.append(module)
        if not module.training:
            seen.extend(zip(batch.domains, loss.token_nll.double().split(loss.counts), strict=True))
        return frames, loss

    monkeypatch.setattr(AudioTextModule, "forward", recorded)
    overrides = (
        f"strategy={strategy}",
        "hardware.precision=bf16-mixed",
        "trainer.max_steps=1",
        "trainer.generate_clips=100",
    )
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET).run
    means = {
        domain: float(torch.cat([nll for part, nll in seen if part == domain]).mean())
        for domain in ("speech", "sound", "music")
    }
    metrics = json.loads(run.done.read_text())["metrics"]
    for domain, mean in means.items():
        assert metrics[f"valid/loss_{domain}"] == pytest.approx(mean, rel=1e-5)
    assert metrics["valid/loss"] == pytest.approx(sum(means.values()) / 3, rel=1e-5)
    assert {part.dtype for part in modules[-1].modules() if isinstance(part, Metric)} == {
        torch.float32
    }


def test_the_tokens_of_all_ranks_are_counted_whatever_the_precision(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    batch, module = (
        SimpleNamespace(step_weight=1001.0),
        SimpleNamespace(device=torch.device("cpu")),
    )
    with HalfPrecision("bf16-true").forward_context():  # of a training step
        assert int(AudioTextModule._sum_step_weight(module, batch, ranks=2)) == 1001  # pyright: ignore[reportArgumentType]


def test_a_deterministic_run_is_the_same_again(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    try:
        runs = [
            train(
                settings_for(
                    tiny_whisper, tiny_shards, tmp_path / name, "trainer.deterministic=true"
                ),
                QUIET,
            ).run
            for name in "ab"
        ]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    curves = [read_metrics(run.metrics) for run in runs]
    for name in ("train/loss", "train/grad_norm", "valid/loss"):
        assert curves[0][name] == curves[1][name]
        assert len(curves[0][name]) > 1


def test_preemption_has_an_exit_status_of_its_own(
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path, "probe.tasks=[]")
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    for number, status in ((signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            add_callbacks(patch, SignalAt(3, number))
            assert main(["train", str(tmp_path / "config.yaml"), "--fresh"]) == status
        assert f"train {tmp_path / 'config.yaml'} --resume auto" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # another rank leaves the word to the first
    assert _rank() == 1


def test_a_damaged_shard_costs_its_samples_and_no_more(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    open_index(str(shards / "speech"))
    damaged = sorted((shards / "speech").glob("*.tar"))[0]
    damaged.write_bytes(damaged.read_bytes()[:700])
    settings = settings_for(tiny_whisper, shards, tmp_path / "runs", "data.max_skipped_fraction=1")
    run = train(settings, QUIET).run
    lines = [json.loads(line) for line in (run.path / "ledger.jsonl").read_text().splitlines()]
    assert lines
    assert {line["shard"] for line in lines} == {str(damaged)}
    assert json.loads(run.done.read_text())["steps"] == 6


@pytest.mark.parametrize("step", [2, 4], ids=["before the first validation", "after it"])
def test_skipped_samples_are_counted_once_over_validations_and_resumes(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, step: int
):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    damaged = sorted((shards / "speech").glob("*.tar"))[0]
    damaged.write_bytes(damaged.read_bytes()[:700])
    valid = f"data.valid=[{{path: {tmp_path / 'valid'}, domain: speech}}]"
    (tmp_path / "valid").symlink_to(shards / "speech")
    overrides = (
        "data.max_skipped_fraction=1",
        "data.valid_clips=3",
        "trainer.valid_every_steps=4",
        valid,
    )
    whole = train(settings_for(tiny_whisper, shards, tmp_path / "whole", *overrides), QUIET).run
    expected = json.loads(whole.done.read_text())["skipped"]
    assert expected[str(tmp_path / "valid")] == {"bad tar": 3}
    lines = (whole.path / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == sum(sum(reasons.values()) for reasons in expected.values()) > 3
    logged = read_metrics(whole.metrics)["data/skipped"]
    assert logged[-1][1] == len(lines)
    settings = settings_for(tiny_whisper, shards, tmp_path / "parts", *overrides)
    with pytest.raises(Preempted):
        train(settings, QUIET, callbacks=[SignalAt(step, signal.SIGTERM)])
    resumed = train(settings, QUIET, resume="auto").run
    assert json.loads(resumed.done.read_text())["skipped"] == expected


def test_accumulated_micro_batches_equal_one_big_batch(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    """Texts differ in length: averaging the averages of micro-batches would differ."""
    big = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path / "big", "data.batch_clips=6"), QUIET
    ).run
    small = train(
        settings_for(
            tiny_whisper,
            tiny_shards,
            tmp_path / "small",
            "data.batch_clips=2",
            "trainer.accumulate=3",
        ),
        QUIET,
    ).run
    assert_same_weights(weights_of(big), weights_of(small), atol=2e-5)


@pytest.fixture(scope="module")
def whole(
    tiny_whisper: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A run that was not stopped, with one worker."""
    folder = tmp_path_factory.mktemp("whole")
    return train(settings_for(tiny_whisper, tiny_shards, folder, "data.workers=1"), QUIET).run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    whole: RunDirectory, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, number: int
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "parts", "data.workers=1")
    with pytest.raises(Interrupted, match="stopped after step 3") as stop:
        train(settings, QUIET, callbacks=[SignalAt(2, number)])
    assert stop.type is (Interrupted if number == signal.SIGINT else Preempted)
    resumed = train(settings, QUIET, resume="auto").run
    assert_same_weights(weights_of(whole), weights_of(resumed), atol=1e-6)
    assert len(list((tmp_path / "parts" / "smoke").glob("2*"))) == 1
    curves = [read_metrics(run.metrics)["train/loss"] for run in (whole, resumed)]
    assert [step for step, _ in curves[0]] == [
        step for step, _ in curves[1]
    ]  # nothing logged before the stop is lost
    assert [loss for _, loss in curves[0]] == pytest.approx(
        [loss for _, loss in curves[1]], abs=1e-5
    )


class _StopInLastValidation(lightning.Callback):
    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        *(pytest.param(f"deepspeed_stage_{stage}", marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_a_run_stopped_in_its_last_validation_is_finished_by_a_resume(
    strategy: str, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def settings(folder: str) -> Any:
        return settings_for(tiny_whisper, tiny_shards, tmp_path / folder, f"strategy={strategy}")

    whole = train(settings("whole"), QUIET).run
    with pytest.raises(Preempted, match="stopped after step 6"):
        train(settings("parts"), QUIET, callbacks=[_StopInLastValidation()])
    resumed = train(settings("parts"), QUIET, resume="auto").run
    expected, done = (json.loads(run.done.read_text()) for run in (whole, resumed))
    assert done["sources"] == expected["sources"]
    for name, value in expected["metrics"].items():
        if name.startswith(("valid/", "tasks/", "train/")):
            assert done["metrics"][name] == pytest.approx(value, abs=1e-5), name
    assert read_metrics(resumed.metrics)["train/loss"]  # the earlier rows are kept


def test_a_source_of_nothing_but_faults_stops_the_run_with_a_reason(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    from whisper_aut.data.annotation import Annotation
    from whisper_aut.data.writer import ShardWriter

    with ShardWriter(tmp_path / "bad") as shards:
        for i in range(260):
            shards.write(f"k{i}", "wav", b"not audio", Annotation(text="x", domain="sound"))
    overrides = [
        f"data.train=[{{path: {tmp_path / 'bad'}, domain: sound}}]",
        "data.domains={sound: 1, speech: 0, music: 0}",
    ]
    settings = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path / "runs",
        *overrides,
        "data.batch_clips=64",
        "trainer.checkpoint_every_steps=4",
        "trainer.valid_every_steps=100",
    )
    with pytest.raises(UserError, match=r"were skipped \(undecodable audio: 256\)"):
        train(settings, QUIET)
    (ledger,) = (tmp_path / "runs").rglob("ledger.jsonl")
    assert len(ledger.read_text().splitlines()) == 256
    # The checkpoint that was due at that step is saved.
    assert [path.name for path in checkpoints_in(ledger.parent / "checkpoints")] == [
        "step-0000004.ckpt"
    ]


def test_a_checkpoint_after_the_last_step_is_rejected(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path), QUIET).run
    run.done.unlink()
    with pytest.raises(
        UserError, match="was written at step 6, but this config trains only 3 steps"
    ):
        train(
            settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.max_steps=3"),
            QUIET,
            resume="auto",
        )


def test_an_error_of_lightning_becomes_a_user_error(tmp_path: Path):
    with (
        pytest.raises(UserError, match="This machine cannot run the config"),
        explain_errors(tmp_path, ranks=1),
    ):
        lightning.Trainer(accelerator="cpu", devices=0, logger=False)


def test_mistakes_are_found_before_anything_is_written(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bad = [
        (["hardware.accelerator=cuda"], "PyTorch sees no such device"),
        (["data.train=[{path: nowhere, domain: speech}]"], "There are no shards at nowhere"),
        ([f"model.path={tmp_path}"], "not a usable Whisper checkpoint"),
        (["decoder.max_tokens=1000"], "1000 is above 448, the number of positions"),
        (["decoder.prompts.sound.language=xx"], "is not a language of Whisper"),
        (["data.samples_per_epoch=1"], "is shorter than one step"),
    ]
    for overrides, message in bad:
        domains = ["data.domains={speech: 1, sound: 0, music: 0}"]
        with pytest.raises(UserError, match=message):
            train(
                settings_for(tiny_whisper, tiny_shards, tmp_path / "runs", *domains, *overrides),
                QUIET,
            )
    short = Path(shutil.copytree(tiny_whisper, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_source_positions": 500}))
    weights = load_file(short / "model.safetensors")
    weights[POSITIONS] = weights[POSITIONS][:500].clone()
    save_file(weights, short / "model.safetensors", metadata={"format": "pt"})
    for overrides, message in (
        (["data.max_seconds=30"], "positions .* are 10 s"),
        (["model.padding=30s", "data.max_seconds=10"], "Use padding none"),
    ):
        with pytest.raises(UserError, match=message):
            train(settings_for(short, tiny_shards, tmp_path / "runs", *overrides), QUIET)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="Cannot resume"):
        train(
            settings_for(tiny_whisper, tiny_shards, tmp_path / "runs"),
            QUIET,
            resume=str(tmp_path / "x.ckpt"),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "ddp"]
)
def test_other_strategies_train_to_the_same_weights(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, strategy: str
):
    plain = train(settings_for(tiny_whisper, tiny_shards, tmp_path / "plain"), QUIET).run
    other = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path / "other", f"strategy={strategy}"), QUIET
    ).run
    metrics = [json.loads(run.done.read_text())["metrics"] for run in (plain, other)]
    assert metrics[0]["valid/loss"] == pytest.approx(metrics[1]["valid/loss"], abs=1e-4)


@pytest.mark.slow
def test_log_mels_reach_the_device_of_deepspeed_as_the_workers_pinned_them(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    dtypes: list[torch.dtype] = []
    note = LambdaCallback(
        on_train_batch_start=lambda trainer, module, batch, index: dtypes.append(batch.mel.dtype)
    )
    options = ("strategy=deepspeed_stage_2", "hardware.precision=bf16-mixed", "trainer.max_steps=2")
    train(settings_for(tiny_whisper, tiny_shards, tmp_path, *options), QUIET, callbacks=[note])
    assert dtypes == [torch.float32] * 2


@pytest.mark.timeout(120)
def test_a_run_ends_with_its_data_however_many_steps_were_planned(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_module.ShardDataModule, "total_steps", lambda *_: 20)
    overrides = (
        "data.mode=epochs",
        "data.batch_clips=8",
        "trainer.max_epochs=2",
        "trainer.max_steps=null",
    )
    shown = Console(record=True, file=StringIO(), width=200)
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), shown).run
    assert "The training data ended after step 12 of 20" in shown.export_text()
    assert json.loads(run.done.read_text())["steps"] == 12
    assert read_manifest(run.last_checkpoint).step == 12


def test_there_is_no_precision_without_float32_weights():
    with pytest.raises(
        UserError, match="must be 'auto', '32-true', 'bf16-mixed' or '16-mixed', got 'bf16-true'"
    ):
        load_settings(REPOSITORY / "conf" / "smoke.yaml", ["hardware.precision=bf16-true"])
