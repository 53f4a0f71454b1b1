"""The definitions: every operator as its explicit T x T matrix, in one to three lines each. Read this file first.

These functions cost O(T^2) time and memory and exist to be obviously right: they are the oracle every other form is
tested against. Arguments and shapes are those of the functions of the same name in ``hla`` (without states, packing
and backends); only the output is returned. ``hla.ops.higher_order`` computes the same in O(T).

Notation (heads and batch implied; ``D_tj = exp(c_t - c_j)`` for ``j <= t`` and 0 after, ``c = cumsum(g)``):

- ``W  = scale * D * (q k^T)``: the decayed causal affinity; first-order linear attention is ``W V``.
- ``Wp = scale * D * (p k^T)``: the same with the inner query p (p is q unless said otherwise).
- ``A  = tril(W Wp^T) diag(gain) + scale * D * (q p^T) diag(ridge)``: the second-order affinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hla.ops.checks import HLA_Q_ORDER, chebyshev_nodes

PerToken = float | Tensor


class _Matrices:
    """The explicit matrices of one call, with all heads expanded to HQ and laid out ``[B, H, T, ...]``."""

    def __init__(self, q, k, v, g, p, ridge, gain, scale):
        heads = q.shape[2]

        def expand(x: Tensor) -> Tensor:
            return x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)

        def per_token(x: PerToken) -> PerToken:
            return expand(x)[..., None] if isinstance(x, Tensor) else x

        p = q if p is None or (isinstance(p, str) and p == "q") else k if isinstance(p, str) and p == "k" else p
        self.q, self.k, self.v, self.p = expand(q), expand(k), expand(v), expand(p)
        self.ridge, self.gain = per_token(ridge), per_token(gain)
        self.per_token = per_token
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        c = expand(g).cumsum(-1) if g is not None else self.q.new_zeros(self.q.shape[:-1])
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        self.decay = (c[..., :, None] - c[..., None, :]).masked_fill(~causal, float("-inf")).exp()

    def first_order(self, q: Tensor) -> Tensor:
        """``W = scale * D * (q k^T)``."""
        return self.scale * self.decay * (q @ self.k.mT)

    def second_order(self, q: Tensor) -> Tensor:
        """``A = tril(W Wp^T) diag(gain) + scale * D * (q p^T) diag(ridge)``: the affinity of q with the keys k~."""
        gain, ridge = (x.mT if isinstance(x, Tensor) else x for x in (self.gain, self.ridge))
        inner = (self.first_order(q) @ self.first_order(self.p).mT).tril()
        return gain * inner + ridge * self.scale * self.decay * (q @ self.p.mT)


def _apply(weights, v: Tensor, normalize: bool, eps: float) -> Tensor:
    """``weights(V)``, or the normalised ``weights(V) / (weights(1) + eps)``; back to ``[B, T, H, V]``."""
    o = weights(v)
    if normalize:
        o = o / (weights(torch.ones_like(v[..., :1])) + eps)
    return o.transpose(1, 2)


def linear_attn(q, k, v, *, g=None, scale=None, normalize=False, eps=1e-6) -> Tensor:
    """First order: ``W V``."""
    m = _Matrices(q, k, v, g, None, 0.0, 1.0, scale)
    return _apply(lambda x: m.first_order(m.q) @ x, m.v, normalize, eps)


def hla2(q, k, v, *, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6) -> Tensor:
    """Second order, symmetric: ``tril(W W^T) V`` (Zhang et al. 2025, section 3.1)."""
    m = _Matrices(q, k, v, g, p, ridge, gain, scale)
    return _apply(lambda x: m.second_order(m.q) @ x, m.v, normalize, eps)


def ahla(q, k, v, *, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6, order=2) -> Tensor:
    """Asymmetric, any order: ``W^order V`` (order 2: Zhang et al. 2025, section 6)."""
    m = _Matrices(q, k, v, g, p, ridge, gain, scale)

    def weights(x: Tensor) -> Tensor:
        for _ in range(order - 1):
            x = m.gain * (m.first_order(m.p) @ x) + m.ridge * x
        return m.first_order(m.q) @ x

    return _apply(weights, m.v, normalize, eps)


def hla3(
    q,
    k,
    v,
    *,
    g=None,
    p="q",
    ridge=0.0,
    gain=1.0,
    scale=None,
    normalize=False,
    eps=1e-6,
    value_ridge=0.0,
    value_gain=1.0,
) -> Tensor:
    """Third order: ``tril(W W^T) W V``."""
    m = _Matrices(q, k, v, g, p, ridge, gain, scale)
    value_ridge, value_gain = m.per_token(value_ridge), m.per_token(value_gain)
    inner = lambda x: value_gain * (m.first_order(m.p) @ x) + value_ridge * x  # noqa: E731
    return _apply(lambda x: m.second_order(m.q) @ inner(x), m.v, normalize, eps)


def hla_n(q, k, v, *, order, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6) -> Tensor:
    """Any order: ``tril(W W^T)^(n/2) V`` for even n, ``tril(W W^T)^((n-1)/2) W V`` for odd n.

    Every reading but the last uses p. ``gain`` and ``ridge`` act on the keys (inside ``tril(W W^T)``), as in `hla3`.
    """
    m = _Matrices(q, k, v, g, p, ridge, gain, scale)

    def weights(x: Tensor) -> Tensor:
        passes = [m.first_order] * (order % 2) + [m.second_order] * (order // 2)
        for affinity in passes[:-1]:
            x = affinity(m.p) @ x
        return passes[-1](m.q) @ x

    return _apply(weights, m.v, normalize, eps)


def hla_q(q, k, v, *, order=HLA_Q_ORDER, g=None, nodes=None, ridge=1.0, scale=None) -> Tensor:
    """``o_t = scale P_t^T x``, x = ``order`` steps towards ``(S_t + ridge_t I)^{-1} q_t`` (see `hla.ops.query_side`).

    ``S_t x_t`` is row t of ``(D * (x k^T)) k``, and ``P_t^T x_t`` row t of ``(D * (x k^T)) v``.
    """
    m = _Matrices(q, k, v, g, None, ridge, 1.0, 1.0 if scale is None else scale)
    nodes = (
        (chebyshev_nodes(order, q.dtype, q.device) if nodes is None else nodes)
        .expand(*q.shape[:-1], order + 1)
        .transpose(1, 2)
    )
    trace = m.decay @ m.k.square().sum(-1, keepdim=True)
    theta = [m.ridge + node * trace for node in nodes.split(1, -1)]
    x = m.q / theta[0]
    for t in theta[1:]:
        x = x + (m.q - (m.decay * (x @ m.k.mT)) @ m.k - m.ridge * x) / t
    return (m.first_order(x) @ m.v).transpose(1, 2)
