"""The tensors that a checkpoint holds: their size, and state that does not fit the module."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from whisper_aut.errors import UserError
from whisper_aut.training.checkpoint import (
    DeepSpeedState,
    ModelState,
    checkpoint_bytes,
)


def half_frozen_module() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    return module


def test_the_size_of_a_checkpoint_counts_frozen_weights_that_are_saved():
    module = half_frozen_module()
    optimizer = torch.optim.AdamW(module[1].parameters())
    module(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    shard = ModelState(module, optimizer).collect(rank=0, ranks=1)
    tensors = [*shard.weights.values(), *shard.optimizer_state.values()]
    counters = 4 * 2  # the step of each trained parameter
    assert checkpoint_bytes(module) == sum(tensor.nbytes for tensor in tensors) - counters


@pytest.mark.parametrize("name", ["0.weight", "gone"])
@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_optimizer_state_of_a_parameter_that_is_not_trained_is_rejected(kind: str, name: str):
    module = half_frozen_module()
    optimizer = torch.optim.AdamW(module[1].parameters())
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(optimizer=optimizer),
        zero_optimization_partition_weights=lambda: False,
    )
    deepspeed = kind == "deepspeed"
    state = DeepSpeedState(module, engine, {}) if deepspeed else ModelState(module, optimizer)
    with pytest.raises(UserError, match=rf"optimizer state of {name}, which this config does not"):
        state.load_optimizer_state([(f"{name}.exp_avg", torch.zeros(4, 8))])
