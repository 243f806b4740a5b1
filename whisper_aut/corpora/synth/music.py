"""One clip of music: an instrument plays a riff in a key and a tempo, perhaps over drums or a bass.

In: a generator and the clip's number, which decides the instrument. Out: a waveform `[S]` and its annotation. Next: `render`.
"""

from dataclasses import dataclass

import numpy as np

from whisper_aut.corpora.synth.signals import (
    HIGHEST_HZ,
    ROOMS,
    SAMPLE_RATE_HZ,
    Span,
    article,
    at_level,
    band_noise,
    composed,
    decay_curve,
    draw_room,
    faded,
    graded,
    harmonic_tone,
    harmonics,
    lay,
    log_uniform,
    phase_of,
    pick,
    placed,
    samples_in,
    seconds_axis,
    sine,
    uniform,
    unit_rms,
    with_background,
)
from whisper_aut.corpora.synth.sounds import clip_samples
from whisper_aut.data.annotation import Annotation

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


DRUM_PATTERNS = {  # one bar in sixteenths: kick, snare, hi-hat
    "rock": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x."),
    "disco": ("x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "funk": ("x..x..x...x..x..", "....x..x....x..x", "xxxxxxxxxxxxxxxx"),
    "march": ("x...x...x...x...", "..x.x.xx..x.x.xx", "................"),
    "shuffle": ("x.......x.......", "....x.......x...", "x..xx..xx..xx..x"),
}


def play_drums(
    rng: np.random.Generator, samples: int, beats_per_minute: float
) -> tuple[np.ndarray, str]:
    """Return a drum track in a random pattern, every stroke a little different in strength and time."""
    style = pick(rng, list(DRUM_PATTERNS))
    sixteenth_seconds = 15 / beats_per_minute
    steps = int(np.ceil(samples / SAMPLE_RATE_HZ / sixteenth_seconds))
    track = np.zeros(samples, dtype=np.float32)
    for pattern, stroke in zip(
        DRUM_PATTERNS[style], (_kick(rng), _snare(rng), _hat(rng)), strict=True
    ):
        struck = np.array(
            [step for step in range(steps) if pattern[step % 16] == "x"], dtype=np.float64
        )
        onsets = np.maximum(0, struck * sixteenth_seconds + rng.normal(0, 0.006, len(struck)))
        track += lay(samples, onsets, [stroke * np.float32(uniform(rng, (0.6, 1))) for _ in struck])
    return track, style


def _kick(rng: np.random.Generator) -> np.ndarray:
    samples = samples_in(0.3)
    frequency_hz = uniform(rng, (45, 75)) * (1 + 3 * np.exp(-seconds_axis(samples) / 0.03))
    return harmonic_tone(frequency_hz, (1, 0.3)) * decay_curve(samples, uniform(rng, (0.06, 0.14)))


def _snare(rng: np.random.Generator) -> np.ndarray:
    samples = samples_in(0.22)
    rattle = band_noise(rng, samples, 800, log_uniform(rng, (3_000, 7_000))) * 0.4
    skin = harmonic_tone(np.full(samples, uniform(rng, (160, 260))), (1, 0.4)) * 0.5
    return (rattle + skin) * decay_curve(samples, uniform(rng, (0.04, 0.1)))


def _hat(rng: np.random.Generator) -> np.ndarray:
    samples = samples_in(0.1)
    return (
        0.25
        * band_noise(rng, samples, log_uniform(rng, (3_500, 6_000)), 7_800)
        * decay_curve(samples, uniform(rng, (0.015, 0.04)))
    )


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
