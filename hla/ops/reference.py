"""The definitions: every operator as its explicit T x T matrix, in one to three lines each. Read this file first.

`weights` is the whole file: it builds the matrix A of an operator, row t of which says what token t reads of the
values, ``o = A V``. The functions below it apply that matrix. They cost O(T^2) memory and up to O(T^3) time and exist
to be obviously right: they are the oracle every other form is tested against. Arguments and shapes are those of the
functions of the same name in ``hla`` (without states, packing and backends); only the output is returned.
``hla.ops.higher_order`` computes the same in O(T).

Notation (heads and batch implied; ``D_tj = exp(c_t - c_j)`` for ``j <= t`` and 0 after, ``c = cumsum(g)``):

- ``W  = scale * D * (q k^T)``: the decayed causal affinity; first-order linear attention is ``W V``.
- ``Wp = scale * D * (p k^T)``: the same with the inner query p (p is q unless said otherwise).
- ``A2 = tril(W Wp^T) diag(gain) + scale * D * (q p^T) diag(ridge)``: the second-order affinity, of q with the keys k~.
- ``B  = diag(gain) Wp + diag(ridge)``: what makes the values v~ = B V out of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hla.ops.checks import HLA_Q_ORDER, Call, check_call

PerToken = float | Tensor


class _Matrices:
    """The matrices of one call, in float32 or float64, with all heads expanded to HQ: ``[B, HQ, T, ...]``."""

    def __init__(self, c: Call):
        dtype, heads, length = torch.promote_types(c.q.dtype, torch.float32), c.q.shape[2], c.q.shape[1]

        def expand(x: Tensor) -> Tensor:
            return x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)

        self.expand, self.scale = expand, c.scale
        self.q, self.k, self.p = expand(c.q), expand(c.k), expand(c.p)
        sums = expand(c.g).cumsum(-1) if c.g is not None else self.q.new_zeros(self.q.shape[:-1])
        causal = torch.ones(length, length, dtype=torch.bool, device=c.q.device).tril()
        self.D = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, float("-inf")).exp()
        self.eye = torch.eye(length, dtype=dtype, device=c.q.device)

    def diag(self, x: PerToken) -> Tensor:
        return torch.diag_embed(self.expand(x)) if isinstance(x, Tensor) else x * self.eye

    def W(self, q: Tensor) -> Tensor:
        return self.scale * self.D * (q @ self.k.mT)

    def A2(self, q: Tensor, gain: PerToken, ridge: PerToken) -> Tensor:
        inner = (self.W(q) @ self.W(self.p).mT).tril()
        return inner @ self.diag(gain) + self.scale * self.D * (q @ self.p.mT) @ self.diag(ridge)

    def B(self, gain: PerToken, ridge: PerToken) -> Tensor:
        return self.diag(gain) @ self.W(self.p) + self.diag(ridge)

    def least_squares(self, order: int, ridge: PerToken, nodes: Tensor) -> Tensor:
        """x = ``order`` steps towards ``(S_t + ridge_t I)^{-1} q_t``; ``S_t x_t`` is row t of ``(D * (x k^T)) k``."""
        r = self.expand(ridge)[..., None] if isinstance(ridge, Tensor) else ridge
        trace = self.D @ self.k.square().sum(-1, keepdim=True)
        theta = [r + node * trace for node in self.expand(nodes).split(1, -1)]
        x = self.q / theta[0]
        for t in theta[1:]:
            x = x + (self.q - (self.D * (x @ self.k.mT)) @ self.k - r * x) / t
        return x


def weights(
    op: str,
    q: Tensor,
    k: Tensor,
    *,
    order: int | None = None,
    g: Tensor | None = None,
    p: str | Tensor | None = "q",
    ridge: PerToken | None = None,
    gain: PerToken = 1.0,
    value_ridge: PerToken = 0.0,
    value_gain: PerToken = 1.0,
    nodes: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The matrix A of an operator: ``o = A V``, with the values of a key head read by all its query heads.

    Args:
        op: ``"linear_attn"``, ``"hla2"``, ``"ahla"``, ``"hla3"``, ``"hla_n"`` or ``"hla_q"``.
        q: ``[B, T, HQ, K]``. k: ``[B, T, HKV, K]``. The others: as for the function of that name in ``hla``.

    Returns:
        ``[B, HQ, T, T]`` in float32 (float64 for float64 inputs): row t, column j is the weight of ``v_j`` in ``o_t``,
        of either sign, and exactly 0 for ``j > t``.

    Raises:
        ValueError, TypeError: with the name of the argument that does not fit, or that the operator does not read.
    """
    c = check_call(
        op, q, k, k, order=order, g=g, p=p, ridge=ridge, gain=gain, value_ridge=value_ridge, value_gain=value_gain,
        nodes=nodes, scale=scale, normalize=normalize, eps=eps,
    )  # fmt: skip
    m, n = _Matrices(c), c.order or 1
    power = torch.linalg.matrix_power
    if op == "linear_attn" or (op == "hla_n" and n == 1):
        A = m.W(m.q)
    elif op == "hla2":
        A = m.A2(m.q, c.gain, c.ridge)
    elif op == "ahla":
        A = m.W(m.q) @ power(m.B(c.gain, c.ridge), n - 1)
    elif op == "hla3":
        A = m.A2(m.q, c.gain, c.ridge) @ m.B(c.value_gain, c.value_ridge)
    elif op == "hla_n":
        A = m.A2(m.q, c.gain, c.ridge) @ power(m.A2(m.p, c.gain, c.ridge), n // 2 - 1)
        A = A @ m.W(m.p) if n % 2 else A
    else:
        assert op == "hla_q" and c.nodes is not None
        A = m.W(m.least_squares(n, c.ridge, c.nodes))
    return A / (A.sum(-1, keepdim=True) + eps) if normalize else A


def _read(A: Tensor, v: Tensor) -> Tensor:
    """``A V`` as ``[B, T, HQ, V]`` in the dtype of v."""
    values = v.to(A.dtype).repeat_interleave(A.shape[1] // v.shape[2], dim=2).transpose(1, 2)
    return (A @ values).transpose(1, 2).to(v.dtype)


def linear_attn(q, k, v, *, g=None, scale=None, normalize=False, eps=1e-6) -> Tensor:
    """First order: ``W V``."""
    return _read(weights("linear_attn", q, k, g=g, scale=scale, normalize=normalize, eps=eps), v)


def hla2(q, k, v, *, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6) -> Tensor:
    """Second order, symmetric: ``tril(W W^T) V`` (Zhang et al. 2025, section 3.1)."""
    options = dict(g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize, eps=eps)
    return _read(weights("hla2", q, k, **options), v)


def ahla(q, k, v, *, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6, order=2) -> Tensor:
    """Asymmetric, any order: ``W^order V`` (order 2: Zhang et al. 2025, section 6)."""
    options = dict(g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize, eps=eps)
    return _read(weights("ahla", q, k, order=order, **options), v)


def hla3(
    q, k, v, *, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6, value_ridge=0.0,
    value_gain=1.0,
) -> Tensor:  # fmt: skip
    """Third order: ``tril(W W^T) W V``."""
    options = dict(g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize, eps=eps)
    return _read(weights("hla3", q, k, value_ridge=value_ridge, value_gain=value_gain, **options), v)


def hla_n(q, k, v, *, order, g=None, p="q", ridge=0.0, gain=1.0, scale=None, normalize=False, eps=1e-6) -> Tensor:
    """Any order: ``tril(W W^T)^(n/2) V`` for even n, ``tril(W W^T)^((n-1)/2) W V`` for odd n.

    Every reading but the last uses p. ``gain`` and ``ridge`` act on the keys (inside ``tril(W W^T)``), as in `hla3`.
    """
    options = dict(g=g, p=p, ridge=ridge, gain=gain, scale=scale, normalize=normalize, eps=eps)
    return _read(weights("hla_n", q, k, order=order, **options), v)


def hla_q(q, k, v, *, order=HLA_Q_ORDER, g=None, nodes=None, ridge=1.0, scale=None) -> Tensor:
    """``o_t = scale P_t^T x``, x = ``order`` steps towards ``(S_t + ridge_t I)^{-1} q_t`` (see `hla.ops.query_side`).

    ``P_t^T x_t`` is row t of ``(D * (x k^T)) v``.
    """
    return _read(weights("hla_q", q, k, order=order, g=g, nodes=nodes, ridge=ridge, scale=scale), v)
