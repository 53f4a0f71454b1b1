"""The primitive: causal linear attention ``LA(q, k, v; g)`` in chunk form, with its own gradient.

Every operator of this package is one or more calls of `la`. With ``c_t = g_1 + ... + g_t`` (log-decay, ``g <= 0``):

    inclusive  o_t = sum_{j<=t} exp(c_t - c_j)     (q_t . k_j) v_j
    strict     o_t = sum_{j<t}  exp(c_{t-1} - c_j) (q_t . k_j) v_j
    reversed   o_t = sum_{j>=t} exp(c_j - c_t)     (q_t . k_j) v_j

**Chunk form.** Inside a chunk of C tokens this is ``((Q K^T) * E) V``; what lies before the chunk arrives through the
state ``P = sum_j exp(...) k_j v_j^T``. All three kinds are one computation with different numbers: a *read* weight per
token (how much a state entering its chunk has decayed when the token reads it), a *write* weight (how much the token's
own ``k v^T`` has decayed when the chunk is left), and a direction. All exponents are <= 0, so nothing overflows.

**Gradient.** The adjoint of LA is LA (with read and write exchanged and the direction turned):
``dq = LA(do, v, k)``, ``dk = LA^r(v, do, q)``, ``dv = LA^r(k, q, do)``. One walk against the direction of the forward
pass computes all three from the same two C x C matrices; it recomputes the states of a block of chunks from the one
state per block that the forward pass kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hla.ops.layout import Packed, Uniform

CHUNK = 64
# Chunks are worked on in blocks of about this many numbers per operand: on a CPU what one block needs stays in cache.
BLOCK_NUMBERS = 1 << 17
GPU_BLOCK_NUMBERS = 1 << 24

MODES = ("inclusive", "strict", "reversed")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if anything is float64, else float32: the dtype of states and accumulators."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """Autocast must not turn the float32 sums of the operators into bfloat16 ones: they choose their own precision."""
    return torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False)


def la(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    gain: float | Tensor = 1.0,
    ridge: float | Tensor = 0.0,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    mode: str = "inclusive",
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``o = gain * LA(q, k, v; g) + ridge * residual``: linear attention with the affine end every composition needs.

    Args:
        q: ``[B, T, Hq, K]``; k: ``[B, T, Hk, K]``; v: ``[B, T, Hv, V]``; g: ``[B, T, Hg]`` log-decay or None. The head
            counts are independent as long as, of any two, one divides the other; head h of the larger uses head
            ``h // group`` of the smaller, which is never repeated in memory.
        gain: float or ``[B, T, Hq]``. ridge: float or ``[B, T, Hq]``, with residual ``[B, T, Hr, V]``.
        initial_state: ``[B or N, Hs, K, V]`` with ``Hs = max(Hk, Hv, Hg)``.
        cu_seqlens: ``[N + 1]``; B must be 1.
        out_dtype: dtype of o; by default that of v.

    Inputs may be any mix of float64, float32, bfloat16 and float16; all sums are in float32 (float64 if any input is).
    The arguments are trusted here: `hla.ops.checks` has the checks of the public functions.

    Returns:
        o ``[B, T, max of all head counts, V]`` and the final state (float32 / float64), or None.
    """
    # A tensor in several roles (k as keys and values, p as query and residual) is loaded, its gradient stored, once.
    roles = [q, k, v] if residual is None else [q, k, v, residual]
    tensors: list[Tensor] = []
    where = []
    for x in roles:
        found = next((i for i, y in enumerate(tensors) if y is x), None)
        where.append(len(tensors) if found is None else found)
        if found is None:
            tensors.append(x)
    plan = _Plan(
        where=tuple(where),
        mode=mode,
        gain=1.0 if isinstance(gain, Tensor) else float(gain),
        ridge=0.0 if isinstance(ridge, Tensor) else float(ridge),
        out_dtype=out_dtype or v.dtype,
        output_final_state=output_final_state,
    )
    gain_t = gain if isinstance(gain, Tensor) else None
    ridge_t = ridge if isinstance(ridge, Tensor) else None
    with no_autocast(q):
        o, final = _LinearAttention.apply(plan, g, gain_t, ridge_t, initial_state, cu_seqlens, *tensors)
    return o, final if output_final_state else None


@dataclass(frozen=True)
class _Plan:
    where: tuple[int, ...]  # which of the distinct tensors plays q, k, v (and the residual)
    mode: str
    gain: float
    ridge: float
    out_dtype: torch.dtype
    output_final_state: bool


