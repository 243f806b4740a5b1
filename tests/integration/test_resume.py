"""A resumed run records its old and new config; a rejected resume changes nothing."""

import json
import os
from pathlib import Path

import pytest

from tests.support.training import QUIET, settings_for
from whisper_aut.config import Settings, load_settings
from whisper_aut.errors import UserError
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.checkpoint import checkpoints_in
from whisper_aut.training.run_dir import RunDirectory
from whisper_aut.training.train import train

EVERY_STEP = (
    "trainer.checkpoint_every_steps=1",
    "trainer.keep_checkpoints=9",
    "trainer.log_every_steps=1",
)


def contents(run: RunDirectory) -> dict[str, bytes]:
    """Return every file of a run that is not a log of TensorBoard's."""
    files = (
        path for path in run.path.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    )
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def test_a_resumed_run_keeps_its_old_config_and_records_the_new_one(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    short = settings_for(tiny_whisper, tiny_shards, tmp_path, *EVERY_STEP, "trainer.max_steps=3")
    run = train(short, QUIET).run
    begun = json.loads(run.environment.read_text())
    longer = settings_for(
        tiny_whisper, tiny_shards, tmp_path, *EVERY_STEP, "trainer.max_steps=5", "optim.lr=1e-4"
    )
    assert train(longer, QUIET, resume=str(run.path)).run == run
    assert load_settings(run.config) == longer
    assert load_settings(run.path / "config.0.yaml") == short
    assert json.loads(run.environment.read_text())["steps"] == 5
    assert json.loads((run.path / "environment.0.json").read_text()) == begun
    done = json.loads(run.done.read_text())
    assert done["steps"] == 5
    assert (
        done["fingerprint"]
        == json.loads(run.environment.read_text())["fingerprint"]
        != begun["fingerprint"]
    )
    assert [step for step, _ in read_metrics(run.metrics)["train/loss"]] == [0, 1, 2, 3, 4]


def test_a_run_resumed_at_its_last_step_records_the_new_config_and_drops_later_checkpoints(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    before = settings_for(tiny_whisper, tiny_shards, tmp_path, *EVERY_STEP, "trainer.max_steps=3")
    run = train(before, QUIET).run
    changed = settings_for(
        tiny_whisper, tiny_shards, tmp_path, *EVERY_STEP, "trainer.max_steps=2", "optim.lr=1e-4"
    )
    step_2 = str(run.checkpoints / "step-0000002.ckpt")
    assert train(changed, QUIET, resume=step_2).run == run
    assert load_settings(run.config) == changed
    assert load_settings(run.path / "config.0.yaml") == before
    done = json.loads(run.done.read_text())
    assert done["steps"] == 2
    assert done["fingerprint"] == json.loads(run.environment.read_text())["fingerprint"]
    assert run.last_checkpoint.name == "step-0000002.ckpt"
    assert (run.checkpoints / "last.ckpt").resolve() == run.last_checkpoint.resolve()


def test_the_best_checkpoint_may_be_the_last_of_the_run_before(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def settings(*chosen: str) -> Settings:
        every = ("trainer.valid_every_steps=4", "trainer.checkpoint_every_steps=100")
        every += ("trainer.keep_checkpoints=1", "optim.warmup_steps=0")
        return settings_for(tiny_whisper, tiny_shards, tmp_path, *every, *chosen)

    run = train(settings("trainer.max_steps=6", "optim.lr=1e-2"), QUIET).run
    best = run.checkpoints / "best.ckpt"
    assert best.resolve().name == "step-0000006.ckpt"
    train(settings("trainer.max_steps=13", "optim.lr=1.0"), QUIET, resume=str(run.path))
    losses = dict(read_metrics(run.metrics)["valid/loss"])
    assert min(losses, key=lambda step: losses[step]) == 5, "counted from 0"
    assert best.exists()
    assert best.resolve().name == "step-0000006.ckpt"
    assert len(checkpoints_in(run.checkpoints)) == 2


def test_a_rejected_resume_leaves_a_finished_run_unchanged(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    run = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path, *EVERY_STEP, "trainer.max_steps=3"), QUIET
    ).run
    before = contents(run)
    sizes = "{d_model: 16, encoder_layers: 3, decoder_layers: 2, heads: 2}"
    bigger = (
        *EVERY_STEP,
        "trainer.max_steps=5",
        "model.path=",
        f"model.scratch={sizes}",
        f"data.shards={tmp_path / 'shards'}",
    )
    with pytest.raises(UserError, match="belongs to a different model than this config describes"):
        train(
            settings_for(tiny_whisper, tiny_shards, tmp_path, *bigger), QUIET, resume=str(run.path)
        )
    assert contents(run) == before
    for given in (run.path, checkpoints_in(run.checkpoints)[0]):
        with pytest.raises(
            UserError,
            match=r"belongs to a run named 'smoke', but this config is named 'other'"
            r".*add name=smoke",
        ):
            train(
                settings_for(tiny_whisper, tiny_shards, tmp_path, *EVERY_STEP, "name=other"),
                QUIET,
                resume=str(given),
            )
    assert contents(run) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["smoke"]


def test_an_older_run_that_fits_is_used_again_and_is_the_latest(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    one, two = (
        settings_for(tiny_whisper, tiny_shards, tmp_path, "trainer.max_steps=1", f"seed={seed}")
        for seed in (0, 1)
    )
    first, second = train(one, QUIET).run, train(two, QUIET).run
    os.utime(first.config, (1, 1))
    latest = first.path.with_name("latest")
    assert latest.resolve() == second.path.resolve() != first.path.resolve()
    again = train(one, QUIET)
    assert (again.run, again.reused) == (first, True)
    assert latest.resolve() == first.path.resolve()


def test_renamed_files_overwrite_nothing(tmp_path: Path):
    run = RunDirectory(tmp_path / "smoke" / "a")
    run.path.mkdir(parents=True)
    for number in range(12):
        run.record(f"name: {number}", {})
    (run.path / "config.0.yaml").unlink()
    (run.path / "config.note.yaml").touch()
    run.record("name: last", {})
    kept = {path.name: path.read_text() for path in run.path.glob("config.*.yaml")}
    assert kept == {f"config.{number}.yaml": f"name: {number}" for number in range(1, 12)} | {
        "config.note.yaml": ""
    }


def test_a_run_goes_on_with_other_data_only_on_request(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def mixture(steps: int, domains: str, *overrides: str):
        options = (*EVERY_STEP, f"trainer.max_steps={steps}", f"data.domains={domains}")
        return settings_for(tiny_whisper, tiny_shards, tmp_path, *options, *overrides)

    before = mixture(2, "{speech: 1, sound: 0, music: 0}")
    run = train(before, QUIET).run
    assert clips_by_domain(run) == {"speech"}
    change = "data.schedule=[{after_clips: 12, domains: {sound: 0, music: 1}}]"
    after = mixture(4, "{speech: 0, sound: 1, music: 0}", change)
    with pytest.raises(UserError, match="--allow-data-change"):
        train(after, QUIET, resume=str(run.path))
    train(after, QUIET, resume=str(run.path), allow_data_change=True)
    assert json.loads(run.done.read_text())["steps"] == 4
    # Twelve clips are three steps: one more step of sound, then music.
    assert clips_by_domain(run) == {"sound", "music"}
    assert load_settings(run.path / "config.0.yaml") == before
    assert load_settings(run.config) == after


@pytest.mark.slow
def test_a_run_goes_on_with_smaller_batches_only_on_request(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    def batches(steps: int, seconds: int):
        options = (*EVERY_STEP, f"trainer.max_steps={steps}", f"data.batch_seconds={seconds}")
        options = (*options, "data.samples_per_epoch=600")
        return settings_for(tiny_whisper, tiny_shards, tmp_path, *options)

    run = train(batches(2, 34), QUIET).run
    with pytest.raises(UserError, match=r"planned together .*--allow-data-change"):
        train(batches(3, 31), QUIET, resume=str(run.path))
    train(batches(3, 31), QUIET, resume=str(run.path), allow_data_change=True)
    assert json.loads(run.done.read_text())["steps"] == 3


def clips_by_domain(run: RunDirectory) -> set[str]:
    """Return the domains from which a run has drawn since its order began or changed."""
    sources = json.loads(run.done.read_text())["sources"]
    return {Path(root).name for root, epochs in sources.items() if epochs}
