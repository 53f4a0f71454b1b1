"""The gradient of gated linear attention, chunk by chunk: what passes through memory are the states between chunks.

For ``o_i = factor sum_{j<=i} E_ij (x_i . k_j) v_j`` (E the decayed causal mask) a program has one chunk, the state P
that enters it from earlier tokens, and its adjoint N that enters from later ones (`entering`). In units of factor,

    M_ij = (x_i . k_j) E_ij (do_i . v_j),     A = E (x k^T),  B = E (do v^T),
    dx = B k + read do P^T,   dk = B^T x + write v N^T,   dv = A^T do + write k N,

with ``read_i`` the decay from the start of the chunk to i, ``write_j`` that from j to its end. A decay g_t acts on the
pairs of a writing token before t and a reading one from t on. Its gradient is the sum over these pairs, of four kinds:

    dg_t = sum_{i>=t>j} M_ij  +  sum_{i>=t} x_i . (read do P^T)_i  +  sum_{j<t} k_j . (write v N^T)_j  +  rho <P, N>.

Nothing large is subtracted here, unlike in the difference of all ``x . dx`` and ``k . dk`` to the end of the sequence
(`linear_attn`, EXACT), so rounded operands do no harm. Within a chunk that difference is as good: what x and k have of
each other is ``A B`` with the same rounded B in both. So the sums of rows and columns of M need not be made,

    dg_t = sum_{t<=i<=end} (x_i . dx_i - k_i . dk_i)  +  sum_{j in the chunk} k_j . (write v N^T)_j  +  rho <P, N>.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from hla.kernels.configs import QuerySideConfig, block, device_config, has_gluon, overlaps
from hla.kernels.launch import INTERPRETED, launch, wait
from hla.kernels.linear_attn import accumulate, operand
from hla.kernels.query_side_kernels import _decays, _first_chunk, _segment
from hla.kernels.segments import Cut

LARGEST = 128
COLUMNS = 64  # of a state that a program of `walk_states` owns


def fits(K: int, V: int, dtype: torch.dtype) -> bool:
    """Whether `gradients` takes heads of these sizes. (Wider operands need more memory on the chip than there is.)"""
    return max(K, V) <= LARGEST and (dtype == torch.bfloat16 or INTERPRETED)


@triton.jit(do_not_specialize=["length", "segment", "per_sequence", "chunks_per_sequence", "heads", "ga", "gb", "gg"])
def walk_states(
    A, B, G, ENTER, STATES, TRACES, LEAVE, SLOTS, CHUNKS, FIRST,
    length, segment, per_sequence, chunks_per_sequence, heads, ga, gb, gg,
    a_b, a_t, a_h, b_b, b_t, b_h, e_n, e_h, e_k, e_v,
    DA: tl.constexpr, DB: tl.constexpr, C: tl.constexpr, BA: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    REVERSE: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, LATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BV columns of the state ``sum a_t b_t^T`` that enters each chunk of a segment to STATES, and with TRACES (a is b)
    their part of its trace. Walked from the first token, or in reverse from the last. The last state goes to LEAVE.

    LATE: neither reads nor overwrites anything of the kernel before it, and waits for that one only in the end.
    """
    if LATE:
        if PDL:
            gdc_launch_dependents()
    else:
        wait(PDL)
    blocks: tl.constexpr = (DB + BV - 1) // BV
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks) % heads
    slot = tl.program_id(0) // (blocks * heads)
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, segment, length)
    if sequence < 0:
        if LATE:
            wait(PDL)
        return
    rows = tl.arange(0, C)
    ca = tl.arange(0, BA)
    cb = block * BV + tl.arange(0, BV)
    inside = (ca < DA)[:, None] & (cb < DB)[None, :]
    state = tl.zeros([BA, BV], tl.float32)
    if ENTER is not None:
        pe = ENTER + tl.cast(slot if SPLIT else sequence, tl.int64) * e_n + h * e_h
        state = tl.load(pe + ca[:, None] * e_k + cb[None, :] * e_v, mask=inside, other=0.0).to(tl.float32)
    if TRACES is not None:
        trace = tl.sum(tl.sum(tl.where(ca[:, None] == cb[None, :], state, 0.0), 0), 0)
    chunk = _first_chunk(CHUNKS, FIRST, sequence, start, chunks_per_sequence, C)
    if SLOTS is None:
        at_end = start == 0 if REVERSE else start + segment >= length
    else:
        at_end = (tl.load(SLOTS + slot * 4 + 3) & (1 if REVERSE else 2)) != 0
    A += batch * a_b + tl.cast(h // ga, tl.int64) * a_h
    B += batch * b_b + tl.cast(h // gb, tl.int64) * b_h
    chunks = tl.cdiv(stop - start, C)
    for step in range(0, chunks):
        i = chunks - 1 - step if REVERSE else step
        t = start + i * C
        live = t + rows < stop
        row = tl.cast(t, tl.int64)
        pa = A + row * a_t + rows[:, None] * a_t + ca[None, :]
        pb = B + row * b_t + rows[:, None] * b_t + cb[None, :]
        a = tl.load(pa, mask=live[:, None] & (ca < DA)[None, :], other=0.0).to(OPERAND)
        b = tl.load(pb, mask=live[:, None] & (cb < DB)[None, :], other=0.0).to(tl.float32)
        at = tl.cast(chunk + i, tl.int64) * heads + h
        tl.store(
            STATES + at * (DA * DB) + ca[:, None] * DB + cb[None, :], state.to(STATES.dtype.element_ty), mask=inside
        )
        if TRACES is not None:
            tl.store(TRACES + at * blocks + block, trace)
        if GATED:
            c, total = _decays(G, batch * length + row + rows, live, heads // gg, h // gg)
            weight = tl.exp2(c if REVERSE else total - c)
            rho = tl.exp2(total)
            if TRACES is not None:
                trace = trace * rho + tl.sum(tl.sum(b * b, 1) * weight, 0)
            state *= rho
            b *= weight[:, None]
        elif TRACES is not None:
            trace += tl.sum(tl.sum(b * b, 1), 0)
        state = tl.dot(tl.trans(a), b.to(OPERAND), state, input_precision=PRECISION)
    if LEAVE is not None:
        if at_end:
            p = LEAVE + (tl.cast(sequence, tl.int64) * heads + h) * (DA * DB) + ca[:, None] * DB + cb[None, :]
            tl.store(p, state, mask=inside)
    if LATE:
        wait(PDL)


class Entering(NamedTuple):
    """The state that enters each chunk ``[chunks, H, K, V]``; parts of its trace ``[chunks, H, blocks]``, or None; the
    state after all tokens ``[N, H, K, V]`` float32, or None; those that enter the segments of a split, or None."""

    states: Tensor
    traces: Tensor | None
    final: Tensor | None
    segments: Tensor | None


def entering(
    a: Tensor, b: Tensor, g: Tensor | None, segments: Cut, chunks: Cut, *, heads: int, initial: Tensor | None,
    final: bool, dtype: torch.dtype, reverse: bool = False, traces: bool = False, stages: int = 3,
    entered: Tensor | None = None, late: bool = False,
) -> Entering:  # fmt: skip
    """States ``sum_j decay a_j b_j^T`` over earlier tokens, or in reverse over later ones, at the borders of chunks.

    Args:
        a: ``[B, T, Ha, K]``; b: ``[B, T, Hb, V]``; last dimension contiguous; Ha, Hb and the heads of g divide heads.
        initial: ``[N, H, K, V]``, what enters the sequences (in reverse from behind), any strides.
        dtype: of the states in memory. traces: of the states, where a is b.
        entered: what enters the segments of a split, from an earlier call.
        late: the launch before this call was that of another state, and may still run (but for a split, of which this
            call launches more).
    """
    (T, _, K), V, (kind, precision) = a.shape[1:], b.shape[3], operand(a, b)
    columns = min(COLUMNS, block(V))
    if segments.split and entered is None:
        entered = accumulate(a, b, g, segments, heads=heads, initial=initial, reverse=reverse)
    blocks = -(-V // columns)
    found = Entering(
        torch.empty(chunks.slots, heads, K, V, dtype=dtype, device=a.device),
        torch.empty(chunks.slots, heads, blocks, dtype=torch.float32, device=a.device) if traces else None,
        torch.empty(segments.sequences, heads, K, V, dtype=torch.float32, device=a.device) if final else None,
        entered,
    )
    first = entered if segments.split else initial
    if a.numel():
        launch(
            walk_states, segments.slots * heads * blocks,
            a, b, g, first, *found[:3], segments.table, chunks.table, chunks.first,
            T, segments.segment, segments.per_sequence, chunks.per_sequence,
            heads, heads // a.shape[2], heads // b.shape[2], 1 if g is None else heads // g.shape[2],
            *a.stride()[:3], *b.stride()[:3], *((0, 0, 0, 0) if first is None else first.stride()),
            DA=K, DB=V, C=chunks.segment, BA=block(K), BV=columns, GATED=g is not None, REVERSE=reverse,
            SPLIT=segments.split, OPERAND=kind, PRECISION=precision, LATE=late and not segments.split, warps=4,
            stages=stages, pdl=overlaps(a.device),
        )  # fmt: skip
    elif found.final is not None:
        found.final.zero_() if initial is None else found.final.copy_(initial)
    return found


@triton.jit(do_not_specialize=["length", "per_sequence", "heads", "gk", "gv", "gg", "gs"])
def pair_gradients(
    X, K, V, DO, G, STATES, LATER, DX, DK, DV, DG, SLOTS,
    length, per_sequence, heads, gk, gv, gg, gs, x_b, x_t, x_h, k_b, k_t, k_h, v_b, v_t, v_h, factor,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and one head of x; see above. Head h reads head ``h // gk`` of k, and so on.

    STATES has P, ``heads // gs`` of them, LATER N per head of x.
    """
    h = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    cv = tl.arange(0, BV)
    live = start + rows < stop
    row = tl.cast(start, tl.int64)
    in_k = live[:, None] if DIM_K == BK else live[:, None] & (ck < DIM_K)[None, :]
    in_v = live[:, None] if DIM_V == BV else live[:, None] & (cv < DIM_V)[None, :]
    first = (batch * length + row) * heads + h
    at_k = first * DIM_K + (rows[:, None] * (heads * DIM_K) + ck[None, :])
    at_v = first * DIM_V + (rows[:, None] * (heads * DIM_V) + cv[None, :])
    token = first + rows * heads
    px = X + batch * x_b + tl.cast(h, tl.int64) * x_h + row * x_t + (rows[:, None] * x_t + ck[None, :])
    pk = K + batch * k_b + tl.cast(h // gk, tl.int64) * k_h + row * k_t + (rows[:, None] * k_t + ck[None, :])
    pv = V + batch * v_b + tl.cast(h // gv, tl.int64) * v_h + row * v_t + (rows[:, None] * v_t + cv[None, :])
    x = tl.load(px, mask=in_k, other=0.0).to(OPERAND)
    k = tl.load(pk, mask=in_k, other=0.0).to(OPERAND)
    do = tl.load(DO + at_v, mask=in_v, other=0.0).to(OPERAND)
    v = tl.load(pv, mask=in_v, other=0.0).to(OPERAND)
    STATES += (tl.cast(slot, tl.int64) * (heads // gs) + h // gs) * (DIM_K * DIM_V)
    LATER += (tl.cast(slot, tl.int64) * heads + h) * (DIM_K * DIM_V)
    at = ck[:, None] * DIM_V + cv[None, :]
    whole: tl.constexpr = DIM_K == BK and DIM_V == BV
    in_state = (ck < DIM_K)[:, None] & (cv < DIM_V)[None, :]
    small: tl.constexpr = BK * BV <= 4096
    if small:  # asks for both states before anything waits for a tile
        P = (tl.load(STATES + at) if whole else tl.load(STATES + at, mask=in_state, other=0.0)).to(OPERAND)
        N = (tl.load(LATER + at) if whole else tl.load(LATER + at, mask=in_state, other=0.0)).to(OPERAND)
    if GATED:
        c, total = _decays(G, batch * length + row + rows, live, heads // gg, h // gg)
        if small and DG is not None:
            both = tl.sum(tl.sum(P.to(tl.float32) * N.to(tl.float32), 1), 0)
    A = tl.dot(x, tl.trans(k), input_precision=PRECISION)
    B = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    mask = rows[:, None] >= rows[None, :]
    if GATED:
        E = tl.where(mask, tl.exp2(c[:, None] - c[None, :]), 0.0)
        B *= E
        A *= E
    else:
        A = tl.where(mask, A, 0.0)
        B = tl.where(mask, B, 0.0)
    A = A.to(OPERAND)
    B = B.to(OPERAND)

    if not small:
        P = (tl.load(STATES + at) if whole else tl.load(STATES + at, mask=in_state, other=0.0)).to(OPERAND)
    acc = tl.dot(do, tl.trans(P), input_precision=PRECISION)
    if GATED:
        acc *= tl.exp2(c)[:, None]
    acc = tl.dot(B, k, acc, input_precision=PRECISION)
    if GATED:
        if DG is not None:
            dots = tl.sum(acc * x.to(tl.float32), 1)
    tl.store(DX + at_k, (acc * factor).to(DX.dtype.element_ty), mask=in_k)

    if not small:
        N = (tl.load(LATER + at) if whole else tl.load(LATER + at, mask=in_state, other=0.0)).to(OPERAND)
    acc = tl.dot(v, tl.trans(N), input_precision=PRECISION)
    if GATED:
        acc *= tl.exp2(total - c)[:, None]
        if DG is not None:
            across = tl.sum(tl.sum(acc * k.to(tl.float32), 1), 0)
    acc = tl.dot(tl.trans(B), x, acc, input_precision=PRECISION)
    if GATED:
        if DG is not None:
            dots -= tl.sum(acc * k.to(tl.float32), 1)
    tl.store(DK + at_k, (acc * factor).to(DK.dtype.element_ty), mask=in_k)

    acc = tl.dot(k, N, input_precision=PRECISION)
    if GATED:
        acc *= tl.exp2(total - c)[:, None]
    acc = tl.dot(tl.trans(A), do, acc, input_precision=PRECISION)
    tl.store(DV + at_v, (acc * factor).to(DV.dtype.element_ty), mask=in_v)

    if GATED:
        if DG is not None:
            if not small:
                both = 0.0
                some = tl.arange(0, 16)
                for i in range(0, BK, 16):  # (both whole would take too many registers)
                    part = (i + some)[:, None] * DIM_V + cv[None, :]
                    inside = (i + some < DIM_K)[:, None] & (cv < DIM_V)[None, :]
                    p = tl.load(STATES + part, mask=inside, other=0.0).to(tl.float32)
                    both += tl.sum(tl.sum(p * tl.load(LATER + part, mask=inside, other=0.0).to(tl.float32), 1), 0)
            dg = across + both * tl.exp2(total) + tl.sum(dots, 0) - tl.cumsum(dots, 0) + dots
            tl.store(DG + token, dg * factor, mask=live)


class Gradients(NamedTuple):
    """Of x, k and v per head of x; of g per head of x in float32, if wanted; of the initial state per head of x, in
    units of factor, where there is one."""

    dx: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dinitial: Tensor | None


def gradients(
    x: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor | None, segments: Cut, chunks: Cut, config: QuerySideConfig,
    *, factor: float, initial: Tensor | None, ends: Tensor | None, dx_dtype: torch.dtype, gated: bool,
    entered: Tensor | None = None, later: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """See above.

    Args:
        x: ``[B, T, H, K]``; k: ``[B, T, Hk, K]``; v: ``[B, T, Hv, V]``; last dimension contiguous. do: ``[B, T, H,
            V]``, g: ``[B, T, Hg]``, contiguous. All numbers of heads divide H.
        initial: ``[N, Hs, K, V]``, the state before the sequences, Hs the largest of Hk, Hv, Hg. ends: ``[N, H, K,
            V]``, the gradient of the state behind them, in units of factor. entered, later: of the states and of their
            gradients, what enters the segments of a split, see `entering`.
        gated: whether dg is wanted.
    """
    (B, T, heads, K), V = x.shape, v.shape[3]
    kind, precision = operand(x, k, v)
    common: Any = {"dtype": torch.bfloat16 if kind == tl.bfloat16 else torch.float32, "stages": config.states_stages}
    shared = max(k.shape[2], v.shape[2], 1 if g is None else g.shape[2])
    states = entering(
        k, v, g, segments, chunks, heads=shared, initial=initial, final=False, entered=entered, **common
    ).states  # fmt: skip
    behind = entering(
        x, do, g, segments, chunks, heads=heads, initial=ends, final=initial is not None, reverse=True, late=True,
        entered=later, **common,
    )  # fmt: skip
    new = lambda *shape, dtype: torch.empty(B, T, heads, *shape, dtype=dtype, device=x.device)  # noqa: E731
    dx, dk, dv = new(K, dtype=dx_dtype), new(K, dtype=k.dtype), new(V, dtype=v.dtype)
    dg = new(dtype=torch.float32) if gated else None
    if not x.numel():
        return Gradients(dx, dk, dv, dg, behind.final)
    args = (
        x, k, v, do, g, states, behind.states, dx, dk, dv, dg, chunks.table,
        T, chunks.per_sequence, heads, heads // k.shape[2], heads // v.shape[2],
        1 if g is None else heads // g.shape[2], heads // shared,
        *x.stride()[:3], *k.stride()[:3], *v.stride()[:3], float(factor),
    )  # fmt: skip
    if has_gluon(device_config(x.device)[0]):
        from hla.kernels import pairs_hopper

        if pairs_hopper.fits(x, k, v, do, chunks.segment, dx_dtype):
            pairs_hopper.launch_pairs(chunks.slots * heads, K, *args)
            return Gradients(dx, dk, dv, dg, behind.final)
    launch(
        pair_gradients, chunks.slots * heads, *args,
        DIM_K=K, DIM_V=V, C=chunks.segment, BK=block(K), BV=block(V), GATED=g is not None, OPERAND=kind,
        PRECISION=precision, warps=config.warps, stages=1, registers=config.registers,
    )  # fmt: skip
    return Gradients(dx, dk, dv, dg, behind.final)
