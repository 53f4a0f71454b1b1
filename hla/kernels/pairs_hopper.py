# mypy: ignore-errors
"""`pair_gradients` of `pairs` for Hopper GPUs, in Gluon, for heads of 64 and 128.

What a program does is little beside the bytes it moves. So it asks for all that there is room for at once, straight
into shared memory, where every product has its operands, and leaves room for two others (heads of 128: one) that
compute while it waits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hla.kernels.launch import copies_whole, launch
from hla.kernels.query_side_hopper import _add, _as, _barrier, _copy, _own_part, _segment, _wide, _zero

CHUNK = 64
PART = 64  # columns of P and N that are in shared memory at a time
REGISTERS = {64: 168, 128: None}  # of a thread: three and two programs on a multiprocessor


def fits(x: Tensor, k: Tensor, v: Tensor, do: Tensor, chunk: int, dx_dtype: torch.dtype) -> bool:
    """Whether `launch_pairs` takes these, where `has_gluon`."""
    sizes = {y.shape[3] for y in (x, k, v, do)}
    whole = copies_whole(x, k, v, do) and dx_dtype == torch.bfloat16
    return whole and chunk == CHUNK and len(sizes) == 1 and sizes <= set(REGISTERS)


@gluon.jit
def _arrived(LATER: gl.constexpr):
    """What was asked for is there for the matrix units of all warps, but for the last LATER groups of copies.

    The barrier is right behind the wait, or the compiler adds one there; the fence of each warp that starts products is
    then enough.
    """
    async_copy.wait_group(LATER)
    _barrier()
    fence_async_shared()


@gluon.jit
def _ask_states(STATES, LATER, P_s, N_s, first, D: gl.constexpr, PART: gl.constexpr, W: gl.constexpr):
    """Columns of P and N from first on, on their way to shared memory."""
    r = gl.arange(0, D, gl.SliceLayout(1, W))[:, None]
    c = gl.arange(0, PART, gl.SliceLayout(0, W))[None, :]
    at = r * D + (c + first)
    _copy(P_s, STATES + at)
    _copy(N_s, LATER + at)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["length", "per_sequence", "heads"])
def pair_gradients_hopper(
    X, K, V, DO, G, STATES, LATER, DX, DK, DV, DG, SLOTS,
    length, per_sequence, heads, gk, gv, gg, gs, x_b, x_t, x_h, k_b, k_t, k_h, v_b, v_t, v_h, factor,
    D: gl.constexpr, C: gl.constexpr, PART: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and one head of x, as `pair_gradients` (here decays are times factor from the start).

    P and N come in parts of their columns: those of dv; dx and dk are sums over the parts. So there is room for another
    program beside this one, and a part is on its way while the one before it is used.
    """
    gl.static_assert(C == PART)
    PARTS: gl.constexpr = D // PART
    # Layouts: accumulators [C, D] and [C, C or PART]; W and WP, whole rows in global memory; R, RC and CC, numbers of
    # rows and columns.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    W: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    WP: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (PART // 8), PART // 8], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, L)
    RC: gl.constexpr = gl.SliceLayout(1, LC)
    CC: gl.constexpr = gl.SliceLayout(0, LC)
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp has all tokens
    SUMS: gl.constexpr = gl.BlockedLayout([2, 4], [32, 1], [4, 1], [1, 0])  # likewise, with four numbers of each
    SH: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    SHC: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    SHP: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, PART], gl.bfloat16)
    SHN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    slot = gl.program_id(0) // heads
    h = gl.program_id(0) - slot * heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    x_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    do_s = gl.allocate_shared_memory(gl.bfloat16, [PARTS, C, PART], SHC)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [PARTS, C, PART], SHC)
    P_s = gl.allocate_shared_memory(gl.bfloat16, [D, PART], SHP)
    N_s = gl.allocate_shared_memory(gl.bfloat16, [D, PART], SHP)
    A_s = gl.allocate_shared_memory(gl.bfloat16, [C, C], SHC)
    B_s = gl.allocate_shared_memory(gl.bfloat16, [C, C], SHC)
    # Numbers per token, from the threads that have them to those that want them.
    g_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    c_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    # Asks for all there is room for. Rows behind the last token are zeros.
    br = gl.arange(0, C, gl.SliceLayout(1, W))
    bd = gl.arange(0, D, gl.SliceLayout(0, W))[None, :]
    pr = gl.arange(0, C, gl.SliceLayout(1, WP))
    pd = gl.arange(0, PART, gl.SliceLayout(0, WP))[None, :]
    live = (start + br < stop)[:, None]
    live_p = (start + pr < stop)[:, None]
    br = br[:, None]
    pr = pr[:, None]
    row = start.to(gl.int64)
    first = (batch * length + row) * heads + h
    STATES += (slot.to(gl.int64) * (heads // gs) + h // gs) * (D * D)
    LATER += (slot.to(gl.int64) * heads + h) * (D * D)
    _copy(x_s, X + (batch * x_b + h.to(gl.int64) * x_h + row * x_t) + (br * x_t + bd), mask=live)
    _copy(k_s, K + (batch * k_b + (h // gk).to(gl.int64) * k_h + row * k_t) + (br * k_t + bd), mask=live)
    pv = V + (batch * v_b + (h // gv).to(gl.int64) * v_h + row * v_t)
    for i in gl.static_range(PARTS):
        _copy(do_s.index(i), DO + first * D + (pr * (heads * D) + (pd + i * PART)), mask=live_p)
        _copy(v_s.index(i), pv + (pr * v_t + (pd + i * PART)), mask=live_p)
    async_copy.commit_group()
    _ask_states(STATES, LATER, P_s, N_s, 0, D, PART, WP)
    tokens = gl.arange(0, C, SCAN)
    if GATED:
        g_at = (batch * length + row + tokens) * (heads // gg) + h // gg
        g = gl.load(G + g_at, mask=start + tokens < stop, other=0.0).to(gl.float32)
        g_s.store(g)  # (or the scan is put ahead of the copies, and they wait for this load)

    _arrived(1)
    zeros = gl.zeros([C, D], gl.float32, L)
    zeros_c = gl.zeros([C, C], gl.float32, LC)
    A = warpgroup_mma(x_s, k_s.permute((1, 0)), zeros_c, use_acc=False, is_async=True)
    B = zeros_c
    for i in gl.static_range(PARTS):
        B = warpgroup_mma(do_s.index(i), v_s.index(i).permute((1, 0)), B, use_acc=i > 0, is_async=True)
    rc = gl.arange(0, C, RC)[:, None]
    cc = gl.arange(0, C, CC)[None, :]
    E = gl.where(rc >= cc, factor, 0.0)
    read = factor
    write = factor
    write_v = factor
    if GATED:
        g = gl.maximum(g_s.load(SCAN), -110.0) * 1.4426950408889634
        c_s.store(gl.associative_scan(g, 0, _add))
        _barrier()
        E = gl.where(rc >= cc, gl.exp2(c_s.load(RC)[:, None] - c_s.load(CC)[None, :]) * factor, 0.0)
        c = c_s.load(R)
        total = gl.max(c_s.slice(C - 1, 1).load(SCAN), 0)  # (of one number)
        read = (gl.exp2(c) * factor)[:, None]
        write = (gl.exp2(total - c) * factor)[:, None]
        write_v = (gl.exp2(total - c_s.load(RC)) * factor)[:, None]
    # Rounded once, and wanted as they are and transposed.
    A, B = warpgroup_mma_wait(0, (A, B))
    A_s.store((A * E).to(gl.bfloat16))
    B_s.store((B * E).to(gl.bfloat16))

    z = _zero(start)
    dx = zeros
    dk = zeros
    if GATED and DG is not None:
        both = _own_part(zeros_c)
    for i in gl.static_range(PARTS):
        _arrived(0)  # (and so are A and B, the first time)
        if GATED and DG is not None:
            for j in gl.static_range(PARTS):
                P = P_s.slice(j * C, C).load(LC)
                both += _own_part(_wide(P) * _wide(N_s.slice(j * C, C).load(LC)))
        dx = warpgroup_mma(do_s.index(i), P_s.permute((1, 0)), dx, use_acc=i > 0, is_async=True)
        dk = warpgroup_mma(v_s.index(i), N_s.permute((1, 0)), dk, use_acc=i > 0, is_async=True)
        dv = warpgroup_mma(k_s, N_s, zeros_c, use_acc=False, is_async=True)
        dx, dk, dv = warpgroup_mma_wait(0, (dx, dk, dv))
        _barrier()
        dv = warpgroup_mma(A_s.permute((1, 0)), do_s.index(i), dv * write_v, is_async=True)
        if i < PARTS - 1:
            _ask_states(STATES, LATER, P_s, N_s, (i + 1 + z) * PART, D, PART, WP)
            dv = warpgroup_mma_wait(0, (dv,))
            v_s.index(i).store(dv.to(gl.bfloat16))
    dx = warpgroup_mma(B_s, k_s, dx * read, is_async=True)
    dk *= write
    if GATED and DG is not None:
        across = _own_part(dk * _wide(k_s.load(L)))
        both = gl.convert_layout(both * (gl.exp2(total) * factor), across.type.layout) + across
    dk = warpgroup_mma(B_s.permute((1, 0)), x_s, dk, is_async=True)

    # Through shared memory, so that whole rows are written.
    dv = warpgroup_mma_wait(2, (dv,))
    v_s.index(PARTS - 1).store(dv.to(gl.bfloat16))
    dx_s = _as(P_s, gl.bfloat16, [C, D], SH)
    dk_s = _as(N_s, gl.bfloat16, [C, D], SH)
    dx = warpgroup_mma_wait(1, (dx,))
    dx_s.store(dx.to(gl.bfloat16))
    if GATED and DG is not None:  # (threads add what they hold; the rest is added at the end)
        dots = _own_part(dx * _wide(x_s.load(L)))
    dk = warpgroup_mma_wait(0, (dk,))
    dk_s.store(dk.to(gl.bfloat16))
    if GATED and DG is not None:
        dots -= _own_part(dk * _wide(k_s.load(L)))
        sums_s = _as(A_s, gl.float32, [C // 8, C, 4], SHN)
        dots_s, both_s = sums_s.index(0), sums_s.index(1)
        _barrier()
        dots_s.store(dots)
        both_s.store(both)
    _barrier()
    br = gl.arange(0, C, gl.SliceLayout(1, W)) + z
    pr = gl.arange(0, C, gl.SliceLayout(1, WP)) + z
    live = (start + br < stop)[:, None]
    live_p = (start + pr < stop)[:, None]
    own = first * D
    at = br[:, None] * (heads * D) + bd
    tokens = gl.arange(0, C, SCAN) + z
    gl.store(DX + own + at, dx_s.load(W), mask=live)
    gl.store(DK + own + at, dk_s.load(W), mask=live)
    for i in gl.static_range(PARTS):
        gl.store(DV + own + (pr[:, None] * (heads * D) + (pd + i * PART)), v_s.index(i).load(WP), mask=live_p)
    if GATED and DG is not None:
        dots = gl.convert_layout(gl.sum(dots_s.load(SUMS), 1), SCAN)
        more = gl.convert_layout(gl.sum(both_s.load(SUMS), 1), SCAN)
        dg = gl.sum(dots + more, 0) - gl.associative_scan(dots, 0, _add) + dots
        gl.store(DG + first + tokens * heads, dg, mask=start + tokens < stop)


def launch_pairs(programs: int, size: int, *args) -> None:
    """As ``launch(pair_gradients, programs, *args, ...)``, with the same tensors and numbers in the same order, for
    heads of this size.
    """
    launch(
        pair_gradients_hopper, programs, *args, D=size, C=CHUNK, PART=PART, GATED=args[4] is not None, warps=4,
        stages=1, registers=REGISTERS[size],
    )  # fmt: skip
