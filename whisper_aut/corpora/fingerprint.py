"""Acoustic fingerprints, and an index that finds clips which share a segment.

After Haitsma & Kalker, "A Highly Robust Audio Fingerprinting System", ISMIR 2002. A fingerprint is
a 32-bit word every 16 ms. Each bit says whether the energy difference between a band and the next
higher band is larger than it was 128 ms earlier. Gain and codecs change these signs little. Unlike
spectral peaks, they also distinguish noises such as rain, waves and fire.

Candidates are pairs of clips with equal words (up to the three least certain bits) at the same
offset. All bits of a candidate are then compared. Unrelated sounds differ in about half of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy.fft
import soxr

RATE_HZ = 8_000  # most corpora have at least this rate
WINDOW_SAMPLES, HOP_SAMPLES = 2_048, 128  # 256 ms and 16 ms
EDGE_SAMPLES = WINDOW_SAMPLES // 2
LAG_FRAMES = 8
BANDS, LOWEST_HZ, HIGHEST_HZ = 33, 250.0, 3_400.0
BITS = BANDS - 1
TAPER = np.hanning(WINDOW_SAMPLES).astype(np.float32)
# Of the bands, in bins of the spectrum.
BAND_EDGES = np.geomspace(LOWEST_HZ, HIGHEST_HZ, BANDS + 1) / RATE_HZ * WINDOW_SAMPLES
BAND_EDGES = np.round(BAND_EDGES).astype(int)
FRAME_SECONDS = HOP_SAMPLES / RATE_HZ
SPAN_SECONDS = (WINDOW_SAMPLES + LAG_FRAMES * HOP_SAMPLES) / RATE_HZ  # audio that one word covers
# Frames 60 dB below the loudest say more about the codec than about the sound.
FLOOR = 1e-6
# About the power of a sine with amplitude 1e-5, which is above 16-bit rounding.
SILENCE = (1e-5 * WINDOW_SAMPLES / 4) ** 2
# A hum does not change, so the signs of its differences are rounding noise.
STEADY = 1e-3
BLOCK_FRAMES = 512
UNCERTAIN_BITS = 3
RUN_LIMIT, CANDIDATES = 32, 48  # bound the cost of one word and of one clip
WINDOW_FRAMES = 164  # words in a segment of 3 s
MIN_FRAMES = 20
# Number of words, and the fraction of bits that may differ.
TOLERATED = ((MIN_FRAMES, 24, 40, 60, 100), (0.055, 0.09, 0.09, 0.16, 0.25))


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a clip with W words.

    Attributes:
        words: uint32 `[W]`.
        audible: bool `[W]`; False where the audio is silent or does not change.
        uncertain: uint32 `[W, 3]`; masks of the least certain bits of each word.
    """

    words: np.ndarray
    audible: np.ndarray
    uncertain: np.ndarray


NO_WORDS = Fingerprint(
    np.zeros(0, np.uint32), np.zeros(0, bool), np.zeros((0, UNCERTAIN_BITS), np.uint32)
)


@dataclass(frozen=True)
class SharedSegment:
    """A segment that a searched and an indexed clip have in common."""

    clip: int  # number of the indexed clip
    bit_error: float  # fraction of bits that differ, in [0, 1]
    words: int  # number of words compared
    start_seconds: float  # in the searched clip
    indexed_start_seconds: float  # in the indexed clip
    seconds: float


def fingerprint(samples: np.ndarray, sample_rate_hz: int) -> Fingerprint:
    """Return the fingerprint of a clip, `[S]` or `[S, channels]`.

    Clips shorter than half a second have too few words to be found.
    """
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    if sample_rate_hz != RATE_HZ:
        mono = soxr.resample(mono, sample_rate_hz, RATE_HZ, quality="HQ")
    # Pad: otherwise only the tapered ends of the window would cover the very edges of a clip, for
    # example half a bark.
    energies = _band_energies(np.pad(np.asarray(mono, dtype=np.float32), EDGE_SAMPLES))
    if len(energies) <= LAG_FRAMES:
        return NO_WORDS
    total = energies.sum(axis=1)
    slopes = energies[:, :-1] - energies[:, 1:]
    change = slopes[LAG_FRAMES:] - slopes[:-LAG_FRAMES]
    louder = np.maximum(total[LAG_FRAMES:], total[:-LAG_FRAMES])
    power = energies[LAG_FRAMES:] + energies[:-LAG_FRAMES]
    certainty = np.abs(change) / (power[:, :-1] + power[:, 1:] + 1e-20)
    audible = (louder > max(SILENCE, FLOOR * float(total.max()))) & (
        np.abs(change).sum(axis=1) > STEADY * louder
    )
    weakest = np.argpartition(certainty, UNCERTAIN_BITS, axis=1)[:, :UNCERTAIN_BITS]
    powers = np.uint32(1) << np.arange(BITS, dtype=np.uint32)
    words = ((change > 0) * powers).sum(axis=1, dtype=np.uint32)
    return Fingerprint(words, audible, powers[weakest])


