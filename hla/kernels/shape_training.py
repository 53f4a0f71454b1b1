"""What training spends between a layer's projections and its operator, in few passes through memory.

`project`: the projections, joined (`hla.joined`), and `shaped`: short convolution, feature map, norm and write gate of
q, k and v, ridge and decay; the forward pass is the kernel of prompts (`shape`), which reads all of them as columns of
one tensor, as the backward pass writes all gradients into one. Sums over tokens (for weights) are added up in a fixed
order. `gates` has what lies behind the operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from hla.convolution import history_after, positions_in_packed
from hla.joined import joined
from hla.kernels.configs import block
from hla.kernels.launch import launch
from hla.kernels.library import Operation
from hla.kernels.partial_sums import added_up
from hla.kernels.shape import (
    FEATURES,
    NORMS,
    TILE,
    _shape,
    convolved,
    exponential,
    featured,
    inside_sequence,
    loaded_token,
    norm_factor,
    real,
    runs_of,
    sigmoid,
    softplus,
    supports,
    taps_of,
    window_before,
)

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention

NUMBERS = 2048  # of a tile of logits
STEPS = 16  # such tiles a program goes through, and adds up for the gradients of numbers per head, at most
PROGRAMS = 256  # that have more than one
GRADIENT = 128, 3, 66  # of `_shape_gradient`, as `TILE` of `shape`


@triton.jit
def _gradient_walk(
    Y, MASK, BEGIN, TAPS, WRITE, DOUT, DY, DTAPS, DWRITE, b, start, length, run, eps, channel, h, in_d, gated, own,
    out_row, HKV: tl.constexpr, ROW: tl.constexpr, DK: tl.constexpr, AHEAD: tl.constexpr, TAPS_N: tl.constexpr,
    FEATURE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Runs of tokens of one head, one after the other, and the tokens behind each run that its last ones reach.

    Rows of Y, DY and WRITE are ROW apart, those of DOUT, of which the head has the columns ``own``, ``out_row``.
    DTAPS: a line of each channel, DWRITE: ``[B, T, HKV]``. What the input of a token gets is complete TAPS_N - 1 tokens
    later; ``pending`` has what it has got until then.
    """
    before: tl.constexpr = max(TAPS_N - 1, 0)
    behind: tl.constexpr = (before + AHEAD - 1) // AHEAD * AHEAD  # tokens behind a run, in whole steps
    at = b * length + start
    left = tl.minimum(length - start, run + before)
    mine = tl.minimum(length - start, run)
    here = at[:, None] * ROW + channel[None, :]
    line, out = Y + here, DY + here - before * ROW
    dline = DOUT + at[:, None] * out_row + own[None, :]
    logits = WRITE
    dlogits = DWRITE
    if WRITE is not None:
        logits = WRITE + at * ROW + h
        dlogits = DWRITE + at * HKV + h
    window = window_before(Y, MASK, BEGIN, None, b, start, length, ROW, channel, in_d, before)
    taps = taps_of(TAPS, channel, in_d, TAPS_N)
    zeros = tl.zeros([start.shape[0], channel.shape[0]], tl.float32)
    pending: tl.tuple = ()
    for _ in tl.static_range(before):
        pending = pending + (zeros,)
    dtaps: tl.tuple = ()
    for _ in tl.static_range(TAPS_N):
        dtaps = dtaps + (zeros,)
    loaded: tl.tuple = ()
    for u in tl.static_range(AHEAD):
        later_x, later_logit, inside = loaded_token(line, logits, MASK, at, u, left, in_d, gated)
        loaded = loaded + ((later_x, tl.load(dline, mask=inside, other=0.0), later_logit),)
        line += ROW
        dline += out_row
        if WRITE is not None:
            logits += ROW
    for first in range(0, run + behind, AHEAD):
        if before > 0:
            if first == run:  # (what is added from here on is other runs')
                _store_sums(DTAPS, dtaps, in_d, TAPS_N)
        for u in tl.static_range(AHEAD):
            i = first + u
            loaded_x, loaded_dout, logit = loaded[u]
            later_x, later_logit, inside = loaded_token(line, logits, MASK, at, i + AHEAD, left, in_d, gated)
            later = later_x, tl.load(dline, mask=inside, other=0.0), later_logit
            loaded = loaded[:u] + (later,) + loaded[u + 1 :]
            x, dout = loaded_x.to(tl.float32), loaded_dout.to(tl.float32)
            if BEGIN is not None:
                window = inside_sequence(BEGIN, window, start + i, i < left, before)
            everything = window + (x,)
            y, window = convolved(window, x, taps, TAPS_N)
            f, slope = featured(y, FEATURE)
            if FEATURE == 3:
                f = tl.where(in_d[None, :], f, 0.0)
            r = norm_factor(f, eps, NORM, DK)
            factor = r
            if NORM > 0 or WRITE is not None:
                dot = tl.sum(dout * f, 1)
            if WRITE is not None:
                e = exponential(tl.minimum(-logit.to(tl.float32), 80.0))
                share = tl.rsqrt(1.0 + e)
                tl.store(dlogits, dot * r * (0.5 * e * share * share * share), mask=(i < mine) & gated)
                factor *= tl.where(gated, share, 1.0)
            dy = dout * factor[:, None]
            if NORM == 1:
                dy -= f * (dot * factor * r * r)[:, None]
            elif NORM == 2:
                dy -= f * (dot * factor * r * r / DK)[:, None]
            dy *= slope
            dx = dy
            if TAPS_N > 0:
                sums: tl.tuple = ()
                for s in tl.static_range(TAPS_N):
                    sums = sums + (dtaps[s] + dy * everything[s],)
                dtaps = sums
                if BEGIN is not None:
                    begin = tl.load(BEGIN + start + i, mask=i < left, other=0)
                pending = pending + (zeros,)
                sums = ()
                for s in tl.static_range(TAPS_N):
                    given = dy
                    if BEGIN is not None:
                        given = tl.where((start + i - (before - s) >= begin)[:, None], dy, 0.0)
                    sums = sums + (pending[s] + given * taps[s],)
                dx = sums[0]
                pending = sums[1:]
            live = (i - before < mine) & (start + i - before >= start)
            if MASK is not None:
                dx = tl.where(real(MASK, at + i - before, live)[:, None], dx, 0.0)
            tl.store(out, dx.to(DY.dtype.element_ty), mask=live[:, None] & in_d[None, :])
            line += ROW
            dline += out_row
            out += ROW
            if WRITE is not None:
                logits += ROW
                dlogits += HKV
    if TAPS_N == 1:
        _store_sums(DTAPS, dtaps, in_d, TAPS_N)


