"""One token of a whole block, in five launches or a few more: decoding is reading weights and states, and launching.

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

`shape` and `hla.step` are one launch on Hopper GPUs for hla_q, as long as registers hold the states (`shape_step`).

Up to 16 rows are one tile of the matrix units: more rows of the batch cost nothing until then. Above, tiles have up to
64 rows, and the heads are normalised and gated in a launch of their own, not anew in every program: one more.
Above TILE_ROWS cuBLAS, which is made for them, has the large products, with what lies between fused: 12 or 13 launches.

With few rows each of these kernels takes microseconds, most of them latency of the launch and of memory. Where the card
can, they overlap (`hla.kernels.launch`): while one ends, the next one asks for the state, for residuals and, with a row
or two, for its weights. What it reads so early, the launch before it does not write. No launch of a model writes
weights; the first one of the first block may follow an update of them and starts as usual. The state was written a
token earlier, or by whoever called, and `project` comes between. A residual is not from the previous launch
but from one before. All else is read behind the wait (a line brought into the L2 cache too early is none the worse:
writes go there). With more rows weights are not asked for early: that took 1.3 times as long for 8 rows of width 2,048,
as more than the cache holds was asked for at once.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from hla.kernels.configs import block as block_of
from hla.kernels.configs import device_config, little_memory, overlaps
from hla.kernels.launch import INTERPRETED, launch, wait
from hla.kernels.shape import shape, sigmoid, supports
from hla.kernels.shape_step import fits as shape_step_fits
from hla.kernels.shape_step import shape_step
from hla.kernels.step import overlapping
from hla.ops.recurrent import step

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention, LayerState
    from hla.models.modeling_hla import HLABlock

FEW = 2  # rows of a batch up to which the matrix units are not worth it
ROWS = 16  # up to which they are one tile
STREAMED = 8_000_000  # bytes of weights that pass through small programs, where there is a row or two
TILE_ROWS = 64  # up to which the products are those of this file, above they are those of cuBLAS
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    BK: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``OUT[b] = norm(x_b) [W; W1; ...]^T`` (+ residual): ROWS of x, BN rows of one weight ``[n, D]`` per program.

    PER_HEAD: x is normalised in parts of WIDTH numbers (with NORM) and multiplied by silu(GATE) (if given).
    SWIGLU: ``silu(x W^T) * (x W1^T)``. The norm over all of x is applied to the products, so x is read once.
    """
    # Programs with the same rows of the weight are neighbours: one reads them from memory, the others from the cache.
    blocks = tl.cdiv(batch, ROWS)
    pid = tl.program_id(0) // blocks
    if SWIGLU:
        weight, size, column, first = W, n, 0, 0
    else:
        weight, size, column, first = _weight(pid, W, W1, W2, W3, W4, n, n1, n2, n3, n4, BN)
    b = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows = (pid - first) * BN + tl.arange(0, BN)
    inside = rows < size
    kk = tl.arange(0, BK)
    extra = _residual(RESIDUAL, b, rows, column, batch, size, o_b)
    wait(PDL)
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
                y *= gate * sigmoid(gate)
            x = y.to(X.dtype.element_ty)
        elif NORM is not None:
            y = x.to(tl.float32)
            squares += tl.sum(y * y, 1)
            x = (y * tl.load(NORM + k, mask=whole, other=0.0).to(tl.float32)[None, :]).to(X.dtype.element_ty)
        acc = tl.dot(x.to(OPERAND), tl.trans(w), acc)
        if SWIGLU:
            w = tl.load(W1 + at, mask=inside[:, None] & whole[None, :], other=0.0).to(OPERAND)
            up = tl.dot(x.to(OPERAND), tl.trans(w), up)
    normed: tl.constexpr = NORM is not None and not PER_HEAD
    _finish(acc, up, squares, extra, OUT, b, rows, column, batch, size, o_b, eps, D, normed, SWIGLU)


