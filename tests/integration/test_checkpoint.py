"""Checkpoints on disk: complete or absent, checked by hash, the last few and the best kept."""

import errno
import io
import json
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from tests.support.training import QUIET, assert_same_weights, settings_for, weights_of
from whisper_aut.config import Settings, TrainerSettings
from whisper_aut.errors import Interrupted, UserError
from whisper_aut.export.hf import read_checkpoint
from whisper_aut.report.plots import read_metrics
from whisper_aut.training.callbacks.checkpoints import RollingCheckpoints
from whisper_aut.training.callbacks.stopping import CleanStop, Guard
from whisper_aut.training.checkpoint import (
    MANIFEST,
    CheckpointWriter,
    FileMetadata,
    Manifest,
    StateShard,
    check_disk_space,
    checkpoint_name,
    checkpoints_in,
    find_damage,
    latest_valid,
    read_manifest,
    read_optimizer_state,
    read_state,
    read_weights,
)
from whisper_aut.training.run_dir import RunDirectory, check_step_size, find_resume_checkpoint
from whisper_aut.training.train import train
from whisper_aut.utils import file_lock


def written(path: Path, step: int = 5, value: float = 1.0) -> Path:
    """Write a checkpoint of two ranks."""
    files: dict[str, FileMetadata] = {}
    drafts = [CheckpointWriter(path, rank, 2) for rank in range(2)]
    drafts[0].begin()
    for rank, draft in enumerate(drafts):
        name = f"encoder.{rank}"
        files |= draft.write_tensors(
            StateShard({name: torch.full((3,), value)}, {f"{name}.exp_avg": torch.ones(3)})
        )
    written_by: dict[str, Any] = {"strategy": "ddp", "ranks": 2}
    drafts[0].finish(
        {"global_step": step, "extra": {}},
        Manifest(step, 8, written_by, files, {"encoder.tied": "encoder.1"}),
    )
    return path


def test_parts_of_all_ranks_are_read_as_one(tmp_path: Path):
    path = written(tmp_path / "step-0000005.ckpt", value=2.5)
    weights = read_weights(path)
    assert weights.keys() == {"encoder.0", "encoder.1", "encoder.tied"}
    assert_close(weights["encoder.tied"], torch.full((3,), 2.5))
    assert {name for name, _ in read_optimizer_state(path)} == {
        "encoder.0.exp_avg",
        "encoder.1.exp_avg",
    }
    assert read_state(path)["global_step"] == read_manifest(path).step == 5
    assert not find_damage(path)
    assert not list(tmp_path.glob(".*")), "the draft is still there"


def test_a_draft_is_never_taken_for_a_checkpoint(tmp_path: Path):
    written(tmp_path / "step-0000001.ckpt")
    draft = CheckpointWriter(tmp_path / "step-0000002.ckpt", 0, 1)
    draft.begin()
    draft.write_tensors(StateShard({"encoder.0": torch.ones(2)}))  # killed here
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-0000001.ckpt"]
    written(tmp_path / "step-0000002.ckpt")  # the next try is not hindered by what was left
    assert len(checkpoints_in(tmp_path)) == 2


