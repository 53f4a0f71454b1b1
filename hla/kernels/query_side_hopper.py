# mypy: ignore-errors
"""`adjoint` of `query_side` for heads of 64 on Hopper GPUs, in Gluon: all that a chunk adds to every gradient, in one
program (heads of 128: `query_side_adjoint`).

Gluon is Triton with the layouts written down. Both operands of every product are in shared memory, where all x and u of
the chunk stay; registers hold y, dk and the chunk's moment. Products that the chain of readings does not wait for (dk,
the moment) are started behind those that it does.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hla.kernels.query_side_kernels import PER_TOKEN

WARPS = 4  # which leaves room for two programs on a multiprocessor: one can work while the other one waits
# Names that differ between versions of Triton.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# (Of as many bytes, which Triton 3.8 insists on.)
_as = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _wide(x):
    """float32 from bfloat16, two numbers in two instructions (the compiler takes three)."""
    asm: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return gl.inline_asm_elementwise(asm, "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def _ready():
    """What was written to shared memory is there for the matrix units of all warps."""
    fence_async_shared()
    _barrier()


@gluon.jit
def _segment(SLOTS, slot, per_sequence, segment, length):
    """(sequence, batch row, first token, behind the last token) of a slot, as in `query_side_kernels`."""
    if SLOTS is None:
        sequence = slot // per_sequence
        start = (slot % per_sequence) * segment
        stop = gl.minimum(start + segment, length)
        batch = sequence.to(gl.int64)
    else:
        sequence = gl.load(SLOTS + slot * 4)
        start = gl.load(SLOTS + slot * 4 + 1)
        stop = gl.load(SLOTS + slot * 4 + 2)
        batch = (sequence * 0).to(gl.int64)
    return sequence, batch, start, stop


@gluon.jit
def _operand(x, L: gl.constexpr):
    """The left operand of a product, from an accumulator: of the same thread."""
    return gl.convert_layout(x.to(gl.bfloat16), gl.DotOperandLayout(0, L, 2))


@gluon.jit
def _own_part(x):
    """The sums of rows of an accumulator over the columns that a thread holds, ``[rows, 4]``: no thread waits for
    another."""
    x = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]).permute((0, 2, 1, 3))
    return gl.sum(x.reshape([x.shape[0], 4, x.shape[2] * x.shape[3]]), 2)


@gluon.jit
def _index(x, DIM: gl.constexpr):
    """Where along a dimension of x its numbers are."""
    layout: gl.constexpr = x.type.layout
    i = gl.arange(0, x.shape[DIM])
    for d in gl.static_range(len(x.shape)):
        if d != DIM:
            i = gl.expand_dims(i, d)
    return gl.set_auto_layout(i, layout)


@gluon.jit
def _of_block(x):
    """Of ``[warp, r, c, block]`` what is on the diagonal, ``[warp, r, 4]``."""
    a, b = gl.split(x.reshape([4, 8, 8, 2, 2]))  # even and odd blocks
    a, b = gl.split(gl.where(_index(a, 0) % 2 == 0, a, b))
    x = gl.where(_index(a, 0) < 2, a, b)
    return gl.sum(gl.where(_index(x, 1) == _index(x, 2), x, 0.0).reshape([4, 8, 4, 2]), 3)


@gluon.jit
def _diagonal(x):
    """The diagonal of an accumulator ``[64, 64]``, as `_own_part` has sums of rows.

    Which columns of a thread can be on it depends on its warp alone, so all but 4 of 32 numbers are out at once.
    """
    x = x.reshape([4, 2, 8, 4, 2, 8]).permute((0, 2, 5, 3, 1, 4))  # rows: warp, half, r; columns: block, half, c
    x0, x1 = gl.split(x)
    x0, _ = gl.split(x0)
    _, x1 = gl.split(x1)
    x = gl.join(_of_block(x0), _of_block(x1))  # [warp, r, 4, half]
    return x.permute((0, 3, 1, 2)).reshape([64, 4])


@gluon.jit
def _rest(a, b, c, d, e, f, g, h, R: gl.constexpr):
    """The sums of rows from what the threads hold, of eight numbers at once."""
    x = gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))
    x = gl.sum(x, 1)
    abcd, efgh = gl.split(x)
    ab, cd = gl.split(abcd)
    ef, gh = gl.split(efgh)
    a, b = gl.split(ab)
    c, d = gl.split(cd)
    e, f = gl.split(ef)
    g, h = gl.split(gh)
    return (
        gl.convert_layout(a, R),
        gl.convert_layout(b, R),
        gl.convert_layout(c, R),
        gl.convert_layout(d, R),
        gl.convert_layout(e, R),
        gl.convert_layout(f, R),
        gl.convert_layout(g, R),
        gl.convert_layout(h, R),
    )


@gluon.jit
def _numbers(
    G, RIDGE, NODES, first, stop, z, r_t, n_t, n_n, g_t, ORDER: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    SCAN: gl.constexpr,
):  # fmt: skip
    """(log-decays, or 0 without; ridge; the nodes) of a chunk."""
    rows = gl.arange(0, C, R) + z
    live = first + rows < stop
    row = first.to(gl.int64)
    g = 0.0
    if G is not None:
        tokens = gl.arange(0, C, SCAN) + z
        g = gl.load(G + row * g_t + tokens * g_t, mask=first + tokens < stop, other=0.0).to(gl.float32)
    ridge = gl.load(RIDGE + row * r_t + rows * r_t, mask=live, other=1.0).to(gl.float32)
    nodes = ()
    for n in gl.static_range(ORDER + 1):
        nodes = nodes + (gl.load(NODES + row * n_t + n * n_n + rows * n_t, mask=live, other=1.0).to(gl.float32),)
    return g, ridge, nodes


@gluon.jit
def _zero(x):
    """0, which the compiler does not know: addresses that it is part of are made anew, not kept in registers (or, for
    want of those, in memory)."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0x40000000;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _numbers_of(
    G, RIDGE, NODES, TRACES, batch, slot, start, stop, h, heads, group, gg, length, r_b, r_t, r_h, n_b, n_t, n_h, n_n,
    ORDER: gl.constexpr, C: gl.constexpr, BLOCKS: gl.constexpr, R: gl.constexpr, SCAN: gl.constexpr,
):  # fmt: skip
    """`_numbers` of a chunk and a head of q, and the trace of the S that enters it."""
    hk = h // group
    kv_heads = heads // group
    g_t = kv_heads // gg
    if G is not None:
        G += batch * length * g_t + hk // gg
    g, ridge, nodes = _numbers(
        G, RIDGE + batch * r_b + h * r_h, NODES + batch * n_b + h * n_h, start, stop, 0, r_t, n_t, n_n, g_t, ORDER, C,
        R, SCAN,
    )  # fmt: skip
    trace = 0.0
    for b in gl.static_range(BLOCKS):
        trace += gl.load(TRACES + (slot.to(gl.int64) * kv_heads + hk) * BLOCKS + b)
    return g, ridge, nodes, trace