class _Shape:
    """Sizes, layout and block boundaries shared by the forward and the backward pass of one call."""

    def __init__(self, plan: _Plan, tensors, g: Tensor | None, cu_seqlens: Tensor | None):
        q, k, v = (tensors[i] for i in plan.where[:3])
        self.dtype = compute_dtype(*tensors)
        self.hq, self.hk, self.hv = q.shape[2], k.shape[2], v.shape[2]
        self.hg = 1 if g is None else g.shape[2]
        self.hs = max(self.hk, self.hv, self.hg)  # heads of the state
        self.ho = max(self.hq, self.hs)  # heads of the output
        self.batch, self.length, self.K, self.V = q.shape[0], q.shape[1], q.shape[3], v.shape[3]
        chunk = min(CHUNK, max(16, -(-self.length // 16) * 16))
        self.layout = (
            Uniform(self.batch, self.length, chunk) if cu_seqlens is None else Packed(cu_seqlens, self.length, chunk)
        )
        on_gpu = q.device.type == "cuda"
        numbers_per_chunk = max(1, self.batch * self.ho * chunk * max(self.K, self.V))
        step = max(1, (GPU_BLOCK_NUMBERS if on_gpu else BLOCK_NUMBERS) // numbers_per_chunk)
        n = self.layout.num_chunks
        self.blocks = [(first, min(first + step, n)) for first in range(0, n, step)]
        self.strict, self.reverse = plan.mode == "strict", plan.mode == "reversed"

    def blocks_in_order(self) -> list[tuple[int, int]]:
        """First and last chunk of each block, in the direction of the forward pass."""
        return self.blocks[::-1] if self.reverse else self.blocks


class _Weights:
    """Decays of a block: ``read``, ``write [B, M, Hg, C, 1]``, ``log_rho [B, M, Hs]``, ``E [B, M, Hg, C, C]``."""

    def __init__(self, shape: _Shape, g: Tensor | None, first: int, last: int):
        self.shape = shape
        self.read = self.write = self.log_rho = self.E = None
        if g is None:
            return
        g = shape.layout.load(g[..., None], first, last, shape.dtype)  # [B, M, Hg, C, 1]
        c = g.cumsum(3)
        total = c[..., -1:, :]
        if shape.reverse:
            read, write = -c, -c  # exponents relative to the chunk's left edge
            self.read, self.write = (total - c).exp(), c.exp()
        else:
            read, write = (c - g if shape.strict else c), c
            self.read, self.write = read.exp(), (total - c).exp()
        self.log_rho = total[..., 0, 0].repeat_interleave(shape.hs // shape.hg, dim=2)
        exponent = read - write.mT
        self.E = exponent.masked_fill_(self._outside(exponent), float("-inf")).exp_()

    def _outside(self, like: Tensor) -> Tensor:
        ones = torch.ones(like.shape[-2:], dtype=torch.bool, device=like.device)
        if self.shape.reverse:
            return ones.tril(-1)
        return ones.triu(0 if self.shape.strict else 1)

    def mask_(self, scores: Tensor) -> Tensor:
        """``scores * E`` (the decayed causal mask), in place where the head counts allow it."""
        if self.E is not None:
            return _scale_heads(scores, self.E)
        if self.shape.reverse:
            return scores.triu_()
        return scores.tril_(-1 if self.shape.strict else 0)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, g, gain, ridge, initial_state, cu_seqlens, *tensors):
        shape = _Shape(plan, tensors, g, cu_seqlens)
        layout = shape.layout
        o = layout.new_output((shape.batch, shape.length, shape.ho, shape.V), tensors[0], plan.out_dtype)
        walk = layout.walk(_state_or_zeros(initial_state, shape, tensors[0]), shape.reverse)
        entries = []  # the state entering each block, for the backward pass
        for first, last in shape.blocks_in_order():
            entries.append(walk.carry)
            q, k, v, residual = _load_roles(shape, plan, tensors, first, last)
            w = _Weights(shape, g, first, last)
            q, _ = _times_gain(shape, plan, q, gain, first, last)
            states = walk.block(_outer(_scaled(k, w.write), v, shape.hs), w.log_rho, first, last)
            y = _mm(w.mask_(_mm(q, k.mT)), v)
            y = _add(y, _mm(_scaled(q, w.read), states))
            if residual is not None:
                y = _add(y, _scaled(residual, _per_token(shape, ridge, plan.ridge, first, last)))
            layout.store(o, y, first, last)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        final = walk.final.clone()
        ctx.save_for_backward(g, gain, ridge, initial_state, cu_seqlens, final, *tensors, *entries)
        return layout.finish_output(o), final

    @staticmethod
    def backward(ctx, do, dfinal):
        with no_autocast(ctx.saved_tensors[5]):
            return _backward(ctx, do, dfinal)


def _backward(ctx, do, dfinal):
    if torch.is_grad_enabled():  # create_graph=True; the terms it would miss must not be missed silently
        raise RuntimeError("double backward through HLA operators (create_graph=True) is not supported")
    plan, count = ctx.plan, max(ctx.plan.where) + 1
    g, gain, ridge, initial_state, cu_seqlens, final, *rest = ctx.saved_tensors
    tensors, entries = rest[:count], rest[count:]
    need_g, need_gain, need_ridge, need_initial = ctx.needs_input_grad[1:5]
    if do is None and dfinal is None:
        return (None,) * (6 + count)
    shape = _Shape(plan, tensors, g, cu_seqlens)
    layout, dtype = shape.layout, shape.dtype
    if do is None:
        do = tensors[0].new_zeros(shape.batch, shape.length, shape.ho, shape.V)

    def output(x: Tensor | None, needed: bool, per_token: bool = True) -> Tensor | None:
        if x is None or not needed:
            return None
        return layout.new_output((*x.shape, 1) if per_token else tuple(x.shape), x, dtype if per_token else x.dtype)

    grads = [output(x, n, per_token=False) for x, n in zip(tensors, ctx.needs_input_grad[6:], strict=True)]
    dgain, dridge, dc = output(gain, need_gain), output(ridge, need_ridge), output(g, need_g)
    dread = output(g, need_g and shape.strict)
    initial = _state_or_zeros(initial_state, shape, do)
    against = layout.walk(_state_or_zeros(dfinal, shape, do), not shape.reverse)
    heads_q, heads_k = max(shape.hq, shape.hg), max(shape.hk, shape.hg)

    for (first, last), entry in zip(reversed(shape.blocks_in_order()), reversed(entries), strict=True):
        q_in, k, v, residual = _load_roles(shape, plan, tensors, first, last)
        dy = layout.load(do, first, last, dtype)
        w = _Weights(shape, g, first, last)
        q, gain_block = _times_gain(shape, plan, q_in, gain, first, last)
        # Intermediate results are deleted as soon as they were used: they are most of the memory of a backward pass.
        walk = layout.walk(initial, shape.reverse)
        walk.carry = entry
        written = _scaled(k, w.write)
        states = walk.block(_outer(written, v, shape.hs), w.log_rho, first, last)
        dscores = w.mask_(_mm(dy, v.mT))
        dq = _sum_heads(_add(_mm(dscores, k), _mm(_scaled(dy, w.read), states.mT)), heads_q)
        del states
        dk = _tmm(dscores, q, heads_k)
        del dscores
        dv = _tmm(w.mask_(_mm(q, k.mT)), dy, shape.hv)
        adjoint = against.block(_outer(_scaled(q, w.read), dy, shape.hs), w.log_rho, first, last)
        if k is v and dc is None:  # keys that are their own values: both adjoint readings in one product
            dk = _add(_add(dk, dv), _sum_heads(_mm(written, adjoint + adjoint.mT), heads_k))
            dv = None
        else:
            dk = _add(dk, _sum_heads(_mm(written if k is v else _scaled(v, w.write), adjoint.mT), heads_k))
            dv = _add(dv, _sum_heads(_mm(written, adjoint), shape.hv))
        del adjoint, written

        if dc is not None:
            from_q = _sum_heads(_dot(q, dq), shape.hg)
            from_k = _sum_heads(_dot(k, dk), shape.hg)
            layout.store(dc, from_k - from_q if shape.reverse else from_q - from_k, first, last)
            if dread is not None:
                layout.store(dread, from_q, first, last)
        dq, dk = _sum_heads(dq, shape.hq), _sum_heads(dk, shape.hk)
        if dgain is not None:
            layout.store(dgain, _dot(q_in, dq), first, last)
        if gain_block is not None:
            dq = _scaled(dq, gain_block)
        elif plan.gain != 1.0:
            dq = dq.mul_(plan.gain)
        contributions = [dq, dk, dv]
        if residual is not None:
            if dridge is not None:
                layout.store(dridge, _sum_heads(_dot(dy, residual), dridge.shape[2]), first, last)
            ridged = _scaled(dy, _per_token(shape, ridge, plan.ridge, first, last))
            contributions.append(_sum_heads(ridged, residual.shape[2]))
        for i, grad in enumerate(grads):
            if grad is not None:
                mine = [x for x, j in zip(contributions, plan.where, strict=True) if j == i and x is not None]
                layout.store(grad, reduce(Tensor.add_, mine), first, last)

    finish = lambda x: None if x is None else layout.finish_output(x)  # noqa: E731
    dg = None
    if dc is not None:
        # c at the right-hand end also scales the state there: the final one, or the initial one if reversed.
        state, dstate = (initial_state, against.final) if shape.reverse else (final, dfinal)
        at_ends = None
        if state is not None and dstate is not None:
            at_ends = (state * dstate).sum((-1, -2)).unflatten(1, (shape.hg, shape.hs // shape.hg)).sum(-1)
        dg = layout.reverse_cumsum(finish(dc)[..., 0], at_ends)
        if dread is not None:
            dg = dg - finish(dread)[..., 0]
        dg = dg.to(g.dtype)
    squeezed = lambda x, like: None if x is None else finish(x)[..., 0].to(like.dtype)  # noqa: E731
    dinitial = against.final.to(initial_state.dtype) if need_initial else None
    return (None, dg, squeezed(dgain, gain), squeezed(dridge, ridge), dinitial, None, *map(finish, grads))


def _state_or_zeros(state: Tensor | None, shape: _Shape, like: Tensor) -> Tensor:
    if state is not None:
        return state.to(shape.dtype)
    return torch.zeros(shape.layout.sequences, shape.hs, shape.K, shape.V, dtype=shape.dtype, device=like.device)


def _load_roles(shape: _Shape, plan: _Plan, tensors, first: int, last: int) -> list[Any]:
    loaded = [shape.layout.load(x, first, last, shape.dtype) for x in tensors]
    roles: list[Any] = [loaded[i] for i in plan.where]
    return roles if len(roles) == 4 else [*roles, None]


def _per_token(shape: _Shape, x: Tensor | None, constant: float, first: int, last: int) -> Tensor | float:
    return constant if x is None else shape.layout.load(x[..., None], first, last, shape.dtype)


def _times_gain(shape: _Shape, plan: _Plan, q: Tensor, gain: Tensor | None, first: int, last: int):
    """``gain_t o_t`` is what the query ``gain_t q_t`` reads. Returns that query, and the gain if it is a tensor."""
    if gain is None:
        return (q if plan.gain == 1.0 else q * plan.gain), None
    block = shape.layout.load(gain[..., None], first, last, shape.dtype)
    return q * block, block


# -- products between operands of different head counts; the smaller operand is never repeated ----------------------


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``[B, M, Ha, r, s] @ [B, M, Hb, s, t] -> [B, M, max(Ha, Hb), r, t]``: groups become extra rows or columns."""
    ha, hb = a.shape[2], b.shape[2]
    if ha == hb:
        return a @ b
    if ha > hb:
        return (a.unflatten(2, (hb, ha // hb)).flatten(3, 4) @ b).unflatten(3, (ha // hb, a.shape[3])).flatten(2, 3)
    return _mm(b.mT, a.mT).mT


def _tmm(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """``a^T b`` summed over groups down to ``heads``: the groups become part of the contraction."""
    n = a.shape[2]
    if n != b.shape[2] or n < heads:
        return _sum_heads(_mm(a.mT, b), heads)
    if n > heads:
        a, b = (x.unflatten(2, (heads, n // heads)).flatten(3, 4) for x in (a, b))
    return a.mT @ b


def _outer(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """``sum_t a_t b_t^T`` per chunk with at least ``heads`` heads, summed over groups above that."""
    x = _tmm(a, b, min(heads, max(a.shape[2], b.shape[2])))
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _sum_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] <= heads else x.unflatten(2, (heads, x.shape[2] // heads)).sum(3)


def _scale_heads(x: Tensor, w: Tensor) -> Tensor:
    """``x * w`` for head counts of which one divides the other; in place if x has at least as many."""
    hx, hw = x.shape[2], w.shape[2]
    if hx >= hw:
        x.unflatten(2, (hw, hx // hw)).mul_(w.unsqueeze(3))
        return x
    return (x.unsqueeze(3) * w.unflatten(2, (hx, hw // hx))).flatten(2, 3)


def _scaled(x: Tensor, w: Tensor | float | None) -> Tensor:
    if w is None:
        return x
    if isinstance(w, float):
        return x * w
    return x * w if x.shape[2] == w.shape[2] else _scale_heads(x.clone(), w)


def _add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` for head counts of which one divides the other, in place where possible."""
    if x.shape[2] < y.shape[2]:
        x, y = y, x
    if x.shape[2] == y.shape[2]:
        return x.add_(y)
    x.unflatten(2, (y.shape[2], x.shape[2] // y.shape[2])).add_(y.unsqueeze(3))
    return x


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """``x_t . y_t`` as ``[B, M, max heads, C, 1]``."""
    hx, hy = x.shape[2], y.shape[2]
    if hx == hy:
        return (x * y).sum(-1, keepdim=True)
    if hx < hy:
        x, y, hx, hy = y, x, hy, hx
    return (x.unflatten(2, (hy, hx // hy)) * y.unsqueeze(3)).sum(-1, keepdim=True).flatten(2, 3)
