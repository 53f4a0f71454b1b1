# mypy: ignore-errors
"""`adjoint` of `query_side` for heads of 128 on Hopper GPUs, in Gluon: both chains of readings at once.

What goes back, u, is read from the same S as x, with the nodes in the opposite order, and neither needs the other. So
one tile ``[2 C, D]`` has a row of x and one of u of every token, and the same instructions do both, ``w <- by (w more +
q - S w)``, with other numbers per row and without q for u. Left operands stay in registers, as in
`query_side_walk.solve_hopper`: no warp waits for another during the readings. x and u of a token are in the same
threads, where the second half of the steps finds what the first one left, and so x_{n-1} and u_n meet. All x and u,
and their weights inside the chunk, are in shared memory at the end, where what they mean for keys is one sum of
products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from hla.kernels.query_side_hopper import (
    _add,
    _as,
    _ask_rows,
    _ask_state,
    _barrier,
    _index,
    _numbers_of,
    _operand,
    _own_part,
    _ready,
    _segment,
    _wide,
    _zero,
)
from hla.kernels.query_side_kernels import PER_TOKEN

WARPS = 8
# Rows of an accumulator [128, 128] are eight of x, the same tokens of u, the next eight of x. This is how its threads
# hold one of both, [64, 128]; and [64, 64].
HALF = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
HALF_C = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 8], [0, 16], [0, 32]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


@gluon.jit
def _whole(x, u, L: gl.constexpr):
    """An accumulator, from rows of x and of u."""
    w = gl.join(x.reshape([8, 8, x.shape[1]]), u.reshape([8, 8, x.shape[1]])).permute((0, 3, 1, 2))
    return gl.convert_layout(w.reshape([128, x.shape[1]]), L)


@gluon.jit
def _halves(w):
    """Rows of x and of u, of an accumulator."""
    x, u = gl.split(w.reshape([8, 2, 8, w.shape[1]]).permute((0, 2, 3, 1)))
    return x.reshape([64, w.shape[1]]), u.reshape([64, w.shape[1]])


@gluon.jit
def _now(x):
    """x, which the compiler does not put off, with all that it comes from in registers, to where it is used."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _dot(a, b):
    """The products of rows, as `_own_part`."""
    return _now(_own_part(a * b))


@gluon.jit
def _over_threads(x, N: gl.constexpr):
    """The sum of what `_dot` left."""
    return gl.convert_layout(gl.sum(x, 1), N)


@gluon.jit
def _own(weights):
    """What a token's row weighs the token itself, the diagonal of ``[64, 64]``, as `_dot`."""
    x = weights.reshape([8, 8, 8, 4, 2])
    x = gl.sum(x * gl.where(_index(x, 0) == _index(x, 2), 1.0, 0.0), 2)
    x = gl.where(_index(x, 1) == 2 * _index(x, 2) + _index(x, 3), x, 0.0)
    return _now(gl.sum(x, 3).reshape([64, 4]))


@gluon.jit
def _tiles(x, u):
    """Two tiles ``[64, 64]``, one above the other, rounded."""
    return gl.join(x.to(gl.bfloat16), u.to(gl.bfloat16)).permute((2, 0, 1)).reshape([128, 64])


@gluon.jit
def _row(tile, H: gl.constexpr):
    """Rows of a tile in shared memory, in the threads that have those of the accumulators."""
    return _wide(tile.load(H))


