"""Sounds of things that meet: blows, steps, ticks, keys, glass, horn.

In: a generator and a length. Out: an `Event` each. Next: `sound`, through the table in `catalogue`. The bodies struck are drawn
from overlapping ranges, so that rhythm (even, grouped, irregular, alternating) has to be heard.
"""

import numpy as np

from whisper_aut.corpora.synth.captions import graded, times_word
from whisper_aut.corpora.synth.catalogue import Event, sound_class
from whisper_aut.corpora.synth.signals import (
    SAMPLE_RATE_HZ,
    Span,
    band_noise,
    bouts,
    decay_curve,
    lay,
    log_uniform,
    pick,
    samples_in,
    seconds_axis,
    steady_onsets,
    struck_body,
    uniform,
)


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
