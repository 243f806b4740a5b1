"""An epoch end to end, from the shell to saved weights: `whisper-aut train` against
`Seq2SeqTrainer`, each a process of its own.

Both decode the same FLAC clips of the demo corpus in one worker, in AuT's shares, and train the
same small Whisper. That clips and steps are equally many is checked before anything is timed; that
both compute the same loss is checked in `aut_step.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo import demo_corpus
from pairs import Row, compare, main
from stories import BATCH_CLIPS, CONFIG, overrides, small_whisper

CLIPS = 160
FOLDER = Path(__file__).parent


def cases(runs: int) -> Iterator[Row]:
    with demo_corpus(scale=0.1) as corpus:
        model = small_whisper(corpus, corpus.parent / "whisper")
        yield compare(
            f"demo mixture, {CLIPS} clips",
            lambda: ours(corpus, model),
            lambda: theirs(corpus, model),
            against="Seq2SeqTrainer, clips padded to 30 s, labels to the longest; "
            "both from process start to saved weights",
            check=as_much_work,
            runs=runs,
        )


def ours(corpus: Path, model: Path) -> dict[str, int]:
    command = [
        sys.executable,
        "-m",
        "whisper_aut.cli",
        "train",
        str(CONFIG),
        *overrides(corpus, model, CLIPS),
        "--fresh",
    ]
    _run(command)
    done = json.loads((corpus.parent / "runs" / "aut_tiny" / "latest" / "done.json").read_text())
    return {"clips": done["steps"] * BATCH_CLIPS, "steps": done["steps"]}


def theirs(corpus: Path, model: Path) -> dict[str, int]:
    arguments = [str(corpus), str(model), str(CLIPS), str(BATCH_CLIPS)]
    return json.loads(
        _run([sys.executable, str(FOLDER / "seq2seq.py"), *arguments]).splitlines()[-1]
    )


def as_much_work(one: Any, other: Any) -> None:
    if one != other:
        raise AssertionError(f"not the same work: {one} and {other}")


def _run(command: list[str]) -> str:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main(cases, "One epoch through the command line, Whisper of width 128")
