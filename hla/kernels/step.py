"""`hla.step` as one kernel: a token updates the state and is answered from it in a single pass over memory.

Decoding moves the whole state once per token and computes next to nothing, so bytes are everything. One program owns
one key/value head of one row: it streams the head's moments in blocks of rows and uses every block for all it is good
for before it goes back. For hla2, rows i of S give the entries i of ``k~ = gain scale S p + ridge p``, with which rows
i of F are updated and then read by ``q_i``; nothing waits for the rest of S. With grouped heads the program serves
every query head of its group, so that S and P are read and written once, and in place no other program can see them.

S is taken to be symmetric, as sums of ``k k^T`` are: its rows stand for its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.ops.checks import Call
from hla.ops.family import readings
from hla.ops.state import State, unpack, zeros

FEW_PROGRAMS = 132  # one to a multiprocessor of an H100: with fewer, a token waits for latency, not for bandwidth
RESIDENT = 128  # up to this K, hla_q holds S in registers
# Strides of tokens depend on what they were cut from, a T among it: no value of theirs may compile anything anew.
VARYING = [
    *("q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "p_b", "p_h", "g_b", "g_h", "nodes_b", "nodes_h", "nodes_n"),
    *("gain_b", "gain_h", "ridge_b", "ridge_h", "value_gain_b", "value_gain_h", "value_ridge_b", "value_ridge_h"),
]


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
def _at_head(pointer, b, h, stride_b, stride_h):
    """Where row b, head h of a ``[B, H, ...]`` tensor begins."""
    return pointer + b * stride_b + h * stride_h


@triton.jit
def _number(x, b, h, stride_b, stride_h, mask, per_token: tl.constexpr):
    """A number, or the one of every head h of a ``[B, H]`` tensor."""
    if per_token:
        return tl.load(x + b * stride_b + h * stride_h, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.zeros(h.shape, tl.float32) + x


@triton.jit
def _node(nodes, at, n, ORDER: tl.constexpr):
    """Node n of a query head, or Chebyshev's (`hla.ops.checks.chebyshev_nodes`) where none are given."""
    if nodes is None:
        return 0.5 - 0.5 * tl.cos((n + 0.5) * (3.141592653589793 / (ORDER + 1)))
    else:
        return tl.load(nodes + at).to(tl.float32)


@triton.jit
def _pick(xs, heads, j):
    """Row j of ``xs [heads, n]``, which lies in registers."""
    return tl.sum(tl.where((heads == j)[:, None], xs, 0.0), 0)


