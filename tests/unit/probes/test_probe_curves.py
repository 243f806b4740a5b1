"""Layers of an encoder, few clips per class, and what an encoder costs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.support.probes import embed_task
from whisper_aut.errors import UserError
from whisper_aut.loading import open_encoder, short_name, split_layers
from whisper_aut.models.flops import encoder_flops
from whisper_aut.probes.embed import Embeddings, EmbedSettings, TaskEmbedder
from whisper_aut.probes.encoders import (
    LogMelBaseline,
    hop_seconds_of,
    layer_indices,
    measure_cost,
    select_layers,
)
from whisper_aut.probes.fit import few_shot_splits
from whisper_aut.probes.results import Scores
from whisper_aut.probes.splits import cross_validation, few_shot
from whisper_aut.probes.suite import run_suite

QUIET = EmbedSettings(quiet=True)


@pytest.fixture(scope="module")
def whisper(tiny_whisper: Path):
    return open_encoder(f"{tiny_whisper}@none", None)


def test_layers_in_a_name():
    assert split_layers("org/name@30s#12") == ("org/name@30s", "12")
    assert split_layers("folder#1/name") == ("folder#1/name", "")
    assert short_name("models/name@30s#all") == "name@30s#all"
    assert short_name("logmel#last") == "log-mel statistics#last"
    # A folder called `export` is only that of a run if there is one.
    assert short_name("/export/name") == "name"
    assert short_name("/data/export/name@none") == "name@none"
    assert short_name(".") == Path.cwd().name
    with pytest.raises(UserError, match="name#first: after # comes a layer's number, all or last"):
        split_layers("name#first")
    with pytest.raises(UserError, match="LogMelBaseline returns no single layers"):
        open_encoder("logmel#1", None)


def test_selected_layers_are_slices_of_one_embedding(whisper, tones, task_with, tmp_path):
    assert layer_indices(whisper) == [0, 1, 2]
    found = {}
    for layers in ((1,), (0, 2), (2,)):
        encoder = select_layers(whisper, layers)
        found[layers] = embed_task(encoder, task_with(), tones, tmp_path, QUIET)["test"].features
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # train, valid and test, once
    for layers, features in found.items():
        settings = replace(QUIET, layers=layers)
        alone = embed_task(whisper, task_with(), tones, tmp_path / "alone", settings)["test"]
        torch.testing.assert_close(features, alone.features, atol=1e-6, rtol=1e-5)
    output = embed_task(whisper, task_with(), tones, tmp_path / "output", QUIET)["test"]
    torch.testing.assert_close(found[2,], output.features, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match=r"layers 0 .* to 2; requested: 3"):
        embed_task(select_layers(whisper, (3,)), task_with(), tones, tmp_path, QUIET)


def test_each_layer_has_its_own_score_and_frames(whisper, tones, task_with, tmp_path):
    encoders = {f"tiny#{n}": select_layers(whisper, (n,)) for n in range(3)}
    options = {"root": tones, "cache": tmp_path, "embedding": QUIET}
    scores = run_suite(encoders, [task_with()], **options)
    assert [entry.layers for entry in scores.entries] == [(0,), (1,), (2,)]
    assert len({entry.identity for entry in scores.entries}) == 3
    weighted = run_suite({"tiny": whisper}, [task_with()], kind="layers", seeds=(0,), **options)
    weights = weighted.entries[0].layer_weights
    assert len(weights) == 3
    assert sum(weights) == pytest.approx(1)
    assert max(weights) > 1.001 / 3  # learned
    assert Scores.from_json(weighted.to_json()) == weighted
    frames = TaskEmbedder(encoders["tiny#1"], task_with(), tones, tmp_path, QUIET, "frames")
    assert frames.spec.layers == (1,)
    assert frames.embed()["test"].frames[0].shape[1] == 32


def fold(number: int, clips: int = 24, classes: int = 3) -> Embeddings:
    generator, world = torch.Generator().manual_seed(number), torch.Generator().manual_seed(9)
    labels = torch.arange(clips) % classes
    features = torch.randn(classes, 8, generator=world)[labels]
    features = features + torch.randn(clips, 8, generator=generator)
    names = tuple(f"c{int(i)}" for i in labels)
    return Embeddings(features, names, tuple(f"{number}:{i}" for i in range(clips)))


def test_few_shot_probes_are_those_of_scikit_learn_on_the_drawn_clips():
    splits = cross_validation([fold(number) for number in range(3)])
    runs = few_shot_splits(splits, 2, kind="linear", seeds=(0, 1), metric="accuracy")
    assert [run.seed for run in runs] == [0, 1]
    assert runs[0].predicted != runs[1].predicted
    for run in runs:
        for number, split in enumerate(splits):
            drawn = few_shot(split, 2, run.seed)
            assert sorted(drawn.pool.labels) == ["c0", "c0", "c1", "c1", "c2", "c2"]
            assert not set(drawn.pool.keys) & set(split.test.keys)
            more = few_shot(split, 4, run.seed)
            assert set(drawn.pool.keys) < set(more.pool.keys)
            mean = drawn.pool.features.mean(0)
            deviation = drawn.pool.features.std(0, correction=0)
            model = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000)
            model.fit((drawn.pool.features - mean) / deviation, drawn.pool.labels)
            expected = model.predict((split.test.features - mean) / deviation)
            assert tuple(expected) == run.predicted[number]
    assert few_shot_splits(splits, 17, kind="linear", seeds=(0,), metric="accuracy") == []


def test_a_run_with_few_clips_a_class(tones, task_with, tiny_encoder, tmp_path, caplog):
    options = {"root": tones, "cache": tmp_path, "embedding": QUIET, "seeds": (0, 1, 2)}
    options |= {"scores_file": tmp_path / "few.json", "predictions_file": tmp_path / "few.jsonl"}
    scores = run_suite({"tiny": tiny_encoder()}, [task_with()], shots=(1, 8, 32), **options)
    assert scores.encoders == ["tiny, 1 a class", "tiny, 8 a class"]
    assert "tones: a class has less than 32 clips" in caplog.text
    one, eight = scores.entries
    assert (one.shots, one.seeds, len(one.record)) == (1, (0, 1, 2), 3)
    assert one.mean < eight.mean
    again = run_suite({"tiny": tiny_encoder()}, [task_with()], shots=(8,), **options)
    assert again.entries == (eight,)
    with pytest.raises(UserError, match="few clips per class need a task with one class"):
        run_suite({"tiny": tiny_encoder()}, [task_with()], shots=(1,), kind="mlp", **options)


def test_flops_and_parameters_are_those_of_the_formula(whisper, tiny_whisper):
    cost = measure_cost(whisper, "hash")
    model = whisper.encoder.whisper
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (cost.width, cost.frames_per_second) == (32, pytest.approx(50))
    seconds = 10
    formula = encoder_flops(model.config, [100 * seconds], [50 * seconds], trained=False)
    mel = 2 * 201 * 80 * 100 * seconds  # spectrum to mel bins
    assert cost.gflops_per_second == pytest.approx((formula + mel) / seconds / 1e9, rel=0.01)
    assert cost.ms_per_second > 0
    padded = measure_cost(open_encoder(f"{tiny_whisper}@30s", None), "hash")
    assert padded.gflops_per_second > 2.9 * cost.gflops_per_second
    view = measure_cost(select_layers(whisper, (1,)), "hash")
    assert view.parameters == cost.parameters
    floor = measure_cost(LogMelBaseline(), "hash")
    assert (floor.parameters, floor.width, floor.frames_per_second) == (0, 80, pytest.approx(100))


def test_costs_are_measured_once_and_stored(tones, task_with, tiny_encoder, tmp_path):
    options = {"root": tones, "cache": tmp_path, "embedding": QUIET}
    options["scores_file"] = tmp_path / "scores.json"
    first = run_suite({"tiny": tiny_encoder()}, [task_with()], **options)
    assert first.costs["tiny"].width == 12
    encoder = tiny_encoder()
    again = run_suite({"tiny": encoder}, [task_with()], **options)
    assert again.costs == first.costs == Scores.load(options["scores_file"]).costs
    assert encoder.encoded == 0


class OneFrame(LogMelBaseline):
    def _encode(self, waveforms):
        return [frames[:1] for frames in super()._encode(waveforms)]


def test_the_hop_does_not_depend_on_the_ends_of_a_clip():
    class Lossy(LogMelBaseline):
        def _encode(self, waveforms):
            return [frames[:-7:2] for frames in super()._encode(waveforms)]

    assert hop_seconds_of(Lossy()) == pytest.approx(0.02)
    with pytest.raises(UserError, match="gives 1 frames for 5 s and 1 for 10 s of audio"):
        hop_seconds_of(OneFrame())
    assert measure_cost(OneFrame(), "hash").frames_per_second is None


def test_draws_of_few_shot_splits_differ_between_folds():
    splits = cross_validation([fold(number, clips=60) for number in range(3)])
    draws = [few_shot(split, 1, 0).pool.keys for split in splits]
    assert len(set(draws)) == 3
    assert np.array_equal(draws[0], few_shot(splits[0], 1, 0).pool.keys)
