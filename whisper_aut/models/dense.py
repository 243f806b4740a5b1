"""Linear layers and matrix products that use oneDNN where MKL is slow.

On x86 PyTorch computes float32 products with MKL. On AMD processors oneDNN, which PyTorch also
ships and uses for bfloat16 and convolutions, was measured twice as fast (`benchmarks/dense.py`). On
other processors and GPUs, under autocast and during graph capture, PyTorch's own layers run.
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
# In multiply-adds. A call to oneDNN costs about 15 µs, so smaller products gain nothing.
MIN_PRODUCTS = 1 << 21


def speed_up_products(*modules: nn.Module) -> None:
    """Convert all plain linear layers within `modules` to `Dense`, in place.

    Weights, names and hooks do not change.
    """
    for module in modules:
        for layer in module.modules():
            if type(layer) is nn.Linear:  # subclasses may override forward
                layer.__class__ = Dense


class Dense(nn.Linear):
    """An `nn.Linear`, `[..., N]` → `[..., M]`, that uses oneDNN where it is faster than MKL."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_onednn(input, self.weight):
            # `nn.Linear` looks up `F.linear` at each call, so it finds ZeRO-3's replacement.
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `left @ right.T` as `[N, M]`, without a gradient.

    Args:
        left: `[N, K]`.
        right: `[M, K]`.
        out: optional buffer for the result. It may remain unused: always read the returned tensor.
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
    """Return whether oneDNN can compute `left @ right.T` and is faster; `right` is `[M, K]`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    return (
        # Subclasses, such as the fake tensors that plan a run, define their own operations.
        type(left) is Tensor
        and left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[0] >= MIN_PRODUCTS
        and mkl_is_slow()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def mkl_is_slow() -> bool:
    """Return whether PyTorch has both MKL and oneDNN and the processor is made by AMD."""
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
    except OSError:  # not Linux
        return AMD in platform.processor()


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Return `left @ right.T + bias`. Both factors may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Only the gradient of the weight needs the input, so it is not kept for a frozen weight.
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
