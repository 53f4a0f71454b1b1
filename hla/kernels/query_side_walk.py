# mypy: ignore-errors
"""The forward pass of `hla_q` for Hopper GPUs, in Gluon: at heads of 64 one walk with S and P in registers; at heads
of 128, where there is no room for those, the readings of S chunk by chunk.

Of the walk, per chunk all readings of S, as in `query_side_kernels.solve`, then that of P, as in `linear_attn.walk`.
What moves is q, k, v and o, and x where a backward pass will want it. There are as many roundings as in the three
launches it takes the place of, but for x_0, which has none.

The readings of a chunk wait for each other, so what can be is under way before: tiles and numbers of the next chunk,
and the products that move S and P to the end of this one. Left operands stay in registers, so that no warp waits for
another during the readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from hla.kernels.launch import launch
from hla.kernels.linear_attn import accumulate
from hla.kernels.query_side_hopper import (
    _add,
    _ask_rows,
    _ask_state,
    _barrier,
    _numbers,
    _numbers_of,
    _operand,
    _ready,
    _segment,
    _wide,
    _zero,
)
from hla.kernels.query_side_kernels import PER_TOKEN
from hla.kernels.segments import Cut

SIZE = 64  # of heads and chunks of the walk


@gluon.jit
def _ask(Q, K, V, q_s, k_s, v_s, first, stop, z, q_t, k_t, v_t, B: gl.constexpr, C: gl.constexpr, D: gl.constexpr):
    """Tiles of a chunk on their way to shared memory; rows behind the last token are zeros."""
    _ask_rows(Q, q_s, first, stop, z, q_t, B, C, D)
    _ask_rows(K, k_s, first, stop, z, k_t, B, C, D)
    _ask_rows(V, v_s, first, stop, z, v_t, B, C, D)
    async_copy.commit_group()


@gluon.jit
def _reading(x, q_s, k_s, S_s, more, read, minus_E, zeros_c, L: gl.constexpr):
    """``x more + q - S x`` of a chunk, from x times what it weighs."""
    left = _operand(x, L)
    left_r = _operand(x * -read[:, None], L)
    raw = warpgroup_mma(left, k_s.permute((1, 0)), zeros_c, use_acc=False, is_async=True)
    y = x * more[:, None] + _wide(q_s.load(L))
    y = warpgroup_mma(left_r, S_s, y, is_async=True)
    raw = warpgroup_mma_wait(1, (raw,))
    y = warpgroup_mma(_operand(raw * minus_E, L), k_s, y, is_async=True)
    return warpgroup_mma_wait(0, (y,))


@gluon.jit(
    do_not_specialize=[
        "length", "segment", "per_sequence", "heads", "group", "gg", *PER_TOKEN,
        "s_n", "s_h", "s_k", "s_v", "p_n", "p_h", "p_k", "p_v",
    ]
)  # fmt: skip
def walk_readings(
    Q, K, V, G, RIDGE, NODES, S_ENTER, P_ENTER, X, OUT, S_LEAVE, P_LEAVE, SLOTS,
    scale, length, segment, per_sequence, heads, group, gg,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, r_b, r_t, r_h, n_b, n_t, n_h, n_n,
    s_n, s_h, s_k, s_v, p_n, p_h, p_k, p_v,
    ORDER: gl.constexpr, D: gl.constexpr, C: gl.constexpr, GATED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One segment and one head of q: o to OUT, ``x_ORDER`` to X. Pointers that are None switch their part off.

    The first head of a group writes what leaves the sequence to S_LEAVE and P_LEAVE.
    """
    gl.static_assert(D == C)
    # Layouts: accumulators; B, whole rows in global memory; R and CC, numbers of rows and columns.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, L)
    CC: gl.constexpr = gl.SliceLayout(0, L)
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp has all tokens
    SH: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    h = gl.program_id(0) % heads
    slot = gl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, segment, length)
    if sequence < 0:
        return
    hk = h // group
    kv_heads = heads // group
    q_s = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], SH)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], SH)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], SH)
    states_s = gl.allocate_shared_memory(gl.bfloat16, [2, D, D], SH)
    tiles_s = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], SH)
    # Numbers per token, from the threads that have them to those that want them.
    c_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    squares_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    nr = gl.arange(0, D, R)[:, None]
    nc = gl.arange(0, D, CC)[None, :]
    S = gl.zeros([D, D], gl.float32, L)
    P = gl.zeros([D, D], gl.float32, L)
    entering = (slot if SPLIT else sequence).to(gl.int64)
    if S_ENTER is not None:
        S = gl.load(S_ENTER + entering * s_n + hk * s_h + nr * s_k + nc * s_v).to(gl.float32)
    if P_ENTER is not None:
        P = gl.load(P_ENTER + entering * p_n + hk * p_h + nr * p_k + nc * p_v).to(gl.float32)
    trace = gl.sum(gl.sum(gl.where(nr == nc, S, 0.0), 1), 0)

    Q += batch * q_b + h.to(gl.int64) * q_h
    K += batch * k_b + hk.to(gl.int64) * k_h
    V += batch * v_b + hk.to(gl.int64) * v_h
    RIDGE += batch * r_b + h * r_h
    NODES += batch * n_b + h * n_h
    g_t = kv_heads // gg
    if GATED:
        G += batch * length * g_t + hk // gg
    zeros = gl.zeros([C, D], gl.float32, L)
    zeros_c = gl.zeros([C, C], gl.float32, L)
    _ask(Q, K, V, q_s.index(0), k_s.index(0), v_s.index(0), start, stop, 0, q_t, k_t, v_t, B, C, D)
    g, ridge, nodes = _numbers(G, RIDGE, NODES, start, stop, 0, r_t, n_t, n_n, g_t, ORDER, C, R, SCAN)
    chunks = (stop - start + C - 1) // C
    for i in range(0, chunks):
        z = _zero(
            i
        )  # (without it addresses would be the same for all chunks, and be kept in memory from one to the next)
        S_s, P_s = states_s.index(z), states_s.index(z + 1)
        w_s = tiles_s.index(z)  # keys with what they weigh at the end of the chunk
        x_s = tiles_s.index(z + 1)
        first = start + i * C
        here = i % 2
        q_i, k_i, v_i = q_s.index(here), k_s.index(here), v_s.index(here)
        kt = k_i.permute((1, 0))
        live = first + (gl.arange(0, C, R) + z) < stop
        async_copy.wait_group(0)
        S_s.store(S.to(gl.bfloat16))
        P_s.store(P.to(gl.bfloat16))
        _ready()
        _ask(
            Q, K, V, q_s.index(1 - here), k_s.index(1 - here), v_s.index(1 - here), first + C, stop, z, q_t, k_t, v_t,
            B, C, D,
        )  # fmt: skip
        raw = warpgroup_mma(q_i, kt, zeros_c, use_acc=False, is_async=True)
        acc = warpgroup_mma(q_i, S_s, zeros, use_acc=False, is_async=True)

        # Numbers per token.
        k = _wide(k_i.load(L))
        squares_s.store(gl.sum(k * k, 1))
        if GATED:
            g = gl.maximum(g, -110.0) * 1.4426950408889634
            c = gl.associative_scan(g, 0, _add)
            total = gl.sum(g, 0)
            whole = gl.exp2(total)
            c_s.store(c)
        _barrier()
        rc = (gl.arange(0, C, R) + z)[:, None]
        cc = gl.arange(0, C, CC)[None, :]
        squares = squares_s.load(SCAN)
        if GATED:
            minus_E = gl.where(rc >= cc, -gl.exp2(c_s.load(R)[:, None] - c_s.load(CC)[None, :]), 0.0)
            c_r = c_s.load(R)
            read = gl.exp2(c_r)
            w_s.store((k * gl.exp2(total - c_r)[:, None]).to(gl.bfloat16))
            squares *= gl.exp2(total - c)
        else:
            whole = 1.0
            minus_E = gl.where(rc >= cc, -1.0, 0.0)
            read = gl.full([C], 1.0, gl.float32, R)
            w_s.store(k.to(gl.bfloat16))
        traces = gl.sum(minus_E * squares_s.load(CC)[None, :], 1)
        traces = read * trace - traces
        trace = trace * whole + gl.sum(squares, 0)

        # y_n = theta_n x_n = (theta_n - ridge) x_{n-1} + q - S x_{n-1}. The first reading is of q itself, unrounded:
        # x_0 is q / theta_0.
        by = 1.0 / gl.where(live, ridge + nodes[0] * traces, 1.0)
        more = nodes[1] * traces
        y = _wide(q_i.load(L)) * (1.0 + by * more)[:, None]
        raw, acc = warpgroup_mma_wait(0, (raw, acc))
        scores = _operand(raw * (minus_E * by[:, None]), L)
        y += acc * (by * -read)[:, None]
        _ready()
        y = warpgroup_mma(scores, k_i, y, is_async=True)
        if GATED:
            S *= whole
            P *= whole
        S = warpgroup_mma(w_s.permute((1, 0)), k_i, S, is_async=True)
        P = warpgroup_mma(w_s.permute((1, 0)), v_i, P, is_async=True)
        by = 1.0 / gl.where(live, ridge + more, 1.0)
        y, S, P = warpgroup_mma_wait(0, (y, S, P))
        for n in gl.static_range(2, ORDER + 1):
            more = nodes[n] * traces
            y = _reading(y * by[:, None], q_i, k_i, S_s, more, read, minus_E, zeros_c, L)
            by = 1.0 / gl.where(live, ridge + more, 1.0)
        x = y * by[:, None]
        if X is not None:
            x_s.store(x.to(gl.bfloat16))
        left = _operand(x, L)
        left_r = _operand(x * -read[:, None], L)
        raw = warpgroup_mma(left, kt, zeros_c, use_acc=False, is_async=True)
        y = warpgroup_mma(left_r, P_s, zeros, use_acc=False, is_async=True)
        raw = warpgroup_mma_wait(1, (raw,))
        y = warpgroup_mma(_operand(raw * minus_E, L), v_i, y, is_async=True)
        y = warpgroup_mma_wait(0, (y,))

        # Through shared memory, so that whole rows are written.
        br = (gl.arange(0, C, gl.SliceLayout(1, B)) + z)[:, None]
        bd = gl.arange(0, D, gl.SliceLayout(0, B))[None, :]
        blive = first + br < stop
        own = ((batch * length + first) * heads + h) * D
        at_b = br * (heads * D) + bd
        _barrier()  # (nobody reads keys there any more)
        w_s.store((y * -scale).to(gl.bfloat16))
        _barrier()
        gl.store(OUT + own + at_b, w_s.load(B), mask=blive)
        if X is not None:
            gl.store(X + own + at_b, x_s.load(B), mask=blive)
        g, ridge, nodes = _numbers(G, RIDGE, NODES, first + C, stop, z, r_t, n_t, n_n, g_t, ORDER, C, R, SCAN)
    async_copy.wait_group(0)
    if S_LEAVE is not None:
        if SLOTS is None:
            at_end = start + segment >= length
        else:
            at_end = (gl.load(SLOTS + slot * 4 + 3) & 2) != 0
        if at_end & (h % group == 0):
            leaving = (sequence.to(gl.int64) * kv_heads + hk) * (D * D) + nr * D + nc
            gl.store(S_LEAVE + leaving, S)
            gl.store(P_LEAVE + leaving, P)


