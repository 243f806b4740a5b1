"""Words for what was synthesised: pace, pitch, counts, and the order in which a caption names them.

In: the facts of a clip. Out: lower-case English of at most `MAX_WORDS` words. Next: `Annotation.text`, which the decoder learns
to write.
"""

from collections.abc import Sequence

import numpy as np

from whisper_aut.corpora.synth.signals import pick

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
