"""The paper's scans over token segments (Zhang et al. 2025): readable references, not fast ones.

A segment of tokens is a tuple of sums, a single token is the shortest segment, and a *concatenation* makes one tuple of
two adjacent segments, A before B. The state that a token reads is the concatenation of all tokens up to it. Algorithms
1 and 4 compute all states by two levels of exclusive Blelloch scans: over the tokens of every chunk, then over the
summaries of the chunks; a token's state is the carry of its chunk, concatenated with the chunk's tokens before it and
with itself.

The paper's concatenations without decay are associative and used as printed (eqs. 4.1, 6.2, 7.6 and 7.7). Those with
decay are not, so that the result of a scan would depend on its bracketing; they need one change each:

- **Order 2** (section 4.2). Of ``C_A``, token i of B (of length L) reads ``gamma^(i-1) C_A`` and what it writes decays
  by ``gamma^(L-i)``: every token of B weighs the same, ``gamma^(L-1) = rho_B / gamma``. So the cross term is
  ``(rho_B / gamma) U_B C_A`` with the *undecayed* key moment ``U = sum k k^T``, not ``rho_B S_B C_A``.
- **AHLA** (section 6.2). There token i reads ``gamma^i P_A``: the cross term is ``rho_B R_B P_A`` with the *undecayed*
  ``R = sum k q^T``, where the paper decays R.

At third order (section 7.3) there is no decayed form: see `hla3_scan`.

Everything keeps one state per token, ``O(T K (K + V))`` numbers and ``O(T K^3 V)`` at third order. Tensors are
``[B, H, T, D]``, float32 or float64; inside, tokens are ``[chunk, number of chunks, B, H, D]``. The serial
recurrences are Algorithms 1 (lines 5 and 6), 2 and 3; there is no scale of affinities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hla.ops.scan import exclusive_scan

CHUNK = 16
MAPS_LIMIT = 1 << 30  # bytes of the third-order maps of all tokens, one copy


class HLA2Tuple(NamedTuple):
    """Order 2 without decay: ``S = sum k k^T``, ``C = sum q v^T``, ``m = sum q``, and G, h of section 3.1.

    ``S [..., K, K]``, ``C, G [..., K, V]``, ``m, h [..., K]``.
    """

    S: Tensor
    C: Tensor
    m: Tensor
    G: Tensor
    h: Tensor


class HLA2DecayedTuple(NamedTuple):
    """Order 2 with decay: as `HLA2Tuple`, with ``U = sum k k^T`` undecayed and ``rho = gamma^length [..., ]``."""

    S: Tensor
    C: Tensor
    m: Tensor
    G: Tensor
    h: Tensor
    U: Tensor
    rho: Tensor


class AHLATuple(NamedTuple):
    """``R = sum k q^T [..., K, K]`` undecayed, ``P, E [..., K, V]``, ``m, n [..., K]``, ``rho = gamma^length``."""

    R: Tensor
    P: Tensor
    m: Tensor
    E: Tensor
    n: Tensor
    rho: Tensor


class HLA3Tuple(NamedTuple):
    """Order 3 without decay (section 7.3): moments, the corrected state, and how a segment answers to a carry.

    ``SK, SQ, UKQ [..., K, K]``, ``P, F, RQP [..., K, V]``, ``m, eta, rQm [..., K]``, and the dense maps
    ``MKQP [..., K, K, K, V]`` and ``MKQm [..., K, K, K]``: ``M[Z]`` sums the first two axes against ``Z [K, K]``.
    """

    SK: Tensor
    SQ: Tensor
    P: Tensor
    m: Tensor
    F: Tensor
    eta: Tensor
    RQP: Tensor
    rQm: Tensor
    UKQ: Tensor
    MKQP: Tensor
    MKQm: Tensor


# -- Concatenations: segment a, then segment b -------------------------------------------------------------------------


def hla2_concat(a: HLA2Tuple, b: HLA2Tuple) -> HLA2Tuple:
    """Eq. 4.1, as printed."""
    return HLA2Tuple(
        S=a.S + b.S,
        C=a.C + b.C,
        m=a.m + b.m,
        G=a.G + b.G + b.S @ a.C,
        h=a.h + b.h + _mv(b.S, a.m),
    )


def hla2_decayed_concat(a: HLA2DecayedTuple, b: HLA2DecayedTuple, gamma: float) -> HLA2DecayedTuple:
    """The decayed concatenation after eq. 4.1, corrected: the cross terms read U with weight ``rho_B / gamma``."""
    rho, rho_v = b.rho[..., None, None], b.rho[..., None]
    return HLA2DecayedTuple(
        S=rho * a.S + b.S,
        C=rho * a.C + b.C,
        m=rho_v * a.m + b.m,
        G=rho * a.G + b.G + (rho / gamma) * (b.U @ a.C),
        h=rho_v * a.h + b.h + (rho_v / gamma) * _mv(b.U, a.m),
        U=a.U + b.U,
        rho=a.rho * b.rho,
    )


def ahla_concat(a: AHLATuple, b: AHLATuple) -> AHLATuple:
    """Eq. 6.2 and its decayed form, corrected: R does not decay."""
    rho, rho_v = b.rho[..., None, None], b.rho[..., None]
    return AHLATuple(
        R=a.R + b.R,
        P=rho * a.P + b.P,
        m=rho_v * a.m + b.m,
        E=rho * a.E + b.E + b.R @ (rho * a.P),
        n=rho_v * a.n + b.n + _mv(b.R, rho_v * a.m),
        rho=a.rho * b.rho,
    )


def hla3_concat(a: HLA3Tuple, b: HLA3Tuple) -> HLA3Tuple:
    """Eqs. 7.6 and 7.7, as printed."""
    return HLA3Tuple(
        SK=a.SK + b.SK,
        SQ=a.SQ + b.SQ,
        P=a.P + b.P,
        m=a.m + b.m,
        F=a.F + b.F + a.SK @ b.RQP + torch.einsum("...bcav,...bc->...av", b.MKQP, a.SQ) + b.UKQ @ a.P,
        eta=a.eta + b.eta + _mv(a.SK, b.rQm) + torch.einsum("...bca,...bc->...a", b.MKQm, a.SQ) + _mv(b.UKQ, a.m),
        RQP=a.RQP + b.RQP,
        rQm=a.rQm + b.rQm,
        UKQ=a.UKQ + b.UKQ,
        MKQP=a.MKQP + b.MKQP,
        MKQm=a.MKQm + b.MKQm,
    )


# -- Single tokens -----------------------------------------------------------------------------------------------------


def hla2_token(q: Tensor, k: Tensor, v: Tensor) -> HLA2Tuple:
    """The segments of single tokens ``q, k [..., K]``, ``v [..., V]`` (Algorithm 1, line 1)."""
    C = _outer(q, v)
    return HLA2Tuple(S=_outer(k, k), C=C, m=q, G=torch.zeros_like(C), h=torch.zeros_like(q))


def hla2_decayed_token(q: Tensor, k: Tensor, v: Tensor, gamma: float) -> HLA2DecayedTuple:
    """The same with ``U = k k^T`` and ``rho = gamma``."""
    token = hla2_token(q, k, v)
    return HLA2DecayedTuple(*token, U=token.S, rho=torch.full_like(q[..., 0], gamma))


def ahla_token(q: Tensor, k: Tensor, v: Tensor, gamma: float) -> AHLATuple:
    """The segments of single tokens: E and n already contain the token's reading of itself (Algorithm 2)."""
    P, read = _outer(k, v), (q * k).sum(-1, keepdim=True)
    return AHLATuple(R=_outer(k, q), P=P, m=k, E=read[..., None] * P, n=read * k, rho=torch.full_like(q[..., 0], gamma))


