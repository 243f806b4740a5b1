"""Building blocks of the synthetic clips: noise, tones, onsets, recordings and captions.

Waveforms are float32 `[S]` at 16 kHz. Ranges to draw from are `(low, high)`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

SAMPLE_RATE_HZ = 16_000
HIGHEST_HZ = 0.475 * SAMPLE_RATE_HZ  # partials above would alias
MAX_CAPTION_WORDS = 16
COUNTS = ("", "once", "twice", "three times", "four times", "five times")
Range = tuple[float, float]
Rng = np.random.Generator


def samples_in(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE_HZ)


def seconds_axis(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.float32) / np.float32(SAMPLE_RATE_HZ)


def from_db(decibels: float) -> np.float32:
    return np.float32(10 ** (decibels / 20))


def uniform(rng: Rng, span: Range) -> float:
    return float(rng.uniform(*span))


def log_uniform(rng: Rng, span: Range) -> float:
    return float(np.exp(rng.uniform(*np.log(span))))


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def draw_graded(rng: Rng, span: Range, words: Sequence[str]) -> tuple[float, str]:
    """Draw log-uniformly; also return the word for the low, middle or high third of the range."""
    position = rng.random()
    return span[0] * (span[1] / span[0]) ** position, words[int(3 * position)]


def draw_length(rng: Rng) -> int:
    """Draw the number of samples of a clip: most last two to five seconds, a few up to twelve."""
    return samples_in(float(np.clip(2.7 * np.exp(0.4 * rng.standard_normal()), 1.2, 12.0)))


# Noise and envelopes


def shaped_noise(rng: Rng, samples: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return noise of unit RMS whose magnitude spectrum is `gain(frequencies_hz)`."""
    size = next_fast_len(samples, real=True)
    frequencies_hz = rfftfreq(size, 1 / SAMPLE_RATE_HZ).astype(np.float32)
    spectrum = rng.standard_normal(2 * len(frequencies_hz), dtype=np.float32).view(np.complex64)
    shaped = irfft(spectrum * gain(frequencies_hz).astype(np.float32), size)
    return unit_rms(np.asarray(shaped)[:samples])


def coloured_noise(rng: Rng, samples: int, db_per_octave: float) -> np.ndarray:
    """Return noise with a straight spectrum in dB over octaves: 0 is white, -3 pink, -6 brown."""
    exponent = db_per_octave / (20 * np.log10(2))
    return shaped_noise(rng, samples, lambda hz: np.maximum(hz, 40.0) ** exponent)


