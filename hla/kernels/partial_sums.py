"""The second half of sums over tokens: what programs have added up one by one is added up, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.launch import launch

ROWS, COLUMNS = 256, 32  # of a tile; a row of it is one transaction


@triton.jit(do_not_specialize=["rows"])
def _added_up(X, OUT, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """The sum of rows, of BC columns."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BR, BC], tl.float32)
    for first in range(0, rows, BR):
        row = tl.cast(first, tl.int64) + tl.arange(0, BR)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(X + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(OUT + column, tl.sum(total, 0), mask=column < columns)


def added_up(parts: Tensor) -> Tensor:
    """The sum over the first dimension of ``[programs, ...]``, float32.

    (`torch.sum` waits twice as long for so few numbers, for it spreads a column over programs that meet in memory.)
    """
    parts = parts.contiguous()
    total = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    columns = total.numel()
    if columns:
        launch(
            _added_up, -(-columns // COLUMNS), parts, total, parts.shape[0], columns, BR=ROWS, BC=COLUMNS, warps=8,
        )  # fmt: skip
    return total
