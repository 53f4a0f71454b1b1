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
from hla.kernels.launch import launch, prefetch, wait

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention

FEATURES = {"identity": 0, "silu": 1, "relu": 2, "elu1": 3}
NORMS = {"none": 0, "l2": 1, "rms": 2}


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["length", "blocks"])
def _shape(
    Y, MASK, BEGIN, HISTORY, TAPS, WRITE, DECAY, A_LOG, DT_BIAS, RIDGE_LOGIT, RIDGE_HEAD, NODE_LOGITS, QKV, G, RIDGE,
    NODES, length, blocks, y_r, write_r, decay_r, ridge_r, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    TAPS_N: tl.constexpr, MOVE: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr, FIXED: tl.constexpr,
    ORDER: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row, BT tokens, and head of q, k and v. BEGIN: of each token the first one of its sequence.
    MOVE: one token, by which HISTORY moves on in place. PDL: one token, and HISTORY is not from the previous launch."""
    heads: tl.constexpr = HQ + 2 * HKV
    channels: tl.constexpr = (HQ + HKV) * DK + HKV * DV
    j = tl.program_id(0) % heads
    b = tl.cast(tl.program_id(0) // (heads * blocks), tl.int64)
    t = (tl.program_id(0) // heads) % blocks * BT + tl.arange(0, BT)
    is_q = j < HQ
    is_v = j >= HQ + HKV
    h = tl.where(is_q, j, tl.where(is_v, j - HQ - HKV, j - HQ))  # among its own kind
    d = tl.arange(0, BD)
    channel = tl.where(is_v, (HQ + HKV) * DK + (j - HQ - HKV) * DV, j * DK) + d
    live = t < length
    in_d = d < tl.where(is_v, DV, DK)
    inside = live[:, None] & in_d[None, :]
    at = b * length + t
    if PDL:  # into the cache, as below all is loaded together with what the previous launch writes
        if TAPS_N > 0:
            prefetch(TAPS + channel * TAPS_N, in_d)
        if MOVE:
            prefetch(HISTORY + (b * channels + channel) * (TAPS_N - 1), in_d)
    wait(PDL)
    keep = tl.where(live, 1.0, 0.0)
    if MASK is not None:
        keep = tl.where(tl.load(MASK + at, mask=live, other=0) != 0, 1.0, 0.0)
    x = tl.load(Y + at[:, None] * y_r + channel[None, :], mask=inside, other=0.0).to(tl.float32) * keep[:, None]
    if TAPS_N > 0:
        taps = TAPS + channel * TAPS_N
        y = x * tl.load(taps + TAPS_N - 1, mask=in_d, other=0.0).to(tl.float32)[None, :]
        for i in tl.static_range(TAPS_N - 1):
            before = t - (TAPS_N - 1) + i
            reached = live & (before >= 0)
            if BEGIN is not None:
                reached = reached & (before >= tl.load(BEGIN + t, mask=live, other=0))
            here = inside & reached[:, None]
            old = tl.load(Y + (b * length + before)[:, None] * y_r + channel[None, :], mask=here, other=0.0)
            old = old.to(tl.float32)
            if MASK is not None:
                real = tl.load(MASK + b * length + before, mask=reached, other=0) != 0
                old = tl.where(real[:, None], old, 0.0)
            if HISTORY is not None:
                place = HISTORY + (b * channels + channel) * (TAPS_N - 1)
                ahead = inside & (before < 0)[:, None]
                column = (before + TAPS_N - 1)[:, None]
                old += tl.load(place[None, :] + column, mask=ahead, other=0.0).to(tl.float32)
            y += old * tl.load(taps + i, mask=in_d, other=0.0).to(tl.float32)[None, :]
        newest = x
        x = y
    if not is_v:
        if FEATURE == 1:
            x = x * sigmoid(x)
        elif FEATURE == 2:
            x = tl.maximum(x, 0.0)
        elif FEATURE == 3:
            x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
        x = tl.where(inside, x, 0.0)
        if NORM == 1:
            x *= tl.rsqrt(tl.sum(x * x, 1) + eps)[:, None]
        elif NORM == 2:
            x *= tl.rsqrt(tl.sum(x * x, 1) / DK + eps)[:, None]
    x *= keep[:, None]
    if not is_q:
        if WRITE is not None:
            share = tl.sqrt(sigmoid(tl.load(WRITE + at * write_r + h, mask=live, other=0.0).to(tl.float32)))
            x *= share[:, None]
    tl.store(QKV + at[:, None] * channels + channel[None, :], x.to(QKV.dtype.element_ty), mask=inside)
    if MOVE:  # not in the loop above, whose loads would wait for these stores
        tl.debug_barrier()  # whoever holds the same element must have read it
        place = HISTORY + ((b * channels + channel) * (TAPS_N - 1))[None, :] + t[:, None]
        for i in tl.static_range(1, TAPS_N - 1):
            tl.store(place + i - 1, tl.load(place + i, mask=inside, other=0.0), mask=inside)
        tl.store(place + TAPS_N - 2, newest, mask=inside)

    if is_q:
        if RIDGE is not None:
            logarithm = tl.zeros([BT], tl.float32) + tl.load(RIDGE_HEAD + h).to(tl.float32)
            if RIDGE_LOGIT is not None:
                logarithm += tl.load(RIDGE_LOGIT + at * ridge_r + h, mask=live, other=0.0).to(tl.float32)
            tl.store(RIDGE + at * HQ + h, tl.exp(tl.minimum(tl.maximum(logarithm, -12.0), 12.0)), mask=live)
        if NODES is not None:
            if tl.program_id(0) < heads:  # they are the same for all tokens
                n = tl.arange(0, BN)
                logits = tl.load(NODE_LOGITS + h * (ORDER + 1) + n, mask=n <= ORDER, other=0.0).to(tl.float32)
                tl.store(NODES + h * (ORDER + 1) + n, sigmoid(logits), mask=n <= ORDER)
    elif not is_v:
        if G is not None:
            if FIXED:
                g = tl.zeros([BT], tl.float32) + tl.log(1.0 - tl.exp2(-5.0 - h))
            else:
                logit = tl.load(DECAY + at * decay_r + h, mask=live, other=0.0).to(tl.float32)
                logit += tl.load(DT_BIAS + h).to(tl.float32)
                dt = tl.where(logit > 20.0, logit, tl.log(1.0 + tl.exp(tl.minimum(logit, 20.0))))
                g = -tl.exp(tl.load(A_LOG + h).to(tl.float32)) * dt
            tl.store(G + at * HKV + h, g * keep, mask=live)


class Shaped(NamedTuple):
    """q ``[B, T, HQ, K]``, k, v, parts of one tensor, and the operator's options: g ``[B, T, HKV]`` or None; of hla_q
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
    out = new(B, T, mixer.channels, dtype=qkv.dtype)
    g = None if mixer.decay == "none" else new(B, T, kv)
    ridges = new(B, T, heads) if mixer.coefficients.get("ridge") in ("head", "token") else None
    nodes = new(heads, mixer.order + 1) if mixer.nodes == "head" else None
    by_token = mixer.decay == "token"
    size = block(max(K, V))
    tokens = 1 if T == 1 else max(1, 2048 // size)
    blocks = -(-T // tokens)
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
        out, g, ridges, nodes, T, blocks, row(qkv), row(write), row(decay), row(ridge), float(mixer.norm_eps),
        HQ=heads, HKV=kv, DK=K, DV=V, BD=size, BT=tokens, TAPS_N=mixer.conv_size, MOVE=move and mixer.conv_size > 1,
        FEATURE=FEATURES[mixer.feature_map], NORM=NORMS[mixer.qk_norm], FIXED=mixer.decay == "fixed",
        ORDER=mixer.order, BN=block(mixer.order + 1), warps=4 if T > 1 else 1 if size <= 64 else 2,
        pdl=pdl,
    )  # fmt: skip
    parts = out.split(mixer.split_sizes, -1)
    q, k, v = (part.unflatten(-1, (-1, width)) for part, width in zip(parts, (K, K, V), strict=True))
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
