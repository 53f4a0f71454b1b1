"""The primitive in Triton: one kernel walks the chunks of a segment with the state in registers.

    out_t = factor_t * sum_j E_tj w_j (q_t . k_j) v_j  +  ridge_t residual_t  (+ what out holds already)

``E`` is the decayed mask of `hla.ops.linear_attn`: inclusive, strict or reversed. With the factors ``factor_t`` on
reading and ``w_j`` on writing the same kernel is the forward pass of a `Stage` and each of its three gradients
(``dq = LA(do, v, k)``, ``dk = LA^r(v, do, q)``, ``dv = LA^r(k, q, do)``). Without a query it only accumulates. The
last two walk the same state, transposed: where a program has all of its columns, one walk with two queries gives both.

**Parallelism.** A program owns one segment of one sequence, one head and some columns of the values (columns of the
state are independent). Where sequences x heads x column blocks do not fill the card, sequences are split into several
segments (`Cut`): a first launch accumulates the state of each from zero, `enter` folds them in order, and the walk
starts from what enters. No atomics anywhere: the same inputs give the same bits.

**Precision.** States, decays and accumulators are float32. Operands of the matrix units are bfloat16 for bfloat16
inputs, tf32 for float16 ones (states leave float16's range), and three tf32 products ("tf32x3") for float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import Config, block, device_config, walk_config
from hla.kernels.launch import INTERPRETED, launch
from hla.kernels.segments import Cut, enter


@triton.jit
def _decayed(scores, read, mask, late, c, total, w, REVERSE: tl.constexpr):
    """Scores within a chunk, and what is read of the state before it, with decays (or late is None) and weights."""
    if late is not None:
        scores *= tl.exp2(late[None, :] - c[:, None] if REVERSE else late[:, None] - c[None, :])
        read *= tl.exp2(total - c if REVERSE else late)[:, None]
    if w is not None:
        scores *= w[None, :]
    return tl.where(mask, scores, 0.0), read


@triton.jit(
    do_not_specialize=[
        "length", "segment", "per_sequence", "heads",
        "gq", "gk", "gv", "gu", "gg", "gs", "gf", "gw", "gi", "gr", "gx",
    ]
)  # fmt: skip
def walk(
    Q, K, V, U, OUT, OUT_U, G, FACTOR, WRITE, RIDGE, RESIDUAL, X, DOT, OWN, ENTER, LEAVE, TOTAL, SLOTS,
    factor, ridge, length, segment, per_sequence, heads, gq, gk, gv, gu, gg, gs, gf, gw, gi, gr, gx,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, u_b, u_t, u_h, o_b, o_t, o_h, ou_b, ou_t, ou_h, r_b, r_t, r_h,
    x_b, x_t, x_h, e_n, e_h, e_k, e_v,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, ADD: tl.constexpr, ADD_U: tl.constexpr,
    SPLIT: tl.constexpr, ALL: tl.constexpr,
    EXACT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment, one head, BV columns. Pointers that are None switch their part off at compile time.

    Head h of the output reads head ``h // gq`` of q, and so on. Without Q (the first launch of a split) LEAVE and TOTAL
    get what every segment (without ALL: but the last) accumulates; with it LEAVE gets what leaves the last one. EXACT:
    operands that were rounded to bfloat16 are followed by what the rounding left over, for dots whose differences are
    summed up over the whole sequence (the gradient of the decays), where rounding would add up and the sums cancel. DOT
    then leaves out what a token reads of itself, which goes to OWN.

    U: a query that reads keys by their values, ``sum_j E_tj w_j (u_t . v_j) k_j``, into OUT_U or, without it, into OUT,
    too. Only where BV covers DV, and without DOT and EXACT.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks) % heads
    slot = tl.program_id(0) // (blocks * heads)
    if SLOTS is None:
        sequence = slot // per_sequence
        start = (slot % per_sequence) * segment
        stop = tl.minimum(start + segment, length)
        batch = tl.cast(sequence, tl.int64)
        at_end = slot % per_sequence == (0 if REVERSE else per_sequence - 1)
    else:
        sequence = tl.load(SLOTS + slot * 4)
        start = tl.load(SLOTS + slot * 4 + 1)
        stop = tl.load(SLOTS + slot * 4 + 2)
        position = tl.load(SLOTS + slot * 4 + 3)  # 1: first of its sequence, 2: last, 3: both
        batch = tl.cast(0, tl.int64)
        at_end = (position & (1 if REVERSE else 2)) != 0
        if sequence < 0:
            return
    if Q is None and not ALL:
        if at_end:
            return

    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    cv = block * BV + tl.arange(0, BV)
    if REVERSE:
        mask = rows[:, None] < rows[None, :] if STRICT else rows[:, None] <= rows[None, :]
    else:
        mask = rows[:, None] > rows[None, :] if STRICT else rows[:, None] >= rows[None, :]

    if ENTER is None:
        state = tl.zeros([BK, BV], tl.float32)
    else:
        p = ENTER + tl.cast(slot if SPLIT else sequence, tl.int64) * e_n + (h // gs) * e_h
        p += ck[:, None] * e_k + cv[None, :] * e_v
        state = tl.load(p, mask=(ck < DK)[:, None] & (cv < DV)[None, :], other=0.0).to(tl.float32)
    passed = 0.0

    K += batch * k_b + tl.cast(h // gk, tl.int64) * k_h
    V += batch * v_b + tl.cast(h // gv, tl.int64) * v_h
    chunks = tl.cdiv(stop - start, C)
    for i in range(0, chunks):
        first = start + (chunks - 1 - i if REVERSE else i) * C
        live = first + rows < stop
        row = tl.cast(first, tl.int64)
        at = batch * length + row + rows  # of per-token tensors
        in_k = live[:, None] if DK == BK else live[:, None] & (ck < DK)[None, :]
        in_v = live[:, None] if DV == blocks * BV else live[:, None] & (cv < DV)[None, :]
        k = tl.load(K + row * k_t + (rows[:, None] * k_t + ck[None, :]), mask=in_k, other=0.0).to(OPERAND)
        v = tl.load(V + row * v_t + (rows[:, None] * v_t + cv[None, :]), mask=in_v, other=0.0).to(OPERAND)
        if GATE != 0:
            # In units of log 2. Beyond exp(-110) a decay is zero in float32, and would only cost digits of the sums.
            g = tl.load(G + at * (heads // gg) + h // gg, mask=live, other=0.0).to(tl.float32)
            g = tl.maximum(g * GATE, -110.0) * 1.4426950408889634
            c = tl.cumsum(g, 0)
            total = tl.sum(g, 0)
            passed += total
            late = c - g if STRICT else c  # of a pair of tokens the decay up to the later one, c up to the earlier one
        else:
            late, c, total = None, None, None
        w = None
        if WRITE is not None:
            w = tl.load(WRITE + at * (heads // gw) + h // gw, mask=live, other=0.0)

        if Q is not None:
            pq = Q + batch * q_b + tl.cast(h // gq, tl.int64) * q_h + row * q_t + (rows[:, None] * q_t + ck[None, :])
            q = tl.load(pq, mask=in_k, other=0.0).to(OPERAND)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            rounded = state.to(OPERAND)
            acc = tl.dot(q, rounded, input_precision=PRECISION)
            if EXACT:
                acc = tl.dot(q, (state - rounded.to(tl.float32)).to(OPERAND), acc, input_precision=PRECISION)
            scores, acc = _decayed(scores, acc, mask, late, c, total, w, REVERSE)
            if EXACT and not STRICT:
                # What a token reads of itself does not depend on decays: it would cancel, but for its rounding.
                same = rows[:, None] == rows[None, :]
                own = tl.sum(tl.where(same, scores, 0.0), 1)
                scores = tl.where(same, 0.0, scores)
            rounded = scores.to(OPERAND)
            acc = tl.dot(rounded, v, acc, input_precision=PRECISION)
            if U is not None:
                tl.static_assert(blocks == 1 and DOT is None and not EXACT)
                pu = U + batch * u_b + tl.cast(h // gu, tl.int64) * u_h + row * u_t
                u = tl.load(pu + (rows[:, None] * u_t + cv[None, :]), mask=in_v, other=0.0).to(OPERAND)
                scores = tl.dot(u, tl.trans(v), input_precision=PRECISION)
                other = tl.dot(u, tl.trans(state.to(OPERAND)), input_precision=PRECISION)
                scores, other = _decayed(scores, other, mask, late, c, total, w, REVERSE)
                other = tl.dot(scores.to(OPERAND), k, other, input_precision=PRECISION)
                if OUT_U is None:
                    acc += other
                else:
                    other *= factor
                    pu = OUT_U + batch * ou_b + h * ou_h + row * ou_t + (rows[:, None] * ou_t + ck[None, :])
                    if ADD_U:
                        other += tl.load(pu, mask=in_k, other=0.0).to(tl.float32)
                    tl.store(pu, other.to(OUT_U.dtype.element_ty), mask=in_k)
            if EXACT:
                acc = tl.dot((scores - rounded.to(tl.float32)).to(OPERAND), v, acc, input_precision=PRECISION)

            if DOT is not None:
                px = X + batch * x_b + tl.cast(h // gx, tl.int64) * x_h + row * x_t
                x = tl.load(px + (rows[:, None] * x_t + cv[None, :]), mask=in_v, other=0.0).to(tl.float32)
                tl.store(DOT + (at * heads + h) * blocks + block, tl.sum(x * acc, 1), mask=live)
                if OWN is not None:
                    dot = own * tl.sum(x * v.to(tl.float32), 1) if EXACT and not STRICT else tl.zeros([C], tl.float32)
                    tl.store(OWN + (at * heads + h) * blocks + block, dot, mask=live)
            if EXACT and not STRICT:
                acc += own[:, None] * v.to(tl.float32)
            if FACTOR is not None:
                acc *= tl.load(FACTOR + at * (heads // gf) + h // gf, mask=live, other=0.0)[:, None]
            else:
                acc *= factor
            if RESIDUAL is not None:
                pr = RESIDUAL + batch * r_b + tl.cast(h // gr, tl.int64) * r_h + row * r_t
                r = tl.load(pr + (rows[:, None] * r_t + cv[None, :]), mask=in_v, other=0.0).to(tl.float32)
                if RIDGE is not None:
                    acc += r * tl.load(RIDGE + at * (heads // gi) + h // gi, mask=live, other=0.0)[:, None]
                else:
                    acc += r * ridge
            po = OUT + batch * o_b + h * o_h + row * o_t + (rows[:, None] * o_t + cv[None, :])
            if ADD:
                acc += tl.load(po, mask=in_v, other=0.0).to(tl.float32)
            tl.store(po, acc.to(OUT.dtype.element_ty), mask=in_v)

        if GATE != 0:
            state *= tl.exp2(total)
            weight = tl.exp2(late if REVERSE else total - c)
            if WRITE is not None:
                weight *= w
        elif WRITE is not None:
            weight = w
        if GATE != 0 or WRITE is not None:
            weighted = v.to(tl.float32) * weight[:, None]
            v = weighted.to(OPERAND)
            if EXACT:
                left = (weighted - v.to(tl.float32)).to(OPERAND)
                state = tl.dot(tl.trans(k), left, state, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)

    if LEAVE is not None:
        if (Q is None) | (at_end & (h % gs == 0)):
            p = LEAVE + (tl.cast(slot if Q is None else sequence, tl.int64) * (heads // gs) + h // gs) * (DK * DV)
            p += ck[:, None] * DV + cv[None, :]
            tl.store(p, state, mask=(ck < DK)[:, None] & (cv < DV)[None, :])
            if TOTAL is not None:
                if block == 0:
                    tl.store(TOTAL + slot * heads + h, passed)


class Read(NamedTuple):
    """Results of `read`: o ``[B, T, H, V]``; the final state ``[N, Hs, K, V]``, or None; what entered each segment
    ``[slots, Hs, K, V]``, or None without a split; ``[B, T, H]`` float32 with ``x_t . sum_j ...``, or None (without
    j = t if exact, and then that term alone if asked for); what u reads ``[B, T, H, K]``, or None if that is in o."""

    o: Tensor
    final: Tensor | None
    entered: Tensor | None
    dot: Tensor | None
    own: Tensor | None
    other: Tensor | None = None


def operand(*tensors: Tensor) -> tuple[tl.dtype, str]:
    """Dtype of the matrix units' operands, and their precision, for these tensors."""
    half, wide = (tl.float32, "tf32"), (tl.float32, "tf32x3")
    dtypes = [x.dtype for x in tensors]
    if torch.float16 in dtypes:
        return half
    if torch.bfloat16 in dtypes:
        return half if INTERPRETED else (tl.bfloat16, "tf32")  # the interpreter has no products of bfloat16
    return wide


