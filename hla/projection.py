"""A few rows through a matrix on a CPU, at the speed of memory: what decoding spends its time on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

HAS_MKL = torch.backends.mkl.is_available()
ROWS = 4  # up to which it pays: with 8 rows the ordinary product is as fast
PARTS = 8
SMALL = 2**16  # numbers of a matrix that stays in cache: more threads would only be waited for


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``; for up to 4 rows on a CPU, without gradient, as a batch of products with parts of the matrix.

    MKL multiplies one row by a matrix in one thread, whatever their number, and reads 12 GB/s (on an AMD EPYC, in
    float32); 2 rows take twice the time of one. Its batched product reads 25 GB/s in one thread and uses them all.
    """
    if not _in_parts(linear, x):
        return linear(x)
    assert isinstance(linear, nn.Linear)
    rows = x.reshape(-1, x.shape[-1])
    parts = linear.weight.view(PARTS, -1, x.shape[-1])
    y = torch.bmm(parts, rows.mT.expand(PARTS, -1, -1)).view(-1, rows.shape[0])
    y = y.mT.contiguous().view(*x.shape[:-1], -1)
    return y if linear.bias is None else y + linear.bias


def is_bare(module: nn.Module) -> bool:
    """Whether calling it does no more than `forward` of its class: no hooks, and a weight that is here."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    hooks = hooks or _has_any_global_hook()
    return not hooks and "forward" not in vars(module)  # (the latter is how accelerate moves weights)


def _in_parts(linear: nn.Module, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or not HAS_MKL:
        return False
    if type(linear) is not nn.Linear:  # an adapter, say
        return False
    weight = linear.weight
    return (
        type(weight) is nn.Parameter and weight.dtype == x.dtype and x.dtype in (torch.float32, torch.float64)
        and weight.numel() >= SMALL and weight.shape[0] % PARTS == 0 and weight.is_contiguous()
        and x.shape[-1] == weight.shape[1] and 0 < x.numel() <= ROWS * weight.shape[1]
        and is_bare(linear)
        and weight.device == x.device and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip
