"""Segment summaries: what a piece of a sequence must tell its successors, and how two adjacent pieces become one.

A segment is summarised from its own tokens alone, starting from an empty state. `combine` is associative and has the
empty segment as identity, so sequences can be cut anywhere and put together in any bracketing: this is what sequence
parallelism and sequence-split kernels rest on. With ``rho = exp(total g)``, A before B:

    hla2:  S = rhoB^2 S_A + S_B,  Z = Z_A + rhoA Z_B,      F = rhoB (F_A + S_A Z_B) + F_B
    hla_q: S = rhoB S_A + S_B,    P = rhoB P_A + P_B
    ahla:  P = rhoB P_A + P_B,    N = N_A + N_B,           E = rhoB (E_A + N_B P_A) + E_B
    hla3:  S, P as above,         Q = Q_A + rhoA^2 Q_B,    X = X_A + rhoA (X_B + Q_B P_A),  Y = Y_A + Y_B + S_A Q_B,
           F = rhoB (F_A + S_A X_B + Y_B P_A + S_A Q_B P_A) + F_B

Z, N, Q, X, Y are how a segment will answer to what comes before it. (Zhang et al. 2025, sections 4.2, 6.2 and 7.2 give
such algebras; theirs are associative without decay only, and need O(K^3 V) maps at third order.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hla.ops.checks import HAS_TRITON, Call, check_call
from hla.ops.grouped import dot, mm, outer, scaled, sum_heads
from hla.ops.higher_order import compose
from hla.ops.layout import Uniform, wide
from hla.ops.linear_attn import BLOCK_NUMBERS, CHUNK, GPU_BLOCK_NUMBERS, compute_dtype, la, no_autocast
from hla.ops.state import AHLANState, AHLAState, HLA2State, HLA3State, HLAQState, LinearAttnState, State, is_packed


class LinearAttnSegment(NamedTuple):
    """``log_decay [B, HKV]`` (total g), ``P [B, HKV, K, V]``."""

    log_decay: Tensor
    P: Tensor


class HLA2Segment(NamedTuple):
    """``S [B, HKV, K, K]``; ``Z = sum_j exp(c_j - c_start) gain_j scale p_j v_j^T`` and ``F [B, HP, K, V]``."""

    log_decay: Tensor
    S: Tensor
    Z: Tensor
    F: Tensor


class AHLASegment(NamedTuple):
    """``P [B, HKV, K, V]``, ``N = sum_j gain_j scale k_j p_j^T [B, HP, K, K]`` (no decay), ``E [B, HP, K, V]``."""

    log_decay: Tensor
    P: Tensor
    N: Tensor
    E: Tensor


class AHLANSegment(NamedTuple):
    """ahla of an order n other than 2: ``N``, ``E [B, n - 1, HP, ...]``. The state is a column P, E_1, ... of moments.

    N_j is what a moment at the start adds to the one j places further down, as `AHLASegment` has it for j = 1.
    """

    log_decay: Tensor
    P: Tensor
    N: Tensor
    E: Tensor


class HLA3Segment(NamedTuple):
    """Per HKV ``S``, ``P``; per HP ``Q [K, K]`` of p p^T, ``X [K, V]`` of p v~^T, ``Y [K, K]`` of k~ p^T, ``F``."""

    log_decay: Tensor
    S: Tensor
    P: Tensor
    Q: Tensor
    X: Tensor
    Y: Tensor
    F: Tensor


class HLAQSegment(NamedTuple):
    """``S [B, HKV, K, K]`` and ``P [B, HKV, K, V]``, both with gate g."""

    log_decay: Tensor
    S: Tensor
    P: Tensor


Segment = HLAQSegment | LinearAttnSegment | HLA2Segment | AHLASegment | AHLANSegment | HLA3Segment


def summarize(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int | None = None,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: float | Tensor | None = None,
    gain: float | Tensor = 1.0,
    value_ridge: float | Tensor = 0.0,
    value_gain: float | Tensor = 1.0,
    scale: float | None = None,
) -> Segment:
    """The summary of a segment for "linear_attn", "hla2", "ahla", "hla3" or "hla_q".

    Arguments as for the operator; hla_q needs none of ridge, order and nodes, which only shape how its state is read.
    (A summary of hla_n from order 4 would need O(K^3 V) numbers: its later values are quadratic in S.)
    Differentiable, in float32 (float64 for float64 inputs) whatever autocast says.
    """
    if op == "hla_n":
        raise ValueError("segment summaries exist for linear_attn, hla2, ahla, hla3 and hla_q; got 'hla_n'")
    call = check_call(
        op, q, k, v, order=order, g=g, p=p, ridge=ridge, gain=gain, value_ridge=value_ridge, value_gain=value_gain,
        scale=scale,
    )  # fmt: skip
    return summary_of(call)


def summary_of(call: Call, backend: str | None = None) -> Segment:
    """The summary of a checked call; with ``normalize``, of its values with a column of ones behind them."""
    with no_autocast(call.q):
        return _summary(widened(call), backend != "torch" and _has_kernels(call.k, call.v))


def widened(call: Call) -> Call:
    """A normalised operator divides by itself applied to v = 1, which to a state is one more column of the values."""
    if not call.normalize:
        return call
    return replace(call, v=torch.cat([call.v, torch.ones_like(call.v[..., :1])], -1), normalize=False)


def _summary(c: Call, kernels: bool) -> Segment:
    dtype = compute_dtype(c.q, c.v)
    moment, transformed = partial(_moment, kernels), partial(_transformed, kernels)
    decay = torch.zeros(c.k.shape[:3], dtype=wide(c.k.device), device=c.k.device)
    decay = decay if c.g is None else c.g.to(decay.dtype).clamp(min=-1000.0)
    since_start = decay.mT.contiguous().cumsum(2).mT  # (along the last dimension many times faster on a GPU)
    total = decay.sum(1)
    until_end = (total[:, None] - since_start).to(dtype)
    total, since_start = total.to(dtype), since_start.to(dtype)
    if c.op == "linear_attn":
        return LinearAttnSegment(total, moment(c.k, c.v, until_end))
    if c.op == "hla_q":
        if kernels:
            from hla.kernels.moment import moments_of_keys

            return HLAQSegment(total, *moments_of_keys(c.k, c.v, until_end.exp()))
        return HLAQSegment(total, moment(c.k, c.k, until_end), moment(c.k, c.v, until_end))
    if c.op == "ahla" and c.order != 2:
        return _summary_ahla_n(c, total)
    if not kernels:
        # Read several times from here on: their gradients are added up before they are rounded to a low precision.
        k, p, v = c.k.to(dtype), c.p.to(dtype), c.v.to(dtype)
        c = replace(c, k=k, p=k if c.p is c.k else p, v=v)
    p_gained = _per_token(c.p, c.gain) * c.scale
    if c.op == "ahla":
        values = transformed(c, c.v, c.g, c.gain, c.ridge)
        return AHLASegment(total, moment(c.k, c.v, until_end), moment(c.k, p_gained), moment(c.k, values, until_end))
    keys = transformed(c, c.k, None if c.g is None else 2 * c.g, c.gain, c.ridge, residual=c.p)
    S = moment(c.k, c.k, 2 * until_end)
    if c.op == "hla2":
        return HLA2Segment(total, S, moment(p_gained, c.v, since_start), moment(keys, c.v, until_end))
    values = transformed(c, c.v, c.g, c.value_gain, c.value_ridge)
    p_value_gained = _per_token(c.p, c.value_gain) * c.scale
    return HLA3Segment(
        total,
        S,
        moment(c.k, c.v, until_end),
        moment(p_gained, p_value_gained, 2 * since_start),
        moment(p_gained, values, since_start),
        moment(keys, p_value_gained),
        moment(keys, values, until_end),
    )


def _summary_ahla_n(c: Call, total: Tensor) -> AHLANSegment:
    """N answers to what came before: what becomes of the unit matrix as P, with v = 0. (Decay cancels from it.)"""
    _, own = compose(replace(c, output_final_state=True))
    assert isinstance(own, AHLANState)
    (B, n, heads, K, _), dtype = own.E.shape, own.P.dtype
    unit = torch.eye(K, dtype=dtype, device=c.k.device).expand(B, c.k.shape[2], K, K)
    start = AHLANState(unit, unit.new_zeros(B, n, heads, K, K))
    nothing = c.v.new_zeros(*c.k.shape)
    _, answer = compose(replace(c, v=nothing, g=None, initial_state=start, output_final_state=True))
    assert isinstance(answer, AHLANState)
    return AHLANSegment(total, own.P, answer.E, own.E)


def _combine_linear_attn(a: LinearAttnSegment, b: LinearAttnSegment) -> LinearAttnSegment:
    return LinearAttnSegment(a.log_decay + b.log_decay, _decayed(a.P, b) + b.P)


def _combine_hla_q(a: HLAQSegment, b: HLAQSegment) -> HLAQSegment:
    return HLAQSegment(a.log_decay + b.log_decay, _decayed(a.S, b) + b.S, _decayed(a.P, b) + b.P)


def _combine_hla2(a: HLA2Segment, b: HLA2Segment) -> HLA2Segment:
    return HLA2Segment(
        a.log_decay + b.log_decay,
        _decayed(a.S, b, 2) + b.S,
        a.Z + _decayed(b.Z, a),
        _decayed(a.F + _mm(a.S.mT, b.Z), b) + b.F,
    )


def _combine_ahla(a: AHLASegment, b: AHLASegment) -> AHLASegment:
    return AHLASegment(
        a.log_decay + b.log_decay, _decayed(a.P, b) + b.P, a.N + b.N, _decayed(a.E + _mm(b.N, a.P), b) + b.E
    )


def _combine_ahla_n(a: AHLANSegment, b: AHLANSegment) -> AHLANSegment:
    N = [a.N[:, j] + b.N[:, j] for j in range(a.N.shape[1])]
    for j in range(len(N)):
        for i in range(j):
            N[j] = N[j] + _mm(b.N[:, j - 1 - i], a.N[:, i])
    P, E = _advance_ahla_n(a.P, a.E, b)
    return AHLANSegment(a.log_decay + b.log_decay, P, torch.stack(N, 1) if N else a.N, E)


def _advance_ahla_n(P: Tensor, E: Tensor, b: AHLANSegment) -> tuple[Tensor, Tensor]:
    column = [P, *E.unbind(1)]
    after = [b.P, *b.E.unbind(1)]
    for m in range(len(column)):
        x = column[m]
        for i in range(m):
            x = x + _mm(b.N[:, m - 1 - i], column[i])
        after[m] = after[m] + _decayed(x, b)
    return after[0], torch.stack(after[1:], 1) if after[1:] else E


def _combine_hla3(a: HLA3Segment, b: HLA3Segment) -> HLA3Segment:
    S_Q = _mm(a.S.mT, b.Q)
    return HLA3Segment(
        a.log_decay + b.log_decay,
        _decayed(a.S, b, 2) + b.S,
        _decayed(a.P, b) + b.P,
        a.Q + _decayed(b.Q, a, 2),
        a.X + _decayed(b.X + _mm(b.Q, a.P), a),
        a.Y + b.Y + S_Q,
        _decayed(a.F + _mm(a.S.mT, b.X) + _mm(b.Y + S_Q, a.P), b) + b.F,
    )


_COMBINE: dict[type, Callable[[Any, Any], Any]] = {
    LinearAttnSegment: _combine_linear_attn,
    HLAQSegment: _combine_hla_q,
    HLA2Segment: _combine_hla2,
    AHLASegment: _combine_ahla,
    AHLANSegment: _combine_ahla_n,
    HLA3Segment: _combine_hla3,
}


def combine(a: Segment, b: Segment) -> Segment:
    """The summary of segment ``a`` directly followed by segment ``b``."""
    if type(a) is not type(b):
        raise TypeError(f"segments of one operator can be combined; got {type(a).__name__} and {type(b).__name__}")
    return _COMBINE[type(a)](a, b)


def empty(segment: Segment) -> Segment:
    """The empty segment of the same kind and shape: the identity of `combine`."""
    cls: Any = type(segment)
    return cls(*(torch.zeros_like(x) for x in segment))


def advance(state: State, segment: Segment) -> State:
    """The state after a segment, given the state before it: the part of `combine` that streams."""
    b = segment
    if is_packed(state):
        raise ValueError("state.S is packed, which only hla.step takes: use state.unpack()")
    if isinstance(state, LinearAttnState) and isinstance(b, LinearAttnSegment):
        return LinearAttnState(_decayed(state.P, b) + b.P)
    if isinstance(state, HLAQState) and isinstance(b, HLAQSegment):
        return HLAQState(_decayed(state.S, b) + b.S, _decayed(state.P, b) + b.P)
    if isinstance(state, HLA2State) and isinstance(b, HLA2Segment):
        return HLA2State(_decayed(state.S, b, 2) + b.S, _decayed(state.F + _mm(state.S.mT, b.Z), b) + b.F)
    if isinstance(state, AHLAState) and isinstance(b, AHLASegment):
        return AHLAState(_decayed(state.P, b) + b.P, _decayed(state.E + _mm(b.N, state.P), b) + b.E)
    if isinstance(state, AHLANState) and isinstance(b, AHLANSegment):
        return AHLANState(*_advance_ahla_n(state.P, state.E, b))
    if isinstance(state, HLA3State) and isinstance(b, HLA3Segment):
        read = _mm(state.S.mT, b.X) + _mm(b.Y + _mm(state.S.mT, b.Q), state.P)
        return HLA3State(_decayed(state.S, b, 2) + b.S, _decayed(state.P, b) + b.P, _decayed(state.F + read, b) + b.F)
    raise TypeError(f"a {type(segment).__name__} can't advance a {type(state).__name__}")


def _transformed(kernels: bool, c: Call, x: Tensor, g, gain, ridge, residual: Tensor | None = None) -> Tensor:
    """k~ or v~ of the segment itself: ``gain * scale * LA(p, k, x; g) + ridge * residual``."""
    residual = x if residual is None else residual
    run, dtype = None, compute_dtype(c.q, c.v)
    if kernels:
        from hla.kernels.chain import chain

        run, dtype = chain, torch.promote_types(c.p.dtype, x.dtype)
    return la(c.p, c.k, x, g, gain=gain * c.scale, ridge=ridge, residual=residual, out_dtype=dtype, run=run)[0]


def _has_kernels(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and HAS_TRITON and compute_dtype(a, b) != torch.float64


def _per_token(x: Tensor, w: float | Tensor) -> Tensor:
    return x * w[..., None] if isinstance(w, Tensor) else x * w


def _moment(kernels: bool, a: Tensor, b: Tensor | None, exponent: Tensor | None = None) -> Tensor:
    """``sum_t exp(exponent_t) a_t b_t^T [B, H, Da, Db]`` of ``[B, T, H, D]`` tensors, H the larger head count."""
    b, w = None if b is a else b, None if exponent is None else exponent.exp()
    if kernels:
        from hla.kernels.moment import moment

        return moment(a, b, w)
    return _Moment.apply(a, b, w)


class _Moment(torch.autograd.Function):
    """``sum_t w_t a_t b_t^T`` (b None: b is a), block by block: only gradients have the size of the tokens."""

    @staticmethod
    def forward(ctx, a: Tensor, other: Tensor | None, w: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, other, w)
        b = a if other is None else other
        heads, dtype = max(a.shape[2], b.shape[2]), compute_dtype(a, b)
        moment = torch.zeros(a.shape[0], heads, a.shape[3], b.shape[3], dtype=dtype, device=a.device)
        layout, blocks = _blocks(a, b)
        for span in blocks:
            x = layout.load(a, *span, dtype)
            y = x if other is None else layout.load(other, *span, dtype)
            weight = None if w is None else layout.load(w[..., None], *span, dtype)
            moment += outer(scaled(x, weight), y, heads).sum(1)
        return moment

    @staticmethod
    @once_differentiable
    def backward(ctx, dmoment: Tensor):
        a, other, w = ctx.saved_tensors
        b = a if other is None else other
        layout, blocks = _blocks(a, b)
        dmoment = dmoment[:, None]
        new = lambda x: layout.new_output(x.shape, x.device, x.dtype)  # noqa: E731
        da, db, dw = new(a), None if other is None else new(other), None if w is None else new(w[..., None])
        with no_autocast(dmoment):
            for span in blocks:
                x = layout.load(a, *span, dmoment.dtype)
                y = x if other is None else layout.load(other, *span, dmoment.dtype)
                weight = None if w is None else layout.load(w[..., None], *span, dmoment.dtype)
                dx = sum_heads(mm(y, dmoment.mT), x.shape[2])
                if w is not None and dw is not None:
                    layout.store(dw, sum_heads(dot(x, dx), w.shape[2]), *span)
                dx, dy = scaled(dx, weight), sum_heads(mm(scaled(x, weight), dmoment), y.shape[2])
                if db is not None:
                    layout.store(db, dy, *span)
                layout.store(da, dx if other is not None else dx + dy, *span)
        return da, db, None if dw is None else dw[..., 0]


def _blocks(a: Tensor, b: Tensor) -> tuple[Uniform, list[tuple[int, int]]]:
    """How the sum over tokens is cut: chunks, and blocks of them that fit a cache (`linear_attn`)."""
    layout = Uniform(a.shape[0], a.shape[1], 4 * CHUNK)
    numbers = GPU_BLOCK_NUMBERS if a.device.type == "cuda" else BLOCK_NUMBERS
    widest = max(a.shape[2], b.shape[2]) * max(a.shape[3], b.shape[3])
    step = max(1, numbers // max(1, a.shape[0] * layout.chunk * widest))
    return layout, [(i, min(i + step, layout.num_chunks)) for i in range(0, layout.num_chunks, step)]


def _decayed(x: Tensor, by: Segment, power: int = 1) -> Tensor:
    """``x * rho^power`` of the segment ``by``."""
    rho = (power * by.log_decay).exp()
    return (x.unflatten(1, (rho.shape[1], -1)) * rho[..., None, None, None]).flatten(1, 2)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for ``[B, H, r, s]`` of which one head count divides the other."""
    small = min(a.shape[1], b.shape[1])
    with no_autocast(a):
        return (a.unflatten(1, (small, -1)) @ b.unflatten(1, (small, -1))).flatten(1, 2)
