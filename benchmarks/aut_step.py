"""One whole optimiser step (features, encoder, decoder, loss, backward, clipping, AdamW) against
the Hugging Face recipe's.

Same weights, clips and texts on both sides. Before anything is timed, our loss in `30s` mode is
compared with theirs, and our loss in `none` mode with a loop over single clips.
"""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from demo import demo_corpus, demo_mixture
from pairs import Row, compare, compare_values, main
from recipes import Clips, HuggingFaceStep, PackedStep, whisper_tiny

SHORT_LABELS, FULL_LABELS = 36, 447
AGAINST = (
    "Hugging Face recipe: clips padded to 30 s, labels to the longest, logits of all positions, "
    "fused AdamW"
)


def cases(runs: int) -> Iterator[Row]:
    five = Clips.noise([5.0] * 8, 24)
    thirty = [30.0] * 4
    yield timed("5 s, 8 clips", five, runs)
    yield timed("5 s, 8 clips, labels to 448", five, runs, labels_to=448)
    with demo_corpus(scale=0.03) as corpus:
        yield timed("mix, 10 demo clips", demo_mixture(corpus), runs)
    yield timed(
        "30 s short labels, 4 clips", Clips.noise(thirty, SHORT_LABELS), runs, labels_to=448
    )
    yield timed("30 s full labels, 4 clips", Clips.noise(thirty, FULL_LABELS), runs)
    yield compare_values(
        "5 s memory, 8 clips",
        lambda: apart(peak_extra_megabytes, PackedStep, five),
        lambda: apart(peak_extra_megabytes, HuggingFaceStep, five),
        unit="MB",
        against=AGAINST,
        runs=min(runs, 3),  # it hardly varies
    )


def timed(case: str, clips: Clips, runs: int, labels_to: int = 0) -> Row:
    model = whisper_tiny()
    against = AGAINST.replace("to the longest", f"to {labels_to}") if labels_to else AGAINST
    theirs = HuggingFaceStep(model, clips, labels_to)
    with torch.no_grad():
        same(float(PackedStep(model, clips, "30s").loss()), float(theirs.loss()))
    ours = PackedStep(model, clips)
    with torch.no_grad():
        alone = [ours.alone(number) for number in range(len(clips.waveforms))]
        same(
            float(ours.loss()),
            sum(float(total) for total, _ in alone) / sum(tokens for _, tokens in alone),
        )
    return compare(case, ours.step, theirs.step, against=against, runs=runs, steps=True)


def same(one: float, other: float) -> None:
    if abs(one - other) > 1e-5 * abs(other):
        raise AssertionError(f"losses differ: {one} and {other}")


def peak_extra_megabytes(side: Callable[[Any, Clips], Any], clips: Clips) -> float:
    """Rise of the resident memory within one step, above model and optimiser state (Linux)."""
    trainer = side(whisper_tiny(), clips)
    trainer.step()  # makes the optimiser's state
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # what is free goes back, so that the step is seen to take it again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _status_kilobytes("VmRSS")
    trainer.step()
    return (_status_kilobytes("VmHWM") - before) / 1024


def apart(measure: Callable[..., float], *arguments: Any) -> float:
    """Run a measurement in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def _status_kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(cases, "One AuT optimiser step, whisper-tiny shape")
