"""What DeepSpeed costs over plain Lightning on one rank, and what a second CPU rank costs at equal
work per rank.

Every side is `training.train` on the demo corpus; steps alone are timed, by the run's own meter.
Losses are compared before anything is timed: all strategies compute the same steps. Two ranks on
two cores share memory bandwidth, so their ratio says little about GPUs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from demo import demo_corpus
from pairs import Row, compare_all, main
from stories import BATCH_CLIPS, small_whisper, story_settings

from whisper_aut.config import dump_settings

STEPS = 20
DEEPSPEED = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def cases(runs: int) -> Iterator[Row]:
    with demo_corpus(scale=0.1) as corpus:
        model = small_whisper(corpus, corpus.parent / "whisper")
        plain = trained(corpus, model, "auto")
        for strategy in DEEPSPEED:
            same(plain, trained(corpus, model, strategy))
        sides = {f"{name}, one rank": partial(seconds, corpus, model, name) for name in DEEPSPEED}
        against = dict.fromkeys(
            sides,
            f"plain Lightning, {STEPS} steps of {BATCH_CLIPS} clips; "
            "below one is DeepSpeed's overhead",
        )
        sides["ddp, 2 CPU ranks"] = partial(seconds, corpus, model, "ddp", ranks=2)
        against["ddp, 2 CPU ranks"] = (
            f"one rank; {STEPS} steps of {BATCH_CLIPS} clips a rank, one thread each; "
            "1 is perfect scaling"
        )
        yield from compare_all(
            sides, partial(seconds, corpus, model, "auto"), unit="s", against=against, runs=runs
        )


def seconds(corpus: Path, model: Path, strategy: str, ranks: int = 1) -> float:
    return trained(corpus, model, strategy, ranks)["seconds"]


def trained(corpus: Path, model: Path, strategy: str, ranks: int = 1) -> dict[str, float]:
    """Train in a new process; return its steps' seconds, last loss and last gradient norm."""
    settings = story_settings(corpus, model, STEPS * BATCH_CLIPS * ranks)
    settings.hardware.devices, settings.export = ranks, []
    config = corpus.parent / f"{strategy}-{ranks}.yaml"
    config.write_text(dump_settings(settings))
    command = [
        sys.executable,
        "-m",
        "whisper_aut.cli",
        "train",
        str(config),
        "--fresh",
        "hardware.threads=1",
        f"strategy.name={strategy}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    metrics = json.loads(
        (corpus.parent / "runs" / settings.name / "latest" / "done.json").read_text()
    )["metrics"]
    clips = STEPS * BATCH_CLIPS * ranks
    return {
        "seconds": clips / metrics["throughput/clips_per_second"],
        "loss": metrics["train/loss"],
        "norm": metrics["train/grad_norm"],
    }


def same(one: dict[str, float], other: dict[str, float]) -> None:
    for name in ("loss", "norm"):
        if abs(one[name] - other[name]) > 1e-3 * abs(one[name]):
            raise AssertionError(f"the last step's {name} differs: {one} and {other}")


if __name__ == "__main__":
    main(cases, "DeepSpeed against plain Lightning, two ranks against one")
