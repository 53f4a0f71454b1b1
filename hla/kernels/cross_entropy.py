"""Cross-entropy of rows of logits, and its gradient in their place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.launch import launch

COLUMNS = 4096  # of a row at a time, at most
PER_WARP = 512  # of them


@triton.jit
def _cross_entropy(LOGITS, TARGETS, LOSSES, V, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """One row: the largest logit and the sum of exponentials below it in one pass, the gradient in a second one, which
    finds the row in the L2 cache."""
    row = tl.cast(tl.program_id(0), tl.int64)
    LOGITS += row * V
    target = tl.load(TARGETS + row)
    column = tl.arange(0, BLOCK)
    if target == -100:
        tl.store(LOSSES + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                zeros = tl.zeros([BLOCK], LOGITS.dtype.element_ty)
                tl.store(LOGITS + start + column, zeros, mask=start + column < V)
    else:
        # (Another target that is no column is not read: its loss is NaN.)
        wanted = tl.load(LOGITS + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
        # Finite, so that columns of -inf ahead of the first number add exp(-inf) = 0 and not exp(-inf + inf) = NaN.
        # NaN, which a maximum may leave out, is in the sum.
        top = -3.4028234663852886e38
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(LOGITS + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            sums = sums * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        total = tl.sum(sums, 0)
        tl.store(LOSSES + row, top - wanted + tl.log(total))
        if GRADIENT:
            share = 1.0 / total
            for start in range(0, V, BLOCK):
                inside = start + column < V
                x = tl.load(LOGITS + start + column, mask=inside, other=float("-inf")).to(tl.float32)
                dx = tl.exp(x - top) * share - tl.where(start + column == target, 1.0, 0.0)
                tl.store(LOGITS + start + column, dx.to(LOGITS.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """Writes ``-log softmax(logits)[target]`` of each row, computed in float32.

    Args:
        logits: ``[rows, V]``, contiguous, in bfloat16, float16 or float32.
        targets: int64 ``[rows]``, contiguous. At -100 loss and gradient are 0; other numbers outside of ``[0, V)`` have
            a loss of NaN.
        losses: float32 ``[rows]``, contiguous, what is written.
        gradient: the logits are overwritten by the gradient of their row's loss, ``softmax(logits) - onehot(target)``.
    """
    V = logits.shape[1]
    size = min(COLUMNS, triton.next_power_of_2(V))
    launch(
        _cross_entropy, len(targets), logits, targets, losses, V,
        BLOCK=size, GRADIENT=gradient, warps=max(1, size // PER_WARP),
    )  # fmt: skip