@gluon.jit
def _ask_rows(X, x_s, start, stop, z, x_t, B: gl.constexpr, C: gl.constexpr, D: gl.constexpr):
    """A tile of a chunk on its way to shared memory; rows behind the last token are zeros."""
    r = gl.arange(0, C, gl.SliceLayout(1, B)) + z
    d = gl.arange(0, D, gl.SliceLayout(0, B))[None, :]
    _copy(x_s, X + start.to(gl.int64) * x_t + (r[:, None] * x_t + d), mask=(start + r < stop)[:, None])


@gluon.jit
def _ask_state(STATES, S_s, B: gl.constexpr, D: gl.constexpr):
    """The S that enters a chunk on its way to shared memory."""
    r = gl.arange(0, D, gl.SliceLayout(1, B))[:, None]
    _copy(S_s, STATES + (r * D + gl.arange(0, D, gl.SliceLayout(0, B))[None, :]))


@gluon.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg", *PER_TOKEN])
def adjoint(
    Q, K, G, RIDGE, NODES, STATES, TRACES, DX, ADDED, DQ, DK, MOMENTS, DTRACES, TOTALS, DRIDGE, DNODES, DTRACE, DC,
    SLOTS, length, per_sequence, heads, group, gg,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, n_b, n_t, n_h, n_n,
    ORDER: gl.constexpr, D: gl.constexpr, C: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """From the gradient DX of ``x_order`` to those of q, ridge and nodes, and what this chunk does to k.

    DK is ADDED plus what readings of this chunk do to it, but for the traces: DTRACE has the gradient of that at each
    token. MOMENTS is ``-sum_n x_{n-1} (read u_n)^T``, DTRACES the sum of the decayed dtrace, TOTALS the log2-decay of
    the chunk: `scan_later` takes these three to earlier chunks. DC is what the cumulated decays do at reading tokens
    and, but for the traces, at those that are read by this chunk; `fold_later` adds the rest. All of ``[B, T, HQ,
    ...]``, contiguous; the states as `states` left them, bfloat16.
    """
    # Layouts: accumulators [C, D], [C, C] and [D, D]; B, whole rows in global memory; R and RC, numbers of rows.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, L)
    RC: gl.constexpr = gl.SliceLayout(1, LC)
    CC: gl.constexpr = gl.SliceLayout(0, LC)
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])  # (a layout that can be scanned)
    SH: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    SHC: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    SHD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, D], gl.bfloat16)
    h = gl.program_id(0) % heads
    slot = gl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if (sequence < 0) | (start >= stop):
        return
    hk = h // group
    kv_heads = heads // group
    # (With a first dimension, through which the compiler can be given other names for them: see z.)
    k_1 = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SH)
    S_1 = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], SHD)
    x_s = gl.allocate_shared_memory(gl.bfloat16, [ORDER, C, D], SH)  # x_0, x_1, ...
    q_1 = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SH)  # then the first u; the others are where an x was
    w_1 = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SH)  # dx, then -read u
    by_x = gl.allocate_shared_memory(gl.bfloat16, [ORDER, C, C], SHC)  # -E (x k^T), for each x
    by_u1 = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], SHC)  # -E (u k^T)
    # (What E multiplies is rounded to bfloat16. In float16 it has three digits more, and is 0 where it is below 6e-8.)
    E_1 = gl.allocate_shared_memory(gl.float16, [1, C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    q_s, k_s, S_s, w_s = q_1.index(0), k_1.index(0), S_1.index(0), w_1.index(0)
    by_u, E_s = by_u1.index(0), E_1.index(0)
    # Numbers per token, from the threads that have them to those that want them (in memory that is free until then).
    numbers_s = _as(by_u, gl.float32, [C // 2, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    c_s, squares_s = numbers_s.index(0), numbers_s.index(1)

    _ask_rows(Q + (batch * q_b + h.to(gl.int64) * q_h), q_s, start, stop, 0, q_t, B, C, D)
    _ask_rows(K + (batch * k_b + hk.to(gl.int64) * k_h), k_s, start, stop, 0, k_t, B, C, D)
    _ask_state(STATES + (slot.to(gl.int64) * kv_heads + hk) * (D * D), S_s, B, D)
    async_copy.commit_group()
    _ask_rows(DX + (batch * length * heads + h) * D, w_s, start, stop, 0, heads * D, B, C, D)
    async_copy.commit_group()
    g, ridge, weights, trace = _numbers_of(
        G, RIDGE, NODES, TRACES, batch, slot, start, stop, h, heads, group, gg, length, r_b, r_t, r_h, n_b, n_t, n_h,
        n_n, ORDER, C, BLOCKS, R, SCAN,
    )  # fmt: skip
    live = start + gl.arange(0, C, R) < stop
    nodes = NODES + batch * n_b + h * n_h + (start.to(gl.int64) + gl.arange(0, C, R)) * n_t
    async_copy.wait_group(1)
    if GATED:
        g = gl.maximum(g, -110.0) * 1.4426950408889634
        c_s.store(gl.associative_scan(g, 0, _add))
        total = gl.sum(g, 0)
    else:
        total = 0.0
    _ready()
    k = _wide(k_s.load(L))
    squares_s.store(gl.sum(k * k, 1))
    mask = gl.arange(0, C, RC)[:, None] >= gl.arange(0, C, CC)[None, :]
    if GATED:
        E = gl.where(mask, gl.exp2(c_s.load(RC)[:, None] - c_s.load(CC)[None, :]), 0.0)
        read = gl.exp2(c_s.load(R))
    else:
        E = gl.where(mask, 1.0, 0.0)
        read = gl.full([C], 1.0, gl.float32, R)
    E_s.store(E.to(gl.float16))
    _barrier()
    traces = read * trace + gl.convert_layout(gl.sum(E * squares_s.load(CC)[None, :], 1), R)
    steps = ()
    for n in gl.static_range(ORDER + 1):
        steps = steps + (1.0 / gl.where(live, ridge + weights[n] * traces, 1.0),)

    # The readings once more: x_0 ... x_{ORDER-1}, and their weights inside the chunk, negative.
    zeros = gl.zeros([C, D], gl.float32, L)
    zeros_c = gl.zeros([C, C], gl.float32, LC)
    x = _wide(q_s.load(L)) * steps[0][:, None]
    theta = 1.0 / steps[0]  # x_0 theta is q, which needs no memory of its own
    x_s.index(0).store(x.to(gl.bfloat16))
    _ready()
    own_x = ()
    for n in gl.static_range(1, ORDER + 1):
        raw = warpgroup_mma(x_s.index(n - 1), k_s.permute((1, 0)), zeros_c, use_acc=False, is_async=True)
        if n < ORDER:
            acc = warpgroup_mma(x_s.index(n - 1), S_s, zeros, use_acc=False, is_async=True)
            raw = warpgroup_mma_wait(1, (raw,))
        else:
            raw = warpgroup_mma_wait(0, (raw,))
        by_x.index(n - 1).store((raw * -E_s.load(LC).to(gl.float32)).to(gl.bfloat16))
        if GATED:
            own_x = own_x + (_diagonal(raw),)
        if n < ORDER:
            by = steps[n][:, None]
            x = x * (1.0 - by * ridge[:, None]) + (by * theta[:, None]) * _wide(x_s.index(0).load(L))
            _ready()
            acc = warpgroup_mma_wait(0, (acc,))
            acc = acc * -read[:, None]
            acc = warpgroup_mma(by_x.index(n - 1), k_s, acc, is_async=True)
            acc = warpgroup_mma_wait(0, (acc,))
            x += by * acc
            x_s.index(n).store(x.to(gl.bfloat16))
            _ready()

    # Back. What y waits for comes first; dk and the moment are on their way while the next u is prepared.
    z = _zero(start)
    k_s, S_s, w_s, by_u, E_s = k_1.index(z), S_1.index(z), w_1.index(z), by_u1.index(z), E_1.index(z)
    async_copy.wait_group(0)
    _barrier()
    y = _wide(w_s.load(L))
    moment = gl.zeros([D, D], gl.float32, L)
    dk = gl.zeros([C, D], gl.float32, L)
    part = _own_part(y * 0.0)
    P: gl.constexpr = gl.SliceLayout(1, part.type.layout)
    ridge_p = gl.convert_layout(ridge, P)[:, None]
    theta_p = gl.convert_layout(theta, P)[:, None]
    dridge, dtrace, dc = part, part, part
    dthetas, after = (), part
    for n in gl.static_range(ORDER, 0, -1):
        if n == ORDER:
            u_n = q_1.index(z)
        else:
            u_n = x_s.index(n + z)
        by = steps[n][:, None]
        xy = _own_part(_wide(x_s.index(n - 1 + z).load(L)) * y)
        qy = xy if n == 1 else _own_part(_wide(x_s.index(z).load(L)) * y)
        if n < ORDER:
            dk, moment = warpgroup_mma_wait(0, (dk, moment))
        _barrier()
        u_n.store((y * by).to(gl.bfloat16))
        w_s.store((y * (-by * read[:, None])).to(gl.bfloat16))
        y *= 1.0 - by * ridge[:, None]
        _ready()
        raw = warpgroup_mma(u_n, k_s.permute((1, 0)), zeros_c, use_acc=False, is_async=True)
        y = warpgroup_mma(w_s, S_s, y, is_async=True)
        raw = warpgroup_mma_wait(1, (raw,))
        by_u.store((raw * -E_s.load(LC).to(gl.float32)).to(gl.bfloat16))
        if GATED:
            u_ = _diagonal(raw)
            x_ = own_x[n - 1]
            same = u_.to(gl.bfloat16).to(gl.float32) * x_ - x_.to(gl.bfloat16).to(gl.float32) * u_
            dc += 0.5 * gl.convert_layout(same, part.type.layout)
        _ready()
        y = warpgroup_mma(by_u, k_s, y, is_async=True)
        dk = warpgroup_mma(by_x.index(n - 1 + z).permute((1, 0)), u_n, dk, is_async=True)
        dk = warpgroup_mma(by_u.permute((1, 0)), x_s.index(n - 1 + z), dk, is_async=True)
        moment = warpgroup_mma(x_s.index(n - 1 + z).permute((1, 0)), w_s, moment, is_async=True)
        y = warpgroup_mma_wait(3, (y,))
        step = gl.convert_layout(steps[n], P)[:, None]
        after = _own_part(_wide(x_s.index(n - 1 + z).load(L)) * y)
        xSu = (1.0 - step * ridge_p) * xy - after
        dtheta = -step * (step * (theta_p * qy - ridge_p * xy) - xSu)
        dthetas = dthetas + (dtheta,)
        node = gl.load(nodes + n * n_n, mask=live, other=1.0).to(gl.float32)
        dridge += dtheta - step * xy
        dtrace += dtheta * gl.convert_layout(node, P)[:, None]
        dc -= xSu
    dk, moment = warpgroup_mma_wait(0, (dk, moment))
    dc -= 0.5 * _own_part(dk * _wide(k_s.load(L)))

    # Gradients of the numbers per token.
    z = _zero(start)
    br = gl.arange(0, C, gl.SliceLayout(1, B)) + z
    bd = gl.arange(0, D, gl.SliceLayout(0, B))[None, :]
    blive = (start + br < stop)[:, None]
    first = (batch * length + start) * heads + h
    own = first * D
    at_b = br[:, None] * (heads * D) + bd
    rows = gl.arange(0, C, R) + z
    token = first + rows * heads
    live = start + rows < stop
    added = gl.load(ADDED + own + at_b, mask=blive, other=0.0)
    for _ in gl.static_range(ORDER, 4):
        dthetas = dthetas + (part,)
    sums = _rest(after, dridge, dtrace, dc, dthetas[0], dthetas[1], dthetas[2], dthetas[3], R)
    dtheta = -steps[0] * sums[0]  # (theta times the square)
    gl.store(DNODES + token * (ORDER + 1), dtheta * traces, mask=live)
    dridge = sums[1] + dtheta
    dtrace = sums[2] + dtheta * gl.load(nodes, mask=live, other=1.0).to(gl.float32)
    for i in gl.static_range(ORDER):
        gl.store(DNODES + token * (ORDER + 1) + (ORDER - i), sums[4 + i] * traces, mask=live)
    gl.store(DRIDGE + token, dridge, mask=live)
    gl.store(DTRACE + token, dtrace, mask=live)
    gl.store(DC + token, sums[3] + dtrace * traces, mask=live)
    at = slot.to(gl.int64) * heads + h
    gl.store(DTRACES + at, gl.sum(dtrace * read, 0))
    gl.store(TOTALS + at, total)

    # Through shared memory, so that whole rows are written.
    _barrier()
    S_s.store(moment.to(gl.bfloat16))
    w_s.store(dk.to(gl.bfloat16))
    dq = y * steps[0][:, None]
    for n in gl.static_range(ORDER, 0, -1):
        dq += _wide((q_s if n == ORDER else x_s.index(n)).load(L))
    q_s.store(dq.to(gl.bfloat16))  # (a thread overwrites what it has read)
    _barrier()
    sr = gl.arange(0, D, gl.SliceLayout(1, B))[:, None] + z
    gl.store(MOMENTS + at * (D * D) + sr * D + bd, S_s.load(B))
    gl.store(DQ + own + at_b, q_s.load(B), mask=blive)
    gl.store(DK + own + at_b, (w_s.load(B).to(gl.float32) + added.to(gl.float32)).to(gl.bfloat16), mask=blive)
