"""One clip of environmental sound: an event of a class, staged with a room, background noise and what else is heard.

In: a generator and the clip's number, which decides the class. Out: a waveform `[S]` and its annotation. Next: `render`.
"""

import numpy as np

from whisper_aut.corpora.synth.signals import (
    ROOMS,
    SAMPLE_RATE_HZ,
    SOUND_CLASSES,
    Event,
    Span,
    arch,
    at_level,
    backdrop,
    band_noise,
    bouts,
    coloured_noise,
    composed,
    decay_curve,
    draw_room,
    faded,
    graded,
    harmonic_tone,
    lay,
    log_uniform,
    phase_of,
    pick,
    placed,
    random_clicks,
    samples_in,
    seconds_axis,
    slow_curve,
    sound_class,
    steady_onsets,
    struck_body,
    times_word,
    uniform,
    unit_rms,
    with_background,
)
from whisper_aut.data.annotation import Annotation


def _blows(
    rng: np.random.Generator, count: int, low: Span, breadth: Span, decay: Span, spread_db: float
) -> list[np.ndarray]:
    """Return blows on one body: the same resonances each time, at strengths that vary by `spread_db`."""
    low_hz = log_uniform(rng, low)
    body = struck_body(rng, low_hz, low_hz * uniform(rng, breadth), log_uniform(rng, decay))
    return [body * np.float32(10 ** (rng.normal(0, spread_db) / 20)) for _ in range(count)]


@sound_class(
    "footsteps", "footsteps are heard", "someone walks", "a person is walking", backdrop="footsteps"
)
def footsteps(rng: np.random.Generator, samples: int) -> Event:
    steps_per_second = log_uniform(rng, (1.3, 3.6))
    onsets = steady_onsets(rng, samples / SAMPLE_RATE_HZ, steps_per_second, jitter=0.04)
    surface, low_hz = pick(
        rng, (("on wood", (100, 260)), ("on stone", (200, 500)), ("on gravel", (150, 400)))
    )
    heels = _blows(rng, len(onsets), low_hz, (2, 5), (0.01, 0.04), spread_db=2)
    if surface == "on gravel":
        heels = [heel[: samples_in(0.03)] * 0.3 for heel in heels]
    toe_seconds, scuff = (
        uniform(rng, (0.06, 0.14)),
        uniform(rng, (0.1, 0.3)) * (4 if surface == "on gravel" else 1),
    )
    toes = []
    for _ in onsets:
        length = samples_in(uniform(rng, (0.06, 0.14)))
        toes.append(
            band_noise(rng, length, 500, 5_000)
            * decay_curve(length, 0.03, 0.015)
            * np.float32(scuff)
        )
    pace = graded(steps_per_second, 1.8, 2.6, ("slowly", "", "quickly"))
    return Event(
        lay(samples, onsets, heels) + lay(samples, onsets + toe_seconds, toes), (pace, surface)
    )


@sound_class(
    "knocking", "someone knocks", "a person knocks", "a knock is heard", backdrop="knocking"
)
def knocking(rng: np.random.Generator, samples: int) -> Event:
    per_second = log_uniform(rng, (2.8, 7.5))
    groups = bouts(rng, samples / SAMPLE_RATE_HZ, (2, 5), per_second, (0.6, 1.8))
    onsets = np.concatenate(groups)
    material, low_hz = pick(
        rng,
        (
            ("on a wooden door", (180, 500)),
            ("on a window", (500, 1_000)),
            ("on a table", (250, 700)),
        ),
    )
    blows = _blows(rng, len(onsets), low_hz, (1.8, 5), (0.012, 0.05), spread_db=2.5)
    count = (
        times_word(len(onsets))
        if len(groups) == 1
        else graded(per_second, 4, 6, ("slowly", "", "quickly"))
    )
    return Event(lay(samples, onsets, blows), (material, count))


@sound_class(
    "clock",
    "a clock ticks",
    "a clock is ticking",
    "the ticking of a clock is heard",
    backdrop="a ticking clock",
)
def clock(rng: np.random.Generator, samples: int) -> Event:
    ticks_per_second = log_uniform(rng, (1, 5))
    onsets = steady_onsets(rng, samples / SAMPLE_RATE_HZ, ticks_per_second, jitter=0.002)
    low = pick(rng, ((1_200, 2_200), (1_800, 3_500)))
    tick, tock = (
        _blows(rng, len(onsets), low, (1.5, 4), (0.004, 0.03), spread_db=0.5) for _ in range(2)
    )
    blows = [tick[number] if number % 2 else tock[number] for number in range(len(onsets))]
    return Event(
        lay(samples, onsets, blows),
        (graded(ticks_per_second, 1.6, 3, ("slowly", "steadily", "quickly")),),
    )


@sound_class(
    "typing",
    "someone types on a keyboard",
    "a person is typing",
    "keyboard keys clatter",
    backdrop="typing",
)
def typing(rng: np.random.Generator, samples: int) -> Event:
    keys_per_second = log_uniform(rng, (4, 12))
    groups = bouts(rng, samples / SAMPLE_RATE_HZ, (4, 14), keys_per_second, (0.15, 0.7))
    onsets = np.concatenate(groups)
    onsets = np.maximum(0, onsets + rng.normal(0, 0.25 / keys_per_second, len(onsets)))
    low = pick(rng, ((500, 1_000), (800, 1_800)))
    keys = [_blows(rng, len(onsets), low, (1.5, 4), (0.004, 0.02), spread_db=3) for _ in range(4)]
    pressed = [keys[int(rng.integers(4))][number] for number in range(len(onsets))]
    released = [key * np.float32(0.25) for key in pressed]
    waveform = lay(samples, onsets, pressed) + lay(
        samples, onsets + uniform(rng, (0.05, 0.09)), released
    )
    return Event(waveform, (graded(keys_per_second, 6, 9, ("slowly", "", "fast")),))


