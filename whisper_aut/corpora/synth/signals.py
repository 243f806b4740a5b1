"""Building blocks of every synthesised sound: noise of a given spectrum, tones, struck bodies, curves, events in time.

In: a NumPy generator and sizes in samples. Out: float32 waveforms `[S]` at 16 kHz. Next: `textures`, `calls`, `impacts`,
`instruments` and `room` build on them. No source but textbook signal synthesis (subtractive, additive, modal).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

SAMPLE_RATE_HZ = 16_000
HIGHEST_HZ = (
    0.475 * SAMPLE_RATE_HZ
)  # partials above are left out: they would alias or sit in the resampler's slope
Span = tuple[float, float]


def samples_in(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE_HZ)


def seconds_axis(samples: int) -> np.ndarray:
    """Return the time of each sample, `[S]`."""
    return np.arange(samples, dtype=np.float32) / np.float32(SAMPLE_RATE_HZ)


def uniform(rng: np.random.Generator, span: Span) -> float:
    return float(rng.uniform(*span))


def log_uniform(rng: np.random.Generator, span: Span) -> float:
    """Draw so that octaves, not hertz, are equally likely: how ears space pitch and rate."""
    return float(np.exp(rng.uniform(*np.log(span))))


def pick(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------------------------------- noise


def shaped_noise(
    rng: np.random.Generator, samples: int, gain: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return noise of unit RMS whose magnitude spectrum follows `gain(frequencies in Hz)`."""
    size = next_fast_len(samples, real=True)
    frequencies_hz = rfftfreq(size, 1 / SAMPLE_RATE_HZ).astype(np.float32)
    spectrum = rng.standard_normal(2 * len(frequencies_hz), dtype=np.float32).view(np.complex64)
    return unit_rms(
        np.asarray(irfft(spectrum * gain(frequencies_hz).astype(np.float32), size))[:samples]
    )


def coloured_noise(
    rng: np.random.Generator, samples: int, slope_db_per_octave: float
) -> np.ndarray:
    """Return noise with a straight spectrum on a log-frequency axis: 0 is white, -3 pink, -6 brown."""
    exponent = slope_db_per_octave / (20 * np.log10(2))
    return shaped_noise(rng, samples, lambda hz: np.maximum(hz, 40.0) ** exponent)


