"""What training spends between a layer's projections and its operator, and behind it, in few passes through memory.

`shaped`: short convolution, feature map, norm and write gate of q, k and v; the forward pass is the kernel of prompts
(`shape`). `gated_norm`: RMS norm of each head's output, times the output gate. Operation by operation these are about
300 trips of a tensor ``[B, T, hidden_size]`` through memory, forward and backward; here they are 23. Sums over tokens
(for weights) are added up in a fixed order. `silu_product` is what the MLP has between its projections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from hla.convolution import positions_in_packed
from hla.kernels.configs import block
from hla.kernels.launch import launch
from hla.kernels.library import Operation
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
    taps_of,
    window_before,
)

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention
    from hla.norm import RMSNorm

NUMBERS = 2048  # of a tile
STEPS = 16  # tiles a program goes through, and adds up for the gradients of weights
GRADIENT = 128, 3, 66  # of `_shape_gradient`, as `TILE` of `shape`


@triton.jit
def _gradient_walk(
    Y, MASK, BEGIN, TAPS, WRITE, DOUT, DX, DTAPS, DWRITE, b, start, length, run, eps, channel, h, in_d, gated,
    HKV: tl.constexpr, CHANNELS: tl.constexpr, DK: tl.constexpr, AHEAD: tl.constexpr, TAPS_N: tl.constexpr,
    FEATURE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Runs of tokens of one head, one after the other, and the tokens behind each run that its last ones reach.

    DTAPS: a line of each channel, DWRITE: ``[B, T, HKV]``. What the input of a token gets is complete TAPS_N - 1 tokens
    later; ``pending`` has what it has got until then.
    """
    before: tl.constexpr = max(TAPS_N - 1, 0)
    behind: tl.constexpr = (before + AHEAD - 1) // AHEAD * AHEAD  # tokens behind a run, in whole steps
    at = b * length + start
    left = tl.minimum(length - start, run + before)
    own = tl.minimum(length - start, run)
    here = at[:, None] * CHANNELS + channel[None, :]
    line, dline, out = Y + here, DOUT + here, DX + here - before * CHANNELS
    logits = WRITE
    dlogits = DWRITE
    if WRITE is not None:
        logits = WRITE + at * HKV + h
        dlogits = DWRITE + at * HKV + h
    window = window_before(Y, MASK, BEGIN, None, b, start, length, CHANNELS, channel, in_d, before)
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
        line += CHANNELS
        dline += CHANNELS
        if WRITE is not None:
            logits += HKV
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
                tl.store(dlogits, dot * r * (0.5 * e * share * share * share), mask=(i < own) & gated)
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
            live = (i - before < own) & (start + i - before >= start)
            if MASK is not None:
                dx = tl.where(real(MASK, at + i - before, live)[:, None], dx, 0.0)
            tl.store(out, dx.to(DX.dtype.element_ty), mask=live[:, None] & in_d[None, :])
            line += CHANNELS
            dline += CHANNELS
            out += CHANNELS
            if WRITE is not None:
                logits += HKV
                dlogits += HKV
    if TAPS_N == 1:
        _store_sums(DTAPS, dtaps, in_d, TAPS_N)


@triton.jit
def _store_sums(DTAPS, dtaps, in_d, TAPS_N: tl.constexpr):
    for i in tl.static_range(TAPS_N):
        tl.store(DTAPS + i, tl.sum(dtaps[i], 0), mask=in_d)