def band_noise(rng: Rng, samples: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return noise between two corners, with slopes of 12 dB per octave outside."""

    def gain(hz: np.ndarray) -> np.ndarray:
        return 1 / ((1 + (low_hz / np.maximum(hz, 1.0)) ** 2) * (1 + (hz / high_hz) ** 2))

    return shaped_noise(rng, samples, gain)


def slow_curve(rng: Rng, samples: int, changes_per_second: float) -> np.ndarray:
    """Return a smooth random curve between 0 and 1."""
    knots = max(2, int(samples / SAMPLE_RATE_HZ * changes_per_second) + 2)
    line = np.interp(
        np.arange(samples), np.linspace(0, samples - 1, knots), rng.random(knots)
    ).astype(np.float32)
    return line * line * (3 - 2 * line)


def decay(samples: int, seconds: float, attack_seconds: float = 0.002) -> np.ndarray:
    """Return a linear attack and an exponential decay to 1/e in `seconds`."""
    times = seconds_axis(samples)
    return np.exp(-times / np.float32(seconds)) * np.minimum(1, times / np.float32(attack_seconds))


def arch(samples: int, power: float = 1.0, lean: float = 1.0) -> np.ndarray:
    """Return half a sine, raised to a power; a `lean` below 1 moves its peak to the start."""
    position = np.linspace(0, 1, samples, dtype=np.float32)
    return np.sin(np.pi * position**lean).clip(0) ** np.float32(power)


def fade_out(waveform: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    edge = min(samples_in(seconds), len(waveform))
    ramp = np.linspace(1, 0, edge, dtype=np.float32)
    return np.concatenate(
        [waveform[: len(waveform) - edge], waveform[len(waveform) - edge :] * ramp]
    )


def unit_rms(waveform: np.ndarray) -> np.ndarray:
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    return waveform / np.float32(rms) if rms > 0 else waveform


# Tones


def phase_of(frequency_hz: np.ndarray) -> np.ndarray:
    """Return the phase of a varying frequency `[S]`, in cycles, float64."""
    return np.cumsum(frequency_hz, dtype=np.float64) / SAMPLE_RATE_HZ


def sine(cycles: np.ndarray) -> np.ndarray:
    """Return the sine of a phase in cycles. Whole cycles are dropped to keep float32 exact."""
    return np.sin((2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32))


def harmonic_tone(frequency_hz: np.ndarray, amplitudes: Iterable[float]) -> np.ndarray:
    """Sum the harmonics 1, 2, 3, … of a varying fundamental `[S]`, without aliases."""
    cycles, top_hz = phase_of(frequency_hz), float(frequency_hz.max())
    first = sine(cycles + 0.25) + np.complex64(1j) * sine(cycles)
    rotating, tone = np.ones_like(first), np.zeros(len(frequency_hz), dtype=np.float32)
    for number, amplitude in enumerate(amplitudes, 1):
        if number * top_hz > HIGHEST_HZ:
            break
        rotating = rotating * first  # much faster than one sine per harmonic
        tone += np.float32(amplitude) * rotating.imag
    return tone


def struck_body(
    rng: Rng, low_hz: float, high_hz: float, decay_seconds: float, modes: int = 5
) -> np.ndarray:
    """Return one blow on a solid body: a click and damped resonances; high ones decay sooner."""
    samples = samples_in(min(1.2, 6 * decay_seconds))
    times = seconds_axis(samples)
    blow = 0.3 * coloured_noise(rng, samples, -2.0) * decay(samples, decay_seconds / 6)
    for frequency_hz in np.sort(rng.uniform(low_hz, high_hz, modes)):
        mode_seconds = decay_seconds * (low_hz / frequency_hz) ** 0.5
        tone = sine(frequency_hz * times.astype(np.float64) + rng.random())
        blow += np.float32(rng.uniform(0.3, 1.0)) * tone * decay(samples, mode_seconds, 0.0005)
    return fade_out(blow, 0.001)


# Onsets


def add_grains(
    samples: int, onsets_seconds: Iterable[float], grains: Iterable[np.ndarray]
) -> np.ndarray:
    """Add each grain at its onset to an empty clip. What exceeds the clip is cut."""
    clip = np.zeros(samples, dtype=np.float32)
    for onset, grain in zip(onsets_seconds, grains, strict=True):
        start = samples_in(onset)
        if 0 <= start < samples:
            part = grain[: samples - start]
            clip[start : start + len(part)] += part
    return clip


def draw_onsets(
    rng: Rng,
    samples: int,
    per_second: float,
    group: tuple[int, int] | None = None,
    pause_seconds: Range = (0.4, 1.5),
    jitter: float = 0.03,
) -> np.ndarray:
    """Return onsets in seconds: at a steady rate, or in groups with pauses between them.

    `jitter` is the standard deviation of an onset as a fraction of the interval.
    """
    seconds, interval = samples / SAMPLE_RATE_HZ, 1 / per_second
    onsets, now = [], uniform(rng, (0.02, min(0.25, interval)))
    while now < seconds - 0.1 or not onsets:
        count = int(rng.integers(group[0], group[1] + 1)) if group else 1
        onsets += [now + number * interval for number in range(count)]
        now = onsets[-1] + (uniform(rng, pause_seconds) if group else interval)
    jittered = np.array(onsets) + rng.normal(0, jitter * interval, len(onsets))
    return np.maximum(0, jittered[np.array(onsets) < seconds - 0.1])


# Recordings


@dataclass(frozen=True)
class Room:
    """A kind of room: phrases for it, reverberation time (-60 dB), level of the echo."""

    phrases: tuple[str, ...]
    reverberation_seconds: Range
    echo_db: Range


SMALL_ROOM = Room(("in a small room", "indoors", "in a room"), (0.2, 0.5), (-14, -6))
LARGE_HALL = Room(
    ("in a large hall", "in a reverberant hall", "with a long echo"), (1.0, 2.2), (-9, -2)
)
BACKGROUNDS = (  # slope in dB per octave, and names
    (0.0, ("white noise", "hiss", "static")),
    (-3.0, ("soft noise", "room noise")),
    (-6.0, ("low rumble", "a dull hum", "distant traffic")),
)


@dataclass(frozen=True)
class Recording:
    """A finished waveform, the phrase for its room ("" if dry) and the name of its noise."""

    waveform: np.ndarray
    room: str
    noise: str
    signal_to_noise_db: float


def record(
    rng: Rng,
    waveform: np.ndarray,
    signal_to_noise_db: Range,
    *,
    rooms: Sequence[Room] = (SMALL_ROOM, LARGE_HALL),
    dry_probability: float = 0.6,
    tilt_db: float = 1.0,
    peak_db: Range = (-15, -2),
) -> Recording:
    """Record a sound: room, microphone, background noise and level.

    `tilt_db` bounds the random tilt of the microphone's response, per octave.
    """
    room = None if rng.random() < dry_probability else pick(rng, rooms)
    filtered = filter_recording(rng, waveform, room, tilt_db)
    ratio_db = uniform(rng, signal_to_noise_db)
    slope, names = pick(rng, BACKGROUNDS)
    noise = coloured_noise(rng, len(filtered), slope + uniform(rng, (-1.5, 1.5)))
    wavering = noise * (0.8 + 0.4 * slow_curve(rng, len(filtered), uniform(rng, (0.1, 1.5))))
    mixed = filtered + wavering * from_db(-ratio_db)
    level = from_db(uniform(rng, peak_db)) / max(np.abs(mixed).max(), np.float32(1e-9))
    phrase = pick(rng, room.phrases) if room else ""
    return Recording((mixed * level).astype(np.float32), phrase, pick(rng, names), ratio_db)


def filter_recording(
    rng: Rng, waveform: np.ndarray, room: Room | None, tilt_db: float
) -> np.ndarray:
    """Return what a microphone in a room (None: no echo) picks up, at unit RMS."""
    echo = np.zeros(1, dtype=np.float32)
    if room:
        samples = samples_in(uniform(rng, room.reverberation_seconds))
        falling = np.logspace(0, -3, samples, dtype=np.float32)
        echo = coloured_noise(rng, samples, uniform(rng, (-5, -1))) * falling
        for delay in rng.integers(samples_in(0.004), samples_in(0.035), 4):  # early echoes
            echo[delay] += pick(rng, (-1, 1)) * uniform(rng, (2, 8))
        echo *= from_db(uniform(rng, room.echo_db)) / np.sqrt(np.sum(echo**2))
    size = next_fast_len(len(waveform) + len(echo), real=True)
    octaves = np.log2(np.maximum(rfftfreq(size, 1 / SAMPLE_RATE_HZ), 50) / 1_000)
    bump = np.exp(-2 * (octaves - uniform(rng, (-2.5, 2.5))) ** 2)
    response_db = tilt_db * (uniform(rng, (-1, 1)) * octaves + uniform(rng, (-3, 3)) * bump)
    spectrum = np.asarray(rfft(waveform.astype(np.float32), size))
    spectrum = spectrum * (1 + np.asarray(rfft(echo, size))) * 10 ** (response_db / 20)
    return unit_rms(np.asarray(irfft(spectrum, size))[: len(waveform)].astype(np.float32))


# Captions


def count_word(count: int) -> str:
    return COUNTS[count] if 0 < count < len(COUNTS) else "repeatedly"


def caption(rng: Rng, essential: str, optional: Iterable[str], keep: float = 0.8) -> str:
    """Append each optional phrase with probability `keep`, up to `MAX_CAPTION_WORDS`."""
    text = essential
    for phrase in optional:
        longer = f"{text} {phrase}"
        if phrase and rng.random() < keep and len(longer.split()) <= MAX_CAPTION_WORDS:
            text = longer
    return text
