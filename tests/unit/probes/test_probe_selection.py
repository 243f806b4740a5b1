"""Selection on inner folds: the test part has no influence, and a plain loop selects the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from whisper_aut.errors import UserError
from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.fit import PROBES, kind_for, probe_splits
from whisper_aut.probes.modules import KNNProbe, MLPProbe
from whisper_aut.probes.optim import BatchedLBFGS
from whisper_aut.probes.splits import (
    cross_validation,
    inner_folds,
    train_valid_test,
    whole_groups,
)
from whisper_aut.probes.stats import jackknife

CLASSES = 4


def fold(number: int, clips: int = 40, width: int = 10, spread: float = 1.5) -> Embeddings:
    generator, world = torch.Generator().manual_seed(number), torch.Generator().manual_seed(99)
    labels = torch.arange(clips) % CLASSES
    features = torch.randn(CLASSES, width, generator=world)[labels] + spread * torch.randn(
        clips, width, generator=generator
    )
    return Embeddings(
        features,
        tuple(f"c{int(i)}" for i in labels),
        tuple(f"{number}:{i}" for i in range(clips)),
        {},
    )


@pytest.fixture
def folds() -> list[Embeddings]:
    return [fold(number) for number in range(4)]


def test_each_fold_is_tested_once_and_validates_the_others(folds):
    splits = cross_validation(folds)
    assert [one.test.keys[0] for one in splits] == ["0:0", "1:0", "2:0", "3:0"]
    for one in splits:
        assert not set(one.pool.keys) & set(one.test.keys)
        inner = inner_folds(one, "classes")
        assert len(inner) == 3
        for masks in inner:
            trained, validated = (
                {one.pool.keys[i].split(":")[0] for i in np.flatnonzero(mask)} for mask in masks
            )
            assert len(validated) == 1
            assert not trained & validated
            assert masks.valid.sum() == 40


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_label_noise_in_a_test_fold_cannot_raise_its_score_or_change_a_selection(folds, kind):
    (honest,) = probe_splits(cross_validation(folds), kind=kind)
    noisy_fold = Embeddings(folds[2].features, folds[2].labels[::-1], folds[2].keys, {})
    splits = [
        *cross_validation(folds)[:2],
        *cross_validation([*folds[:2], noisy_fold, folds[3]])[2:3],
        *cross_validation(folds)[3:],
    ]
    (planted,) = probe_splits(splits, kind=kind)
    assert honest.candidates == planted.candidates
    assert honest.valid_scores == planted.valid_scores
    assert planted.scores[2] < honest.scores[2] - 0.2
    assert planted.scores[3] == honest.scores[3]


def standardised(part: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    return (part - train.mean(0)) / train.std(0, correction=0)


def test_folds_equal_a_plain_loop_of_scikit_learn_on_all_other_folds(folds):
    """One LogisticRegression after another: the same penalties are chosen, the same clips are
    right; nothing is left out.
    """
    penalties = (0.1, 1.0, 10.0, 100.0)
    (run,) = probe_splits(cross_validation(folds), candidates=[{"penalty": p} for p in penalties])
    for number, one in enumerate(cross_validation(folds)):
        labels, features = np.array(one.pool.labels), one.pool.features
        standard, tested = (
            standardised(features, features),
            standardised(one.test.features, features),
        )
        inner = inner_folds(one, "class")
        valid = [
            np.mean(
                [
                    _logistic(standard[t.train], labels[t.train], p).score(
                        standard[t.valid], labels[t.valid]
                    )
                    for t in inner
                ]
            )
            for p in penalties
        ]
        chosen = run.candidates[number]["penalty"]
        assert valid[penalties.index(chosen)] == pytest.approx(max(valid), abs=0.009)
        assert run.valid_scores[number] == pytest.approx(valid[penalties.index(chosen)], abs=0.009)
        theirs = _logistic(standard, labels, chosen).predict(tested)
        assert (theirs == np.array(run.predicted[number])).mean() > 0.97


@pytest.mark.parametrize("final_fit", ["train", "train+valid"])
def test_the_final_probe_is_trained_on_the_full_training_split(folds, final_fit):
    """Its probabilities are scikit-learn's on all of `train`, or on `train` and `valid` with
    `train+valid`.
    """
    train, valid, test, _ = folds
    split = train_valid_test({"train": train, "valid": valid, "test": test})
    (run,) = probe_splits([split], final_fit=final_fit)
    used = [train] if final_fit == "train" else [train, valid]
    features = standardised(torch.cat([part.features for part in used]), train.features)
    labels = np.array([label for part in used for label in part.labels])
    model = _logistic(features, labels, run.candidates[0]["penalty"])
    expected = model.predict_proba(standardised(test.features, train.features).double().numpy())
    assert np.abs(expected.max(1) - run.probabilities[0]).max() < 2e-3
    assert (model.classes_[expected.argmax(1)] == np.array(run.predicted[0])).all()


def test_a_probe_without_a_random_start_is_trained_once_whatever_the_seeds(folds):
    for kind in ("linear", "knn"):
        runs = [
            probe_splits(cross_validation(folds), kind=kind, seeds=seeds)
            for seeds in ((0,), (1, 2))
        ]
        assert [run.seed for run in (*runs[0], *runs[1])] == [None, None]
        assert runs[0][0].scores == runs[1][0].scores


SEEDED = [kind for kind, facts in PROBES.items() if facts.seeded and "class" in facts.answers]


@pytest.mark.parametrize("kind", SEEDED)
def test_the_score_of_a_seed_does_not_depend_on_the_other_seeds(kind):
    """To the last bit: each seed's probe is trained by itself, and choosing knows no seeds."""
    noisy = [seen_by(kind, fold(number, spread=4.0)) for number in range(3)]
    splits = [train_valid_test(dict(zip(("train", "valid", "test"), noisy, strict=True)))]
    few = [{"rate": rate, "decay": 1e-3} for rate in (1e-3, 1e-2)]
    together = probe_splits(splits, kind=kind, seeds=(0, 1, 2), candidates=few)
    (alone,) = probe_splits(splits, kind=kind, seeds=(2,), candidates=few)
    assert together[2].probabilities == alone.probabilities
    assert together[2].scores == alone.scores
    assert together[0].candidates == together[2].candidates == alone.candidates
    assert together[0].probabilities != together[2].probabilities, "a seed decides something"


