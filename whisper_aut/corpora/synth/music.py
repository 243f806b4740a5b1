"""One clip of music: an instrument plays a riff in a key and a tempo, perhaps over drums or a bass.

In: a generator and the clip's number, which decides the instrument. Out: a waveform `[S]` and its annotation. Next: `render`.
"""

from dataclasses import dataclass

import numpy as np

from whisper_aut.corpora.annotation import Annotation
from whisper_aut.corpora.synth.captions import article, composed, graded
from whisper_aut.corpora.synth.drums import play_drums
from whisper_aut.corpora.synth.instruments import INSTRUMENTS, Instrument, play_note, specimen
from whisper_aut.corpora.synth.room import ROOMS, at_level, draw_room, placed, with_background
from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    band_noise,
    lay,
    log_uniform,
    pick,
    uniform,
    unit_rms,
)
from whisper_aut.corpora.synth.sound import clip_samples

DRUMS = "drums"
MUSIC_LABELS = (*(instrument.label for instrument in INSTRUMENTS), DRUMS)
BY_LABEL = {instrument.label: instrument for instrument in INSTRUMENTS}
KEYS = ("c", "c sharp", "d", "e flat", "e", "f", "f sharp", "g", "a flat", "a", "b flat", "b")
MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PATTERNS = ("melody", "arpeggio", "scale", "ostinato")
CHORD_ROOTS = (0, 3, 4, 5)  # degrees: tonic, subdominant, dominant, submediant
BEATS_PER_MINUTE = (55, 185)
BAND_SHARE = 0.3  # of the solos have drums, of the drums a bass
DRY_SHARE = 0.6
TILT_DB = 1.0  # bound of the microphone's tilt, per octave
SIGNAL_TO_NOISE_DB = (14, 36)


@dataclass(frozen=True)
class Score:
    """What is played. `notes` are (onset in seconds, length in seconds, MIDI pitch)."""

    beats_per_minute: float
    key: str
    mode: str
    pattern: str
    notes: list[tuple[float, float, int]]

    @property
    def tempo(self) -> str:
        return graded(self.beats_per_minute, 85, 135, ("slow", "", "fast"))

    @property
    def mood(self) -> str:
        moods = {
            ("slow", "major"): "calm",
            ("slow", "minor"): "sad",
            ("fast", "major"): "cheerful",
            ("fast", "minor"): "tense",
        }
        return moods.get((self.tempo, self.mode), "")


