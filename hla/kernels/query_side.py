"""The readings of `hla_q` in Triton: everything that happens between q and ``x_order``, and its gradient.

`hla.ops.query_side` reads the one state S several times, each time with the result of the reading before. Here S is
computed once, in one walk that leaves the state entering every chunk in memory (`states`); then all chunks are
independent, and one program does all readings of a chunk with x on chip (`solve`). The gradient is another chain of
readings of the same states (`adjoint`),

    u_n = y_n / theta_n,    y_{n-1} = y_n - S u_n - ridge u_n,    dq = y_0 / theta_0 + sum_n u_n,

and one reversed walk of a moment that all readings share,

    dk_t = G_t k_t + 2 m_t k_t,   G_t = -sum_{s>=t} exp(c_s - c_t) sum_n (u_n x_{n-1}^T + x_{n-1} u_n^T)_s,
    m_t = sum_{s>=t} exp(c_s - c_t) dtrace_s.

There are two ways to the gradient. Three kernels leave all x and u in memory: `adjoint`, the walk (`moments`), and what
it means for each chunk (`fold`). On Hopper GPUs one kernel (`query_side_hopper`; heads of 128: `query_side_adjoint`)
has all x and u of a chunk on chip and leaves only the moment of the chunk; a scan brings that to earlier chunks
(`scan_later`), which read it (`fold_later`).

Head sizes up to 128; larger ones go stage by stage through `chain`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import block, device_config, has_gluon, query_side_config
from hla.kernels.launch import copies_whole, launch, to_copy_whole
from hla.kernels.library import Operation
from hla.kernels.linear_attn import operand, per_head, read, shared, sum_heads, sums
from hla.kernels.pairs import COLUMNS, Entering, entering, fits, gradients
from hla.kernels.query_side_kernels import adjoint, fold, fold_later, moments, per_token, scan_later, solve
from hla.kernels.segments import Cut, cut, cut_every, enter, fold_segments, is_batch_invariant, parts_of, sum_later
from hla.ops.checks import Call
from hla.ops.state import HLAQState, State

LARGEST = 128
SCAN_BLOCK = 1024  # numbers of a moment that one program carries
WALKED = 64  # head size for which there is a forward pass in one walk
SOLVED = 128  # and that for which there is a `solve` of its own


def fits_hopper(size: int, order: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the gradient of the readings is that of `query_side_hopper`."""
    return dtype == torch.bfloat16 and size in (64, 128) and order <= 4 and has_gluon(capability)