@triton.jit(do_not_specialize=["batch"])
def project_row(
    X, GATE, NORM, W, W1, W2, W3, W4, RESIDUAL, OUT, batch, x_b, gate_b, o_b, n, n1, n2, n3, n4, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, PER_HEAD: tl.constexpr, SWIGLU: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
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
    extra = _residual(RESIDUAL, b, rows, column, batch, size, o_b)
    acc = tl.zeros([ROWS, BN], tl.float32)
    up = tl.zeros([ROWS, BN], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(0, (D + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        live = k < D
        at = rows[:, None] * D + k[None, :]
        w = tl.load(weight + at, mask=inside[:, None] & live[None, :], other=0.0)
        if SWIGLU:
            w1 = tl.load(W1 + at, mask=inside[:, None] & live[None, :], other=0.0)
        if NORM is not None:
            factors = tl.load(NORM + (k % WIDTH if PER_HEAD else k), mask=live, other=0.0).to(tl.float32)
        if i == 0:
            wait(PDL)
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
                    x *= gate * sigmoid(gate)
                x = x.to(X.dtype.element_ty).to(tl.float32)
            elif NORM is not None:
                squares += tl.where(b == row, tl.sum(x * x, 0), 0.0)
                x = (x * factors).to(X.dtype.element_ty).to(tl.float32)
            here = (b == row)[:, None]
            acc += tl.where(here, tl.sum(w.to(tl.float32) * x[None, :], 1)[None, :], 0.0)
            if SWIGLU:
                up += tl.where(here, tl.sum(w1.to(tl.float32) * x[None, :], 1)[None, :], 0.0)
    normed: tl.constexpr = NORM is not None and not PER_HEAD
    _finish(acc, up, squares, extra, OUT, b, rows, column, batch, size, o_b, eps, D, normed, SWIGLU)


@triton.jit
def _residual(RESIDUAL, b, rows, column, batch, size, o_b):
    """What is added to the output, asked for before the products, and ahead of `wait`, so that nothing waits for it."""
    if RESIDUAL is None:
        return tl.zeros([b.shape[0], rows.shape[0]], tl.float32)
    else:
        live = (b < batch)[:, None] & (rows < size)[None, :]
        return tl.load(RESIDUAL + b[:, None] * o_b + (column + rows)[None, :], mask=live, other=0.0)


@triton.jit
def _finish(
    acc, up, squares, extra, OUT, b, rows, column, batch, size, o_b, eps, D: tl.constexpr, NORMED: tl.constexpr,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    if NORMED:
        scale = tl.rsqrt(squares / D + eps)[:, None]
        acc *= scale
        up *= scale
    if SWIGLU:
        acc *= sigmoid(acc) * up
    at = b[:, None] * o_b + (column + rows)[None, :]
    live = (b < batch)[:, None] & (rows < size)[None, :]
    acc += extra.to(tl.float32)
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=live)


@triton.jit
def normed_gated(
    X, GATE, NORM, OUT, COPY, x_b, gate_b, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``OUT = norm(X) * silu(GATE)`` (but for what is None), one part of a row, WIDTH numbers, per program.

    COPY: of X, to which a product is added later.
    """
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    at = tl.program_id(0) % PARTS * WIDTH + i
    if NORM is not None:
        factors = tl.load(NORM + i, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    source = tl.load(X + row * x_b + at, mask=inside, other=0.0)
    x = source.to(tl.float32)
    y = x
    if NORM is not None:
        y *= factors
    if GATE is not None:
        gate = tl.load(GATE + row * gate_b + at, mask=inside, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    if NORM is not None:  # last, as everything that is read has to be on its way before the sum waits for x
        y *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    out = row * (PARTS * WIDTH) + at
    tl.store(OUT + out, y.to(OUT.dtype.element_ty), mask=inside)
    if COPY is not None:
        tl.store(COPY + out, source, mask=inside)


def fits(block: HLABlock, x: Tensor) -> bool:
    """Whether `token` does this block for one token of ``x [B, 1, D]`` (else the block goes operation by operation)."""
    if x.shape[1] != 1 or x.shape[0] == 0 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    mixer: Any = block.mixer
    mlp = block.mlp
    if x.dtype not in OPERANDS or mlp.hidden_act not in ("silu", "swish") or not supports(mixer):
        return False
    matrices = [*_projections(mixer).values(), mixer.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    whole = [mixer, mlp, block.input_layernorm, block.post_attention_layernorm]
    return all(_plain(y, x.dtype) for y in matrices) and not any(map(_hooked, whole))


def _plain(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Nothing but a matrix in this dtype: no bias, no adapter, no hooks."""
    return (
        type(linear) is nn.Linear and linear.bias is None and linear.weight.dtype == dtype
        and linear.weight.is_contiguous() and not _hooked(linear)
    )  # fmt: skip


def _hooked(module: nn.Module) -> bool:
    """Whether something else happens around a module's forward (the last one is how accelerate moves weights)."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or hasattr(module, "_hf_hook")


def _projections(mixer: HigherOrderLinearAttention) -> dict[str, nn.Linear]:
    """The maps of a layer's input that it has."""
    present = {
        "qkv_proj": True,
        "gate_proj": mixer.gate_proj is not None,
        "write_proj": mixer.write_gate,
        "decay_proj": mixer.decay == "token",
        "ridge_proj": mixer.coefficients.get("ridge") == "token",
    }
    return {name: getattr(mixer, name) for name, there in present.items() if there}


def token(block: HLABlock, x: Tensor, state: LayerState, mask: Tensor | None) -> Tensor:
    """The block's output ``[B, 1, D]`` for one token that `fits`; advances its state in place.

    Args:
        mask: ``[B, 1]``, 0 at pads, or None.
    """
    mixer: Any = block.mixer
    mlp = block.mlp
    x = x.reshape(x.shape[0], x.shape[2]).contiguous()
    B, D = x.shape
    tiles = B <= TILE_ROWS
    pdl = tiles and not INTERPRETED and overlaps(x.device)
    weights = {name: y.weight for name, y in _projections(mixer).items()}
    hidden = x.new_empty(B, D)
    parts: dict[str, Tensor] = {}
    if not tiles:
        normed = _normed_gated(x, norm=block.input_layernorm, copy=hidden)
        parts = {name: _multiply(normed, weights.pop(name)) for name in ("qkv_proj", "gate_proj") if name in weights}
    if weights:
        widths = [w.shape[0] for w in weights.values()]
        y = x.new_empty(B, sum(widths))
        _project(x, y, list(weights.values()), norm=block.input_layernorm, pdl=pdl and block.layer_idx > 0)
        parts |= dict(zip(weights, y.split(widths, -1), strict=True))
    gate = parts.get("gate_proj")
    both = [mlp.gate_proj.weight, mlp.up_proj.weight]
    if shape_step_fits(mixer, state, x):
        heads = shape_step(mixer, parts, state, mask, pdl)
    else:
        heads = _shape_and_step(mixer, parts, state, mask, pdl)

    o = heads.flatten(1)
    out_norm, width = mixer.o_norm, mixer.head_v_dim
    if tiles:
        if B > ROWS:
            o = _normed_gated(o, norm=out_norm, gate=gate, width=width, pdl=pdl)
            gate, out_norm, width = None, None, None
        _project(o, hidden, [mixer.o_proj.weight], norm=out_norm, gate=gate, width=width, residual=x, pdl=pdl)
        inner, out = x.new_empty(B, both[0].shape[0]), x.new_empty(B, D)
        _project(hidden, inner, both, norm=block.post_attention_layernorm, swiglu=True, pdl=pdl)
        _project(inner, out, [mlp.down_proj.weight], residual=hidden, pdl=pdl)
        return out[:, None]
    o = _normed_gated(o, norm=out_norm, gate=gate, width=width)  # (the residuals are in the outputs already)
    hidden.addmm_(o, mixer.o_proj.weight.T)
    normed = _normed_gated(hidden, norm=block.post_attention_layernorm)
    left, right = (_multiply(normed, w) for w in both)
    return hidden.addmm_(_normed_gated(right, gate=left), mlp.down_proj.weight.T)[:, None]


def _shape_and_step(mixer: Any, parts: dict[str, Tensor], state: LayerState, mask: Tensor | None, pdl: bool) -> Tensor:
    """As `shape_step`, in two launches, for any layer and number of rows."""
    of = {name: y[:, None] for name, y in parts.items()}
    shaped = shape(
        mixer, of["qkv_proj"], write=of.get("write_proj"), decay=of.get("decay_proj"), ridge=of.get("ridge_proj"),
        mask=mask, history=state.conv, move=True, pdl=pdl,
    )  # fmt: skip
    q, k, v = (z[:, 0] for z in (shaped.q, shaped.k, shaped.v))
    options: dict[str, Any] = {
        n: z[:, 0] if n in ("g", "ridge") and isinstance(z, Tensor) else z for n, z in shaped.options.items()
    }
    with overlapping(pdl):
        heads, _ = step(mixer.op, q, k, v, state.op, out_state=state.op, scale=mixer.scale, **options)
    return heads


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in their dtype, whatever autocast wants."""
    return torch.mm(x, weight.T, out=x.new_empty(x.shape[0], weight.shape[0]))


def _normed_gated(
    x: Tensor, *, norm: nn.RMSNorm | None = None, gate: Tensor | None = None, width: int | None = None,
    copy: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """``norm(x) * silu(gate)`` in parts of a row of ``width`` numbers."""
    if norm is None and gate is None:
        return x
    out, width = x.new_empty(x.shape), width or x.shape[1]
    parts = x.shape[1] // width
    launch(
        normed_gated, x.shape[0] * parts, x, gate, None if norm is None else norm.weight, out, copy,
        x.stride(0), 0 if gate is None else gate.stride(0), 0.0 if norm is None else float(norm.eps or 0.0),
        PARTS=parts, WIDTH=width, BLOCK=block_of(width), warps=min(8, max(1, block_of(width) // 256)), pdl=pdl,
    )  # fmt: skip
    return out


class Tile(NamedTuple):
    """Rows of x, rows of a weight, columns of both at a time, stages of the load pipeline, and warps."""

    side: int
    rows: int
    columns: int
    stages: int
    warps: int


@functools.cache
def _tile(
    B: int, sizes: tuple[int, ...], pair: bool, normed: bool, capability: tuple[int, int], multiprocessors: int
) -> Tile:
    """The tile with which the busiest multiprocessor reads least, for more than ROWS rows.

    Wide tiles read x less often, narrow ones occupy all multiprocessors. pair: rows of two weights at a time (SWIGLU).
    normed: the program normalises its rows, for which it has more warps; wider than 128, its columns would be so few
    bytes of the norm's factors to a thread that Triton does not load those ahead.
    """

    def programs(side: int, rows: int) -> int:
        return -(-B // side) * sum(-(-n // rows) for n in sizes)

    def read(tile: tuple[int, int]) -> int:
        side, rows = tile
        return -(-programs(side, rows) // multiprocessors) * (side + (1 + pair) * rows)

    sides = [side for side in (64, 32, 16) if side <= B]
    side, rows = min(itertools.product(sides, (16, 32, 64)), key=read)
    little, height = little_memory(capability), side + (1 + pair) * rows
    columns = (64 if little else 128) * (2 if height <= 64 and not normed else 1)
    memory = 90_000 if little else 150_000 if capability < (9, 0) else 200_000
    if programs(side, rows) > multiprocessors:
        memory //= 2  # for two of them side by side
    stages = max(3, min(5, memory // (2 * height * columns)))
    return Tile(side, rows, columns, stages, 8 if normed else 4)


def _row_tile(size: int, D: int, pair: bool, width: int | None) -> tuple[int, int, int]:
    """Rows of the weight, columns at a time, and warps of a program of `project_row`.

    Of the two products of normalised inputs, weights of more bytes than the multiprocessors can ask for at once pass
    through small programs, in pieces: there is always one that asks. Else a whole row, where it fits, is asked for
    ahead of `wait`. (Chosen on an H200 by the time of whole models of 124M, 348M and 1.3B parameters, one kind of
    product after the other.)
    """
    whole = block_of(D)
    if width is not None:
        return 4 if D > 1024 else 8, max(width, min(whole, 2048)), 4
    if D > 1024 and size < STREAMED and whole <= 4096:
        return 2, whole, 8
    if size >= STREAMED and whole <= 2048:
        return (2, max(512, whole // 2), 1) if pair else (4, min(whole, 512), 1)
    if pair:
        return 2, min(whole, 1024), 4
    return 4 if D > 1024 else 8, min(whole, 2048), 4


def _project(
    x: Tensor, out: Tensor, weights: list[Tensor], *, norm: nn.RMSNorm | None = None, gate: Tensor | None = None,
    width: int | None = None, swiglu: bool = False, residual: Tensor | None = None,
    pdl: bool = False,
) -> None:  # fmt: skip
    """width: x is normalised in parts of so many numbers."""
    B, D = x.shape
    sizes = [w.shape[0] for w in weights]
    outputs = sizes[:1] if swiglu else sizes
    warps = 4
    if B <= FEW and (width is None or width == block_of(width)):
        kernel, stages, side = project_row, 1, triton.next_power_of_2(B)
        rows, columns, warps = _row_tile(sum(w.numel() * w.element_size() for w in weights), D, swiglu, width)
    elif B <= ROWS:
        kernel, side, rows, columns, stages = project, ROWS, 16, block_of(width or 256), 4 if width else 3
    else:  # (few kinds of batch, as each compiles its own)
        kernel, config = project, device_config(x.device)
        batch, normed = triton.next_power_of_2(B), norm is not None
        side, rows, columns, stages, warps = _tile(batch, tuple(outputs), swiglu, normed, *config)
    pad = 5 - len(weights)
    launch(
        kernel, -(-B // side) * sum(-(-n // rows) for n in outputs),
        x, gate, None if norm is None else norm.weight, *weights, *[None] * pad, residual, out,
        B, x.stride(0), 0 if gate is None else gate.stride(0), out.stride(0), *sizes, *[0] * pad,
        0.0 if norm is None else float(norm.eps or 0.0),
        D=D, WIDTH=width or (columns if kernel is project else 256), PER_HEAD=width is not None, SWIGLU=swiglu,
        BN=rows, BK=columns, ROWS=side, OPERAND=tl.float32 if INTERPRETED else OPERANDS[x.dtype], warps=warps,
        stages=stages, pdl=pdl,
    )  # fmt: skip
