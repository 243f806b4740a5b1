"""Building blocks of every synthesised sound: noise of a given spectrum, tones, struck bodies, curves, events in time.

In: a NumPy generator and sizes in samples. Out: float32 waveforms `[S]` at 16 kHz. Next: `textures`, `calls`, `impacts`,
`instruments` and `room` build on them. No source but textbook signal synthesis (subtractive, additive, modal).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy.fft import irfft, next_fast_len, rfftfreq

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
