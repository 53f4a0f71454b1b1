"""`hla.step` as one kernel: a few tokens update the state and are answered from it in a single pass over memory.

Decoding moves the whole state once per call and computes next to nothing, so bytes are everything. One program owns
one key/value head of one row: it streams the head's moments in blocks of rows and uses every block for all it is good
for before it goes back. For hla2, rows i of S give the entries i of ``k~ = gain scale S p + ridge p``, with which rows
i of F are updated and then read by ``q_i``; nothing waits for the rest of S. So a block goes through all tokens of the
call while it is in registers. With grouped heads the program serves every query head of its group, so that S and P are
read and written once, and in place no other program can see them.

S is taken to be symmetric, as sums of ``k k^T`` are: its rows stand for its columns. Packed (`hla.ops.state.pack_S`),
only its tiles up to the diagonal are stored. Each of them is read once and multiplied by p from both sides, so an
entry of k~ is complete only after the last row of tiles: k~ of all tokens comes first, then F.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.launch import prefetch, wait
from hla.ops.checks import Call
from hla.ops.family import readings
from hla.ops.state import State, unpack, zeros

FEW_PROGRAMS = 132  # one to a multiprocessor of an H100: with fewer, a token waits for latency, not for bandwidth
RESIDENT = 128  # up to this K, hla_q holds S in registers
# Strides of tokens depend on what they were cut from, a T among it: no value of theirs may compile anything anew.
_STRIDED = ("q", "k", "v", "p", "g", "gain", "ridge", "value_gain", "value_ridge", "nodes")
# Whether a step overlaps with the launch before it, which then must not write the state (see `overlapping`).
_overlapping = contextvars.ContextVar("overlapping", default=False)
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
def _in_S(kv, rows, wide, K: tl.constexpr, PACKED: tl.constexpr, MIRRORED: tl.constexpr):
    """Where ``S[rows, wide]`` of a head lies, whether it exists, and whether it is stored there and not mirrored.

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
        at = kv * (TILES * (TILES + 1) // 2 * 256) + tile * 256 + (i % 16) * 16 + j % 16
        exists = (r < TILES * 16) & (c < TILES * 16)
        return at, exists, exists & stored
    else:
        exists = (r < K) & (c < K)
        return (kv * K + r) * K + c, exists, exists


@triton.jit(do_not_specialize=VARYING)
def _step_kernel(
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
            at = (kv * K + rows)[:, None] * V + cols[None, :]
            inside = in_rows[:, None] & in_v[None, :]
            P = _old(P_old if P_old is None else P_old + slot * P_old_b, at, inside)
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
            _write(P_new + slot * P_new_b, at, P, inside)
            if NORMALIZE:
                _write(m_new + slot * m_new_b, kv * K + rows, m, in_rows)

    if PACKED:
        keys = tl.zeros((READERS, BK), tl.float32)
        parts = tl.zeros((BI, BK), tl.float32)  # of the only reader: added up over rows once, not for every block
        for first in range(0, (K + 15) // 16 * 16, BI):
            rows = first + tl.arange(0, BI)
            S_at, _, S_stored = _in_S(kv, rows, wide, K, True, False)
            mirrored = wide[None, :] // 16 < rows[:, None] // 16  # tiles left of the diagonal stand for two
            S = _old(S_old if S_old is None else S_old + slot * S_old_b, S_at, S_stored)
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
            _write(S_new + slot * S_new_b, S_at, S, S_stored)
        if T * GP == 1:
            keys += tl.where((readers == 0)[:, None], tl.sum(parts, 0)[None, :], 0.0)

    out = tl.zeros((READERS, BV), tl.float32)
    sums = tl.zeros((READERS,), tl.float32)
    for first in range(0, K, BI):
        rows = first + tl.arange(0, BI)
        in_rows = rows < K
        inside = in_rows[:, None] & in_v[None, :]
        if KEYS and not PACKED:
            S_at, S_inside, _ = _in_S(kv, rows, wide, K, False, False)
            S = _old(S_old if S_old is None else S_old + slot * S_old_b, S_at, S_inside)
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
            _write(S_new + slot * S_new_b, S_at, S, S_inside)

    out *= scale
    if NORMALIZE:
        out = out / (scale * sums + eps)[:, None]
    head, token = readers % HEADS, readers // HEADS
    o_at = (((b * T + token) * HKV + kv) * (GP * GQ) + head)[:, None] * V + cols[None, :]
    _write(o, o_at, out, ((head < GP * GQ) & (token < T))[:, None] & in_v[None, :])


@triton.jit(do_not_specialize=VARYING)
def _query_side_kernel(
    q, k, v, g, ridge, nodes, slots, o, S_old, P_old, S_new, P_new,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, ridge_b, ridge_t, ridge_h,
    nodes_b, nodes_t, nodes_h, nodes_n,
    S_old_b, P_old_b, S_new_b, P_new_b,
    scale,
    RIDGE: tl.constexpr, ORDER: tl.constexpr, GQ: tl.constexpr, BC: tl.constexpr,
    PACKED: tl.constexpr, T: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr, READERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hla_q: S is updated, every query of the group iterates on it, then P is updated and read in blocks of columns.

    With BI = BK, S stays in registers for all tokens. A larger one goes through memory, in blocks of BI rows: written
    by every token, and read again by each iteration.
    """
    program = tl.program_id(0)
    kv = program % HKV
    b = (program // HKV).to(tl.int64)
    slot = b if slots is None else tl.load(slots + b).to(tl.int64)

    wide = tl.arange(0, BK)
    in_k = wide < K
    readers = tl.arange(0, READERS)  # t * HEADS + head
    if BI == BK:
        at, inside, stored = _in_S(kv, wide, wide, K, PACKED, False)
        S = _old(S_old if S_old is None else S_old + slot * S_old_b, at, stored)
    if PDL:  # S is on its way; P, which has to wait for registers, goes into the cache
        lines = tl.arange(0, BK * BK // 32) * 32
        prefetch(P_old + slot * P_old_b + kv * K * V + lines, lines < K * V)
    wait(PDL)
    if BI == BK:
        if PACKED:
            S += tl.trans(tl.where(wide[None, :] // 16 < wide[:, None] // 16, S, 0.0))

    xs = tl.zeros((READERS, BK), tl.float32)
    for t in range(T):
        decay = _decay(g, b, t, kv, g_b, g_t, g_h)
        k_at = _at(k, b, t, kv, k_b, k_t, k_h)
        k_wide = _vector(k_at, wide, in_k)
        if BI == BK:
            S = decay * S + k_wide[:, None] * k_wide[None, :]
            trace = tl.sum(tl.where(wide[:, None] == wide[None, :], S, 0.0))
        else:
            trace = 0.0
            for first in range(0, BK, BI):
                rows = first + tl.arange(0, BI)
                at, inside, stored = _in_S(kv, rows, wide, K, PACKED, True)
                if t == 0:
                    S = _old(S_old if S_old is None else S_old + slot * S_old_b, at, inside)
                else:
                    S = _old(S_new + slot * S_new_b, at, inside)
                S = decay * S + _vector(k_at, rows, rows < K)[:, None] * k_wide[None, :]
                trace += tl.sum(tl.where(rows[:, None] == wide[None, :], S, 0.0))
                # Threads that hold the same element must all have read it before one of them writes it.
                tl.debug_barrier()
                _write(S_new + slot * S_new_b, at, S, stored)
            tl.debug_barrier()  # the iterations read what other threads have written

        for j in range(GQ):
            head = kv * GQ + j
            query = _vector(_at(q, b, t, head, q_b, q_t, q_h), wide, in_k)
            least = _number(ridge, b, t, head, ridge_b, ridge_t, ridge_h, RIDGE)
            node_at = b * nodes_b + t * nodes_t + head * nodes_h
            xj = query / (least + _node(nodes, node_at, 0, ORDER) * trace)
            for n in range(1, ORDER + 1):
                theta = least + _node(nodes, node_at + n * nodes_n, n, ORDER) * trace
                if BI == BK:
                    read = tl.sum(S * xj[:, None], 0)
                else:
                    read = tl.zeros((BK,), tl.float32)
                    for first in range(0, BK, BI):
                        rows = first + tl.arange(0, BI)
                        at, inside, _ = _in_S(kv, rows, wide, K, PACKED, True)
                        part = tl.sum(_old(S_new + slot * S_new_b, at, inside) * xj[None, :], 1)
                        part = tl.reshape(tl.broadcast_to(part[None, :], (BK // BI, BI)), (BK,))
                        read = tl.where(wide // BI == first // BI, part, read)
                xj += (query - read - least * xj) / theta
            xs += tl.where((readers == t * HEADS + j)[:, None], xj[None, :], 0.0)
        if BI < BK:
            tl.debug_barrier()  # the next token writes what other threads still read

    if BI == BK:
        tl.debug_barrier()
        _write(S_new + slot * S_new_b, at, S, stored)

    for first in range(0, V, BC):
        cols = first + tl.arange(0, BC)
        in_v = cols < V
        P_at = (kv * K + wide)[:, None] * V + cols[None, :]
        P_inside = in_k[:, None] & in_v[None, :]
        P = _old(P_old if P_old is None else P_old + slot * P_old_b, P_at, P_inside)
        for t in range(T):
            decay = _decay(g, b, t, kv, g_b, g_t, g_h)
            k_wide = _vector(_at(k, b, t, kv, k_b, k_t, k_h), wide, in_k)
            x = _vector(_at(v, b, t, kv, v_b, v_t, v_h), cols, in_v)
            P = decay * P + k_wide[:, None] * x[None, :]
            for j in range(GQ):
                read = scale * tl.sum(_pick(xs, readers, t * HEADS + j)[:, None] * P, 0)
                _write(o, (((b * T + t) * HKV + kv) * GQ + j) * V + cols, read, in_v)
        tl.debug_barrier()
        _write(P_new + slot * P_new_b, P_at, P, P_inside)


@contextlib.contextmanager
def overlapping(really: bool = True) -> Iterator[None]:
    """Steps in here, in place, ask for their state ahead of the previous launch's end: it must not write the state.

    (See `hla.kernels.launch`. Elsewhere a step may follow anything, and waits.)
    """
    token = _overlapping.set(really)
    try:
        yield
    finally:
        _overlapping.reset(token)


def supports(call: Call, *states: State | None) -> bool:
    """Whether there is a kernel for this call: at most one reading before the last, no float64, no gradient asked for.

    The kernels have no backward; states may have any leading stride, but each row in one piece.
    """
    c = call
    inner = readings(c.op, c.order)[:-1]
    inputs = (c.q, c.k, c.v, c.p, c.g, c.ridge, c.gain, c.value_ridge, c.value_gain, c.nodes)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    held = [x for state in states if state is not None for x in state if x is not None]
    return (
        [reading.keys for reading in inner] in ([], ["k"])
        and all(x.dtype != torch.float64 for x in (*tensors, *held))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *held)))
        and all(_rows_are_contiguous(x) for x in held)
    )


def fused_step(
    call: Call, state: State | None, out_state: State | None = None, state_indices: Tensor | None = None
) -> tuple[Tensor, State]:
    """`hla.step` of a checked call that `supports` accepts: ``(o, new state)``, in one launch.

    Args:
        state, out_state, state_indices: as in `hla.step`. A new state is made where no ``out_state`` is given.
    """
    c = call
    batch = c.q.shape[0]
    if out_state is None:
        if state_indices is not None:
            assert state is not None
            state = out_state = _copy(state, Tensor.clone)  # the rows that no index names stay what they were
        else:
            out_state = _fresh(c, batch) if state is None else _copy(state, _empty_rows)
    in_place = state is not None and all(x is y for x, y in zip(state, out_state, strict=True))
    new = _moments(c, out_state)
    old = (None,) * 5 if state is None or in_place else _moments(c, state)
    gain, ridge = c.gain, c.ridge
    value_gain, value_ridge = c.shaping(readings(c.op, c.order)[0].shaped_by)
    numbers = [
        *(0.0 if isinstance(x, Tensor) else x for x in (gain, ridge, value_gain, value_ridge)), c.scale, c.eps,
    ]  # fmt: skip
    slots = None if state_indices is None else state_indices.contiguous()
    launch: Callable = torch.ops.hla.step if torch.compiler.is_compiling() else _launch
    inputs = (*map(_last_contiguous, (c.q, c.k, c.v, c.p)), c.g, gain, ridge, value_gain, value_ridge, c.nodes)
    several = c.q.dim() == 4
    o = launch(
        *((x if several else x.unsqueeze(1)) if isinstance(x, Tensor) else None for x in inputs),
        slots, numbers, c.order if c.op == "hla_q" else 0, in_place, *old, *new,
    )  # fmt: skip
    return o if several else o.squeeze(1), out_state


def _launch(
    q, k, v, p, g, gain, ridge, value_gain, value_ridge, nodes, slots, numbers, order, in_place,
    S_old, P_old, F_old, m_old, n_old, S, P, F, m, n,
) -> Tensor:  # fmt: skip
    """One launch for inputs ``[B, T, H, ...]``. The last five are written; order is that of hla_q, or 0."""
    batch, T, hq, K = q.shape
    hkv, V = v.shape[2:]
    o = v.new_empty(batch, T, hq, V)
    if batch == 0:
        return o
    new = (S, P, F, m, n)
    old = new if in_place else (S_old, P_old, F_old, m_old, n_old)
    gain, ridge, value_gain, value_ridge = (
        number if x is None else x
        for number, x in zip(numbers[:4], (gain, ridge, value_gain, value_ridge), strict=True)
    )
    few = batch * hkv < FEW_PROGRAMS
    BK, BV = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(V))
    heads = triton.next_power_of_2(hq // hkv)
    readers = triton.next_power_of_2(T) * heads
    pdl = _overlapping.get() and in_place and slots is None
    sizes = dict(
        T=T, HKV=hkv, K=K, V=V, BK=BK, HEADS=heads, READERS=readers, PACKED=S is not None and S.dim() == 5, PDL=pdl
    )
    overlap: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    if order:
        BI = BK if BK <= RESIDENT else 32
        with torch.cuda.device_of(q):
            _query_side_kernel[batch * hkv,](
                q, k, v, g, ridge, nodes, slots, o, old[0], old[1], S, P,
                *_strides(q, k, v, g, ridge), *(nodes.stride() if _is(nodes) else (0,) * 4),
                *(_row_stride(x) for x in (old[0], old[1], S, P)), numbers[4],
                RIDGE=_is(ridge), ORDER=order, GQ=hq // hkv, BI=BI, BC=min(BV, 8192 // BK), **sizes,
                num_warps=max(1, min(16 if sizes["PACKED"] else 8, BI * BK // 1024)), **overlap,
            )  # fmt: skip
        return o
    hp = F.shape[1]
    splits = 1
    if few and S is None and n is None and BV > 32:
        BV, splits = 32, triton.cdiv(V, 32)  # columns of values are independent; S and the sums m, n are needed by all
    # Many programs hide each other's latency with small blocks; a few ask for as much at once as their registers hold.
    width = BV if S is None else max(BK, BV)
    tile = 4096 if not few else 16384 if hp == hkv and width <= 128 else 8192
    BI = min(BK, max(4, tile // width))
    with torch.cuda.device_of(q):
        _step_kernel[batch * hkv * splits,](
            q, k, v, p, g, gain, ridge, value_gain, value_ridge, slots, o, *old, *new,
            *_strides(q, k, v, p, g, gain, ridge, value_gain, value_ridge), *(_row_stride(x) for x in (*old, *new)),
            numbers[4], numbers[5],
            GAIN=_is(gain), RIDGE=_is(ridge), VALUE_GAIN=_is(value_gain), VALUE_RIDGE=_is(value_ridge),
            KEYS=S is not None, VALUES=P is not None, NORMALIZE=n is not None,
            GP=hp // hkv, GQ=hq // hp, BI=BI, BV=BV, SPLITS=splits, **sizes,
            num_warps=max(1, min(16, max(BI, readers) * width // 1024)), **overlap,
        )  # fmt: skip
    return o


# torch.compile sees the launch as one operator: what it writes is in the schema, what it returns in the fake.
_step_op = torch.library.custom_op(
    "hla::step",
    _launch,
    mutates_args=("S", "P", "F", "m", "n"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor p, Tensor? g, Tensor? gain, Tensor? ridge, Tensor? value_gain, "
        "Tensor? value_ridge, Tensor? nodes, Tensor? slots, float[] numbers, int order, bool in_place, "
        "Tensor? S_old, Tensor? P_old, Tensor? F_old, Tensor? m_old, Tensor? n_old, "
        "Tensor(a!)? S, Tensor(b!)? P, Tensor(c!)? F, Tensor(d!)? m, Tensor(e!)? n) -> Tensor"
    ),
)


@_step_op.register_fake
def _(q, k, v, *rest):
    return v.new_empty(*q.shape[:3], v.shape[3])


def _moments(call: Call, state: State) -> tuple[Tensor | None, ...]:
    """The tensors of a state by their part in the kernel, as views: S, P (read first), F (read last), m, n."""
    S, moments, ones = unpack(call.op, call.order, state)
    if call.op == "hla_q":
        return S, moments[0], None, None, None
    P, F = moments if len(moments) == 2 else (None, moments[0])
    m, n = (None, None) if ones is None else ones if len(ones) == 2 else (None, ones[0])
    return S, P, F, m, n


def _fresh(call: Call, batch: int) -> State:
    """Memory for the state of a call."""
    shapes = zeros(
        call.op, batch, call.q.shape[-2], call.k.shape[-2], call.q.shape[-1], call.v.shape[-1], order=call.order,
        p_heads=call.p.shape[-2], normalize=call.normalize, device="meta",
    )  # fmt: skip
    return _copy(shapes, lambda x: call.q.new_empty(x.shape, dtype=torch.float32))


def _empty_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _copy(state: State, function: Callable[[Tensor], Tensor]) -> State:
    cls: Any = type(state)
    return cls(*(None if x is None else function(x) for x in state))


def _is(x) -> bool:
    return isinstance(x, Tensor)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows_are_contiguous(x: Tensor) -> bool:
    """Whether what follows the leading dimension lies in one piece; rows may lie anywhere."""
    size = 1
    for n, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def _strides(*tensors) -> list[int]:
    """Strides of batch, token and head."""
    return [stride for x in tensors for stride in (x.stride()[:3] if _is(x) else (0, 0, 0))]


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
