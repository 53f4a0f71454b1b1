"""The kernels of `hla.kernels.query_side`; its docstring has the mathematics."""

from __future__ import annotations

import triton
import triton.language as tl

PER_TOKEN = ("r_b", "r_t", "r_h", "n_b", "n_t", "n_h", "n_n")  # strides that no load's width depends on


@triton.jit
def _segment(SLOTS, slot, per_sequence, segment, length):
    """(sequence, batch row, first token, behind the last token) of a slot."""
    if SLOTS is None:
        sequence = slot // per_sequence
        start = (slot % per_sequence) * segment
        stop = tl.minimum(start + segment, length)
        batch = tl.cast(sequence, tl.int64)
    else:
        sequence = tl.load(SLOTS + slot * 4)
        start = tl.load(SLOTS + slot * 4 + 1)
        stop = tl.load(SLOTS + slot * 4 + 2)
        batch = tl.cast(0, tl.int64)
    return sequence, batch, start, stop


@triton.jit
def _first_chunk(CHUNKS, FIRST, sequence, start, chunks_per_sequence, C: tl.constexpr):
    """The slot of a segment's first chunk."""
    if CHUNKS is None:
        chunk = sequence * chunks_per_sequence + start // C
    else:
        first = tl.load(FIRST + sequence)
        chunk = first + (start - tl.load(CHUNKS + first * 4 + 1)) // C
    return chunk


