"""The demo corpus: three domains synthesised from a seed, for trying everything out without a download.

In: `DemoOptions`. Out: `OUT/{train,valid,test}/{speech,sound,music}/shard-*.tar` with indexes. Next: any configuration reads
these as it reads other shards; the labels make probe tasks. Clips come from `corpora.synth`.
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from whisper_aut.corpora.synth.music import MUSIC_LABELS, render_music
from whisper_aut.corpora.synth.signals import SAMPLE_RATE_HZ
from whisper_aut.corpora.synth.sounds import SOUND_LABELS, render_sound
from whisper_aut.corpora.synth.speech import KEYWORDS, render_speech
from whisper_aut.data.annotation import DOMAINS, Annotation
from whisper_aut.data.shards import INDEX_NAME, ShardFolder, open_index
from whisper_aut.errors import UserError

GENERATOR_VERSION = (
    1  # raise it with every change that changes a clip: built corpora are then rebuilt
)
LICENCE = "CC0-1.0"
SPLITS = ("train", "valid", "test")
RENDERERS = {"speech": render_speech, "sound": render_sound, "music": render_music}
LABELS = {"speech": KEYWORDS, "sound": SOUND_LABELS, "music": MUSIC_LABELS}


@dataclass(frozen=True)
class ClipOrder:
    """Which clip to render."""

    seed: int
    split: str
    domain: str
    number: int

    @property
    def key(self) -> str:
        return f"{self.split}-{self.domain}-{self.number:05d}"

    def generator(self) -> np.random.Generator:
        place = (SPLITS.index(self.split), DOMAINS.index(self.domain), self.number)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=place))


@dataclass(frozen=True)
class RenderedClip:
    """A clip as a shard stores it."""

    key: str
    flac: bytes
    annotation: Annotation


def render_clip(order: ClipOrder) -> RenderedClip:
    """Render one clip."""
    waveform, annotation = RENDERERS[order.domain](order.generator(), order.number)
    encoded = io.BytesIO()
    soundfile.write(encoded, waveform, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    facts = {"duration_seconds": round(len(waveform) / SAMPLE_RATE_HZ, 4), "id": order.key}
    return RenderedClip(
        order.key, encoded.getvalue(), replace(annotation, source="demo", licence=LICENCE, **facts)
    )


BUILDER = "whisper-aut data demo"
STAGING_NAME = ".partial"  # the corpus grows here and moves to its place when whole
CLIPS_PER_JOB = 24


@dataclass(frozen=True)
class DomainClips:
    """How many clips of each domain a split has. Half of the speech clips are keywords."""

    speech: int
    sound: int
    music: int

    def scaled(self, factor: float) -> "DomainClips":
        return DomainClips(*(max(1, round(clips * factor)) for clips in asdict(self).values()))


@dataclass(frozen=True)
class DemoOptions:
    """What to synthesise; the defaults give every class about fifty training and fifteen test clips or more."""

    seed: int = 0
    train: DomainClips = DomainClips(speech=1536, sound=1026, music=780)
    valid: DomainClips = DomainClips(speech=160, sound=114, music=104)
    test: DomainClips = DomainClips(speech=480, sound=304, music=234)

    def scaled(self, factor: float) -> "DemoOptions":
        """Return a corpus of the same proportions, smaller or larger.

        Raises:
            UserError: a factor that is not positive.
        """
        if factor <= 0:
            raise UserError(
                f"The demo corpus cannot be {factor:g} times its size: give a scale above 0."
            )
        return replace(self, **{split: getattr(self, split).scaled(factor) for split in SPLITS})

    def recipe(self) -> str:
        """A hash of all that decides the corpus: these options and the generator's version."""
        facts = json.dumps([GENERATOR_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def orders(self, split: str, domain: str) -> list[ClipOrder]:
        clips = getattr(getattr(self, split), domain)
        return [ClipOrder(self.seed, split, domain, number) for number in range(clips)]


def build_demo(
    out: Path, options: DemoOptions, *, workers: int | None = None, progress: bool = True
) -> Path:
    """Synthesise the corpus under `out`, or return at once where it stands already; return `out`.

    Args:
        workers: processes; by default one per core. With 1 everything runs in this process.

    Raises:
        UserError: `out` cannot be written, holds shards that another builder made, or espeak-ng is not installed.
    """
    recipe, parts = options.recipe(), [(split, domain) for split in SPLITS for domain in DOMAINS]
    recipes = [_recipe_at(out / split / domain) for split, domain in parts]
    if all(found == recipe for found in recipes):
        return out
    staging = out / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)
    orders = [order for part in parts for order in options.orders(*part)]
    try:
        with (
            _rendered(orders, workers or os.cpu_count() or 1) as clips,
            _bar(len(orders), progress) as advance,
        ):
            for split, domain in parts:
                with ShardFolder(staging / split / domain) as folder:
                    folder.facts = {
                        "builder": BUILDER,
                        "recipe": recipe,
                        "options": asdict(options),
                    }
                    for clip in islice(clips, len(options.orders(split, domain))):
                        folder.write(clip.key, "flac", clip.flac, clip.annotation)
                        advance()
        for split, domain in parts:
            _move(staging / split / domain, out / split / domain)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _recipe_at(folder: Path) -> str | None:
    """Return the recipe of a demo folder, or None where there is no whole one.

    Raises:
        UserError: the folder holds anything but the demo's shards, which a build would overwrite.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        index = json.loads((folder / INDEX_NAME).read_text())
    except (OSError, ValueError):
        index = {}
    if not isinstance(index, dict) or index.get("builder") != BUILDER:
        raise UserError(
            f"{folder} holds files that are not the demo corpus. Give another folder: {BUILDER} --out DIR"
        )
    try:
        return open_index(folder).facts["recipe"]
    except UserError:  # the demo's, but shards are missing: it is built anew
        return None


@contextmanager
def _rendered(orders: list[ClipOrder], workers: int) -> Iterator[Iterator[RenderedClip]]:
    """Render clips in the order given, in this process or in a pool."""
    if workers == 1:
        yield map(render_clip, orders)
        return
    # Spawned, not forked: this process may hold the threads of torch and of the progress bar.
    # They leave Ctrl-C to this process, which stops them.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, spawn, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield pool.map(
            render_clip, orders, chunksize=min(CLIPS_PER_JOB, max(1, len(orders) // (4 * workers)))
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _bar(clips: int, shown: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("Synthesising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown, transient=True) as bar:
        task = bar.add_task("clips", total=clips)
        yield lambda: bar.advance(task)


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
