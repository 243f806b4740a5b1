"""probes.protocols: the peers' rules, flaws included, each flaw shown to be there, and never in ours."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from whisper_aut.errors import UserError
from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.embed import EmbedSettings, embed_task
from whisper_aut.probes.items import items_of
from whisper_aut.probes.metrics import class_metric
from whisper_aut.probes.peers import _xares_metric, _xares_mlp
from whisper_aut.probes.protocols import PROTOCOLS, rounds_of
from whisper_aut.probes.suite import run_suite

QUIET = EmbedSettings(quiet=True)


def noise(folds: int, clips: int, seed: int) -> dict[str, Embeddings]:
    """Features that say nothing of labels of two classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = ("a", "b") * (clips // 2)
    return {
        f"fold {k + 1}": Embeddings(
            torch.randn(clips, 30, generator=generator),
            labels,
            tuple(f"{k}:{i}" for i in range(clips)),
            {},
        )
        for k in range(folds)
    }


@pytest.fixture
def folded(task_with):
    return task_with(
        train=[],
        valid=[],
        test=[],
        split={"scheme": "folds", "folds": ["{root}/1", "{root}/2", "{root}/3", "{root}/4"]},
    )


def test_the_epoch_is_chosen_by_the_score_that_is_reported(folded):
    """On labels that mean nothing, choosing by the reported fold is never worse than choosing honestly, and often better."""
    gains = []
    for seed in range(4):
        for one in rounds_of(noise(4, 30, seed), folded):
            pool, test = (items_of(part, "class", ["a", "b"]) for part in (one.pool, one.test))
            seen, blind = (
                class_metric(
                    "accuracy", 2, _xares_mlp(pool, valid, test, folded, 2, seed=1), test.answers
                )
                for valid in (test, pool)
            )
            gains.append(seen - blind)
        run = PROTOCOLS["xares"].run(noise(4, 30, seed), folded, "mlp", [0], "cpu")[0]
        assert len(run.scores) == 4
    assert min(gains) >= 0
    assert np.mean(gains) > 0.01


@pytest.mark.parametrize(
    ("length", "steps"), [({}, 20), ({"epochs": 3}, 6), ({"epochs": 5, "batch_clips": 64}, 5)]
)
def test_xares_trains_as_long_as_its_task_says(length, steps, task_with, monkeypatch):
    pool, test = (items_of(part, "class", ["a", "b"]) for part in noise(2, 60, 0).values())
    taken, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (taken.append(1), step(self)))
    _xares_mlp(pool, pool, test, task_with(xares=length), 2, seed=1)
    assert len(taken) == steps


def test_lengths_of_nothing_are_refused(task_with):
    with pytest.raises(
        UserError, match="xares: epochs and batch_clips must be at least 1, got 0 and 32"
    ):
        task_with(xares={"epochs": 0})


def test_a_class_that_no_tested_clip_has_counts_nothing_in_their_mean_average_precision():
    generator = torch.Generator().manual_seed(0)
    scores, answers = (
        torch.randn(40, 5, generator=generator),
        torch.rand(40, 5, generator=generator) > 0.6,
    )
    answers[:, 3] = False
    each = [
        average_precision_score(answers[:, i], scores[:, i]) if i != 3 else 0.0 for i in range(5)
    ]
    assert _xares_metric("mAP", 5, scores, answers) == pytest.approx(np.mean(each), abs=1e-6)
    assert class_metric("mAP", 5, scores, answers) == pytest.approx(np.sum(each) / 4, abs=1e-6)


def test_xares_pools_over_silence_and_cuts_successive_crops(
    tones, task_with, tiny_encoder, tmp_path
):
    padded = PROTOCOLS["xares"].embedding(QUIET)
    masked = embed_task(tiny_encoder(), task_with(), tones, tmp_path, QUIET)["test"]
    silent = embed_task(tiny_encoder(), task_with(), tones, tmp_path, padded)["test"]
    assert torch.cosine_similarity(masked.features, silent.features).max() < 0.999
    assert masked.keys == silent.keys
    crops = embed_task(tiny_encoder(), task_with(crop_seconds=0.1), tones, tmp_path, padded)["test"]
    assert len(crops) > len(masked)
    assert any("#1" in key for key in crops.keys)


def test_maeb_takes_eight_clips_a_class_and_shuffles_across_folds(folded):
    parts = noise(4, 30, 0)
    shuffled = {
        name: Embeddings(part.features.clone(), part.labels, part.keys, {})
        for name, part in parts.items()
    }
    for number, part in enumerate(shuffled.values()):
        part.features[:, 0] = (
            50.0 * (number + 1) * torch.tensor([1.0, -1.0]).repeat(15)
        )  # what a fold knows of itself
    runs = PROTOCOLS["maeb"].run(shuffled, folded, "linear", [0, 1], "cpu")
    assert [len(run.scores) for run in runs] == [5, 5]
    assert runs[0].units[0].shape == (120,)
    assert np.mean(runs[0].scores) == pytest.approx(runs[0].units[0].mean())
    assert np.mean(runs[0].scores) > 0.95


@pytest.mark.parametrize("protocol", ["xares", "maeb"])
def test_a_run_says_by_which_rules_it_was_made(protocol, tones, task_with, tiny_encoder, tmp_path):
    arguments = {
        "root": tones,
        "cache": tmp_path,
        "seeds": (0, 1),
        "embedding": QUIET,
        "scores_file": tmp_path / "scores.json",
    }
    theirs = run_suite({"tiny": tiny_encoder()}, [task_with()], protocol=protocol, **arguments)
    ours = run_suite({"tiny": tiny_encoder()}, [task_with()], **arguments)
    assert [scores.entries[0].protocol for scores in (theirs, ours)] == [protocol, "strict"]
    assert theirs.protocol == protocol
    assert type(theirs).from_json(theirs.to_json()) == theirs


def test_what_a_protocol_does_not_do_is_told(tones, task_with, tiny_encoder, tmp_path):
    arguments = {"root": tones, "cache": tmp_path, "embedding": QUIET}
    with pytest.raises(UserError, match="no layers probe; it has: mlp, knn"):
        run_suite(
            {"tiny": tiny_encoder()}, [task_with()], protocol="xares", kind="layers", **arguments
        )
    with pytest.raises(UserError, match="Did you mean 'strict'"):
        run_suite({"tiny": tiny_encoder()}, [task_with()], protocol="strikt", **arguments)
