"""Linear maps that read the same input, as one product where a model trains on a GPU.

Maps with a few outputs (gates, coefficients) cost three skinny products each, and every map a gradient of the input of
its own, which something must add to the others. Joined, small maps are columns of a large one, the gradients of the
input are added within the products, and a kernel that reads several outputs reads, and gives gradients of, one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hla.ops.checks import HAS_TRITON
from hla.projection import is_bare, project

MULTIPLE = 64  # of columns: rows of 128 bytes, which kernels and matrix products read fastest


def joined(x: Tensor, groups: Sequence[Sequence[nn.Module]]) -> list[Tensor]:
    """Of each group the outputs of its linear maps side by side ``[..., N]``, and zeros up to a multiple of 64 columns.

    Where maps cannot be joined (see `joinable`), each is called, and what they give is copied together.

    Args:
        x: ``[..., D]``, which all maps read.
    """
    everything = [linear for group in groups for linear in group]
    if not joinable(x, everything):
        return [_beside_each_other([project(linear, x) for linear in group]) for group in groups]
    weights = [linear.get_parameter("weight") for linear in everything]
    sizes = [len(group) for group in groups]
    if torch.compiler.is_compiling():  # (which has gradients of its own)
        return [F.linear(x, torch.cat([*part, _zero_rows(part)])) for part in _parted(weights, sizes)]
    return list(_Joined.apply(x, _computes_in(x), sizes, *weights))


def joinable(x: Tensor, linears: Sequence[nn.Module]) -> bool:
    """Whether maps of x can be one product, and it pays: their weights are copied (under autocast they are anyway)."""
    if not has_kernels(x) or type(x) is not Tensor:  # (a subclass may be spread over devices, or fake)
        return False
    cast = torch.is_autocast_enabled(x.device.type)
    return (torch.is_grad_enabled() or cast) and all(_is_plain(linear, x, cast) for linear in linears)


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor."""
    return x.is_cuda and HAS_TRITON and x.dtype != torch.float64


def _is_plain(linear: nn.Module, x: Tensor, cast: bool) -> bool:
    """Whether calling it is a product with a weight that is here, and no more (no adapter, say)."""
    if type(linear) is not nn.Linear or linear.bias is not None or not is_bare(linear):
        return False
    weight = linear.weight
    fits = weight.dtype == x.dtype or (cast and weight.is_floating_point() and weight.dtype != torch.float64)
    return type(weight) is nn.Parameter and weight.device == x.device and fits


def _computes_in(x: Tensor) -> torch.dtype:
    """As `F.linear` does."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def _beside_each_other(outputs: list[Tensor]) -> Tensor:
    columns = sum(y.shape[-1] for y in outputs)
    if len(outputs) == 1 and columns % MULTIPLE == 0:
        return outputs[0]
    padding = outputs[0].new_zeros(*outputs[0].shape[:-1], -columns % MULTIPLE)
    return torch.cat([*outputs, padding], -1)


def _zero_rows(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].new_zeros(-sum(w.shape[0] for w in weights) % MULTIPLE, weights[0].shape[1])


def _parted(weights: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [weights[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One matrix ``[N, D]`` of the weights' rows and rows of zeros: the one weight itself, or a copy."""
    rows = sum(w.shape[0] for w in weights)
    if len(weights) == 1 and weights[0].dtype == dtype and rows % MULTIPLE == 0:
        return weights[0]
    stacked = weights[0].new_empty(rows + -rows % MULTIPLE, weights[0].shape[1], dtype=dtype)
    for part, weight in zip(stacked[:rows].split([w.shape[0] for w in weights]), weights, strict=True):
        part.copy_(weight)
    stacked[rows:].zero_()
    return stacked


class _Joined(torch.autograd.Function):
    """Of groups of ``sizes`` weights the products of x with each, computed in ``dtype``."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, sizes: Sequence[int], *weights: Tensor):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        stacks = [_stacked(group, dtype) for group in _parted(weights, sizes)]
        needs_x, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        # What is but a copy is made again: a sharded model gives whole weights back between forward and backward.
        ctx.again = all(w.dtype == dtype for w in weights)
        kept = weights if ctx.again else stacks
        ctx.save_for_backward(flat if any(needed) else None, *(kept if needs_x else ()))
        ctx.shape, ctx.dtype, ctx.sizes, ctx.device = x.shape, x.dtype, sizes, x.device.type
        ctx.rows, ctx.dtypes = [w.shape[0] for w in weights], [w.dtype for w in weights]
        ctx.set_materialize_grads(False)
        return tuple((flat @ stack.mT).view(*x.shape[:-1], stack.shape[0]) for stack in stacks)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        from hla.kernels.library import refuse_double_backward

        refuse_double_backward()
        with torch.autocast(ctx.device, enabled=False):  # (a pass back inside one would round, and not add in place)
            return _Joined._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx, grads: Sequence[Tensor | None]):
        flat, *kept = ctx.saved_tensors
        dx, dweights, first = None, [], 0
        for i, (dy, size) in enumerate(zip(grads, ctx.sizes, strict=True)):
            mine = slice(first, first + size)
            first += size
            needed = ctx.needs_input_grad[3:][mine]
            if dy is None:
                dweights += [None] * size
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if kept:
                stack = _stacked(kept[mine], dy.dtype) if ctx.again else kept[i]
                dx = dy @ stack if dx is None else dx.addmm_(dy, stack)
            dweights += _of_weights(dy, flat, ctx.rows[mine], ctx.dtypes[mine], needed)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, *dweights


def _of_weights(dy: Tensor, x: Tensor, rows: list[int], dtypes: list[torch.dtype], needed: Sequence[bool]) -> list:
    """The gradients of a group's weights: rows of one product, or, where some are frozen, products of their own."""
    columns = sum(rows)
    if all(needed) and len(set(dtypes)) == 1:
        return list(_product(dy.mT, x, dtypes[0])[:columns].split(rows))
    parts = zip(dy[:, :columns].split(rows, 1), dtypes, needed, strict=True)
    return [_product(part.mT, x, dtype) if need else None for part, dtype, need in parts]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype, to which it is rounded once."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