def seen_by(kind: str, part: Embeddings) -> Embeddings:
    """Give clips the form that a kind of probe takes: layers, or three frames a clip."""
    if PROBES[kind].features == "layers":
        return replace(part, features=torch.stack([part.features, part.features.square()], 1))
    if PROBES[kind].features == "frames":
        loudness = torch.tensor([[0.5], [1.0], [1.5]])
        return replace(part, frames=tuple(vector * loudness for vector in part.features))
    return part


def test_a_seed_decides_the_start_and_nothing_else_does():
    one, same, other = (MLPProbe(4, 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.first, same.first)
    assert not torch.equal(one.first, other.first)


def _logistic(features: torch.Tensor, labels: np.ndarray, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / penalty, max_iter=5_000, tol=1e-8).fit(
        features.double().numpy(), labels
    )


@pytest.mark.parametrize("k", [1, 7])
def test_neighbours_equal_scikit_learns(folds, k):
    pool, test = Embeddings.join(folds[:3]), folds[3]
    labels = torch.tensor([int(label[1]) for label in pool.labels])
    probe = KNNProbe(10, CLASSES, [{"k": k, "temperature": 0.07}])
    probe.training_step((pool.features, labels, torch.ones(len(pool), 1)), 0)
    found = probe(test.features)[:, 0].exp()

    def weights(distances):
        e = np.exp((1 - distances - (1 - distances).max(1, keepdims=True)) / 0.07)
        return e / e.sum(1, keepdims=True)

    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(
        pool.features.numpy(), labels.numpy()
    )
    assert np.abs(found.numpy() - theirs.predict_proba(test.features.numpy())).max() < 1e-4


def test_many_problems_reach_the_optima_that_each_reaches_alone():
    generator = torch.Generator().manual_seed(0)
    curvature = torch.rand(5, 18, generator=generator) * 50 + 0.5
    optimum = torch.randn(5, 18, generator=generator)
    evaluated = []

    start = torch.zeros(5, 18)
    start[0] = optimum[0]  # one is there already and soon leaves
    weight = torch.nn.Parameter(start.view(5, 3, 6))
    optimizer = BatchedLBFGS(weight, max_steps=200)

    def closure():
        heads = optimizer.heads
        evaluated.append(len(heads))
        away = optimizer.trial.flatten(1) - optimum[heads]
        values = (0.5 * curvature[heads] * away**2 + 0.1 * away**4).sum(1) + 1
        return values.double(), (curvature[heads] * away + 0.4 * away**3).unflatten(1, (3, 6))

    optimizer.step(closure, heads=torch.arange(5), tolerance=1e-10)
    torch.testing.assert_close(weight.detach().flatten(1), optimum, atol=2e-3, rtol=0)
    assert min(evaluated) < 5


def test_jackknife_of_a_mean_is_the_clips_themselves():
    values = np.random.default_rng(0).random(40)

    def score(clips: np.ndarray) -> float:
        return float(values[clips].mean())

    assert np.allclose(jackknife(score, np.arange(40)), values)
    speakers = np.repeat(np.arange(8), 5)  # left out whole
    assert np.allclose(jackknife(score, speakers), values.reshape(8, 5).mean(1))


def test_jackknife_is_centred_on_the_score_however_rare_a_class():
    found = np.arange(40) % 20 == 0  # two clips of forty
    units = jackknife(lambda clips: float(found[clips].mean() ** 0.5), np.arange(40))
    assert units.mean() == pytest.approx(0.05**0.5, abs=1e-9)
    assert units[0] > units[1]


def test_two_folds_hold_out_a_fraction_for_selection(folds):
    runs = probe_splits(cross_validation(folds[:2]), seeds=(0,))
    assert len(runs[0].scores) == 2
    assert all(0 < score <= 1 for score in runs[0].valid_scores)
    labels = np.unique(folds[1].labels, return_inverse=True)[1]
    (inner,) = inner_folds(cross_validation(folds[:2])[0], "class")
    assert np.bincount(labels[inner.valid]).tolist() == [2] * CLASSES
    assert (inner.train ^ inner.valid).all()


def test_whole_speakers_are_held_out_unless_speakers_are_also_tested_on(folds):
    def groups(part: Embeddings, prefix: str) -> Embeddings:
        return replace(part, groups=tuple(f"{prefix}{i % 9}" for i in range(len(part))))

    for tested, whole in (("other", True), ("own", False)):
        parts = {"train": groups(folds[0], "own"), "test": groups(folds[1], tested)}
        split = train_valid_test(parts | {"valid": Embeddings(torch.empty(0, 0), ())})
        (inner,) = inner_folds(split, "class")
        names, labels = np.array(split.pool.groups), np.array(split.pool.labels)
        assert (inner.train ^ inner.valid).all()
        assert (not {*names[inner.valid]} & {*names[inner.train]}) == whole
        assert {*labels[inner.train]} == {*labels}
        assert 8 <= inner.valid.sum() <= 12


def test_groups_are_drawn_only_if_all_classes_and_half_of_the_clips_stay():
    def drawn(classes: list[int], groups: list[int]) -> list[int]:
        found = whole_groups(np.array(classes), np.array(groups), 0.2, np.random.default_rng(0))
        return found.tolist()

    assert drawn([0, 0, 1, 1], [0, 0, 1, 1]) == []  # a group for each class
    assert drawn([0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1]) == [4, 5]  # the smaller one


def test_a_kind_that_cannot_answer_a_task_is_an_error(task_with):
    birds = task_with(name="birds", metric="mAP")
    with pytest.raises(UserError, match="Use one of: linear"):
        kind_for("knn", birds)
    with pytest.raises(UserError, match="There is no probe kind 'forest'"):
        kind_for("forest", birds)
    assert kind_for("", birds) == "linear"
    assert all(kind.version for kind in PROBES.values())