def _config(tensors: list[Tensor], g: Tensor | None, exact: bool, both: bool = False) -> tuple[tl.dtype, str, Config]:
    """Operands, their precision and the configuration for ``[(q,) k, v]``."""
    dtype, precision = operand(*tensors)
    name = "bf16" if dtype == tl.bfloat16 else "tf32" if precision == "tf32" else "float32"
    k, v = tensors[-2:]
    return (
        dtype,
        precision,
        walk_config(k.shape[-1], v.shape[-1], name, g is not None, exact, device_config(k.device)[0], both),
    )


def read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    shape: Cut,
    *,
    heads: int,
    gate: int = 1,
    reverse: bool = False,
    strict: bool = False,
    factor: float | Tensor = 1.0,
    write: Tensor | None = None,
    ridge: float | Tensor = 0.0,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    initial: Tensor | None = None,
    entered: Tensor | None = None,
    final: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    exact: bool = False,
    own: bool = False,
    u: Tensor | None = None,
    other: Tensor | bool = False,
    other_dtype: torch.dtype = torch.float32,
) -> Read:
    """``o_t = factor_t sum_j E_tj w_j (q_t . k_j) v_j + ridge_t residual_t``, added to ``out`` where that is given.

    Args:
        q, k: ``[B, T, H*, K]``; v, residual: ``[B, T, H*, V]``; last dimension contiguous; every H* divides heads.
        g, factor, write, ridge: ``[B, T, H*]`` contiguous (or numbers).
        x: ``[B, T, H*, V]``, of which the dots with the sums are wanted; exact: to float32's digits.
        initial: ``[N, Hs, K, V]``, any strides. entered: from an earlier call with the same keys and values.
        u: ``[B, T, H*, V]``, where `both_at_once`: also ``factor sum_j E_tj w_j (u_t . v_j) k_j``, factor a number:
            added to ``other``, or to a new tensor (True), or to o (False; K is V).
    """
    B, T = q.shape[:2]
    K, V = k.shape[-1], v.shape[-1]
    state_heads = max(k.shape[2], v.shape[2], 1 if g is None else g.shape[2])
    tensors = [q, k, v]
    if shape.split and entered is None:
        entered = accumulate(
            k, v, g, shape, heads=state_heads, gate=gate, reverse=reverse, strict=strict, write=write, initial=initial,
            exact=exact,
        )  # fmt: skip
    if out is None:
        o = torch.empty(B, T, heads, V, dtype=out_dtype, device=q.device)
    else:
        o = out
    # (A state per head of the output: what is per token and head of the query is part of it.)
    second = other if isinstance(other, Tensor) else None
    if other is True:
        second = torch.empty(B, T, heads, K, dtype=other_dtype, device=q.device)
    leave = torch.empty(shape.sequences, state_heads, K, V, dtype=torch.float32, device=q.device) if final else None
    exact = exact and x is not None
    blocks = -(-V // _config(tensors, g, exact, both=u is not None)[2].columns)
    dot, own_dot = (
        torch.empty(B, T, heads, blocks, dtype=torch.float32, device=q.device) if wanted else None
        for wanted in (x is not None, x is not None and own)
    )
    _launch(
        q, k, v, o, g, shape, heads=heads, gate=gate, reverse=reverse, strict=strict, factor=factor, write=write,
        ridge=ridge, residual=residual, x=x, dot=dot, own=own_dot, enter=entered if shape.split else initial,
        leave=leave, total=None, add=out is not None, state_heads=state_heads, exact=exact, u=u, other=second,
        add_other=isinstance(other, Tensor),
    )  # fmt: skip
    total = lambda y: None if y is None else y.sum(-1) if blocks > 1 else y[..., 0]  # noqa: E731
    return Read(o, leave, entered, total(dot), total(own_dot), second)


def both_at_once(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> bool:
    """Whether `read` takes a second query: a program has all columns of the state, in a part of its registers."""
    config = _config([q, k, v], g, False, both=True)[2]
    return block(v.shape[-1]) <= config.columns and block(k.shape[-1]) <= (128 if config.columns == 128 else 64)


def sums(
    k: Tensor, v: Tensor, g: Tensor | None, shape: Cut, *, heads: int, gate: int = 1, reverse: bool = False,
    strict: bool = False, write: Tensor | None = None, exact: bool = False, last: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What every segment adds to the state, ``[slots, heads, K, V]`` float32, and the log2 of its decay ``[slots,
    heads]``, or None without a gate; without ``last`` not of those that a walk reaches last, which stay as they are."""
    states = torch.empty(shape.slots, heads, k.shape[-1], v.shape[-1], dtype=torch.float32, device=k.device)
    total = None if g is None else torch.empty(shape.slots, heads, dtype=torch.float32, device=k.device)
    _launch(
        None, k, v, None, g, shape, heads=heads, gate=gate, reverse=reverse, strict=strict, factor=1.0, write=write,
        ridge=0.0, residual=None, x=None, dot=None, own=None, enter=None, leave=states, total=total, add=False,
        state_heads=heads, exact=exact, all=last,
    )  # fmt: skip
    return states, total


def accumulate(
    k: Tensor, v: Tensor, g: Tensor | None, shape: Cut, *, reverse: bool = False, initial: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The states that enter the segments of a split, ``[slots, heads, K, V]`` float32. Options as for `sums`."""
    states, total = sums(k, v, g, shape, reverse=reverse, last=False, **options)
    enter(states, total, initial, shape, reverse)
    return states


def _launch(
    q, k, v, o, g, shape, *, heads, gate, reverse, strict, factor, write, ridge, residual, x, dot, own, enter, leave,
    total, add, state_heads, exact, u=None, other=None, add_other=False, all=False,
) -> None:  # fmt: skip
    K, V = k.shape[-1], v.shape[-1]
    dtype, precision, config = _config([k, v] if q is None else [q, k, v], g, exact, both=u is not None)

    def group(y: Tensor | float | None) -> int:
        return heads // y.shape[2] if isinstance(y, Tensor) else 1

    def strides(y: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if y is None else (y.stride(0), y.stride(1), y.stride(2))

    launch(
        walk, shape.slots * heads * -(-V // config.columns),
        q, k, v, u, o, other, g, factor if isinstance(factor, Tensor) else None, write,
        ridge if isinstance(ridge, Tensor) else None, residual, x, dot, own, enter, leave, total,
        shape.table,
        0.0 if isinstance(factor, Tensor) else float(factor), 0.0 if isinstance(ridge, Tensor) else float(ridge),
        shape.length, shape.segment, shape.per_sequence, heads,
        group(q), group(k), group(v), group(u), group(g), heads // state_heads, group(factor), group(write),
        group(ridge), group(residual), group(x),
        *strides(q), *strides(k), *strides(v), *strides(u), *strides(o), *strides(other), *strides(residual),
        *strides(x),
        *((0, 0, 0, 0) if enter is None else enter.stride()),
        DK=K, DV=V, C=config.chunk, BK=block(K), BV=config.columns, GATE=0 if g is None else gate, REVERSE=reverse,
        STRICT=strict, ADD=add, ADD_U=add_other, SPLIT=shape.split, ALL=all,
        EXACT=exact and (dtype == tl.bfloat16 or INTERPRETED), OPERAND=dtype, PRECISION=precision,
        warps=config.warps, stages=config.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "heads", "length", "ga", "gb"])
def _row_dot(
    A, B, OUT, rows, heads, length, ga, gb, a_b, a_t, a_h, b_b, b_t, b_h,
    D: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * N + tl.arange(0, N)
    d = tl.arange(0, BD)
    h = r % heads
    t = ((r // heads) % length).to(tl.int64)
    b = (r // heads // length).to(tl.int64)
    mask = (r < rows)[:, None] & (d < D)[None, :]
    pa = A + (b * a_b + t * a_t + tl.cast(h // ga, tl.int64) * a_h)[:, None] + d[None, :]
    pb = B + (b * b_b + t * b_t + tl.cast(h // gb, tl.int64) * b_h)[:, None] + d[None, :]
    x = tl.load(pa, mask=mask, other=0.0).to(tl.float32) * tl.load(pb, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + r.to(tl.int64), tl.sum(x, 1), mask=r < rows)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``a_t . b_t`` per head, ``[B, T, H]`` float32; the heads of one divide those of the other."""
    heads, D = max(a.shape[2], b.shape[2]), a.shape[3]
    out = torch.empty(*a.shape[:2], heads, dtype=torch.float32, device=a.device)
    rows, n = out.numel(), 32
    launch(
        _row_dot, -(-rows // n), a, b, out, rows, heads, a.shape[1], heads // a.shape[2], heads // b.shape[2],
        *a.stride()[:3], *b.stride()[:3], D=D, BD=block(D), N=n,
    )  # fmt: skip
    return out


def per_head(dstate: Tensor, group: int) -> Tensor:
    """The gradient of a state that a group of heads shares, given to the first of them."""
    if group == 1:
        return dstate
    y = dstate.new_zeros(dstate.shape[0], dstate.shape[1] * group, *dstate.shape[2:])
    y[:, ::group] = dstate
    return y


def shared(dstate: Tensor, heads: int) -> Tensor:
    """The gradient ``[N, heads, K, V]`` of a state that groups share, from those of all of them: the way back of
    `per_head`."""
    return dstate if dstate.shape[1] == heads else dstate.unflatten(1, (heads, -1)).sum(2)


def sum_heads(y: Tensor, heads: int) -> Tensor:
    """Sums groups of heads (dimension 2) down to this number of them."""
    if y.shape[2] == heads:
        return y
    return y.unflatten(2, (heads, -1)).sum(3, dtype=y.dtype)  # (named: autocast would choose another)
