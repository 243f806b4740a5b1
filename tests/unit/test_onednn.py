"""Linear layers through oneDNN give the numbers and gradients of PyTorch's, and only where they
apply.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from whisper_aut import onednn
from whisper_aut.models.losses import chunked_cross_entropy
from whisper_aut.onednn import mkl_is_slow, product, use_onednn


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Use oneDNN on any processor, and record the shapes that reach it."""
    shapes: list[tuple[int, ...]] = []
    run = onednn._onednn

    def recorded(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*left.shape, len(right)))
        return run(left, right, bias)

    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(onednn, "_onednn", recorded)
    return shapes


def _pair(inputs: int, outputs: int, *, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    theirs = nn.Linear(inputs, outputs, bias=bias)
    ours = copy.deepcopy(theirs)
    use_onednn(ours)
    return ours, theirs


@pytest.mark.parametrize("shape", [(300, 80), (2, 150, 80), (1, 300, 80)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_equal_float64(
    calls: list, shape: tuple[int, ...], bias: bool, recompute: bool
):
    torch.manual_seed(0)
    ours, theirs = _pair(80, 120, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    grad = torch.randn(*shape[:-1], 120)
    out = checkpoint(ours, x, use_reentrant=False) if recompute else ours(x)
    out.backward(grad)
    theirs.double()(exact).backward(grad.double())
    # Forward, and the gradients of input and weight.
    assert len(calls) == (4 if recompute else 3)
    assert_close(out.double(), theirs(exact), rtol=1e-5, atol=1e-5)
    assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)  # pyright: ignore[reportOptionalMemberAccess]
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad.double(), reference.grad, rtol=1e-5, atol=1e-4)  # pyright: ignore[reportOptionalMemberAccess]


def test_frozen_weights_cost_no_gradient(calls: list):
    ours, _ = _pair(128, 128)
    ours.requires_grad_(False)
    x = torch.randn(256, 128, requires_grad=True)
    y = ours(x)
    assert y.grad_fn.saved_tensors[0] is None  # the input is not kept
    y.sum().backward()
    assert calls == [(256, 128, 128), (256, 128, 128)]
    assert x.grad is not None
    assert ours.weight.grad is None
    ours.requires_grad_(True)
    calls.clear()
    ours(x.detach()).sum().backward()  # an input without gradient costs none
    assert calls == [(256, 128, 128), (128, 256, 128)]


def test_products_are_matrix_products(calls: list):
    left, right = torch.randn(200, 150), torch.randn(100, 150)
    expected = left.double() @ right.double().T
    assert_close(product(left, right).double(), expected, rtol=1e-5, atol=1e-4)
    transposed = product(left.T.contiguous().T, right.T.contiguous().T)
    assert_close(transposed.double(), expected, rtol=1e-5, atol=1e-4)
    assert len(calls) == 2


def test_the_loss_head_uses_onednn(calls: list):
    hidden = torch.randn(300, 80, requires_grad=True)
    weight = torch.randn(120, 80, requires_grad=True)
    labels = torch.randint(0, 120, (300,))
    chunked_cross_entropy(hidden, weight, labels)[0].backward()
    assert calls == [(300, 80, 120), (300, 120, 80)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").backward()
    for mine, reference in zip((hidden, weight), exact, strict=True):
        assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)  # pyright: ignore[reportOptionalMemberAccess]


def test_small_products_half_precision_and_captured_graphs_stay_with_pytorch(calls: list):
    ours, theirs = _pair(128, 128)
    x = torch.randn(256, 128)
    assert torch.equal(ours(x[:4]), theirs(x[:4]))
    assert torch.equal(ours(x[:0]), theirs(x[:0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert torch.equal(ours(x), theirs(x))
    exported = torch.export.export(ours, (x,))
    assert_close(exported.module()(x), theirs(x))
    assert_close(torch.jit.trace(ours, (x,), check_trace=False)(x), theirs(x))  # pyright: ignore[reportCallIssue]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        ours(fake.from_tensor(x))
    half, reference = ours.bfloat16(), theirs.bfloat16()
    assert torch.equal(half(x.bfloat16()), reference(x.bfloat16()))
    assert torch.equal(product(x.bfloat16(), half.weight), x.bfloat16() @ half.weight.T)
    assert not calls


def test_only_plain_linear_layers_change_and_their_names_do_not():
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_onednn(model)
    use_onednn(model)  # a second time changes nothing
    assert [type(layer) for layer in model] == [onednn._OneDNNLinear, Scaled, nn.ReLU]
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("vendor", "slow"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_processor_decides(
    vendor: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nvendor_id: {vendor}\n")
    monkeypatch.setattr(onednn, "CPU_INFO", tmp_path / "cpuinfo")
    mkl_is_slow.cache_clear()
    try:
        has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        assert mkl_is_slow() == (slow and has_both)
        mkl_is_slow.cache_clear()
        monkeypatch.setattr(onednn, "CPU_INFO", tmp_path / "none")
        monkeypatch.setattr(
            "platform.processor", lambda: f"AMD64 Family 25 Model 33 Stepping 0, {vendor}"
        )
        assert mkl_is_slow() == (slow and has_both)
    finally:
        mkl_is_slow.cache_clear()


def test_gradients_arrive_in_the_same_order_whatever_the_size_of_a_batch(calls: list):
    """ZeRO-1 and ZeRO-2 add gradients of ranks in the order in which they arrive."""
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64, bias=False))
    layers.append(nn.Linear(64, 64))
    use_onednn(layers)
    arrived: list[str] = []
    for name, parameter in layers.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    orders = []
    for rows in (4, 3000):
        calls.clear()
        layers(torch.randn(rows, 64)).sum().backward()
        assert bool(calls) == (rows == 3000)
        orders.append(arrived[-5:])
    assert orders[0] == orders[1]