@gluon.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg", *PER_TOKEN])
def adjoint_at_once(
    Q, K, G, RIDGE, NODES, STATES, TRACES, DX, ADDED, DQ, DK, MOMENTS, DTRACES, TOTALS, DRIDGE, DNODES, DTRACE, DC,
    SLOTS, length, per_sequence, heads, group, gg,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, n_b, n_t, n_h, n_n,
    ORDER: gl.constexpr, D: gl.constexpr, C: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """As `query_side_hopper.adjoint`.

    The numbers per token come from three products of rows for each n = 1 ... ORDER: ``x_{n-1} . u_n``, ``q . u_n``, and
    that of u_n with ``y = theta_n x_n`` or of x_{n-1} with ``y_{n-1}``, whichever of u_n and x_{n-1} was there first.
    That one is rounded, in all three, so that their differences have no errors of their own.
    """
    gl.static_assert(D == 128 and C == 64)
    # Layouts: accumulators [2 C, D], [2 C, C], [C, D]; B and W, whole rows in global memory, and rows in few threads.
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    LC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    W: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    RW: gl.constexpr = gl.SliceLayout(1, W)
    # x or u [C, D], what they weigh [C, C], and numbers per token.
    H: gl.constexpr = HALF
    HC: gl.constexpr = HALF_C
    N: gl.constexpr = gl.SliceLayout(1, H)
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [8], [0])  # (a layout that can be scanned)
    SH: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], gl.bfloat16)
    SHC: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    SHD: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, D], gl.bfloat16)
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    h = gl.program_id(0) % heads
    slot = gl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if (sequence < 0) | (start >= stop):
        return
    hk = h // group
    kv_heads = heads // group
    # x_n, u_{ORDER-n}, and their weights -E (x k^T), -E (u k^T), the last ones in the place of S. Each by itself: what
    # the compiler knows to be elsewhere needs no barrier. (With a first dimension, for z.)
    xs, us, weights = (), (), ()
    for _ in gl.static_range(ORDER):
        xs = xs + (gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SH),)
        us = us + (gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SH),)
    for _ in gl.static_range(ORDER - 1):
        weights = weights + (gl.allocate_shared_memory(gl.bfloat16, [1, 2 * C, C], SHC),)
    k_1 = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], SH)
    S_1 = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], SHD)
    k_s, S_s = k_1.index(0), S_1.index(0)
    # Numbers per token, from the threads that have them to those that want them.
    c_s = gl.allocate_shared_memory(gl.float32, [C], ONE)
    squares_s = gl.allocate_shared_memory(gl.float32, [C], ONE)

    q_s, dx_s = xs[ORDER - 1].index(0), us[ORDER - 1].index(0)  # (what is last to come there)
    _ask_rows(K + (batch * k_b + hk.to(gl.int64) * k_h), k_s, start, stop, 0, k_t, B, C, D)
    async_copy.commit_group()
    _ask_rows(Q + (batch * q_b + h.to(gl.int64) * q_h), q_s, start, stop, 0, q_t, B, C, D)
    _ask_rows(DX + (batch * length * heads + h) * D, dx_s, start, stop, 0, heads * D, B, C, D)
    _ask_state(STATES + (slot.to(gl.int64) * kv_heads + hk) * (D * D), S_s, B, D)
    async_copy.commit_group()
    g, ridge, nodes, trace = _numbers_of(
        G, RIDGE, NODES, TRACES, batch, slot, start, stop, h, heads, group, gg, length, r_b, r_t, r_h, n_b, n_t, n_h,
        n_n, ORDER, C, BLOCKS, N, SCAN,
    )  # fmt: skip
    async_copy.wait_group(1)
    total = 0.0
    if GATED:
        g = gl.maximum(g, -110.0) * 1.4426950408889634
        total = gl.sum(g, 0)
        c_s.store(gl.associative_scan(g, 0, _add))
    _barrier()
    k = _wide(k_s.load(W))
    squares_s.store(gl.sum(k * k, 1))
    async_copy.wait_group(0)
    _ready()
    cc = gl.arange(0, C, gl.SliceLayout(0, HC))
    rc = gl.arange(0, C, gl.SliceLayout(1, HC))
    mask = rc[:, None] >= cc[None, :]
    if GATED:
        c_c = c_s.load(gl.SliceLayout(0, HC))
        minus_E = gl.where(mask, -gl.exp2(c_s.load(gl.SliceLayout(1, HC))[:, None] - c_c[None, :]), 0.0)
        read = gl.exp2(c_s.load(N))
    else:
        minus_E = gl.where(mask, -1.0, 0.0)
        read = gl.full([C], 1.0, gl.float32, N)
    squares = squares_s.load(gl.SliceLayout(0, HC))
    traces = read * trace - gl.convert_layout(gl.sum(minus_E * squares[None, :], 1), N)

    # x_n and u_{ORDER-n}: y = theta w - S w - ridge w with the theta of w, and, of x, plus q = theta_0 x_0. Of both the
    # next one is y over its theta.
    zeros_c = gl.zeros([2 * C, C], gl.float32, LC)
    theta_0 = ridge + nodes[0] * traces
    x = _row(q_s, H) * (1.0 / theta_0)[:, None]
    u = _row(dx_s, H) * (1.0 / (ridge + nodes[ORDER] * traces))[:, None]
    of_x, of_u, x_own, u_own = (), (), (), ()
    for n in gl.static_range(ORDER):
        if 2 * n >= ORDER - 1:  # x_{n'-1} and u_{n'}, of which one is older: n' = n + 1, and n' = ORDER - n
            if 2 * n == ORDER - 1:
                u_m, x_m = u.to(gl.bfloat16).to(gl.float32), x.to(gl.bfloat16).to(gl.float32)
                xu = _dot(x, u_m), _dot(x_m, u)
                x_0 = x_m if n == 0 else _row(xs[0].index(0), H)
                qu = _dot(x_0, u_m), _dot(x_0, u)
            else:
                u_m = _row(us[ORDER - 1 - n].index(0), H)
                xu_x = _dot(x, u_m)
                x_0 = _row(xs[0].index(0), H)
                qu = _dot(x_0, u_m), _dot(x_0, u)
                if n < ORDER - 1:
                    xu = xu_x, _dot(_row(xs[ORDER - 1 - n].index(0), H), u)
                else:
                    xu = xu_x, qu[1]
        left = _operand(_whole(x, u, L), L)
        left_r = _operand(_whole(x * -read[:, None], u * -read[:, None], L), L)
        raw = warpgroup_mma(left, k_s.permute((1, 0)), zeros_c, use_acc=False, is_async=True)
        xs[n].index(0).store(x.to(gl.bfloat16))
        us[n].index(0).store(u.to(gl.bfloat16))
        if n == 0:
            x *= (nodes[1] * traces + theta_0)[:, None]
        else:
            x_0 = _row(xs[0].index(0), H)
            x = x * (nodes[n + 1] * traces)[:, None] + x_0 * theta_0[:, None]
        y = _whole(x, u * (nodes[ORDER - n] * traces)[:, None], L)
        y = warpgroup_mma(left_r, S_s, y, is_async=True)
        raw = warpgroup_mma_wait(1, (raw,))
        x_k, u_k = _halves(raw)
        if GATED:
            x_own = x_own + (_own(x_k),)
            u_own = (_own(u_k),) + u_own
        x_k *= minus_E
        u_k *= minus_E
        if n < ORDER - 1:
            weights[n].index(0).store(_tiles(x_k, u_k))
        y = warpgroup_mma(_operand(_whole(x_k, u_k, LC), LC), k_s, y, is_async=True)
        y = warpgroup_mma_wait(0, (y,))
        x, u = _halves(y)
        if 2 * n >= ORDER - 1:
            xy_x = _dot(x, _row(us[ORDER - 1 - n].index(0), H))
            xy = xy_x, _dot(_row(xs[ORDER - 1 - n].index(0), H), u)
            of_x = of_x + ((xu[0], qu[0], xy[0]),)
            of_u = ((xu[1], qu[1], xy[1]),) + of_u
        x *= (1.0 / (ridge + nodes[n + 1] * traces))[:, None]
        u *= (1.0 / (ridge + nodes[ORDER - 1 - n] * traces))[:, None]
    _barrier()
    halves_of_S = _as(S_1, gl.bfloat16, [2, C, D], SH)
    _as(S_1, gl.bfloat16, [2, 2 * C, C], SHC).index(0).store(_tiles(x_k, u_k))
    halves_of_S.index(1).store(u.to(gl.bfloat16))
    _ready()

    # What they do to k, while all u are added up.
    z = _zero(start)
    dk = gl.zeros([C, D], gl.float32, LK)
    for n in gl.static_range(ORDER):
        by = _as(weights[n] if n < ORDER - 1 else halves_of_S.index(z), gl.bfloat16, [2, C, C], SHC)
        dk = warpgroup_mma(by.index(z).permute((1, 0)), us[ORDER - 1 - n].index(z), dk, is_async=True)
        dk = warpgroup_mma(by.index(1 + z).permute((1, 0)), xs[ORDER - 1 - n].index(z), dk, is_async=True)
    first = (batch * length + start) * heads + h
    at_first = first * D
    wr = gl.arange(0, C, RW) + z
    wd = gl.arange(0, D, gl.SliceLayout(0, W))[None, :]
    dq = _wide(halves_of_S.index(1 + z).load(W))
    for n in gl.static_range(ORDER):
        dq += _wide(us[n].index(z).load(W))
    at_w = wr[:, None] * (heads * D) + wd
    gl.store(DQ + at_first + at_w, dq.to(gl.bfloat16), mask=(start + wr < stop)[:, None])
    if GATED:
        read_w = gl.exp2(c_s.load(RW))
    else:
        read_w = gl.full([C], 1.0, gl.float32, RW)
    dk = warpgroup_mma_wait(0, (dk,))
    _barrier()

    # The moment. Read u take the place of the weights.
    for n in gl.static_range(ORDER):
        to = _as(weights[n], gl.bfloat16, [1, C, D], SH) if n < ORDER - 1 else halves_of_S
        u = _wide(us[n].index(z).load(W))
        to.index(z).store((u * -read_w[:, None]).to(gl.bfloat16))
    k = _wide(k_1.index(z).load(LK))
    dot = gl.convert_layout(gl.sum(dk * k, 1), N)
    _ready()
    dk_s = k_1.index(z)
    dk_s.store(dk.to(gl.bfloat16))
    moment = gl.zeros([D, D], gl.float32, L)
    for n in gl.static_range(ORDER):
        of = _as(weights[ORDER - 1 - n], gl.bfloat16, [1, C, D], SH) if n > 0 else halves_of_S
        moment = warpgroup_mma(xs[n].index(z).permute((1, 0)), of.index(z), moment, is_async=True)

    # Gradients of the numbers per token.
    z = _zero(start)
    token = gl.arange(0, C, N) + z
    live = start + token < stop
    row = first + token * heads
    NODES += batch * n_b + h * n_h + (start.to(gl.int64) + token) * n_t
    P: gl.constexpr = gl.SliceLayout(1, of_u[0][0].type.layout)
    traces_p = gl.convert_layout(traces, P)[:, None]
    ridge_p = gl.convert_layout(ridge, P)[:, None]
    theta_p = gl.convert_layout(theta_0, P)[:, None]
    node = gl.load(NODES, mask=live, other=1.0).to(gl.float32)
    dtheta = -of_u[0][2] / theta_p
    gl.store(DNODES + row * (ORDER + 1), _over_threads(dtheta, N) * traces, mask=live)
    dridge, dtrace, dc = dtheta, dtheta * gl.convert_layout(node, P)[:, None], dtheta * 0.0
    for n in gl.static_range(1, ORDER + 1):
        # Of x: y = (theta_n - ridge) x_{n-1} + q - S x_{n-1} times u_n; of u, x_{n-1} times y_{n-1} = (theta_n - ridge)
        # u_n - S u_n.
        node = gl.convert_layout(gl.load(NODES + n * n_n, mask=live, other=1.0).to(gl.float32), P)
        node = node[:, None]
        if 2 * n > ORDER:
            xu, qu, xy = of_x[n - 1 - ORDER // 2]
        else:
            xu, qu, xy = of_u[n - 1]
            xy += theta_p * qu
        more = node * traces_p
        dtheta = xu - xy / (ridge_p + more)
        gl.store(DNODES + row * (ORDER + 1) + n, _over_threads(dtheta, N) * traces, mask=live)
        if GATED:
            # What rounding leaves of a token's own reading, which has no decay: in S x, the weight of x is rounded.
            xk, uk = x_own[n - 1], u_own[n - 1]
            same = uk.to(gl.bfloat16).to(gl.float32) * xk - xk.to(gl.bfloat16).to(gl.float32) * uk
            if 2 * n > ORDER:
                same = -same
            dc += 0.5 * gl.convert_layout(same, dc.type.layout)
        dridge += dtheta - xu
        dtrace += dtheta * node
        dc -= more * xu + theta_p * qu - xy
    dtrace = _over_threads(dtrace, N)
    gl.store(DRIDGE + row, _over_threads(dridge, N), mask=live)
    gl.store(DTRACE + row, dtrace, mask=live)
    gl.store(DC + row, _over_threads(dc, N) - 0.5 * dot + dtrace * traces, mask=live)
    at = slot.to(gl.int64) * heads + h
    gl.store(DTRACES + at, gl.sum(dtrace * read, 0))
    gl.store(TOTALS + at, total)

    # Through shared memory, so that whole rows are written.
    br = gl.arange(0, C, gl.SliceLayout(1, B)) + z
    bd = gl.arange(0, D, gl.SliceLayout(0, B))[None, :]
    at_b = br[:, None] * (heads * D) + bd
    blive = (start + br < stop)[:, None]
    added = gl.load(ADDED + at_first + at_b, mask=blive, other=0.0)
    moment = warpgroup_mma_wait(0, (moment,))
    _barrier()
    S_s = S_1.index(z)
    S_s.store(moment.to(gl.bfloat16))
    dk = dk_s.load(B).to(gl.float32) + added.to(gl.float32)
    gl.store(DK + at_first + at_b, dk.to(gl.bfloat16), mask=blive)
    _barrier()
    sr = gl.arange(0, D, gl.SliceLayout(1, B))[:, None] + z
    gl.store(MOMENTS + at * (D * D) + sr * D + bd, S_s.load(B))
