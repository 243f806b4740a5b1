"""The chunked cross-entropy against PyTorch's own on the full logits."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from whisper_aut.models.losses import chunked_cross_entropy


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, in forward and
    backward.
    """

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_equals_cross_entropy_with_gradients(chunk: int, weighted: bool):
    torch.manual_seed(0)
    hidden = torch.randn(33, 12, requires_grad=True)
    weight = torch.randn(50, 12, requires_grad=True)
    labels = torch.randint(0, 50, (33,))
    own = torch.rand(33) if weighted else torch.ones(33)
    expected = cross_entropy(hidden @ weight.T, labels, reduction="none")
    ((own * expected).sum() / 7).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    total, nll, correct = chunked_cross_entropy(
        hidden, weight, labels, chunk, own if weighted else None
    )
    (total / 7).backward()
    assert_close(total, (own * expected).sum())
    assert_close(nll, expected.detach())
    assert torch.equal(correct, (hidden @ weight.T).argmax(-1) == labels)
    assert_close(hidden.grad, grads[0])
    assert_close(weight.grad, grads[1])


def test_a_frozen_output_embedding_gets_no_gradient():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    total, _, _ = chunked_cross_entropy(hidden, weight, torch.randint(0, 9, (5,)))
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_nothing_supervised_is_nothing_lost():
    total, nll, _ = chunked_cross_entropy(
        torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4), torch.zeros(0, dtype=torch.long)
    )
    assert total == 0
    assert len(nll) == 0


def test_no_tensor_of_all_logits_ever_exists():
    hidden, weight = (
        torch.randn(64, 8, requires_grad=True),
        torch.randn(1000, 8, requires_grad=True),
    )
    with LargestTensor() as made:
        total, _, _ = chunked_cross_entropy(hidden, weight, torch.randint(0, 1000, (64,)), chunk=8)
        total.backward()
    assert 8 * 1000 <= made.elements < 64 * 1000
    with LargestTensor() as made:
        cross_entropy(hidden @ weight.T, torch.randint(0, 1000, (64,))).backward()
    assert made.elements >= 64 * 1000


def test_gradients_are_handed_over_once():
    hidden = torch.randn(5, 4, requires_grad=True)
    total, _, _ = chunked_cross_entropy(hidden, torch.randn(9, 4), torch.randint(0, 9, (5,)))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        total.backward()


def test_follows_autocast():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _ = chunked_cross_entropy(hidden, weight, torch.randint(0, 20, (6,)))
    total.backward()
    assert total.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(context: Any):
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter, context():
        chunked_cross_entropy(hidden, weight, torch.randint(0, 9, (5,)))
    assert counter.get_total_flops() == 2 * 5 * 4 * 9  # the logits
