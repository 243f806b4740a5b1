"""Runs training jobs one after another on every rank that starts it, with faults on request:
`torchrun … run_jobs.py JOBS.json`.

A job is `{"config", "resume", "fault"}`. Imports cost more than the jobs, so several share a
process. What each step read is appended to `keys-rank<R>.jsonl` next to the config.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

from whisper_aut.config import load_settings
from whisper_aut.errors import Preempted, UserError
from whisper_aut.training import train as train_module
from whisper_aut.training.checkpoint import CheckpointWriter
from whisper_aut.training.run_dir import RUN_VARIABLE
from whisper_aut.training.train import train

RANK = int(os.environ.get("RANK", "0"))


class Chronicle(lightning.Callback):
    """Writes down what every step reads, and brings the fault about that was asked for.

    Args:
        file: where.
        fault: `{"kind", "step", "rank"}`; kinds are `poison`, by which a clip is no number, and
            names of signals, of which SIGKILL leaves no time for anything.
    """

    def __init__(self, file: Path, fault: dict[str, Any]):
        self.file, self.fault = file.open("a", buffering=1), fault

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.file.write(
            json.dumps({"step": trainer.global_step, "batch": batch_idx, "keys": batch.keys}) + "\n"
        )
        if (
            self.fault.get("step") == trainer.global_step
            and self.fault["rank"] in (RANK, "all")
            and "kind" in self.fault
        ):
            if self.fault["kind"] == "poison":
                batch.mel[0] = torch.nan
            else:
                os.kill(os.getpid(), getattr(signal, self.fault["kind"]))


def die_while_writing(rank: int) -> None:
    """Kill this process once it has written its tensors of an unfinished checkpoint."""
    write = CheckpointWriter.write_tensors

    def write_and_die(self: CheckpointWriter, *arguments: Any) -> Any:
        written = write(self, *arguments)
        if rank == RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    CheckpointWriter.write_tensors = write_and_die


def run(job: dict[str, Any]) -> None:
    fault, config = job.get("fault", {}), Path(job["config"])
    if fault.get("while") == "writing":
        die_while_writing(fault["rank"])
    original = train_module.build_trainer

    def make(*arguments: Any) -> lightning.Trainer:
        trainer = original(*arguments)
        trainer.callbacks.insert(
            0, Chronicle(config.with_name(f"{config.stem}-keys-rank{RANK}.jsonl"), fault)
        )  # pyright: ignore
        return trainer

    train_module.build_trainer = make
    try:
        train(load_settings(config), Console(quiet=True), resume=job.get("resume", ""))
    finally:
        train_module.build_trainer = original


def main() -> int:
    os.environ[RUN_VARIABLE] = "job"
    try:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run(job)
    except Preempted as stop:
        sys.stdout.write(f"Preempted: {stop}\n")
        return 75 if RANK == 0 else 0
    except UserError as error:
        sys.stdout.write(f"UserError: {error}\n")
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