@sound_class(
    "glass", "glass breaks", "glass shatters", "a glass smashes", backdrop="breaking glass"
)
def glass(rng: np.random.Generator, samples: int) -> Event:
    seconds = samples / SAMPLE_RATE_HZ
    crashes = 1 + (seconds > 2 and rng.random() < 0.4)
    starts = np.sort(rng.uniform(0.02, max(0.1, seconds - 0.8), crashes))
    low_hz, scatter = log_uniform(rng, (1_300, 2_600)), uniform(rng, (0.1, 0.45))
    onsets, shards = [], []
    for start in starts:
        for delay in np.r_[0, 0, rng.exponential(scatter, int(rng.integers(8, 24)))]:
            shard = struck_body(rng, low_hz, low_hz * 3, log_uniform(rng, (0.04, 0.2)), modes=3)
            onsets.append(start + delay)
            shards.append(shard * np.float32(np.exp(-delay / 0.4) * uniform(rng, (0.3, 1))))
    size = graded(low_hz, 1_600, 2_200, ("with a heavy sound", "", "with a bright sound"))
    return Event(lay(samples, onsets, shards), (times_word(crashes) if crashes > 1 else "", size))


@sound_class(
    "bell",
    "a bell rings",
    "a bell is ringing",
    "a ringing bell is heard",
    backdrop="a ringing bell",
)
def bell(rng: np.random.Generator, samples: int) -> Event:
    rings_per_second = log_uniform(rng, (0.6, 6))
    onsets = steady_onsets(rng, samples / SAMPLE_RATE_HZ, rings_per_second, jitter=0.03)
    strike_hz, decay_seconds = log_uniform(rng, (350, 1_400)), log_uniform(rng, (0.3, 0.9))
    since = seconds_axis(samples_in(min(2.0, 4 * decay_seconds)))
    ring = np.zeros(len(since), dtype=np.float32)
    for ratio, strength in (
        (0.5, 0.4),
        (1, 1),
        (1.19, 0.6),
        (1.5, 0.3),
        (2, 0.6),
        (2.66, 0.35),
        (3.01, 0.2),
    ):
        if (
            strike_hz * ratio < SAMPLE_RATE_HZ * 0.45
        ):  # partials of a church bell: hum, strike, tierce, quint, nominal …
            tone = np.sin(
                np.float32(2 * np.pi * strike_hz * ratio) * since + np.float32(rng.uniform(0, 6))
            )
            ring += (
                np.float32(strength * uniform(rng, (0.6, 1.4)))
                * tone
                * np.exp(-since * np.float32(ratio**0.5 / decay_seconds))
            )
    pitch = graded(strike_hz, 550, 950, ("with a deep tone", "", "with a high tone"))
    return Event(
        lay(samples, onsets, [ring] * len(onsets)),
        (graded(rings_per_second, 1.2, 3, ("slowly", "", "rapidly")), pitch),
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


CLIP_SECONDS_MEDIAN, CLIP_SECONDS_SPREAD, CLIP_SECONDS_LIMITS = 2.7, 0.4, (1.2, 12.0)
DRY_SHARE = 0.6
TILT_DB = 1.5  # bound of the microphone's tilt, per octave
SIGNAL_TO_NOISE_DB = (6, 28)
BEHIND_SHARE = 0.25
BEHIND_DB = (-22, -12)  # level of another class in the background
SOUND_LABELS = tuple(sorted(SOUND_CLASSES))


def clip_samples(rng: np.random.Generator) -> int:
    """Draw a clip's length: most last two to five seconds, a few up to twelve."""
    seconds = CLIP_SECONDS_MEDIAN * np.exp(CLIP_SECONDS_SPREAD * rng.standard_normal())
    return samples_in(float(np.clip(seconds, *CLIP_SECONDS_LIMITS)))


def render_sound(rng: np.random.Generator, number: int) -> tuple[np.ndarray, Annotation]:
    """Render one clip; its class is `number` modulo the classes, so that every split is balanced."""
    kind = SOUND_CLASSES[SOUND_LABELS[number % len(SOUND_LABELS)]]
    event = kind.render(rng, clip_samples(rng))
    room, place = draw_room(rng, ROOMS, DRY_SHARE)
    waveform = placed(rng, event.waveform, room, TILT_DB)
    behind = ""
    if rng.random() < BEHIND_SHARE:
        other = SOUND_CLASSES[pick(rng, [label for label in SOUND_LABELS if label != kind.label])]
        level = np.float32(10 ** (uniform(rng, BEHIND_DB) / 20))
        waveform, behind = (
            waveform + level * unit_rms(other.render(rng, len(waveform)).waveform),
            other.backdrop,
        )
    ratio_db = uniform(rng, SIGNAL_TO_NOISE_DB)
    waveform, noise = with_background(rng, waveform, ratio_db)
    heard = backdrop(rng, behind or noise) if behind or ratio_db < 15 else ""
    text = composed(rng, pick(rng, kind.clauses), (*event.details, place, heard))
    extra = {
        "details": [detail for detail in event.details if detail],
        "room": place,
        "signal_to_noise_db": round(ratio_db, 1),
    }
    annotation = Annotation(text, domain="sound", task="caption", label=kind.label, extra=extra)
    return at_level(waveform, uniform(rng, (-16, -2))), annotation