def band_noise(rng: np.random.Generator, samples: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return noise between two corners with gentle slopes outside (12 dB per octave)."""
    return shaped_noise(
        rng,
        samples,
        lambda hz: 1 / ((1 + (low_hz / np.maximum(hz, 1.0)) ** 2) * (1 + (hz / high_hz) ** 2)),
    )


def random_clicks(rng: np.random.Generator, samples: int, clicks_per_second: float) -> np.ndarray:
    """Return single-sample clicks at Poisson times, strongly uneven in strength, as drops and crackles are."""
    clicks = np.zeros(samples, dtype=np.float32)
    count = int(rng.poisson(clicks_per_second * samples / SAMPLE_RATE_HZ))
    strengths = rng.exponential(1.0, count) ** 1.5 * rng.choice((-1, 1), count)
    np.add.at(clicks, rng.integers(0, samples, count), strengths.astype(np.float32))
    return clicks


# ------------------------------------------------------------------------------------------------------------- curves


def slow_curve(rng: np.random.Generator, samples: int, changes_per_second: float) -> np.ndarray:
    """Return a smooth random curve between 0 and 1."""
    knots = max(2, int(samples / SAMPLE_RATE_HZ * changes_per_second) + 2)
    places = np.linspace(0, samples - 1, knots)
    straight = np.interp(np.arange(samples), places, rng.random(knots))
    return (straight * straight * (3 - 2 * straight)).astype(np.float32)


def decay_curve(samples: int, decay_seconds: float, attack_seconds: float = 0.002) -> np.ndarray:
    """Return a short rise and an exponential fall (to 1/e in `decay_seconds`), closed to zero at its end."""
    times = seconds_axis(samples)
    curve = np.exp(-times / np.float32(decay_seconds)) * np.minimum(
        1, times / np.float32(attack_seconds)
    )
    return faded(curve, edge_seconds=min(0.01, samples / SAMPLE_RATE_HZ / 4), start=False)


def faded(waveform: np.ndarray, edge_seconds: float, start: bool = True) -> np.ndarray:
    """Return the waveform with linear ramps at its end and, where asked, its start: no click at a cut."""
    edge = min(samples_in(edge_seconds), len(waveform) // 2)
    if not edge:
        return waveform
    ramp = np.linspace(0, 1, edge, dtype=np.float32)
    waveform = waveform.copy()
    waveform[-edge:] *= ramp[::-1]
    if start:
        waveform[:edge] *= ramp
    return waveform


def arch(samples: int, peak_power: float, lean: float = 1.0) -> np.ndarray:
    """Return half a sine, `[S]`, raised to a power; a `lean` below 1 moves its top towards the start."""
    place = np.linspace(0, 1, samples, dtype=np.float32)
    return np.sin(np.pi * place**lean).clip(0) ** np.float32(
        peak_power
    )  # the last sine is a hair below zero


# ------------------------------------------------------------------------------------------------------------- tones


def phase_of(frequency_hz: np.ndarray) -> np.ndarray:
    """Return the running phase in cycles, `[S]` float64, of a gliding frequency `[S]`."""
    return np.cumsum(frequency_hz, dtype=np.float64) / SAMPLE_RATE_HZ


def sine(cycles: np.ndarray) -> np.ndarray:
    """Return the float32 sine of a phase in cycles; the whole cycles go first, as float32 could not hold them."""
    return np.sin((2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32))


def harmonics(cycles: np.ndarray) -> Iterator[np.ndarray]:
    """Yield exp(2 pi i h phase), `[S]` complex64, for h = 1, 2, 3 …; a product each, where a sine would cost ten times that."""
    angle = (2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32)
    first = np.cos(angle) + np.complex64(1j) * np.sin(angle)
    turning = first.copy()
    while True:
        yield turning
        turning *= first


def harmonic_tone(frequency_hz: np.ndarray, amplitudes: Iterable[float]) -> np.ndarray:
    """Sum the harmonics 1, 2, 3 … of a gliding fundamental `[S]`, each as strong as given; none aliases."""
    top_hz = float(frequency_hz.max())
    tone = np.zeros(len(frequency_hz), dtype=np.float32)
    for number, (amplitude, turning) in enumerate(
        zip(amplitudes, harmonics(phase_of(frequency_hz)), strict=False), 1
    ):
        if number * top_hz > HIGHEST_HZ:
            break
        tone += np.float32(amplitude) * np.imag(turning)
    return tone


def struck_body(
    rng: np.random.Generator, low_hz: float, high_hz: float, decay_seconds: float, modes: int = 5
) -> np.ndarray:
    """Return one blow on something solid: a contact click and `modes` damped resonances; higher ones die sooner."""
    samples = samples_in(min(1.2, 6 * decay_seconds))
    times = seconds_axis(samples)
    blow = 0.3 * coloured_noise(rng, samples, -2.0) * decay_curve(samples, decay_seconds / 6)
    for frequency_hz in np.sort(rng.uniform(low_hz, high_hz, modes)):
        fall = decay_seconds * (low_hz / frequency_hz) ** 0.5
        strength, start = rng.uniform(0.3, 1.0), rng.uniform(0, 2 * np.pi)
        angle = np.float32(2 * np.pi * frequency_hz) * times + np.float32(start)
        blow += np.float32(strength) * np.sin(angle) * np.exp(-times / np.float32(fall))
    return faded(blow, 0.001)


# ------------------------------------------------------------------------------------------------------------- events in time


def lay(samples: int, onsets_seconds: Iterable[float], grains: Iterable[np.ndarray]) -> np.ndarray:
    """Add each grain at its onset into an empty clip; what reaches past the end is cut."""
    clip = np.zeros(samples, dtype=np.float32)
    for onset, grain in zip(onsets_seconds, grains, strict=True):
        start = samples_in(onset)
        if 0 <= start < samples:
            part = grain[: samples - start]
            clip[start : start + len(part)] += part
    return clip


def steady_onsets(
    rng: np.random.Generator, seconds: float, per_second: float, jitter: float
) -> np.ndarray:
    """Return onsets at a steady rate; `jitter` is the spread of each one as a share of the interval."""
    interval = 1 / per_second
    grid = np.arange(uniform(rng, (0.02, min(interval, seconds / 3))), seconds - 0.05, interval)
    return np.maximum(0, grid + rng.normal(0, 1, len(grid)) * jitter * interval)


def bouts(
    rng: np.random.Generator, seconds: float, per_bout: Span, per_second: float, pause: Span
) -> list[np.ndarray]:
    """Return groups of onsets: so many per bout, at a rate within it, with a pause between bouts."""
    groups, now = [], uniform(rng, (0.02, 0.25))
    while now < seconds - 0.15:
        count = int(rng.integers(int(per_bout[0]), int(per_bout[1]) + 1))
        group = (
            now + np.cumsum(np.r_[0, rng.normal(1, 0.06, count - 1).clip(0.7, 1.3)]) / per_second
        )
        groups.append(group[group < seconds - 0.1])
        now = float(group[-1]) + uniform(rng, pause)
    return groups


def unit_rms(waveform: np.ndarray) -> np.ndarray:
    """Return the waveform scaled to an RMS of 1; silence stays silence."""
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    return waveform / np.float32(rms) if rms > 0 else waveform


@dataclass(frozen=True)
class Room:
    """One kind of place.

    Attributes:
        words: ways to say it.
        reverberation_seconds: range of the time in which an echo falls by 60 dB.
        wet_db: range of the echo's level under the direct sound.
    """

    words: tuple[str, ...]
    reverberation_seconds: Span
    wet_db: Span


SMALL_ROOM = Room(
    ("in a small room", "indoors", "in a room"), reverberation_seconds=(0.2, 0.5), wet_db=(-14, -6)
)
LARGE_HALL = Room(
    ("in a large hall", "in a reverberant hall", "with a long echo", "in a big echoing space"),
    reverberation_seconds=(1.0, 2.2),
    wet_db=(-9, -2),
)
ROOMS = (SMALL_ROOM, LARGE_HALL)
BACKGROUNDS = (  # slope of the noise in dB per octave, ways to say it
    (0.0, ("white noise", "hiss", "static")),
    (-3.0, ("soft noise", "room noise")),
    (-6.0, ("low rumble", "a dull hum", "distant traffic")),
)


def placed(
    rng: np.random.Generator, waveform: np.ndarray, room: Room | None, tilt_db: float
) -> np.ndarray:
    """Return the waveform as a microphone in a room hears it, at unit RMS; the echo past the clip's end is cut.

    Args:
        room: none where the place is dry.
        tilt_db: bound of the random tilt of the microphone's response, per octave.
    """
    echo = impulse_response(rng, room) if room else np.zeros(1, dtype=np.float32)
    size = next_fast_len(len(waveform) + len(echo), real=True)
    spectrum = np.asarray(rfft(waveform.astype(np.float32), size))
    if room:
        spectrum *= 1 + np.asarray(rfft(echo, size))
    spectrum *= microphone_gain(rng, rfftfreq(size, 1 / SAMPLE_RATE_HZ).astype(np.float32), tilt_db)
    return unit_rms(np.asarray(irfft(spectrum, size))[: len(waveform)])


def impulse_response(rng: np.random.Generator, room: Room) -> np.ndarray:
    """Return what follows the direct sound: a noise that falls by 60 dB, with a few early echoes."""
    samples = samples_in(uniform(rng, room.reverberation_seconds))
    echo = coloured_noise(rng, samples, uniform(rng, (-5, -1))) * np.logspace(
        0, -3, samples, dtype=np.float32
    )
    for _ in range(4):
        echo[int(rng.integers(samples_in(0.004), samples_in(0.035)))] += rng.choice(
            (-1, 1)
        ) * uniform(rng, (2, 8))
    return echo * np.float32(10 ** (uniform(rng, room.wet_db) / 20) / np.sqrt(np.sum(echo**2)))


def microphone_gain(
    rng: np.random.Generator, frequencies_hz: np.ndarray, tilt_db: float
) -> np.ndarray:
    """Return a random response: a straight tilt about 1 kHz and one broad bump or dip."""
    octaves = np.log2(np.maximum(frequencies_hz, 50) / 1_000)
    bump = uniform(rng, (-3, 3)) * tilt_db * np.exp(-2 * (octaves - uniform(rng, (-2.5, 2.5))) ** 2)
    return (10 ** ((uniform(rng, (-tilt_db, tilt_db)) * octaves + bump) / 20)).astype(np.float32)


def draw_room(
    rng: np.random.Generator, rooms: tuple[Room, ...], dry_share: float
) -> tuple[Room | None, str]:
    """Draw a room, or none, and the words for it."""
    if rng.random() < dry_share:
        return None, ""
    room = pick(rng, rooms)
    return room, pick(rng, room.words)


def with_background(
    rng: np.random.Generator, waveform: np.ndarray, ratio_db: float
) -> tuple[np.ndarray, str]:
    """Add wavering noise of a random colour so many decibels under the signal; return the noise's name as well."""
    slope, names = pick(rng, BACKGROUNDS)
    noise = coloured_noise(rng, len(waveform), slope + uniform(rng, (-1.5, 1.5)))
    waver = 1 + uniform(rng, (0, 0.4)) * np.sin(
        2 * np.pi * uniform(rng, (0.1, 0.8)) * seconds_axis(len(waveform))
    )
    return unit_rms(waveform) + noise * waver.astype(np.float32) * np.float32(
        10 ** (-ratio_db / 20)
    ), pick(rng, names)


def at_level(waveform: np.ndarray, peak_db: float) -> np.ndarray:
    """Return the waveform with its peak at `peak_db` relative to full scale."""
    peak = float(np.abs(waveform).max())
    return (waveform * np.float32(10 ** (peak_db / 20) / max(peak, 1e-9))).astype(np.float32)


MAX_WORDS = 16
COUNTS = ("", "once", "twice", "three times", "four times", "five times")


def graded(value: float, low: float, high: float, words: Sequence[str]) -> str:
    """Return the first word under `low`, the last above `high`, the middle one (often empty) between."""
    return words[0] if value < low else words[-1] if value > high else words[1]


def times_word(count: int) -> str:
    """Return `twice`, `three times` …, or `repeatedly` where nobody would count."""
    return COUNTS[count] if 0 < count < len(COUNTS) else "repeatedly"


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def composed(
    rng: np.random.Generator, essential: str, optional: Sequence[str], keep: float = 0.8
) -> str:
    """Return the essential words and, in order, each optional phrase that chance (`keep`) and `MAX_WORDS` leave in."""
    phrases, words = [essential], len(essential.split())
    for phrase in optional:
        if phrase and rng.random() < keep and words + len(phrase.split()) <= MAX_WORDS:
            phrases.append(phrase)
            words += len(phrase.split())
    return " ".join(phrases)


def backdrop(rng: np.random.Generator, name: str) -> str:
    """Return a phrase for something heard behind the main sound."""
    return pick(
        rng, ("with {} in the background", "over {}", "with {} behind it", "against {}")
    ).format(name)


@dataclass(frozen=True)
class Event:
    """A rendered sound, waveform `[S]`, and the phrases for its attributes, the most telling first."""

    waveform: np.ndarray
    details: tuple[str, ...] = ()


Render = Callable[[np.random.Generator, int], Event]


@dataclass(frozen=True)
class SoundClass:
    """One class of environmental sound.

    Attributes:
        label: the probe's class.
        clauses: ways to say that it sounds; the details follow them.
        backdrop: how it is named behind another sound.
        render: makes it, for a number of samples.
    """

    label: str
    clauses: tuple[str, ...]
    backdrop: str
    render: Render


SOUND_CLASSES: dict[str, SoundClass] = {}


def sound_class(label: str, *clauses: str, backdrop: str) -> Callable[[Render], Render]:
    """Register the decorated function as the renderer of a class."""

    def register(render: Render) -> Render:
        SOUND_CLASSES[label] = SoundClass(label, clauses, backdrop, render)
        return render

    return register
