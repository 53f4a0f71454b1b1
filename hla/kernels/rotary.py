"""Rotary embeddings of queries and keys in one pass through memory, for softmax attention.

`rotated` is `hla.rotary.apply_rope` of both, computed in float32 and rounded once. Its gradient is the same kernel: the
adjoint of a rotation turns the other way. It needs no q and k, whose shapes alone are read from what is saved of them:
parts of the projection's output, which attention keeps for v anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.launch import launch
from hla.kernels.library import Operation

PAIRS = 1024  # of features, that a program rotates
LARGEST = 256  # head_dim


@triton.jit(
    do_not_specialize=[
        "length", "q_programs", "q_blocks", "k_blocks", "q_b", "q_t", "q_h", "k_b", "k_t", "k_h", "cos_b"
    ]
)  # fmt: skip
def _rotate(
    Q, K, COS, SIN, Q_OUT, K_OUT,
    length, q_programs, q_blocks, k_blocks, q_b, q_t, q_h, k_b, k_t, k_h, cos_b, sign,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Rotates Q and K, each with its strides in units of D, to contiguous Q_OUT and K_OUT ``[B, T, heads, D]``.

    COS and SIN ``[B or 1, T, D / 2]``, with cos_b tokens between rows of the batch; sign -1 turns back. One program per
    row of the batch and BR pairs (token, head), those of q before those of k.
    """
    program = tl.program_id(0)
    if program < q_programs:
        _rotate_rows(Q, COS, SIN, Q_OUT, program, q_blocks, length, q_b, q_t, q_h, cos_b, sign, HQ, D, BD, BR)
    else:
        program -= q_programs
        _rotate_rows(K, COS, SIN, K_OUT, program, k_blocks, length, k_b, k_t, k_h, cos_b, sign, HKV, D, BD, BR)


@triton.jit
def _rotate_rows(
    X, COS, SIN, OUT, program, blocks, length, x_b, x_t, x_h, cos_b, sign,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = D // 2
    b = tl.cast(program // blocks, tl.int64)
    start = tl.cast(program % blocks, tl.int64) * BR
    i = tl.cast(start % H, tl.int32) + tl.arange(0, BR)
    t = start // H + i // H
    h = tl.cast(i % H, tl.int64)
    d = tl.arange(0, BD)
    inside = (t < length)[:, None] & (d < half)[None, :]
    angle = (b * cos_b + t)[:, None] * half + d[None, :]
    p = X + (b * x_b + t * x_t + h * x_h)[:, None] * D + d[None, :]
    first = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(p + half, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(COS + angle, mask=inside, other=0.0)
    sin = tl.load(SIN + angle, mask=inside, other=0.0) * sign
    p = OUT + ((b * length + t) * H + h)[:, None] * D + d[None, :]
    tl.store(p, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(p + half, (second * cos + first * sin).to(OUT.dtype.element_ty), mask=inside)


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> list[Tensor]:
    B, T, HQ, D = q.shape
    HKV = k.shape[2]
    results = [q.new_empty(q.shape), k.new_empty(k.shape)]
    (q, *q_strides), (k, *k_strides) = _strided(q), _strided(k)
    size = triton.next_power_of_2(D // 2)
    rows = max(1, PAIRS // size)
    q_blocks, k_blocks = -(-T * HQ // rows), -(-T * HKV // rows)
    launch(
        _rotate, B * (q_blocks + k_blocks), q, k, cos, sin, *results,
        T, B * q_blocks, q_blocks, k_blocks, *q_strides, *k_strides, T if cos.shape[0] > 1 else 0, sign,
        HQ=HQ, HKV=HKV, D=D, BD=size, BR=rows, warps=4,
    )  # fmt: skip
    return results


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x ``[B, T, H, D]`` and its strides in units of D; a copy where they are none."""
    D = x.shape[3]
    # (The stride of a dimension of size 1 says nothing.)
    strides = [s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True)]
    if strides[3] != 1 or any(s % D for s in strides[:3]):
        x = x.contiguous()
        strides = [s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True)]
    b, t, h, _ = strides
    return x, b // D, t // D, h // D


def _backward(plan: str, tensors, saved, grads, needed) -> list[Tensor | None]:
    q, k, cos, sin = tensors
    dq, dk = (torch.zeros_like(x) if dx is None else dx for x, dx in zip((q, k), grads, strict=True))
    found = [*_run(dq, dk, cos, sin, -1.0), None, None]
    return [y if need else None for y, need in zip(found, needed, strict=True)]


_operation = Operation(
    "rotary",
    lambda plan, q, k, cos, sin, *, keep: (_run(q, k, cos, sin, 1.0), []),
    lambda plan, q, k, cos, sin: ([q.new_empty(q.shape), k.new_empty(k.shape)], []),
    _backward,
    lambda plan: 2,
)


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotated` takes such tensors."""
    B, T, _, D = q.shape
    return (
        q.dtype == k.dtype != torch.float64 and cos.dtype == torch.float32 and D <= LARGEST and q.numel() > 0
        and cos.shape[0] in (1, B) and cos.shape[1] == T and not (cos.requires_grad or sin.requires_grad)
    )  # fmt: skip


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``apply_rope`` of q ``[B, T, HQ, D]`` and k ``[B, T, HKV, D]``, contiguous; see `fits`.

    cos and sin are those of `hla.rotary.rope_cos_sin`, in float32. q and k are best parts of a tensor of heads: any
    strides that are multiples of D, features side by side. Others are copied first.
    """
    q, k = _operation("", 2, q, k, cos.contiguous(), sin.contiguous())
    return q, k
