"""Build the demo corpus: `OUT/{train,valid,test}/{speech,sound,music}` of shards, from a seed."""

import hashlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile

from whisper_aut.corpora.synth.music import MUSIC_LABELS, render_music
from whisper_aut.corpora.synth.signals import SAMPLE_RATE_HZ
from whisper_aut.corpora.synth.sounds import SOUND_LABELS, render_sound
from whisper_aut.corpora.synth.speech import KEYWORDS, render_speech
from whisper_aut.data.annotation import DOMAINS, Annotation
from whisper_aut.data.shards import INDEX_NAME, open_index
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.utils import available_cores, parallel_map, progress_bar, read_json

RECIPE_VERSION = 2  # increase it when a clip changes, so that existing corpora are built again
BUILDER = "whisper-aut data demo"
LICENCE = "CC0-1.0"
SPLITS = ("train", "valid", "test")
RENDERERS = {"speech": render_speech, "sound": render_sound, "music": render_music}
LABELS = {"speech": KEYWORDS, "sound": SOUND_LABELS, "music": MUSIC_LABELS}
STAGING_NAME = ".partial"  # folder of an unfinished corpus


@dataclass(frozen=True)
class ClipOrder:
    """One clip to render."""

    seed: int
    split: str
    domain: str
    index: int

    @property
    def key(self) -> str:
        """Key of the clip in its shard."""
        return f"{self.split}-{self.domain}-{self.index:05d}"


def render_clip(order: ClipOrder) -> tuple[str, bytes, Annotation]:
    """Return a clip's key, its FLAC file and its annotation. They depend on `order` only."""
    path = (SPLITS.index(order.split), DOMAINS.index(order.domain), order.index)
    rng = np.random.default_rng(np.random.SeedSequence(order.seed, spawn_key=path))
    waveform, annotation = RENDERERS[order.domain](rng, order.index)
    encoded = io.BytesIO()
    soundfile.write(encoded, waveform, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    annotation = replace(
        annotation,
        id=order.key,
        source="demo",
        licence=LICENCE,
        duration_seconds=round(len(waveform) / SAMPLE_RATE_HZ, 4),
    )
    return order.key, encoded.getvalue(), annotation


@dataclass(frozen=True)
class DomainClips:
    """Number of clips of each domain in a split. Half of the speech clips are keywords."""

    speech: int
    sound: int
    music: int


@dataclass(frozen=True)
class DemoOptions:
    """Seed and size. By default every class has about fifty training and fifteen test clips."""

    seed: int = 0
    train: DomainClips = DomainClips(speech=1536, sound=1026, music=780)
    valid: DomainClips = DomainClips(speech=160, sound=114, music=104)
    test: DomainClips = DomainClips(speech=480, sound=304, music=234)

    def scaled(self, factor: float) -> "DemoOptions":
        """Return options for a corpus of `factor` times the size.

        Raises:
            UserError: the factor is not positive.
        """
        if factor <= 0:
            raise UserError(f"The scale of the demo corpus must be above 0, not {factor:g}.")
        sizes = {}
        for split in SPLITS:
            clips = asdict(getattr(self, split))
            scaled = {domain: max(1, round(count * factor)) for domain, count in clips.items()}
            sizes[split] = DomainClips(**scaled)
        return replace(self, **sizes)

    def recipe(self) -> str:
        """Return a hash of everything that the corpus depends on."""
        content = json.dumps([RECIPE_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def orders(self, split: str, domain: str) -> list[ClipOrder]:
        """Return the clips of one folder."""
        count = getattr(getattr(self, split), domain)
        return [ClipOrder(self.seed, split, domain, index) for index in range(count)]


def build_demo(
    out: Path, options: DemoOptions, *, workers: int | None = None, progress: bool = True
) -> Path:
    """Build the corpus in `out`, unless it exists already; return `out`.

    Args:
        out: output folder.
        options: seed and size.
        workers: number of processes; by default one per core.
        progress: whether to show a progress bar.

    Raises:
        UserError: `out` cannot be written or has other shards, or espeak-ng is not installed.
    """
    parts = [(split, domain) for split in SPLITS for domain in DOMAINS]
    recipe = options.recipe()
    if {_read_recipe(out / split / domain) for split, domain in parts} == {recipe}:
        return out
    staging = out / STAGING_NAME
    shutil.rmtree(staging, ignore_errors=True)
    orders = [order for part in parts for order in options.orders(*part)]
    # Spawned workers, because this process may have the threads of torch.
    clips = parallel_map(render_clip, orders, workers or available_cores(), spawn=True)
    metadata = {"builder": BUILDER, "recipe": recipe, "options": asdict(options)}
    try:
        with progress_bar(progress) as bar:
            task = bar.add_task("clips", total=len(orders))
            for split, domain in parts:
                with ShardWriter(staging / split / domain) as folder:
                    folder.metadata = metadata
                    for key, flac, annotation in islice(clips, len(options.orders(split, domain))):
                        folder.write(key, "flac", flac, annotation)
                        bar.advance(task)
        for split, domain in parts:
            target = out / split / domain
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / split / domain, target)
    finally:
        clips.close()
        shutil.rmtree(staging, ignore_errors=True)
    return out


def _read_recipe(folder: Path) -> str | None:
    """Return the recipe of a demo folder, or None if there is no complete one.

    Raises:
        UserError: the folder has other files, which a build would delete.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if read_json(folder / INDEX_NAME, default={}).get("builder") != BUILDER:
        raise UserError(
            f"{folder} has files that are not part of the demo corpus. Choose another folder: "
            f"{BUILDER} --out DIR"
        )
    try:
        return open_index(folder).metadata["recipe"]
    except UserError:  # shards are missing: build again
        return None
