"""From a layer's projections to what its operator takes, in one launch: convolution, feature map, norm, gates.

Operation by operation these are some forty launches and, for a long prompt, as many trips of q, k and v through
memory. Without gradients; `shape_training` has the same kernel with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.convolution import history_after
from hla.kernels.configs import block
from hla.kernels.launch import INTERPRETED, launch, prefetch, wait

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention

FEATURES = {"identity": 0, "silu": 1, "relu": 2, "elu1": 3}
NORMS = {"none": 0, "l2": 1, "rms": 2}


# Numbers of a tile (one token of several runs of tokens, at most 8 numbers per thread of its one warp); tokens that are
# loaded before they are needed; tokens of a run at most. With fewer programs than PROGRAMS runs are shorter.
TILE = 256, 3, 66
PROGRAMS = 2048
PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)


@triton.jit
def exponential(x):
    """Zero where the result is subnormal: what is exact there takes twice the instructions."""
    if PTX:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.exp(x)
    return y


@triton.jit
def sigmoid(x):
    r = tl.rsqrt(1.0 + exponential(-x))  # (a division takes three times as many instructions)
    return r * r


@triton.jit
def softplus(x):
    """With the digits of small results, too: what ``1 + e`` loses of e is added again."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    return tl.where(x > 20.0, x, tl.log(u) + (e - (u - 1.0)) / u)


@triton.jit
def featured(y, KIND: tl.constexpr):
    """The feature map of y, and its slope."""
    f = y
    slope = tl.full(y.shape, 1.0, tl.float32)
    if KIND == 1:
        s = sigmoid(y)
        f = y * s
        slope = s + f - f * s
    elif KIND == 2:
        f = tl.maximum(y, 0.0)
        slope = tl.where(y > 0, 1.0, 0.0)
    elif KIND == 3:
        slope = tl.where(y > 0, 1.0, tl.exp(tl.minimum(y, 0.0)))
        f = tl.where(y > 0, y + 1.0, slope)
    return f, slope


@triton.jit
def norm_factor(f, eps, NORM: tl.constexpr, DK: tl.constexpr):
    r = tl.full([f.shape[0]], 1.0, tl.float32)
    if NORM == 1:
        r = tl.rsqrt(tl.sum(f * f, 1) + eps)
    elif NORM == 2:
        r = tl.rsqrt(tl.sum(f * f, 1) / DK + eps)
    return r


@triton.jit
def real(MASK, at, live):
    """Which tokens there are, and are no pads."""
    if MASK is not None:
        live = live & (tl.load(MASK + at, mask=live, other=0) != 0)
    return live


