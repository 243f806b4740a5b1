"""Linear layers through oneDNN, on the processors where PyTorch's choice is slow.

In: the modules of a model, and matrix products. Out: the same. PyTorch gives float32 products on x86 to MKL; on AMD's processors oneDNN,
which PyTorch brings too and uses for bfloat16 and convolutions, was found twice as fast (`benchmarks/dense.py`). Everywhere else, on
GPUs, under autocast and while a graph is captured, the layers are PyTorch's own.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_INFO = Path("/proc/cpuinfo")
AMD = "AuthenticAMD"
MIN_PRODUCTS = (
    1 << 21
)  # multiply-adds; a call of oneDNN costs some 15 µs, so that smaller products gain nothing


def speed_up_products(*modules: nn.Module) -> None:
    """Let the plain linear layers within modules choose their library; weights, names and hooks stay as they are."""
    for module in modules:
        for layer in module.modules():
            if type(layer) is nn.Linear:  # not a subclass, whose forward is its own
                layer.__class__ = Dense


class Dense(nn.Linear):
    """`nn.Linear`, `[..., N]` → `[..., M]`, through the faster of PyTorch's libraries."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_onednn(input, self.weight):
            return super().forward(input)  # which looks functions up where ZeRO-3 puts its own
        return _Linear.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `left @ right.T` of `[N, K]` and `[M, K]`, without a gradient: `[N, M]`.

    Args:
        out: memory that may be used for it. Only what is returned is sure to hold the product.
    """
    return (
        _onednn(left, right, None)
        if _takes_onednn(left, right)
        else torch.mm(left, right.T, out=out)
    )


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add `left @ right.T` to `total` `[N, M]`, in place and without a gradient."""
    return (
        total.add_(_onednn(left, right, None))
        if _takes_onednn(left, right)
        else total.addmm_(left, right.T)
    )


def _takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether `left @ right.T` gains by it; `right` is `[M, K]`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    return (
        type(left)
        is Tensor  # subclasses, among them those without memory by which runs are planned, have rules of their own
        and left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[0] >= MIN_PRODUCTS
        and mkl_is_slow()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def mkl_is_slow() -> bool:
    """Whether PyTorch has MKL and oneDNN, and the processor is AMD's."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and known
        and _is_amd()
    )


def _is_amd() -> bool:
    try:
        return AMD in CPU_INFO.read_text()
    except OSError:  # no Linux
        return AMD in platform.processor()


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """`left @ right.T + bias`; factors may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight needs no gradient, and its input need not outlive this call.
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return _onednn(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        grad_rows = grad.flatten(0, -2)
        return (
            _onednn(grad, weight.T, None) if wants_input else None,
            _onednn(grad_rows.T, input.flatten(0, -2).T, None) if wants_weight else None,
            grad_rows.sum(0) if wants_bias else None,
        )
