"""One clip of environmental sound: an event of a class, staged with a room, background noise and what else is heard.

In: a generator and the clip's number, which decides the class. Out: a waveform `[S]` and its annotation. Next: `render`.
"""

import numpy as np

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.synth import calls, impacts, textures  # noqa: F401  (importing them registers their classes)
from whisper_aut.corpora.synth.captions import backdrop, composed
from whisper_aut.corpora.synth.catalogue import SOUND_CLASSES
from whisper_aut.corpora.synth.room import ROOMS, at_level, draw_room, placed, with_background
from whisper_aut.corpora.synth.signals import pick, samples_in, uniform, unit_rms

CLIP_SECONDS_MEDIAN, CLIP_SECONDS_SPREAD, CLIP_SECONDS_LIMITS = 2.7, 0.4, (1.2, 12.0)
DRY_SHARE = 0.6
TILT_DB = 1.5  # bound of the microphone's tilt, per octave
SIGNAL_TO_NOISE_DB = (6, 28)
BEHIND_SHARE = 0.25
BEHIND_DB = (-22, -12)  # level of another class in the background
SOUND_LABELS = tuple(sorted(SOUND_CLASSES))


def clip_samples(rng: np.random.Generator) -> int:
    """Draw a clip's length: most last two to five seconds, a few up to twelve."""
    seconds = CLIP_SECONDS_MEDIAN * np.exp(CLIP_SECONDS_SPREAD * rng.standard_normal())
    return samples_in(float(np.clip(seconds, *CLIP_SECONDS_LIMITS)))


def render_sound(rng: np.random.Generator, number: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip; its class is `number` modulo the classes, so that every split is balanced."""
    kind = SOUND_CLASSES[SOUND_LABELS[number % len(SOUND_LABELS)]]
    event = kind.render(rng, clip_samples(rng))
    room, place = draw_room(rng, ROOMS, DRY_SHARE)
    waveform = placed(rng, event.waveform, room, TILT_DB)
    behind = ""
    if rng.random() < BEHIND_SHARE:
        other = SOUND_CLASSES[pick(rng, [label for label in SOUND_LABELS if label != kind.label])]
        level = np.float32(10 ** (uniform(rng, BEHIND_DB) / 20))
        waveform, behind = (
            waveform + level * unit_rms(other.render(rng, len(waveform)).waveform),
            other.backdrop,
        )
    ratio_db = uniform(rng, SIGNAL_TO_NOISE_DB)
    waveform, noise = with_background(rng, waveform, ratio_db)
    heard = backdrop(rng, behind or noise) if behind or ratio_db < 15 else ""
    text = composed(rng, pick(rng, kind.clauses), (*event.details, place, heard))
    extra = {
        "details": [detail for detail in event.details if detail],
        "room": place,
        "signal_to_noise_db": round(ratio_db, 1),
    }
    annotation = Annotation(text, domain="sound", task="caption", label=kind.label, extra=extra)
    return at_level(waveform, uniform(rng, (-16, -2))), annotation
