"""The instruments: one row of physical facts each, and one additive synthesiser that plays a note from a row.

In: a pitch in hertz, a length, a `Timbre` drawn from its row. Out: a note `[S]`. Next: `music` plays scores with them. Additive
synthesis with partials that decay at their own rates; vowels as in a choir by formant weights on the harmonics.
"""

from dataclasses import dataclass

import numpy as np

from whisper_aut.corpora.synth.signals import (
    HIGHEST_HZ,
    Span,
    faded,
    harmonics,
    log_uniform,
    phase_of,
    samples_in,
    seconds_axis,
    sine,
    uniform,
)

MAX_HARMONICS = 16
FAINT = 0.008  # strength under which a partial is left out
LIFE_IN_FALLS = 8
VOWELS_HZ = (
    (700, 1_150, 2_600),
    (350, 900, 2_500),
    (300, 2_200, 2_900),
    (500, 1_800, 2_500),
)  # ah, oo, ee, eh


@dataclass(frozen=True)
class Instrument:
    """What is typical of an instrument; every span is drawn from once per clip.

    Attributes:
        label: the probe's class.
        names: ways to name it in a caption.
        register: lowest and highest MIDI pitch of a melody's tonic.
        rolloff: power with which harmonics weaken, h**-rolloff.
        attack_seconds: time to full strength.
        decay_seconds: fall to 1/e of a struck or plucked tone; none where the player sustains it.
        damping: how much sooner the higher partials die.
        even: strength of even harmonics (a closed pipe or a plucked middle has few).
        ratios: partials of a bar or a plate, where they are not harmonic.
        vibrato_cents, breath, drive, detune_cents: depth of vibrato; air noise; overdrive; spread of unison voices.
        sings: vowels shape the harmonics.
        chords: can sound several notes at once.
    """

    label: str
    names: tuple[str, ...]
    register: tuple[int, int] = (48, 67)
    rolloff: Span = (1.0, 1.6)
    attack_seconds: Span = (0.003, 0.01)
    decay_seconds: Span | None = None
    damping: Span = (0.5, 1.0)
    even: Span = (0.8, 1.0)
    ratios: tuple[float, ...] = ()
    vibrato_cents: Span = (0, 0)
    breath: Span = (0, 0)
    drive: Span = (0, 0)
    detune_cents: Span = (0, 0)
    sings: bool = False
    chords: bool = False


INSTRUMENTS = (
    Instrument(
        "guitar",
        ("acoustic guitar", "guitar"),
        register=(45, 57),
        rolloff=(0.9, 1.2),
        decay_seconds=(0.25, 0.6),
        even=(0.3, 0.8),
        breath=(0.05, 0.15),
        chords=True,
    ),
    Instrument(
        "electric guitar",
        ("electric guitar", "distorted guitar"),
        register=(45, 60),
        decay_seconds=(0.6, 2.0),
        drive=(2, 8),
        chords=True,
    ),
    Instrument(
        "piano",
        ("piano", "grand piano"),
        register=(48, 62),
        rolloff=(1.5, 2.0),
        decay_seconds=(0.4, 1.2),
        detune_cents=(1, 4),
        chords=True,
        breath=(0.02, 0.08),
    ),
    Instrument(
        "organ",
        ("organ", "church organ"),
        register=(45, 60),
        rolloff=(0.2, 0.6),
        attack_seconds=(0.01, 0.04),
        even=(1.0, 1.0),
        chords=True,
    ),
    Instrument(
        "flute",
        ("flute", "wooden flute"),
        register=(66, 79),
        rolloff=(2.0, 3.0),
        attack_seconds=(0.03, 0.1),
        vibrato_cents=(5, 25),
        breath=(0.08, 0.25),
    ),
    Instrument(
        "violin",
        ("violin", "solo violin"),
        register=(60, 76),
        rolloff=(0.8, 1.1),
        attack_seconds=(0.04, 0.14),
        vibrato_cents=(15, 40),
        breath=(0.02, 0.08),
    ),
    Instrument(
        "trumpet",
        ("trumpet", "brass trumpet"),
        register=(58, 70),
        rolloff=(0.3, 0.6),
        attack_seconds=(0.02, 0.06),
        vibrato_cents=(0, 10),
    ),
    Instrument(
        "clarinet",
        ("clarinet", "solo clarinet"),
        register=(52, 66),
        rolloff=(0.9, 1.3),
        attack_seconds=(0.02, 0.06),
        even=(0.02, 0.1),
        breath=(0.01, 0.05),
    ),
    Instrument(
        "vibraphone",
        ("vibraphone", "set of chimes"),
        register=(65, 79),
        rolloff=(0.8, 1.4),
        decay_seconds=(0.7, 1.8),
        ratios=(1, 3.98, 10.2),
        chords=True,
    ),
    Instrument(
        "marimba",
        ("marimba", "xylophone"),
        register=(50, 66),
        rolloff=(0.6, 1.2),
        decay_seconds=(0.08, 0.25),
        ratios=(1, 3.93, 9.24),
        breath=(0.05, 0.2),
    ),
    Instrument(
        "synth bass",
        ("synth bass", "bass synthesiser"),
        register=(30, 43),
        rolloff=(0.7, 1.3),
        decay_seconds=(0.2, 0.8),
    ),
    Instrument(
        "choir",
        ("choir", "group of voices"),
        register=(50, 66),
        rolloff=(0.9, 1.3),
        attack_seconds=(0.06, 0.2),
        vibrato_cents=(8, 30),
        breath=(0.01, 0.05),
        detune_cents=(6, 14),
        sings=True,
        chords=True,
    ),
)


