"""The table of sound classes: what a class is called, how people say it, and the function that makes it.

In: functions of `textures`, `calls` and `impacts`, each `(rng, samples) -> Event`. Out: `SOUND_CLASSES`, in order of
registration. Next: `sound` stages them. A new class is one decorated function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


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
