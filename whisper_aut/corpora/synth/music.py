"""Music: an instrument plays a riff in a key and a tempo, perhaps over drums; or drums alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from whisper_aut.corpora.recipes.base import with_article
from whisper_aut.corpora.synth.signals import (
    HIGHEST_HZ,
    SAMPLE_RATE_HZ,
    Rng,
    add_grains,
    band_noise,
    caption,
    decay,
    draw_graded,
    draw_length,
    fade_out,
    from_db,
    harmonic_tone,
    log_uniform,
    phase_of,
    pick,
    record,
    samples_in,
    seconds_axis,
    sine,
    uniform,
    unit_rms,
)
from whisper_aut.data.annotation import Annotation

MAX_HARMONICS = 16
MIN_STRENGTH = 0.008  # weaker partials are left out
VOWELS_HZ = ((700, 1_150, 2_600), (350, 900, 2_500), (300, 2_200, 2_900), (500, 1_800, 2_500))
KEYS = ("c", "c sharp", "d", "e flat", "e", "f", "f sharp", "g", "a flat", "a", "b flat", "b")
MODES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
RHYTHMS = ((1.0,), (0.5,), (0.5, 0.5, 1.0), (0.75, 0.25), (1.0, 0.5, 0.5))  # in beats
TEMPO = ("slow", "", "fast")
DRUM_PATTERNS = {  # one bar in sixteenths: kick, snare, hi-hat
    "rock": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x."),
    "disco": ("x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "funk": ("x..x..x...x..x..", "....x..x....x..x", "xxxxxxxxxxxxxxxx"),
    "march": ("x...x...x...x...", "..x.x.xx..x.x.xx", "................"),
    "shuffle": ("x.......x.......", "....x.......x...", "x..xx..xx..xx..x"),
}
DRUMS_PROBABILITY = 0.3  # that an instrument plays over drums


@dataclass(frozen=True)
class Instrument:
    """An entry of `music.yaml`, or (from `vary`) one specimen of the instrument."""

    label: str
    other_name: str
    register: tuple[int, int]  # lowest and highest MIDI pitch of the tonic
    rolloff: float  # the strength of partial n is n**-rolloff
    attack_seconds: float = 0.005
    decay_seconds: float = 0.0  # to 1/e of the lowest partial; 0 for sustained notes
    even: float = 0.9  # strength of the even harmonics
    ratios: tuple[float, ...] = ()  # of the partials to the lowest; empty for harmonics
    vibrato_cents: float = 0.0
    breath: float = 0.0  # level of the noise of air or impact
    drive: float = 0.0  # amount of overdrive
    detune_cents: float = 0.0  # between two voices in unison
    sings: bool = False  # vowels shape the spectrum
    plays_chords: bool = False

    def vary(self, rng: Rng) -> "Instrument":
        """Return a specimen, whose numbers are up to a third smaller or larger than typical."""
        numbers = [name for name, value in vars(self).items() if type(value) in (int, float)]
        varied = {name: getattr(self, name) * log_uniform(rng, (0.75, 1.33)) for name in numbers}
        return replace(self, **varied)


_TABLE = Path(__file__).with_name("music.yaml").read_text(encoding="utf-8")
INSTRUMENTS = {label: Instrument(label, **entry) for label, entry in yaml.safe_load(_TABLE).items()}
DRUMS = "drums"
MUSIC_LABELS = (*INSTRUMENTS, DRUMS)


def play_note(
    rng: Rng, instrument: Instrument, pitch_hz: float, seconds: float, vowel_hz: Any = ()
) -> np.ndarray:
    """Return one note; a struck or plucked one rings on after `seconds`."""
    decay_seconds = instrument.decay_seconds
    ring_seconds = min(1.0, decay_seconds or instrument.attack_seconds)
    samples = samples_in(max(0.06, seconds + ring_seconds))
    times = seconds_axis(samples)
    ratios = np.array(instrument.ratios or range(1, MAX_HARMONICS + 1), dtype=np.float32)
    strengths = np.arange(1.0, len(ratios) + 1) ** -instrument.rolloff
    if not instrument.ratios:
        strengths[1::2] *= min(1.0, instrument.even)
    if len(vowel_hz):
        octaves = np.log2(ratios[:, None] * pitch_hz / np.array(vowel_hz))
        strengths *= 0.08 + np.exp(-0.5 * (octaves / 0.25) ** 2).sum(axis=1)
    note = np.zeros(samples, dtype=np.float32)
    for voice in (-0.5, 0.5) if instrument.detune_cents else (0.0,):
        swing = sine(uniform(rng, (4.5, 6.5)) * times.astype(np.float64) + rng.random())
        vibrato = instrument.vibrato_cents * swing * np.minimum(1, times / 0.25)
        cents = voice * instrument.detune_cents + vibrato
        cycles = phase_of(pitch_hz * 2 ** (cents / 1200))
        for ratio, strength in zip(ratios, strengths, strict=True):
            if strength < MIN_STRENGTH or ratio * pitch_hz > HIGHEST_HZ:
                continue
            partial = np.float32(strength) * sine(ratio * cycles)
            if decay_seconds:  # high partials decay sooner
                partial *= np.exp(-times / np.float32(decay_seconds / ratio**0.75))
            note += partial
    note *= np.minimum(1, times / np.float32(instrument.attack_seconds))
    if instrument.breath:  # a mallet's knock is short, a player's breath lasts
        noise = band_noise(rng, samples, 500, 6_000) * np.float32(instrument.breath)
        note += noise * decay(samples, 0.03) if decay_seconds else noise
    return fade_out(note, min(0.06, ring_seconds))


@dataclass(frozen=True)
class Score:
    """A riff. `notes` are (onset in seconds, length in seconds, MIDI pitch)."""

    beats_per_minute: float
    tempo: str
    key: str
    mode: str
    pattern: str
    notes: list[tuple[float, float, int]]


def write_score(rng: Rng, instrument: Instrument, seconds: float) -> Score:
    """Compose a riff of a length in seconds."""
    beats_per_minute, tempo = draw_graded(rng, (55, 185), TEMPO)
    mode = pick(rng, list(MODES))
    tonic = int(rng.integers(instrument.register[0], instrument.register[1] + 1))
    chords = instrument.plays_chords and rng.random() < 0.35
    pattern = "chords" if chords else pick(rng, ("melody", "arpeggio", "scale", "ostinato"))
    rhythm = pick(rng, ((2.0,), (1.0,)) if chords else RHYTHMS)
    degrees = _draw_degrees(rng, pattern)
    notes, now, step = [], uniform(rng, (0.0, 0.15)), 0
    while now < seconds - 0.1:
        length = rhythm[step % len(rhythm)] * 60 / beats_per_minute
        for degree in degrees[step % len(degrees)]:
            octave, index = divmod(degree, 7)
            notes.append((now, 0.95 * length, tonic + 12 * octave + MODES[mode][index]))
        now, step = now + length, step + 1
    return Score(beats_per_minute, tempo, KEYS[tonic % 12], mode, pattern, notes)


def _draw_degrees(rng: Rng, pattern: str) -> list[tuple[int, ...]]:
    """Return the scale degrees of each step of a pattern; a chord has three."""
    roots = (0, *(pick(rng, (0, 3, 4, 5)) for _ in range(3)))
    if pattern == "chords":
        return [(root, root + 2, root + 4) for root in roots]
    if pattern == "arpeggio":
        line = [root + step for root in roots[:2] for step in (0, 2, 4, 7, 4, 2)]
    elif pattern == "scale":
        line = [*range(8), *range(6, 0, -1)]
        line = line if rng.random() < 0.5 else line[7:] + line[:7]
    elif pattern == "ostinato":
        line = rng.integers(0, 5, int(rng.integers(2, 5)))
    else:
        line = np.clip(np.cumsum(rng.integers(-2, 3, 16)), -3, 8)
    return [(int(degree),) for degree in line]


def play_score(rng: Rng, instrument: Instrument, score: Score, samples: int) -> np.ndarray:
    specimen = instrument.vary(rng)
    vowel_hz = pick(rng, VOWELS_HZ) if instrument.sings else ()
    notes = [
        play_note(rng, specimen, 440 * 2 ** ((pitch - 69) / 12), length, vowel_hz)
        * np.float32(uniform(rng, (0.6, 1)))
        for _, length, pitch in score.notes
    ]
    waveform = unit_rms(add_grains(samples, [onset for onset, _, _ in score.notes], notes))
    return np.tanh(np.float32(specimen.drive) * waveform) if specimen.drive else waveform


def play_drums(rng: Rng, samples: int, beats_per_minute: float) -> tuple[np.ndarray, str]:
    """Return a drum track of unit RMS and the name of its pattern."""
    style = pick(rng, list(DRUM_PATTERNS))
    sixteenth_seconds = 15 / beats_per_minute
    steps = int(np.ceil(samples / SAMPLE_RATE_HZ / sixteenth_seconds))
    track = np.zeros(samples, dtype=np.float32)
    for pattern, stroke in zip(DRUM_PATTERNS[style], _draw_strokes(rng), strict=True):
        struck = np.array([step for step in range(steps) if pattern[step % 16] == "x"])
        onsets = np.maximum(0, struck * sixteenth_seconds + rng.normal(0, 0.006, len(struck)))
        strokes = [stroke * np.float32(uniform(rng, (0.6, 1))) for _ in onsets]
        track += add_grains(samples, onsets, strokes)
    return unit_rms(track), style


def _draw_strokes(rng: Rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one stroke of kick, snare and hi-hat."""
    falling_hz = uniform(rng, (45, 75)) * (1 + 3 * np.exp(-seconds_axis(4_800) / 0.03))
    kick = harmonic_tone(falling_hz, (1, 0.3)) * decay(4_800, uniform(rng, (0.06, 0.14)))
    skin = harmonic_tone(np.full(3_520, uniform(rng, (160, 260))), (0.5, 0.2))
    rattle = 0.4 * band_noise(rng, 3_520, 800, log_uniform(rng, (3_000, 7_000)))
    snare = (skin + rattle) * decay(3_520, uniform(rng, (0.04, 0.1)))
    hiss = 0.25 * band_noise(rng, 1_600, log_uniform(rng, (3_500, 6_000)), 7_800)
    hat = hiss * decay(1_600, uniform(rng, (0.015, 0.04)))
    return fade_out(kick), fade_out(snare), fade_out(hat)