@triton.jit(do_not_specialize=["length", "blocks", "run"])
def _shape_gradient(
    Y, MASK, BEGIN, TAPS, WRITE, DOUT, DX, DTAPS, DWRITE, length, blocks, run, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, RUNS: tl.constexpr,
    AHEAD: tl.constexpr, TAPS_N: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of the inputs to DX, of the taps to DTAPS ``[B * blocks, channels, TAPS_N]``, to be added up, and of
    the write gate's logits to DWRITE ``[2 (k, v), B, T, HKV]``, likewise.

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
        _gradient_walk(
            Y, MASK, BEGIN, TAPS, WRITE, DOUT, DX, sums, dwrite, b, start, length, run, eps, channel,
            j - HQ - HKV, in_d, gated, HKV, channels, DK, AHEAD, TAPS_N, 0, 0,
        )  # fmt: skip
    else:
        _gradient_walk(
            Y, MASK, BEGIN, TAPS, WRITE, DOUT, DX, sums, DWRITE, b, start, length, run, eps, channel,
            j - HQ, in_d, gated, HKV, channels, DK, AHEAD, TAPS_N, FEATURE, NORM,
        )  # fmt: skip


def _plan(mixer: HigherOrderLinearAttention) -> str:
    words = (
        mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim, FEATURES[mixer.feature_map],
        NORMS[mixer.qk_norm], float(mixer.norm_eps),
    )  # fmt: skip
    return "|".join(map(str, words))


def _decode(plan: str) -> tuple[dict[str, int], float]:
    *numbers, eps = plan.split("|")
    names = ("HQ", "HKV", "DK", "DV", "FEATURE", "NORM")
    return dict(zip(names, map(int, numbers), strict=True)), float(eps)


def _forward(plan: str, x, taps, write, mask, begin, *, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
    (B, T, channels), (c, eps) = x.shape, _decode(plan)
    out = x.new_empty(B, T, channels)
    if x.numel():
        heads, size = c["HQ"] + 2 * c["HKV"], block(max(c["DK"], c["DV"]))
        runs, run, blocks, ahead = runs_of(B, T, heads, size, TILE)
        launch(
            _shape, B * blocks * heads,
            x, mask, begin, None, taps, write, None, None, None, None, None, None, out, None, None, None,
            # (no strides of tensors: that of a dimension of size 1 says nothing)
            T, blocks, run, channels, c["HKV"], 0, 0, eps,
            HQ=c["HQ"], HKV=c["HKV"], DK=c["DK"], DV=c["DV"], BD=size, RUNS=runs, AHEAD=ahead,
            TAPS_N=0 if taps is None else taps.shape[1], MOVE=False, FEATURE=c["FEATURE"],
            NORM=c["NORM"], FIXED=False, ORDER=0, BN=16, BT=32, warps=1,
        )  # fmt: skip
    return [out], []


def _fake(plan: str, x, taps, write, mask, begin) -> tuple[list[Tensor], list[Tensor]]:
    return [x.new_empty(x.shape)], []


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    x, taps, write, mask, begin = tensors
    (B, T, channels), (c, eps) = x.shape, _decode(plan)
    n = 0 if taps is None else taps.shape[1]
    dout = grads[0].contiguous()
    heads, size = c["HQ"] + 2 * c["HKV"], block(max(c["DK"], c["DV"]))
    runs, run, blocks, ahead = runs_of(B, T, heads, size, GRADIENT)
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=x.device)  # noqa: E731
    dx = new(B, T, channels, dtype=x.dtype)
    dtaps = new(B * blocks, channels, n) if n else None
    dwrite = None if write is None else new(2, B, T, c["HKV"])
    if x.numel():
        launch(
            _shape_gradient, B * blocks * heads,
            x, mask, begin, taps, write, dout, dx, dtaps, dwrite, T, blocks, run, eps,
            HQ=c["HQ"], HKV=c["HKV"], DK=c["DK"], DV=c["DV"], BD=size, RUNS=runs, AHEAD=ahead,
            TAPS_N=n, FEATURE=c["FEATURE"], NORM=c["NORM"], warps=1,
        )  # fmt: skip
    found = [
        dx,
        None if dtaps is None else dtaps.sum(0).to(taps.dtype),
        None if dwrite is None else dwrite.sum(0).to(write.dtype),
        None,
        None,
    ]
    return [y if need else None for y, need in zip(found, needed, strict=True)]


_operation = Operation("shape", _forward, _fake, _backward, lambda plan: 1)


def shaped(
    mixer: HigherOrderLinearAttention,
    qkv: Tensor,
    write: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[B, T, HQ, K]``, k and v of a layer without rope and own inner query, parts of one tensor, differentiable.

    Args:
        qkv: ``[B, T, channels]``. write: logits of the write gate ``[B, T, HKV]``, or None. mask: ``[B, T, 1]``, false
            at pads, or None. cu_seqlens: borders of packed sequences, which the convolution does not cross.
        history: ``[B, channels, conv_size - 1]``, what the convolution saw before; not with cu_seqlens.
    """
    before = 0
    if history is not None and history.shape[2]:  # as more tokens in front, whose results are left out
        before = history.shape[2]
        qkv = torch.cat([history.mT.to(qkv.dtype), qkv], 1)
        write = None if write is None else F.pad(write, (0, 0, before, 0))
        mask = None if mask is None else F.pad(mask, (0, 0, before, 0), value=True)
    begin = None
    if cu_seqlens is not None and mixer.conv_size > 1:
        begin = torch.arange(qkv.shape[1], device=qkv.device) - positions_in_packed(cu_seqlens, qkv.shape[1])[1]
        begin = begin.int()
    (out,) = _operation(
        _plan(mixer), 1, qkv.contiguous(), mixer.conv_weight if mixer.conv_size else None,
        None if write is None else write.contiguous(), None if mask is None else mask.contiguous(), begin,
    )  # fmt: skip
    q, k, v = out[:, before:].split(mixer.split_sizes, -1)
    dims = mixer.head_dim, mixer.head_dim, mixer.head_v_dim
    q, k, v = (part.unflatten(-1, (-1, dim)) for part, dim in zip((q, k, v), dims, strict=True))
    return q, k, v


@triton.jit(do_not_specialize=["rows", "steps"])
def _gated_norm(
    X, GATE, WEIGHT, OUT, DOUT, DO, DGATE, DWEIGHT, rows, steps, eps,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``rms_norm(o) weight silu(gate)`` of rows of D numbers to OUT, or with DOUT its gradients; DWEIGHT
    ``[programs, D]``."""
    d = tl.arange(0, BD)
    in_d = d < D
    weight = tl.load(WEIGHT + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BD], tl.float32)
    for step in range(0, steps):
        row = tl.cast(tl.program_id(0), tl.int64) * (steps * BT) + step * BT + tl.arange(0, BT)
        inside = (row < rows)[:, None] & in_d[None, :]
        at = row[:, None] * D + d[None, :]
        n = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
        n *= r
        gate = tl.full([BT, BD], 1.0, tl.float32)
        if GATE is not None:
            z = tl.load(GATE + at, mask=inside, other=0.0).to(tl.float32)
            s = sigmoid(z)
            gate = z * s
        if DOUT is None:
            tl.store(OUT + at, (n * weight * gate).to(OUT.dtype.element_ty), mask=inside)
        else:
            dout = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)
            if GATE is not None:
                dz = dout * n * weight * (s * (1.0 + z * (1.0 - s)))
                tl.store(DGATE + at, dz.to(DGATE.dtype.element_ty), mask=inside)
            dout *= gate
            dweight += tl.sum(dout * n, 0)
            dout *= weight
            do = r * (dout - n * (tl.sum(dout * n, 1) / D)[:, None])
            tl.store(DO + at, do.to(DO.dtype.element_ty), mask=inside)
    if DOUT is not None:
        tl.store(DWEIGHT + tl.program_id(0) * D + d, dweight, mask=in_d)


