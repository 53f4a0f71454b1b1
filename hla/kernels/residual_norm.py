"""The residual stream of a block: what a sublayer adds to it, and the norm that the next one reads, in one pass.

Operation by operation a norm under autocast is an addition, a norm in float32 and a cast, and twice as many going back,
among them the sum of the gradients that reach the stream through the norm and past it. In numbers of 32 bits moved per
element, forward and backward: 3 and 4 instead of 6 and 11.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import block
from hla.kernels.launch import launch
from hla.kernels.library import refuse_double_backward
from hla.kernels.partial_sums import added_up

NUMBERS = 2048  # of a tile, unless one row is more
STEPS = 16  # tiles a program goes through, and adds up for the gradient of the weight
PROGRAMS = 512  # that there should be before they have more than one tile each


@triton.jit(do_not_specialize=["rows"])
def _add_norm(X, BRANCH, WEIGHT, SUM, OUT, rows, eps, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """``s = x + branch`` (x without) of rows of D numbers to SUM, ``s / rms(s) weight`` to OUT."""
    d = tl.arange(0, BD)
    row = tl.cast(tl.program_id(0), tl.int64) * BT + tl.arange(0, BT)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    s = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH is not None:
        s += tl.load(BRANCH + at, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(SUM.dtype.element_ty)
        tl.store(SUM + at, rounded, mask=inside)
        s = rounded.to(tl.float32)  # the norm of what later layers see
    weight = tl.load(WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)
    s *= tl.rsqrt(tl.sum(s * s, 1) / D + eps)[:, None]
    tl.store(OUT + at, (s * weight[None, :]).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _add_norm_gradient(
    S, WEIGHT, DS, DOUT, DX, DBRANCH, DWEIGHT, rows, steps, eps, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """What reaches s past the norm (DS, or nothing) and through it, to DX and DBRANCH; DWEIGHT ``[programs, D]``."""
    d = tl.arange(0, BD)
    weight = tl.load(WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BD], tl.float32)
    for step in range(0, steps):
        row = (tl.cast(tl.program_id(0), tl.int64) * steps + step) * BT + tl.arange(0, BT)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        n = tl.load(S + at, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)
        ds = tl.zeros([BT, BD], tl.float32)
        if DS is not None:
            ds = tl.load(DS + at, mask=inside, other=0.0).to(tl.float32)  # (asked for before anything waits)
        r = tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
        n *= r
        dweight += tl.sum(dout * n, 0)
        dout *= weight
        dx = r * (dout - n * (tl.sum(dout * n, 1) / D)[:, None]) + ds
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
        if DBRANCH is not None:
            tl.store(DBRANCH + at, dx.to(DBRANCH.dtype.element_ty), mask=inside)
    tl.store(DWEIGHT + tl.cast(tl.program_id(0), tl.int64) * D + d, dweight, mask=d < D)


def _tile(D: int) -> tuple[int, int, int]:
    """Columns and rows of a tile, and warps."""
    size = block(D)
    return size, max(1, NUMBERS // size), min(16, max(4, size // 256))


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
        x, branch = x.contiguous(), None if branch is None else branch.contiguous()
        D = x.shape[-1]
        rows, (size, tokens, warps) = x.numel() // D, _tile(D)
        s = x if branch is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
        y = torch.empty_like(x, dtype=dtype)
        launch(
            _add_norm, -(-rows // tokens), x, branch, weight, None if branch is None else s, y, rows, eps,
            D=D, BD=size, BT=tokens, warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(s, weight)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if branch is None else branch.dtype)
        ctx.set_materialize_grads(False)
        return s, y

    @staticmethod
    def backward(ctx, ds: Tensor | None, dy: Tensor | None):
        refuse_double_backward()
        (s, weight), (x_dtype, branch_dtype) = ctx.saved_tensors, ctx.dtypes
        if dy is None:
            return ds, None if branch_dtype is None or ds is None else ds.to(branch_dtype), None, None, None
        D = s.shape[-1]
        rows, (size, tokens, warps) = s.numel() // D, _tile(D)
        steps = max(1, min(STEPS, rows // tokens // PROGRAMS))
        programs = -(-rows // (tokens * steps))
        dx = torch.empty_like(s, dtype=x_dtype)
        own = branch_dtype not in (None, x_dtype)
        dbranch = torch.empty_like(s, dtype=branch_dtype) if own else None if branch_dtype is None else dx
        dweight = torch.empty(programs, D, dtype=torch.float32, device=s.device)
        launch(
            _add_norm_gradient, programs, s, weight, None if ds is None else ds.contiguous(), dy.contiguous(), dx,
            dbranch if own else None, dweight, rows, steps, ctx.eps, D=D, BD=size, BT=tokens, warps=warps,
        )  # fmt: skip
        return dx, dbranch, added_up(dweight).to(weight.dtype), None, None


def residual_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``s = x + branch``, and ``s / sqrt(mean(s^2) + eps) * weight`` in a dtype; differentiable.

    Sums are float32. Without a branch s is x; reading it instead of x lets the gradients of both meet in one kernel.

    Args:
        x, branch: ``[..., D]`` of one shape, D up to `hla.norm.WIDEST`; branch may be None.
        weight: ``[D]``.
    """
    return _ResidualNorm.apply(x, branch, weight, eps, dtype)