@triton.jit
def taps_of(TAPS, channel, in_d, TAPS_N: tl.constexpr):
    """Of each tap its factors ``[1, channels]``, the oldest token's first."""
    taps: tl.tuple = ()
    for i in tl.static_range(TAPS_N):
        taps = taps + (tl.load(TAPS + channel * TAPS_N + i, mask=in_d, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def window_before(Y, MASK, BEGIN, HISTORY, b, start, length, y_r, channel, in_d, SIZE: tl.constexpr):
    """The inputs of SIZE tokens before each run of the same sequence, the oldest first; 0 at pads.

    HISTORY, of the first run: ``[B, channels, SIZE]``; given as its line of each channel.
    """
    window: tl.tuple = ()
    for i in tl.static_range(SIZE):
        t = start - SIZE + i
        reached = (start < length) & (t >= 0)
        if BEGIN is not None:
            reached = reached & (t >= tl.load(BEGIN + start, mask=reached, other=0))
        reached = real(MASK, b * length + t, reached)
        at = Y + (b * length + t)[:, None] * y_r + channel[None, :]
        x = tl.load(at, mask=reached[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        if HISTORY is not None:
            ahead = (t < 0)[:, None] & in_d[None, :]
            x += tl.load(HISTORY[None, :] + (t + SIZE)[:, None], mask=ahead, other=0.0).to(tl.float32)
        window = window + (x,)
    return window


@triton.jit
def inside_sequence(BEGIN, window, t, live, SIZE: tl.constexpr):
    """A window without what is before the sequence, where that of t begins with t."""
    goes_on = (tl.load(BEGIN + t, mask=live, other=0) != t)[:, None]
    kept: tl.tuple = ()
    for i in tl.static_range(SIZE):
        kept = kept + (tl.where(goes_on, window[i], 0.0),)
    return kept


@triton.jit
def convolved(window, x, taps, TAPS_N: tl.constexpr):
    """What the convolution gives, and the next window. (Without convolution x, and the window.)"""
    y = x
    after = window
    if TAPS_N > 0:
        everything = window + (x,)
        y = x * taps[TAPS_N - 1]
        for i in tl.static_range(TAPS_N - 1):
            y += window[i] * taps[i]
        after = everything[1:]
    return y, after


@triton.jit
def loaded_token(line, logits, MASK, at, i, left, in_d, gated):
    """The inputs of the i-th token of each run, at ``line``, 0 at pads, the write gate's logits, and where to load."""
    live = i < left
    logit = tl.zeros([at.shape[0]], tl.float32)
    if logits is not None:
        logit = tl.load(logits, mask=live & gated, other=0.0)
    if MASK is not None:
        live = real(MASK, at + i, live)
    inside = live[:, None] & in_d[None, :]
    return tl.load(line, mask=inside, other=0.0), logit, inside


@triton.jit
def _walk(
    Y, MASK, BEGIN, HISTORY, TAPS, WRITE, OUT, b, start, length, run, y_r, write_r, eps, channel, h, in_d, gated, own,
    row, DK: tl.constexpr, AHEAD: tl.constexpr, TAPS_N: tl.constexpr, MOVE: tl.constexpr, FEATURE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Runs of tokens, one after the other, of one head: its columns ``own`` of OUT, whose rows are ``row`` apart."""
    before: tl.constexpr = max(TAPS_N - 1, 0)
    at = b * length + start
    left = tl.minimum(length - start, run)
    line = Y + at[:, None] * y_r + channel[None, :]
    out = OUT + at[:, None] * row + own[None, :]
    logits = WRITE
    if WRITE is not None:
        logits = WRITE + at * write_r + h
    window = window_before(Y, MASK, BEGIN, HISTORY, b, start, length, y_r, channel, in_d, before)
    loaded: tl.tuple = ()
    for u in tl.static_range(AHEAD):
        later_x, later_logit, inside = loaded_token(line, logits, MASK, at, u, left, in_d, gated)
        loaded = loaded + ((later_x, later_logit),)
        line += y_r
        if WRITE is not None:
            logits += write_r
    taps = taps_of(TAPS, channel, in_d, TAPS_N)
    for first in range(0, run, AHEAD):
        for u in tl.static_range(AHEAD):
            i = first + u
            x, logit = loaded[u]
            if AHEAD > 1:  # (else there is one token)
                later_x, later_logit, inside = loaded_token(line, logits, MASK, at, i + AHEAD, left, in_d, gated)
                loaded = loaded[:u] + ((later_x, later_logit),) + loaded[u + 1 :]
                line += y_r
                if WRITE is not None:
                    logits += write_r
            live = i < left
            if BEGIN is not None:
                window = inside_sequence(BEGIN, window, start + i, live, before)
            y, window = convolved(window, x.to(tl.float32), taps, TAPS_N)
            f, _ = featured(y, FEATURE)
            if FEATURE == 3:
                f = tl.where(in_d[None, :], f, 0.0)
            factor = norm_factor(f, eps, NORM, DK)
            if WRITE is not None:
                factor *= tl.where(gated, tl.rsqrt(1.0 + exponential(-logit.to(tl.float32))), 1.0)
            if MASK is not None:
                factor = tl.where(real(MASK, at + i, live), factor, 0.0)
            tl.store(out, (f * factor[:, None]).to(OUT.dtype.element_ty), mask=live[:, None] & in_d[None, :])
            out += row
    if MOVE:
        tl.debug_barrier()  # whoever holds the same element must have read it
        for column in tl.static_range(before):
            tl.store(HISTORY[None, :] + column, window[column], mask=in_d[None, :])


@triton.jit(do_not_specialize=["length", "blocks", "run"])
def _shape(
    Y, MASK, BEGIN, HISTORY, TAPS, WRITE, DECAY, A_LOG, DT_BIAS, RIDGE_LOGIT, RIDGE_HEAD, NODE_LOGITS, Q, K, V, G,
    RIDGE, NODES, length, blocks, run, y_r, write_r, decay_r, ridge_r, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, RUNS: tl.constexpr,
    AHEAD: tl.constexpr, TAPS_N: tl.constexpr, MOVE: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr,
    FIXED: tl.constexpr, ORDER: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row, RUNS runs of ``run`` tokens, and head of q, k and v. BEGIN: of each token the first one of
    its sequence. MOVE: one token, by which HISTORY moves on in place. PDL: one token, and HISTORY is not from the
    previous launch."""
    heads: tl.constexpr = HQ + 2 * HKV
    channels: tl.constexpr = (HQ + HKV) * DK + HKV * DV
    j = tl.program_id(0) % heads
    b = tl.cast(tl.program_id(0) // (heads * blocks), tl.int64)
    first = (tl.program_id(0) // heads) % blocks * (RUNS * run)
    start = first + tl.arange(0, RUNS) * run
    gated = tl.zeros([RUNS], tl.int32) + j >= HQ
    is_q = j < HQ
    is_v = j >= HQ + HKV
    h = tl.where(is_q, j, tl.where(is_v, j - HQ - HKV, j - HQ))  # among its own kind
    d = tl.arange(0, BD)
    channel = tl.where(is_v, (HQ + HKV) * DK + (j - HQ - HKV) * DV, j * DK) + d
    in_d = d < tl.where(is_v, DV, DK)
    if PDL:  # into the cache, as below all is loaded together with what the previous launch writes
        if TAPS_N > 0:
            prefetch(TAPS + channel * TAPS_N, in_d)
        if MOVE:
            prefetch(HISTORY + (b * channels + channel) * (TAPS_N - 1), in_d)
    wait(PDL)
    history = HISTORY
    if HISTORY is not None:
        history = HISTORY + (b * channels + channel) * (TAPS_N - 1)
    if is_v:
        _walk(
            Y, MASK, BEGIN, history, TAPS, WRITE, V, b, start, length, run, y_r, write_r, eps, channel, h, in_d,
            gated, h * DV + d, HKV * DV, DK, AHEAD, TAPS_N, MOVE, 0, 0,
        )  # fmt: skip
    else:
        out, row = K, HKV * DK
        if is_q:
            out, row = Q, HQ * DK
        _walk(
            Y, MASK, BEGIN, history, TAPS, WRITE, out, b, start, length, run, y_r, write_r, eps, channel, h, in_d,
            gated, h * DK + d, row, DK, AHEAD, TAPS_N, MOVE, FEATURE, NORM,
        )  # fmt: skip

    for ahead in range(0, RUNS * run, BT):
        t = first + ahead + tl.arange(0, BT)
        live = (t < length) & (ahead + tl.arange(0, BT) < RUNS * run)
        at = b * length + t
        if is_q:
            if RIDGE is not None:
                logarithm = tl.zeros([BT], tl.float32) + tl.load(RIDGE_HEAD + h).to(tl.float32)
                if RIDGE_LOGIT is not None:
                    logarithm += tl.load(RIDGE_LOGIT + at * ridge_r + h, mask=live, other=0.0).to(tl.float32)
                tl.store(RIDGE + at * HQ + h, tl.exp(tl.minimum(tl.maximum(logarithm, -12.0), 12.0)), mask=live)
        elif not is_v:
            if G is not None:
                if FIXED:
                    g = tl.zeros([BT], tl.float32) + tl.log(1.0 - tl.exp2(-5.0 - h))
                else:
                    logit = tl.load(DECAY + at * decay_r + h, mask=live, other=0.0).to(tl.float32)
                    logit += tl.load(DT_BIAS + h).to(tl.float32)
                    g = -tl.exp(tl.load(A_LOG + h).to(tl.float32)) * softplus(logit)
                tl.store(G + at * HKV + h, tl.where(real(MASK, at, live), g, 0.0), mask=live)
    if NODES is not None:
        if tl.program_id(0) < HQ:  # they are the same for all tokens
            n = tl.arange(0, BN)
            logits = tl.load(NODE_LOGITS + h * (ORDER + 1) + n, mask=n <= ORDER, other=0.0).to(tl.float32)
            tl.store(NODES + h * (ORDER + 1) + n, sigmoid(logits), mask=n <= ORDER)


def runs_of(rows: int, tokens: int, heads: int, size: int, tile: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Runs of a program, tokens of a run, programs along a row, and tokens loaded ahead, which divide a run."""
    if tokens <= 1:
        return 1, 1, 1, 1
    numbers, ahead, longest = tile
    runs = max(1, numbers // size)
    longest = max(ahead, min(longest, rows * tokens * heads // (runs * PROGRAMS)) // ahead * ahead)
    blocks = -(-tokens // (runs * longest))
    return runs, -(-tokens // (runs * blocks * ahead)) * ahead, blocks, ahead


class Shaped(NamedTuple):
    """q ``[B, T, HQ, K]``, k, v, and the operator's options: g ``[B, T, HKV]`` or None; of hla_q
    order, ridge (a number or ``[B, T, HQ]``) and nodes (``[HQ, order + 1]`` or None). Tensors are float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


def supports(mixer: HigherOrderLinearAttention) -> bool:
    """Whether `shape` does what this layer does between its projections and its operator."""
    return (
        mixer.op in ("hla_q", "linear_attn") and mixer.rope_theta is None and mixer.nodes != "token"
        and not mixer.normalize and mixer.backend != "torch"
        and mixer.has_own("_project", "_coefficients", "_positive_ridge", "_nodes", "_log_decay")
    )  # fmt: skip


def shape(
    mixer: HigherOrderLinearAttention,
    qkv: Tensor,
    *,
    write: Tensor | None,
    decay: Tensor | None,
    ridge: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None,
    move: bool = False,
    pdl: bool = False,
) -> Shaped:
    """What `HigherOrderLinearAttention` computes from its projections, for layers that it `supports`.

    Args:
        qkv: ``[B, T, channels]``. write, decay: ``[B, T, HKV]``, ridge: ``[B, T, HQ]``, logits, or None. The last
            dimension of each must be contiguous, and its rows equally far apart.
        mask: ``[B, T]``, 0 at pads, or None.
        history: of the convolution, ``[B, channels, conv_size - 1]``, float32. move: T is 1, and history is to be that
            of the next token. pdl: overlap with the previous launch, which writes none of history and parameters.
    """
    B, T = qkv.shape[:2]
    heads, kv, K, V = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim
    new = lambda *size, dtype=torch.float32: torch.empty(*size, dtype=dtype, device=qkv.device)  # noqa: E731
    q, k, v = (new(B, T, *size, dtype=qkv.dtype) for size in ((heads, K), (kv, K), (kv, V)))
    g = None if mixer.decay == "none" else new(B, T, kv)
    ridges = new(B, T, heads) if mixer.coefficients.get("ridge") in ("head", "token") else None
    nodes = new(heads, mixer.order + 1) if mixer.nodes == "head" else None
    by_token = mixer.decay == "token"
    size = block(max(K, V))
    runs, run, blocks, ahead = runs_of(B, T, heads + 2 * kv, size, TILE)
    if mixer.conv_size < 2:
        history = None
    row = lambda x: 0 if x is None else x.stride(1) if T > 1 else x.stride(0)  # noqa: E731
    launch(
        _shape, B * blocks * (heads + 2 * kv),
        qkv, None if mask is None else mask.contiguous(), None,
        history if history is None or move else history.contiguous(),
        mixer.conv_weight if mixer.conv_size else None, write, decay,
        mixer.A_log if by_token else None, mixer.dt_bias if by_token else None, ridge,
        None if ridges is None else mixer.ridge_head, None if nodes is None else mixer.node_logits,
        q, k, v, g, ridges, nodes, T, blocks, run, row(qkv), row(write), row(decay), row(ridge), float(mixer.norm_eps),
        HQ=heads, HKV=kv, DK=K, DV=V, BD=size, RUNS=runs, AHEAD=ahead,
        TAPS_N=mixer.conv_size, MOVE=move and mixer.conv_size > 1,
        FEATURE=FEATURES[mixer.feature_map], NORM=NORMS[mixer.qk_norm], FIXED=mixer.decay == "fixed",
        ORDER=mixer.order, BN=block(mixer.order + 1), BT=32 if T > 1 else 1,
        warps=1 if T > 1 or size <= 64 else 2, pdl=pdl,
    )  # fmt: skip
    options: dict[str, Any] = {"g": g}
    if mixer.op == "hla_q":
        constant = mixer.coefficients["ridge"]
        options |= {"order": mixer.order, "ridge": float(constant) if ridges is None else ridges, "nodes": nodes}
    return Shaped(q, k, v, options)


def project(
    mixer: HigherOrderLinearAttention, x: Tensor, mask: Tensor | None, history: Tensor | None, wants_history: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """q, k, v, the history of the convolution for what follows, and the operator's options, of a layer it `supports`.

    Args:
        x: ``[B, T, hidden_size]``. mask: ``[B, T, 1]``, false at pads, or None.
        history: of what was before, ``[B, channels, conv_size - 1]``, or None.
    """
    qkv = mixer.qkv_proj(x)
    ridge = mixer.coefficients.get("ridge")
    shaped = shape(
        mixer, qkv, mask=mask, history=history,
        write=mixer.write_proj(x) if mixer.write_gate else None,
        decay=mixer.decay_proj(x) if mixer.decay == "token" else None,
        ridge=mixer.get_submodule("ridge_proj")(x) if ridge == "token" else None,
    )  # fmt: skip
    if not (wants_history and mixer.conv_size):
        return *shaped[:3], None, shaped.options
    before = mixer.conv_size - 1
    last = qkv[:, max(0, qkv.shape[1] - before) :]
    if mask is not None:
        last = last * mask[:, mask.shape[1] - last.shape[1] :]
    return *shaped[:3], history_after(history, last, before), shaped.options
