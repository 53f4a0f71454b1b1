# mypy: ignore-errors
"""`pair_gradients` of `pairs` for Hopper GPUs, in Gluon, for heads of 64.

What a program does is little beside the bytes it moves. So it asks for all of them at once, straight into shared
memory, where every product has its operands, and takes few enough registers that two others compute while it waits.
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
from hla.kernels.query_side_hopper import _add, _barrier, _own_part, _ready, _segment, _wide
from hla.kernels.query_side_walk import _copy

SIZE = 64  # of heads and chunks
REGISTERS = 168  # of a thread: three programs on a multiprocessor


def fits(x: Tensor, k: Tensor, v: Tensor, do: Tensor, chunk: int, dx_dtype: torch.dtype) -> bool:
    """Whether `launch_pairs` takes these, where `has_gluon`."""
    sizes = (chunk, *(y.shape[3] for y in (x, k, v, do)))
    return set(sizes) == {SIZE} and dx_dtype == torch.bfloat16 and copies_whole(x, k, v, do)


@gluon.jit
def _arrived(LATER: gl.constexpr):
    """What was asked for is there for the matrix units of all warps, but for the last LATER groups of copies.

    The barrier is right behind the wait, or the compiler adds one there; the fence of each warp that starts products is
    then enough.
    """
    async_copy.wait_group(LATER)
    _barrier()
    fence_async_shared()


@gluon.jit(do_not_specialize=["length", "per_sequence", "heads"])
def pair_gradients_hopper(
    X, K, V, DO, G, STATES, LATER, DX, DK, DV, DG, SLOTS,
    length, per_sequence, heads, gk, gv, gg, gs, x_b, x_t, x_h, k_b, k_t, k_h, v_b, v_t, v_h, factor,
    D: gl.constexpr, C: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and one head of x, as `pair_gradients` (here decays are times factor from the start).

    Products are waited for in the order in which they were started, those of the chunk with itself first. There are no
    more than three tiles of accumulators at a time beside the decays, which is what the registers have room for.
    """
    gl.static_assert(D == C)
    # Layouts: accumulators; W, whole rows in global memory; R and CC, numbers of rows and columns.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    W: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, L)
    CC: gl.constexpr = gl.SliceLayout(0, L)
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # every warp has all tokens
    PARTS: gl.constexpr = gl.BlockedLayout([2, 4], [32, 1], [4, 1], [1, 0])  # likewise, with four numbers of each
    SH: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    slot = gl.program_id(0) // heads
    h = gl.program_id(0) - slot * heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    x_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    do_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    P_s = gl.allocate_shared_memory(gl.bfloat16, [D, D], SH)
    N_s = gl.allocate_shared_memory(gl.bfloat16, [D, D], SH)
    A_s = gl.allocate_shared_memory(gl.bfloat16, [C, C], SH)
    B_s = gl.allocate_shared_memory(gl.bfloat16, [C, C], SH)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [C, D], SH)
    # Numbers per token, from the threads that have them to those that want them.
    g_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    c_s = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    dots_s = gl.allocate_shared_memory(gl.float32, [C, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    all_s = gl.allocate_shared_memory(gl.float32, [C, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

    # Asks for everything. Rows behind the last token are zeros.
    br = gl.arange(0, C, gl.SliceLayout(1, W))
    bd = gl.arange(0, D, gl.SliceLayout(0, W))[None, :]
    live = (start + br < stop)[:, None]
    br = br[:, None]
    row = start.to(gl.int64)
    first = (batch * length + row) * heads + h
    _copy(x_s, X + (batch * x_b + h.to(gl.int64) * x_h + row * x_t) + (br * x_t + bd), mask=live)
    _copy(k_s, K + (batch * k_b + (h // gk).to(gl.int64) * k_h + row * k_t) + (br * k_t + bd), mask=live)
    _copy(do_s, DO + first * D + (br * (heads * D) + bd), mask=live)
    _copy(v_s, V + (batch * v_b + (h // gv).to(gl.int64) * v_h + row * v_t) + (br * v_t + bd), mask=live)
    async_copy.commit_group()
    at_state = br * D + bd
    _copy(P_s, STATES + (slot.to(gl.int64) * (heads // gs) + h // gs) * (D * D) + at_state)
    _copy(N_s, LATER + (slot.to(gl.int64) * heads + h) * (D * D) + at_state)
    async_copy.commit_group()
    tokens = gl.arange(0, C, SCAN)
    if GATED:
        g_at = (batch * length + row + tokens) * (heads // gg) + h // gg
        g = gl.load(G + g_at, mask=start + tokens < stop, other=0.0).to(gl.float32)
        g_s.store(g)  # (or the scan is put ahead of the copies, and they wait for this load)

    _arrived(1)
    zeros = gl.zeros([C, D], gl.float32, L)
    A = warpgroup_mma(x_s, k_s.permute((1, 0)), zeros, use_acc=False, is_async=True)
    B = warpgroup_mma(do_s, v_s.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if GATED:
        g = gl.maximum(g_s.load(SCAN), -110.0) * 1.4426950408889634
        c_s.store(gl.associative_scan(g, 0, _add))
    _arrived(0)
    dx = warpgroup_mma(do_s, P_s.permute((1, 0)), zeros, use_acc=False, is_async=True)
    rc = gl.arange(0, C, R)[:, None]
    cc = gl.arange(0, C, CC)[None, :]
    E = gl.where(rc >= cc, factor, 0.0)
    read = factor
    write = factor
    if GATED:
        E = gl.where(rc >= cc, gl.exp2(c_s.load(R)[:, None] - c_s.load(CC)[None, :]) * factor, 0.0)
    # Rounded once, and wanted as they are and transposed.
    A, B = warpgroup_mma_wait(1, (A, B))
    A = (A * E).to(gl.bfloat16)
    B = (B * E).to(gl.bfloat16)
    A_s.store(A)
    B_s.store(B)
    dk = warpgroup_mma(v_s, N_s.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dv = warpgroup_mma(k_s, N_s, zeros, use_acc=False, is_async=True)
    if GATED:
        c = c_s.load(R)
        total = gl.max(c_s.slice(C - 1, 1).load(SCAN), 0)  # (of one number)
        read = (gl.exp2(c) * factor)[:, None]
        write = (gl.exp2(total - c) * factor)[:, None]
    if GATED and DG is not None:
        both = _own_part(_wide(P_s.load(L)) * _wide(N_s.load(L)), 1) * (gl.exp2(total) * factor)
    dx = warpgroup_mma_wait(2, (dx,))
    dx *= read
    dk = warpgroup_mma_wait(1, (dk,))
    _ready()  # A and B are there, and nobody reads P_s and v_s any more
    dx = warpgroup_mma(B_s, k_s, dx, is_async=True)
    dv = warpgroup_mma_wait(1, (dv,))
    dv *= write
    dv = warpgroup_mma(A_s.permute((1, 0)), do_s, dv, is_async=True)
    dk *= write
    if GATED and DG is not None:
        all_s.store((_own_part(dk * _wide(k_s.load(L)), 1) + both).reshape([C, 4]))
    dk = warpgroup_mma(B_s.permute((1, 0)), x_s, dk, is_async=True)

    # Through shared memory, so that whole rows are written.
    dx = warpgroup_mma_wait(2, (dx,))
    P_s.store(dx.to(gl.bfloat16))
    if GATED and DG is not None:  # (threads add what they hold; the rest is added at the end)
        dots = _own_part(dx * _wide(x_s.load(L)), 1)
    dv = warpgroup_mma_wait(1, (dv,))
    out_s.store(dv.to(gl.bfloat16))
    dk = warpgroup_mma_wait(0, (dk,))
    v_s.store(dk.to(gl.bfloat16))
    if GATED and DG is not None:
        dots_s.store((dots - _own_part(dk * _wide(k_s.load(L)), 1)).reshape([C, 4]))
    _barrier()
    # z is 0, which the compiler does not know: so addresses are not those of before, kept in registers until now.
    z = gl.inline_asm_elementwise("and.b32 $0, $1, 0x40000000;", "=r,r", [start], dtype=gl.int32, is_pure=False, pack=1)
    br = gl.arange(0, C, gl.SliceLayout(1, W)) + z
    live = (start + br < stop)[:, None]
    own = first * D
    at = br[:, None] * (heads * D) + bd
    tokens = gl.arange(0, C, SCAN) + z
    gl.store(DX + own + at, P_s.load(W), mask=live)
    gl.store(DK + own + at, v_s.load(W), mask=live)
    gl.store(DV + own + at, out_s.load(W), mask=live)
    if GATED and DG is not None:
        dots = gl.convert_layout(gl.sum(dots_s.load(PARTS), 1), SCAN)
        more = gl.convert_layout(gl.sum(all_s.load(PARTS), 1), SCAN)
        dg = gl.sum(dots + more, 0) - gl.associative_scan(dots, 0, _add) + dots
        gl.store(DG + first + tokens * heads, dg, mask=start + tokens < stop)


def launch_pairs(programs: int, *args, registers: int | None = REGISTERS) -> None:
    """As ``launch(pair_gradients, programs, *args, ...)``, with the same tensors and numbers in the same order."""
    launch(
        pair_gradients_hopper, programs, *args, D=SIZE, C=SIZE, GATED=args[4] is not None, warps=4, stages=1,
        registers=registers,
    )  # fmt: skip