@triton.jit
def _decays(G, at, live, heads, h):
    """Log2-decays of a chunk, and their sums up to each token. (See `linear_attn.walk` for the bound.)"""
    g = tl.load(G + at * heads + h, mask=live, other=0.0).to(tl.float32)
    g = tl.maximum(g, -110.0) * 1.4426950408889634
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def _chunk(
    K, G, STATES, TRACES, batch, slot, start, stop, length, kv_heads, hk, group_g, k_b, k_t, k_h,
    D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """What every reading of a chunk needs: k, S, the decays up to each token, the decayed mask, the trace of S_t."""
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    live = start + rows < stop
    row = tl.cast(start, tl.int64)
    in_k = live[:, None] if D == BK else live[:, None] & (ck < D)[None, :]
    pk = K + batch * k_b + tl.cast(hk, tl.int64) * k_h + row * k_t + rows[:, None] * k_t + ck[None, :]
    k = tl.load(pk, mask=in_k, other=0.0)
    at = tl.cast(slot, tl.int64) * kv_heads + hk
    p = STATES + at * (D * D) + ck[:, None] * D + ck[None, :]
    if D == BK:
        S = tl.load(p).to(OPERAND)
    else:
        S = tl.load(p, mask=(ck < D)[:, None] & (ck < D)[None, :], other=0.0).to(OPERAND)
    trace = 0.0
    for b in tl.static_range(BLOCKS):
        trace += tl.load(TRACES + at * BLOCKS + b)
    mask = rows[:, None] >= rows[None, :]
    if GATED:  # (asks for g before anything waits for k or S)
        c, total = _decays(G, batch * length + row + rows, live, kv_heads // group_g, hk // group_g)
        E = tl.where(mask, tl.exp2(c[:, None] - c[None, :]), 0.0)
        read = tl.exp2(c)
    else:
        E = tl.where(mask, 1.0, 0.0)
        read = tl.full([C], 1.0, tl.float32)
    kf = k.to(tl.float32)
    squares = tl.sum(kf * kf, 1)
    traces = read * trace + tl.sum(E * squares[None, :], 1)
    return k.to(OPERAND), S, read, E, traces, live, in_k


@triton.jit
def _step(nodes, ridge, traces, live):
    """``1 / theta_n`` and the node itself."""
    node = tl.load(nodes, mask=live, other=1.0).to(tl.float32)
    return 1.0 / tl.where(live, ridge + node * traces, 1.0), node


@triton.jit
def _readings(
    q, k, S, read, E, traces, live, in_k, ridge, nodes, n_n, XS, apart,
    READINGS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x_READINGS`` of a chunk in float32; with XS, the x before it go to XS, XS + apart, ..."""
    step, _ = _step(nodes, ridge, traces, live)
    x = q.to(tl.float32) * step[:, None]
    for n in range(1, READINGS + 1):
        xb = x.to(OPERAND)
        if XS is not None:
            tl.store(XS + (n - 1) * apart, xb.to(XS.dtype.element_ty), mask=in_k)
        # x itself accumulates, from operands scaled ahead: y, apart from it, would take 64 more registers.
        step, _ = _step(nodes + n * n_n, ridge, traces, live)
        by = step[:, None]
        scores = (tl.dot(xb, tl.trans(k), input_precision=PRECISION) * (-by * E)).to(OPERAND)
        xb = (x * (-by * read[:, None])).to(OPERAND)
        x = x * (1.0 - by * ridge[:, None]) + by * q.to(tl.float32)
        x = tl.dot(xb, S, x, input_precision=PRECISION)
        x = tl.dot(scores, k, x, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg", *PER_TOKEN])
def solve(
    Q, K, G, RIDGE, NODES, STATES, TRACES, X, SLOTS, length, per_sequence, heads, group, gg,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, n_b, n_t, n_h, n_n,
    ORDER: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    GATED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All readings of one chunk and one head: ``x_ORDER`` to X."""
    h = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    row = tl.cast(start, tl.int64)
    live = start + rows < stop
    in_q = live[:, None] if D == BK else live[:, None] & (ck < D)[None, :]
    pq = Q + batch * q_b + tl.cast(h, tl.int64) * q_h + row * q_t + rows[:, None] * q_t + ck[None, :]
    q = tl.load(pq, mask=in_q, other=0.0)  # (first of all, as then it is there when everything else is)
    ridge = tl.load(RIDGE + batch * r_b + h * r_h + (row + rows) * r_t, mask=live, other=1.0).to(tl.float32)
    nodes = NODES + batch * n_b + h * n_h + (row + rows) * n_t
    k, S, read, E, traces, live, in_k = _chunk(
        K, G, STATES, TRACES, batch, slot, start, stop, length, heads // group, h // group, gg, k_b, k_t, k_h,
        D, C, BK, BLOCKS, GATED, OPERAND,
    )  # fmt: skip
    x = _readings(
        q, k, S, read, E, traces, live, in_k, ridge, nodes, n_n, None, 0, ORDER, OPERAND, PRECISION
    )  # fmt: skip
    out = ((batch * length + row) * heads + h) * D + (rows[:, None] * (heads * D) + ck[None, :])
    tl.store(X + out, x.to(X.dtype.element_ty), mask=in_k)


@triton.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg", *PER_TOKEN, "tokens"])
def adjoint(
    Q, K, G, RIDGE, NODES, STATES, TRACES, XS, US, DX, DQ, TRACE, YQ, XSU, UX, UQ, SLOTS,
    length, per_sequence, heads, group, gg,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, n_b, n_t, n_h, n_n, tokens,
    ORDER: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
    GATED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """From the gradient of ``x_order`` to that of q, after the readings once more: ``x_n`` goes to ``XS[n]``, ``u_n``
    to ``US[n - 1]``.

    For `per_token`: trace(S_t) to TRACE, ``y_0 . q`` to YQ, and to place n - 1 of XSU, UX and UQ the dots
    ``x_{n-1} . S u_n``, ``u_n . x_{n-1}`` and ``u_n . q``.
    """
    h = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    k, S, read, E, traces, live, in_k = _chunk(
        K, G, STATES, TRACES, batch, slot, start, stop, length, heads // group, h // group, gg, k_b, k_t, k_h,
        D, C, BK, BLOCKS, GATED, OPERAND,
    )  # fmt: skip
    row = tl.cast(start, tl.int64)
    token = (batch * length + row + rows) * heads + h
    out = ((batch * length + row) * heads + h) * D + (rows[:, None] * (heads * D) + ck[None, :])
    apart = tl.cast(tokens, tl.int64) * D
    ridge = tl.load(RIDGE + batch * r_b + h * r_h + (row + rows) * r_t, mask=live, other=1.0).to(tl.float32)
    nodes = NODES + batch * n_b + h * n_h + (row + rows) * n_t
    tl.store(TRACE + token, traces, mask=live)
    pq = Q + (batch * q_b + tl.cast(h, tl.int64) * q_h + row * q_t) + (rows[:, None] * q_t + ck[None, :])
    x = _readings(
        tl.load(pq, mask=in_k, other=0.0), k, S, read, E, traces, live, in_k, ridge, nodes, n_n, XS + out, apart,
        ORDER - 1, OPERAND, PRECISION,
    )  # fmt: skip
    tl.store(XS + (ORDER - 1) * apart + out, x.to(XS.dtype.element_ty), mask=in_k)
    tl.debug_barrier()  # what is read from now on was written by other threads
    y = tl.load(DX + out, mask=in_k, other=0.0).to(tl.float32)
    for i in tl.range(0, ORDER, num_stages=1 + AHEAD):  # (the next x is on its way while this one is used)
        n = ORDER - i
        step, _ = _step(nodes + n * n_n, ridge, traces, live)
        at = (n - 1) * apart
        x = tl.load(XS + at + out, mask=in_k, other=0.0).to(tl.float32)
        by = step[:, None]
        ub = (y * by).to(OPERAND)
        tl.store(US + at + out, ub.to(US.dtype.element_ty), mask=in_k)
        y *= 1.0 - by * ridge[:, None]
        to = (n - 1) * tl.cast(tokens, tl.int64) + token
        tl.store(UX + to, tl.sum(x * ub.to(tl.float32), 1), mask=live)
        before = tl.sum(x * y, 1)
        scores = (tl.dot(ub, tl.trans(k), input_precision=PRECISION) * -E).to(OPERAND)
        ub = (ub.to(tl.float32) * -read[:, None]).to(OPERAND)
        y = tl.dot(ub, S, y, input_precision=PRECISION)
        x = tl.load(XS + at + out, mask=in_k, other=0.0).to(tl.float32)  # again: kept, it would take 64 registers
        y = tl.dot(scores, k, y, input_precision=PRECISION)
        tl.store(XSU + to, before - tl.sum(x * y, 1), mask=live)
    step, _ = _step(nodes, ridge, traces, live)
    q = tl.load(pq, mask=in_k, other=0.0).to(tl.float32)
    tl.store(YQ + token, tl.sum(q * y, 1), mask=live)
    tl.debug_barrier()
    dq = tl.zeros([C, BK], tl.float32)
    for n in tl.range(0, ORDER, num_stages=1 + 2 * AHEAD):
        u = tl.load(US + n * apart + out, mask=in_k, other=0.0).to(tl.float32)
        dq += u
        tl.store(UQ + n * tl.cast(tokens, tl.int64) + token, tl.sum(u * q, 1), mask=live)
    dq += y * step[:, None]
    tl.store(DQ + out, dq.to(DQ.dtype.element_ty), mask=in_k)


@triton.jit(do_not_specialize=["length", "segment", "per_sequence", "chunks_per_sequence", "heads", "gg", "tokens"])
def moments(
    G, XS, US, DTRACE, ENTER, ENTER_TRACE, MOMENTS, TRACES, LEAVE, LEAVE_TRACE, TOTAL, DS, SLOTS, CHUNKS, FIRST,
    length, segment, per_sequence, chunks_per_sequence, heads, gg, e_n, e_h, e_k, e_v, tokens,
    ORDER: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    SPLIT: tl.constexpr, ALL: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of the reversed moment ``N = sum x_{n-1} u_n^T``, and m, walked through a segment: what enters each
    chunk from later ones goes to MOMENTS and TRACES, the gradient of the S that entered the sequence to DS.

    With LEAVE (the first launch of a split) it only accumulates, in all segments but (without ALL) the first of a
    sequence.
    """
    blocks: tl.constexpr = (D + BV - 1) // BV
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks) % heads
    slot = tl.program_id(0) // (blocks * heads)
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, segment, length)
    if sequence < 0:
        return
    if SLOTS is None:
        at_start = start == 0
    else:
        at_start = (tl.load(SLOTS + slot * 4 + 3) & 1) != 0
    if LEAVE is not None and not ALL:
        if at_start:
            return
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    cv = block * BV + tl.arange(0, BV)
    inside = (ck < D)[:, None] & (cv < D)[None, :]
    at_state = ck[:, None] * D + cv[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    m = 0.0
    passed = 0.0
    if ENTER is not None:
        at = tl.cast(slot if SPLIT else sequence, tl.int64)
        p = ENTER + at * e_n + h * e_h + ck[:, None] * e_k + cv[None, :] * e_v
        state = tl.load(p, mask=inside, other=0.0).to(tl.float32)
        if ENTER_TRACE is not None:
            m = tl.load(ENTER_TRACE + at * heads + h)
    chunk = _first_chunk(CHUNKS, FIRST, sequence, start, chunks_per_sequence, C)
    chunks = tl.cdiv(stop - start, C)
    for j in range(0, chunks * ORDER):  # one loop, so that the loads of the next chunk are ahead too
        n = j % ORDER
        i = chunks - 1 - j // ORDER
        t = start + i * C
        live = t + rows < stop
        row = tl.cast(t, tl.int64)
        token = (batch * length + row + rows) * heads + h
        at = n * (tl.cast(tokens, tl.int64) * D) + ((batch * length + row) * heads + h) * D
        in_k = live[:, None] if D == BK else live[:, None] & (ck < D)[None, :]
        in_v = live[:, None] if D == blocks * BV else live[:, None] & (cv < D)[None, :]
        x = tl.load(XS + at + (rows[:, None] * (heads * D) + ck[None, :]), mask=in_k, other=0.0).to(OPERAND)
        u = tl.load(US + at + (rows[:, None] * (heads * D) + cv[None, :]), mask=in_v, other=0.0).to(OPERAND)
        dtrace = tl.where(n == 0, tl.load(DTRACE + token, mask=live, other=0.0), 0.0)
        if LEAVE is None:
            if n == 0:
                entered = tl.cast(chunk + i, tl.int64) * heads + h
                tl.store(MOMENTS + entered * (D * D) + at_state, state.to(MOMENTS.dtype.element_ty), mask=inside)
                if block == 0:
                    tl.store(TRACES + entered, m)
        if GATED:
            c, total = _decays(G, batch * length + row + rows, live, heads // gg, h // gg)
            weight = tl.exp2(c)
            total = tl.where(n == 0, total, 0.0)
            passed += total
            rho = tl.exp2(total)
            m = m * rho + tl.sum(dtrace * weight, 0)
            state *= rho
            u = (u.to(tl.float32) * weight[:, None]).to(OPERAND)
        else:
            m += tl.sum(dtrace, 0)
        state = tl.dot(tl.trans(x), u, state, input_precision=PRECISION)
    if LEAVE is not None:
        at = tl.cast(slot, tl.int64) * heads + h
        tl.store(LEAVE + at * (D * D) + at_state, state, mask=inside)
        if block == 0:
            tl.store(LEAVE_TRACE + at, m)
            if TOTAL is not None:
                tl.store(TOTAL + at, passed)
    if DS is not None:
        if at_start:
            p = DS + (tl.cast(sequence, tl.int64) * heads + h) * (D * D) + at_state
            tl.store(p, tl.where(ck[:, None] == cv[None, :], m, 0.0) - state, mask=inside)


@triton.jit
def _by_moment(
    K, MOMENTS, batch, slot, start, stop, length, heads, h, group, k_b, k_t, k_h,
    D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(pointers to k, k, ``(M + M^T) k`` of the moment M that enters a chunk from later ones, which tokens and which
    entries of k there are, the tokens, their rows in a tensor ``[B, T, HQ, D]``)."""
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    live = start + rows < stop
    row = tl.cast(start, tl.int64)
    in_k = live[:, None] if D == BK else live[:, None] & (ck < D)[None, :]
    pk = K + (batch * k_b + tl.cast(h // group, tl.int64) * k_h + row * k_t) + (rows[:, None] * k_t + ck[None, :])
    k = tl.load(pk, mask=in_k, other=0.0).to(OPERAND)
    pm = MOMENTS + (tl.cast(slot, tl.int64) * heads + h) * (D * D) + ck[:, None] * D + ck[None, :]
    if D == BK:
        moment = tl.load(pm).to(OPERAND)
    else:
        moment = tl.load(pm, mask=(ck < D)[:, None] & (ck < D)[None, :], other=0.0).to(OPERAND)
    dk = tl.dot(k, moment, input_precision=PRECISION)
    dk = tl.dot(k, tl.trans(moment), dk, input_precision=PRECISION)
    token = batch * length + row + rows
    out = ((batch * length + row) * heads + h) * D + (rows[:, None] * (heads * D) + ck[None, :])
    return pk, k, dk, live, in_k, token, out


@triton.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg", "tokens"])
def fold(
    K, G, XS, US, MOMENTS, TRACES, DTRACE, ADDED, OUT, DOT, OWN, SLOTS,
    length, per_sequence, heads, group, gg, k_b, k_t, k_h, tokens,
    ORDER: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk = G k + 2 m k`` of a chunk, from later chunks and from readings inside it: OUT is dk and ADDED.

    DOT gets the dots of k with dk. OWN gets what the dots of the gate's gradient hold of readings of a token by itself,
    which cancel there but for their rounding.
    """
    h = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    pk, k, dk, live, in_k, token, out = _by_moment(
        K, MOMENTS, batch, slot, start, stop, length, heads, h, group, k_b, k_t, k_h, D, C, BK, OPERAND, PRECISION
    )  # fmt: skip
    rows = tl.arange(0, C)
    dtrace = tl.load(DTRACE + token * heads + h, mask=live, other=0.0)
    m = tl.load(TRACES + tl.cast(slot, tl.int64) * heads + h)
    later = rows[:, None] <= rows[None, :]
    if GATED:
        c, total = _decays(G, token, live, heads // group // gg, h // group // gg)
        E = tl.where(later, tl.exp2(c[None, :] - c[:, None]), 0.0)
        dk *= tl.exp2(total - c)[:, None]
        m = m * tl.exp2(total - c)
    else:
        E = tl.where(later, 1.0, 0.0)
    m += tl.sum(E * dtrace[None, :], 1)
    own = tl.zeros([C], tl.float32)
    same = rows[:, None] == rows[None, :]
    for n in range(0, ORDER):
        at = n * (tl.cast(tokens, tl.int64) * D) + out
        x = tl.load(XS + at, mask=in_k, other=0.0).to(OPERAND)
        u = tl.load(US + at, mask=in_k, other=0.0).to(OPERAND)
        by_u = tl.dot(k, tl.trans(u), input_precision=PRECISION) * E
        dk = tl.dot(by_u.to(OPERAND), x, dk, input_precision=PRECISION)
        by_x = tl.dot(k, tl.trans(x), input_precision=PRECISION) * E
        dk = tl.dot(by_x.to(OPERAND), u, dk, input_precision=PRECISION)
        if OWN is not None:
            # Of both products one factor was rounded; `adjoint` rounded by_u alone.
            u_own = tl.sum(tl.where(same, by_u, 0.0), 1)
            x_own = tl.sum(tl.where(same, by_x, 0.0), 1)
            u_rounded = u_own.to(OPERAND).to(tl.float32)
            own += 0.5 * (u_rounded * x_own - x_own.to(OPERAND).to(tl.float32) * u_own)
    kf = tl.load(pk, mask=in_k, other=0.0).to(tl.float32)
    dk = 2.0 * m[:, None] * kf - dk
    if DOT is not None:
        tl.store(DOT + token * heads + h, tl.sum(dk * kf, 1), mask=live)
    if OWN is not None:
        tl.store(OWN + token * heads + h, own, mask=live)
    dk += tl.load(ADDED + out, mask=in_k, other=0.0).to(tl.float32)
    tl.store(OUT + out, dk.to(OUT.dtype.element_ty), mask=in_k)


@triton.jit(do_not_specialize=["per_sequence", "heads", "d_n", "d_h", "d_k", "d_v"])
def scan_later(
    MOMENTS, ADDED, TRACES, TOTALS, ENTER, LEAVE, SLOTS, FIRST, per_sequence, heads, d_n, d_h, d_k, d_v,
    D: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """In place: from what each chunk adds to the reversed moment to what enters it. For m: from ADDED to TRACES.
    Without TRACES both stay as they are, and only LEAVE is written.

    BLOCK numbers of one head through all chunks of a sequence, read AHEAD chunks at a time. ENTER is what enters the
    last chunk, or None; LEAVE gets what the first one leaves, m on its diagonal.
    """
    blocks: tl.constexpr = D * D // BLOCK
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks) % heads
    n = tl.program_id(0) // (blocks * heads)
    x = block * BLOCK + tl.arange(0, BLOCK)
    if FIRST is None:
        first, count = n * per_sequence, per_sequence
    else:
        first = tl.load(FIRST + n)
        count = tl.load(FIRST + n + 1) - first
        if tl.load(SLOTS + first * 4 + 1) == tl.load(SLOTS + first * 4 + 2):  # an empty sequence has a slot as well
            count = 0
    carry = tl.zeros([BLOCK], tl.float32)
    m = 0.0
    if ENTER is not None:
        carry = tl.load(ENTER + tl.cast(n, tl.int64) * d_n + h * d_h + (x // D) * d_k + (x % D) * d_v).to(tl.float32)
    for i in range(0, count, AHEAD):
        added = ()
        for j in tl.static_range(AHEAD):
            at = tl.cast(first + tl.maximum(count - 1 - i - j, 0), tl.int64) * heads + h
            rho = 1.0 if TOTALS is None else tl.exp2(tl.load(TOTALS + at))
            added = added + ((at, rho, tl.load(ADDED + at), tl.load(MOMENTS + at * (D * D) + x)),)  # type: ignore
        for j in tl.static_range(AHEAD):
            at, rho, dm, own = added[j]  # type: ignore[var-annotated,misc]
            if i + j < count:
                if TRACES is not None:
                    tl.store(MOMENTS + at * (D * D) + x, carry.to(MOMENTS.dtype.element_ty))
                    if block == 0:
                        tl.store(TRACES + at, m)
                carry = carry * rho + own.to(tl.float32)
                m = m * rho + dm
    if LEAVE is not None:
        diagonal = tl.where(x // D == x % D, m, 0.0)
        tl.store(LEAVE + (tl.cast(n, tl.int64) * heads + h) * (D * D) + x, carry + diagonal)


@triton.jit
def _before(decay_later, later, decay, x):
    """(decay to what is behind both, sum of what is decayed to the first of them) of later tokens and those before."""
    return decay_later * decay, x + decay * later


@triton.jit(do_not_specialize=["length", "per_sequence", "heads", "group", "gg"])
def fold_later(
    K, G, MOMENTS, TRACES, DTRACE, DK, DC, SLOTS, length, per_sequence, heads, group, gg, k_b, k_t, k_h,
    D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """To DK and DC of a chunk what later chunks do, ``dk = (M + M^T) k``, decayed to each token, and what traces do
    there and in this chunk, ``2 m k``, with DTRACE of this one's tokens.
    """
    h = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    sequence, batch, start, stop = _segment(SLOTS, slot, per_sequence, C, length)
    if sequence < 0:
        return
    pk, k, dk, live, in_k, token, out = _by_moment(
        K, MOMENTS, batch, slot, start, stop, length, heads, h, group, k_b, k_t, k_h, D, C, BK, OPERAND, PRECISION
    )  # fmt: skip
    dtrace = tl.load(DTRACE + token * heads + h, mask=live, other=0.0)
    m = tl.load(TRACES + tl.cast(slot, tl.int64) * heads + h)
    kf = k.to(tl.float32)
    if GATED:
        kv_heads, hg = heads // group // gg, h // group // gg
        c, total = _decays(G, token, live, kv_heads, hg)
        dk *= tl.exp2(total - c)[:, None]
        m = m * tl.exp2(total - c)
        follows = live & (start + tl.arange(0, C) + 1 < stop)
        g = tl.load(G + (token + 1) * kv_heads + hg, mask=follows, other=0.0).to(tl.float32)
        _, traces = tl.associative_scan((tl.exp2(g * 1.4426950408889634), dtrace), 0, _before, reverse=True)
    else:
        traces = tl.cumsum(dtrace, 0, reverse=True)
    dk += 2.0 * (m + traces)[:, None] * kf
    if GATED:
        at = token * heads + h
        dc = tl.load(DC + at, mask=live, other=0.0)
        tl.store(DC + at, dc - 0.5 * tl.sum(dk * kf, 1), mask=live)
    dk += tl.load(DK + out, mask=in_k, other=0.0).to(tl.float32)
    tl.store(DK + out, dk.to(DK.dtype.element_ty), mask=in_k)


@triton.jit(do_not_specialize=["rows", "length", "heads", *PER_TOKEN])
def per_token(
    RIDGE, NODES, TRACE, YQ, XSU, UX, UQ, DRIDGE, DNODES, DTRACE, DC, rows, length, heads,
    r_b, r_t, r_h, n_b, n_t, n_h, n_n, ORDER: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of the numbers per token, from the dots that `adjoint` left.

    ``dtheta_n = -u_n . (x_n - x_{n-1}) = -(u_n . q - x_{n-1} . S u_n - ridge u_n . x_{n-1}) / theta_n``; DC is what the
    cumulated decay at the reading token does.
    """
    i = tl.program_id(0) * N + tl.arange(0, N)
    live = i < rows
    h = i % heads
    t = ((i // heads) % length).to(tl.int64)
    b = ((i // heads) // length).to(tl.int64)
    ridge = tl.load(RIDGE + (b * r_b + t * r_t + h * r_h), mask=live, other=1.0).to(tl.float32)
    trace = tl.load(TRACE + i, mask=live, other=0.0)
    nodes = NODES + (b * n_b + t * n_t + h * n_h)
    step, node = _step(nodes, ridge, trace, live)
    dtheta = -step * step * tl.load(YQ + i, mask=live, other=0.0)
    tl.store(DNODES + i * (ORDER + 1), dtheta * trace, mask=live)
    dridge = dtheta
    dtrace = dtheta * node
    dc = tl.zeros([N], tl.float32)
    for n in tl.static_range(ORDER):
        ux = tl.load(UX + n * rows + i, mask=live, other=0.0)
        uq = tl.load(UQ + n * rows + i, mask=live, other=0.0)
        xSu = tl.load(XSU + n * rows + i, mask=live, other=0.0)
        step, node = _step(nodes + (n + 1) * n_n, ridge, trace, live)
        dtheta = -step * (uq - xSu - ridge * ux)
        tl.store(DNODES + i * (ORDER + 1) + n + 1, dtheta * trace, mask=live)
        dridge += dtheta - ux
        dtrace += dtheta * node
        dc -= xSu
    tl.store(DRIDGE + i, dridge, mask=live)
    tl.store(DTRACE + i, dtrace, mask=live)
    tl.store(DC + i, dc + dtrace * trace, mask=live)
