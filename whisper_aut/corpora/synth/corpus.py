"""Build the demo corpus: `OUT/{train,valid,test}/{speech,sound,music}` of shards, from a seed."""

import io
import math
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

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
# Every class has about fifty training and fifteen test clips. Half of the speech are keywords.
CLIPS = {
    "train": {"speech": 1536, "sound": 1026, "music": 780},
    "valid": {"speech": 160, "sound": 114, "music": 104},
    "test": {"speech": 480, "sound": 304, "music": 234},
}
CLIPS_PER_WORKER = 250  # about what one worker renders while another starts

ClipSpec = tuple[int, str, str, int]  # seed, split, domain, index


def render_clip(clip: ClipSpec) -> tuple[str, bytes, Annotation]:
    """Return a clip's key, its FLAC file and its annotation. They depend on `clip` only."""
    seed, split, domain, index = clip
    path = (SPLITS.index(split), DOMAINS.index(domain), index)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=path))
    waveform, annotation = RENDERERS[domain](rng, index)
    encoded = io.BytesIO()
    soundfile.write(encoded, waveform, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    key, seconds = f"{split}-{domain}-{index:05d}", round(len(waveform) / SAMPLE_RATE_HZ, 4)
    annotation = replace(
        annotation, id=key, source="demo", licence=LICENCE, duration_seconds=seconds
    )
    return key, encoded.getvalue(), annotation


def count_clips(split: str, domain: str, scale: float = 1.0) -> int:
    """Return the number of clips in one folder of a corpus of `scale` times the default size."""
    return max(1, round(CLIPS[split][domain] * scale))


def build_demo(
    out: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Build the corpus in the folder `out`, unless it exists already; return `out`.

    It has `scale` times the default size. `workers` are processes; by default one per core.

    Raises:
        UserError: `out` cannot be written or has other shards, or espeak-ng is not installed.
    """
    if scale <= 0:
        raise UserError(f"The scale of the demo corpus must be above 0, not {scale:g}.")
    recipe = {"version": RECIPE_VERSION, "seed": seed, "scale": scale}
    sizes = {part: count_clips(*part, scale) for part in product(SPLITS, DOMAINS)}
    existing = [_read_recipe(out / split / domain) for split, domain in sizes]
    if all(found == recipe for found in existing):
        return out
    orders = [(seed, *part, index) for part, size in sizes.items() for index in range(size)]
    workers = workers or min(available_cores(), math.ceil(len(orders) / CLIPS_PER_WORKER))
    # Spawned workers, because this process may have the threads of torch.
    clips = parallel_map(render_clip, orders, workers, spawn=True)
    # All folders are published together at the end, so an interrupted build changes nothing.
    with closing(clips), ExitStack() as stack:
        writers = {
            (split, domain): stack.enter_context(ShardWriter(out / split / domain))
            for split, domain in sizes
        }
        for writer in writers.values():
            writer.metadata = {"builder": BUILDER, "recipe": recipe}
        bar = stack.enter_context(progress_bar(progress))
        tracked = bar.track(clips, total=len(orders), description="clips")
        for (_, split, domain, _), clip in zip(orders, tracked, strict=True):
            key, flac, annotation = clip
            writers[split, domain].write(key, "flac", flac, annotation)
    return out


def _read_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of a demo folder, or None if there is no complete one. Raise an error if it
    has other files, which a build would delete.
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
