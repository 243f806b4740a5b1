"""Sounds with a voice: animals and signals, made of tones that glide, trill, wail and beep.

In: a generator and a length. Out: an `Event` each. Next: `sound`, through the table in `catalogue`. Siren, alarm, birds and
crickets share registers and loudness; the shape of their pitch in time tells them apart.
"""

import numpy as np

from whisper_aut.corpora.synth.captions import graded, times_word
from whisper_aut.corpora.synth.catalogue import Event, sound_class
from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    arch,
    band_noise,
    bouts,
    faded,
    harmonic_tone,
    lay,
    log_uniform,
    phase_of,
    pick,
    samples_in,
    seconds_axis,
    uniform,
)


@sound_class(
    "dog",
    "a dog barks",
    "a dog is barking",
    "the barking of a dog is heard",
    backdrop="a barking dog",
)
def dog(rng: np.random.Generator, samples: int) -> Event:
    base_hz = log_uniform(rng, (220, 600))
    groups = bouts(rng, samples / SAMPLE_RATE_HZ, (1, 4), uniform(rng, (2, 4.5)), (0.3, 1.5))
    onsets = np.concatenate(groups)
    throat = log_uniform(rng, (700, 1_800))
    grains = [_bark(rng, base_hz, throat) for _ in onsets]
    pitch = graded(base_hz, 300, 440, ("with a deep voice", "", "with a high voice"))
    return Event(lay(samples, onsets, grains), (times_word(len(onsets)), pitch))


def _bark(rng: np.random.Generator, base_hz: float, throat_hz: float) -> np.ndarray:
    length = samples_in(uniform(rng, (0.09, 0.24)))
    frequency_hz = base_hz * uniform(rng, (0.9, 1.1)) * (0.75 + 0.6 * arch(length, 1, lean=0.7))
    numbers = np.arange(1, 25)
    formant = np.exp(-0.5 * (np.log2(numbers * base_hz / throat_hz) / 0.8) ** 2) + 0.05
    rough = band_noise(rng, length, throat_hz * 0.6, throat_hz * 2) * uniform(rng, (0.2, 0.7))
    return (harmonic_tone(frequency_hz, formant) + rough) * arch(length, 1.5, lean=0.5)


@sound_class(
    "birds",
    "a bird chirps",
    "birds are singing",
    "a bird sings",
    "birds chirp",
    backdrop="birdsong",
)
def birds(rng: np.random.Generator, samples: int) -> Event:
    base_hz, rate = log_uniform(rng, (2_000, 4_500)), log_uniform(rng, (3, 11))
    groups = bouts(rng, samples / SAMPLE_RATE_HZ, (2, 7), rate, (0.25, 1.1))
    onsets, grains = np.concatenate(groups), []
    sweep, trill_hz = uniform(rng, (-0.5, 0.5)), uniform(rng, (15, 60)) * (rng.random() < 0.5)
    for _ in onsets:  # one song repeats one syllable with small changes
        length = samples_in(uniform(rng, (0.45, 0.85)) / rate)
        place = np.linspace(0, 1, length, dtype=np.float32)
        trill = 1 + 0.06 * np.sin(2 * np.pi * trill_hz * seconds_axis(length))
        frequency_hz = (
            base_hz
            * uniform(rng, (0.85, 1.2))
            * 2 ** (sweep * place + 0.2 * arch(length, 1))
            * trill
        )
        grains.append(harmonic_tone(frequency_hz, (1, 0.15)) * arch(length, 0.7))
    pitch = graded(base_hz, 2_600, 3_500, ("in a low register", "", "in a high register"))
    return Event(
        lay(samples, onsets, grains), (graded(rate, 4.5, 8, ("slowly", "", "rapidly")), pitch)
    )


@sound_class(
    "crickets", "crickets chirp", "a cricket chirps", "crickets are chirping", backdrop="crickets"
)
def crickets(rng: np.random.Generator, samples: int) -> Event:
    waveform = np.zeros(samples, dtype=np.float32)
    singers, carrier_hz = int(rng.integers(1, 4)), log_uniform(rng, (2_800, 5_200))
    chirps_hz = log_uniform(rng, (1.2, 5))
    for _ in range(singers):
        pulses = np.sin(np.pi * phase_of(np.full(samples, uniform(rng, (25, 55))))) ** 2
        phase = phase_of(np.full(samples, chirps_hz * uniform(rng, (0.9, 1.1)))) + rng.random()
        chirp = np.clip((uniform(rng, (0.3, 0.7)) - phase % 1) * 20, 0, 1)
        tone = harmonic_tone(np.full(samples, carrier_hz * uniform(rng, (0.9, 1.1))), (1, 0.08))
        waveform += tone * (pulses * chirp).astype(np.float32) * np.float32(uniform(rng, (0.3, 1)))
    pace = graded(chirps_hz, 2, 3.5, ("slowly", "", "rapidly"))
    return Event(waveform, (pace, "at night" if singers > 1 else ""))


@sound_class(
    "siren", "a siren sounds", "a siren wails", "an emergency siren is heard", backdrop="a siren"
)
def siren(rng: np.random.Generator, samples: int) -> Event:
    low_hz = log_uniform(rng, (400, 900))
    high_hz = low_hz * uniform(rng, (1.35, 2.4))
    kind = pick(rng, ("wailing up and down", "yelping rapidly", "alternating between two tones"))
    cycles_hz = log_uniform(
        rng, {"wail": (0.25, 0.7), "yelp": (2.5, 5), "alte": (0.6, 1.5)}[kind[:4]]
    )
    swing = np.sin(2 * np.pi * (phase_of(np.full(samples, cycles_hz)) + rng.random()))
    place = 0.5 + 0.5 * (np.tanh(8 * swing) if kind.startswith("alte") else swing)
    frequency_hz = low_hz * (high_hz / low_hz) ** place
    waveform = harmonic_tone(frequency_hz, np.arange(1, 8) ** -uniform(rng, (0.8, 2.2)))
    approach = np.linspace(
        uniform(rng, (0.3, 1)), uniform(rng, (0.3, 1)), samples, dtype=np.float32
    )
    pitch = graded(low_hz, 520, 700, ("at a low pitch", "", "at a high pitch"))
    return Event(waveform * approach, (kind, pitch))


@sound_class(
    "alarm",
    "an alarm beeps",
    "an alarm clock beeps",
    "a beeping alarm sounds",
    backdrop="a beeping alarm",
)
def alarm(rng: np.random.Generator, samples: int) -> Event:
    beep_hz, beep_seconds = log_uniform(rng, (900, 3_200)), log_uniform(rng, (0.05, 0.3))
    per_second = 1 / (beep_seconds * uniform(rng, (1.5, 2.4)))
    in_group = int(rng.integers(1, 5))
    groups = bouts(
        rng,
        samples / SAMPLE_RATE_HZ,
        (in_group, in_group),
        per_second,
        (2.0 / per_second, 4.0 / per_second),
    )
    tone = harmonic_tone(
        np.full(samples_in(beep_seconds), beep_hz), np.arange(1, 8) ** -uniform(rng, (0.5, 1.5))
    )
    onsets = np.concatenate(groups)
    grouping = ("", "", "in pairs", "in groups of three", "in groups of four")[in_group]
    pitch = graded(beep_hz, 1_300, 2_200, ("at a low pitch", "", "at a high pitch"))
    return Event(lay(samples, onsets, [faded(tone, 0.004)] * len(onsets)), (grouping, pitch))
