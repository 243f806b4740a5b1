"""Synthetic clips, their encoded bytes, and shards of them."""

import io
from pathlib import Path

import numpy as np
import soundfile

from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter

TEXTS = [
    "a dog barks twice",
    "rain falls on a tin roof",
    "a slow tune on a piano",
    "turn the light off",
    "seven",
    "nine birds sing",
]
# A probe task over the shards of `tiny_shards`.
TONES = {
    "name": "tones",
    "title": "Tones",
    "domain": "sound",
    "train": ["{root}/speech"],
    "test": ["{root}/sound"],
    "metric": "accuracy",
    "label": "label",
    "source": "made by the tests",
}
TEXTURE_HZ = 22_050


def encode_audio(
    samples: np.ndarray,
    sample_rate_hz: int = 16_000,
    kind: str = "FLAC",
    subtype: str | None = None,
) -> bytes:
    """Return samples as the bytes of an audio file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def tone(seconds: float, frequency_hz: float = 440.0, sample_rate_hz: int = 16_000) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    return (0.3 * np.sin(2 * np.pi * frequency_hz * time)).astype(np.float32)


def texture(seed: int, seconds: float = 5.0) -> np.ndarray:
    """Noise of changing colour: rain, more or less, in which there are no peaks to hold on to."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal(round(seconds * TEXTURE_HZ))
    slow = np.interp(
        np.arange(len(noise)), np.linspace(0, len(noise), 12), generator.uniform(0.3, 1, 12)
    )
    return (0.1 * slow * np.convolve(noise, generator.uniform(0.2, 1, 4), "same")).astype(
        np.float32
    )


def mp3(samples: np.ndarray, rate_hz: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, rate_hz, format="MP3", bitrate_mode="CONSTANT", compression_level=0.6
    )
    return buffer.getvalue()


def write_shards(
    folder: Path, clips: int, domain: str, *, per_shard_bytes: int = 60_000, labels: int = 2
) -> Path:
    """Write shards of short tones, texts and labels; the label decides the pitch, so that probes
    can learn it.
    """
    generator = np.random.default_rng([clips, *domain.encode()])
    with ShardWriter(folder, max_bytes=per_shard_bytes) as shards:
        for number in range(clips):
            seconds = float(generator.uniform(0.3, 1.2))
            label = number % labels
            samples = tone(seconds, 300.0 * (label + 1)) + 0.01 * generator.standard_normal(
                round(seconds * 16_000)
            )
            text = TEXTS[number % len(TEXTS)]
            annotation = Annotation(
                text=text,
                domain=domain,
                label=f"class {label}",
                duration_seconds=seconds,
                id=str(number),
            )
            shards.write(
                f"{domain}-{number:04d}",
                "flac",
                encode_audio(samples.astype(np.float32)),
                annotation,
            )
    return folder
