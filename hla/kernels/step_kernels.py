"""The kernels of `hla.kernels.step`; its docstring says how they go through a state."""

from __future__ import annotations

import triton
import triton.language as tl

from hla.kernels.launch import prefetch, wait

# Strides of tokens depend on what they were cut from, a T among it: no value of theirs may compile anything anew.
_STRIDED = ("q", "k", "v", "p", "g", "gain", "ridge", "value_gain", "value_ridge", "nodes")
VARYING = [f"{name}_{of}" for name in _STRIDED for of in "bth"] + ["nodes_n"]


@triton.jit
def _vector(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _old(pointer, at, mask):
    """What the state held; None is the empty state."""
    if pointer is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, at, x, mask):
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _at(pointer, b, t, h, stride_b, stride_t, stride_h):
    """Where row b, token t, head h of a ``[B, T, H, ...]`` tensor begins (b has 64 bits)."""
    return pointer + b * stride_b + t * stride_t + tl.cast(h, tl.int64) * stride_h


@triton.jit
def _number(x, b, t, h, stride_b, stride_t, stride_h, per_token: tl.constexpr):
    """A number, or that of a token and head in a ``[B, T, H]`` tensor."""
    if per_token:
        return tl.load(_at(x, b, t, h, stride_b, stride_t, stride_h)).to(tl.float32)
    else:
        return x


@triton.jit
def _decay(g, b, t, h, stride_b, stride_t, stride_h):
    if g is None:
        return 1.0
    else:
        return tl.exp(tl.load(_at(g, b, t, h, stride_b, stride_t, stride_h)).to(tl.float32))


@triton.jit
def _node(nodes, at, n, ORDER: tl.constexpr):
    """Node n of a query head, or Chebyshev's (`hla.ops.checks.chebyshev_nodes`) where none are given."""
    if nodes is None:
        return 0.5 - 0.5 * tl.cos((n + 0.5) * (3.141592653589793 / (ORDER + 1)))
    else:
        return tl.load(nodes + at).to(tl.float32)


@triton.jit
def _pick(xs, readers, reader):
    """One row of ``xs [readers, n]``, which lies in registers."""
    return tl.sum(tl.where((readers == reader)[:, None], xs, 0.0), 0)