def _band_energies(mono: np.ndarray) -> np.ndarray:
    """Return the mean power per band as float32 `[frames, bands]`."""
    frames = (len(mono) - WINDOW_SAMPLES) // HOP_SAMPLES + 1
    if frames <= 0:
        return np.zeros((0, BANDS), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(mono, WINDOW_SAMPLES)[::HOP_SAMPLES]
    blocks = []
    for start in range(0, frames, BLOCK_FRAMES):
        spectrum: np.ndarray = np.asarray(
            scipy.fft.rfft(windows[start : start + BLOCK_FRAMES] * TAPER, axis=1)
        )
        power = np.square(np.abs(spectrum[..., BAND_EDGES[0] : BAND_EDGES[-1]]))
        blocks.append(
            np.add.reduceat(power, BAND_EDGES[:-1] - BAND_EDGES[0], axis=1)
            / np.diff(BAND_EDGES).astype(np.float32)
        )
    return np.concatenate(blocks)


class FingerprintIndex:
    """An index over clips that finds those which share a segment with another clip.

    It takes 13 bytes per word, about 3 MB per hour of audio. The cost of a search grows with the
    length of the searched clip and hardly with the size of the index.

    Args:
        fingerprints: those of the clips to index. Clips are numbered in this order.
    """

    def __init__(self, fingerprints: Iterable[Fingerprint]):
        every = [NO_WORDS, *fingerprints]
        self._words = np.concatenate([one.words for one in every])
        self._audible = np.concatenate([one.audible for one in every])
        self._starts = np.cumsum([len(one.words) for one in every], dtype=np.int64)
        positions = np.flatnonzero(self._audible).astype(
            np.uint32 if len(self._words) < 2**32 else np.uint64
        )
        order = np.argsort(self._words[positions], kind="stable")
        self._positions, self._keys = positions[order], self._words[positions][order]

    def search(self, query: Fingerprint) -> list[SharedSegment]:
        """Return the best shared segment per matching clip, lowest bit error first."""
        best: dict[int, SharedSegment] = {}
        for clip, offset in self._candidates(query):
            found = self._best_window(query, clip, offset)
            if found and (clip not in best or _margin(found) > _margin(best[clip])):
                best[clip] = found
        return sorted(best.values(), key=lambda segment: (segment.bit_error, segment.clip))

    def _candidates(self, query: Fingerprint) -> Iterator[tuple[int, int]]:
        """Yield `(clip, offset)`, the pairs with the most equal words first.

        Word n of the searched clip corresponds to word n + offset of the indexed clip.
        """
        queried = np.flatnonzero(query.audible)
        if not len(queried) or not len(self._keys):
            return
        variants = _variants(query.words[queried], query.uncertain[queried])
        first = np.searchsorted(self._keys, variants, side="left").ravel()
        counts = np.minimum(
            np.searchsorted(self._keys, variants, side="right").ravel() - first, RUN_LIMIT
        )
        queried = np.repeat(queried, variants.shape[1])
        hit = counts > 0
        first, counts, queried = first[hit], counts[hit], queried[hit]
        if not len(first):
            return
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = self._positions[np.repeat(first, counts) + within].astype(np.int64)
        diagonals = positions - np.repeat(queried, counts)
        clips = np.searchsorted(self._starts, positions, side="right") - 1
        pairs, votes = np.unique(np.stack([clips, diagonals], axis=1), axis=0, return_counts=True)
        for number in np.argsort(-votes, kind="stable")[:CANDIDATES]:
            clip = int(pairs[number, 0])
            yield clip, int(pairs[number, 1] - self._starts[clip])

    def _best_window(self, query: Fingerprint, clip: int, offset: int) -> SharedSegment | None:
        """Return the window of the overlap with the strongest match, or None if it is too weak."""
        base, length = self._starts[clip], int(self._starts[clip + 1] - self._starts[clip])
        first, last = max(0, -offset), min(len(query.words), length - offset)
        here, there = slice(first, last), slice(base + first + offset, base + last + offset)
        both = query.audible[here] & self._audible[there]
        wrong = np.where(both, np.bitwise_count(query.words[here] ^ self._words[there]), 0)
        size = min(WINDOW_FRAMES, last - first)
        counted = _window_sums(both, size)
        errors = _window_sums(wrong, size) / np.maximum(counted * BITS, 1)
        number = int(np.argmax(_tolerated(counted) - errors))
        window = self._words[there][number : number + size][both[number : number + size]]
        if errors[number] > _tolerated(counted[number]) or len(np.unique(window)) < len(window) / 4:
            return None  # too many wrong bits, or a hum whose words hardly change
        start = first + number
        seconds = (size - 1) * FRAME_SECONDS + SPAN_SECONDS
        return SharedSegment(
            clip,
            round(float(errors[number]), 4),
            int(counted[number]),
            round(start * FRAME_SECONDS, 2),
            round((start + offset) * FRAME_SECONDS, 2),
            round(seconds, 2),
        )


def _variants(words: np.ndarray, uncertain: np.ndarray) -> np.ndarray:
    """Return `[W, 8]`: each word with every combination of its uncertain bits flipped."""
    columns = []
    for choice in product((0, 1), repeat=UNCERTAIN_BITS):
        flips = np.bitwise_or.reduce(uncertain * np.array(choice, np.uint32), axis=1)
        columns.append(words ^ flips)
    return np.stack(columns, axis=1)


def _window_sums(values: np.ndarray, size: int) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return sums[size:] - sums[:-size]


def _tolerated(words: np.ndarray) -> np.ndarray:
    """Return the bit error up to which this many words count as the same sound.

    The value is negative below `MIN_FRAMES`. The limit does not guard against chance, which gives
    an error of about one half, but against similar sounds: the same word spoken twice by one person
    can differ in as little as a tenth of the bits over half a second. The fewer words there are,
    the more similar they must be.
    """
    return np.where(words < MIN_FRAMES, -1.0, np.interp(words, *TOLERATED))


def _margin(segment: SharedSegment) -> float:
    return float(_tolerated(np.array(segment.words)) - segment.bit_error)
