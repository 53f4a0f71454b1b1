"""The paper's algorithms to the letter (Zhang, Qin, Wang, Gu, "Higher-order Linear Attention", arXiv 2510.27258).

They are here to be compared with. The operators of `hla` differ from them in the decay of order 2 and in order 3:

============  =======================================  =============================================================
function      in the paper                             as an operator of `hla` (``scale=1``)
============  =======================================  =============================================================
hla2          eqs. 3.3, 3.4; section 4.3; Algorithm 1  ``hla.hla2(ridge=...)`` at gamma = 1, nothing below
ahla          section 6, Theorem 6.1; Algorithm 2      ``hla.ahla(g=log(gamma))``
hla3          Theorem 7.1; Algorithm 3, eq. 7.5        nothing
hla2_prefix   eqs. 3.1, 3.2; section 4.1 (decay)       ``q_t^T S_t C_t``, no mask
hla3_prefix   section 7.1                              ``q_t^T S^K_t S^Q_t P_t``, no mask
============  =======================================  =============================================================

**Decay.** Algorithm 1 weighs the term ``(q_t . k_i)(q_j . k_i) v_j`` with ``gamma^(2t-i-j)`` where ``j >= i``, and with
``gamma^(2t-i-j) - gamma^(t-1-j)``, which is < 0 below gamma = 1, where ``j < i``: the terms that the mask removes come
back with a negative sign. So ``S C`` and ``G`` cancel for the constant part of inputs: with ``q = k = v = 1`` the
output tends to 0, and that of Algorithm 3 to ``-2 / (1 - gamma)^3``. The denominators of normalised outputs are such
numbers too, even for nonnegative q and k. ``hla.hla2(g=log(gamma))`` is the masked operator of a decayed affinity, with
the weights ``gamma^(t+j-2i)`` on ``i <= j``.

**Order 3.** Algorithm 3 at gamma = 1 keeps the terms ``(q_t . k_i)(q_u . k_i)(q_u . k_j) v_j`` in which the largest of
i, u, j occurs at least twice: some ``3/2 t^2`` of them. The masked product ``tril(W W^T) W V``, that is `hla.hla3`, has
the ``t^3 / 3`` with ``i <= u`` and ``j <= u``.

Every function has the forms "recurrent" (the algorithm line by line, one token at a time) and "chunk" (the same
numbers as compositions of the primitive of `hla.ops.linear_attn`, O(T)); "scan" is the paper's associative scan
(`hla.ops.published_scan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hla.ops.checks import check_call
from hla.ops.layout import wide
from hla.ops.linear_attn import Stage, chain, compute_dtype, no_autocast

_ARGUMENTS = """
    Args:
        q: ``[B, T, HQ, K]``. k: ``[B, T, HKV, K]``. v: ``[B, T, HKV, V]``. One dtype (float64, float32, bfloat16 or
            float16), HQ a multiple of HKV (the shared keys and values of section 5.2), any T >= 0.
        gamma: decay per token, a number in (0, 1].
{ridge}        normalize: divide by the same expression with 1 in place of v, plus eps. That denominator is signed and
            can pass through zero, with gamma < 1 in hla2 and hla3 also for nonnegative q and k.
        form: {forms}. All forms compute the same numbers.

    Returns:
        o ``[B, T, HQ, V]`` in the dtype of v; sums are in float32, in float64 for float64 inputs.

    Raises:
        ValueError, TypeError: with the name of the argument that does not fit.
    """
_RIDGE = "        ridge: the lambda of Algorithm 1, line 7, a number.\n"
_SCAN = ("chunk", "recurrent", "scan")
_NO_SCAN = ("chunk", "recurrent")


def _document(forms: tuple[str, ...], ridge: str = "") -> Callable:
    def add(function: Callable) -> Callable:
        names = " or ".join(f'"{form}"' for form in forms)
        function.__doc__ = (function.__doc__ or "").rstrip() + "\n" + _ARGUMENTS.format(ridge=ridge, forms=names)
        return function

    return add


@_document(_SCAN, _RIDGE)
def hla2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    form: str = "chunk",
) -> Tensor:
    """Masked second order, ``o_t = q_t^T ((S_t + ridge I) C_t - G_t)`` (Algorithm 1; eqs. 3.3, 3.4; section 4.3)."""
    if isinstance(ridge, Tensor):
        raise TypeError("ridge must be a number; got a tensor (hla.hla2 takes one per token)")
    call = _Call(q, k, v, gamma, ridge, normalize, eps, form, _SCAN)
    if form == "scan":
        from hla.ops.published_scan import hla2_scan

        return call.scan(hla2_scan, call.gamma, call.ridge)
    return call.recurrent(_hla2_tokens) if form == "recurrent" else call.chunk(_hla2_chunk)


@_document(_SCAN)
def ahla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    form: str = "chunk",
) -> Tensor:
    """Asymmetric second order, ``o_t = q_t^T E_t`` (Algorithm 2; Theorem 6.1)."""
    call = _Call(q, k, v, gamma, 0.0, normalize, eps, form, _SCAN)
    if form == "scan":
        from hla.ops.published_scan import ahla_scan

        return call.scan(ahla_scan, call.gamma)
    return call.recurrent(_ahla_tokens) if form == "recurrent" else call.chunk(_ahla_chunk)


@_document(_SCAN)
def hla3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    form: str = "chunk",
) -> Tensor:
    """Masked third order, ``o_t = q_t^T (S^K_t S^Q_t P_t - G1_t - G2_t - G3_t)`` (Algorithm 3; Theorem 7.1).

    The four terms grow as ``t^3`` and what is left of them as ``t^2``: at gamma = 1 "recurrent" loses digits with t in
    float32. "chunk" then sums the corrected state of eq. 7.5, which has no such difference; below 1 there is no
    recurrence of the corrected state alone. "scan" is Algorithm 4, stated for gamma = 1: the rule that section 7.3
    gives for decay is not that of Algorithm 3, so gamma < 1 is refused.
    """
    call = _Call(q, k, v, gamma, 0.0, normalize, eps, form, _SCAN)
    if form == "scan":
        from hla.ops.published_scan import hla3_scan

        return call.scan(hla3_scan, call.gamma)
    return call.recurrent(_hla3_tokens) if form == "recurrent" else call.chunk(_hla3_chunk)


@_document(_NO_SCAN)
def hla2_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    form: str = "chunk",
) -> Tensor:
    """Second order without the mask, ``o_t = q_t^T S_t C_t`` (eqs. 3.1, 3.2); every sum decays (section 4.1).

    Without the mask on its weights, and still causal: it reads the sums up to t only.
    """
    call = _Call(q, k, v, gamma, 0.0, normalize, eps, form, _NO_SCAN)
    return call.recurrent(_hla2_prefix_tokens) if form == "recurrent" else call.chunk(_hla2_prefix_chunk)


@_document(_NO_SCAN)
def hla3_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: float = 1.0,
    normalize: bool = False,
    eps: float = 1e-6,
    form: str = "chunk",
) -> Tensor:
    """Third order without the mask, ``o_t = q_t^T S^K_t S^Q_t P_t`` (section 7.1).

    The paper gives no decay for it; the sums decay as the same sums do in lines 6 and 7 of Algorithm 3.
    """
    call = _Call(q, k, v, gamma, 0.0, normalize, eps, form, _NO_SCAN)
    return call.recurrent(_hla3_prefix_tokens) if form == "recurrent" else call.chunk(_hla3_prefix_chunk)


class _Call:
    """The checked arguments of one call, and how a form is run on them."""

    def __init__(self, q, k, v, gamma, ridge, normalize, eps, form, forms: tuple[str, ...]):
        checked = check_call("hla2", q, k, v, ridge=ridge, scale=1.0, normalize=normalize, eps=eps)
        assert isinstance(checked.ridge, float)
        self.q, self.k, self.v, self.ridge, self.eps = q, k, v, checked.ridge, checked.eps
        self.normalize, self.dtype = normalize, compute_dtype(q, v)
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)):
            raise TypeError(f"gamma must be a number; got {type(gamma).__name__}")
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"gamma (decay per token) must lie in (0, 1]; got {gamma}")
        self.gamma = float(gamma)
        if form not in forms:
            raise ValueError(f"form must be one of {', '.join(map(repr, forms))}; got {form!r}")

    @property
    def g(self) -> Tensor | None:
        """The decay as a log-decay per token ``[B, T, 1]``, for the primitive."""
        if self.gamma == 1.0:
            return None
        device = self.q.device
        return torch.full((*self.q.shape[:2], 1), math.log(self.gamma), dtype=wide(device), device=device)

    def chunk(self, function: Callable[[_Call, Tensor], Tensor]) -> Tensor:
        """``function(call, v)``, of which the denominator is one more column of v."""
        if not self.normalize:
            return function(self, self.v).to(self.v.dtype)
        ones = torch.ones((*self.v.shape[:-1], 1), dtype=self.v.dtype, device=self.v.device)
        o = function(self, torch.cat([self.v, ones], -1))
        return (o[..., :-1] / (o[..., -1:] + self.eps)).to(self.v.dtype)

    def recurrent(self, function: Callable[[_Call], Iterator[tuple[Tensor, Tensor]]]) -> Tensor:
        """The outputs of an algorithm, which yields ``num [B, HKV, group, V]`` and ``den [B, HKV, group, 1]``."""
        with no_autocast(self.q):
            outputs = [num / (den + self.eps) if self.normalize else num for num, den in function(self)]
        if not outputs:
            return self.v.repeat_interleave(self.q.shape[2] // self.k.shape[2], dim=2)  # no tokens, and a gradient
        return torch.stack(outputs, 1).flatten(2, 3).to(self.v.dtype)

    def scan(self, function: Callable[..., Tensor], *numbers: float) -> Tensor:
        """A scan, on ``[B, HQ, T, D]`` with shared keys and values repeated."""
        heads = self.q.shape[2]
        q, k, v = (
            x.to(self.dtype).repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2)
            for x in (self.q, self.k, self.v)
        )
        with no_autocast(self.q):
            o = function(q, k, v, *numbers, self.normalize, self.eps)
        return o.transpose(1, 2).to(self.v.dtype)

    def tokens(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """q, k, v of every token, ``[B, HKV, group, K]``, ``[B, HKV, 1, K]``, ``[B, HKV, 1, V]``.

        So sums of keys and values alone are held once per group, and sums with queries once per query.
        """
        group = self.q.shape[2] // self.k.shape[2]
        q = self.q.to(self.dtype).unflatten(2, (self.k.shape[2], group))
        k, v = (x.to(self.dtype).unsqueeze(3) for x in (self.k, self.v))
        return zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)

    def zeros(self, *shapes: str) -> list[Tensor]:
        """Zero states per shape ("KV" is ``[K, V]``, "K1" is ``[K, 1]``); the first update gives them their heads."""
        size = {"K": self.q.shape[-1], "V": self.v.shape[-1], "1": 1}
        return [torch.zeros([size[n] for n in s], dtype=self.dtype, device=self.q.device) for s in shapes]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _row(a: Tensor, M: Tensor) -> Tensor:
    """``a^T M``."""
    return (a.unsqueeze(-2) @ M).squeeze(-2)


# -- the algorithms, line by line ------------------------------------------------------------------------------------
#
# Capital letters are the paper's matrices. Its vectors of masses m, h, n are [K, 1] here, so that they are updated and
# read as the matrices beside them are, with 1 in place of v.


def _hla2_tokens(x: _Call) -> Iterator[tuple[Tensor, Tensor]]:
    """Algorithm 1, lines 4 to 14, serially: the prefixes of its line 2 are the states before the token."""
    gamma = x.gamma
    S, C, m, G, h = x.zeros("KK", "KV", "K1", "KV", "K1")
    for q, k, v in x.tokens():
        one = torch.ones_like(v[..., :1])
        C_prev, m_prev = C, m
        S = gamma * S + _outer(k, k)  # line 5
        C = gamma * C + _outer(q, v)
        m = gamma * m + _outer(q, one)
        G = gamma * G + _outer(k, _row(k, C_prev))  # line 6
        h = gamma * h + _outer(k, _row(k, m_prev))
        u = _row(q, S) + x.ridge * q  # lines 7, 9
        yield _row(u, C) - _row(q, G), _row(u, m) - _row(q, h)  # lines 10, 14


def _ahla_tokens(x: _Call) -> Iterator[tuple[Tensor, Tensor]]:
    """Algorithm 2."""
    gamma = x.gamma
    P, m, E, n = x.zeros("KV", "K1", "KV", "K1")  # line 1
    for q, k, v in x.tokens():
        P = gamma * P + _outer(k, v)  # line 3
        m = gamma * m + _outer(k, torch.ones_like(v[..., :1]))
        r = _row(q, P)  # line 4
        s = _row(q, m)  # line 5
        E = gamma * E + _outer(k, r)  # line 6
        n = gamma * n + _outer(k, s)
        yield _row(q, E), _row(q, n)  # lines 7, 9


def _hla3_tokens(x: _Call) -> Iterator[tuple[Tensor, Tensor]]:
    """Algorithm 3."""
    gamma = x.gamma
    SK, SQ, P, m = x.zeros("KK", "KK", "KV", "K1")  # line 1
    G1, G2, G3, h1, h2, h3 = x.zeros("KV", "KV", "KV", "K1", "K1", "K1")  # line 2
    for q, k, v in x.tokens():
        one = torch.ones_like(v[..., :1])
        SK_prev, SQ_prev, P_prev, m_prev = SK, SQ, P, m  # line 4
        SK = gamma * SK_prev + _outer(k, k)  # line 6
        SQ = gamma * SQ_prev + _outer(q, q)
        P = gamma * P_prev + _outer(k, v)  # line 7
        m = gamma * m_prev + _outer(k, one)
        u1 = _row(k, SQ_prev)  # line 9 (S^K and S^Q are symmetric)
        G1 = gamma * G1 + _outer(k, _row(u1, P_prev))
        h1 = gamma * h1 + _outer(k, _row(u1, m_prev))
        a2 = _row(q, SK_prev)  # line 10
        G2 = gamma * G2 + _outer(a2, _row(q, P_prev))
        h2 = gamma * h2 + _outer(a2, _row(q, m_prev))
        u3 = _row(k, SQ_prev)  # line 11
        a3 = _row(u3, SK_prev)
        G3 = gamma * G3 + _outer(a3, v)
        h3 = gamma * h3 + _outer(a3, one)
        z = _row(_row(q, SK), SQ)  # line 13
        num = _row(z, P) - _row(q, G1) - _row(q, G2) - _row(q, G3)  # line 14
        yield num, _row(z, m) - _row(q, h1 + h2 + h3)  # lines 16, 17


def _hla2_prefix_tokens(x: _Call) -> Iterator[tuple[Tensor, Tensor]]:
    """Eqs. 3.1 and 3.2 with the decayed sums of section 4.1."""
    gamma = x.gamma
    S, C, m = x.zeros("KK", "KV", "K1")
    for q, k, v in x.tokens():
        S = gamma * S + _outer(k, k)
        C = gamma * C + _outer(q, v)
        m = gamma * m + _outer(q, torch.ones_like(v[..., :1]))
        u = _row(q, S)
        yield _row(u, C), _row(u, m)


def _hla3_prefix_tokens(x: _Call) -> Iterator[tuple[Tensor, Tensor]]:
    """The unmasked factorisation of section 7.1."""
    gamma = x.gamma
    SK, SQ, P, m = x.zeros("KK", "KK", "KV", "K1")
    for q, k, v in x.tokens():
        SK = gamma * SK + _outer(k, k)
        SQ = gamma * SQ + _outer(q, q)
        P = gamma * P + _outer(k, v)
        m = gamma * m + _outer(k, torch.ones_like(v[..., :1]))
        z = _row(_row(q, SK), SQ)
        yield _row(z, P), _row(z, m)


# -- the same numbers as compositions of the primitive ---------------------------------------------------------------


def _run(x: _Call, stages: list[Stage], **tensors: Tensor) -> list[Tensor]:
    """Runs stages on q, k and further tensors; returns what no stage reads, in order, in the dtype of the sums."""
    read = {name for s in stages for name in (s.query, s.keys, s.values, *(r for _, r in s.residuals))}
    outputs = {s.out: x.dtype for s in stages if s.out not in read}
    none = [None] * len(stages)
    results, _ = chain(stages, {"q": x.q, "k": x.k, **tensors}, {}, x.g, outputs=outputs, initial_states=none)
    return results


def _hla2_chunk(x: _Call, v: Tensor) -> Tensor:
    """``LA(u, q, v) - LA(q, k, LA^s(k, q, v))``, ``u = LA(q, k, k) + ridge q``: ``u^T C`` and ``q^T G`` of line 10."""
    stages = [
        Stage("u", "q", "k", "k", residuals=((x.ridge, "q"),) if x.ridge else ()),
        Stage("u C", "u", "q", "v"),
        Stage("k C_prev", "k", "q", "v", mode="strict"),
        Stage("o", "q", "k", "k C_prev", gain=-1.0, residuals=((1.0, "u C"),)),
    ]
    return _run(x, stages, v=v)[0]


def _ahla_chunk(x: _Call, v: Tensor) -> Tensor:
    """``LA(q, k, LA(q, k, v))``."""
    return _run(x, [Stage("r", "q", "k", "v"), Stage("o", "q", "k", "r")], v=v)[0]


def _hla2_prefix_chunk(x: _Call, v: Tensor) -> Tensor:
    """``LA(LA(q, k, k), q, v)``."""
    return _run(x, [Stage("u", "q", "k", "k"), Stage("o", "u", "q", "v")], v=v)[0]


def _hla3_prefix_chunk(x: _Call, v: Tensor) -> Tensor:
    """``LA(LA(LA(q, k, k), q, q), k, v)``."""
    return _run(x, [Stage("y", "q", "k", "k"), Stage("z", "y", "q", "q"), Stage("o", "z", "k", "v")], v=v)[0]


def _hla3_chunk(x: _Call, v: Tensor) -> Tensor:
    """Algorithm 3, its four terms of line 14 one after the other; at gamma = 1 the corrected state of eq. 7.5."""
    if x.gamma == 1.0:
        return _corrected_hla3_chunk(x, v)
    stages = [
        Stage("y", "q", "k", "k"),
        Stage("z", "y", "q", "q"),
        Stage("A", "z", "k", "v"),
        Stage("u", "k", "q", "q", mode="strict"),
        Stage("u P_prev", "u", "k", "v", mode="strict"),
        Stage("A - B", "q", "k", "u P_prev", gain=-1.0, residuals=((1.0, "A"),)),
        Stage("a2", "q", "k", "k", mode="strict"),
        Stage("q P_prev", "q", "k", "v", mode="strict"),
        Stage("A - B - C", "q", "a2", "q P_prev", gain=-1.0, residuals=((1.0, "A - B"),)),
        Stage("a3", "u", "k", "k", mode="strict"),
        Stage("o", "q", "a3", "v", gain=-1.0, residuals=((1.0, "A - B - C"),)),
    ]
    return _run(x, stages, v=v)[0]


def _corrected_hla3_chunk(x: _Call, v: Tensor) -> Tensor:
    """Eq. 7.5: ``F_t = F_{t-1} + a_t v_t^T + k_t b_t^T``, so ``o = LA(q, a, v) + LA(q, k, b)``, with

    ``a_t = (q.k) S^K_{t-1} q + (k^T S^Q_{t-1} k + (q.k)^2) k`` and ``b_t = (q.k) P_{t-1}^T q``.
    """
    S_q, S_k, P_q = _run(
        x,
        [
            Stage("S^K q", "q", "k", "k", mode="strict"),
            Stage("S^Q k", "k", "q", "q", mode="strict"),
            Stage("P q", "q", "k", "v", mode="strict"),
        ],
        v=v,
    )
    heads = (x.k.shape[2], x.q.shape[2] // x.k.shape[2])
    q, S_q, S_k = (y.to(x.dtype).unflatten(2, heads) for y in (x.q, S_q, S_k))
    k = x.k.to(x.dtype).unsqueeze(3)
    qk = (q * k).sum(-1, keepdim=True)
    a = qk * S_q + ((k * S_k).sum(-1, keepdim=True) + qk.square()) * k
    b = qk.flatten(2, 3) * P_q
    stages = [Stage("q a v", "q", "a", "v"), Stage("o", "q", "k", "b", residuals=((1.0, "q a v"),))]
    return _run(x, stages, v=v, a=a.flatten(2, 3), b=b)[0]