@pytest.mark.parametrize(
    "fault", ["truncated", "flipped", "missing", "manifest", "unreadable manifest"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(fault: str, tmp_path: Path):
    valid = written(tmp_path / "step-0000001.ckpt", step=1)
    newest = written(tmp_path / "step-0000002.ckpt", step=2)
    tensors = next(newest.glob("weights-00001*"))
    if fault == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif fault == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif fault == "missing":
        tensors.unlink()
    elif fault == "manifest":
        (newest / MANIFEST).unlink()
    else:
        (newest / MANIFEST).write_text("{")
    messages: list[str] = []
    path = latest_valid(tmp_path, messages.append)
    assert path == valid
    assert len(messages) == 1
    assert "step-0000002.ckpt is damaged and was skipped" in messages[0]


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    whole = train(settings_for(tiny_whisper, tiny_shards, tmp_path / "whole"), QUIET).run
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "parts")
    run = train(settings, QUIET).run
    run.done.unlink()  # as if it had been killed at the end
    newest = checkpoints_in(run.checkpoints)[-1]
    tensors = next(newest.glob("optimizer-*"))
    tensors.write_bytes(tensors.read_bytes()[:100])
    warnings: list[str] = []
    found = find_resume_checkpoint("auto", run, Path("runs/smoke"), warnings.append)
    assert found == checkpoints_in(run.checkpoints)[-2].resolve()
    assert "was skipped" in warnings[0]
    again = train(settings, QUIET, resume="auto").run
    assert again == run
    assert_same_weights(weights_of(whole), weights_of(again), atol=1e-6)
    for path in checkpoints_in(run.checkpoints):
        for file in path.glob("*.safetensors"):
            file.write_bytes(b"")
    run.done.unlink()
    with pytest.raises(UserError, match="contains no valid checkpoint"):
        train(settings, QUIET, resume="auto")
    with pytest.raises(UserError, match="is damaged"):
        train(settings, QUIET, resume=str(newest))


def test_a_run_without_a_checkpoint_does_not_hide_an_earlier_one(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs")
    run = train(settings, QUIET).run
    run.done.unlink()  # as if it had been killed at the end
    newer = RunDirectory(run.path.with_name("newer"))
    newer.checkpoints.mkdir(parents=True)  # stopped before its first checkpoint
    newer.config.write_text(run.config.read_text())
    assert train(settings, QUIET, resume="auto").run == run
    run.done.unlink()
    output = io.StringIO()
    assert train(settings, Console(file=output, width=1000)).run != run
    assert f"{run.path} is unfinished. To resume it instead, add --resume auto." in (
        output.getvalue()
    )


def test_two_processes_do_not_train_in_one_run_directory(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs")
    run = train(settings, QUIET).run
    run.done.unlink()
    monkeypatch.setattr("whisper_aut.utils.BUSY_SECONDS", 0.1)
    with file_lock(run.path), pytest.raises(UserError, match=f"is training in {run.path}"):
        train(settings, QUIET, resume="auto")
    assert train(settings, QUIET, resume="auto").run == run


def test_the_last_few_and_the_best_are_kept(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    overrides = (
        "trainer.checkpoint_every_steps=1",
        "trainer.valid_every_steps=2",
        "trainer.keep_checkpoints=2",
    )
    # A rate that grows to where the model gets worse and worse.
    run = train(
        settings_for(
            tiny_whisper, tiny_shards, tmp_path, *overrides, "optim.lr=3", "optim.warmup_steps=100"
        ),
        QUIET,
    ).run
    losses = {round(step) + 1: loss for step, loss in read_metrics(run.metrics)["valid/loss"]}
    best = min(losses, key=losses.__getitem__)
    assert best < 5, "the newest is the best: this shows nothing"
    assert read_manifest(run.checkpoints / "best.ckpt").step == best
    assert [read_manifest(path).step for path in checkpoints_in(run.checkpoints)] == [best, 5, 6]
    assert (run.checkpoints / "last.ckpt").resolve() == run.last_checkpoint.resolve()
    assert (
        read_checkpoint(run.checkpoints / "last.ckpt").keys()
        == read_checkpoint(run.last_checkpoint).keys()
    )


def test_a_run_that_resumes_from_an_older_checkpoint_renames_the_later_ones(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    overrides = (
        "trainer.checkpoint_every_steps=1",
        "trainer.valid_every_steps=2",
        "trainer.keep_checkpoints=4",
    )
    run = train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET).run
    assert read_manifest(run.checkpoints / "best.ckpt").step == 6, (
        "the best is not given up: this shows less"
    )
    run.done.unlink()
    seen: list[list[str]] = []

    class Look(lightning.Callback):
        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int
        ) -> None:
            names = sorted(path.name for path in run.checkpoints.iterdir())
            seen.append([*names, (run.checkpoints / "last.ckpt").resolve().name])

    back = settings_for(
        tiny_whisper,
        tiny_shards,
        tmp_path,
        *overrides,
        "trainer.max_steps=4",
        "trainer.keep_checkpoints=1",
    )
    again = train(
        back,
        Console(width=400),
        resume=str(run.checkpoints / "step-0000003.ckpt"),
        callbacks=[Look()],
    ).run
    assert seen == [
        [".superseded-step-0000006.ckpt", "last.ckpt", "step-0000003.ckpt", "step-0000003.ckpt"]
    ]
    said = capsys.readouterr().out
    assert said.count("step-0000004.ckpt, step-0000005.ckpt, step-0000006.ckpt.") == 1
    assert again == run
    assert [path.name for path in checkpoints_in(run.checkpoints)] == ["step-0000004.ckpt"]
    assert run.last_checkpoint.name == "step-0000004.ckpt"
    assert (
        (run.checkpoints / "best.ckpt").resolve()
        == (run.checkpoints / "last.ckpt").resolve()
        == run.last_checkpoint.resolve()
    )


def test_the_checkpoint_just_written_is_never_removed(tmp_path: Path):
    for step in (1, 8, 9):
        written(tmp_path / checkpoint_name(step), step=step)
    checkpoints = RollingCheckpoints(tmp_path, TrainerSettings(keep_checkpoints=1))
    checkpoints._on_written(tmp_path / checkpoint_name(1))
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        "step-0000001.ckpt",
        "step-0000009.ckpt",
    ]


def test_training_continues_while_a_checkpoint_of_an_earlier_step_is_written(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    overrides = (
        "trainer.checkpoint_every_steps=2",
        "trainer.valid_every_steps=100",
        "trainer.keep_checkpoints=9",
    )
    plain = train(
        settings_for(tiny_whisper, tiny_shards, tmp_path / "plain", *overrides), QUIET
    ).run

    begin, count = CheckpointWriter.begin, Guard.on_train_batch_end
    reached, seen = threading.Condition(), [0]

    def begin_a_step_later(draft: CheckpointWriter) -> None:
        step = int(draft.path.stem.removeprefix("step-"))
        with reached:
            assert reached.wait_for(lambda: seen[-1] > step or step == 6, timeout=60), (
                "training waits for the checkpoint"
            )
        begin(draft)

    def counted(guard: Guard, trainer: Any, *rest: Any) -> None:
        count(guard, trainer, *rest)
        with reached:
            seen.append(trainer.global_step)
            reached.notify_all()

    monkeypatch.setattr(CheckpointWriter, "begin", begin_a_step_later)
    monkeypatch.setattr(Guard, "on_train_batch_end", counted)
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path / "async", *overrides, "trainer.async_checkpoints=true"
    )
    run = train(settings, QUIET).run
    assert [read_manifest(path).step for path in checkpoints_in(run.checkpoints)] == [2, 4, 6]
    assert (run.checkpoints / "last.ckpt").resolve() == run.last_checkpoint.resolve()
    for path in checkpoints_in(run.checkpoints):
        other = plain.checkpoints / path.name
        assert not find_damage(path)
        assert_same_weights(read_weights(path), read_weights(other), atol=0)
        assert_close(
            dict(read_optimizer_state(path)), dict(read_optimizer_state(other)), atol=0, rtol=0
        )
        assert read_state(path)["loops"] == read_state(other)["loops"]


def test_a_failed_run_raises_its_own_error_and_not_that_of_its_last_checkpoint(
    tiny_whisper: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    failed, count = threading.Event(), Guard.on_train_batch_end

    def fails(_: CheckpointWriter) -> None:
        failed.wait(60)
        raise RuntimeError("the writers lost each other")

    def breaks(guard: Guard, trainer: Any, *rest: Any) -> None:
        count(guard, trainer, *rest)
        if trainer.global_step == 3:
            failed.set()
            raise ArithmeticError("the model broke")

    monkeypatch.setattr(CheckpointWriter, "begin", fails)
    monkeypatch.setattr(Guard, "on_train_batch_end", breaks)
    overrides = (
        "trainer.checkpoint_every_steps=2",
        "trainer.valid_every_steps=100",
        "trainer.async_checkpoints=true",
    )
    with pytest.raises(ArithmeticError, match="the model broke"):
        train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET)
    assert "The last checkpoint was not written: the writers lost each other" in caplog.text


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    let_go, count = threading.Event(), Guard.on_train_batch_end

    def interrupted(guard: Guard, trainer: Any, *rest: Any) -> None:
        count(guard, trainer, *rest)
        if trainer.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "begin", lambda _: let_go.wait(60))
    monkeypatch.setattr(Guard, "on_train_batch_end", interrupted)
    overrides = (
        "trainer.checkpoint_every_steps=2",
        "trainer.valid_every_steps=100",
        "trainer.async_checkpoints=true",
    )
    handlers = {
        number: signal.getsignal(number) for number in CleanStop.SIGNALS
    }  # Lightning ignores Ctrl-C from here on
    try:
        with pytest.raises(Interrupted, match="stopped at once, without another checkpoint"):
            train(settings_for(tiny_whisper, tiny_shards, tmp_path, *overrides), QUIET)
        (writer,) = [thread for thread in threading.enumerate() if thread.name == "background"]
        assert writer.is_alive(), "the run waited"
    finally:
        let_go.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_steps_of_another_size_are_rejected_with_advice(tmp_path: Path):
    path = written(tmp_path / "step-0000005.ckpt")  # steps of 8 clips
    check_step_size(path, batch_clips=2, ranks=2, accumulate=2)
    with pytest.raises(UserError, match=r"8 clips per step.*set trainer\.accumulate=4"):
        check_step_size(path, batch_clips=2, ranks=1, accumulate=1)
    with pytest.raises(UserError, match=r"batch_clips × 3 × accumulate = 8"):
        check_step_size(path, batch_clips=2, ranks=3, accumulate=1)


def test_resume_explains_what_is_wrong_with_its_argument(tmp_path: Path):
    run = RunDirectory(tmp_path / "smoke" / "a")
    run.checkpoints.mkdir(parents=True)
    assert find_resume_checkpoint("auto", run, Path("runs/smoke"), print) is None
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_resume_checkpoint(str(run.path), None, Path("runs/smoke"), print)
    with pytest.raises(UserError, match="does not exist"):
        find_resume_checkpoint(str(tmp_path / "x.ckpt"), None, Path("runs/smoke"), print)
    with pytest.raises(UserError, match="is not a checkpoint"):
        find_resume_checkpoint(str(tmp_path), None, Path("runs/smoke"), print)
    written(run.checkpoints / "step-0000003.ckpt")
    assert (
        find_resume_checkpoint(str(run.path), None, Path("runs/smoke"), print)
        == (run.checkpoints / "step-0000003.ckpt").resolve()
    )
    run.done.write_text("{}")
    assert find_resume_checkpoint("auto", run, Path("runs/smoke"), print) is None  # it has finished


def _train_with_files_up_to(size_bytes: int, settings: Settings) -> None:
    """Train while the system refuses to let files grow further, as a full disk would; restores the
    limit.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        train(settings, QUIET, resume="auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints_intact(
    asynchronous: bool, tiny_whisper: Path, tiny_shards: Path, tmp_path: Path
):
    whole = train(settings_for(tiny_whisper, tiny_shards, tmp_path / "whole"), QUIET).run
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path / "parts", f"trainer.async_checkpoints={asynchronous}"
    )
    weights = max(file.stat().st_size for file in whole.last_checkpoint.glob("weights-*"))
    with pytest.raises(
        UserError, match=r"could not be written: File too large.*Earlier checkpoints are intact"
    ):
        _train_with_files_up_to(weights // 2, settings)
    (run,) = (RunDirectory(path) for path in (tmp_path / "parts" / "smoke").glob("2*"))
    assert not checkpoints_in(run.checkpoints)
    assert not list(run.checkpoints.glob(".*")), "the draft takes up room"
    again = train(settings, QUIET, resume="auto").run
    assert_same_weights(weights_of(whole), weights_of(again), atol=1e-6)


def test_disk_space_is_checked_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert check_disk_space(tmp_path / "runs" / "new", one_checkpoint=1000, kept=3) == ""
    with pytest.raises(UserError, match=r"GiB free, and a checkpoint takes about 1048576\.0 GiB"):
        check_disk_space(tmp_path, one_checkpoint=2**50, kept=3)
    import shutil

    free = shutil.disk_usage(tmp_path).free
    assert "lower trainer.keep_checkpoints" in check_disk_space(
        tmp_path, one_checkpoint=free // 4, kept=5
    )

    def refuse(**_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(
        "whisper_aut.training.checkpoint.TemporaryFile", refuse
    )  # root may write anywhere
    with pytest.raises(
        UserError, match=r"Cannot write to .*: Read-only file system\. Set runs=FOLDER"
    ):
        check_disk_space(tmp_path, one_checkpoint=1, kept=1)


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path: Path):
    path = written(tmp_path / "step-0000001.ckpt")

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"extra": Hostile()}, path / "state.pt")
    with pytest.raises(UserError, match=r"state\.pt cannot be read"):
        read_state(path)
    assert not (tmp_path / "ran").exists()
    manifest = json.loads((path / MANIFEST).read_text()) | {"format": 99}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has format 99"):
        read_manifest(path)
