"""Speech: sentences of a grammar and keywords, spoken by espeak-ng in many voices."""

import _ctypes
import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import yaml

from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    SMALL_ROOM,
    Rng,
    pick,
    record,
    samples_in,
    uniform,
)
from whisper_aut.data.annotation import Annotation
from whisper_aut.errors import UserError, require

# Constants of speak_lib.h, espeak-ng 1.52
SYNCHRONOUS_OUTPUT, UTF8_TEXT = 2, 1
RATE, PITCH, PITCH_RANGE = 1, 3, 4
OnSamples = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

KEYWORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("yes", "no", "stop", "go", "left", "right"),
)
CARRIERS = (
    *("{}", "{}", "{}", "say {}", "the word is {}"),
    *("please say {} again", "i said {}", "it was {} this time"),
)
GRAMMAR: dict[str, list[str]] = yaml.safe_load(
    Path(__file__).with_name("speech.yaml").read_text(encoding="utf-8")
)
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
MIN_SECONDS, MAX_SECONDS = 1.0, 12.0
AUDIBLE = 0.01  # relative to the peak; espeak-ng pads an utterance with silence below this


@dataclass(frozen=True)
class Voice:
    """A voice of espeak-ng with a variant, such as `gmw/en-US+f2`; pitch and its range in 0–100."""

    name: str
    words_per_minute: int
    pitch: int
    pitch_range: int


def speak(text: str, voice: Voice, seed: int) -> np.ndarray:
    """Speak a text. The samples depend on the arguments only.

    The library is loaded again for each utterance (4 ms), because part of its state, such as the
    phase of a voice's flutter, is static and cannot be reset otherwise. This needs a C library
    whose `dlclose` unloads, as glibc's and macOS's do and musl's does not.

    Raises:
        UserError: the extra `demo` is not installed.
    """
    require("espeakng_loader")
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        data = espeakng_loader.get_data_path()
        rate_hz = library.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, data.encode(), 0)
        if rate_hz <= 0:
            raise UserError(f"espeak-ng did not start with the voices in {data}.")
        samples = _synthesise(library, text, voice, seed)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return soxr.resample(samples / np.float32(1 << 15), rate_hz, SAMPLE_RATE_HZ, quality="HQ")


def _synthesise(library: ctypes.CDLL, text: str, voice: Voice, seed: int) -> np.ndarray:
    blocks: list[np.ndarray] = []

    @OnSamples
    def collect(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise RuntimeError(f"espeak-ng has no voice {voice.name}.")
    library.espeak_SetParameter(RATE, voice.words_per_minute, 0)
    library.espeak_SetParameter(PITCH, voice.pitch, 0)
    library.espeak_SetParameter(PITCH_RANGE, voice.pitch_range, 0)
    encoded = text.encode()
    size = ctypes.c_size_t(len(encoded) + 1)
    status = library.espeak_Synth(encoded, size, 0, 1, 0, UTF8_TEXT, None, None)
    if status != 0 or not blocks:
        raise RuntimeError(f"espeak-ng did not speak {text!r} (status {status}).")
    return np.concatenate(blocks)


def draw_sentence(rng: Rng) -> str:
    text = "{sentence}"
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", lambda symbol: pick(rng, GRAMMAR[symbol[1]]), text, count=1)
    return text


def transcript(spoken: str) -> str:
    """Return the words without punctuation."""
    return re.sub(r"[^a-z' ]", "", spoken.lower()).strip()


def render_speech(rng: Rng, index: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip. Odd indices are keywords in turn, so every split is balanced.

    Only keyword clips have a label, which a probe can then predict.
    """
    keyword = KEYWORDS[index // 2 % len(KEYWORDS)] if index % 2 else None
    spoken = pick(rng, CARRIERS).format(keyword) + "." if keyword else draw_sentence(rng)
    accent = pick(rng, list(ACCENTS))
    rate, pitch, pitch_range = (int(value) for value in rng.integers((115, 25, 25), (231, 76, 76)))
    voice = Voice(f"{ACCENTS[accent]}+{pick(rng, VARIANTS)}", rate, pitch, pitch_range)
    waveform = _pad(rng, speak(spoken, voice, seed=int(rng.integers(1, 2**31))))
    recording = record(
        rng, waveform, (8, 40), rooms=(SMALL_ROOM,), dry_probability=0.75, tilt_db=2.0
    )
    extra = {"voice": voice.name, "accent": accent, "words_per_minute": voice.words_per_minute}
    text = transcript(spoken)
    annotation = Annotation(
        text, domain="speech", task="asr", label=keyword, language="en", extra=extra
    )
    return recording.waveform, annotation


def _pad(rng: Rng, waveform: np.ndarray) -> np.ndarray:
    """Replace the silence around an utterance; the result lasts at least `MIN_SECONDS`."""
    audible = np.flatnonzero(np.abs(waveform) > AUDIBLE * np.abs(waveform).max())
    words = waveform[audible[0] : audible[-1] + 1][: samples_in(MAX_SECONDS - 0.5)]
    before, after = (samples_in(uniform(rng, (0.05, 0.25))) for _ in range(2))
    missing = max(0, samples_in(MIN_SECONDS) - len(words) - before - after)
    earlier = int(rng.integers(0, missing + 1))
    return np.pad(words, (before + earlier, after + missing - earlier))
