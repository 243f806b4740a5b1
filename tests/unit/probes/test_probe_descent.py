"""probes.descent: training by epochs until validation stops improving, the same for a problem alone or among others."""

import pytest
import torch

from whisper_aut.probes.cache import Embeddings
from whisper_aut.probes.fit import split_round
from whisper_aut.probes.kinds import probe_rounds
from whisper_aut.probes.modules import MAX_EPOCHS, batch_size, descend

TARGETS = torch.tensor([1.0, 3.0])  # where training takes each problem
TURNS = torch.tensor([0.5, 2.5])  # where its validation loss is lowest, on the way


def run(problems: slice, seen: list[int] | None = None, **how):
    """Train problems of one number each, whose validation loss falls and rises again."""
    targets, turns = TARGETS[problems], TURNS[problems]

    def objectives(values, chosen):
        if seen is not None:
            seen.extend(chosen.tolist())
        return (values["x"][:, 0] - targets).square() + 0 * chosen.sum()

    def validate(values):
        return (values["x"][:, 0] - turns).square() + 1.0

    how = {"validate": validate, "batch_items": 10, "seed": 3} | how
    start = {"x": torch.zeros(len(targets), 1)}
    return descend(objectives, start, torch.full((len(targets),), 0.02), 100, **how)


def test_training_stops_once_validation_has_stopped_improving_and_keeps_the_best_epoch():
    values, epochs = run(slice(2))
    assert 1 < epochs[0] < epochs[1] < MAX_EPOCHS
    assert values["x"][:, 0].tolist() == pytest.approx(TURNS.tolist(), abs=0.15)
    _, impatient = run(slice(2), max_epochs=3)
    assert max(impatient) <= 3, "the bound in epochs"


def test_every_epoch_sees_every_item_once():
    seen: list[int] = []
    run(slice(1), seen, validate=None, epochs=4)
    epochs = torch.tensor(seen).view(4, 100)
    assert torch.equal(epochs.sort(1).values, torch.arange(100).expand(4, 100))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_problem_stops_and_ends_the_same_alone_and_among_others():
    (values, epochs), (alone, own) = run(slice(2)), run(slice(1))
    assert epochs[:1] == own
    assert torch.equal(values["x"][:1], alone["x"])


def test_the_chosen_number_of_epochs_is_the_very_training_that_validation_saw():
    values, (epochs,) = run(slice(1))
    again, _ = run(slice(1), validate=None, epochs=epochs)
    assert torch.equal(values["x"], again["x"])


def test_a_seed_decides_the_order_of_batches():
    orders = []
    for seed in (0, 0, 1):
        orders.append([])
        run(slice(1), orders[-1], validate=None, epochs=1, seed=seed)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("items", "size"), [(20, 32), (1_600, 100), (84_000, 1024)])
def test_an_epoch_has_several_steps_however_small_the_corpus(items, size):
    assert batch_size(items) == size


def clusters(name: str) -> Embeddings:
    generator = torch.Generator().manual_seed(len(name))
    labels = torch.arange(60) % 2
    features = torch.randn(60, 4, generator=generator) + 3 * labels[:, None]
    keys = tuple(f"{name}:{number}" for number in range(60))
    return Embeddings(features, tuple(map(str, labels.tolist())), keys, {})


def test_epochs_are_chosen_on_validation_and_reported():
    rounds = [split_round({name: clusters(name) for name in ("train", "valid", "test")})]
    only = [{"rate": 1e-2, "decay": 1e-4}]
    one, other = probe_rounds(rounds, kind="mlp", seeds=(0, 1), candidates=only)
    assert one.settings == other.settings
    assert 1 <= one.settings[0]["epochs"] <= MAX_EPOCHS
    assert (one.valid_scores[0] or 0) > 0.8
