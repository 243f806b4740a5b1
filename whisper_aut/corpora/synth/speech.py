"""One clip of speech: a sentence or a keyword, in one of many voices, with a little noise and room.

In: a generator and the clip's number, which decides between sentence and keyword. Out: a waveform `[S]` and its annotation;
`label`, the keyword, stands on keyword clips only, so that a probe can ask which word was spoken. Next: `render`.
"""

import numpy as np

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.synth.espeak import Voice, speak
from whisper_aut.corpora.synth.grammar import KEYWORDS, keyword_phrase, sentence, transcript
from whisper_aut.corpora.synth.room import SMALL_ROOM, at_level, draw_room, placed, with_background
from whisper_aut.corpora.synth.signals import pick, samples_in, uniform

ACCENTS = {
    "american": "gmw/en-US",
    "british": "gmw/en",
    "received": "gmw/en-GB-x-rp",
    "scottish": "gmw/en-GB-scotland",
}
VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
    *("Alex", "Andy", "Annie", "belinda", "steph", "linda", "john", "grandma", "grandpa"),
)
WORDS_PER_MINUTE = (115, 230)
SIGNAL_TO_NOISE_DB = (8, 40)
MIN_SECONDS, MAX_SECONDS = 1.0, 12.0
AUDIBLE = 0.01  # of the peak: espeak-ng pads an utterance with silence below this


def draw_voice(rng: np.random.Generator) -> tuple[Voice, str]:
    """Draw a speaker and a manner; return the accent's name as well."""
    accent = pick(rng, list(ACCENTS))
    rate, pitch, spread = rng.integers(
        (WORDS_PER_MINUTE[0], 25, 25), (WORDS_PER_MINUTE[1] + 1, 76, 76)
    )
    return Voice(
        f"{ACCENTS[accent]}+{pick(rng, VARIANTS)}", int(rate), int(pitch), int(spread)
    ), accent


def render_speech(rng: np.random.Generator, number: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip: every second one is a keyword, `number` deciding which, so that every split is balanced."""
    keyword = KEYWORDS[number // 2 % len(KEYWORDS)] if number % 2 else None
    spoken = keyword_phrase(rng, keyword) if keyword else sentence(rng)
    voice, accent = draw_voice(rng)
    waveform = _with_pauses(rng, speak(spoken, voice, seed=int(rng.integers(1, 2**31))))
    room, _ = draw_room(rng, (SMALL_ROOM,), dry_share=0.75)
    waveform = placed(rng, waveform, room, tilt_db=2)
    waveform, _ = with_background(rng, waveform, uniform(rng, SIGNAL_TO_NOISE_DB))
    extra = {"voice": voice.name, "accent": accent, "words_per_minute": voice.words_per_minute}
    annotation = Annotation(
        transcript(spoken), domain="speech", task="asr", label=keyword, language="en", extra=extra
    )
    return at_level(waveform, uniform(rng, (-20, -2))), annotation


def _with_pauses(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """Cut the engine's own silences and set the words somewhere in a clip of at least `MIN_SECONDS`."""
    audible = np.flatnonzero(np.abs(waveform) > AUDIBLE * np.abs(waveform).max())
    words = waveform[audible[0] : audible[-1] + 1][: samples_in(MAX_SECONDS - 0.5)]
    before, after = (samples_in(uniform(rng, (0.05, 0.25))) for _ in range(2))
    missing = max(0, samples_in(MIN_SECONDS) - len(words) - before - after)
    before += int(rng.integers(0, missing + 1))
    clip = np.zeros(max(samples_in(MIN_SECONDS), before + len(words) + after), dtype=np.float32)
    clip[before : before + len(words)] = words
    return clip