@triton.jit
def _store_sums(DTAPS, dtaps, in_d, TAPS_N: tl.constexpr):
    for i in tl.static_range(TAPS_N):
        tl.store(DTAPS + i, tl.sum(dtaps[i], 0), mask=in_d)


@triton.jit(do_not_specialize=["length", "blocks", "run"])
def _shape_gradient(
    Y, MASK, BEGIN, TAPS, WRITE, DOUT_Q, DOUT_K, DOUT_V, DY, DTAPS, DWRITE, length, blocks, run, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ROW: tl.constexpr, BD: tl.constexpr,
    RUNS: tl.constexpr, AHEAD: tl.constexpr, TAPS_N: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the inputs to the first columns of DY, of the taps to DTAPS ``[B * blocks, channels, TAPS_N]``,
    to be added up, and of the write gate's logits to DWRITE ``[2 (k, v), B, T, HKV]``, likewise.

    One program per row, RUNS runs of ``run`` tokens, and head of q, k and v.
    """
    heads: tl.constexpr = HQ + 2 * HKV
    channels: tl.constexpr = (HQ + HKV) * DK + HKV * DV
    j = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    b = tl.cast(part // blocks, tl.int64)
    start = ((part % blocks) * RUNS + tl.arange(0, RUNS)) * run
    gated = tl.zeros([RUNS], tl.int32) + j >= HQ
    is_v = j >= HQ + HKV
    d = tl.arange(0, BD)
    channel = tl.where(is_v, (HQ + HKV) * DK + (j - HQ - HKV) * DV, j * DK) + d
    in_d = d < tl.where(is_v, DV, DK)
    sums = DTAPS
    if TAPS_N > 0:
        sums = DTAPS + (tl.cast(part, tl.int64) * channels + channel) * TAPS_N
    if is_v:
        dwrite = DWRITE
        if WRITE is not None:
            dwrite = DWRITE + tl.cast(length, tl.int64) * (tl.num_programs(0) // (heads * blocks)) * HKV
        h = j - HQ - HKV
        _gradient_walk(
            Y, MASK, BEGIN, TAPS, WRITE, DOUT_V, DY, sums, dwrite, b, start, length, run, eps, channel, h, in_d, gated,
            h * DV + d, HKV * DV, HKV, ROW, DK, AHEAD, TAPS_N, 0, 0,
        )  # fmt: skip
    else:
        h, dout, out_row = j - HQ, DOUT_K, HKV * DK
        if j < HQ:
            h, dout, out_row = j, DOUT_Q, HQ * DK
        _gradient_walk(
            Y, MASK, BEGIN, TAPS, WRITE, dout, DY, sums, DWRITE, b, start, length, run, eps, channel, h, in_d, gated,
            h * DK + d, out_row, HKV, ROW, DK, AHEAD, TAPS_N, FEATURE, NORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "steps"])
def _logit_gradient(
    Y, MASK, RIDGE_HEAD, A_LOG, DT_BIAS, DWRITE, DRIDGE, DG, DY, DRIDGE_HEAD, DA_LOG, DDT_BIAS, rows, steps,
    HQ: tl.constexpr, HKV: tl.constexpr, ROW: tl.constexpr, WRITE: tl.constexpr, RIDGE: tl.constexpr,
    DECAY: tl.constexpr, END: tl.constexpr, BQ: tl.constexpr, BKV: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits to DY, where they begin with the columns WRITE, RIDGE and DECAY and end with END (the
    rest of its columns becomes 0), and those of the numbers per head to ``[programs, heads]``, to be added up.

    DWRITE: ``[2 (k, v), rows, HKV]``, to be added up. Without DWRITE, DG or logits of the ridge (RIDGE = END) there are
    no such columns.
    """
    h, hq, pad = tl.arange(0, BKV), tl.arange(0, BQ), END + tl.arange(0, BP)
    in_h, in_hq = h < HKV, hq < HQ
    dhead = tl.zeros([BQ], tl.float32)
    da_log = tl.zeros([BKV], tl.float32)
    dbias = tl.zeros([BKV], tl.float32)
    for step in range(0, steps):
        row = tl.cast(tl.program_id(0), tl.int64) * (steps * BT) + step * BT + tl.arange(0, BT)
        line = row[:, None] * ROW
        there = (row < rows)[:, None]
        live = there & in_h[None, :]
        of_head = row[:, None] * HKV + h[None, :]
        if DWRITE is not None:
            d = tl.load(DWRITE + of_head, mask=live, other=0.0)
            d += tl.load(DWRITE + tl.cast(rows, tl.int64) * HKV + of_head, mask=live, other=0.0)
            tl.store(DY + line + (WRITE + h)[None, :], d.to(DY.dtype.element_ty), mask=live)
        if DG is not None:
            z = tl.load(Y + line + (DECAY + h)[None, :], mask=live, other=0.0).to(tl.float32)
            z += tl.load(DT_BIAS + h, mask=in_h, other=0.0).to(tl.float32)[None, :]
            rate = tl.exp(tl.load(A_LOG + h, mask=in_h, other=0.0).to(tl.float32))[None, :]
            dg = tl.load(DG + of_head, mask=real(MASK, row, row < rows)[:, None] & in_h[None, :], other=0.0)
            dg = -rate * dg.to(tl.float32)
            dz = dg * sigmoid(z)
            tl.store(DY + line + (DECAY + h)[None, :], dz.to(DY.dtype.element_ty), mask=live)
            da_log += tl.sum(dg * softplus(z), 0)
            dbias += tl.sum(dz, 0)
        if DRIDGE is not None:
            live = there & in_hq[None, :]
            z = tl.load(RIDGE_HEAD + hq, mask=in_hq, other=0.0).to(tl.float32)[None, :]
            if RIDGE < END:
                z += tl.load(Y + line + (RIDGE + hq)[None, :], mask=live, other=0.0).to(tl.float32)
            dz = tl.load(DRIDGE + row[:, None] * HQ + hq[None, :], mask=live, other=0.0).to(tl.float32)
            dz = tl.where(tl.abs(z) <= 12.0, dz * tl.exp(tl.minimum(z, 12.0)), 0.0)
            if RIDGE < END:
                tl.store(DY + line + (RIDGE + hq)[None, :], dz.to(DY.dtype.element_ty), mask=live)
            dhead += tl.sum(dz, 0)
        if END < ROW:
            zero = tl.zeros([BT, BP], DY.dtype.element_ty)
            tl.store(DY + line + pad[None, :], zero, mask=there & (pad < ROW)[None, :])
    if DG is not None:
        tl.store(DA_LOG + tl.program_id(0) * HKV + h, da_log, mask=in_h)
        tl.store(DDT_BIAS + tl.program_id(0) * HKV + h, dbias, mask=in_h)
    if DRIDGE is not None:
        tl.store(DRIDGE_HEAD + tl.program_id(0) * HQ + hq, dhead, mask=in_hq)


NONE, HEAD, TOKEN = 0, 1, 2  # where a coefficient is from: a number per head (or constants), and logits of each token


class _Plan(NamedTuple):
    """What the kernels must know of a layer. write, ridge, decay: NONE if the layer has no such thing, or if it is not
    theirs to compute."""

    HQ: int
    HKV: int
    DK: int
    DV: int
    FEATURE: int
    NORM: int
    write: int
    ridge: int
    decay: int
    eps: float

    @property
    def channels(self) -> int:
        return (self.HQ + self.HKV) * self.DK + self.HKV * self.DV

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """Where the logits of write gate, ridge and decay begin among the columns of a row, and where they end."""
        write = self.channels
        ridge = write + (self.HKV if self.write == TOKEN else 0)
        decay = ridge + (self.HQ if self.ridge == TOKEN else 0)
        return write, ridge, decay, decay + (self.HKV if self.decay == TOKEN else 0)

    @property
    def results(self) -> int:
        """q, k and v, and those of ridge and g that there are."""
        return 3 + (self.ridge != NONE) + (self.decay != NONE)


def _plan(mixer: HigherOrderLinearAttention) -> _Plan:
    kinds = {"head": HEAD, "fixed": HEAD, "token": TOKEN}
    whole = supports(mixer)
    return _Plan(
        mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim, FEATURES[mixer.feature_map],
        NORMS[mixer.qk_norm], TOKEN if mixer.write_gate else NONE,
        kinds.get(str(mixer.coefficients.get("ridge")), NONE) if whole else NONE,
        kinds.get(mixer.decay, NONE) if whole else NONE, float(mixer.norm_eps),
    )  # fmt: skip


def _decode(plan: str) -> _Plan:
    *numbers, eps = plan.split("|")
    return _Plan(**dict(zip(_Plan._fields, map(int, numbers), strict=False)), eps=float(eps))


def _results(p: _Plan, y: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Tensors for q, k, v, and for ridge and g."""
    q, k, v = (y.new_empty(*y.shape[:2], *size) for size in ((p.HQ, p.DK), (p.HKV, p.DK), (p.HKV, p.DV)))
    wide = lambda heads: y.new_empty(*y.shape[:2], heads, dtype=torch.float32)  # noqa: E731
    return [q, k, v], wide(p.HQ) if p.ridge else None, wide(p.HKV) if p.decay else None


def _forward(plan: str, y, taps, ridge_head, a_log, dt_bias, mask, begin, *, keep) -> tuple[list[Tensor], list[Tensor]]:
    (B, T, row), p = y.shape, _decode(plan)
    parts, ridge, g = _results(p, y)
    if y.numel():
        at_write, at_ridge, at_decay, _ = p.columns
        heads, size = p.HQ + 2 * p.HKV, block(max(p.DK, p.DV))
        runs, run, blocks, ahead = runs_of(B, T, heads, size, TILE)
        launch(
            _shape, B * blocks * heads,
            y, mask, begin, None, taps, y[..., at_write:] if p.write else None,
            y[..., at_decay:] if p.decay == TOKEN else None, a_log, dt_bias,
            y[..., at_ridge:] if p.ridge == TOKEN else None, ridge_head, None, *parts, g, ridge, None,
            # (no strides of tensors: that of a dimension of size 1 says nothing)
            T, blocks, run, row, row, row, row, p.eps,
            HQ=p.HQ, HKV=p.HKV, DK=p.DK, DV=p.DV, BD=size, RUNS=runs, AHEAD=ahead,
            TAPS_N=0 if taps is None else taps.shape[1], MOVE=False, FEATURE=p.FEATURE,
            NORM=p.NORM, FIXED=p.decay == HEAD, ORDER=0, BN=16, BT=32, warps=1,
        )  # fmt: skip
    return [*parts, *(x for x in (ridge, g) if x is not None)], []


def _fake(plan: str, y, *others) -> tuple[list[Tensor], list[Tensor]]:
    parts, ridge, g = _results(_decode(plan), y)
    return [*parts, *(x for x in (ridge, g) if x is not None)], []


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    y, taps, ridge_head, a_log, dt_bias, mask, begin = tensors
    (B, T, row), p = y.shape, _decode(plan)
    n = 0 if taps is None else taps.shape[1]
    shapes = [(p.HQ, p.DK), (p.HKV, p.DK), (p.HKV, p.DV)] + [(p.HQ,)] * bool(p.ridge) + [(p.HKV,)] * bool(p.decay)
    douts = [  # (those of unused results are None)
        y.new_zeros(B, T, *shape) if dout is None else dout.contiguous()
        for shape, dout in zip(shapes, grads, strict=True)
    ]
    dridge = douts[3] if p.ridge else None
    dg = douts[-1] if p.decay == TOKEN else None
    heads, size = p.HQ + 2 * p.HKV, block(max(p.DK, p.DV))
    runs, run, blocks, ahead = runs_of(B, T, heads, size, GRADIENT)
    new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=y.device)  # noqa: E731
    dy = torch.empty_like(y)
    dwrite = new(2, B, T, p.HKV) if p.write else None
    at_write, at_ridge, at_decay, end = p.columns
    wide = block(max(p.HQ, p.HKV))
    tokens = max(1, NUMBERS // wide)
    steps = max(1, min(STEPS, B * T // tokens // PROGRAMS))
    programs = -(-B * T // (tokens * steps))
    blocks = blocks if y.numel() else 0  # (no program, no sums)
    dtaps = new(B * blocks, p.channels, n) if n else None
    dhead = new(programs, p.HQ) if p.ridge else None
    da_log, dbias = (new(programs, p.HKV) if p.decay == TOKEN else None for _ in range(2))
    if y.numel():
        launch(
            _shape_gradient, B * blocks * heads,
            y, mask, begin, taps, y[..., at_write:] if p.write else None, *douts[:3], dy, dtaps, dwrite, T, blocks, run,
            p.eps, HQ=p.HQ, HKV=p.HKV, DK=p.DK, DV=p.DV, ROW=row, BD=size, RUNS=runs, AHEAD=ahead,
            TAPS_N=n, FEATURE=p.FEATURE, NORM=p.NORM, warps=1,
        )  # fmt: skip
        if row > p.channels or p.ridge:
            launch(
                _logit_gradient, programs,
                y, mask, ridge_head, a_log, dt_bias, dwrite, dridge, dg, dy, dhead, da_log, dbias, B * T, steps,
                HQ=p.HQ, HKV=p.HKV, ROW=row, WRITE=at_write, RIDGE=at_ridge if p.ridge == TOKEN else end,
                DECAY=at_decay, END=end, BQ=block(p.HQ), BKV=block(p.HKV), BP=block(row - end), BT=tokens, warps=4,
            )  # fmt: skip
    sums = zip((dtaps, dhead, da_log, dbias), tensors[1:5], strict=True)
    found = [dy, *(None if d is None else added_up(d).to(x.dtype) for d, x in sums), None, None]
    return [x if need else None for x, need in zip(found, needed, strict=True)]


_operation = Operation("shape", _forward, _fake, _backward, lambda plan: _decode(plan).results)


def shaped(
    mixer: HigherOrderLinearAttention,
    y: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q ``[B, T, HQ, K]``, k, v of a layer without rope and own inner query; ridge ``[B, T, HQ]`` and g ``[B, T, HKV]``
    in float32, None if it has none per head or token (or `shape.supports` no such layer). Differentiable.

    Args:
        y: ``[B, T, N]``: channels of q, k and v, then the logits of the write gate ``[HKV]`` and, if `shape.supports`
            the layer, of ridge ``[HQ]`` and decay ``[HKV]``, each if there are any per token; the rest is not read.
        mask: ``[B, T, 1]``, false at pads, or None. cu_seqlens: borders of packed sequences, which the convolution does
            not cross.
        history: ``[B, channels, conv_size - 1]``, what the convolution saw before; not with cu_seqlens.
    """
    p, before = _plan(mixer), 0
    if history is not None and history.shape[2]:  # as more tokens in front, whose results are left out
        before = history.shape[2]
        y = torch.cat([F.pad(history.mT.to(y.dtype), (0, y.shape[2] - p.channels)), y], 1)
        mask = None if mask is None else F.pad(mask, (0, 0, before, 0), value=True)
    begin = None
    if cu_seqlens is not None and mixer.conv_size > 1:
        begin = torch.arange(y.shape[1], device=y.device) - positions_in_packed(cu_seqlens, y.shape[1])[1]
        begin = begin.int()
    by_token = p.decay == TOKEN
    q, k, v, *more = _operation(
        "|".join(map(str, p)), p.results, y.contiguous(), mixer.conv_weight if mixer.conv_size else None,
        mixer.get_parameter("ridge_head") if p.ridge else None,
        mixer.A_log if by_token else None, mixer.dt_bias if by_token else None,
        None if mask is None else mask.contiguous(), begin,
    )  # fmt: skip
    ridge = more[0] if p.ridge else None
    g = more[-1] if p.decay else None
    if g is not None and not by_token:
        g = g.detach()  # constants
    if before:
        q, k, v = (x[:, before:] for x in (q, k, v))
        ridge, g = (None if x is None else x[:, before:] for x in (ridge, g))
    return q, k, v, ridge, g


def project(
    mixer: HigherOrderLinearAttention,
    x: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    history: Tensor | None,
    wants_history: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any], Tensor | None]:
    """q, k, v, the history of the convolution for what follows, the operator's options, and the output gate's logits
    (``[B, T, N]``, of which `gated_norm` reads the first columns), which under sequence parallelism are None: there
    they are computed while summaries travel.

    Args:
        x: ``[B, T, hidden_size]``. mask: ``[B, T, 1]``, false at pads, or None. cu_seqlens: borders of packed
            sequences; with them no history, and none wanted.
        history: of what was before, ``[B, channels, conv_size - 1]``, or None.
    """
    whole, parallel = supports(mixer), mixer.sequence_parallel
    linears: list[nn.Module] = [mixer.qkv_proj]
    linears += [mixer.write_proj] if mixer.write_gate else []
    if whole:
        linears += [mixer.get_submodule("ridge_proj")] if mixer.coefficients.get("ridge") == "token" else []
        linears += [mixer.decay_proj] if mixer.decay == "token" else []
    gates = [mixer.gate_proj] if mixer.gate_proj is not None and parallel is None else []
    gates = gates if mixer.has_own("_gate_logits") else []
    y, *gate = joined(x, [linears, gates] if gates else [linears])
    before, conv = max(0, mixer.conv_size - 1), None
    if mixer.conv_size and (wants_history or parallel is not None):
        last = y[:, max(0, y.shape[1] - before) :, : mixer.channels]
        last = last if mask is None else last * mask[:, mask.shape[1] - last.shape[1] :]
        if parallel is not None:
            history, conv = parallel.convolution_history(last, y.shape[1], before, history)
        else:
            conv = history_after(history, last, before)
    q, k, v, ridge, g = shaped(mixer, y, mask, cu_seqlens, history)
    options: dict[str, Any] = {"g": g}
    if not whole:
        options = {"g": mixer._log_decay(x, mask), **mixer._coefficients(x, k)}
        options |= {} if mixer.p is None else {"p": mixer.p}
    elif mixer.op == "hla_q":
        options["ridge"] = float(mixer.coefficients["ridge"]) if ridge is None else ridge
        options["nodes"] = mixer._nodes(x)
    return q, k, v, conv, options, gate[0] if gate else None
