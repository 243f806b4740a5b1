"""Faster float32 linear layers on AMD CPUs, applied to built models.

On x86 CPUs, PyTorch computes float32 matrix products with MKL. On AMD CPUs oneDNN, which PyTorch
ships too, was measured twice as fast (`benchmarks/dense.py`). On other CPUs, on GPUs, under
autocast and during graph capture, nothing changes.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_INFO = Path("/proc/cpuinfo")
# In multiply-adds. A call to oneDNN costs about 15 µs, so smaller products gain nothing.
MIN_PRODUCTS = 1 << 21


def use_onednn(model: nn.Module) -> None:
    """Let all plain linear layers of a model use oneDNN where it is faster than MKL.

    Weights, their names and hooks stay the same. Gradient checkpointing and ZeRO-3 still work.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:  # subclasses may override forward
            layer.__class__ = _OneDNNLinear


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `left @ right.T` as `[N, M]` for `left` `[N, K]` and `right` `[M, K]`, no gradient.

    The result is in `out` only if oneDNN is not used, so always read the returned tensor.
    """
    return _onednn(left, right) if _is_faster(left, right) else torch.mm(left, right.T, out=out)


class _OneDNNLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not _is_faster(input, self.weight):
            # `nn.Linear` looks up `F.linear` at each call, so it finds ZeRO-3's replacement.
            return super().forward(input)
        # In this order, gradients arrive as they do from `nn.Linear`: the bias first. ZeRO-1 and
        # ZeRO-2 mix gradients up if ranks differ in it, and the batch decides which is used.
        return _OneDNNFunction.apply(input, self.bias, self.weight)  # pyright: ignore[reportReturnType]


class _OneDNNFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
        # Only the gradient of the weight needs the input, so it is not kept for a frozen weight.
        ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, weight)
        return _onednn(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)
        return (
            _onednn(grad, weight.T) if ctx.needs_input_grad[0] else None,
            grad_rows.sum(0) if ctx.needs_input_grad[1] else None,
            _onednn(grad_rows.T, input.flatten(0, -2).T) if ctx.needs_input_grad[2] else None,
        )


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `left @ right.T + bias`. Both factors may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def _is_faster(left: Tensor, right: Tensor) -> bool:
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
    """Return whether PyTorch has both MKL and oneDNN and the CPU is made by AMD."""
    if not (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    try:
        return "AuthenticAMD" in CPU_INFO.read_text()
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()