def hla3_token(q: Tensor, k: Tensor, v: Tensor) -> HLA3Tuple:
    """The segments of single tokens (Algorithm 4, lines 1 and 2)."""
    DK, DQ, DP = _outer(k, k), _outer(q, q), _outer(k, v)
    return HLA3Tuple(
        SK=DK,
        SQ=DQ,
        P=DP,
        m=k,
        F=DK @ DQ @ DP,
        eta=_mv(DK @ DQ, k),
        RQP=DQ @ DP,
        rQm=_mv(DQ, k),
        UKQ=DK @ DQ,
        MKQP=torch.einsum("...ab,...cv->...bcav", DK, DP),
        MKQm=torch.einsum("...ab,...c->...bca", DK, k),
    )


# -- Operators ---------------------------------------------------------------------------------------------------------


def hla2_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Masked second order by scans (Algorithm 1, within and across chunks).

    ``o_t = u_t C_t - q_t^T G_t`` with ``u_t = q_t^T (S_t + ridge I)``; with ``normalize`` divided by
    ``u_t m_t - q_t^T h_t + eps``, which is signed and can pass through zero.

    Args:
        q, k: ``[B, H, T, K]``. v: ``[B, H, T, V]``. All float32 or all float64.
        gamma: the decay per token, in ``(0, 1]``. Below 1 the tuple carries U and rho too (see the module).
        ridge: lambda of Algorithm 1. eps: of the denominator.
        chunk: tokens per chunk; the result does not depend on it.

    Returns:
        ``[B, H, T, V]``.

    Raises:
        ValueError: if shapes do not match, gamma is outside ``(0, 1]`` or ``chunk < 1``.
        TypeError: if a dtype is neither float32 nor float64, or dtypes differ.
    """
    _check(q, k, v, gamma, chunk)
    chunks = _Chunks(q, chunk)
    q, k, v = chunks.split(q), chunks.split(k), chunks.split(v)
    state: HLA2Tuple | HLA2DecayedTuple
    if gamma == 1.0:
        state = _states(hla2_token(q, k, v), hla2_concat)
    else:
        state = _states(hla2_decayed_token(q, k, v, gamma), partial(hla2_decayed_concat, gamma=gamma))
    row = q[..., None, :]
    u = row @ state.S + ridge * row
    num = u @ state.C - row @ state.G
    den = u @ state.m[..., None] - row @ state.h[..., None]
    return _output(chunks, num, den, normalize, eps)


def ahla_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Asymmetric second order by scans (section 6.2): ``o_t = q_t^T E_t``, normalised by ``q_t^T n_t + eps``.

    Arguments, result and errors as for `hla2_scan`.
    """
    _check(q, k, v, gamma, chunk)
    chunks = _Chunks(q, chunk)
    q, k, v = chunks.split(q), chunks.split(k), chunks.split(v)
    state = _states(ahla_token(q, k, v, gamma), ahla_concat)
    row = q[..., None, :]
    return _output(chunks, row @ state.E, row @ state.n[..., None], normalize, eps)


