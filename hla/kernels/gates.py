"""The gates behind the operator and in the MLP, with gradients, each in one launch.

`gated_norm`: RMS norm of each head's output, times the output gate. `silu_product`, `silu_of_halves`: what the MLP has
between its projections. Sums over tokens (for weights) are added up in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import block
from hla.kernels.launch import launch
from hla.kernels.library import Operation
from hla.kernels.partial_sums import added_up
from hla.kernels.shape import sigmoid

if TYPE_CHECKING:
    from hla.norm import RMSNorm

NUMBERS = 2048  # of a tile
STEPS = 16  # tiles a program goes through, and adds up for the gradients of weights


@triton.jit(do_not_specialize=["rows", "steps"])
def _gated_norm(
    X, GATE, WEIGHT, OUT, DOUT, DO, DGATE, DWEIGHT, rows, steps, gate_row, eps,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``rms_norm(o) weight silu(gate)`` of rows of D numbers to OUT, or with DOUT its gradients; DWEIGHT
    ``[programs, D]``. The H rows of a token have one row of GATE and DGATE, which are ``gate_row`` apart."""
    d = tl.arange(0, BD)
    in_d = d < D
    weight = tl.load(WEIGHT + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BD], tl.float32)
    for step in range(0, steps):
        row = tl.cast(tl.program_id(0), tl.int64) * (steps * BT) + step * BT + tl.arange(0, BT)
        inside = (row < rows)[:, None] & in_d[None, :]
        at = row[:, None] * D + d[None, :]
        n = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.full([BT, BD], 1.0, tl.float32)
        if GATE is not None:
            of_gate = (row // H * gate_row + row % H * D)[:, None] + d[None, :]
            z = tl.load(GATE + of_gate, mask=inside, other=0.0).to(tl.float32)
        if DOUT is not None:
            dout = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)  # (asked for before anything waits)
        r = tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
        n *= r
        if GATE is not None:
            s = sigmoid(z)
            gate = z * s
        if DOUT is None:
            tl.store(OUT + at, (n * weight * gate).to(OUT.dtype.element_ty), mask=inside)
        else:
            if GATE is not None:
                dz = dout * n * weight * (s * (1.0 + z * (1.0 - s)))
                tl.store(DGATE + of_gate, dz.to(DGATE.dtype.element_ty), mask=inside)
            dout *= gate
            dweight += tl.sum(dout * n, 0)
            dout *= weight
            do = r * (dout - n * (tl.sum(dout * n, 1) / D)[:, None])
            tl.store(DO + at, do.to(DO.dtype.element_ty), mask=inside)
    if DOUT is not None:
        tl.store(DWEIGHT + tl.program_id(0) * D + d, dweight, mask=in_d)