def render_music(rng: np.random.Generator, number: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip; its instrument is `number` modulo the instruments, so that every split is balanced."""
    label = MUSIC_LABELS[number % len(MUSIC_LABELS)]
    samples = clip_samples(rng)
    room, place = draw_room(rng, ROOMS, DRY_SHARE)
    if label == DRUMS:
        waveform, text, extra = _drum_solo(rng, samples, place)
    else:
        waveform, text, extra = _solo(rng, BY_LABEL[label], samples, place)
    waveform = placed(rng, waveform, room, TILT_DB)
    waveform, _ = with_background(rng, waveform, uniform(rng, SIGNAL_TO_NOISE_DB))
    annotation = Annotation(
        text, domain="music", task="caption", label=label, extra={**extra, "room": place}
    )
    return at_level(waveform, uniform(rng, (-14, -2))), annotation


def write_score(rng: np.random.Generator, instrument: Instrument, seconds: float) -> Score:
    """Compose a riff: a key, a mode, a tempo, a pattern, and notes until the clip ends."""
    beats_per_minute = log_uniform(rng, BEATS_PER_MINUTE)
    mode = pick(rng, list(MODES))
    tonic = int(rng.integers(instrument.register[0], instrument.register[1] + 1))
    chords = instrument.chords and rng.random() < 0.35
    pattern = "chords" if chords else pick(rng, PATTERNS)
    rhythm = (
        pick(rng, ((1.0,), (0.5,), (0.5, 0.5, 1.0), (0.75, 0.25), (1.0, 0.5, 0.5)))
        if not chords
        else pick(rng, ((2.0,), (1.0,)))
    )
    notes, now, step = [], uniform(rng, (0.0, 0.15)), 0
    degrees = _degrees(rng, pattern)
    while now < seconds - 0.1:
        length = rhythm[step % len(rhythm)] * 60 / beats_per_minute
        together = degrees[step % len(degrees)]
        notes += [
            (now, length * 0.95, tonic + _semitones(MODES[mode], degree)) for degree in together
        ]
        now, step = now + length, step + 1
    return Score(beats_per_minute, KEYS[tonic % 12], mode, pattern, notes)


def _degrees(rng: np.random.Generator, pattern: str) -> list[tuple[int, ...]]:
    """Return the scale degrees of a pattern, one tuple per beat; a chord has three."""
    if pattern == "chords":
        roots = (0, *(pick(rng, CHORD_ROOTS) for _ in range(3)))
        return [(root, root + 2, root + 4) for root in roots]
    if pattern == "arpeggio":
        return [
            (root + step,) for root in (0, pick(rng, CHORD_ROOTS)) for step in (0, 2, 4, 7, 4, 2)
        ]
    if pattern == "scale":
        run = list(range(8))
        return [
            (degree,)
            for degree in (run + run[-2:0:-1] if rng.random() < 0.5 else run[::-1] + run[1:-1])
        ]
    if pattern == "ostinato":
        return [(int(degree),) for degree in rng.integers(0, 5, int(rng.integers(2, 5)))]
    return [(int(degree),) for degree in np.clip(np.cumsum(rng.integers(-2, 3, 16)), -3, 8)]


def _semitones(scale: tuple[int, ...], degree: int) -> int:
    octave, step = divmod(degree, len(scale))
    return 12 * octave + scale[step]


def play(
    rng: np.random.Generator, instrument: Instrument, score: Score, samples: int
) -> np.ndarray:
    """Play a score on one specimen of an instrument."""
    timbre = specimen(rng, instrument)
    air = band_noise(rng, samples, 500, 6_000) if timbre.breath else None
    grains = [
        play_note(rng, timbre, 440 * 2 ** ((pitch - 69) / 12), length, air)
        for _, length, pitch in score.notes
    ]
    accented = [grain * np.float32(uniform(rng, (0.6, 1))) for grain in grains]
    waveform = unit_rms(lay(samples, [onset for onset, _, _ in score.notes], accented))
    return np.tanh(np.float32(timbre.drive) * waveform) if timbre.drive else waveform


def _solo(
    rng: np.random.Generator, instrument: Instrument, samples: int, place: str
) -> tuple[np.ndarray, str, dict[str, object]]:
    score = write_score(rng, instrument, samples / SAMPLE_RATE_HZ)
    waveform, band = play(rng, instrument, score, samples), ""
    if rng.random() < BAND_SHARE:
        drums, _ = play_drums(rng, samples, score.beats_per_minute)
        waveform = waveform + unit_rms(drums) * np.float32(10 ** (uniform(rng, (-18, -8)) / 20))
        band = pick(rng, ("over drums", "with drums behind it", "with a drum beat"))
    text = _solo_caption(rng, instrument, score, band, place)
    extra = {
        "beats_per_minute": round(score.beats_per_minute),
        "key": f"{score.key} {score.mode}",
        "pattern": score.pattern,
    }
    return waveform, text, extra


def _solo_caption(
    rng: np.random.Generator, instrument: Instrument, score: Score, band: str, place: str
) -> str:
    manner = pick(rng, [word for word in (score.tempo, score.mood) if word] or [""])
    riff = f"{manner} {score.pattern}".strip()
    riff = riff if score.pattern == "chords" else article(riff)
    key = pick(rng, (f"in {score.key} {score.mode}", f"in a {score.mode} key"))
    templates = (
        ("{who} sings {riff}", "{riff} sung by {who}")
        if instrument.sings
        else ("{who} plays {riff}", "{riff} on {who}", "{who} playing {riff}")
    )
    essential = pick(rng, templates).format(who=article(pick(rng, instrument.names)), riff=riff)
    return composed(rng, essential, (key, band, place))


def _drum_solo(
    rng: np.random.Generator, samples: int, place: str
) -> tuple[np.ndarray, str, dict[str, object]]:
    beats_per_minute = log_uniform(rng, (70, 170))
    waveform, style = play_drums(rng, samples, beats_per_minute)
    band = ""
    if rng.random() < BAND_SHARE:
        bass = BY_LABEL["synth bass"]
        line = play(rng, bass, write_score(rng, bass, samples / SAMPLE_RATE_HZ), samples)
        waveform, band = (
            unit_rms(waveform) + line * np.float32(10 ** (uniform(rng, (-18, -8)) / 20)),
            "with a bass line",
        )
    tempo = graded(beats_per_minute, 90, 130, ("slow ", "", "fast "))
    beat = article(f"{tempo}{style} beat")
    essential = pick(rng, (f"drums play {beat}", f"{beat} on drums", f"a drum kit plays {beat}"))
    return (
        waveform,
        composed(rng, essential, (band, place)),
        {"beats_per_minute": round(beats_per_minute), "pattern": style},
    )
