"""An order for one clip → its FLAC bytes and annotation; what the workers of `corpora.demo` run.

In: (seed, split, domain, number). Out: key, FLAC at 16 kHz, `Annotation`. Next: `corpora.demo` writes them into shards. Every
clip has a generator of its own, so neither order nor process changes it, and no two splits share one. This module stays free
of heavy imports: each worker process pays for them.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
import soundfile

from whisper_aut.corpora.annotation import DOMAINS, Annotation
from whisper_aut.corpora.synth.music import MUSIC_LABELS, render_music
from whisper_aut.corpora.synth.signals import SAMPLE_RATE_HZ
from whisper_aut.corpora.synth.sound import SOUND_LABELS, render_sound
from whisper_aut.corpora.synth.speech import KEYWORDS, render_speech

GENERATOR_VERSION = (
    1  # raise it with every change that changes a clip: built corpora are then rebuilt
)
LICENCE = "CC0-1.0"
SPLITS = ("train", "valid", "test")
RENDERERS = {"speech": render_speech, "sound": render_sound, "music": render_music}
LABELS = {"speech": KEYWORDS, "sound": SOUND_LABELS, "music": MUSIC_LABELS}


@dataclass(frozen=True)
class ClipOrder:
    """Which clip to render."""

    seed: int
    split: str
    domain: str
    number: int

    @property
    def key(self) -> str:
        return f"{self.split}-{self.domain}-{self.number:05d}"

    def generator(self) -> np.random.Generator:
        place = (SPLITS.index(self.split), DOMAINS.index(self.domain), self.number)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=place))


@dataclass(frozen=True)
class RenderedClip:
    """A clip as a shard stores it."""

    key: str
    flac: bytes
    annotation: Annotation


def render_clip(order: ClipOrder) -> RenderedClip:
    """Render one clip."""
    waveform, annotation = RENDERERS[order.domain](order.generator(), order.number)
    encoded = io.BytesIO()
    soundfile.write(encoded, waveform, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    facts = {"duration_seconds": round(len(waveform) / SAMPLE_RATE_HZ, 4), "id": order.key}
    return RenderedClip(
        order.key, encoded.getvalue(), replace(annotation, source="demo", licence=LICENCE, **facts)
    )