def _run_gated_norm(plan: str, o: Tensor, gate: Tensor | None, weight: Tensor, dout: Tensor | None) -> list[Any]:
    """[output], or with its gradient [those of o, gate, weight]."""
    H, D = o.shape[-2:]
    size = block(D)
    rows, tokens = o.numel() // D, max(1, NUMBERS // size)
    steps = 1 if dout is None else max(1, min(STEPS, rows // tokens // 256))
    programs = -(-rows // (tokens * steps))
    results: list[Any] = [torch.empty_like(o)]
    if dout is not None:
        dgate = None if gate is None else torch.empty_like(gate)
        if dgate is not None and dgate.shape[-1] > H * D:
            dgate[..., H * D :] = 0
        results += [dgate, o.new_empty(programs, D, dtype=torch.float32)]
    if rows:
        pointers = (results[0], None, None, None, None) if dout is None else (None, dout, *results)
        launch(
            _gated_norm, programs, o, gate, weight, *pointers, rows, steps, 0 if gate is None else gate.shape[-1],
            float(plan), H=H, D=D, BD=size, BT=tokens, warps=4,
        )  # fmt: skip
    return results


def _norm_backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    o, gate, weight = tensors
    do, dgate, dweight = _run_gated_norm(plan, o, gate, weight, grads[0].contiguous())
    found = [do, dgate, added_up(dweight).to(weight.dtype)]
    return [y if need else None for y, need in zip(found, needed, strict=True)]


_norm_operation = Operation(
    "gated_norm",
    lambda plan, o, gate, weight, *, keep: (_run_gated_norm(plan, o, gate, weight, None), []),
    lambda plan, o, gate, weight: ([o.new_empty(o.shape)], []),
    _norm_backward,
    lambda plan: 1,
)


def gated_norm(norm: RMSNorm, o: Tensor, gate: Tensor | None) -> Tensor:
    """``norm(o).flatten(2) * silu(gate)`` in the dtype of o: o ``[B, T, H, D]``; gate ``[B, T, N]``, of which the first
    H D columns are read, or None."""
    (out,) = _norm_operation(
        repr(norm.eps), 1, o.contiguous(), None if gate is None else gate.contiguous(), norm.shared_weight()
    )
    return out.flatten(2)


@triton.jit
def _silu_product(
    A, B, OUT, DOUT, DA, DB, numbers, row, SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``silu(a) b`` to OUT, or with DOUT its gradients; rows have SIZE numbers, those of a and b are ``row`` apart."""
    first = tl.cast(tl.program_id(0), tl.int64) * N
    # (What is divided anew for every number is small, and by a constant.)
    column = (first % SIZE).to(tl.int32) + tl.arange(0, N)
    at = (first // SIZE + column // SIZE) * row + column % SIZE
    out = first + tl.arange(0, N)
    live = out < numbers
    a = tl.load(A + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(B + at, mask=live, other=0.0).to(tl.float32)
    s = sigmoid(a)
    if DOUT is None:
        tl.store(OUT + out, (a * s * b).to(OUT.dtype.element_ty), mask=live)
    else:
        dout = tl.load(DOUT + out, mask=live, other=0.0).to(tl.float32)
        tl.store(DA + at, (dout * b * (s * (1.0 + a * (1.0 - s)))).to(DA.dtype.element_ty), mask=live)
        tl.store(DB + at, (dout * a * s).to(DB.dtype.element_ty), mask=live)


def _halves(both: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return both[..., :size], both[..., size : 2 * size]


def _product_forward(plan: str, a, b, *, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    size, row = int(plan), a.shape[-1]
    out = a.new_empty(*a.shape[:-1], size)
    a, b = _halves(a, size) if b is None else (a, b)
    launch(
        _silu_product, -(-out.numel() // NUMBERS), a, b, out, None, None, None, out.numel(), row,
        SIZE=size, N=NUMBERS, warps=4,
    )  # fmt: skip
    return [out], []


def _product_backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    (a, b), size, dout = tensors, int(plan), grads[0].contiguous()
    row, da = a.shape[-1], torch.empty_like(a)
    found = [da, None if b is None else torch.empty_like(b)]
    db = found[1]
    if b is None:
        da[..., 2 * size :] = 0  # (there may be no such columns)
        (a, b), (da, db) = _halves(a, size), _halves(da, size)
    launch(
        _silu_product, -(-dout.numel() // NUMBERS), a, b, None, dout, da, db, dout.numel(), row,
        SIZE=size, N=NUMBERS, warps=4,
    )  # fmt: skip
    return [y if need else None for y, need in zip(found, needed, strict=True)]


_product_operation = Operation(
    "silu_product",
    _product_forward,
    lambda plan, a, b: ([a.new_empty(*a.shape[:-1], int(plan))], []),
    _product_backward,
    lambda plan: 1,
)


def silu_product(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a) * b``, of tensors of one shape and dtype."""
    return _product_operation(str(a.shape[-1]), 1, a.contiguous(), b.contiguous())[0]


def silu_of_halves(both: Tensor, size: int) -> Tensor:
    """``silu(a) * b`` of ``both = [a | b | anything]``, where a and b have ``size`` columns."""
    return _product_operation(str(size), 1, both.contiguous(), None)[0]
