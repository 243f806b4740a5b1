"""probes.linear: scikit-learn's optimum, selection that never sees the test split, and errors that
say what is wrong.
"""

import os
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from whisper_aut.errors import UserError
from whisper_aut.probes import logistic, modules
from whisper_aut.probes.datamodule import PrincipalAxes
from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.fit import default_threads, probe_splits
from whisper_aut.probes.logistic import PenaltyPath, logistic_losses, with_ones
from whisper_aut.probes.modules import LinearProbe
from whisper_aut.probes.splits import stratified, train_valid_test

CLASSES = 5


def clips(
    count: int, seed: int, width: int = 24, spread: float = 1.0, classes: int = CLASSES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters in correlated features of very unlike scales."""
    g = torch.Generator().manual_seed(seed)
    world = torch.Generator().manual_seed(99)
    centres, mixing = (
        torch.randn(classes, width, generator=world),
        torch.randn(width, width, generator=world),
    )
    labels = torch.arange(count) % classes
    noise = spread * torch.randn(count, width, generator=g)
    return (0.5 * centres[labels] + noise) @ mixing * torch.logspace(-2, 2, width) + 3.0, labels


def embeddings(count: int, seed: int, **more) -> Embeddings:
    features, labels = clips(count, seed, **more)
    return Embeddings(
        features,
        tuple(f"class {int(i)}" for i in labels),
        tuple(f"{seed}:{i}" for i in range(count)),
        {},
    )


def splits(train: int = 150, valid: int = 60, test: int = 200, **more) -> dict[str, Embeddings]:
    counts = {"train": train, "valid": valid, "test": test}
    empty = Embeddings(torch.empty(0, 0), (), (), {})
    return {
        split: embeddings(count, seed, **more) if count else empty
        for seed, (split, count) in enumerate(counts.items())
    }


def fit(probe: LinearProbe, features: torch.Tensor, labels: torch.Tensor, mask=None) -> None:
    """Train heads on one batch, by default each on all items."""
    mask = torch.ones(len(features), len(probe.settings)) if mask is None else mask
    trainer = Trainer(max_epochs=1, barebones=True)
    trainer.fit(probe, DataLoader([(features, labels, mask)], batch_size=None))


def objectives(
    probe: LinearProbe, features: torch.Tensor, labels: torch.Tensor, mask=None
) -> torch.Tensor:
    mask = torch.ones(len(features), len(probe.settings)) if mask is None else mask
    items = mask.sum(0)
    problem = probe.penalties / items, with_ones(features), labels, mask / items
    return logistic_losses(probe.weight.detach(), *problem)[0]


def probe_linear(data: dict[str, Embeddings], **more):
    return probe_splits([train_valid_test(data)], **more)


@pytest.mark.parametrize(
    ("path_flops", "approach"),
    [(0, ()), (0, logistic.APPROACH), (1e30, ())],
    ids=["a path", "approached", "all at once"],
)
@pytest.mark.parametrize(
    ("count", "width"), [(300, 24), (60, 200)]
)  # more clips than features, and fewer
def test_path_equals_scikit_learn(count, width, path_flops, approach, monkeypatch):
    monkeypatch.setattr(logistic, "PATH_FLOPS", path_flops)
    features, labels = clips(count, 0, width)
    tested, answers = clips(500, 1, width)
    penalties = [0.1, 1.0, 10.0, 100.0]
    basis = PrincipalAxes(features, features[:0])
    probe = heads(basis, penalties, approach=approach)
    assert isinstance(probe, LightningModule)
    fit(probe, basis(features), labels)
    right = (probe(basis(tested)).argmax(2) == answers[:, None]).float().mean(0)
    ours = objectives(probe, basis(features), labels).detach()
    standard, standard_tested = (
        (x - features.mean(0)) / features.std(0, correction=0) for x in (features, tested)
    )
    for number, penalty in enumerate(penalties):
        theirs = LogisticRegression(C=1 / penalty, max_iter=5_000, tol=1e-8).fit(
            standard.double().numpy(), labels.numpy()
        )
        log_probabilities = theirs.predict_log_proba(standard.double().numpy())[
            np.arange(count), labels.numpy()
        ]
        loss = -log_probabilities.mean() + 0.5 * penalty / count * np.square(theirs.coef_).sum()
        assert float(ours[number]) == pytest.approx(loss, abs=1e-3)
        accuracy = theirs.score(standard_tested.double().numpy(), answers.numpy())
        assert float(right[number]) == pytest.approx(accuracy, abs=0.005)


@pytest.mark.parametrize("multilabel", [False, True])
def test_gradients_are_those_of_the_objective(multilabel):
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(30, 6, generator=generator), torch.ones(30, 1)], 1).double()
    answers = torch.randint(CLASSES, (30,), generator=generator)
    answers = torch.nn.functional.one_hot(answers, CLASSES) if multilabel else answers
    shares = torch.rand(30, 3, generator=generator).double()
    penalties = torch.tensor([0.1, 1.0, 10.0]).double() / 30
    weight = torch.randn(3, CLASSES, 7, generator=generator).double().requires_grad_()
    _, gradients = logistic_losses(weight.detach(), penalties, features, answers, shares)
    scores = torch.einsum("jcr,ir->ijc", weight, features)
    if multilabel:
        wanted = answers[:, None].double().expand_as(scores)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            scores, wanted, reduction="none"
        ).sum(2)
    else:
        losses = -scores.log_softmax(2)[torch.arange(30), :, answers]
    values = (losses * shares).sum(0) + 0.5 * penalties * weight[:, :, :-1].square().sum((1, 2))
    values.sum().backward()
    torch.testing.assert_close(gradients, weight.grad)


def test_penalties_do_not_disturb_each_other():
    features, labels = clips(200, 0)
    basis = PrincipalAxes(features, features[:0])
    together = heads(basis, [0.1, 1000.0])
    alone = heads(basis, [1000.0])
    for probe in (together, alone):
        fit(probe, basis(features), labels)
    one, other = (
        objectives(together, basis(features), labels)[1],
        objectives(alone, basis(features), labels)[0],
    )
    assert float(objectives(together, basis(features), labels)[0].detach()) < float(one.detach())
    assert float(one.detach()) == pytest.approx(float(other.detach()), abs=1e-5)


def heads(basis: PrincipalAxes, penalties: list[float], **more) -> LinearProbe:
    candidates = [{"penalty": penalty} for penalty in penalties]
    more = {"tolerance": 1e-6, "approach": ()} | more
    return LinearProbe(len(basis.variances), CLASSES, candidates, variances=basis.variances, **more)


def last_end(path: PenaltyPath, penalty: float, otherwise: torch.Tensor) -> torch.Tensor:
    return path[-1][1] if path else otherwise


@pytest.mark.parametrize(
    "penalties",
    [[1000.0, 100.0, 10.0, 1.0, 0.1, 0.01], [1000.0, 50.0, 50.0, 1.0, 0.5, 0.05, 0.0]],
    ids=["even", "uneven"],
)
def test_a_path_looks_ahead(penalties, monkeypatch):
    """It ends where it would if each problem started at the end of the one before, in fewer steps;
    also where no penalty is left.
    """
    monkeypatch.setattr(logistic, "PATH_FLOPS", 0)
    features, labels = clips(200, 0)
    basis = PrincipalAxes(features, features[:0])
    ends, evaluations = [], []
    for expected in (logistic.extrapolate, last_end):
        probe = heads(basis, penalties)
        evaluate = Mock(side_effect=logistic_losses)
        monkeypatch.setattr(modules, "logistic_losses", evaluate)
        monkeypatch.setattr(modules, "extrapolate", expected)
        fit(probe, basis(features), labels)
        evaluations.append(evaluate.call_count)
        ends.append(objectives(probe, basis(features), labels))
    torch.testing.assert_close(*ends, atol=1e-4, rtol=0)
    assert evaluations[0] < evaluations[1]


def own_items(problems: int, seed: int) -> torch.Tensor:
    """`[200, J]`: nine tenths of the items, others for each problem."""
    return (torch.rand(200, problems, generator=torch.Generator().manual_seed(seed)) < 0.9).float()


@pytest.mark.parametrize("shared", [False, True], ids=["own items", "the same items"])
def test_small_penalties_are_approached(shared, monkeypatch):
    """In fewer steps than from nothing, and each problem by itself, also where all have the same
    items and one no penalty.
    """
    monkeypatch.setattr(logistic, "PATH_FLOPS", 0)
    features, labels = clips(200, 0, width=200)
    basis, penalties = (
        PrincipalAxes(features, features[:0]),
        [1e4, 1e-2, 1e-2, 0.0] if shared else [1e-2, 1e-2, 1e-1, 1e2],
    )
    rows = torch.ones(200, 4) if shared else own_items(4, 0)
    ends, evaluations = [], []
    for approach in (logistic.APPROACH, ()):
        probe = heads(basis, penalties, tolerance=1e-5, approach=approach)
        evaluate = Mock(side_effect=logistic_losses)
        monkeypatch.setattr(modules, "logistic_losses", evaluate)
        fit(probe, basis(features), labels, rows)
        evaluations.append(evaluate.call_count)
        ends.append(objectives(probe, basis(features), labels, rows))
    torch.testing.assert_close(*ends, atol=1e-4, rtol=0)
    assert evaluations[0] < evaluations[1] / 2


@pytest.mark.gpu
def test_problems_of_many_penalties_are_fitted_on_a_gpu(monkeypatch):
    monkeypatch.setattr(logistic, "PATH_FLOPS", 0)
    data = splits()
    (found,), (expected,) = (probe_linear(data, device=device) for device in ("cuda", "cpu"))
    assert found.candidates == expected.candidates
    assert found.scores == pytest.approx(expected.scores, abs=0.01)


def test_basis_is_a_rotation_of_standardised_features():
    features, _ = clips(40, 0, width=60)
    more, _ = clips(30, 1, width=60)
    features[:, 7] = 4.2  # a constant feature
    more[:, 7] = 4.2
    basis = PrincipalAxes(features, more)
    standard = (torch.cat([features, more]) - features.mean(0)) / torch.where(
        basis.deviation == 1, 1, features.std(0, correction=0)
    )
    rotated = basis(torch.cat([features, more]))
    torch.testing.assert_close(rotated @ rotated.T, standard @ standard.T, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(
        basis.axes.T @ basis.axes, torch.eye(basis.axes.shape[1]), atol=1e-4, rtol=0
    )


def test_a_score_with_its_record():
    data = splits()
    (result,) = probe_linear(data, seeds=(0, 1, 2))
    assert result.units[0].shape == (200,)
    assert result.scores[0] == pytest.approx(result.units[0].mean(), abs=1e-6)
    assert result.scores[0] > 0.4
    right = np.array(result.predicted[0]) == np.array(data["test"].labels)
    assert right.mean() == pytest.approx(result.scores[0], abs=1e-6)
    assert all(1 / CLASSES <= chance <= 1 for chance in result.probabilities[0])


@pytest.mark.parametrize("valid", [60, 0])
def test_selection_never_sees_the_test_split(valid):
    data = splits(valid=valid)
    moved = data | {
        "test": Embeddings(
            data["test"].features.flip(0) * 5, data["test"].labels, data["test"].keys, {}
        )
    }
    (one,), (other,) = probe_linear(data), probe_linear(moved)
    assert (one.candidates, one.valid_scores) == (other.candidates, other.valid_scores)
    assert one.scores != other.scores


def test_noise_needs_a_large_penalty_and_clear_classes_do_not():
    (noisy,), (clear,) = (probe_linear(splits(spread=spread)) for spread in (6.0, 0.3))
    assert noisy.candidates[0]["penalty"] > clear.candidates[0]["penalty"]


def test_labels_that_mean_nothing_score_as_chance():
    data = splits(test=500)
    rng = np.random.default_rng(0)
    shuffled = {
        s: Embeddings(p.features, tuple(rng.permutation(np.array(p.labels)).tolist()), p.keys, {})
        for s, p in data.items()
    }
    assert probe_linear(shuffled)[0].scores[0] == pytest.approx(1 / CLASSES, abs=0.07)


def test_constant_features_score_as_the_commonest_class():
    data = splits()
    constant = {s: replace(p, features=torch.ones_like(p.features)) for s, p in data.items()}
    found = probe_linear(constant)[0]
    assert len(set(found.predicted[0])) == 1
    assert found.scores[0] == pytest.approx(
        data["test"].labels.count(found.predicted[0][0]) / 200, abs=1e-6
    )


@pytest.mark.parametrize(("variable", "count"), [("3,2", 3), ("1", 1), ("", os.cpu_count())])
def test_threads_may_be_a_list_of_openmp(
    monkeypatch: pytest.MonkeyPatch, variable: str, count: int
):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads() == count


def test_probing_works_within_a_validation_hook():
    data = splits()
    with torch.inference_mode():
        inside = probe_linear(data)
    assert inside[0].scores == probe_linear(data)[0].scores


def test_features_made_in_inference_mode_are_accepted():
    data = splits()
    with torch.inference_mode():
        made = {
            s: Embeddings(torch.stack(list(p.features)), p.labels, p.keys, {})
            for s, p in data.items()
        }
    assert probe_linear(made)[0].scores == probe_linear(data)[0].scores


def test_fitting_leaves_threads_and_random_state_alone():
    torch.manual_seed(5)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(5)
    probe_linear(splits(train=50, valid=20, test=20))
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_stratified_draws_a_fraction_of_every_class_but_never_all_of_it():
    labels = np.array([0] * 50 + [1] * 10 + [2])
    drawn = stratified(labels, 0.2, np.random.default_rng(0))
    assert np.bincount(labels[drawn], minlength=3).tolist() == [10, 2, 0]
    assert len(np.unique(drawn)) == len(drawn)


def relabelled(part: Embeddings, **names: str) -> Embeddings:
    return Embeddings(
        part.features,
        tuple(names.get(label.replace(" ", "_"), label) for label in part.labels),
        part.keys,
        part.skipped,
    )


def test_user_errors_say_what_is_wrong():
    data = splits(train=20, valid=10, test=10)
    empty = Embeddings(torch.empty(0, 0), (), (), {"no label": 12})
    with pytest.raises(UserError, match=r"'birds' has no clips in 'test' \(12 no label\)"):
        probe_linear(data | {"test": empty}, name="birds")
    with pytest.raises(UserError, match=r"no clips in 'train'"):
        probe_linear(data | {"train": empty})
    single = Embeddings(data["train"].features, ("owl",) * 20, data["train"].keys, {})
    with pytest.raises(UserError, match="single class in 'train', 'owl'"):
        probe_linear(data | {"train": single})
    for split in ("valid", "test"):
        with pytest.raises(UserError, match=f"1 classes in '{split}' that 'train' lacks: owl"):
            probe_linear(data | {split: relabelled(data[split], class_1="owl")})
    with pytest.raises(UserError, match="one clip per class"):
        probe_linear(splits(train=5, valid=0, test=10))
