"""``sum_t w_t a_t b_t^T`` in Triton, for the summaries of segments: passes over the tokens, and readings back.

`moment` is one such sum, `moments_of_keys` the two of `hla_q`, whose keys then get one gradient in one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import block
from hla.kernels.launch import launch
from hla.kernels.library import Operation
from hla.kernels.linear_attn import _config, sum_heads
from hla.kernels.query_side_kernels import _segment
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
    _, batch, start, stop = _segment(None, slot, per_sequence, segment, length)
    rows = tl.arange(0, C)
    ca = tl.arange(0, BA)
    cb = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    A += batch * a_b + tl.cast(h // ga, tl.int64) * a_h
    B += batch * b_b + tl.cast(h // gb, tl.int64) * b_h
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


@triton.jit(do_not_specialize=["length", "segment", "per_sequence", "heads", "gx", "gx2", "gy", "gw"])
def _weighted_read(
    X, M, X2, M2, W, Y, OUT, DOT, length, segment, per_sequence, heads, gx, gx2, gy, gw, x_b, x_t, x_h,
    x2_b, x2_t, x2_h, y_b, y_t, y_h, m_b, m_h, m_x, m_o, m2_b, m2_h, m2_x, m2_o,
    DX: tl.constexpr, DX2: tl.constexpr, DO: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BX2: tl.constexpr,
    BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of ``out_t = w_t (M^T x_t + M2^T x2_t)`` for the tokens of a segment, one head; DOT gets the dots of y
    with what is weighted."""
    blocks: tl.constexpr = (DO + BV - 1) // BV
    column = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks) % heads
    slot = tl.program_id(0) // (blocks * heads)
    _, batch, start, stop = _segment(None, slot, per_sequence, segment, length)
    rows = tl.arange(0, C)
    cx = tl.arange(0, BX)
    co = column * BV + tl.arange(0, BV)
    p = M + batch * m_b + h * m_h + cx[:, None] * m_x + co[None, :] * m_o
    m = tl.load(p, mask=(cx < DX)[:, None] & (co < DO)[None, :], other=0.0).to(OPERAND)
    X += batch * x_b + tl.cast(h // gx, tl.int64) * x_h
    if X2 is not None:
        cx2 = tl.arange(0, BX2)
        p = M2 + batch * m2_b + h * m2_h + cx2[:, None] * m2_x + co[None, :] * m2_o
        m2 = tl.load(p, mask=(cx2 < DX2)[:, None] & (co < DO)[None, :], other=0.0).to(OPERAND)
        X2 += batch * x2_b + tl.cast(h // gx2, tl.int64) * x2_h
    for i in range(0, tl.cdiv(stop - start, C)):
        t = start + i * C
        live = t + rows < stop
        row = tl.cast(t, tl.int64)
        token = batch * length + row + rows
        in_x = live[:, None] if DX == BX else live[:, None] & (cx < DX)[None, :]
        in_o = live[:, None] if DO == blocks * BV else live[:, None] & (co < DO)[None, :]
        x = tl.load(X + row * x_t + (rows[:, None] * x_t + cx[None, :]), mask=in_x, other=0.0).to(OPERAND)
        out = tl.dot(x, m, input_precision=PRECISION)
        if X2 is not None:
            in_x2 = live[:, None] if DX2 == BX2 else live[:, None] & (cx2 < DX2)[None, :]
            px2 = X2 + row * x2_t + (rows[:, None] * x2_t + cx2[None, :])
            x2 = tl.load(px2, mask=in_x2, other=0.0).to(OPERAND)
            out = tl.dot(x2, m2, out, input_precision=PRECISION)
        if DOT is not None:
            py = Y + batch * y_b + tl.cast(h // gy, tl.int64) * y_h + row * y_t + (rows[:, None] * y_t + co[None, :])
            y = tl.load(py, mask=in_o, other=0.0).to(tl.float32)
            tl.store(DOT + (token * heads + h) * blocks + column, tl.sum(y * out, 1), mask=live)
        if W is not None:
            out *= tl.load(W + token * (heads // gw) + h // gw, mask=live, other=0.0)[:, None]
        po = OUT + ((batch * length + row) * heads + h) * DO + (rows[:, None] * (heads * DO) + co[None, :])
        tl.store(po, out.to(OUT.dtype.element_ty), mask=in_o)


def _sum(a: Tensor, b: Tensor, w: Tensor | None) -> Tensor:
    (B, T, _, DA), DB, heads = a.shape, b.shape[3], max(a.shape[2], b.shape[2])
    dtype, precision, config = _config([a, b], w, False)
    blocks = -(-DB // config.columns)
    shape = cut(B, T, heads * blocks, None, a.device)
    parts = torch.empty(shape.slots, heads, DA, DB, dtype=torch.float32, device=a.device)
    launch(
        _moment, shape.slots * heads * blocks,
        a, b, w, parts, T, shape.segment, shape.per_sequence, heads, heads // a.shape[2], heads // b.shape[2],
        1 if w is None else heads // w.shape[2], *a.stride()[:3], *b.stride()[:3],
        DA=DA, DB=DB, C=config.chunk, BA=block(DA), BV=config.columns, OPERAND=dtype, PRECISION=precision,
        warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return parts.view(B, -1, heads, DA, DB).sum(1)


def _read(
    y: Tensor, w: Tensor | None, dot: bool, x: Tensor, m: Tensor, x2: Tensor | None = None, m2: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``w_t (m^T x_t + m2^T x2_t)``, a gradient of y, in its shape and dtype; the dots of y with what is weighted."""
    (B, T), heads, DX, DO = x.shape[:2], m.shape[1], x.shape[3], m.shape[3]
    DX2 = DX if x2 is None else x2.shape[3]
    dtype, precision, config = _config([x, y], w, False)
    blocks = -(-DO // config.columns)
    shape = cut(B, T, heads * blocks, None, x.device)
    out = torch.empty(B, T, heads, DO, dtype=y.dtype if heads == y.shape[2] else torch.float32, device=x.device)
    dots = torch.empty(B, T, heads, blocks, dtype=torch.float32, device=x.device) if dot else None
    launch(
        _weighted_read, shape.slots * heads * blocks,
        x, m, x2, m2, w, y if dot else None, out, dots, T, shape.segment, shape.per_sequence, heads,
        heads // x.shape[2], 1 if x2 is None else heads // x2.shape[2], heads // y.shape[2],
        1 if w is None else heads // w.shape[2], *x.stride()[:3], *((0, 0, 0) if x2 is None else x2.stride()[:3]),
        *y.stride()[:3], *m.stride(), *((0, 0, 0, 0) if m2 is None else m2.stride()),
        DX=DX, DX2=DX2, DO=DO, C=config.chunk, BX=block(DX), BX2=block(DX2), BV=config.columns, OPERAND=dtype,
        PRECISION=precision, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return sum_heads(out, y.shape[2]).to(y.dtype), None if dots is None else dots.sum(3)


def _forward(plan: str, a, b, w, *, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    if plan == "keys":
        return [_sum(a, a, w), _sum(a, b, w)], []
    return [_sum(a, a if b is None else b, w)], []


def _fake(plan: str, a, b, w) -> tuple[list[Tensor], list[Tensor]]:
    def new(y: Tensor) -> Tensor:
        return a.new_empty(a.shape[0], max(a.shape[2], y.shape[2]), a.shape[3], y.shape[3], dtype=torch.float32)

    return [new(y) for y in ((a, b) if plan == "keys" else (a if b is None else b,))], []


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    a, b, w = tensors
    weighs = w is not None and needed[2]
    dmoments = [None if x is None else x.contiguous() for x in grads]
    dS, dP = dmoments if plan == "keys" else (dmoments[0], None) if b is None else (None, dmoments[0])
    both = None if dS is None else dS + dS.mT
    db = dots_b = None
    if both is None:
        assert dP is not None
        da, dots = _read(a, w, weighs, b, dP.mT)
    elif dP is None:
        da, dots = _read(a, w, weighs, a, both)
        dots = None if dots is None else 0.5 * dots  # a token's own write is read by both factors
    else:
        da, dots = _read(a, w, weighs, a, both, b, dP.mT)
    if dP is not None and (needed[1] or (weighs and both is not None)):
        db, dots_b = _read(b, w, weighs and both is not None, a, dP)
    if dots is not None and dots_b is not None:
        dots = 0.5 * (dots + dots_b)  # of (2 a dS a + a dP b) and a dP b
    dw = None if dots is None else sum_heads(dots, w.shape[2]).to(w.dtype)
    return [x if need else None for x, need in zip([da, db, dw], needed, strict=True)]


_operation = Operation("moment", _forward, _fake, _backward, lambda plan: 2 if plan == "keys" else 1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def moment(a: Tensor, b: Tensor | None, w: Tensor | None) -> Tensor:
    """``sum_t w_t a_t b_t^T [B, H, Da, Db]`` in float32, H the larger head count; b None: b is a.

    Args:
        a: ``[B, T, Ha, Da]``; b: ``[B, T, Hb, Db]``; w: ``[B, T, Hw]``; Hw divides H.
    """
    w = None if w is None else w.float().contiguous()
    return _operation("", 1, _rows(a), None if b is None else _rows(b), w)[0]


def moments_of_keys(k: Tensor, v: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sum_t w_t k_t k_t^T`` and ``sum_t w_t k_t v_t^T`` (see `moment`) of k ``[B, T, H, K]``, v ``[B, T, H, V]``."""
    S, P = _operation("keys", 2, _rows(k), _rows(v), None if w is None else w.float().contiguous())
    return S, P
