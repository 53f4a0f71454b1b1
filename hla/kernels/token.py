"""One token of a whole block in a few launches: decoding is reading weights and states, and launching.

A block of the model spends about seventy launches on a token, most of them on a few thousand numbers. With a row or two
everything between two reads of weights goes into the kernel of one of them:

| launch | computes |
|---|---|
| `project` | the norm of the input; q, k, v, output gate, and the logits of decay, ridge and write gate |
| `shape` | convolution, feature map, normalisation, write gate, decay, ridge, nodes |
| `hla.step` | the operator, in place |
| `project` | norm of each head, output gate, output projection, residual |
| `project` | the norm, both halves of the gated MLP and their product |
| `project` | the way down, residual |

`shape`, `hla.step`, and norm and gate of the heads are one launch on Hopper GPUs for hla_q (`shape_step`), as long as a
multiprocessor can hold the states of a head.

More rows are products of the matrix units (`product`), whose programs read nothing but weights and finished inputs, as
fast as memory gives them: what lies between has short launches of its own, three with `shape_step`. The output
projection and the way down have few outputs; several programs share the columns, and the launch that adds up their
parts adds the residual and computes the next norm (`add_up`). Above TILE_ROWS cuBLAS has the large products.

With few rows each of these kernels takes microseconds, most of them latency of the launch and of memory. Where the card
can, they overlap (`hla.kernels.launch`): while one ends, the next one asks for the state, for residuals and, with a row
or two, for its weights. What it reads so early, the launch before it does not write. No launch of a model writes
weights; the first one of the first block may follow an update of them and starts as usual. The state was written a
token earlier, or by whoever called, and products come between. A residual is not from the previous launch but from one
before. All else is read behind the wait (a line that comes to the L2 cache too early is none the worse: writes go
there).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor, nn

from hla.kernels.configs import block as block_of
from hla.kernels.configs import device_config, little_memory, overlaps
from hla.kernels.launch import INTERPRETED, launch
from hla.kernels.shape import shape, supports
from hla.kernels.shape_step import fits as shape_step_fits
from hla.kernels.shape_step import shape_step
from hla.kernels.step import overlapping
from hla.kernels.token_kernels import add_up, normed_gated, product, project
from hla.ops.recurrent import step

if TYPE_CHECKING:
    from hla.layers import HigherOrderLinearAttention, LayerState
    from hla.models.modeling_hla import HLABlock

FEW = 2  # rows of a batch up to which the matrix units are not worth it
STREAMED = 8_000_000  # bytes of weights that pass through small programs, where there is a row or two
WHOLE = 2560  # columns of which a warp asks for a whole row (timed at 124M and 348M)
COLUMNS = 128  # of a tile of more rows
TILE_ROWS = 128  # up to which the products are those of `token_kernels`, above they are those of cuBLAS
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
        and linear.weight.is_contiguous() and linear.weight.data_ptr() % 16 == 0 and not _hooked(linear)
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
    B = x.shape[0]
    pdl = B <= TILE_ROWS and not INTERPRETED and overlaps(x.device)
    first, second = block.input_layernorm, block.post_attention_layernorm
    both = [mlp.gate_proj.weight, mlp.up_proj.weight]
    weights = {name: y.weight for name, y in _projections(mixer).items()}
    early = pdl and block.layer_idx > 0  # (what reads weights ahead must not follow an update of them)

    parts: dict[str, Tensor] = {}
    if B <= FEW:
        y = _project(x, list(weights.values()), norm=first, pdl=early)
    else:
        hidden = torch.empty_like(x) if B > TILE_ROWS else x  # (if another one, for a copy to which products are added)
        normed = y = _normed_gated(x, norm=first, copy=None if hidden is x else hidden, pdl=early)
        if B > TILE_ROWS:
            large = [name for name in ("qkv_proj", "gate_proj") if name in weights]
            parts = {name: _multiply(normed, weights.pop(name)) for name in large}
        if weights:
            y = _product(normed, list(weights.values()), pdl=pdl)
    if weights:
        parts |= dict(zip(weights, y.split([w.shape[0] for w in weights.values()], -1), strict=True))
    out_norm, gate, width = mixer.o_norm, parts.get("gate_proj"), mixer.head_v_dim
    if shape_step_fits(mixer, state, x):
        o = shape_step(mixer, parts, state, mask, pdl)
        out_norm, gate, width = None, None, None
    else:
        o = _shape_and_step(mixer, parts, state, mask, pdl).flatten(1)
    if width is not None and (B > FEW or width != block_of(width)):
        o = _normed_gated(o, norm=out_norm, gate=gate, width=width, pdl=pdl)
        out_norm, gate, width = None, None, None
    if B <= FEW:
        hidden = _project(o, [mixer.o_proj.weight], norm=out_norm, gate=gate, width=width, residual=x, pdl=pdl)
        inner = _project(hidden, both, norm=second, swiglu=True, pdl=pdl)
        return _project(inner, [mlp.down_proj.weight], residual=hidden, pdl=pdl)[:, None]
    if B <= TILE_ROWS:
        hidden, normed = _added(_product(o, [mixer.o_proj.weight], summed=True, pdl=pdl), x, norm=second, pdl=pdl)
        inner = _product(normed, both, swiglu=True, pdl=pdl)
        return _added(_product(inner, [mlp.down_proj.weight], summed=True, pdl=pdl), hidden, pdl=pdl)[0][:, None]
    hidden.addmm_(o, mixer.o_proj.weight.T)  # (the residual is in it already)
    normed = _normed_gated(hidden, norm=second)
    left, right = (_multiply(normed, w) for w in both)
    return hidden.addmm_(_normed_gated(right, gate=left), mlp.down_proj.weight.T)[:, None]


def _shape_and_step(mixer: Any, parts: dict[str, Tensor], state: LayerState, mask: Tensor | None, pdl: bool) -> Tensor:
    """What the operator reads ``[B, HQ, V]``: as `shape_step` but for norm and gate, in two launches, for any layer."""
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
    """Rows of a weight, stages of the load pipeline, and parts of the columns."""

    rows: int
    stages: int
    parts: int


@functools.cache
def _tile(
    side: int, sizes: tuple[int, ...], D: int, pair: bool, summed: bool, capability: tuple[int, int], processors: int
) -> Tile:
    """The tile of `product` for ``side`` rows of x.

    64 rows of a weight are what the matrix units of Hopper GPUs take, and read x least often. Where that leaves
    multiprocessors without work, columns are split, or, if nobody adds up the parts, there are fewer rows.

    Args:
        sizes: rows of the weights. pair: of two at a time (SWIGLU). summed: the parts are added up.
    """

    def programs(rows: int) -> int:
        return sum(-(-n // (rows // 2 if pair else rows)) for n in sizes)

    rows, parts = 64, 1
    if summed:
        steps = -(-D // COLUMNS)
        each = -(-steps // max(1, min(processors // programs(rows), steps // 2)))
        parts = -(-steps // each)
    elif programs(64) < processors // 2:
        rows = 32
    memory = 90_000 if little_memory(capability) else 150_000
    return Tile(rows, max(2, min(5, memory // (2 * (side + rows) * COLUMNS))), parts)


class Rows(NamedTuple):
    """Rows of the weight, columns at a time, warps of a program, and whether whole rows are asked for at the start."""

    rows: int
    columns: int
    warps: int
    whole: bool = False


def _row_tile(size: int, D: int, pair: bool, width: int | None, plain: bool) -> Rows:
    """The tile of `project` for ``size`` bytes of weights with D columns. plain: x is what it is multiplied by.

    Of the two products of normalised inputs, weights of more bytes than the multiprocessors can ask for at once pass
    through small programs, in pieces: there is always one that asks. Else a whole row, where it fits, is asked for
    ahead of `wait`, by a warp if x is plain: no sum crosses warps. (Chosen on an H200 by the time of whole models of
    124M, 348M and 1.3B parameters, one kind of product after the other.)
    """
    whole = block_of(D)
    if plain and D <= WHOLE:
        return Rows(4, 256, 4, True)
    if width is not None:
        return Rows(4 if D > 1024 else 8, max(width, min(whole, 2048)), 4)
    if D > 1024 and size < STREAMED and whole <= 4096:
        return Rows(2, whole, 8)
    if size >= STREAMED and whole <= 2048:
        return Rows(2, max(512, whole // 2), 1) if pair else Rows(4, min(whole, 512), 1)
    if pair:
        return Rows(2, min(whole, 1024), 4)
    return Rows(4 if D > 1024 else 8, min(whole, 2048), 4)


def _project(
    x: Tensor, weights: list[Tensor], *, norm: nn.RMSNorm | None = None, gate: Tensor | None = None,
    width: int | None = None, swiglu: bool = False, residual: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Of up to FEW rows. width: x is normalised in parts of so many numbers."""
    B, D = x.shape
    sizes = [w.shape[0] for w in weights]
    outputs = sizes[:1] if swiglu else sizes
    out = x.new_empty(B, sum(outputs))
    tile = _row_tile(
        sum(w.numel() * w.element_size() for w in weights), D, swiglu, width, norm is None and gate is None
    )
    pad = 5 - len(weights)
    launch(
        project, sum(-(-n // tile.rows) for n in outputs),
        x, gate, None if norm is None else norm.weight, *weights, *[None] * pad, residual, out,
        B, x.stride(0), 0 if gate is None else gate.stride(0), out.stride(0), *sizes, *[0] * pad,
        0.0 if norm is None else float(norm.eps or 0.0),
        D=D, WIDTH=width or 0, SWIGLU=swiglu, BN=tile.rows, BK=tile.columns, WHOLE=tile.whole,
        ROWS=1 << (B - 1).bit_length(), warps=tile.warps,
        pdl=pdl,
    )  # fmt: skip
    return out


def _product(
    x: Tensor, weights: list[Tensor], *, swiglu: bool = False, summed: bool = False, pdl: bool = False
) -> Tensor:
    """``x [W; W1; ...]^T``. summed: the result is ``[parts, B, n]`` in float32, to be added up."""
    B, D = x.shape
    sizes = [w.shape[0] for w in weights]
    outputs = sizes[:1] if swiglu else sizes
    side = min(64, block_of(B))  # (few kinds of batch, as each compiles its own)
    rows, stages, parts = _tile(side, tuple(outputs), D, swiglu, summed, *device_config(x.device))
    width = sum(outputs)
    out = x.new_empty(parts, B, width, dtype=torch.float32) if summed else x.new_empty(B, width)
    pad = 5 - len(weights)
    launch(
        product, -(-B // side) * parts * sum(-(-n // (rows // 2 if swiglu else rows)) for n in outputs),
        x, *weights, *[None] * pad, out, B, *sizes, *[0] * pad,
        D=D, SWIGLU=swiglu, PARTS=parts, BN=rows, BK=COLUMNS, ROWS=side,
        OPERAND=tl.float32 if INTERPRETED else OPERANDS[x.dtype], warps=4, stages=stages, pdl=pdl,
    )  # fmt: skip
    return out


def _added(
    partial: Tensor, residual: Tensor, *, norm: nn.RMSNorm | None = None, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(residual plus the sum of the parts, its norm)."""
    total = torch.empty_like(residual)
    normed = total if norm is None else torch.empty_like(residual)
    parts, B, D = partial.shape
    launch(
        add_up, B, partial, residual, None if norm is None else norm.weight, total, normed,
        B * D, 0.0 if norm is None else float(norm.eps or 0.0),
        PARTS=parts, WIDTH=D, BLOCK=block_of(D), warps=min(8, max(1, block_of(D) // 256)), pdl=pdl,
    )  # fmt: skip
    return total, normed
