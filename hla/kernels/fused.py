"""Second and third order in one kernel: keys and values are transformed and read while they are on the chip.

Two compile-time switches give three operators (`hla.ops.family`):

    KEY    k~ = gain * LA(p, k, k; 2g) + ridge * p          state S  (hla2, hla3)
    VALUE  v~ = value_gain * LA(p, k, v; g) + value_ridge * v    P  (ahla, hla3)
           o  = scale * LA(q, k~ or k, v~ or v; g)               F

Stage after stage (`hla.kernels.chain`) writes k~ and v~ to memory and reads them back, and reads k and v again; at the
sizes for which all states of a head fit the registers of one program (K, V <= 64) memory is what bounds both forms.
Here a program walks the chunks of one sequence and one head with all its states. Heads that share S or P each
accumulate their own copy: that costs products, not memory traffic that reaches the card's DRAM.

Conventions, units and precision are those of `linear_attn.walk`; k~ and v~ enter products as the operands they are
rounded to for memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import Config, block, device_config
from hla.kernels.launch import launch
from hla.kernels.linear_attn import operand
from hla.kernels.segments import Cut
from hla.ops.linear_attn import Stage

if TYPE_CHECKING:
    from hla.kernels.chain import Plan

LARGEST = 64  # head size, of keys and of values


@triton.jit
def _rows(X, x_t, first, rows, columns, stop, D: tl.constexpr, OPERAND: tl.constexpr):
    """Rows ``first + rows`` of one head as operands, zeros from ``stop`` on and beyond D columns."""
    at = first + rows
    inside = (at < stop)[:, None]
    if columns.shape[0] != D:
        inside = inside & (columns < D)[None, :]
    return tl.load(X + (tl.cast(at, tl.int64) * x_t)[:, None] + columns[None, :], mask=inside, other=0.0).to(OPERAND)


@triton.jit
def _write_rows(X, y, x_t, first, rows, columns, stop, D: tl.constexpr):
    """Writes rows ``first + rows`` of one head."""
    at = first + rows
    inside = (at < stop)[:, None]
    if columns.shape[0] != D:
        inside = inside & (columns < D)[None, :]
    tl.store(X + (tl.cast(at, tl.int64) * x_t)[:, None] + columns[None, :], y.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _state(X, x_k, x_v, rows, columns, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """The state that enters, ``[D, E]`` in a block of ``[BD, BE]``; zeros without one."""
    if X is None:
        state = tl.zeros([BD, BE], tl.float32)
    else:
        inside = (rows < D)[:, None] & (columns < E)[None, :]
        state = tl.load(X + rows[:, None] * x_k + columns[None, :] * x_v, mask=inside, other=0.0).to(tl.float32)
    return state


@triton.jit
def _leave(X, state, rows, columns, D: tl.constexpr, E: tl.constexpr, x_d: tl.constexpr, x_e: tl.constexpr):
    """Writes the state that leaves, ``[D, E]``."""
    tl.store(X + rows[:, None] * x_d + columns[None, :] * x_e, state, mask=(rows < D)[:, None] & (columns < E)[None, :])


@triton.jit
def _shaped(y, residual, GAIN, gain, RIDGE, ridge, at, h, heads, gain_group, ridge_group, live, PLAIN: tl.constexpr):
    """``gain_t y_t + ridge_t residual_t``; PLAIN: no ridge."""
    if GAIN is None:
        y *= gain
    else:
        y *= tl.load(GAIN + at * (heads // gain_group) + h // gain_group, mask=live, other=0.0)[:, None]
    if not PLAIN:
        if RIDGE is None:
            y += residual.to(tl.float32) * ridge
        else:
            r = tl.load(RIDGE + at * (heads // ridge_group) + h // ridge_group, mask=live, other=0.0)
            y += residual.to(tl.float32) * r[:, None]
    return y


@triton.jit(do_not_specialize=["length", "heads", "g_kv", "g_p", "g_kg", "g_kr", "g_vg", "g_vr"])
def read_transformed(
    Q, K, V, INNER, OUT, G, KT, VT, KEY_GAIN, KEY_RIDGE, VALUE_GAIN, VALUE_RIDGE,
    S_ENTER, P_ENTER, F_ENTER, S_LEAVE, P_LEAVE, F_LEAVE, SLOTS,
    scale, key_gain, key_ridge, value_gain, value_ridge, length, heads, g_kv, g_p, g_kg, g_kr, g_vg, g_vr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, i_b, i_t, i_h,
    s_n, s_h, s_k, s_v, p_n, p_h, p_k, p_v, f_n, f_h, f_k, f_v,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, GATED: tl.constexpr, INNER_IS_K: tl.constexpr,
    KEY_PLAIN: tl.constexpr, VALUE_PLAIN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, one head of q. Pointers that are None switch their part off at compile time.

    INNER is p where that is a tensor of its own; otherwise p is k or q. Head h reads head ``h // g_kv`` of k, v and g,
    and head ``h // g_p`` of p; the first head of a group writes what the group shares.
    """
    h = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    if SLOTS is None:
        sequence = tl.cast(slot, tl.int64)
        batch = sequence
        start = 0
        stop = length
    else:
        sequence = tl.load(SLOTS + slot * 4).to(tl.int64)
        batch = tl.cast(0, tl.int64)
        start = tl.load(SLOTS + slot * 4 + 1)
        stop = tl.load(SLOTS + slot * 4 + 2)
        if sequence < 0:
            return
    h_kv = h // g_kv
    h_p = h // g_p
    rows = tl.arange(0, C)
    ck = tl.arange(0, BK)
    cv = tl.arange(0, BV)
    causal = rows[:, None] >= rows[None, :]

    if KEY:
        s_enter = None if S_ENTER is None else S_ENTER + sequence * s_n + h_kv * s_h
        S = _state(s_enter, s_k, s_v, ck, ck, DK, DK, BK, BK)
    if VALUE:
        p_enter = None if P_ENTER is None else P_ENTER + sequence * p_n + h_kv * p_h
        P = _state(p_enter, p_v, p_k, cv, ck, DV, DK, BV, BK)
    f_enter = None if F_ENTER is None else F_ENTER + sequence * f_n + h_p * f_h
    if VALUE:
        F = _state(f_enter, f_k, f_v, ck, cv, DK, DV, BK, BV)
    else:
        F = _state(f_enter, f_v, f_k, cv, ck, DV, DK, BV, BK)

    Q += batch * q_b + tl.cast(h, tl.int64) * q_h
    K += batch * k_b + tl.cast(h_kv, tl.int64) * k_h
    V += batch * v_b + tl.cast(h_kv, tl.int64) * v_h
    if INNER is not None:
        INNER += batch * i_b + tl.cast(h_p, tl.int64) * i_h
    OUT += (batch * length * heads + h) * DV
    if KT is not None:
        KT += (batch * length * (heads // g_p) + h_p) * DK
    if VT is not None:
        VT += (batch * length * (heads // g_p) + h_p) * DV
    stop_inner = tl.where(h % g_p == 0, stop, start)  # who writes k~ and v~
    for first in range(start, stop, C):
        live = first + rows < stop
        at = batch * length + first + rows  # of per-token tensors
        q = _rows(Q, q_t, first, rows, ck, stop, DK, OPERAND)
        k = _rows(K, k_t, first, rows, ck, stop, DK, OPERAND)
        v = _rows(V, v_t, first, rows, cv, stop, DV, OPERAND)
        if INNER is not None:
            p = _rows(INNER, i_t, first, rows, ck, stop, DK, OPERAND)
        elif INNER_IS_K:
            p = k
        else:
            p = q
        if GATED:
            # In units of log 2. Beyond exp(-110) a decay is zero in float32, and would only cost digits of the sums.
            g = tl.load(G + at * (heads // g_kv) + h_kv, mask=live, other=0.0).to(tl.float32)
            g = tl.maximum(g, -110.0) * 1.4426950408889634
            c = tl.cumsum(g, 0)
            total = tl.sum(g, 0)
            before = tl.exp2(c)[:, None]  # from the start of the chunk to each token
            rest = total - c
            after = tl.exp2(rest)[:, None]  # from each token to the end
            whole = tl.exp2(total)

        # What decides about registers: states are brought to the end of the chunk as soon as possible, what tokens read
        # of them is a rounded copy in shared memory; and left operands are tensors that were loaded to shared memory,
        # which is why P, and F where values are not transformed, are held as [V, K].
        if KEY:
            s = S.to(OPERAND)
            write = k
            if GATED:
                S *= whole * whole
                write = (k.to(tl.float32) * (after * after)).to(OPERAND)
            S = tl.dot(tl.trans(k), write, S, input_precision=PRECISION)
        if VALUE:
            m = P.to(OPERAND)
            write = k
            if GATED:
                P *= whole
                write = (k.to(tl.float32) * after).to(OPERAND)
            P = tl.dot(tl.trans(v), write, P, input_precision=PRECISION)

        inner = tl.dot(p, tl.trans(k), input_precision=PRECISION)
        key_scores = inner
        if GATED:
            decay = tl.exp2(c[:, None] - c[None, :])
            inner *= decay
            key_scores = inner * decay
        scores = tl.where(causal, inner, 0.0).to(OPERAND)
        key_scores = tl.where(causal, key_scores, 0.0).to(OPERAND)
        keys = k
        values = v
        if KEY:
            kt = tl.dot(p, s, input_precision=PRECISION)
            if GATED:
                kt *= before * before
            kt = tl.dot(key_scores, k, kt, input_precision=PRECISION)
            kt = _shaped(kt, p, KEY_GAIN, key_gain, KEY_RIDGE, key_ridge, at, h, heads, g_kg, g_kr, live, KEY_PLAIN)
            keys = kt.to(OPERAND)
            if KT is not None:
                _write_rows(KT, keys, heads // g_p * DK, first, rows, ck, stop_inner, DK)
        if VALUE:
            vt = tl.dot(p, tl.trans(m), input_precision=PRECISION)
            if GATED:
                vt *= before
            vt = tl.dot(scores, v, vt, input_precision=PRECISION)
            vt = _shaped(
                vt, v, VALUE_GAIN, value_gain, VALUE_RIDGE, value_ridge, at, h, heads, g_vg, g_vr, live, VALUE_PLAIN
            )
            values = vt.to(OPERAND)

        if VALUE:
            f = F.to(OPERAND)
            write = values
            if GATED:
                F *= whole
                write = (vt * after).to(OPERAND)
            F = tl.dot(tl.trans(keys), write, F, input_precision=PRECISION)
            if VT is not None:
                _write_rows(VT, values, heads // g_p * DV, first, rows, cv, stop_inner, DV)
        else:
            f = tl.trans(F.to(OPERAND))
            write = keys
            if GATED:
                F *= whole
                write = (kt * after).to(OPERAND)
            F = tl.dot(tl.trans(v), write, F, input_precision=PRECISION)
        # (ahla with p = q has these scores already.)
        if KEY or INNER_IS_K or INNER is not None:
            outer = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            if GATED:
                outer *= tl.exp2(rest[None, :] - rest[:, None])
            scores = tl.where(causal, outer, 0.0).to(OPERAND)
        o = tl.dot(q, f, input_precision=PRECISION)
        if GATED:
            o *= before
        o = tl.dot(scores, values, o, input_precision=PRECISION) * scale
        _write_rows(OUT, o, heads * DV, first, rows, cv, stop, DV)

    if F_LEAVE is not None:
        if h % g_kv == 0:
            at_state = sequence * (heads // g_kv) + h_kv
            if KEY:
                _leave(S_LEAVE + at_state * (DK * DK), S, ck, ck, DK, DK, DK, 1)
            if VALUE:
                _leave(P_LEAVE + at_state * (DK * DV), P, cv, ck, DV, DK, 1, DV)
        if h % g_p == 0:
            to = F_LEAVE + (sequence * (heads // g_p) + h_p) * (DK * DV)
            if VALUE:
                _leave(to, F, ck, cv, DK, DV, DV, 1)
            else:
                _leave(to, F, cv, ck, DV, DK, 1, DV)


class Pattern(NamedTuple):
    """A chain this kernel computes: the stages that transform keys and values, if they are there, and the last one."""

    keys: Stage | None
    values: Stage | None
    outer: Stage

    @property
    def inner_query(self) -> str:
        stage = self.keys or self.values
        assert stage is not None
        return stage.query


@functools.cache
def matches(plan: Plan) -> Pattern | None:
    """The chain as KEY, VALUE or both, or None where it is something else (more readings, a denominator, ...)."""
    *inner, outer = plan.stages
    given = set(plan.tensors)
    by_out = {s.out: s for s in inner}
    keys, values = by_out.get(outer.keys), by_out.get(outer.values)
    if len(inner) != (keys is not None) + (values is not None) or not inner or keys is values:
        return None
    k = outer.keys if keys is None else keys.keys
    v = outer.values if values is None else values.values
    query = inner[0].query
    plain = outer.gate == 1 and not outer.residuals and not isinstance(outer.gain, str)
    conditions = [plain, {outer.query, query, k, v} <= given, [name for name, _ in plan.outputs] == [outer.out]]
    conditions += [s.mode == "inclusive" for s in plan.stages] + [len(s.residuals) <= 1 for s in inner]
    if keys is not None:
        conditions += [keys.keys == keys.values, keys.gate == 2, all(name == query for _, name in keys.residuals)]
    if values is not None:
        conditions += [values.keys == k, values.query == query, values.gate == 1]
        conditions += [name == v for _, name in values.residuals]
    return Pattern(keys, values, outer) if all(conditions) else None


def fits(pattern: Pattern, x: dict[str, Tensor], g: Tensor | None, shape: Cut) -> bool:
    """Whether `fused` takes these sizes and heads: small ones, whole sequences, k, v and g with the same heads."""
    q, p = x[pattern.outer.query], x[pattern.inner_query]
    k = x[pattern.outer.keys if pattern.keys is None else pattern.keys.keys]
    v = x[pattern.outer.values if pattern.values is None else pattern.values.values]
    heads = {k.shape[2], v.shape[2], k.shape[2] if g is None else g.shape[2]}
    return (
        not shape.split and max(k.shape[3], v.shape[3]) <= LARGEST and len(heads) == 1
        and q.shape[2] % k.shape[2] == 0 and p.shape[2] in (q.shape[2], k.shape[2])
    )  # fmt: skip


def fused_config(precision: str, operands: tl.dtype, both: bool, gated: bool, capability: tuple[int, int]) -> Config:
    """Dtype and precision of `operand`; ``both``: keys and values are transformed; gate; compute capability."""
    if operands == tl.float32:
        return Config(16, LARGEST, 4, 1) if precision == "tf32x3" else Config(32, LARGEST, 8, 1)
    if capability[0] not in (9, 10):  # operands are in registers: only shorter chunks and more warps do not spill
        return Config(32, LARGEST, 8, 2)
    return Config(64, LARGEST, 4, 2 if gated and not both else 3)


class Fused(NamedTuple):
    """o ``[B, T, HQ, V]``; final states stage by stage, float32; k~ and v~, those there are."""

    o: Tensor
    finals: list[Tensor]
    kept: list[Tensor]


def fused(
    pattern: Pattern,
    x: dict[str, Tensor],
    g: Tensor | None,
    shape: Cut,
    *,
    initial: Sequence[Tensor | None],
    final: bool,
    keep: bool,
    out_dtype: torch.dtype,
    kept_dtype: torch.dtype,
) -> Fused:
    """Outputs of a chain that `matches` and `fits`.

    Args:
        x: tensors ``[B, T, H*, K or V]``, last dimension contiguous, and contiguous per-token numbers ``[B, T, H*]``,
            by name. g: ``[B, T, HKV]`` contiguous.
        initial: states ``[N, H*, K, K or V]`` stage by stage, any strides. final, keep: whether to return final states,
            and transformed keys and values.
    """
    keys, values, outer = pattern
    q, p = x[outer.query], x[pattern.inner_query]
    k = x[outer.keys if keys is None else keys.keys]
    v = x[outer.values if values is None else values.values]
    (B, T, heads, K), V, shared, inner = q.shape, v.shape[3], k.shape[2], p.shape[2]
    new = functools.partial(torch.empty, device=q.device)
    o = new(B, T, heads, V, dtype=out_dtype)
    kt = new(B, T, inner, K, dtype=kept_dtype) if keep and keys else None
    vt = new(B, T, inner, V, dtype=kept_dtype) if keep and values else None
    states = iter(initial)
    s_enter, p_enter, f_enter = next(states) if keys else None, next(states) if values else None, next(states)
    s_leave = new(shape.sequences, shared, K, K, dtype=torch.float32) if final and keys else None
    p_leave = new(shape.sequences, shared, K, V, dtype=torch.float32) if final and values else None
    f_leave = new(shape.sequences, inner, K, V, dtype=torch.float32) if final else None

    def shaping(stage: Stage | None) -> tuple[list[Tensor | None], list[float], list[int], bool]:
        """(gain and ridge as tensors, as numbers, their groups of heads; no ridge)."""
        ridge = stage.residuals[0][0] if stage and stage.residuals else 0.0
        both = [stage.gain if stage else 0.0, ridge]
        tensors = [x[y] if isinstance(y, str) else None for y in both]
        groups = [1 if y is None else heads // y.shape[2] for y in tensors]
        return tensors, [0.0 if isinstance(y, str) else float(y) for y in both], groups, ridge == 0.0

    key_tensors, key_numbers, key_groups, key_plain = shaping(keys)
    value_tensors, value_numbers, value_groups, value_plain = shaping(values)
    own = p is not q and p is not k
    dtype, precision = operand(q, k, v)
    config = fused_config(precision, dtype, bool(keys and values), g is not None, device_config(q.device)[0])
    launch(
        read_transformed, shape.slots * heads,
        q, k, v, p if own else None, o, g, kt, vt, *key_tensors, *value_tensors,
        s_enter, p_enter, f_enter, s_leave, p_leave, f_leave, shape.table,
        float(outer.gain), *key_numbers, *value_numbers,
        shape.length, heads, heads // shared, heads // inner, *key_groups, *value_groups,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *(p.stride()[:3] if own else (0, 0, 0)),
        *(n for y in (s_enter, p_enter, f_enter) for n in ((0, 0, 0, 0) if y is None else y.stride())),
        DK=K, DV=V, C=config.chunk, BK=block(K), BV=block(V), KEY=keys is not None, VALUE=values is not None,
        GATED=g is not None, INNER_IS_K=p is k, KEY_PLAIN=key_plain, VALUE_PLAIN=value_plain,
        OPERAND=dtype, PRECISION=precision, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    finals = [y for y in (s_leave, p_leave, f_leave) if y is not None]
    return Fused(o, finals, [y for y in (kt, vt) if y is not None])
