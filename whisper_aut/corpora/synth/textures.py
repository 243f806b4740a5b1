"""Sounds that go on: weather, water, fire and machines.

In: a generator and a length. Out: an `Event` each. Next: `sound`, through the table in `catalogue`. Their long-term spectra
overlap on purpose; what sets them apart is how they move: gusts, swells, drops, blades, cylinders.
"""

import numpy as np

from whisper_aut.corpora.synth.captions import graded
from whisper_aut.corpora.synth.catalogue import Event, sound_class
from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    band_noise,
    coloured_noise,
    harmonic_tone,
    lay,
    log_uniform,
    phase_of,
    pick,
    random_clicks,
    samples_in,
    seconds_axis,
    slow_curve,
    struck_body,
    uniform,
    unit_rms,
)


@sound_class(
    "rain", "rain falls", "rain is falling", "it rains", "raindrops patter", backdrop="rain"
)
def rain(rng: np.random.Generator, samples: int) -> Event:
    drops_per_second = log_uniform(rng, (60, 900))
    drop = struck_body(
        rng, *pick(rng, ((400, 2_500), (900, 4_500), (1_800, 6_500))), decay_seconds=0.004, modes=4
    )
    drops = np.convolve(random_clicks(rng, samples, drops_per_second), drop[: samples_in(0.02)])[
        :samples
    ]
    hiss = band_noise(
        rng, samples, log_uniform(rng, (200, 1_500)), log_uniform(rng, (2_000, 7_000))
    )
    waveform = unit_rms(drops) * uniform(rng, (0.3, 1.2)) + hiss * uniform(rng, (0.4, 1.2))
    return Event(
        waveform, (graded(drops_per_second, 150, 450, ("lightly", "steadily", "heavily")),)
    )


@sound_class(
    "wind", "wind blows", "the wind is blowing", "wind howls", "gusts of wind blow", backdrop="wind"
)
def wind(rng: np.random.Generator, samples: int) -> Event:
    gusts_per_second = log_uniform(rng, (0.4, 1.6))
    waveform = np.zeros(samples, dtype=np.float32)
    base_hz = log_uniform(rng, (120, 900))
    for octave in (0, 0.8, 1.7):  # a resonance that wanders, as cross-faded neighbours
        centre_hz = base_hz * 2**octave
        gust = slow_curve(rng, samples, gusts_per_second) ** 1.5
        waveform += (
            band_noise(rng, samples, centre_hz * 0.8, centre_hz * 1.25)
            * gust
            * np.float32(2 ** (-octave / 2))
        )
    waveform = unit_rms(waveform) + 0.3 * coloured_noise(rng, samples, -5)
    return Event(waveform, (graded(gusts_per_second, 0.6, 1.1, ("slowly", "", "in quick gusts")),))


@sound_class(
    "waves", "waves roll in", "waves break on a shore", "the sea washes ashore", backdrop="waves"
)
def waves(rng: np.random.Generator, samples: int) -> Event:
    period_seconds = uniform(rng, (1.6, 5.0))
    place = (phase_of(np.full(samples, 1 / period_seconds)) + rng.random()) % 1
    swell = (0.08 + place ** uniform(rng, (0.6, 1.4)) * (1 - place) ** 0.5 * 2).astype(np.float32)
    body = (
        band_noise(rng, samples, log_uniform(rng, (150, 500)), log_uniform(rng, (700, 2_500)))
        * swell
    )
    foam = band_noise(rng, samples, 1_500, log_uniform(rng, (3_000, 7_000))) * swell**2
    waveform = body + foam * uniform(rng, (0.2, 1.0))
    return Event(
        waveform, (graded(period_seconds, 2.5, 3.8, ("in quick succession", "", "slowly")),)
    )


@sound_class(
    "fire",
    "a fire crackles",
    "fire is burning",
    "flames crackle",
    "wood burns",
    backdrop="a crackling fire",
)
def fire(rng: np.random.Generator, samples: int) -> Event:
    crackles_per_second = log_uniform(rng, (5, 50))
    snap = struck_body(
        rng, *pick(rng, ((500, 3_000), (1_000, 5_000), (2_000, 7_000))), decay_seconds=0.003
    )
    crackle = np.convolve(
        random_clicks(rng, samples, crackles_per_second), snap[: samples_in(0.015)]
    )[:samples]
    roar = band_noise(rng, samples, 60, log_uniform(rng, (300, 1_500))) * (
        0.6 + 0.6 * slow_curve(rng, samples, 3)
    )
    hiss = band_noise(rng, samples, 1_000, 6_000) * uniform(rng, (0.05, 0.4))
    waveform = unit_rms(crackle) + roar * uniform(rng, (0.2, 1.0)) + hiss
    return Event(waveform, (graded(crackles_per_second, 10, 28, ("softly", "", "fiercely")),))


