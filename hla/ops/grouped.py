"""Products between chunked operands ``[B, M, H, r, s]`` whose head counts differ.

Of two head counts one divides the other; head h of the larger goes with head ``h // group`` of the smaller. Groups
become extra rows, columns or summands of a matrix product, so that the smaller operand is never repeated.
"""

from __future__ import annotations

from torch import Tensor


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``[B, M, Ha, r, s] @ [B, M, Hb, s, t] -> [B, M, max(Ha, Hb), r, t]``: groups become extra rows or columns."""
    ha, hb = a.shape[2], b.shape[2]
    if ha == hb:
        return a @ b
    if ha > hb:
        return (a.unflatten(2, (hb, ha // hb)).flatten(3, 4) @ b).unflatten(3, (ha // hb, a.shape[3])).flatten(2, 3)
    return mm(b.mT, a.mT).mT


def tmm(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """``a^T b`` summed over groups down to ``heads``: the groups become part of the contraction."""
    n = a.shape[2]
    if n != b.shape[2] or n < heads:
        return sum_heads(mm(a.mT, b), heads)
    if n > heads:
        a, b = (x.unflatten(2, (heads, n // heads)).flatten(3, 4) for x in (a, b))
    return a.mT @ b


def outer(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """``sum_t a_t b_t^T`` per chunk with at least ``heads`` heads, summed over groups above that."""
    x = tmm(a, b, min(heads, max(a.shape[2], b.shape[2])))
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def sum_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] <= heads else x.unflatten(2, (heads, x.shape[2] // heads)).sum(3)


def scale_heads_(x: Tensor, w: Tensor) -> Tensor:
    """``x * w`` for head counts of which one divides the other; in place if x has at least as many."""
    hx, hw = x.shape[2], w.shape[2]
    if hx >= hw:
        x.unflatten(2, (hw, hx // hw)).mul_(w.unsqueeze(3))
        return x
    return (x.unsqueeze(3) * w.unflatten(2, (hx, hw // hx))).flatten(2, 3)


def scaled(x: Tensor, w: Tensor | float | None) -> Tensor:
    if w is None or (isinstance(w, float) and w == 1.0):
        return x
    if isinstance(w, float):
        return x * w
    return x * w if x.shape[2] == w.shape[2] else scale_heads_(x.clone(), w)


def add_(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` for head counts of which one divides the other, in place where possible."""
    if x.shape[2] < y.shape[2]:
        x, y = y, x
    if x.shape[2] == y.shape[2]:
        return x.add_(y)
    x.unflatten(2, (y.shape[2], x.shape[2] // y.shape[2])).add_(y.unsqueeze(3))
    return x


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``x_t . y_t`` as ``[B, M, max heads, C, 1]``."""
    hx, hy = x.shape[2], y.shape[2]
    if hx == hy:
        return (x * y).sum(-1, keepdim=True)
    if hx < hy:
        x, y, hx, hy = y, x, hy, hx
    return (x.unflatten(2, (hy, hx // hy)) * y.unsqueeze(3)).sum(-1, keepdim=True).flatten(2, 3)
