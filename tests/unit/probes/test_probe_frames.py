"""probes.frames and cache: frames of a corpus stay in their files, whole files included, from
embedding to the fitted probe.
"""

import ctypes
import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.probes import embed_task
from whisper_aut.probes.datamodule import Frames
from whisper_aut.probes.embed import (
    Embeddings,
    EmbedSettings,
    cache_path,
    load_cached,
    read_embeddings,
    write_embeddings,
)
from whisper_aut.probes.fit import PROBES, probe_splits
from whisper_aut.probes.splits import train_valid_test

CLIPS, LENGTH, WIDTH = 48, 700, 512  # 69 MB a part, three parts
WHOLE = 3 * 4 * CLIPS * LENGTH * WIDTH  # bytes


def clip_frames(part: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(part)
    return tuple(torch.randn(LENGTH, WIDTH, generator=generator) for _ in range(CLIPS))


def store(folder: Path, part: int, labels: tuple[str, ...]) -> Embeddings:
    keys = tuple(f"{part}:{number}" for number in range(CLIPS))
    made = Embeddings(torch.empty(0, 0), labels, keys, {}, (), clip_frames(part))
    write_embeddings(folder, {"part": part}, made)
    found = read_embeddings(folder, {"part": part})
    assert found is not None
    return found


def resident() -> int:
    """Return the bytes of memory that this process holds by itself; pages of mapped files are the
    system's, and pages that were freed, in whichever test, go back to it first.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["attention", "transcription"])
def test_frames_of_a_corpus_are_never_in_memory_whole(kind, tmp_path, monkeypatch):
    """Read, joined, written again, fitted on and tested: only batches are held."""
    labels = ("a", "b") * (CLIPS // 2)
    parts = [store(tmp_path, part, labels) for part in range(3)]
    gc.collect()
    before, held = resident(), []
    original = Frames.__call__

    def counted(self, numbers):
        held.append(resident() - before)
        return original(self, numbers)

    monkeypatch.setattr(Frames, "__call__", counted)
    joined = Embeddings.join(parts)
    write_embeddings(tmp_path, {"part": "all"}, joined)
    assert resident() - before < WHOLE / 3
    for name, value in (("batch_items", 4), ("valid_batch_items", 4), ("max_epochs", 2)):
        monkeypatch.setattr(PROBES[kind], name, value)
    one = train_valid_test(dict(zip(("train", "valid", "test"), parts, strict=True)))
    metric = "accuracy" if kind == "attention" else "word_accuracy"
    only = [{"rate": 1.0, "decay": 0.0}]  # which soon stops
    probe_splits([one], metric=metric, kind=kind, seeds=(0,), candidates=only)
    assert held
    assert max(held) < WHOLE / 2


def test_a_cache_file_of_frames_is_a_plain_safetensors_file(tmp_path):
    frames = (torch.ones(2, 3), torch.arange(9.0).view(3, 3))
    made = Embeddings(torch.empty(0, 0), ("a", "b"), ("0", "1"), {}, (), frames)
    write_embeddings(tmp_path, {"part": 0}, made)
    path = cache_path(tmp_path, {"part": 0})
    assert torch.equal(load_file(path)["features"], torch.cat(frames))
    torch.testing.assert_close(load_cached(path).frames, frames)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert read_embeddings(tmp_path, {"part": 0}) is None


def test_frames_are_standardised_by_the_training_clips():
    clips = [10 * torch.randn(length, 4) + 3 for length in (5, 9, 2)]
    frames = Frames(clips, np.array([True, True, False]))
    padded, lengths = frames(torch.tensor([1, 0]))
    assert lengths.tolist() == [9, 5]
    assert padded.shape == (2, 9, 4)
    own = torch.cat([padded[0], padded[1, :5]])
    torch.testing.assert_close(own.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.std(0, correction=0), torch.ones(4))


def test_embedded_frames_are_views_of_the_cache_file(tones, task_with, tiny_encoder, tmp_path):
    encoder, task = tiny_encoder(), task_with()
    quiet = EmbedSettings(quiet=True)
    found = embed_task(encoder, task, tones, tmp_path, quiet, kind="frames")["test"]
    assert len(found.frames) == len(found) == 30
    storages = {clip.untyped_storage().data_ptr() for clip in found.frames}
    assert len(storages) == 1