@sound_class("thunder", "thunder rumbles", "thunder rolls", "a storm thunders", backdrop="thunder")
def thunder(rng: np.random.Generator, samples: int) -> Event:
    seconds = samples / SAMPLE_RATE_HZ
    rumble = coloured_noise(rng, samples, uniform(rng, (-9, -5))) * (
        0.25 + slow_curve(rng, samples, 4)
    )
    onset = uniform(rng, (0.02, 0.35)) * seconds
    since = seconds_axis(samples) - np.float32(onset)
    roll = np.where(
        since < 0, 0.05, np.exp(-np.maximum(since, 0) / np.float32(uniform(rng, (0.5, 2.0))))
    ).astype(np.float32)
    near = rng.random() < 0.5
    crack = (
        band_noise(rng, samples, 200, log_uniform(rng, (1_500, 6_000)))
        * (since > 0)
        * np.exp(-np.maximum(since, 0) / 0.12)
    )
    waveform = rumble * roll + crack.astype(np.float32) * np.float32(
        uniform(rng, (0.4, 1.2)) if near else 0.03
    )
    return Event(
        waveform,
        (
            pick(rng, ("nearby", "with a sharp crack"))
            if near
            else pick(rng, ("far away", "in the distance")),
        ),
    )


@sound_class(
    "helicopter",
    "a helicopter flies",
    "a helicopter hovers",
    "helicopter blades beat",
    backdrop="a helicopter",
)
def helicopter(rng: np.random.Generator, samples: int) -> Event:
    blades_hz = log_uniform(rng, (9, 20))
    drift = 1 + 0.06 * (slow_curve(rng, samples, 0.5) - 0.5)
    beat = (0.5 + 0.5 * np.cos(2 * np.pi * phase_of(blades_hz * drift))).astype(
        np.float32
    ) ** np.float32(uniform(rng, (2, 6)))
    chop = band_noise(rng, samples, log_uniform(rng, (60, 200)), log_uniform(rng, (500, 2_500))) * (
        0.15 + beat
    )
    turbine_hz = log_uniform(rng, (500, 2_500))
    whine = harmonic_tone(turbine_hz * drift, (1, 0.3, 0.2)) * uniform(rng, (0.0, 0.25))
    waveform = chop * (0.5 + slow_curve(rng, samples, 0.4)) + whine
    return Event(
        waveform,
        (
            pick(rng, ("overhead", "past", "nearby")),
            graded(blades_hz, 11, 16, ("slowly", "", "fast")),
        ),
    )


@sound_class(
    "engine",
    "an engine runs",
    "an engine is idling",
    "a motor runs",
    "a truck engine idles",
    backdrop="an engine",
)
def engine(rng: np.random.Generator, samples: int) -> Event:
    idle_hz = log_uniform(rng, (18, 55))
    revving = rng.random() < 0.3
    swing = slow_curve(rng, samples, 1.2) * 0.9 if revving else 0.05 * slow_curve(rng, samples, 2)
    frequency_hz = idle_hz * (1 + swing) * (1 + 0.01 * rng.standard_normal(samples))
    harmonics = rng.uniform(0.3, 1.0, 36) * np.arange(1, 37) ** -uniform(rng, (0.4, 1.1))
    cylinders = harmonic_tone(frequency_hz, harmonics)
    firing = (0.5 + 0.5 * np.cos(2 * np.pi * phase_of(frequency_hz))).astype(np.float32) ** 3
    exhaust = band_noise(rng, samples, 80, log_uniform(rng, (500, 3_000))) * (0.2 + firing)
    waveform = unit_rms(cylinders) + exhaust * uniform(rng, (0.4, 1.5))
    pitch = graded(idle_hz, 26, 40, ("with a deep sound", "", "with a high sound"))
    return Event(waveform, ("revving up and down" if revving else "steadily", pitch))


@sound_class(
    "water drops",
    "water drips",
    "water is dripping",
    "drops of water fall",
    "a tap drips",
    backdrop="dripping water",
)
def water_drops(rng: np.random.Generator, samples: int) -> Event:
    drops_per_second = log_uniform(rng, (0.8, 6))
    seconds = samples / SAMPLE_RATE_HZ
    onsets = np.cumsum(
        np.r_[
            0.05, rng.exponential(1 / drops_per_second, max(2, int(2 * seconds * drops_per_second)))
        ]
    )
    base_hz = log_uniform(rng, (450, 1_800))
    grains = []
    for _ in onsets:  # a bubble rings higher as it closes
        length = samples_in(uniform(rng, (0.06, 0.2)))
        since = seconds_axis(length)
        frequency_hz = (
            base_hz * uniform(rng, (0.8, 1.3)) * (1 + since * np.float32(uniform(rng, (1, 9))))
        )
        fall = np.exp(-since / np.float32(uniform(rng, (0.015, 0.05))))
        grains.append(
            harmonic_tone(frequency_hz, (1, 0.1)) * fall * np.float32(uniform(rng, (0.3, 1)))
        )
    return Event(
        lay(samples, onsets, grains),
        (graded(drops_per_second, 1.6, 3.5, ("slowly", "", "quickly")),),
    )
