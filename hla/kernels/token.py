"""One token of a whole block, in six launches: at small batches decoding is reading weights, and launching.

A block of the model spends about seventy launches on a token, most of them on a few thousand numbers. Here everything
between two reads of weights goes into the kernel of one of them:

| launch | computes |
|---|---|
| `project` | the norm of the input; q, k, v, output gate, and the logits of decay, ridge and write gate |
| `shape` | convolution, feature map, normalisation, write gate, decay, ridge, nodes |
| `hla.step` | the operator, in place |
| `project` | norm of each head, output gate, output projection, residual |
| `project` | the norm, both halves of the gated MLP and their product |
| `project` | the way down, residual |

Up to 16 rows, which are the side of one tile of the matrix units: more rows of the batch cost nothing until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from hla.kernels.configs import block as block_of
from hla.kernels.launch import INTERPRETED, launch
from hla.ops.recurrent import step

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention, LayerState
    from hla.models.modeling_hla import HLABlock

ROWS = 16
FEATURES = {"identity": 0, "silu": 1, "relu": 2, "elu1": 3}
NORMS = {"none": 0, "l2": 1, "rms": 2}


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _weight(pid, W, W1, W2, W3, W4, n, n1, n2, n3, n4, BN: tl.constexpr):
    """(weight, its rows, its first column of the output, its first program) for a program."""
    weight, size, column, first = W, n, 0, 0
    start = tl.cdiv(n, BN)
    if W1 is not None:
        if pid >= start:
            weight, size, column, first = W1, n1, n, start
        start += tl.cdiv(n1, BN)
    if W2 is not None:
        if pid >= start:
            weight, size, column, first = W2, n2, n + n1, start
        start += tl.cdiv(n2, BN)
    if W3 is not None:
        if pid >= start:
            weight, size, column, first = W3, n3, n + n1 + n2, start
        start += tl.cdiv(n3, BN)
    if W4 is not None:
        if pid >= start:
            weight, size, column, first = W4, n4, n + n1 + n2 + n3, start
    return weight, size, column, first


@triton.jit(do_not_specialize=["batch"])
def project(
    X, GATE, NORM, W, W1, W2, W3, W4, RESIDUAL, OUT, batch, x_b, gate_b, o_b, n, n1, n2, n3, n4, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr, SWIGLU: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``OUT[b] = norm(x_b) [W; W1; ...]^T`` (+ residual), BN rows of one of the weights ``[n, D]`` per program.

    PER_HEAD: x is normalised in parts of WIDTH numbers (with NORM) and multiplied by silu(GATE) (if given).
    SWIGLU: ``silu(x W^T) * (x W1^T)``. The norm over all of x is applied to the products, so x is read once.
    """
    pid = tl.program_id(0)
    if SWIGLU:
        weight, size, column, first = W, n, 0, 0
    else:
        weight, size, column, first = _weight(pid, W, W1, W2, W3, W4, n, n1, n2, n3, n4, BN)
    b = tl.arange(0, ROWS)
    rows = (pid - first) * BN + tl.arange(0, BN)
    inside = rows < size
    kk = tl.arange(0, BK)
    acc = tl.zeros([ROWS, BN], tl.float32)
    up = tl.zeros([ROWS, BN], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for i in range(0, (D + WIDTH - 1) // WIDTH):
        k = i * WIDTH + kk
        whole = (kk < WIDTH) & (k < D)
        live = (b < batch)[:, None] & whole[None, :]
        x = tl.load(X + b[:, None] * x_b + k[None, :], mask=live, other=0.0)
        at = rows[:, None] * D + k[None, :]
        w = tl.load(weight + at, mask=inside[:, None] & whole[None, :], other=0.0).to(OPERAND)
        if PER_HEAD:
            y = x.to(tl.float32)
            if NORM is not None:
                y *= tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
                y *= tl.load(NORM + kk, mask=kk < WIDTH, other=0.0).to(tl.float32)[None, :]
            if GATE is not None:
                gate = tl.load(GATE + b[:, None] * gate_b + k[None, :], mask=live, other=0.0).to(tl.float32)
                y *= gate * _sigmoid(gate)
            x = y.to(X.dtype.element_ty)
        elif NORM is not None:
            y = x.to(tl.float32)
            squares += tl.sum(y * y, 1)
            x = (y * tl.load(NORM + k, mask=whole, other=0.0).to(tl.float32)[None, :]).to(X.dtype.element_ty)
        acc = tl.dot(x.to(OPERAND), tl.trans(w), acc)
        if SWIGLU:
            w = tl.load(W1 + at, mask=inside[:, None] & whole[None, :], other=0.0).to(OPERAND)
            up = tl.dot(x.to(OPERAND), tl.trans(w), up)
    _finish(acc, up, squares, RESIDUAL, OUT, b, rows, column, batch, size, o_b, eps, D, NORM is not None and not PER_HEAD, SWIGLU)


@triton.jit(do_not_specialize=["batch"])
def project_row(
    X, GATE, NORM, W, W1, W2, W3, W4, RESIDUAL, OUT, batch, x_b, gate_b, o_b, n, n1, n2, n3, n4, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr, SWIGLU: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The same for a row or two, without the matrix units: BN rows of the weight in one piece, as many bytes in flight
    as registers hold. WIDTH is a power of two."""
    pid = tl.program_id(0)
    if SWIGLU:
        weight, size, column, first = W, n, 0, 0
    else:
        weight, size, column, first = _weight(pid, W, W1, W2, W3, W4, n, n1, n2, n3, n4, BN)
    b = tl.arange(0, ROWS)
    rows = (pid - first) * BN + tl.arange(0, BN)
    inside = rows < size
    acc = tl.zeros([ROWS, BN], tl.float32)
    up = tl.zeros([ROWS, BN], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for i in range(0, (D + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        live = k < D
        at = rows[:, None] * D + k[None, :]
        w = tl.load(weight + at, mask=inside[:, None] & live[None, :], other=0.0)
        if SWIGLU:
            w1 = tl.load(W1 + at, mask=inside[:, None] & live[None, :], other=0.0)
        if NORM is not None:
            factors = tl.load(NORM + (k % WIDTH if PER_HEAD else k), mask=live, other=0.0).to(tl.float32)
        for row in tl.static_range(ROWS):
            there = tl.where(row < batch, D, 0)
            x = tl.load(X + row * x_b + k, mask=k < there, other=0.0).to(tl.float32)
            if PER_HEAD:
                if NORM is not None:
                    heads = tl.reshape(x, [BK // WIDTH, WIDTH])
                    heads *= tl.rsqrt(tl.sum(heads * heads, 1) / WIDTH + eps)[:, None]
                    x = tl.reshape(heads, [BK]) * factors
                if GATE is not None:
                    gate = tl.load(GATE + row * gate_b + k, mask=k < there, other=0.0).to(tl.float32)
                    x *= gate * _sigmoid(gate)
                x = x.to(X.dtype.element_ty).to(tl.float32)
            elif NORM is not None:
                squares += tl.where(b == row, tl.sum(x * x, 0), 0.0)
                x = (x * factors).to(X.dtype.element_ty).to(tl.float32)
            here = (b == row)[:, None]
            acc += tl.where(here, tl.sum(w.to(tl.float32) * x[None, :], 1)[None, :], 0.0)
            if SWIGLU:
                up += tl.where(here, tl.sum(w1.to(tl.float32) * x[None, :], 1)[None, :], 0.0)
    _finish(acc, up, squares, RESIDUAL, OUT, b, rows, column, batch, size, o_b, eps, D, NORM is not None and not PER_HEAD, SWIGLU)


@triton.jit
def _finish(
    acc, up, squares, RESIDUAL, OUT, b, rows, column, batch, size, o_b, eps, D: tl.constexpr, NORMED: tl.constexpr,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    if NORMED:
        scale = tl.rsqrt(squares / D + eps)[:, None]
        acc *= scale
        up *= scale
    if SWIGLU:
        acc *= _sigmoid(acc) * up
    at = b[:, None] * o_b + (column + rows)[None, :]
    live = (b < batch)[:, None] & (rows < size)[None, :]
    if RESIDUAL is not None:
        acc += tl.load(RESIDUAL + at, mask=live, other=0.0).to(tl.float32)
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=live)


@triton.jit
def shape(
    Y, MASK, HISTORY, TAPS, A_LOG, DT_BIAS, RIDGE_HEAD, NODE_LOGITS, QKV, G, RIDGE, NODES,
    y_b, write, decay, ridge, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, TAPS_N: tl.constexpr,
    FEATURE: tl.constexpr, NORM: tl.constexpr, FIXED: tl.constexpr, ORDER: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From the projections Y ``[B, ...]`` to what `hla.step` takes: one program per row and head of q, k and v.

    write, decay, ridge: columns of Y with these logits; a negative number where there are none. MASK ``[B]`` is 0 at
    pads. HISTORY ``[B, channels, TAPS_N - 1]`` is moved on by one token.
    """
    heads: tl.constexpr = HQ + 2 * HKV
    channels: tl.constexpr = (HQ + HKV) * DK + HKV * DV
    b = tl.cast(tl.program_id(0) // heads, tl.int64)
    j = tl.program_id(0) % heads
    is_q = j < HQ
    is_v = j >= HQ + HKV
    h = tl.where(is_q, j, tl.where(is_v, j - HQ - HKV, j - HQ))  # among its own kind
    size = tl.where(is_v, DV, DK)
    d = tl.arange(0, BD)
    inside = d < size
    channel = tl.where(is_v, (HQ + HKV) * DK + (j - HQ - HKV) * DV, j * DK) + d
    keep = 1.0
    if MASK is not None:
        keep = tl.where(tl.load(MASK + b) != 0, 1.0, 0.0)
    x = tl.load(Y + b * y_b + channel, mask=inside, other=0.0).to(tl.float32) * keep
    if TAPS_N > 0:
        taps = TAPS + channel * TAPS_N
        history = HISTORY + (b * channels + channel) * (TAPS_N - 1)
        y = x * tl.load(taps + TAPS_N - 1, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(TAPS_N - 1):
            old = tl.load(history + i, mask=inside, other=0.0).to(tl.float32)
            y += old * tl.load(taps + i, mask=inside, other=0.0).to(tl.float32)
            if i > 0:
                tl.store(history + i - 1, old, mask=inside)
        if TAPS_N > 1:
            tl.store(history + TAPS_N - 2, x, mask=inside)
        x = y
    if not is_v:
        if FEATURE == 1:
            x = x * _sigmoid(x)
        elif FEATURE == 2:
            x = tl.maximum(x, 0.0)
        elif FEATURE == 3:
            x = tl.where(x > 0, x + 1.0, tl.exp(x))
        x = tl.where(inside, x, 0.0)
        if NORM == 1:
            x *= tl.rsqrt(tl.sum(x * x, 0) + eps)
        elif NORM == 2:
            x *= tl.rsqrt(tl.sum(x * x, 0) / DK + eps)
    x *= keep
    if not is_q:
        if write >= 0:
            x *= tl.sqrt(_sigmoid(tl.load(Y + b * y_b + write + h).to(tl.float32)))
    tl.store(QKV + b * channels + channel, x.to(QKV.dtype.element_ty), mask=inside)

    if is_q:
        if RIDGE is not None:
            logarithm = tl.load(RIDGE_HEAD + h).to(tl.float32)
            if ridge >= 0:
                logarithm += tl.load(Y + b * y_b + ridge + h).to(tl.float32)
            tl.store(RIDGE + b * HQ + h, tl.exp(tl.minimum(tl.maximum(logarithm, -12.0), 12.0)))
        if NODES is not None:
            n = tl.arange(0, BN)
            logits = tl.load(NODE_LOGITS + h * (ORDER + 1) + n, mask=n <= ORDER, other=0.0).to(tl.float32)
            if b == 0:  # (they are the same for all rows)
                tl.store(NODES + h * (ORDER + 1) + n, _sigmoid(logits), mask=n <= ORDER)
    elif not is_v:
        if G is not None:
            if FIXED:
                g = tl.log(1.0 - tl.exp2(-5.0 - h))
            else:
                logit = tl.load(Y + b * y_b + decay + h).to(tl.float32) + tl.load(DT_BIAS + h).to(tl.float32)
                dt = tl.where(logit > 20.0, logit, tl.log(1.0 + tl.exp(tl.minimum(logit, 20.0))))
                g = -tl.exp(tl.load(A_LOG + h).to(tl.float32)) * dt
            tl.store(G + b * HKV + h, g * keep)


def fits(block: HLABlock, x: Tensor) -> bool:
    """Whether `token` does this block for one token of ``x [B, 1, D]`` (else the block goes operation by operation)."""
    mixer, mlp = block.mixer, block.mlp
    if x.shape[1] != 1 or not 0 < x.shape[0] <= ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or mixer.backend == "torch":
        return False
    if mixer.op not in ("hla_q", "linear_attn") or mixer.normalize or mixer.rope_theta is not None:
        return False
    if mixer.nodes == "token" or max(mixer.head_dim, mixer.head_v_dim) > 256 or mlp.hidden_act not in ("silu", "swish"):
        return False
    maps = [mixer.qkv_proj, mixer.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj, *_others(mixer)]
    return all(_plain(y, x.dtype) for y in maps)


def _plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Nothing but a matrix in this dtype: no bias, no adapter, no hooks."""
    return (
        type(linear) is nn.Linear and linear.bias is None and linear.weight.dtype == dtype
        and linear.weight.is_contiguous() and not linear._forward_hooks and not linear._forward_pre_hooks
    )  # fmt: skip


def _others(mixer: HigherOrderLinearAttention) -> list[nn.Linear]:
    """What is projected beside q, k and v, in the order of the columns: output gate, write gate, decay, ridge."""
    names = [
        "gate_proj" if mixer.gate_proj is not None else "",
        "write_proj" if mixer.write_gate else "",
        "decay_proj" if mixer.decay == "token" else "",
        "ridge_proj" if mixer.coefficients.get("ridge") == "token" else "",
    ]
    return [mixer.get_submodule(name) for name in names if name]


def token(block: HLABlock, x: Tensor, state: LayerState, mask: Tensor | None) -> Tensor:
    """The block's output ``[B, 1, D]`` for one token that `fits`; advances its state in place.

    Args:
        mask: ``[B, 1]``, 0 at pads, or None.
    """
    mixer, mlp = block.mixer, block.mlp
    B, D = x.shape[0], x.shape[2]
    x = x.reshape(B, D)
    new = lambda *size, dtype=x.dtype: torch.empty(*size, dtype=dtype, device=x.device)  # noqa: E731
    heads, kv, K, V = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.head_v_dim
    others = _others(mixer)
    weights = [mixer.qkv_proj.weight, *(y.weight for y in others)]
    columns, total = {}, 0
    for module, weight in zip([mixer.qkv_proj, *others], weights, strict=True):
        columns[module] = total
        total += weight.shape[0]

    y = new(B, total)
    _project(x, y, weights, norm=block.input_layernorm)

    def column(name: str, present: bool) -> int:
        return columns[mixer.get_submodule(name)] if present else -1

    qkv = new(B, mixer.channels)
    g = None if mixer.decay == "none" else new(B, kv, dtype=torch.float32)
    kind = mixer.coefficients.get("ridge")
    ridge = new(B, heads, dtype=torch.float32) if kind in ("head", "token") else None
    nodes = new(heads, mixer.order + 1, dtype=torch.float32) if mixer.nodes == "head" else None
    at_gate = column("gate_proj", mixer.gate_proj is not None)
    token_decay = mixer.decay == "token"
    launch(
        shape, B * (heads + 2 * kv),
        y, None if mask is None else mask.contiguous(), state.conv, mixer.conv_weight if mixer.conv_size else None,
        mixer.A_log if token_decay else None, mixer.dt_bias if token_decay else None,
        None if ridge is None else mixer.ridge_head, None if nodes is None else mixer.node_logits, qkv, g, ridge, nodes,
        total, column("write_proj", mixer.write_gate), column("decay_proj", token_decay),
        column("ridge_proj", kind == "token"), float(mixer.norm_eps),
        HQ=heads, HKV=kv, DK=K, DV=V, BD=block_of(max(K, V)), TAPS_N=mixer.conv_size,
        FEATURE=FEATURES[mixer.feature_map], NORM=NORMS[mixer.qk_norm], FIXED=mixer.decay == "fixed",
        ORDER=mixer.order, BN=block_of(mixer.order + 1), warps=1 if max(K, V) <= 64 else 2,
    )  # fmt: skip

    options = dict(g=g, scale=mixer.scale)
    if mixer.op == "hla_q":
        options |= dict(order=mixer.order, ridge=float(kind) if ridge is None else ridge, nodes=nodes)
    parts = qkv.split(mixer.split_sizes, -1)
    q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, (K, K, V), strict=True))
    o, _ = step(mixer.op, q, k, v, state.op, out_state=state.op, **options)

    hidden = new(B, D)
    gate = None if at_gate < 0 else y[:, at_gate : at_gate + heads * V]
    _project(
        o.flatten(1), hidden, [mixer.o_proj.weight], norm=mixer.o_norm, gate=gate, width=V, per_head=True, residual=x
    )
    inner = new(B, mlp.up_proj.weight.shape[0])
    _project(
        hidden, inner, [mlp.gate_proj.weight, mlp.up_proj.weight], norm=block.post_attention_layernorm, swiglu=True
    )
    out = new(B, D)
    _project(inner, out, [mlp.down_proj.weight], residual=hidden)
    return out[:, None]


def _project(
    x: Tensor, out: Tensor, weights: list[Tensor], *, norm: nn.RMSNorm | None = None, gate: Tensor | None = None,
    width: int | None = None, per_head: bool = False, swiglu: bool = False, residual: Tensor | None = None,
) -> None:  # fmt: skip
    (B, D), whole_heads = x.shape, width is None or width == block_of(width)
    if B <= FEW and whole_heads:
        kernel, columns, rows, stages = project_row, max(width or 16, min(block_of(D), 2048)), 4 if D > 1024 else 8, 1
        side = triton.next_power_of_2(B)
    else:
        kernel, columns, rows, stages, side = project, block_of(width or 256), 16, 4 if width else 3, ROWS
    sizes = [w.shape[0] for w in weights]
    pad = 5 - len(weights)
    launch(
        kernel, sum(-(-n // rows) for n in (sizes[:1] if swiglu else sizes)),
        x, gate, None if norm is None else norm.weight, *weights, *[None] * pad, residual, out,
        B, x.stride(0), 0 if gate is None else gate.stride(0), out.stride(0), *sizes, *[0] * pad,
        0.0 if norm is None else float(norm.eps),
        D=D, WIDTH=width or 256, PER_HEAD=per_head, SWIGLU=swiglu, BN=rows, BK=columns, ROWS=side,
        OPERAND=tl.float32 if INTERPRETED else OPERANDS[x.dtype], warps=4, stages=stages,
    )  # fmt: skip


FEW = 2  # rows of a batch up to which the matrix units are not worth it
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