@dataclass(frozen=True)
class Timbre:
    """One specimen of an instrument: the numbers drawn for one clip."""

    instrument: Instrument
    rolloff: float
    attack_seconds: float
    decay_seconds: float | None
    damping: float
    even: float
    vibrato_cents: float
    vibrato_hz: float
    breath: float
    drive: float
    detune_cents: float
    vowel_hz: tuple[float, ...]


def specimen(rng: np.random.Generator, instrument: Instrument) -> Timbre:
    """Draw one specimen of an instrument."""
    return Timbre(
        instrument,
        rolloff=uniform(rng, instrument.rolloff),
        attack_seconds=log_uniform(rng, instrument.attack_seconds),
        decay_seconds=log_uniform(rng, instrument.decay_seconds)
        if instrument.decay_seconds
        else None,
        damping=uniform(rng, instrument.damping),
        even=uniform(rng, instrument.even),
        vibrato_cents=uniform(rng, instrument.vibrato_cents),
        vibrato_hz=uniform(rng, (4.5, 6.5)),
        breath=uniform(rng, instrument.breath),
        drive=uniform(rng, instrument.drive),
        detune_cents=uniform(rng, instrument.detune_cents),
        vowel_hz=VOWELS_HZ[int(rng.integers(len(VOWELS_HZ)))] if instrument.sings else (),
    )


def play_note(
    rng: np.random.Generator,
    timbre: Timbre,
    pitch_hz: float,
    seconds: float,
    air: np.ndarray | None = None,
) -> np.ndarray:
    """Return one note; a struck or plucked one rings on for a while after its time. `air` is the noise of its breath."""
    ring_seconds = min(1.0, timbre.decay_seconds) if timbre.decay_seconds else timbre.attack_seconds
    samples = samples_in(max(0.06, seconds + ring_seconds))
    times = seconds_axis(samples)
    voices = (-0.5, 0.5) if timbre.detune_cents else (0.0,)
    note = np.zeros(samples, dtype=np.float32)
    for voice in voices:
        cents = voice * timbre.detune_cents
        if timbre.vibrato_cents:  # sets in after the attack, as players do
            swing = sine(timbre.vibrato_hz * times.astype(np.float64) + voice + rng.random())
            cents = cents + timbre.vibrato_cents * swing * np.minimum(1, times / 0.25)
        cycles = phase_of(np.broadcast_to(pitch_hz * 2 ** (cents / 1200), (samples,)))
        note += _partials(timbre, pitch_hz, cycles, times)
    note *= np.minimum(1, times / np.float32(timbre.attack_seconds))
    if air is not None:  # a mallet's knock is short, a player's breath goes on
        breath = air[:samples] * np.float32(timbre.breath)
        fall = (
            1 if timbre.decay_seconds is None else np.exp(times[: len(breath)] / np.float32(-0.03))
        )
        note[: len(breath)] += breath * fall
    return faded(note, min(0.06, ring_seconds), start=False)


def _partials(timbre: Timbre, pitch_hz: float, cycles: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Sum the partials of one voice, each with its strength and its decay."""
    ratios = np.array(timbre.instrument.ratios or range(1, MAX_HARMONICS + 1), dtype=np.float32)
    ratios = ratios[ratios * pitch_hz < HIGHEST_HZ]
    tuned = timbre.instrument.ratios
    waves = (sine(ratio * cycles) for ratio in ratios) if tuned else map(np.imag, harmonics(cycles))
    total = np.zeros(len(cycles), dtype=np.float32)
    for ratio, strength, wave in zip(
        ratios, _strengths(timbre, pitch_hz, ratios), waves, strict=False
    ):
        if strength < FAINT:
            continue
        if timbre.decay_seconds is None:
            total += np.float32(strength) * wave
            continue
        fall_seconds = float(timbre.decay_seconds / ratio**timbre.damping)
        heard = samples_in(
            LIFE_IN_FALLS * fall_seconds
        )  # what follows is below 16 bits, and subnormal floats are slow
        fall = np.float32(strength) * np.exp(times[:heard] * np.float32(-1 / fall_seconds))
        total[:heard] += wave[:heard] * fall
    return total


def _strengths(timbre: Timbre, pitch_hz: float, ratios: np.ndarray) -> np.ndarray:
    """Return the strength of each partial at a pitch."""
    strengths = np.arange(1, len(ratios) + 1) ** -timbre.rolloff
    if not timbre.instrument.ratios:
        strengths[1::2] *= timbre.even
    if timbre.vowel_hz:
        octaves = np.log2(ratios[:, None] * pitch_hz / np.array(timbre.vowel_hz))
        strengths = strengths * (0.08 + np.exp(-0.5 * (octaves / 0.25) ** 2).sum(1))
    return strengths
