"""Products between chunked operands ``[B, M, H, r, s]`` whose head counts differ.

Of two head counts one divides the other; head h of the larger goes with head ``h // group`` of the smaller. Groups
become extra rows, columns or summands of a matrix product, so that the smaller operand is never repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha [B, M, Ha, r, s] @ [B, M, Hb, s, t] -> [B, M, max(Ha, Hb), r, t]``: groups are extra rows or columns."""
    ha, hb = a.shape[2], b.shape[2]
    if ha > hb:
        group = ha // hb
        return mm(a.unflatten(2, (hb, group)).flatten(3, 4), b, alpha).unflatten(3, (group, a.shape[3])).flatten(2, 3)
    if ha < hb:
        return mm(b.mT, a.mT, alpha).mT
    if alpha == 1.0:
        return a @ b
    y = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=a.device)
    _baddbmm_(y, a, b, alpha, beta=0.0)
    return y


def add_mm_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """``y + alpha a @ b`` as in `mm`; y is overwritten where the head counts allow it."""
    if y.shape[2] == a.shape[2] == b.shape[2] and y.is_contiguous():
        _baddbmm_(y, a, b, alpha, beta=1.0)
        return y
    return add_(y, mm(a, b, alpha))


def _baddbmm_(y: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """``y <- beta y + alpha a @ b`` in one pass over y."""
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in (a, b))
    y.view(-1, *y.shape[-2:]).baddbmm_(a, b, beta=beta, alpha=alpha)


def tmm(a: Tensor, b: Tensor, heads: int, alpha: float = 1.0) -> Tensor:
    """``alpha a^T b`` summed over groups down to ``heads``: the groups become part of the contraction."""
    n = a.shape[2]
    if n != b.shape[2] or n < heads:
        return sum_heads(mm(a.mT, b, alpha), heads)
    if n > heads:
        a, b = (x.unflatten(2, (heads, n // heads)).flatten(3, 4) for x in (a, b))
    return mm(a.mT, b, alpha)


def outer(a: Tensor, b: Tensor, heads: int, alpha: float = 1.0) -> Tensor:
    """``alpha sum_t a_t b_t^T`` per chunk with at least ``heads`` heads, summed over groups above that."""
    x = tmm(a, b, min(heads, max(a.shape[2], b.shape[2])), alpha)
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def sum_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] <= heads else x.unflatten(2, (heads, x.shape[2] // heads)).sum(3)


def scale_heads_(x: Tensor, w: Tensor) -> Tensor:
    """``x * w`` for head counts of which one divides the other; x is overwritten if it has at least as many."""
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
    """``x + y`` for head counts of which one divides the other; the operand with more heads is overwritten."""
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
