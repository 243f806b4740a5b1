"""What stands between a source and the microphone: walls, a tilted frequency response, background noise, level.

In: a clean waveform `[S]` at 16 kHz. Out: the staged one, of the same length, and the words for it. Next: `speech`, `sound`
and `music` put the words in captions. The impulse response is decaying noise with a few early echoes (Moorer, "About this
reverberation business", 1979).
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq

from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    Span,
    coloured_noise,
    pick,
    samples_in,
    seconds_axis,
    uniform,
    unit_rms,
)


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