@triton.jit(do_not_specialize=VARYING)
def _step_kernel(
    q, k, v, p, g, gain, ridge, value_gain, value_ridge, slots, o,
    S_old, P_old, F_old, m_old, n_old, S_new, P_new, F_new, m_new, n_new,
    q_b, q_h, k_b, k_h, v_b, v_h, p_b, p_h, g_b, g_h,
    gain_b, gain_h, ridge_b, ridge_h, value_gain_b, value_gain_h, value_ridge_b, value_ridge_h,
    S_old_b, P_old_b, F_old_b, m_old_b, n_old_b, S_new_b, P_new_b, F_new_b, m_new_b, n_new_b,
    scale, eps,
    GAIN: tl.constexpr, RIDGE: tl.constexpr, VALUE_GAIN: tl.constexpr, VALUE_RIDGE: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, NORMALIZE: tl.constexpr,
    HKV: tl.constexpr, GP: tl.constexpr, GQ: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """All operators with one or both of the switches KEYS and VALUES, or none.

    ``S [HKV, K, K]`` makes the keys (KEYS), ``P [HKV, K, V]`` the values (VALUES), the output reads ``F``, which has
    GP heads to one of k and v, each read by GQ of q. m and n are P and F for v = 1. HEADS: GP * GQ rounded up.
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
    heads = tl.arange(0, HEADS)
    of_p = kv * GP + heads  # heads of p, of which the first GP are meant
    is_p = heads < GP
    decay = 1.0 if g is None else tl.exp(tl.load(_at_head(g, b, kv, g_b, g_h)).to(tl.float32))

    k_at = _at_head(k, b, kv, k_b, k_h)
    x = _vector(_at_head(v, b, kv, v_b, v_h), cols, in_v)

    if VALUES:
        values = tl.zeros((HEADS, BV), tl.float32)
        ones = tl.zeros((HEADS,), tl.float32)
        for first in range(0, K, BI):
            rows = first + tl.arange(0, BI)
            in_rows = rows < K
            at = (kv * K + rows)[:, None] * V + cols[None, :]
            inside = in_rows[:, None] & in_v[None, :]
            P = _old(P_old if P_old is None else P_old + slot * P_old_b, at, inside)
            k_rows = _vector(k_at, rows, in_rows)
            P = decay * P + k_rows[:, None] * x[None, :]
            if NORMALIZE:
                m = _old(m_old if m_old is None else m_old + slot * m_old_b, kv * K + rows, in_rows)
                m = decay * m + k_rows
            # Threads that hold the same element must all have read it before one of them writes it.
            tl.debug_barrier()
            _write(P_new + slot * P_new_b, at, P, inside)
            if NORMALIZE:
                _write(m_new + slot * m_new_b, kv * K + rows, m, in_rows)
            for j in range(GP):
                p_rows = _vector(_at_head(p, b, kv * GP + j, p_b, p_h), rows, in_rows)
                read = tl.sum(p_rows[:, None] * P, 0)
                values += tl.where((heads == j)[:, None], read[None, :], 0.0)
                if NORMALIZE:
                    ones += tl.where(heads == j, tl.sum(p_rows * m, 0), 0.0)
        a = scale * _number(value_gain, b, of_p, value_gain_b, value_gain_h, is_p, VALUE_GAIN)
        c = _number(value_ridge, b, of_p, value_ridge_b, value_ridge_h, is_p, VALUE_RIDGE)
        values = a[:, None] * values + c[:, None] * x[None, :]
        ones = a * ones + c

    if KEYS:
        k_wide = _vector(k_at, wide, in_k)
        gains = scale * _number(gain, b, of_p, gain_b, gain_h, is_p, GAIN)
        ridges = _number(ridge, b, of_p, ridge_b, ridge_h, is_p, RIDGE)

    out = tl.zeros((HEADS, BV), tl.float32)
    sums = tl.zeros((HEADS,), tl.float32)
    for first in range(0, K, BI):
        rows = first + tl.arange(0, BI)
        in_rows = rows < K
        inside = in_rows[:, None] & in_v[None, :]
        k_rows = _vector(k_at, rows, in_rows)
        if KEYS:
            S_at = (kv * K + rows)[:, None] * K + wide[None, :]
            S_inside = in_rows[:, None] & in_k[None, :]
            S = _old(S_old if S_old is None else S_old + slot * S_old_b, S_at, S_inside)
            S = decay * decay * S + k_rows[:, None] * k_wide[None, :]
        for j in range(GP):
            head = kv * GP + j
            at = (head * K + rows)[:, None] * V + cols[None, :]
            F = _old(F_old if F_old is None else F_old + slot * F_old_b, at, inside)
            if NORMALIZE:
                n = _old(n_old if n_old is None else n_old + slot * n_old_b, head * K + rows, in_rows)
            if KEYS:
                p_at = _at_head(p, b, head, p_b, p_h)
                key = tl.sum(S * _vector(p_at, wide, in_k)[None, :], 1)
                key *= tl.sum(tl.where(heads == j, gains, 0.0), 0)
                key += tl.sum(tl.where(heads == j, ridges, 0.0), 0) * _vector(p_at, rows, in_rows)
            else:
                key = k_rows
            if VALUES:
                F = decay * F + key[:, None] * _pick(values, heads, j)[None, :]
            else:
                F = decay * F + key[:, None] * x[None, :]
            if NORMALIZE:
                n = decay * n + (key * tl.sum(tl.where(heads == j, ones, 0.0), 0) if VALUES else key)
            tl.debug_barrier()
            _write(F_new + slot * F_new_b, at, F, inside)
            if NORMALIZE:
                _write(n_new + slot * n_new_b, head * K + rows, n, in_rows)
            for i in range(GQ):
                q_rows = _vector(_at_head(q, b, head * GQ + i, q_b, q_h), rows, in_rows)
                read = tl.sum(q_rows[:, None] * F, 0)
                out += tl.where((heads == j * GQ + i)[:, None], read[None, :], 0.0)
                if NORMALIZE:
                    sums += tl.where(heads == j * GQ + i, tl.sum(q_rows * n, 0), 0.0)
        if KEYS:  # last, so that the loads of F did not have to wait for these stores
            _write(S_new + slot * S_new_b, S_at, S, S_inside)

    out *= scale
    if NORMALIZE:
        out = out / (scale * sums + eps)[:, None]
    o_at = ((b * HKV + kv) * (GP * GQ) + heads)[:, None] * V + cols[None, :]
    _write(o, o_at, out, (heads < GP * GQ)[:, None] & in_v[None, :])


@triton.jit(do_not_specialize=VARYING)
def _query_side_kernel(
    q, k, v, g, ridge, nodes, slots, o, S_old, P_old, S_new, P_new,
    q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, ridge_b, ridge_h, nodes_b, nodes_h, nodes_n,
    S_old_b, P_old_b, S_new_b, P_new_b,
    scale,
    RIDGE: tl.constexpr, ORDER: tl.constexpr,
    HKV: tl.constexpr, GQ: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """hla_q: S is updated, every query of the group iterates on it, then P is updated and read in blocks of columns.

    With BI = BK, S stays in registers. A larger one is read again from memory, in blocks of BI rows, by each iteration.
    """
    program = tl.program_id(0)
    kv = program % HKV
    b = (program // HKV).to(tl.int64)
    slot = b if slots is None else tl.load(slots + b).to(tl.int64)

    wide = tl.arange(0, BK)
    in_k = wide < K
    heads = tl.arange(0, HEADS)
    decay = 1.0 if g is None else tl.exp(tl.load(_at_head(g, b, kv, g_b, g_h)).to(tl.float32))
    k_at = _at_head(k, b, kv, k_b, k_h)
    k_wide = _vector(k_at, wide, in_k)

    trace = 0.0
    S = tl.zeros((BI, BK), tl.float32)
    for first in range(0, BK, BI):
        rows = first + tl.arange(0, BI)
        at = (kv * K + rows)[:, None] * K + wide[None, :]
        inside = (rows < K)[:, None] & in_k[None, :]
        S = _old(S_old if S_old is None else S_old + slot * S_old_b, at, inside)
        S = decay * S + _vector(k_at, rows, rows < K)[:, None] * k_wide[None, :]
        trace += tl.sum(tl.where(rows[:, None] == wide[None, :], S, 0.0))
        # Threads that hold the same element must all have read it before one of them writes it.
        tl.debug_barrier()
        _write(S_new + slot * S_new_b, at, S, inside)
    if BI < BK:
        tl.debug_barrier()  # the iterations read what other threads have written

    xs = tl.zeros((HEADS, BK), tl.float32)
    for j in range(GQ):
        head = kv * GQ + j
        query = _vector(_at_head(q, b, head, q_b, q_h), wide, in_k)
        least = tl.load(_at_head(ridge, b, head, ridge_b, ridge_h)).to(tl.float32) if RIDGE else ridge
        node_at = b * nodes_b + head * nodes_h
        xj = query / (least + _node(nodes, node_at, 0, ORDER) * trace)
        for n in range(1, ORDER + 1):
            theta = least + _node(nodes, node_at + n * nodes_n, n, ORDER) * trace
            if BI == BK:
                read = tl.sum(S * xj[:, None], 0)
            else:
                read = tl.zeros((BK,), tl.float32)
                for first in range(0, BK, BI):
                    rows = first + tl.arange(0, BI)
                    at = (kv * K + rows)[:, None] * K + wide[None, :]
                    inside = (rows < K)[:, None] & in_k[None, :]
                    part = tl.sum(_old(S_new + slot * S_new_b, at, inside) * xj[None, :], 1)
                    part = tl.reshape(tl.broadcast_to(part[None, :], (BK // BI, BI)), (BK,))
                    read = tl.where(wide // BI == first // BI, part, read)
            xj += (query - read - least * xj) / theta
        xs += tl.where((heads == j)[:, None], xj[None, :], 0.0)

    for first in range(0, V, BC):
        cols = first + tl.arange(0, BC)
        in_v = cols < V
        at = (kv * K + wide)[:, None] * V + cols[None, :]
        inside = in_k[:, None] & in_v[None, :]
        P = _old(P_old if P_old is None else P_old + slot * P_old_b, at, inside)
        x = _vector(_at_head(v, b, kv, v_b, v_h), cols, in_v)
        P = decay * P + k_wide[:, None] * x[None, :]
        tl.debug_barrier()
        _write(P_new + slot * P_new_b, at, P, inside)
        for j in range(GQ):
            read = scale * tl.sum(_pick(xs, heads, j)[:, None] * P, 0)
            _write(o, ((b * HKV + kv) * GQ + j) * V + cols, read, in_v)


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
    """`hla.step` of a checked call that `supports` accepts: ``(o [B, HQ, V], new state)``, in one launch.

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
    o = launch(
        *(_last_contiguous(x) for x in (c.q, c.k, c.v, c.p)), c.g,
        *(x if isinstance(x, Tensor) else None for x in (gain, ridge, value_gain, value_ridge)),
        c.nodes, slots, numbers, c.order if c.op == "hla_q" else 0, in_place, *old, *new,
    )  # fmt: skip
    return o, out_state


def _launch(
    q, k, v, p, g, gain, ridge, value_gain, value_ridge, nodes, slots, numbers, order, in_place,
    S_old, P_old, F_old, m_old, n_old, S, P, F, m, n,
) -> Tensor:  # fmt: skip
    """One launch. The last five are written; order is that of hla_q, or 0."""
    batch, hq, K = q.shape
    hkv, V = v.shape[1:]
    o = v.new_empty(batch, hq, V)
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
    sizes = dict(HKV=hkv, K=K, V=V, BK=BK, HEADS=triton.next_power_of_2(hq // hkv))
    if order:
        BI = BK if BK <= RESIDENT else 32
        with torch.cuda.device_of(q):
            _query_side_kernel[batch * hkv,](
                q, k, v, g, ridge, nodes, slots, o, old[0], old[1], S, P,
                *_strides(q, k, v, g, ridge), *(nodes.stride() if _is(nodes) else (0, 0, 0)),
                *(_row_stride(x) for x in (old[0], old[1], S, P)), numbers[4],
                RIDGE=_is(ridge), ORDER=order, GQ=hq // hkv, BI=BI, BC=min(BV, 8192 // BK), **sizes,
                num_warps=max(1, min(8, BI * BK // 1024)),
            )  # fmt: skip
        return o
    heads = F.shape[1]
    splits = 1
    if few and S is None and n is None and BV > 32:
        BV, splits = 32, triton.cdiv(V, 32)  # columns of values are independent; S and the sums m, n are needed by all
    # Many programs hide each other's latency with small blocks; a few ask for as much at once as their registers hold.
    width = BV if S is None else max(BK, BV)
    tile = 4096 if not few else 16384 if heads == hkv and width <= 128 else 8192
    BI = min(BK, max(4, tile // width))
    with torch.cuda.device_of(q):
        _step_kernel[batch * hkv * splits,](
            q, k, v, p, g, gain, ridge, value_gain, value_ridge, slots, o, *old, *new,
            *_strides(q, k, v, p, g, gain, ridge, value_gain, value_ridge), *(_row_stride(x) for x in (*old, *new)),
            numbers[4], numbers[5],
            GAIN=_is(gain), RIDGE=_is(ridge), VALUE_GAIN=_is(value_gain), VALUE_RIDGE=_is(value_ridge),
            KEYS=S is not None, VALUES=P is not None, NORMALIZE=n is not None,
            GP=heads // hkv, GQ=hq // heads, BI=BI, BV=BV, SPLITS=splits, **sizes,
            num_warps=max(1, min(16, BI * width // 1024)),
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
    return v.new_empty(q.shape[0], q.shape[1], v.shape[2])


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
        call.op, batch, call.q.shape[1], call.k.shape[1], call.q.shape[2], call.v.shape[2], order=call.order,
        p_heads=call.p.shape[1], normalize=call.normalize, device="meta",
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
    """Strides of batch and head."""
    return [stride for x in tensors for stride in (x.stride()[:2] if _is(x) else (0, 0))]


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