def render_music(rng: Rng, index: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip. Its instrument is `index` modulo the labels, so every split is balanced."""
    label, samples = MUSIC_LABELS[index % len(MUSIC_LABELS)], draw_length(rng)
    if label == DRUMS:
        beats_per_minute, tempo = draw_graded(rng, (70, 170), TEMPO)
        waveform, style = play_drums(rng, samples, beats_per_minute)
        beat = with_article(f"{tempo} {style} beat".strip())
        templates = ("drums play {}", "{} on drums", "a drum kit plays {}")
        essential, phrases = pick(rng, templates).format(beat), []
        extra = {"beats_per_minute": round(beats_per_minute), "pattern": style}
    else:
        instrument = INSTRUMENTS[label]
        score = write_score(rng, instrument, samples / SAMPLE_RATE_HZ)
        waveform = play_score(rng, instrument, score, samples)
        essential, phrases = _describe(rng, instrument, score)
        extra = {
            "beats_per_minute": round(score.beats_per_minute),
            "key": f"{score.key} {score.mode}",
            "pattern": score.pattern,
        }
        if rng.random() < DRUMS_PROBABILITY:
            drums, _ = play_drums(rng, samples, score.beats_per_minute)
            waveform = waveform + drums * from_db(uniform(rng, (-18, -8)))
            phrases.append(pick(rng, ("over drums", "with drums", "with a drum beat")))
    recording = record(rng, waveform, (14, 36))
    text = caption(rng, essential, (*phrases, recording.room))
    extra["room"] = recording.room
    annotation = Annotation(text, domain="music", task="caption", label=label, extra=extra)
    return recording.waveform, annotation


def _describe(rng: Rng, instrument: Instrument, score: Score) -> tuple[str, list[str]]:
    """Return how the caption begins, and optional phrases."""
    riff = f"{score.tempo} {score.pattern}".strip()
    riff = riff if score.pattern == "chords" else with_article(riff)
    verbs = ("sings", "sung by") if instrument.sings else ("plays", "on")
    name = with_article(pick(rng, (instrument.label, instrument.other_name)))
    essential = pick(rng, (f"{name} {verbs[0]} {riff}", f"{riff} {verbs[1]} {name}"))
    keys = (f"in {score.key} {score.mode}", f"in a {score.mode} key")
    return essential, [pick(rng, keys)]
