"""Embedding by several ranks: the same cache, clip for clip, and an error if a rank is missing."""

import json
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from tests.support.probes import embed_task
from tests.support.ranks import on_ranks
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import device_name
from whisper_aut.probes.embed import EmbedSettings, TaskEmbedder, sample_range
from whisper_aut.probes.suite import rank_and_world_size

QUIET = EmbedSettings(quiet=True, batch_seconds=1.5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_cover_every_sample_once(ranks: int):
    taken = []
    for rank in range(ranks):
        start, end = sample_range(48, rank, ranks)
        taken += range(48)[start:end]
    assert taken == list(range(48))


@pytest.mark.parametrize("ranks", [2, 3, 60])
def test_ranks_together_embed_what_one_process_embeds(
    tones, task_with, tiny_encoder, tmp_path, ranks
):
    encoder, task, alone, shared = tiny_encoder(), task_with(), tmp_path / "1", tmp_path / "n"
    expected = embed_task(encoder, task, tones, alone, QUIET)
    for rank in range(ranks):
        embedder = TaskEmbedder(encoder, task, tones, shared, QUIET, rank=rank, world_size=ranks)
        embedder.embed()
    embedder.join_ranks()
    names = [{path.name for path in folder.glob("[!.]*")} for folder in (shared, alone)]
    assert names[0] == names[1], "nothing of a single rank stays"
    found = embed_task(encoder, task, tones, shared, QUIET)
    for part, embeddings in expected.items():
        assert (found[part].keys, found[part].labels) == (embeddings.keys, embeddings.labels)
        torch.testing.assert_close(found[part].features, embeddings.features, atol=1e-5, rtol=1e-5)


def test_a_missing_rank_is_named(tones, task_with, tiny_encoder, tmp_path):
    embedder = TaskEmbedder(tiny_encoder(), task_with(), tones, tmp_path, QUIET, world_size=2)
    embedder.embed()
    with pytest.raises(UserError, match="Rank 1 left no embeddings"):
        embedder.join_ranks()


def test_ranks_are_read_from_the_launcher(monkeypatch):
    assert rank_and_world_size() == (0, 1)
    assert device_name("cuda") == "cuda:0"
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert rank_and_world_size() == (5, 8)
    assert [device_name(name) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:1", "cuda:3", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_name("auto") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_name("auto") == "cpu"


def probe(pipeline_run: Path, shards: Path, out: Path) -> tuple[int, str, str]:
    """Run `whisper-aut probe`; return its exit status, standard output and standard error."""
    command = ["probe", str(pipeline_run / "runs/aut_tiny/latest/export/encoder")]
    command += ["--tasks", str(pipeline_run / "tones.yaml"), "--against", "logmel"]
    command += ["--root", str(shards), "--seeds", "2", "--out", str(out)]
    output, errors = StringIO(), StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = main(command)
    return status, output.getvalue(), " ".join(errors.getvalue().split())


def probe_on_rank(pipeline_run: Path, shards: list[Path], out: Path) -> tuple[int, str, str]:
    return probe(pipeline_run, shards[int(os.environ["RANK"])], out)


def test_two_ranks_score_as_one(pipeline_run: Path, tiny_shards: Path, tmp_path: Path):
    two = on_ranks(probe_on_rank, pipeline_run, [tiny_shards] * 2, tmp_path / "two")
    assert [status for status, _, _ in two] == [0, 0], two
    assert two[1][1] == "", "the second rank is silent"
    assert probe(pipeline_run, tiny_shards, tmp_path / "one")[0] == 0
    one, two = (
        json.loads((tmp_path / name / "scores.json").read_text())["entries"]
        for name in ("one", "two")
    )
    assert [entry["scores"] for entry in one] == [entry["scores"] for entry in two]
    assert [entry["identity"] for entry in one] == [entry["identity"] for entry in two]


def test_a_rank_that_fails_ends_the_other(pipeline_run: Path, tiny_shards: Path, tmp_path: Path):
    waits, fails = on_ranks(probe_on_rank, pipeline_run, [tiny_shards, tmp_path], tmp_path)
    assert (waits[0], fails[0]) == (1, 1)
    assert "Error:" in fails[2]
    assert "Another rank is gone" in waits[2]
