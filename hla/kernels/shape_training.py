"""What training spends between a layer's projections and its operator, and behind it, in few passes through memory.

`shaped`: short convolution, feature map, norm and write gate of q, k and v; the forward pass is the kernel of prompts
(`shape`). `gated_norm`: RMS norm of each head's output, times the output gate. Operation by operation these are about
300 trips of a tensor ``[B, T, hidden_size]`` through memory, forward and backward; here they are 29. Sums over tokens
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
from hla.kernels.shape import FEATURES, NORMS, _shape, sigmoid

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention, RMSNorm

NUMBERS = 2048  # of a tile
STEPS = 16  # tiles a program goes through, and adds up for the gradients of weights
GRADIENT = 512, 1  # numbers of a tile of `_shape_gradient`, and warps: sums over tokens stay inside one warp


@triton.jit(do_not_specialize=["length", "blocks", "steps"])
def _shape_gradient(
    Y, MASK, BEGIN, TAPS, WRITE, DOUT, DY, DTAPS, DWRITE, length, blocks, steps, y_r, write_r, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    TAPS_N: tl.constexpr, BTAPS: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The gradient of what the convolution gave to DY, its products with what the taps read to DTAPS
    ``[B * blocks, channels, TAPS_N]``, and that of the write gate's logits to DWRITE ``[2 (k, v), B, T, HKV]``.

    One program per row, ``steps`` times BT tokens, and head of q, k and v.
    """
    heads: tl.constexpr = HQ + 2 * HKV
    channels: tl.constexpr = (HQ + HKV) * DK + HKV * DV
    j = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    b = tl.cast(part // blocks, tl.int64)
    is_q = j < HQ
    is_v = j >= HQ + HKV
    h = tl.where(is_v, j - HQ - HKV, j - HQ)
    d = tl.arange(0, BD)
    channel = tl.where(is_v, (HQ + HKV) * DK + (j - HQ - HKV) * DV, j * DK) + d
    in_d = d < tl.where(is_v, DV, DK)
    which = tl.arange(0, BTAPS)
    dtaps = tl.zeros([BTAPS, BD], tl.float32)
    for step in range(0, steps):
        t = ((part % blocks) * steps + step) * BT + tl.arange(0, BT)
        live = t < length
        inside = live[:, None] & in_d[None, :]
        at = b * length + t
        keep = tl.where(live, 1.0, 0.0)
        if MASK is not None:
            keep = tl.where(tl.load(MASK + at, mask=live, other=0) != 0, 1.0, 0.0)
        y = tl.zeros([BT, BD], tl.float32)
        if TAPS_N == 0:
            y = tl.load(Y + at[:, None] * y_r + channel[None, :], mask=inside, other=0.0).to(tl.float32) * keep[:, None]
        for i in tl.static_range(TAPS_N):
            x = _earlier(Y, MASK, BEGIN, b, t, TAPS_N - 1 - i, length, y_r, channel, live, in_d)
            y += x * tl.load(TAPS + channel * TAPS_N + i, mask=in_d, other=0.0).to(tl.float32)[None, :]
        dout = tl.load(DOUT + at[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        dout *= keep[:, None]
        f = y
        slope = tl.full([BT, BD], 1.0, tl.float32)
        r = tl.full([BT], 1.0, tl.float32)
        if not is_v:
            if FEATURE == 1:
                s = sigmoid(y)
                f = y * s
                slope = s * (1.0 + y * (1.0 - s))
            elif FEATURE == 2:
                f = tl.maximum(y, 0.0)
                slope = tl.where(y > 0, 1.0, 0.0)
            elif FEATURE == 3:
                slope = tl.where(y > 0, 1.0, tl.exp(tl.minimum(y, 0.0)))
                f = tl.where(y > 0, y + 1.0, slope)
            f = tl.where(inside, f, 0.0)
            if NORM == 1:
                r = tl.rsqrt(tl.sum(f * f, 1) + eps)
            elif NORM == 2:
                r = tl.rsqrt(tl.sum(f * f, 1) / DK + eps)
        f *= r[:, None]
        if not is_q:
            if WRITE is not None:
                logit = tl.load(WRITE + at * write_r + h, mask=live, other=0.0).to(tl.float32)
                share = tl.sqrt(sigmoid(logit))
                half = 0.5 * share * sigmoid(-logit)  # its slope
                place = DWRITE + (tl.where(is_v, length * (tl.num_programs(0) // (heads * blocks)), 0) + at) * HKV + h
                tl.store(place, tl.sum(dout * f, 1) * half, mask=live)
                dout *= share[:, None]
        if not is_v:
            if NORM == 1:
                dout = r[:, None] * (dout - f * tl.sum(dout * f, 1)[:, None])
            elif NORM == 2:
                dout = r[:, None] * (dout - f * (tl.sum(dout * f, 1) / DK)[:, None])
        dy = dout * slope
        if TAPS_N == 0:
            dy *= keep[:, None]
        tl.store(DY + at[:, None] * channels + channel[None, :], dy.to(DY.dtype.element_ty), mask=inside)
        for i in tl.static_range(TAPS_N):
            x = _earlier(Y, MASK, BEGIN, b, t, TAPS_N - 1 - i, length, y_r, channel, live, in_d)
            dtaps += tl.where((which == i)[:, None], tl.sum(dy * x, 0)[None, :], 0.0)
    if TAPS_N > 0:
        place = DTAPS + (tl.cast(part, tl.int64) * channels + channel[None, :]) * TAPS_N + which[:, None]
        tl.store(place, dtaps, mask=(which < TAPS_N)[:, None] & in_d[None, :])


@triton.jit
def _earlier(Y, MASK, BEGIN, b, t, shift: tl.constexpr, length, y_r, channel, live, in_d):
    """The inputs ``shift`` tokens before t in float32, 0 at pads and before the sequence."""
    before = t - shift
    reached = live & (before >= 0)
    if BEGIN is not None:
        reached = reached & (before >= tl.load(BEGIN + t, mask=live, other=0))
    if MASK is not None:
        reached = reached & (tl.load(MASK + b * length + before, mask=reached, other=0) != 0)
    p = Y + (b * length + before)[:, None] * y_r + channel[None, :]
    return tl.load(p, mask=reached[:, None] & in_d[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "blocks"])
def _correlate(
    DY, MASK, BEGIN, TAPS, DX, length, blocks,
    CHANNELS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, TAPS_N: tl.constexpr,
):  # fmt: skip
    """``dx_t = sum_s taps[TAPS_N - 1 - s] dy_{t+s}`` inside a sequence, 0 at pads: the adjoint of the convolution."""
    columns: tl.constexpr = (CHANNELS + BD - 1) // BD
    channel = tl.program_id(0) % columns * BD + tl.arange(0, BD)
    part = tl.program_id(0) // columns
    b = tl.cast(part // blocks, tl.int64)
    t = part % blocks * BT + tl.arange(0, BT)
    in_d = channel < CHANNELS
    live = t < length
    keep = live
    if MASK is not None:
        keep = keep & (tl.load(MASK + b * length + t, mask=live, other=0) != 0)
    dx = tl.zeros([BT, BD], tl.float32)
    for s in tl.static_range(TAPS_N):
        reached = keep & (t + s < length)
        if BEGIN is not None:
            reached = reached & (tl.load(BEGIN + t + s, mask=reached, other=0) <= t)
        p = DY + (b * length + t + s)[:, None] * CHANNELS + channel[None, :]
        dy = tl.load(p, mask=reached[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        dx += dy * tl.load(TAPS + channel * TAPS_N + TAPS_N - 1 - s, mask=in_d, other=0.0).to(tl.float32)[None, :]
    p = DX + (b * length + t)[:, None] * CHANNELS + channel[None, :]
    tl.store(p, dx.to(DX.dtype.element_ty), mask=live[:, None] & in_d[None, :])


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
    size = block(max(c["DK"], c["DV"]))
    tokens = max(1, NUMBERS // size)
    blocks = -(-T // tokens)
    if x.numel():
        launch(
            _shape, B * blocks * (c["HQ"] + 2 * c["HKV"]),
            x, mask, begin, None, taps, write, None, None, None, None, None, None, out, None, None, None,
            T, blocks, channels, c["HKV"], 0, 0, eps,  # (not the strides: those of a dimension of size 1 say nothing)
            HQ=c["HQ"], HKV=c["HKV"], DK=c["DK"], DV=c["DV"], BD=size, BT=tokens,
            TAPS_N=0 if taps is None else taps.shape[1], MOVE=False, FEATURE=c["FEATURE"], NORM=c["NORM"], FIXED=False,
            ORDER=0, BN=16, warps=4,
        )  # fmt: skip
    return [out], []


def _fake(plan: str, x, taps, write, mask, begin) -> tuple[list[Tensor], list[Tensor]]:
    return [x.new_empty(x.shape)], []


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    x, taps, write, mask, begin = tensors
    (B, T, channels), (c, eps) = x.shape, _decode(plan)
    n = 0 if taps is None else taps.shape[1]
    dout = grads[0].contiguous()
    size, (numbers, warps) = block(max(c["DK"], c["DV"])), GRADIENT
    tokens = max(1, numbers // size)
    steps = max(1, min(STEPS, -(-T // tokens)))
    blocks = -(-T // (tokens * steps))
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=x.device)  # noqa: E731
    dy = new(B, T, channels, dtype=x.dtype)
    dtaps = new(B * blocks, channels, n) if n else None
    dwrite = None if write is None else new(2, B, T, c["HKV"])
    dx = dy
    if x.numel():
        launch(
            _shape_gradient, B * blocks * (c["HQ"] + 2 * c["HKV"]),
            x, mask, begin, taps, write, dout, dy, dtaps, dwrite, T, blocks, steps, channels, c["HKV"], eps,
            HQ=c["HQ"], HKV=c["HKV"], DK=c["DK"], DV=c["DV"], BD=size, BT=tokens, TAPS_N=n,
            BTAPS=triton.next_power_of_2(max(1, n)), FEATURE=c["FEATURE"], NORM=c["NORM"], warps=warps,
        )  # fmt: skip
        if n:
            dx = new(B, T, channels, dtype=x.dtype)
            tokens = max(1, NUMBERS // size)
            blocks = -(-T // tokens)
            launch(
                _correlate, B * blocks * -(-channels // size), dy, mask, begin, taps, dx, T, blocks,
                CHANNELS=channels, BD=size, BT=tokens, TAPS_N=n, warps=4,
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
