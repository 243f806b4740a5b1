"""A run that is killed or resumed on other ranks reads the samples of an uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
from rich.console import Console

from tests.support.training import assert_same_weights, settings_for, weights_of
from whisper_aut.config import dump_settings
from whisper_aut.errors import Interrupted
from whisper_aut.training import train as train_module
from whisper_aut.training.checkpoint import read_manifest
from whisper_aut.training.train import train

QUIET = Console(quiet=True)
# The real command line, with a callback that writes down what every step saw.
DRIVER = """
import sys
from pathlib import Path
from tests.distributed.test_kill import Recorder, recorded
from whisper_aut.cli import main
with recorded(Recorder(Path(sys.argv.pop(1)))):
    sys.exit(main(sys.argv[1:]))
"""


class Recorder(lightning.Callback):
    """Appends step, keys and loss of every micro-batch to a file, at once; stops the run at a step
    if told to.
    """

    def __init__(self, path: Path, stop_at: int = -1):
        self.path, self.stop_at = path, stop_at

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {"step": trainer.global_step, "keys": batch.keys, "loss": float(outputs["loss"])}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if trainer.global_step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def lines(self) -> list[dict[str, Any]]:
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    original = train_module.build_trainer

    def add(*arguments: Any) -> lightning.Trainer:
        trainer = original(*arguments)
        trainer.callbacks.insert(0, recorder)  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "build_trainer", add)
        yield


def last_of_each_step(lines: list[dict[str, Any]]) -> dict[int, tuple[tuple[str, ...], float]]:
    return {line["step"]: (tuple(line["keys"]), line["loss"]) for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["data.batch_clips=3", "data.batch_seconds=6"])
def test_a_killed_run_resumes_to_the_same_keys_and_losses(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, batches: str
):
    overrides = [
        "trainer.max_steps=40",
        "trainer.checkpoint_every_steps=3",
        "data.workers=2",
        "export=[]",
        "probe.tasks=[]",
    ]
    augment = "data.augment={spec: true, gain_db: 6}"
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def start(name: str, *arguments: str) -> subprocess.Popen:
        settings = settings_for(
            tiny_whisper,
            tiny_shards,
            tmp_path / name,
            *overrides,
            batches,
            "data.max_seconds=2",
            augment,
        )
        (tmp_path / f"{name}.yaml").write_text(dump_settings(settings))
        command = [
            sys.executable,
            str(driver),
            str(tmp_path / f"{name}.jsonl"),
            "train",
            str(tmp_path / f"{name}.yaml"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with (tmp_path / f"{name}.log").open("ab") as log:  # not a pipe: nobody would empty it
            return subprocess.Popen(
                [*command, *arguments],
                start_new_session=True,
                env=environment,
                stdout=log,
                stderr=log,
            )

    whole = start("whole")
    assert whole.wait(250) == 0, (tmp_path / "whole.log").read_text()[-2000:]
    expected = last_of_each_step(Recorder(tmp_path / "whole.jsonl").lines())
    seen, doomed = Recorder(tmp_path / "killed.jsonl"), start("killed")
    after = random.randint(5, 30)
    while len(seen.lines()) < after and doomed.poll() is None:
        time.sleep(0.002)
    os.killpg(doomed.pid, signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    died_at = len(seen.lines())
    resumed = start("killed", "--resume", "auto")
    assert resumed.wait(250) == 0, (tmp_path / "killed.log").read_text()[-2000:]
    lines = seen.lines()
    assert len(lines) < 40 + died_at, "the run started again instead of resuming"
    for number, line in enumerate(lines):  # also the steps that were taken twice
        keys, loss = expected[line["step"]]
        assert tuple(line["keys"]) == keys, (number, died_at)
        assert line["loss"] == pytest.approx(loss, abs=1e-6)
    assert last_of_each_step(lines).keys() == expected.keys()


@pytest.mark.parametrize("mode", ["mixture", "epochs"])
def test_another_batch_size_resumes_at_the_same_clip(
    tiny_whisper: Path, tiny_shards: Path, tmp_path: Path, mode: str
):
    """Batches of 6 clips, then of 2 accumulated thrice: the same optimiser steps, so the same
    weights in the end.
    """
    chosen = [
        "trainer.max_steps=null",
        f"data.mode={mode}",
        "trainer.max_epochs=1",
        "trainer.valid_every_steps=1000",
    ]
    chosen += ["data.samples_per_epoch=null"]

    def settings(name: str, *overrides: str) -> Any:
        return settings_for(tiny_whisper, tiny_shards, tmp_path / name, *chosen, *overrides)

    whole = Recorder(tmp_path / "whole.jsonl")
    with recorded(whole):
        run = train(settings("whole", "data.batch_clips=6"), QUIET).run
    parts = Recorder(tmp_path / "parts.jsonl", stop_at=3)
    with recorded(parts), pytest.raises(Interrupted):
        train(settings("parts", "data.batch_clips=6"), QUIET)
    parts.stop_at = -1
    with recorded(parts):
        resumed = train(
            settings("parts", "data.batch_clips=2", "trainer.accumulate=3"), QUIET, resume="auto"
        ).run
    keys = [
        [key for line in recorder.lines() for key in line["keys"]] for recorder in (whole, parts)
    ]
    assert keys[0] == keys[1]
    if mode == "epochs":
        assert len(keys[0]) == len(set(keys[0])) == 43
    assert_same_weights(weights_of(run), weights_of(resumed), atol=2e-5)
    done = [json.loads(each.done.read_text()) for each in (run, resumed)]
    assert done[0]["steps"] == done[1]["steps"]
    assert done[0]["sources"] == done[1]["sources"]
    if mode == "epochs":
        assert set(done[0]["sources"].values()) == {1.0}


@pytest.mark.slow
def test_two_ranks_resume_where_one_stopped(tiny_whisper: Path, tiny_shards: Path, tmp_path: Path):
    chosen = [
        "data.mode=epochs",
        "trainer.max_steps=null",
        "trainer.max_epochs=2",
        "export=[]",
        "probe.tasks=[]",
    ]
    recorder = Recorder(tmp_path / "one.jsonl", stop_at=4)
    settings = settings_for(
        tiny_whisper, tiny_shards, tmp_path / "runs", *chosen, "data.batch_clips=4"
    )
    with recorded(recorder), pytest.raises(Interrupted):
        train(settings, QUIET)
    more = ["data.batch_clips=2", "hardware.devices=2", "strategy=ddp"]
    settings = settings_for(tiny_whisper, tiny_shards, tmp_path / "runs", *chosen, *more)
    (tmp_path / "two.yaml").write_text(dump_settings(settings))
    command = [
        sys.executable,
        "-m",
        "whisper_aut.cli",
        "train",
        str(tmp_path / "two.yaml"),
        "--resume",
        "auto",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (run,) = (path for path in (tmp_path / "runs" / "smoke").glob("2*") if path.is_dir())
    done = json.loads((run / "done.json").read_text())
    assert set(done["sources"].values()) == {2.0}
    assert done["steps"] == 4 + -(-(43 - 16) // 4) + 11
    assert read_manifest(run / "checkpoints" / "last.ckpt").step == done["steps"]