@triton.jit
def _in_S(rows, wide, K: tl.constexpr, PACKED: tl.constexpr, MIRRORED: tl.constexpr):
    """Where ``S[rows, wide]`` lies in that of its head, whether it exists, and is stored there and not mirrored.

    Without MIRRORED, where what is stored lies: the compiler sees that rows of a tile are contiguous.
    """
    r, c = rows[:, None], wide[None, :]
    if PACKED:
        TILES: tl.constexpr = (K + 15) // 16
        stored = c // 16 <= r // 16
        if MIRRORED:
            i, j = tl.where(stored, r, c), tl.where(stored, c, r)
        else:
            i, j = r, c
        tile = (i // 16) * (i // 16 + 1) // 2 + j // 16
        at = tile * 256 + (i % 16) * 16 + j % 16
        exists = (r < TILES * 16) & (c < TILES * 16)
        return at, exists, exists & stored
    else:
        exists = (r < K) & (c < K)
        return r * K + c, exists, exists


@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    q, k, v, p, g, gain, ridge, value_gain, value_ridge, slots, o,
    S_old, P_old, F_old, m_old, n_old, S_new, P_new, F_new, m_new, n_new,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, p_b, p_t, p_h, g_b, g_t, g_h,
    gain_b, gain_t, gain_h, ridge_b, ridge_t, ridge_h,
    value_gain_b, value_gain_t, value_gain_h, value_ridge_b, value_ridge_t, value_ridge_h,
    S_old_b, P_old_b, F_old_b, m_old_b, n_old_b, S_new_b, P_new_b, F_new_b, m_new_b, n_new_b,
    scale, eps,
    GAIN: tl.constexpr, RIDGE: tl.constexpr, VALUE_GAIN: tl.constexpr, VALUE_RIDGE: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, NORMALIZE: tl.constexpr,
    GP: tl.constexpr, GQ: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr,
    PACKED: tl.constexpr, T: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, READERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All operators with one or both of the switches KEYS and VALUES, or none.

    ``S [HKV, K, K]`` makes the keys (KEYS), ``P [HKV, K, V]`` the values (VALUES), the output reads ``F``, which has
    GP heads to one of k and v, each read by GQ of q. m and n are P and F for v = 1. HEADS: GP * GQ rounded up.
    What waits for other rows is kept by reader ``t * HEADS + head``, of which there are READERS, T rounded up.
    """
    program = tl.program_id(0)
    split = program % SPLITS
    kv = (program // SPLITS) % HKV
    b = (program // (SPLITS * HKV)).to(tl.int64)
    slot = b if slots is None else tl.load(slots + b).to(tl.int64)

    TILES: tl.constexpr = (K + 15) // 16
    S_SIZE: tl.constexpr = TILES * (TILES + 1) // 2 * 256 if PACKED else K * K
    if S_old is not None:
        S_old += slot * S_old_b + kv * S_SIZE
    if S_new is not None:
        S_new += slot * S_new_b + kv * S_SIZE
    if P_old is not None:
        P_old += slot * P_old_b + kv * K * V
    if P_new is not None:
        P_new += slot * P_new_b + kv * K * V
    cols = split * BV + tl.arange(0, BV)  # of v
    in_v = cols < V
    wide = tl.arange(0, BK)  # columns of S
    in_k = wide < K
    readers = tl.arange(0, READERS)

    if PDL:  # into the cache: the loops load the state together with what the previous launch writes
        LINES: tl.constexpr = (BV + 31) // 32  # of a row
        line = tl.arange(0, BK * LINES)
        row, col = line // LINES, split * BV + line % LINES * 32
        for j in range(GP):
            prefetch(F_old + slot * F_old_b + ((kv * GP + j) * K + row) * V + col, (row < K) & (col < V))
    wait(PDL)

    if VALUES:
        values = tl.zeros((READERS, BV), tl.float32)
        ones = tl.zeros((READERS,), tl.float32)
        for first in range(0, K, BI):
            rows = first + tl.arange(0, BI)
            in_rows = rows < K
            at = rows[:, None] * V + cols[None, :]
            inside = in_rows[:, None] & in_v[None, :]
            P = _old(P_old, at, inside)
            if NORMALIZE:
                m = _old(m_old if m_old is None else m_old + slot * m_old_b, kv * K + rows, in_rows)
            for t in range(T):
                decay = _decay(g, b, t, kv, g_b, g_t, g_h)
                k_rows = _vector(_at(k, b, t, kv, k_b, k_t, k_h), rows, in_rows)
                x = _vector(_at(v, b, t, kv, v_b, v_t, v_h), cols, in_v)
                P = decay * P + k_rows[:, None] * x[None, :]
                if NORMALIZE:
                    m = decay * m + k_rows
                for j in range(GP):
                    p_rows = _vector(_at(p, b, t, kv * GP + j, p_b, p_t, p_h), rows, in_rows)
                    read = tl.sum(p_rows[:, None] * P, 0)
                    values += tl.where((readers == t * HEADS + j)[:, None], read[None, :], 0.0)
                    if NORMALIZE:
                        ones += tl.where(readers == t * HEADS + j, tl.sum(p_rows * m, 0), 0.0)
            # Threads that hold the same element must all have read it before one of them writes it.
            tl.debug_barrier()
            _write(P_new, at, P, inside)
            if NORMALIZE:
                _write(m_new + slot * m_new_b, kv * K + rows, m, in_rows)

    if PACKED:
        keys = tl.zeros((READERS, BK), tl.float32)
        parts = tl.zeros((BI, BK), tl.float32)  # of the only reader: added up over rows once, not for every block
        for first in range(0, (K + 15) // 16 * 16, BI):
            rows = first + tl.arange(0, BI)
            S_at, _, S_stored = _in_S(rows, wide, K, True, False)
            mirrored = wide[None, :] // 16 < rows[:, None] // 16  # tiles left of the diagonal stand for two
            S = _old(S_old, S_at, S_stored)
            for t in range(T):
                decay = _decay(g, b, t, kv, g_b, g_t, g_h)
                k_at = _at(k, b, t, kv, k_b, k_t, k_h)
                k_rows, k_wide = _vector(k_at, rows, rows < K), _vector(k_at, wide, in_k)
                S = tl.where(S_stored, decay * decay * S + k_rows[:, None] * k_wide[None, :], 0.0)
                for j in range(GP):
                    p_at = _at(p, b, t, kv * GP + j, p_b, p_t, p_h)
                    S_p = tl.sum(S * _vector(p_at, wide, in_k)[None, :], 1)
                    both = tl.where(mirrored, S * _vector(p_at, rows, rows < K)[:, None], 0.0)
                    both += tl.where(rows[:, None] == wide[None, :], S_p[:, None], 0.0)
                    if T * GP == 1:
                        parts += both
                    else:
                        keys += tl.where((readers == t * HEADS + j)[:, None], tl.sum(both, 0)[None, :], 0.0)
            tl.debug_barrier()
            _write(S_new, S_at, S, S_stored)
        if T * GP == 1:
            keys += tl.where((readers == 0)[:, None], tl.sum(parts, 0)[None, :], 0.0)

    out = tl.zeros((READERS, BV), tl.float32)
    sums = tl.zeros((READERS,), tl.float32)
    for first in range(0, K, BI):
        rows = first + tl.arange(0, BI)
        in_rows = rows < K
        inside = in_rows[:, None] & in_v[None, :]
        if KEYS and not PACKED:
            S_at, S_inside, _ = _in_S(rows, wide, K, False, False)
            S = _old(S_old, S_at, S_inside)
            if T > 1:
                before = S  # every head of p goes through the tokens
            else:
                decay = _decay(g, b, 0, kv, g_b, g_t, g_h)
                k_at = _at(k, b, 0, kv, k_b, k_t, k_h)
                k_rows, k_wide = _vector(k_at, rows, in_rows), _vector(k_at, wide, in_k)
                S = decay * decay * S + k_rows[:, None] * k_wide[None, :]
        for j in range(GP):
            head = kv * GP + j
            at = (head * K + rows)[:, None] * V + cols[None, :]
            F = _old(F_old if F_old is None else F_old + slot * F_old_b, at, inside)
            if NORMALIZE:
                n = _old(n_old if n_old is None else n_old + slot * n_old_b, head * K + rows, in_rows)
            if KEYS and not PACKED and T > 1:
                S = before
            for t in range(T):
                decay = _decay(g, b, t, kv, g_b, g_t, g_h)
                k_at = _at(k, b, t, kv, k_b, k_t, k_h)
                key = _vector(k_at, rows, in_rows)
                x = _vector(_at(v, b, t, kv, v_b, v_t, v_h), cols, in_v)
                one = 1.0
                if KEYS:
                    p_at = _at(p, b, t, head, p_b, p_t, p_h)
                    if PACKED:
                        whole = _pick(keys, readers, t * HEADS + j)
                        S_p = tl.sum(tl.where(rows[:, None] == wide[None, :], whole[None, :], 0.0), 1)
                    else:
                        if T > 1:
                            S = decay * decay * S + key[:, None] * _vector(k_at, wide, in_k)[None, :]
                        S_p = tl.sum(S * _vector(p_at, wide, in_k)[None, :], 1)
                    key = S_p * (scale * _number(gain, b, t, head, gain_b, gain_t, gain_h, GAIN))
                    key += _number(ridge, b, t, head, ridge_b, ridge_t, ridge_h, RIDGE) * _vector(p_at, rows, in_rows)
                if VALUES:
                    a = scale * _number(value_gain, b, t, head, value_gain_b, value_gain_t, value_gain_h, VALUE_GAIN)
                    c = _number(value_ridge, b, t, head, value_ridge_b, value_ridge_t, value_ridge_h, VALUE_RIDGE)
                    x = a * _pick(values, readers, t * HEADS + j) + c * x
                    if NORMALIZE:
                        one = a * tl.sum(tl.where(readers == t * HEADS + j, ones, 0.0), 0) + c
                F = decay * F + key[:, None] * x[None, :]
                if NORMALIZE:
                    n = decay * n + key * one
                for i in range(GQ):
                    q_rows = _vector(_at(q, b, t, head * GQ + i, q_b, q_t, q_h), rows, in_rows)
                    reader = t * HEADS + j * GQ + i
                    read = tl.sum(q_rows[:, None] * F, 0)
                    out += tl.where((readers == reader)[:, None], read[None, :], 0.0)
                    if NORMALIZE:
                        sums += tl.where(readers == reader, tl.sum(q_rows * n, 0), 0.0)
            tl.debug_barrier()
            _write(F_new + slot * F_new_b, at, F, inside)
            if NORMALIZE:
                _write(n_new + slot * n_new_b, head * K + rows, n, in_rows)
        if KEYS and not PACKED:  # last, so that the loads of F did not have to wait for these stores
            _write(S_new, S_at, S, S_inside)

    out *= scale
    if NORMALIZE:
        out = out / (scale * sums + eps)[:, None]
    head, token = readers % HEADS, readers // HEADS
    o_at = (((b * T + token) * HKV + kv) * (GP * GQ) + head)[:, None] * V + cols[None, :]
    _write(o, o_at, out, ((head < GP * GQ) & (token < T))[:, None] & in_v[None, :])


@triton.jit
def _all_nodes(nodes, at, nodes_n, ORDER: tl.constexpr):
    found = (_node(nodes, at, 0, ORDER),)
    for n in tl.static_range(1, ORDER + 1):
        found = found + (_node(nodes, at + n * nodes_n, n, ORDER),)  # type: ignore[assignment]
    return found


@triton.jit
def _iterated(S, query, least, trace, nodes, ORDER: tl.constexpr, BK: tl.constexpr):
    """``x_ORDER`` of a query: ``theta_n x_n = q + (theta_n - ridge - S) x_{n-1}``.

    S is symmetric, so the iterations read its rows and its columns in turn: what one leaves in the threads of the rows
    the next one wants there, and nothing has to travel between them but sums.
    """
    wide = tl.arange(0, BK)
    diagonal = wide[:, None] == wide[None, :]
    x = query / (least + nodes[0] * trace)
    for n in tl.static_range(1, ORDER + 1):
        beyond = nodes[n] * trace
        # (As terms that need x: what does not, the compiler would compute ahead for all n and spill.)
        if n % 2 == 1:
            x = (query + tl.sum(tl.where(diagonal, (beyond * x)[:, None], 0.0) - S * x[:, None], 0)) / (least + beyond)
        else:
            x = (query + tl.sum(tl.where(diagonal, (beyond * x)[None, :], 0.0) - S * x[None, :], 1)) / (least + beyond)
    return x


@triton.jit(do_not_specialize=VARYING)
def query_side_kernel(
    q, k, v, g, ridge, nodes, slots, o, S_old, P_old, S_new, P_new,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, ridge_b, ridge_t, ridge_h,
    nodes_b, nodes_t, nodes_h, nodes_n,
    S_old_b, P_old_b, S_new_b, P_new_b,
    scale,
    RIDGE: tl.constexpr, ORDER: tl.constexpr, GQ: tl.constexpr, BC: tl.constexpr, HELD: tl.constexpr,
    PACKED: tl.constexpr, T: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, READERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hla_q: S is updated, every query of the group iterates on it, then P is updated and read in blocks of columns.

    With BI = BK, S stays in registers for all tokens, and with HELD (one token, BC >= V) all of P, too: then both are
    on their way back to memory before the first iteration. A larger S goes through memory, in blocks of BI rows:
    written by every token, and read again by each iteration.
    """
    program = tl.program_id(0)
    kv = program % HKV
    b = (program // HKV).to(tl.int64)
    slot = b if slots is None else tl.load(slots + b).to(tl.int64)

    TILES: tl.constexpr = (K + 15) // 16
    S_SIZE: tl.constexpr = TILES * (TILES + 1) // 2 * 256 if PACKED else K * K
    if S_old is not None:
        S_old += slot * S_old_b + kv * S_SIZE
        P_old += slot * P_old_b + kv * K * V
    S_new += slot * S_new_b + kv * S_SIZE
    P_new += slot * P_new_b + kv * K * V
    wide = tl.arange(0, BK)
    in_k = wide < K
    readers = tl.arange(0, READERS)  # t * HEADS + head
    if BI == BK:
        at, inside, stored = _in_S(wide, wide, K, PACKED, False)
        S = _old(S_old, at, stored)
        before = tl.sum(tl.where(wide[:, None] == wide[None, :], S, 0.0))  # its trace
    if HELD:
        cols = tl.arange(0, BC)
        P_at = wide[:, None] * V + cols[None, :]
        P_inside = in_k[:, None] & (cols < V)[None, :]
        P = _old(P_old, P_at, P_inside)
    elif PDL:  # P, which has to wait for registers, goes into the cache
        lines = tl.arange(0, BK * BK // 32) * 32
        prefetch(P_old + lines, lines < K * V)
    wait(PDL)
    if BI == BK:
        if PACKED:
            S += tl.trans(tl.where(wide[None, :] // 16 < wide[:, None] // 16, S, 0.0))

    if HELD:
        decay = _decay(g, b, 0, kv, g_b, g_t, g_h)
        k_wide = _vector(_at(k, b, 0, kv, k_b, k_t, k_h), wide, in_k)
        x = _vector(_at(v, b, 0, kv, v_b, v_t, v_h), cols, cols < V)
        S = decay * S + k_wide[:, None] * k_wide[None, :]
        P = decay * P + k_wide[:, None] * x[None, :]
        trace = decay * before + tl.sum(k_wide * k_wide)
        for i in tl.static_range(GQ):
            head = kv * GQ + i
            query = _vector(_at(q, b, 0, head, q_b, q_t, q_h), wide, in_k)
            least = _number(ridge, b, 0, head, ridge_b, ridge_t, ridge_h, RIDGE)
            own = _all_nodes(nodes, b * nodes_b + head * nodes_h, nodes_n, ORDER)
            if i == 0:  # (behind the loads that the iterations wait for)
                # Threads that hold the same element must all have read it before one of them writes it.
                tl.debug_barrier()
                _write(S_new, at, S, stored)
                _write(P_new, P_at, P, P_inside)
            xj = _iterated(S, query, least, trace, own, ORDER, BK)
            out = scale * tl.sum(xj[:, None] * P, 0)  # (a name of its own: `read` has another shape below)
            _write(o, ((b * HKV + kv) * GQ + i) * V + cols, out, cols < V)
        return

    xs = tl.zeros((READERS, BK), tl.float32)
    for t in range(T):
        decay = _decay(g, b, t, kv, g_b, g_t, g_h)
        k_at = _at(k, b, t, kv, k_b, k_t, k_h)
        k_wide = _vector(k_at, wide, in_k)
        if BI == BK:
            S = decay * S + k_wide[:, None] * k_wide[None, :]
            before = decay * before + tl.sum(k_wide * k_wide)
            trace = before
        else:
            trace = 0.0
            for first in range(0, BK, BI):
                rows = first + tl.arange(0, BI)
                at, inside, stored = _in_S(rows, wide, K, PACKED, True)
                if t == 0:
                    S = _old(S_old, at, inside)
                else:
                    S = _old(S_new, at, inside)
                S = decay * S + _vector(k_at, rows, rows < K)[:, None] * k_wide[None, :]
                trace += tl.sum(tl.where(rows[:, None] == wide[None, :], S, 0.0))
                # Threads that hold the same element must all have read it before one of them writes it.
                tl.debug_barrier()
                _write(S_new, at, S, stored)
            tl.debug_barrier()  # the iterations read what other threads have written

        for j in range(GQ):
            head = kv * GQ + j
            query = _vector(_at(q, b, t, head, q_b, q_t, q_h), wide, in_k)
            least = _number(ridge, b, t, head, ridge_b, ridge_t, ridge_h, RIDGE)
            node_at = b * nodes_b + t * nodes_t + head * nodes_h
            if PACKED and BI == BK:
                own = _all_nodes(nodes, node_at, nodes_n, ORDER)
                xj = _iterated(S, query, least, trace, own, ORDER, BK)
            else:
                xj = query / (least + _node(nodes, node_at, 0, ORDER) * trace)
                for n in range(1, ORDER + 1):
                    theta = least + _node(nodes, node_at + n * nodes_n, n, ORDER) * trace
                    if BI == BK:  # (`_iterated` takes twice the registers, so half as many programs run at a time)
                        read = tl.sum(S * xj[:, None], 0)
                    else:
                        read = tl.zeros((BK,), tl.float32)
                        for first in range(0, BK, BI):
                            rows = first + tl.arange(0, BI)
                            at, inside, _ = _in_S(rows, wide, K, PACKED, True)
                            part = tl.sum(_old(S_new, at, inside) * xj[None, :], 1)
                            part = tl.reshape(tl.broadcast_to(part[None, :], (BK // BI, BI)), (BK,))
                            read = tl.where(wide // BI == first // BI, part, read)
                    xj += (query - read - least * xj) / theta
            xs += tl.where((readers == t * HEADS + j)[:, None], xj[None, :], 0.0)
        if BI < BK:
            tl.debug_barrier()  # the next token writes what other threads still read

    if BI == BK:
        tl.debug_barrier()
        _write(S_new, at, S, stored)

    for first in range(0, V, BC):
        cols = first + tl.arange(0, BC)
        in_v = cols < V
        P_at = wide[:, None] * V + cols[None, :]
        P_inside = in_k[:, None] & in_v[None, :]
        P = _old(P_old, P_at, P_inside)
        for t in range(T):
            decay = _decay(g, b, t, kv, g_b, g_t, g_h)
            k_wide = _vector(_at(k, b, t, kv, k_b, k_t, k_h), wide, in_k)
            x = _vector(_at(v, b, t, kv, v_b, v_t, v_h), cols, in_v)
            P = decay * P + k_wide[:, None] * x[None, :]
            for j in range(GQ):
                read = scale * tl.sum(_pick(xs, readers, t * HEADS + j)[:, None] * P, 0)
                _write(o, (((b * T + t) * HKV + kv) * GQ + j) * V + cols, read, in_v)
        tl.debug_barrier()
        _write(P_new, P_at, P, P_inside)
