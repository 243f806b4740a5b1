"""A drum kit: kick, snare, hi-hat, and the patterns that they play.

In: a generator, a length and a tempo. Out: a drum track `[S]` and the pattern's name. Next: `music`, as a class of its own and
under other instruments.
"""

import numpy as np

from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    band_noise,
    decay_curve,
    harmonic_tone,
    lay,
    log_uniform,
    pick,
    samples_in,
    seconds_axis,
    uniform,
)

PATTERNS = {  # one bar in sixteenths: kick, snare, hi-hat
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
    style = pick(rng, list(PATTERNS))
    sixteenth_seconds = 15 / beats_per_minute
    steps = int(np.ceil(samples / SAMPLE_RATE_HZ / sixteenth_seconds))
    track = np.zeros(samples, dtype=np.float32)
    for pattern, stroke in zip(PATTERNS[style], (_kick(rng), _snare(rng), _hat(rng)), strict=True):
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
