"""How much work a run does a second: the meters' arithmetic.

In: per step the lengths of its batches, its FLOPs, and how long it took and waited. Out: named figures. Next:
`training.callbacks.throughput` logs them, `done.json` and the console close with them.
"""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from whisper_aut.data.logmel import MAX_MEL_FRAMES

GIBIBYTE = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory in use so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIBIBYTE
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIBIBYTE


@dataclass
class Throughput:
    """Sums over steps.

    Attributes:
        seconds: wall clock, data wait included.
        waited_seconds: of it, for the loader.
        mel_frames, token_count, clips: what the steps held.
        computed_mel_frames: what the encoder ran on: more than `mel_frames` where it pads.
        flops: useful work of forward and backward; None as soon as a part of the model cannot tell.
    """

    seconds: float = 0.0
    waited_seconds: float = 0.0
    mel_frames: int = 0
    computed_mel_frames: int = 0
    token_count: int = 0
    clips: int = 0
    flops: float | None = 0.0

    def add_batch(
        self, mel_lengths: Sequence[int], tokens: int, flops: float | None, *, padded: bool
    ) -> None:
        self.mel_frames += sum(mel_lengths)
        self.computed_mel_frames += (
            MAX_MEL_FRAMES * len(mel_lengths) if padded else sum(mel_lengths)
        )
        self.token_count += tokens
        self.clips += len(mel_lengths)
        self.flops = None if flops is None or self.flops is None else self.flops + flops

    def add_time(self, seconds: float, waited_seconds: float) -> None:
        self.seconds += seconds
        self.waited_seconds += waited_seconds

    def __add__(self, other: "Throughput") -> "Throughput":
        flops = None if self.flops is None or other.flops is None else self.flops + other.flops
        sums = {
            name: getattr(self, name) + getattr(other, name)
            for name in vars(self)
            if name != "flops"
        }
        return Throughput(**sums, flops=flops)

    def figures(self, ranks: int = 1, peak: float | None = None) -> dict[str, float]:
        """Return what is logged, of all ranks together; `mfu` where the device's peak is known."""
        if not self.seconds:
            return {}
        figures = {
            "audio_seconds_per_second": ranks * self.mel_frames / 100 / self.seconds,
            "tokens_per_second": ranks * self.token_count / self.seconds,
            "clips_per_second": ranks * self.clips / self.seconds,
            "padding_share": 1 - self.mel_frames / max(1, self.computed_mel_frames),
            "data_wait_share": self.waited_seconds / self.seconds,
        }
        if self.flops is not None:
            figures["teraflops"] = ranks * self.flops / self.seconds / 1e12
            if peak:
                figures["mfu"] = self.flops / self.seconds / peak
        return figures

    def sums(self, ranks: int = 1) -> dict[str, float]:
        """Return what it cost so far, of all ranks together: time, audio heard, and work where all parts can tell theirs."""
        sums = {"total_seconds": self.seconds, "total_audio_seconds": ranks * self.mel_frames / 100}
        return sums if self.flops is None else sums | {"total_teraflop": ranks * self.flops / 1e12}