@gluon.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg", *PER_TOKEN])
def solve_hopper(
    Q, K, G, RIDGE, NODES, STATES, TRACES, X, SLOTS, length, per_sequence, heads, group, gg,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, n_b, n_t, n_h, n_n,
    ORDER: gl.constexpr, D: gl.constexpr, C: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """``x_ORDER`` of one chunk and one head to X, from the S that enters the chunk: `query_side_kernels.solve`."""
    # Layouts: accumulators [C, D] and [C, C]; B, whole rows in global memory; R, RC and CC, numbers of rows, columns.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, L)
    RC: gl.constexpr = gl.SliceLayout(1, LC)
    CC: gl.constexpr = gl.SliceLayout(0, LC)
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp has all tokens
    SH: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    SHD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, D], gl.bfloat16)
    h = gl.program_id(0) % heads
    slot = gl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    hk = h // group
    q_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    S_s = gl.allocate_shared_memory(gl.bfloat16, [D, D], SHD)
    # Numbers per token, from the threads that have them to those that want them.
    c_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    squares_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    _ask_rows(Q + (batch * q_b + h.to(gl.int64) * q_h), q_s, start, stop, 0, q_t, B, C, D)
    _ask_rows(K + (batch * k_b + hk.to(gl.int64) * k_h), k_s, start, stop, 0, k_t, B, C, D)
    async_copy.commit_group()
    _ask_state(STATES + (slot.to(gl.int64) * (heads // group) + hk) * (D * D), S_s, B, D)
    async_copy.commit_group()
    g, ridge, nodes, trace = _numbers_of(
        G, RIDGE, NODES, TRACES, batch, slot, start, stop, h, heads, group, gg, length, r_b, r_t, r_h, n_b, n_t, n_h,
        n_n, ORDER, C, BLOCKS, R, SCAN,
    )  # fmt: skip

    async_copy.wait_group(1)
    _ready()
    zeros = gl.zeros([C, D], gl.float32, L)
    zeros_c = gl.zeros([C, C], gl.float32, LC)
    raw = warpgroup_mma(q_s, k_s.permute((1, 0)), zeros_c, use_acc=False, is_async=True)
    k = _wide(k_s.load(L))
    squares_s.store(gl.sum(k * k, 1))
    if GATED:
        c_s.store(gl.associative_scan(gl.maximum(g, -110.0) * 1.4426950408889634, 0, _add))
    async_copy.wait_group(0)
    _ready()
    acc = warpgroup_mma(q_s, S_s, zeros, use_acc=False, is_async=True)
    rc = gl.arange(0, C, RC)[:, None]
    cc = gl.arange(0, C, CC)[None, :]
    live = start + gl.arange(0, C, R) < stop
    if GATED:
        minus_E = gl.where(rc >= cc, -gl.exp2(c_s.load(RC)[:, None] - c_s.load(CC)[None, :]), 0.0)
        read = gl.exp2(c_s.load(R))
    else:
        minus_E = gl.where(rc >= cc, -1.0, 0.0)
        read = gl.full([C], 1.0, gl.float32, R)
    traces = read * trace - gl.convert_layout(gl.sum(minus_E * squares_s.load(CC)[None, :], 1), R)
    # As in `walk_readings`.
    by = 1.0 / gl.where(live, ridge + nodes[0] * traces, 1.0)
    more = nodes[1] * traces
    y = _wide(q_s.load(L)) * (1.0 + by * more)[:, None]
    raw, acc = warpgroup_mma_wait(0, (raw, acc))
    y += acc * (by * -read)[:, None]
    y = warpgroup_mma(_operand(raw * (minus_E * gl.convert_layout(by, RC)[:, None]), L), k_s, y, is_async=True)
    y = warpgroup_mma_wait(0, (y,))
    by = 1.0 / gl.where(live, ridge + more, 1.0)
    for n in gl.static_range(2, ORDER + 1):
        more = nodes[n] * traces
        y = _reading(y * by[:, None], q_s, k_s, S_s, more, read, minus_E, zeros_c, L)
        by = 1.0 / gl.where(live, ridge + more, 1.0)

    # Through shared memory, so that whole rows are written. (Of q, products have read the rows of their own warp.)
    q_s.store((y * by[:, None]).to(gl.bfloat16))
    _barrier()
    br = gl.arange(0, C, gl.SliceLayout(1, B))
    bd = gl.arange(0, D, gl.SliceLayout(0, B))[None, :]
    own = ((batch * length + start) * heads + h) * D
    gl.store(X + own + (br[:, None] * (heads * D) + bd), q_s.load(B), mask=(start + br < stop)[:, None])


class Walked(NamedTuple):
    """o ``[B, T, HQ, D]``; ``x_order``, or None; final S and P ``[N, HKV, D, D]`` float32, or nothing; those that enter
    the segments of a split, or nothing."""

    o: Tensor
    x: Tensor | None
    finals: list[Tensor]
    entered: list[Tensor]


def walk_through(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, ridge: Tensor, nodes: Tensor, S: Tensor | None, P: Tensor | None,
    segments: Cut, *, scale: float, final: bool, keep: bool, entered: Sequence[Tensor] = (),
) -> Walked:  # fmt: skip
    """The forward pass. S, P: initial states, any strides. final, keep: whether final states and x are wanted. entered:
    the S and P that enter the segments of a split, if they are known."""
    (_, T, heads, D), HKV, order = q.shape, k.shape[2], nodes.shape[-1] - 1
    entered = list(entered)
    if segments.split and not entered:
        entered = [accumulate(k, y, g, segments, heads=HKV, initial=state) for y, state in ((k, S), (v, P))]
    enter = entered or [S, P]
    new = lambda: torch.empty(segments.sequences, HKV, D, D, device=q.device)  # noqa: E731
    done = Walked(
        torch.empty(*v.shape[:2], heads, D, dtype=v.dtype, device=v.device),
        torch.empty(*q.shape, dtype=q.dtype, device=q.device) if keep else None,
        [new(), new()] if final else [], entered,
    )  # fmt: skip
    S_leave, P_leave = done.finals or (None, None)
    launch(
        walk_readings, segments.slots * heads,
        q, k, v, g, ridge, nodes, *enter, done.x, done.o, S_leave, P_leave, segments.table,
        float(scale), T, segments.segment, segments.per_sequence, heads, heads // HKV,
        1 if g is None else HKV // g.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *ridge.stride(), *nodes.stride(),
        *(n for y in enter for n in ((0, 0, 0, 0) if y is None else y.stride())),
        ORDER=order, D=D, C=SIZE, GATED=g is not None, SPLIT=segments.split, warps=4,
    )  # fmt: skip
    return done
