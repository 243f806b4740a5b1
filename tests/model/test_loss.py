"""The chunked cross-entropy against PyTorch's own on the full logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from whisper_aut.model.loss import chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_equals_cross_entropy_with_gradients(chunk: int):
    torch.manual_seed(0)
    hidden = torch.randn(33, 12, requires_grad=True)
    weight = torch.randn(50, 12, requires_grad=True)
    labels = torch.randint(0, 50, (33,))
    expected = cross_entropy(hidden @ weight.T, labels, reduction="none")
    (expected.sum() / 7).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    total, nll, correct = chunked_cross_entropy(hidden, weight, labels, chunk)
    (total / 7).backward()
    assert_close(total, expected.sum())
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


def test_no_tensor_of_all_logits_is_kept():
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, weight, torch.randint(0, 1000, (64,)), chunk=8)
    assert max(kept) < 64 * 1000


def test_follows_autocast():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _ = chunked_cross_entropy(hidden, weight, torch.randint(0, 20, (6,)))
    total.backward()
    assert total.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