class Sizes:
    """Shapes, cuts and configuration of one call."""

    def __init__(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, order: int):
        self.cu_seqlens = cu_seqlens
        self.B, self.T, self.HQ, self.K = q.shape
        self.HKV, self.order, self.device = k.shape[2], order, q.device
        self.operand, self.precision = operand(q, k)
        self.dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16  # of what passes through memory
        self.config = query_side_config(self.K, self.operand == tl.float32, device_config(q.device)[0])
        self.columns = min(COLUMNS, block(self.K))
        self.blocks = -(-self.K // self.columns)
        self.hopper = fits_hopper(self.K, self.order, q.dtype, device_config(q.device)[0])
        self.segments = cut(self.B, self.T, self.HQ * self.blocks, cu_seqlens, q.device)
        self.chunks = cut_every(self.config.chunk, self.B, self.T, cu_seqlens, q.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)


def _run_states(
    s: Sizes, k: Tensor, g: Tensor | None, initial: Tensor | None, final: bool, entered: Tensor | None = None
) -> Entering:
    """S."""
    return entering(
        k, k, g, s.segments, s.chunks, heads=s.HKV, initial=initial, final=final, dtype=s.dtype, traces=True,
        stages=s.config.states_stages, entered=entered,
    )  # fmt: skip


def _common(s: Sizes, q: Tensor, k: Tensor, g: Tensor | None, ridge: Tensor, nodes: Tensor) -> tuple[tuple, dict]:
    """Arguments that `solve` and `adjoint` share: sizes and strides; compile-time sizes."""
    sizes = (s.T, s.chunks.per_sequence, s.HQ, s.HQ // s.HKV, s.HKV // g.shape[2] if g is not None else 1)
    strides = (*q.stride()[:3], *k.stride()[:3], *ridge.stride(), *nodes.stride())
    compile_time = dict(
        D=s.K, C=s.config.chunk, BK=block(s.K), BLOCKS=s.blocks, GATED=g is not None, OPERAND=s.operand,
        PRECISION=s.precision,
    )  # fmt: skip
    return (*sizes, *strides), compile_time


def _run_solve(s: Sizes, q, k, g, ridge, nodes, all_states, traces) -> Tensor:
    """x after all readings ``[B, T, HQ, K]``."""
    x = s.new(s.B, s.T, s.HQ, s.K, dtype=s.dtype)
    sizes, compile_time = _common(s, q, k, g, ridge, nodes)
    args = (q, k, g, ridge, nodes, all_states, traces, x, s.chunks.table, *sizes)
    if s.hopper and s.K == SOLVED and q.numel() and copies_whole(q, k):
        from hla.kernels.query_side_walk import solve_hopper

        launch(
            solve_hopper, s.chunks.slots * s.HQ, *args, ORDER=s.order, D=s.K, C=s.config.chunk, BLOCKS=s.blocks,
            GATED=g is not None, warps=4, stages=1,
        )  # fmt: skip
    elif q.numel():
        launch(
            solve, s.chunks.slots * s.HQ, *args, ORDER=s.order, **compile_time, warps=s.config.warps, stages=1,
            registers=s.config.registers,
        )  # fmt: skip
    return x


def _forward(plan: str, q, k, v, g, ridge, nodes, S, P, cu_seqlens, *, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    """([o] and, if wanted, the final S and P; [x_order] and, where they were found, the S and P between segments)."""
    scale, final = _decode(plan)
    s = Sizes(q, k, cu_seqlens, nodes.shape[-1] - 1)
    return readings(s, scale, q, k, v, g, ridge, nodes, S, P, final=final, keep=keep)


def readings(
    s: Sizes, scale: float, q, k, v, g, ridge, nodes, S, P, *, final: bool, keep: bool, entered: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """As `_forward`; entered: the S and P that enter the segments of a split, if they are known."""
    if s.hopper and s.K == v.shape[3] == WALKED and q.numel() and copies_whole(q, k, v):
        from hla.kernels.query_side_walk import walk_through

        o, x, finals, entered = walk_through(
            q, k, v, g, ridge, nodes, S, P, s.segments, scale=scale, final=final, keep=keep, entered=entered
        )  # fmt: skip
    else:
        S_entered, P_entered = entered or (None, None)
        all_states, traces, S_final, S_entered = _run_states(s, k, g, S, final, S_entered)
        x = _run_solve(s, q, k, g, ridge, nodes, all_states, traces)
        del all_states
        done = read(
            x, k, v, g, s.segments, heads=s.HQ, factor=scale, initial=P, entered=P_entered, final=final,
            out_dtype=v.dtype,
        )  # fmt: skip
        o, finals = done.o, [y for y in (S_final, done.final) if y is not None]
        entered = [y for y in (S_entered, done.entered) if y is not None]
    kept = [x] if keep and x is not None else []
    if keep and s.segments.table is None and not is_batch_invariant():  # (of packed sequences they can be many)
        kept += entered
    return [o, *finals], kept


def _fake(plan: str, q, k, v, g, ridge, nodes, S, P, cu_seqlens) -> tuple[list[Tensor], list[Tensor]]:
    (B, T, HQ, K), (HKV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    x = q.new_empty(B, T, HQ, K, dtype=torch.float32 if q.dtype == torch.float32 else torch.bfloat16)
    finals = [q.new_empty(N, HKV, K, D, dtype=torch.float32) for D in (K, V)] if _decode(plan)[1] else []
    return [v.new_empty(B, T, HQ, V), *finals], [x]


def _decode(plan: str) -> tuple[float, bool]:
    scale, final = plan.split("|")
    return float(scale), final == "1"


class Asked:
    """The gradient of a state behind a piece of a sequence, which the pieces after it know."""

    def tell(self, own: Tensor) -> None:
        """Starts to tell the pieces before what this one by itself does to the state that enters it, float32."""
        raise NotImplementedError

    def wait(self) -> Tensor:
        """The gradient ``[N, HKV, K, K or V]``, after `tell`."""
        raise NotImplementedError


class Behind(NamedTuple):
    """The gradients of the S and P behind the sequences, ``[N, HKV, K, K or V]``, or None; of a piece of longer
    sequences they are `Asked` for, P's first.

    head: of packed sequences the one ``[1]`` that enters the piece, the only one of which is told; None: all.
    """

    S: Tensor | Asked | None = None
    P: Tensor | Asked | None = None
    head: Tensor | None = None

    def parts(self, shape: Cut) -> Tensor | None:
        """The segments of head, or None: all."""
        return None if self.head is None else parts_of(self.head, shape)


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    q, k, v, g, ridge, nodes, S, P, cu_seqlens = tensors
    scale, final = _decode(plan)
    finals, (x, *entered) = saved[: 2 * final], saved[2 * final :]
    dS, dP = grads[1:3] if final else (None, None)
    s = Sizes(q, k, cu_seqlens, nodes.shape[-1] - 1)
    found = gradients_of(s, scale, q, k, v, g, ridge, nodes, S, P, x, entered, finals, grads[0], Behind(dS, dP), needed)
    return [y if need else None for y, need in zip([*found, None], needed, strict=True)]


def gradients_of(
    s: Sizes, scale: float, q, k, v, g, ridge, nodes, S, P, x: Tensor, entered: Sequence[Tensor],
    finals: Sequence[Tensor], do: Tensor | None, behind: Behind, needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Of q, k, v, g, ridge, nodes, S and P; those that are not needed may be None.

    x, entered: what `readings` kept. finals: the S and P behind the sequences, if there are gradients of them.
    """
    # (A pass inside `batch_invariant`, where the other one was not, cuts the sequences elsewhere.)
    S_entered, P_entered = (None, None) if not entered or is_batch_invariant() else entered
    if do is None:
        do = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    do = do.contiguous()
    group = s.HQ // s.HKV
    gated, in_pairs = needed[3], fits(s.K, v.shape[3], q.dtype)
    dP, later = behind.P, None
    states: list[Entering] = []  # (whoever takes them has the only reference)
    if isinstance(dP, Asked):
        later, totals = sums(
            x, do, g, s.segments, heads=s.HQ, reverse=True, exact=gated and not in_pairs
        )  # fmt: skip
        own = fold_segments(later, totals, s.segments, parts=behind.parts(s.segments), reverse=True, factor=scale)
        dP.tell(shared(own, s.HKV))
        states.append(_run_states(s, k, g, S, False, S_entered))
        dP = dP.wait()
    ends = None if dP is None else per_head(dP, group) / scale
    if later is not None and s.segments.split:
        enter(later, totals, ends, s.segments, reverse=True)
    else:
        later = None
    read_P = _in_pairs if in_pairs else _in_walks
    at_P = read_P(s, x, k, v, do, g, P, P_entered, ends, later, scale, gated)
    states = states or [_run_states(s, k, g, S, False, S_entered)]
    by_readings = _in_one_kernel if s.hopper else _in_three_kernels
    dq, out, dridge, dnodes, dc, dS, dS_initial = by_readings(
        s, q, k, g, ridge, nodes, states, behind, at_P.dx, at_P.dk, gated, needed[6]
    )
    dk, dv = sum_heads(out, s.HKV), sum_heads(at_P.dv, s.HKV)
    dg = None
    if gated:
        assert g is not None
        total = None
        for state, dstate in zip(finals, (dS, dP if at_P.dg is None else None), strict=False):
            if dstate is not None:
                y = (state * dstate).sum((-1, -2))
                total = y if total is None else total + y
        if total is not None:
            total = sum_heads(total[:, None], g.shape[2])[:, 0]
        dc = dc if at_P.dc is None else dc + at_P.dc
        dg = sum_later(sum_heads(dc, g.shape[2]), total, s.cu_seqlens)
        if at_P.dg is not None:
            dg += sum_heads(at_P.dg, g.shape[2])
    dP_initial = None
    if P is not None and needed[7]:
        assert at_P.dP is not None
        dP_initial = shared(at_P.dP * scale, s.HKV).to(P.dtype)
    if dS_initial is not None:
        dS_initial = shared(dS_initial, s.HKV).to(S.dtype)
    return [dq, dk, dv, dg, dridge.to(ridge.dtype), dnodes.to(nodes.dtype), dS_initial, dP_initial]


class _AtP(NamedTuple):
    """Gradients through the reading of P, ``o = scale LA(x, k, v; g)``: of x, k and v per head of q; of the initial P
    in units of scale, or None; of g per head of q either itself, or as what `sum_later` makes it from (dc)."""

    dx: Tensor
    dk: Tensor
    dv: Tensor
    dP: Tensor | None
    dg: Tensor | None
    dc: Tensor | None


def _in_pairs(s: Sizes, x, k, v, do, g, P, entered, ends, later, scale, gated) -> _AtP:
    """Chunk by chunk, from the states between them."""
    found = gradients(
        x, k, v, do, g, s.segments, s.chunks, s.config, factor=scale, initial=P, ends=ends, entered=entered,
        later=later, dx_dtype=s.dtype, gated=gated,
    )  # fmt: skip
    return _AtP(found.dx, found.dk, found.dv, found.dinitial, found.dg, None)


def _in_walks(s: Sizes, x, k, v, do, g, P, entered, ends, later, scale, gated) -> _AtP:
    """By three walks, for operands that are wide or large."""
    common = dict(heads=s.HQ, factor=scale, exact=gated)
    values = read(
        k, x, do, g, s.segments, reverse=True, initial=ends, entered=later, final=P is not None, out_dtype=v.dtype,
        **common,
    )  # fmt: skip
    keys = read(
        v, do, x, g, s.segments, reverse=True, initial=None if ends is None else ends.mT, x=k if gated else None,
        entered=None if values.entered is None else values.entered.mT, out_dtype=s.dtype, **common,
    )  # fmt: skip
    queries = read(
        do, v, k, g, s.segments, x=x if gated else None, initial=None if P is None else P.mT, out_dtype=s.dtype,
        **common,
    )  # fmt: skip
    dc = scale * (queries.dot - keys.dot) if queries.dot is not None and keys.dot is not None else None
    return _AtP(queries.o, keys.o, values.o, values.final, None, dc)


def _in_three_kernels(
    s: Sizes, q, k, g, ridge, nodes, states: list[Entering], behind: Behind, dx, added, gated, wants_dS
):
    """Gradients through the readings of S, from dx, that of ``x_order``.

    Returns:
        those of q, k (per head of q, ``added`` included), ridge, nodes, what the cumulated decays have so far, that
        of the S behind the sequences, and that of the initial S per head of q, or None.
    """
    order, heads, tokens = s.order, s.HQ, s.B * s.T * s.HQ
    all_states, traces, *_ = states.pop()
    xs, us = (s.new(order, *q.shape, dtype=s.dtype) for _ in range(2))
    dq = s.new(*q.shape, dtype=q.dtype)
    dridge, dtrace, dc, trace, yq = (s.new(s.B, s.T, heads) for _ in range(5))
    xsu, ux, uq = (s.new(order, s.B, s.T, heads) for _ in range(3))
    dnodes = s.new(s.B, s.T, heads, order + 1)
    sizes, compile_time = _common(s, q, k, g, ridge, nodes)
    if q.numel():
        launch(
            adjoint, s.chunks.slots * heads,
            q, k, g, ridge, nodes, all_states, traces, xs, us, dx, dq, trace, yq, xsu, ux, uq,
            s.chunks.table, *sizes, tokens, ORDER=order, **compile_time, AHEAD=s.config.adjoint_ahead,
            warps=s.config.warps, stages=1,
        )  # fmt: skip
        launch(
            per_token, -(-tokens // 256),
            ridge, nodes, trace, yq, xsu, ux, uq, dridge, dnodes, dtrace, dc, tokens, s.T, heads, *ridge.stride(),
            *nodes.stride(), ORDER=order, N=256,
        )  # fmt: skip
    del all_states
    entered, m, dS, dS_initial = _run_moments(s, g, xs, us, dtrace, behind, wants_dS)
    out, dot, own = _run_fold(s, k, g, xs, us, entered, m, dtrace, added, gated)
    if gated:
        dc += own - 0.5 * dot
    return dq, out, dridge, dnodes, dc, dS, dS_initial


def _in_one_kernel(s: Sizes, q, k, g, ridge, nodes, states: list[Entering], behind: Behind, dx, added, gated, wants_dS):
    """The same by the kernel for Hopper: a chunk adds to everything at once, and a scan brings it to earlier chunks."""
    import hla.kernels.query_side_adjoint as both
    import hla.kernels.query_side_hopper as one_by_one

    all_states, traces, *_ = states.pop()
    q, k = to_copy_whole(q), to_copy_whole(k)
    heads, chunks = s.HQ, s.chunks
    dq, dk = s.new(*q.shape, dtype=q.dtype), s.new(*q.shape, dtype=k.dtype)
    dridge, dtrace, dc = (s.new(s.B, s.T, heads) for _ in range(3))
    dnodes = s.new(s.B, s.T, heads, s.order + 1)
    moments = s.new(chunks.slots, heads, s.K, s.K, dtype=s.dtype)
    added_m, totals = (s.new(chunks.slots, heads) for _ in range(2))
    group, gg = heads // s.HKV, s.HKV // g.shape[2] if g is not None else 1
    if q.numel():
        kernel, warps = (both.adjoint_at_once, both.WARPS) if s.K == 128 else (one_by_one.adjoint, one_by_one.WARPS)
        launch(
            kernel, chunks.slots * heads,
            q, k, g, ridge, nodes, all_states, traces, dx, added, dq, dk, moments, added_m, totals, dridge, dnodes,
            dtrace, dc, chunks.table, s.T, chunks.per_sequence, heads, group, gg, *q.stride()[:3], *k.stride()[:3],
            *ridge.stride(), *nodes.stride(),
            ORDER=s.order, D=s.K, C=s.config.chunk, BLOCKS=s.blocks, GATED=g is not None, warps=warps,
        )  # fmt: skip
    del all_states

    def scan(entering: Tensor | None, leaving: Tensor | None, m: Tensor | None) -> None:
        launch(
            scan_later, chunks.sequences * heads * (s.K * s.K // SCAN_BLOCK),
            moments, added_m, m, totals if g is not None else None, entering, leaving, chunks.table,
            chunks.first, chunks.per_sequence, heads, *((0, 0, 0, 0) if entering is None else entering.stride()),
            D=s.K, BLOCK=SCAN_BLOCK, AHEAD=8, warps=2,
        )  # fmt: skip

    dS = behind.S
    if isinstance(dS, Asked):
        own = s.new(chunks.sequences, heads, s.K, s.K)
        if q.numel():
            scan(None, own, None)
        else:
            own.zero_()
        own = own if behind.head is None else own.index_select(0, behind.head)
        dS.tell(shared(own, s.HKV))
        dS = dS.wait()
    ends = None if dS is None else per_head(dS, group)
    dS_initial = s.new(chunks.sequences, heads, s.K, s.K) if wants_dS else None
    if q.numel():
        m = torch.empty_like(added_m)
        scan(ends, dS_initial, m)
        launch(
            fold_later, chunks.slots * heads, k, g, moments, m, dtrace, dk, dc, chunks.table,
            s.T, chunks.per_sequence, heads, group, gg, *k.stride()[:3], D=s.K, C=s.config.chunk, BK=block(s.K),
            GATED=g is not None, OPERAND=s.operand, PRECISION=s.precision, warps=s.config.warps, stages=1,
        )  # fmt: skip
    elif dS_initial is not None:
        dS_initial.zero_() if ends is None else dS_initial.copy_(ends)
    return dq, dk, dridge, dnodes, dc, dS, dS_initial


_operation = Operation("query_side", _forward, _fake, _backward, lambda plan: 1, always_kept=1)


def _run_moments(s: Sizes, g, xs, us, dtrace, behind: Behind, wants_dS):
    """(the reversed moment that enters each chunk; m, likewise; the gradient of the S behind the sequences; that of the
    initial S per head of q)."""
    heads, shape, group = s.HQ, s.segments, s.HQ // s.HKV
    entered = s.new(s.chunks.slots, heads, s.K, s.K, dtype=s.dtype)
    traces = s.new(s.chunks.slots, heads)
    dS_initial = s.new(shape.sequences, heads, s.K, s.K) if wants_dS else None
    dS, asks = behind.S, isinstance(behind.S, Asked)
    enter_state = enter_trace = None

    def walked(leave, leave_trace, total) -> None:
        entering = None if leave is not None else enter_state
        launch(
            moments, shape.slots * heads * s.blocks,
            g, xs, us, dtrace, entering, enter_trace, entered, traces, leave, leave_trace, total,
            None if leave is not None else dS_initial, shape.table, s.chunks.table, s.chunks.first,
            s.T, shape.segment, shape.per_sequence, s.chunks.per_sequence, heads,
            heads // g.shape[2] if g is not None else 1, *((0, 0, 0, 0) if entering is None else entering.stride()),
            s.B * s.T * heads, ORDER=s.order, D=s.K, C=s.config.chunk, BK=block(s.K), BV=s.columns,
            GATED=g is not None, SPLIT=shape.split, ALL=asks, OPERAND=s.operand, PRECISION=s.precision, warps=4,
            stages=s.config.moments_stages,
        )  # fmt: skip

    if shape.split or asks:
        leave, m = s.new(shape.slots, heads, s.K, s.K), s.new(shape.slots, heads)
        total = s.new(shape.slots, heads) if g is not None else None
        if xs.numel():
            walked(leave, m, total)
        else:
            for y in (leave, m, total):
                if y is not None:
                    y.zero_()
    if isinstance(dS, Asked):
        all_of = functools.partial(fold_segments, totals=total, shape=shape, parts=behind.parts(shape), reverse=True)
        own_m, own = all_of(m[..., None, None]), all_of(leave)
        own = own_m * torch.eye(s.K, device=s.device) - own
        dS.tell(shared(own, s.HKV))
        dS = dS.wait()
    enter_state = None if dS is None else -per_head(dS, group)
    if not xs.numel():
        if dS_initial is not None:
            dS_initial.zero_() if enter_state is None else dS_initial.copy_(-enter_state)
        return entered, traces, dS, dS_initial
    if shape.split:
        enter(leave, total, enter_state, shape, reverse=True)
        enter(m[..., None, None], total, None, shape, reverse=True)
        enter_state, enter_trace = leave, m
    walked(None, None, None)
    return entered, traces, dS, dS_initial


def _run_fold(s: Sizes, k, g, xs, us, entered, traces, dtrace, added, gated):
    """(gradient of k per head of q; the dots of k with what S has in it, and what a token has in them by itself)."""
    heads = s.HQ
    out = s.new(s.B, s.T, heads, s.K, dtype=k.dtype)
    dot, own = (s.new(s.B, s.T, heads) if gated else None for _ in range(2))
    if k.numel():
        launch(
            fold, s.chunks.slots * heads,
            k, g, xs, us, entered, traces, dtrace, added, out, dot, own, s.chunks.table,
            s.T, s.chunks.per_sequence, heads, heads // s.HKV, s.HKV // g.shape[2] if g is not None else 1,
            *k.stride()[:3], s.B * s.T * heads, ORDER=s.order, D=s.K, C=s.config.chunk, BK=block(s.K),
            GATED=g is not None, OPERAND=s.operand, PRECISION=s.precision, warps=s.config.warps,
            stages=s.config.fold_stages,
        )  # fmt: skip
    return out, dot, own


def prepared(call: Call) -> tuple[Tensor | None, ...]:
    """(q, k, v, g, ridge, nodes) as the kernels take them."""
    c = call
    assert c.nodes is not None
    ridge = c.ridge
    if not isinstance(ridge, Tensor):
        ridge = torch.full((1, 1, 1), ridge, dtype=torch.float32, device=c.q.device).expand(c.q.shape[:3])
    q, k, v = (y if y.stride(-1) == 1 or y.shape[-1] == 1 else y.contiguous() for y in (c.q, c.k, c.v))
    return q, k, v, None if c.g is None else c.g.float().contiguous(), ridge, c.nodes


def run(call: Call) -> tuple[Tensor, State | None]:
    """`hla_q` for head sizes up to `LARGEST`."""
    S = P = None
    if call.initial_state is not None:
        assert isinstance(call.initial_state, HLAQState)
        S, P = call.initial_state
    final = call.output_final_state
    o, *finals = _operation(
        f"{call.scale}|{int(final)}", 3 if final else 1, *prepared(call), S, P, call.cu_seqlens
    )  # fmt: skip
    return o, HLAQState(*finals) if final else None


def supports(call: Call) -> bool:
    """Whether `run` does this call (it has no large heads)."""
    return call.q.shape[-1] <= LARGEST