def _run_gated_norm(plan: str, o: Tensor, gate: Tensor | None, weight: Tensor, dout: Tensor | None) -> list[Any]:
    """[output], or with its gradient [those of o, gate, weight]."""
    D, size = o.shape[-1], block(o.shape[-1])
    rows, tokens = o.numel() // D, max(1, NUMBERS // size)
    steps = 1 if dout is None else max(1, min(STEPS, rows // tokens // 256))
    programs = -(-rows // (tokens * steps))
    results: list[Any] = [torch.empty_like(o)]
    if dout is not None:
        results += [None if gate is None else torch.empty_like(gate), o.new_empty(programs, D, dtype=torch.float32)]
    if rows:
        pointers = (results[0], None, None, None, None) if dout is None else (None, dout, *results)
        launch(
            _gated_norm, programs, o, gate, weight, *pointers, rows, steps, float(plan),
            D=D, BD=size, BT=tokens, warps=4,
        )  # fmt: skip
    return results


def _norm_backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    o, gate, weight = tensors
    do, dgate, dweight = _run_gated_norm(plan, o, gate, weight, grads[0].contiguous())
    found = [do, dgate, dweight.sum(0).to(weight.dtype)]
    return [y if need else None for y, need in zip(found, needed, strict=True)]


_norm_operation = Operation(
    "gated_norm",
    lambda plan, o, gate, weight, *, keep: (_run_gated_norm(plan, o, gate, weight, None), []),
    lambda plan, o, gate, weight: ([o.new_empty(o.shape)], []),
    _norm_backward,
    lambda plan: 1,
)


def gated_norm(norm: RMSNorm, o: Tensor, gate: Tensor | None) -> Tensor:
    """``norm(o).flatten(2) * silu(gate)``: o ``[B, T, H, D]``, gate ``[B, T, H D]`` or None, in the dtype of o."""
    (out,) = _norm_operation(
        repr(norm.eps), 1, o.contiguous(), None if gate is None else gate.contiguous(), norm.shared_weight()
    )
    return out.flatten(2)


@triton.jit
def _silu_product(A, B, OUT, DOUT, DA, DB, numbers, N: tl.constexpr):
    """``silu(a) b`` to OUT, or with DOUT its gradients."""
    at = tl.cast(tl.program_id(0), tl.int64) * N + tl.arange(0, N)
    live = at < numbers
    a = tl.load(A + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(B + at, mask=live, other=0.0).to(tl.float32)
    s = sigmoid(a)
    if DOUT is None:
        tl.store(OUT + at, (a * s * b).to(OUT.dtype.element_ty), mask=live)
    else:
        dout = tl.load(DOUT + at, mask=live, other=0.0).to(tl.float32)
        tl.store(DA + at, (dout * b * (s * (1.0 + a * (1.0 - s)))).to(DA.dtype.element_ty), mask=live)
        tl.store(DB + at, (dout * a * s).to(DB.dtype.element_ty), mask=live)


def _run_silu_product(a: Tensor, b: Tensor, dout: Tensor | None) -> list[Tensor]:
    results = [torch.empty_like(a)] if dout is None else [torch.empty_like(a), torch.empty_like(b)]
    pointers = (*results, None, None, None) if dout is None else (None, dout, *results)
    launch(_silu_product, -(-a.numel() // NUMBERS), a, b, *pointers, a.numel(), N=NUMBERS, warps=4)
    return results


def _product_backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    a, b = tensors
    found = _run_silu_product(a, b, grads[0].contiguous())
    return [y if need else None for y, need in zip(found, needed, strict=True)]


_product_operation = Operation(
    "silu_product",
    lambda plan, a, b, *, keep: (_run_silu_product(a, b, None), []),
    lambda plan, a, b: ([a.new_empty(a.shape)], []),
    _product_backward,
    lambda plan: 1,
)


def silu_product(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a) * b``, of tensors of one shape and dtype."""
    return _product_operation("", 1, a.contiguous(), b.contiguous())[0]
