"""``sum_t w_t a_t b_t^T`` in Triton, for the summaries of segments: one pass over the tokens, and one (or two) back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import block
from hla.kernels.launch import launch
from hla.kernels.library import Operation
from hla.kernels.linear_attn import _config, sum_heads
from hla.kernels.segments import cut


@triton.jit(do_not_specialize=["length", "segment", "per_sequence", "heads", "ga", "gb", "gw"])
def _moment(
    A, B, W, OUT, length, segment, per_sequence, heads, ga, gb, gw, a_b, a_t, a_h, b_b, b_t, b_h,
    DA: tl.constexpr, DB: tl.constexpr, C: tl.constexpr, BA: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of the sum over one segment, one head: OUT ``[slots, heads, DA, DB]``."""
    blocks: tl.constexpr = (DB + BV - 1) // BV
    h = (tl.program_id(0) // blocks) % heads
    slot = tl.program_id(0) // (blocks * heads)
    batch = tl.cast(slot // per_sequence, tl.int64)
    start = (slot % per_sequence) * segment
    stop = tl.minimum(start + segment, length)
    rows = tl.arange(0, C)
    ca = tl.arange(0, BA)
    cb = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    A += batch * a_b + (h // ga) * a_h
    B += batch * b_b + (h // gb) * b_h
    acc = tl.zeros([BA, BV], tl.float32)
    for i in range(0, tl.cdiv(stop - start, C)):
        t = start + i * C
        live = t + rows < stop
        row = tl.cast(t, tl.int64)
        in_a = live[:, None] if DA == BA else live[:, None] & (ca < DA)[None, :]
        in_b = live[:, None] if DB == blocks * BV else live[:, None] & (cb < DB)[None, :]
        a = tl.load(A + row * a_t + (rows[:, None] * a_t + ca[None, :]), mask=in_a, other=0.0).to(OPERAND)
        b = tl.load(B + row * b_t + (rows[:, None] * b_t + cb[None, :]), mask=in_b, other=0.0).to(OPERAND)
        if W is not None:
            w = tl.load(W + (batch * length + row + rows) * (heads // gw) + h // gw, mask=live, other=0.0)
            b = (b.to(tl.float32) * w[:, None]).to(OPERAND)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    p = OUT + (tl.cast(slot, tl.int64) * heads + h) * (DA * DB) + ca[:, None] * DB + cb[None, :]
    tl.store(p, acc, mask=(ca < DA)[:, None] & (cb < DB)[None, :])


@triton.jit(do_not_specialize=["length", "segment", "per_sequence", "heads", "gx", "gy", "gw"])
def _weighted_read(
    X, M, W, Y, OUT, DOT, length, segment, per_sequence, heads, gx, gy, gw, x_b, x_t, x_h, y_b, y_t, y_h,
    m_b, m_h, m_x, m_o,
    DX: tl.constexpr, DO: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BV: tl.constexpr, ADD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of ``out_t = w_t M^T x_t`` for the tokens of a segment, one head; DOT gets ``y_t . M^T x_t``."""
    blocks: tl.constexpr = (DO + BV - 1) // BV
    column = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks) % heads
    slot = tl.program_id(0) // (blocks * heads)
    batch = tl.cast(slot // per_sequence, tl.int64)
    start = (slot % per_sequence) * segment
    stop = tl.minimum(start + segment, length)
    rows = tl.arange(0, C)
    cx = tl.arange(0, BX)
    co = column * BV + tl.arange(0, BV)
    p = M + batch * m_b + h * m_h + cx[:, None] * m_x + co[None, :] * m_o
    m = tl.load(p, mask=(cx < DX)[:, None] & (co < DO)[None, :], other=0.0).to(OPERAND)
    X += batch * x_b + (h // gx) * x_h
    for i in range(0, tl.cdiv(stop - start, C)):
        t = start + i * C
        live = t + rows < stop
        row = tl.cast(t, tl.int64)
        token = batch * length + row + rows
        in_x = live[:, None] if DX == BX else live[:, None] & (cx < DX)[None, :]
        in_o = live[:, None] if DO == blocks * BV else live[:, None] & (co < DO)[None, :]
        x = tl.load(X + row * x_t + (rows[:, None] * x_t + cx[None, :]), mask=in_x, other=0.0).to(OPERAND)
        out = tl.dot(x, m, input_precision=PRECISION)
        if DOT is not None:
            py = Y + batch * y_b + (h // gy) * y_h + row * y_t + (rows[:, None] * y_t + co[None, :])
            y = tl.load(py, mask=in_o, other=0.0).to(tl.float32)
            tl.store(DOT + (token * heads + h) * blocks + column, tl.sum(y * out, 1), mask=live)
        if W is not None:
            out *= tl.load(W + token * (heads // gw) + h // gw, mask=live, other=0.0)[:, None]
        po = OUT + ((batch * length + row) * heads + h) * DO + (rows[:, None] * (heads * DO) + co[None, :])
        if ADD:
            out += tl.load(po, mask=in_o, other=0.0).to(tl.float32)
        tl.store(po, out.to(OUT.dtype.element_ty), mask=in_o)


def _forward(plan: str, a, b, w, *, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    other = a if b is None else b
    (B, T, _, DA), DB, heads = a.shape, other.shape[3], max(a.shape[2], other.shape[2])
    dtype, precision, config = _config([a, other], w, False)
    blocks = -(-DB // config.columns)
    shape = cut(B, T, heads * blocks, None, a.device)
    parts = torch.empty(shape.slots, heads, DA, DB, dtype=torch.float32, device=a.device)
    launch(
        _moment, shape.slots * heads * blocks,
        a, other, w, parts, T, shape.segment, shape.per_sequence, heads, heads // a.shape[2], heads // other.shape[2],
        1 if w is None else heads // w.shape[2], *a.stride()[:3], *other.stride()[:3],
        DA=DA, DB=DB, C=config.chunk, BA=block(DA), BV=config.columns, OPERAND=dtype, PRECISION=precision,
        warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return [parts.view(B, -1, heads, DA, DB).sum(1)], []


def _fake(plan: str, a, b, w) -> tuple[list[Tensor], list[Tensor]]:
    other = a if b is None else b
    heads = max(a.shape[2], other.shape[2])
    return [a.new_empty(a.shape[0], heads, a.shape[3], other.shape[3], dtype=torch.float32)], []


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    a, b, w = tensors
    other = a if b is None else b
    heads = max(a.shape[2], other.shape[2])
    dmoment = grads[0].contiguous()

    def read(x: Tensor, m: Tensor, y: Tensor, out: Tensor | None = None, dot: bool = False):
        """``w_t m^T x_t``, added to out, and the dots of y with ``m^T x_t``."""
        (B, T), DX, DO = x.shape[:2], x.shape[3], m.shape[3]
        dtype, precision, config = _config([x, y], w, False)
        blocks = -(-DO // config.columns)
        shape = cut(B, T, heads * blocks, None, x.device)
        add, dots = out is not None, None
        if out is None:
            out = torch.empty(B, T, heads, DO, dtype=y.dtype if heads == y.shape[2] else torch.float32, device=x.device)
        if dot:
            dots = torch.empty(B, T, heads, blocks, dtype=torch.float32, device=x.device)
        launch(
            _weighted_read, shape.slots * heads * blocks,
            x, m, w, y if dot else None, out, dots, T, shape.segment, shape.per_sequence, heads, heads // x.shape[2],
            heads // y.shape[2], 1 if w is None else heads // w.shape[2], *x.stride()[:3], *y.stride()[:3], *m.stride(),
            DX=DX, DO=DO, C=config.chunk, BX=block(DX), BV=config.columns, ADD=add, OPERAND=dtype, PRECISION=precision,
            warps=config.warps, stages=config.stages,
        )  # fmt: skip
        return out, None if dots is None else dots.sum(3)

    da, dots = read(other, dmoment.mT, a, dot=w is not None and needed[2])
    db = None
    if b is None:
        da, _ = read(a, dmoment, a, out=da)
    elif needed[1]:
        db = sum_heads(read(a, dmoment, b)[0], b.shape[2]).to(b.dtype)
    dw = None if dots is None else sum_heads(dots, w.shape[2]).to(w.dtype)
    found = [sum_heads(da, a.shape[2]).to(a.dtype), db, dw]
    return [x if need else None for x, need in zip(found, needed, strict=True)]


_operation = Operation("moment", _forward, _fake, _backward, lambda plan: 1)


def moment(a: Tensor, b: Tensor | None, w: Tensor | None) -> Tensor:
    """``sum_t w_t a_t b_t^T [B, H, Da, Db]`` in float32, H the larger head count; b None: b is a.

    Args:
        a: ``[B, T, Ha, Da]``; b: ``[B, T, Hb, Db]``; w: ``[B, T, Hw]``; Hw divides H.
    """
    last = lambda x: x if x is None or x.stride(-1) == 1 else x.contiguous()  # noqa: E731
    return _operation("", 1, last(a), last(b), None if w is None else w.float().contiguous())[0]
