"""Environmental sounds: the functions that synthesise the classes of `sounds.yaml`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from whisper_aut.corpora.synth.signals import (
    HIGHEST_HZ,
    SAMPLE_RATE_HZ,
    Range,
    Rng,
    add_grains,
    arch,
    band_noise,
    caption,
    coloured_noise,
    count_word,
    decay,
    draw_graded,
    draw_length,
    draw_onsets,
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
    slow_curve,
    struck_body,
    uniform,
    unit_rms,
)
from whisper_aut.data.annotation import Annotation

Event = tuple[np.ndarray, Sequence[str]]  # a waveform, and phrases that describe it
PACE = ("slowly", "", "quickly")
PITCH = ("at a low pitch", "", "at a high pitch")
SIREN_CYCLES_HZ = (
    ("wailing up and down", (0.25, 0.7)),
    ("yelping rapidly", (2.5, 5)),
    ("alternating between two tones", (0.6, 1.5)),
)
BELL_PARTIALS = ((0.5, 0.4), (1, 1), (1.19, 0.6), (1.5, 0.3), (2, 0.6), (2.66, 0.35), (3.01, 0.2))


def strikes(
    rng: Rng,
    samples: int,
    *,
    rate: Range,
    surfaces: Mapping[str, Range],
    decay_seconds: Range,
    bodies: int = 1,
    group: tuple[int, int] | None = None,
    jitter: float = 0.03,
    counted: bool = False,
    scuff: float = 0.0,
) -> Event:
    """Blows on solid bodies. `surfaces` gives phrases and the range of the lowest resonance."""
    per_second, pace = draw_graded(rng, rate, PACE)
    onsets = draw_onsets(rng, samples, per_second, group, jitter=jitter)
    surface, low = pick(rng, list(surfaces.items()))
    low_hz, fall_seconds = log_uniform(rng, low), log_uniform(rng, decay_seconds)
    blows = [
        struck_body(rng, low_hz, low_hz * uniform(rng, (1.8, 5)), fall_seconds)
        for _ in range(bodies)
    ]
    grains = [blows[number % bodies] * from_db(rng.normal(0, 2)) for number, _ in enumerate(onsets)]
    waveform = add_grains(samples, onsets, grains)
    if scuff:
        loudness = scuff * uniform(rng, (0.3, 1)) * (4 if surface == "on gravel" else 1)
        length = samples_in(0.12)
        envelope = decay(length, 0.03, 0.015) * np.float32(loudness)
        rubs = [band_noise(rng, length, 500, 5_000) * envelope for _ in onsets]
        waveform += add_grains(samples, onsets + uniform(rng, (0.06, 0.14)), rubs)
    return waveform, (count_word(len(onsets)) if counted else pace, surface)


def calls(
    rng: Rng,
    samples: int,
    *,
    rate: Range,
    pitch_hz: Range,
    length: Range,
    shape: str = "arch",
    group: tuple[int, int] | None = None,
    jitter: float = 0.03,
    counted: bool = False,
    partials: int = 2,
    rolloff: Range = (2.5, 3.5),
    throat_hz: Range | None = None,
    glide_octaves: Range = (0, 0),
    bend_octaves: float = 0.0,
    pulses_hz: Range | None = None,
    noise: Range = (0, 0),
) -> Event:
    """Short tones: animals, beeps, drops. `length` is a fraction of the interval between them."""
    per_second, pace = draw_graded(rng, rate, PACE)
    base_hz, pitch = draw_graded(rng, pitch_hz, PITCH)
    onsets = draw_onsets(rng, samples, per_second, group, jitter=jitter)
    numbers = np.arange(1, partials + 1)
    amplitudes = numbers ** -uniform(rng, rolloff)
    throat = log_uniform(rng, throat_hz) if throat_hz else 0.0
    if throat:
        amplitudes = 0.05 + np.exp(-0.5 * (np.log2(numbers * base_hz / throat) / 0.8) ** 2)
    glide, fall = uniform(rng, glide_octaves), uniform(rng, (0.2, 0.4))
    grains = []
    for _ in onsets:
        size = samples_in(uniform(rng, length) / per_second)
        position = np.linspace(0, 1, size, dtype=np.float32)
        octaves = glide * position + bend_octaves * arch(size) + uniform(rng, (-0.1, 0.1))
        grain = harmonic_tone(base_hz * 2**octaves, amplitudes)
        if noise[1]:
            grain += band_noise(rng, size, throat * 0.6, throat * 2) * uniform(rng, noise)
        if pulses_hz:
            grain *= sine(uniform(rng, pulses_hz) / 2 * seconds_axis(size).astype(np.float64)) ** 2
        if shape == "arch":
            grain *= arch(size, 0.8, 0.7)
        elif shape == "decay":
            grain *= np.exp(-position / fall)
        grains.append(fade_out(grain, 0.004))
    waveform = add_grains(samples, onsets, grains)
    return waveform, (count_word(len(onsets)) if counted else pace, pitch)


def bell(rng: Rng, samples: int) -> Event:
    per_second, pace = draw_graded(rng, (0.6, 6), PACE)
    strike_hz, pitch = draw_graded(rng, (350, 1_400), PITCH)
    decay_seconds = log_uniform(rng, (0.3, 0.9))
    size = samples_in(min(2.0, 4 * decay_seconds))
    times, ring = seconds_axis(size).astype(np.float64), np.zeros(size, dtype=np.float32)
    for ratio, strength in BELL_PARTIALS:  # of a church bell: hum, strike, tierce, quint, …
        if strike_hz * ratio < HIGHEST_HZ:
            tone = sine(strike_hz * ratio * times + rng.random())
            strength *= uniform(rng, (0.6, 1.4))
            ring += np.float32(strength) * tone * decay(size, decay_seconds / ratio**0.5)
    onsets = draw_onsets(rng, samples, per_second)
    return add_grains(samples, onsets, [ring] * len(onsets)), (pace, pitch)


def glass(rng: Rng, samples: int) -> Event:
    seconds = samples / SAMPLE_RATE_HZ
    crashes = 1 + int(seconds > 2 and rng.random() < 0.4)
    low_hz, scatter_seconds = log_uniform(rng, (1_300, 2_600)), uniform(rng, (0.1, 0.45))
    onsets, shards = [], []
    for start in rng.uniform(0.02, max(0.1, seconds - 0.8), crashes):
        for delay in np.r_[0, 0, rng.exponential(scatter_seconds, int(rng.integers(8, 24)))]:
            shard = struck_body(rng, low_hz, low_hz * 3, log_uniform(rng, (0.04, 0.2)), modes=3)
            onsets.append(start + delay)
            shards.append(shard * np.float32(np.exp(-delay / 0.4) * uniform(rng, (0.3, 1))))
    return add_grains(samples, onsets, shards), (count_word(crashes) if crashes > 1 else "",)


def siren(rng: Rng, samples: int) -> Event:
    manner, cycles = pick(rng, SIREN_CYCLES_HZ)
    low_hz, pitch = draw_graded(rng, (400, 900), PITCH)
    times = seconds_axis(samples).astype(np.float64)
    swing = sine(log_uniform(rng, cycles) * times + rng.random())
    if manner.startswith("alternating"):
        swing = np.tanh(8 * swing)
    frequency_hz = low_hz * uniform(rng, (1.35, 2.4)) ** (0.5 + 0.5 * swing)
    tone = harmonic_tone(frequency_hz, np.arange(1, 8) ** -uniform(rng, (0.8, 2.2)))
    return tone, (manner, pitch)


def thunder(rng: Rng, samples: int) -> Event:
    near = rng.random() < 0.5
    times = seconds_axis(samples)
    times -= np.float32(uniform(rng, (0.02, 0.35)) * times[-1])  # since the strike
    since = np.maximum(times, 0)
    roll = np.where(times < 0, 0.05, np.exp(-since / np.float32(uniform(rng, (0.5, 2.0)))))
    rumble = coloured_noise(rng, samples, uniform(rng, (-9, -5)))
    crack = band_noise(rng, samples, 200, log_uniform(rng, (1_500, 6_000))) * (times > 0)
    crack *= np.exp(-since / 0.12) * (uniform(rng, (0.4, 1.2)) if near else 0.03)
    waveform = rumble * (0.25 + slow_curve(rng, samples, 4)) * roll + crack
    return waveform, (pick(rng, ("nearby", "close by") if near else ("far away", "far off")),)


def patter(
    rng: Rng,
    samples: int,
    *,
    rate: Range,
    bodies: Sequence[Range],
    noise_low: Range,
    noise_high: Range,
    noise_level: Range,
    waver: float,
    words: Sequence[str],
) -> Event:
    """Many small impacts at random times over noise: rain, fire."""
    per_second, pace = draw_graded(rng, rate, words)
    clicks = np.zeros(samples, dtype=np.float32)
    count = int(rng.poisson(per_second * samples / SAMPLE_RATE_HZ)) + 1
    strengths = rng.exponential(1.0, count) ** 1.5 * rng.choice((-1, 1), count)
    np.add.at(clicks, rng.integers(0, samples, count), strengths.astype(np.float32))
    drop = struck_body(rng, *pick(rng, bodies), decay_seconds=0.004)
    noise = band_noise(rng, samples, log_uniform(rng, noise_low), log_uniform(rng, noise_high))
    noise *= 1 + waver * (slow_curve(rng, samples, 3) - 0.5)
    waveform = unit_rms(np.convolve(clicks, drop)[:samples]) * uniform(rng, (0.5, 1.2))
    return waveform + noise * uniform(rng, noise_level), (pace,)


def wind(rng: Rng, samples: int) -> Event:
    gusts_per_second, pace = draw_graded(rng, (0.4, 1.6), ("slowly", "", "in quick gusts"))
    waveform, base_hz = np.zeros(samples, dtype=np.float32), log_uniform(rng, (120, 900))
    for octave in (0, 0.8, 1.7):  # neighbouring resonances that fade in and out
        centre_hz = base_hz * 2**octave
        gust = slow_curve(rng, samples, gusts_per_second) ** 1.5 * np.float32(2 ** (-octave / 2))
        waveform += band_noise(rng, samples, centre_hz * 0.8, centre_hz * 1.25) * gust
    return unit_rms(waveform) + 0.3 * coloured_noise(rng, samples, -5), (pace,)


def pulsed(
    rng: Rng,
    samples: int,
    *,
    rate: Range,
    low: Range,
    high: Range,
    sharpness: Range,
    words: Sequence[str] = PACE,
    places: Sequence[str] = ("",),
    tone_ratio: Range = (1, 1),
    tone_level: Range = (0, 0),
    partials: int = 3,
) -> Event:
    """Noise that swells periodically, with an optional tone: waves, rotors, engines."""
    pulses_hz, pace = draw_graded(rng, rate, words)
    drift = 1 + 0.15 * (slow_curve(rng, samples, 1) - 0.5)
    cycles = phase_of(pulses_hz * drift) + rng.random()
    pulse = (0.5 + 0.5 * sine(cycles)) ** np.float32(uniform(rng, sharpness))
    noise = band_noise(rng, samples, log_uniform(rng, low), log_uniform(rng, high))
    waveform = unit_rms(noise * (0.1 + pulse))
    level = uniform(rng, tone_level)
    if level:
        amplitudes = rng.uniform(0.3, 1, partials) / np.arange(1, partials + 1) ** 0.7
        tone = harmonic_tone(pulses_hz * log_uniform(rng, tone_ratio) * drift, amplitudes)
        waveform += unit_rms(tone) * level
    return waveform, (pick(rng, places), pace)


RENDERERS = {
    render.__name__: render
    for render in (strikes, calls, bell, glass, siren, thunder, patter, wind, pulsed)
}


@dataclass(frozen=True)
class SoundClass:
    """One entry of `sounds.yaml`, where the fields are explained."""

    clauses: tuple[str, ...]
    background: str
    render: str
    options: dict[str, Any] = field(default_factory=dict)

    def synthesise(self, rng: Rng, samples: int) -> Event:
        waveform, details = RENDERERS[self.render](rng, samples, **self.options)
        return unit_rms(waveform.astype(np.float32)), [phrase for phrase in details if phrase]


_TABLE = Path(__file__).with_name("sounds.yaml").read_text(encoding="utf-8")
SOUND_CLASSES = {label: SoundClass(**entry) for label, entry in yaml.safe_load(_TABLE).items()}
SOUND_LABELS = tuple(SOUND_CLASSES)
BACKGROUND_PROBABILITY = 0.25  # that another class is in the background
NOISE_NAMED_DB = 15  # captions name the noise below this signal-to-noise ratio


def render_sound(rng: Rng, index: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip. Its class is `index` modulo the classes, so every split is balanced."""
    label = SOUND_LABELS[index % len(SOUND_LABELS)]
    sound = SOUND_CLASSES[label]
    waveform, details = sound.synthesise(rng, draw_length(rng))
    background = ""
    if rng.random() < BACKGROUND_PROBABILITY:
        other = SOUND_CLASSES[pick(rng, [name for name in SOUND_LABELS if name != label])]
        quiet = other.synthesise(rng, len(waveform))[0] * from_db(uniform(rng, (-22, -12)))
        waveform = waveform + quiet
        background = other.background
    recording = record(rng, waveform, (6, 28), tilt_db=1.5)
    if not background and recording.signal_to_noise_db < NOISE_NAMED_DB:
        background = recording.noise
    if background:
        background = pick(rng, ("with {} in the background", "over {}")).format(background)
    text = caption(rng, pick(rng, sound.clauses), (*details, recording.room, background))
    extra = {
        "details": details,
        "room": recording.room,
        "signal_to_noise_db": round(recording.signal_to_noise_db, 1),
    }
    annotation = Annotation(text, domain="sound", task="caption", label=label, extra=extra)
    return recording.waveform, annotation