def hla3_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Masked third order by scans (Algorithm 4): ``o_t = q_t^T F_t``, normalised by ``q_t^T eta_t + eps``.

    Every token segment holds the dense maps ``M^KQP`` and ``M^KQm``, ``K^3 (V + 1)`` numbers, and the scans hold about
    five copies of them (seven with gradients): for small K only. Algorithm 3 computes the same without them.

    Arguments, result and errors as for `hla2_scan`, and

    Raises:
        ValueError: if ``gamma != 1``. Algorithm 3 decays each of S^K, S^Q and P by gamma, their product therefore by
            gamma^3, but the corrections G by gamma: the corrected state ``F = S^K S^Q P - G1 - G2 - G3`` that Algorithm
            4 scans then has no recurrence without S^K, S^Q and P (docs/paper.md), and scaling the carries as section
            7.3 suggests computes something else. Also if the maps of all tokens would exceed `MAPS_LIMIT` (1 GiB).
    """
    _check(q, k, v, gamma, chunk)
    if gamma != 1.0:
        raise ValueError(
            f"the third-order scan exists for gamma = 1 only; got gamma = {gamma}. Below 1, Algorithm 3 decays "
            "S^K S^Q P by gamma^3 but its corrections G by gamma, so the corrected state F that Algorithm 4 scans "
            "has no recurrence without S^K, S^Q and P (scaling the carries, as section 7.3 suggests, computes "
            "something else); use the recurrence of Algorithm 3"
        )
    chunks = _Chunks(q, chunk)
    (B, H, T, K), V = q.shape, v.shape[-1]
    numbers = K**3 * (V + 1)
    size = B * H * chunks.padded * numbers * q.element_size()
    if size > MAPS_LIMIT:
        raise ValueError(
            f"the segment maps of the third-order scan are too large for K = {K}: K^3 (V + 1) = {numbers} numbers per "
            f"token (V = {V}), {size / 2**30:.2f} GiB for {B * H} x {T} tokens, beyond the limit of "
            f"{MAPS_LIMIT / 2**30:.2f} GiB; use the recurrence of Algorithm 3, which needs none"
        )
    q, k, v = chunks.split(q), chunks.split(k), chunks.split(v)
    state = _states(hla3_token(q, k, v), hla3_concat)
    row = q[..., None, :]
    return _output(chunks, row @ state.F, row @ state.eta[..., None], normalize, eps)


# -- What they share ---------------------------------------------------------------------------------------------------


def _states(tokens: Any, concat: Callable[[Any, Any], Any]) -> Any:
    """The state of every token, from single-token segments ``[chunk, chunks, ...]``: two levels of exclusive scans."""
    cls = type(tokens)
    # The empty segment: all sums zero, nothing decayed.
    identity = cls(*(x.new_ones(()) if name == "rho" else x.new_zeros(()) for name, x in tokens._asdict().items()))
    within = concat(exclusive_scan(tokens, concat, identity), tokens)
    summaries = cls(*(x[-1] for x in within))
    carries = exclusive_scan(summaries, concat, identity)
    return concat(cls(*(x[None] for x in carries)), within)


class _Chunks:
    """``[B, H, T, D]`` as ``[chunk, number of chunks, B, H, D]``, the last chunk filled up with zero tokens, and back.

    No token reads what comes after it, so the filling changes nothing that is kept.
    """

    def __init__(self, q: Tensor, chunk: int):
        self.tokens = q.shape[2]
        self.width = max(1, min(chunk, self.tokens))
        self.padded = -(-self.tokens // self.width) * self.width

    def split(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, self.padded - self.tokens))
        return x.unflatten(2, (self.padded // self.width, self.width)).permute(3, 2, 0, 1, 4)

    def join(self, x: Tensor) -> Tensor:
        return x.permute(2, 3, 1, 0, 4).flatten(2, 3)[:, :, : self.tokens]


def _output(chunks: _Chunks, num: Tensor, den: Tensor, normalize: bool, eps: float) -> Tensor:
    """The read-out ``num [..., 1, V]``, divided by ``den [..., 1, 1] + eps`` if wanted, as ``[B, H, T, V]``."""
    o = chunks.join(num[..., 0, :])
    # The filling is cut off first: its denominator is eps alone, and 0 / 0 would reach gradients as NaN.
    return o / (chunks.join(den[..., 0, :]) + eps) if normalize else o


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _mv(a: Tensor, x: Tensor) -> Tensor:
    return (a @ x[..., None])[..., 0]


def _check(q: Tensor, k: Tensor, v: Tensor, gamma: float, chunk: int) -> None:
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k must be [B, H, T, K] and v [B, H, T, V]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.dtype not in (torch.float32, torch.float64) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must be all float32 or all float64; got {q.dtype}, {k.dtype} and {v.dtype}")
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be in (0, 1]; got {gamma}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
