"""Probes trained by Adam stop when validation stops improving, the same alone and among other
heads.
"""

import pytest
import torch
from lightning import Trainer

from whisper_aut.probes.datamodule import HeadLoader, batch_size
from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.fit import probe_splits
from whisper_aut.probes.modules import AdamProbe
from whisper_aut.probes.optim import HeadAdam
from whisper_aut.probes.splits import train_valid_test

TARGETS = torch.tensor([1.0, 3.0])  # where training takes each head
TURNS = torch.tensor([0.5, 2.5])  # where its validation loss is lowest, on the way


class Numbers(AdamProbe):
    """Heads of one number each, whose validation loss falls and rises again."""

    def __init__(self, heads: slice):
        count = len(TARGETS[heads])
        super().__init__(1, 1, [{"rate": 0.02}] * count)
        self.x = torch.nn.Parameter(torch.zeros(count, 1))
        self.heads, self.seen = heads, list[int]()

    def losses(self, *batch):
        items, mask = batch
        if self.training:
            self.seen += items.tolist()
        aim = TARGETS if self.training else TURNS
        return (self.x[:, 0] - aim[self.heads]).square() + torch.ones_like(mask)


class Items:
    def batch(self, items, generator=None):
        return (items,)


def run(heads: slice, *, validate: bool = True, seed: int = 3, max_epochs: int = 200) -> Numbers:
    probe = Numbers(heads)
    mask = torch.ones(100, len(TARGETS[heads]), dtype=torch.bool)
    valid = HeadLoader(Items(), mask, 10) if validate else None
    trainer = Trainer(max_epochs=max_epochs, barebones=True, inference_mode=False)
    trainer.fit(probe, HeadLoader(Items(), mask, 10, seed), valid)
    return probe


def test_training_stops_when_validation_stops_improving_and_keeps_the_best_epoch():
    probe = run(slice(2))
    assert 1 < probe.epochs[0] < probe.epochs[1] < AdamProbe.max_epochs
    assert probe.x[:, 0].tolist() == pytest.approx(TURNS.tolist(), abs=0.15)
    assert max(run(slice(2), max_epochs=3).epochs) <= 3


def test_a_head_that_diverges_ends_with_its_initial_weights(monkeypatch):
    losses = Numbers.losses
    monkeypatch.setattr(Numbers, "losses", lambda *batch: losses(*batch) * torch.nan)
    probe = run(slice(2))
    assert probe.x.tolist() == [[0.0], [0.0]]
    assert probe.epochs == [1, 1]


def test_every_epoch_sees_every_item_once_in_another_order():
    epochs = torch.tensor(run(slice(1), validate=False, max_epochs=4).seen).view(4, 100)
    assert torch.equal(epochs.sort(1).values, torch.arange(100).expand(4, 100))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_head_stops_and_ends_the_same_alone_and_among_others():
    both, alone = run(slice(2)), run(slice(1))
    assert both.epochs[:1] == alone.epochs
    assert torch.equal(both.x[:1], alone.x)


def test_training_for_the_selected_epochs_repeats_what_validation_saw():
    probe = run(slice(1))
    again = run(slice(1), validate=False, max_epochs=probe.epochs[0])
    assert torch.equal(probe.x, again.x)


def test_a_seed_decides_the_order_of_batches():
    orders = [run(slice(1), validate=False, seed=seed, max_epochs=1).seen for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("items", "size"), [(20, 32), (1_600, 100), (84_000, 1024)])
def test_an_epoch_has_several_steps_however_small_the_corpus(items, size):
    assert batch_size(items, most=1024) == size


def clusters(name: str) -> Embeddings:
    generator = torch.Generator().manual_seed(len(name))
    labels = torch.arange(60) % 2
    features = torch.randn(60, 4, generator=generator) + 3 * labels[:, None]
    keys = tuple(f"{name}:{number}" for number in range(60))
    return Embeddings(features, tuple(map(str, labels.tolist())), keys, {})


def test_epochs_are_chosen_on_validation_and_reported():
    rounds = [train_valid_test({name: clusters(name) for name in ("train", "valid", "test")})]
    only = [{"rate": 1e-2, "decay": 1e-4}]
    one, other = probe_splits(rounds, kind="mlp", seeds=(0, 1), candidates=only)
    assert one.candidates == other.candidates
    assert 1 <= one.candidates[0]["epochs"] <= AdamProbe.max_epochs
    assert (one.valid_scores[0] or 0) > 0.8


def test_heads_train_as_by_an_adam_of_their_own():
    generator = torch.Generator().manual_seed(0)
    start, aim = (torch.randn(3, 4, 2, generator=generator) for _ in range(2))
    rates, decays = torch.tensor([1e-3, 1e-2, 0.1]), torch.tensor([0.0, 0.5, 2.0])
    together = torch.nn.Parameter(start.clone())
    optimizer = HeadAdam([{"params": [together], "decay": decays}], rates)
    alone = [torch.nn.Parameter(one.clone()) for one in start]
    theirs = [
        torch.optim.Adam([one], lr=float(rate), eps=1e-8 / float(rate))
        for one, rate in zip(alone, rates, strict=True)
    ]
    for _ in range(20):
        optimizer.zero_grad()
        (together - aim).pow(4).sum().backward()
        optimizer.step()
        for one, own, decay, adam in zip(alone, aim, decays, theirs, strict=True):
            adam.zero_grad()
            ((one - own).pow(4).sum() + 0.5 * decay * one.square().sum()).backward()
            adam.step()
    torch.testing.assert_close(together.detach(), torch.stack([one.detach() for one in alone]))
