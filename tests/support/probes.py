"""A tiny encoder over real log-mel frames, and noisy tones whose pitch is the class."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.probes.embed import Embeddings, EmbedSettings, FeatureKind, TaskEmbedder
from whisper_aut.probes.encoders import FrameEncoder, LogMelBaseline
from whisper_aut.probes.tasks import ProbeTask, task_from_mapping

TONES_HZ = {"low": 300.0, "middle": 900.0, "high": 2700.0}
RATE_HZ = 16_000


class TinyEncoder:
    """A fixed random projection of log-mel frames, `[T, 12]`; counts the clips that it encoded."""

    padding = "none"
    width = 12

    def __init__(self, seed: int = 0):
        self.seed, self.encoded = seed, 0
        self.weight = torch.randn(80, self.width, generator=torch.Generator().manual_seed(seed))
        self.log_mel = LogMelBaseline()

    def encode(self, waveforms, sample_rate_hz, layers=(), *, batch_seconds=0.0):
        self.encoded += len(waveforms)
        return [
            torch.relu(frames @ self.weight)
            for frames in self.log_mel.encode(waveforms, sample_rate_hz)
        ]

    def fingerprint(self):
        return f"tiny-{self.seed}"


def noisy_tone(label: str, seed: int, noise: float = 0.3) -> bytes:
    rng = np.random.default_rng(seed)
    seconds = np.arange(int(rng.uniform(0.15, 0.5) * RATE_HZ)) / RATE_HZ
    wave = 0.2 * np.sin(
        2 * np.pi * TONES_HZ[label] * rng.uniform(0.6, 1.6) * seconds
    ) + noise * rng.standard_normal(seconds.size)
    file = io.BytesIO()
    soundfile.write(file, wave.clip(-1, 1).astype(np.float32), RATE_HZ, format="WAV")
    return file.getvalue()


def write_tones(folder: Path, clips_per_class: int, seed: int, **changes) -> None:
    with ShardWriter(folder, max_bytes=200_000) as shards:
        for number in range(clips_per_class * len(TONES_HZ)):
            label = list(TONES_HZ)[number % len(TONES_HZ)]
            facts = {
                "label": label,
                "duration_seconds": 0.3,
                "extra": {"pitch": label, "half": str(number % 2)},
            } | changes
            shards.write(
                f"clip{number}", "wav", noisy_tone(label, 1000 * seed + number), Annotation(**facts)
            )


def make_task(**changes) -> ProbeTask:
    values = {
        "name": "tones",
        "title": "Tones",
        "domain": "sound",
        "train": ["{root}/tones/train"],
        "valid": ["{root}/tones/valid"],
        "test": ["{root}/tones/test"],
    }
    return task_from_mapping(values | changes, "test")


def embed_task(
    encoder: FrameEncoder,
    task: ProbeTask,
    root: str | Path | None,
    cache: str | Path,
    settings: EmbedSettings | None = None,
    kind: FeatureKind = "pooled",
) -> dict[str, Embeddings]:
    """Return the embeddings of each part of a task, see `TaskEmbedder`."""
    return TaskEmbedder(encoder, task, root, cache, settings or EmbedSettings(), kind).embed()
