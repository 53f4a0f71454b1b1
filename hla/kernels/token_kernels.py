"""The kernels of `token`: products of one row or two, and of a few; norms and sums between them."""

from __future__ import annotations

import triton
import triton.language as tl

from hla.kernels.launch import wait
from hla.kernels.shape import sigmoid


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
    D: tl.constexpr, WIDTH: tl.constexpr, SWIGLU: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``OUT[b] = norm(x_b) [W; W1; ...]^T`` (+ residual) of at most ROWS rows, without the matrix units.

    BN rows of one weight ``[n, D]`` per program, as many bytes in flight as registers hold.
    WHOLE (x as it is): all of these rows are asked for at once, and x is where its products are: with as many warps as
    rows, and 256 columns at a time, nothing passes between threads before the sum over a row.
    WIDTH: x is normalised in parts of so many numbers, a power of two (with NORM), and multiplied by silu(GATE); 0:
    normalised as a whole.
    SWIGLU: ``silu(x W^T) * (x W1^T)``. The norm over all of x is applied to the products, so x is read once.
    """
    PER_HEAD: tl.constexpr = WIDTH > 0
    pid = tl.program_id(0)
    if SWIGLU:
        weight, size, column, first = W, n, 0, 0
    else:
        weight, size, column, first = _weight(pid, W, W1, W2, W3, W4, n, n1, n2, n3, n4, BN)
    b = tl.arange(0, ROWS)
    rows = (pid - first) * BN + tl.arange(0, BN)
    inside = rows < size
    extra = 0.0
    if RESIDUAL is not None:  # asked for ahead of `wait`
        live = (b < batch)[:, None] & inside[None, :]
        extra = tl.load(RESIDUAL + b[:, None] * o_b + (column + rows)[None, :], mask=live, other=0.0).to(tl.float32)
    acc = tl.zeros([ROWS, BN], tl.float32)
    up = tl.zeros([ROWS, BN], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    STEPS: tl.constexpr = (D + BK - 1) // BK
    tl.static_assert(not WHOLE or (NORM is None and GATE is None and not SWIGLU))
    if WHOLE:
        columns = tl.zeros([BN], tl.int32)[:, None] + tl.arange(0, BK)[None, :]
        ws = ()
        for i in tl.static_range(STEPS):
            k = i * BK + columns
            w = tl.load(weight + rows[:, None] * D + k, mask=inside[:, None] & (k < D), other=0.0)
            ws += (w,)  # type: ignore[assignment]
        wait(PDL)
        for row in tl.static_range(ROWS):
            products = tl.zeros([BN, BK], tl.float32)
            for i in tl.static_range(STEPS):
                k = i * BK + columns
                x = tl.load(X + row * x_b + k, mask=k < tl.where(row < batch, D, 0), other=0.0)
                products += ws[i].to(tl.float32) * x.to(tl.float32)
            acc += tl.where((b == row)[:, None], tl.sum(products, 1)[None, :], 0.0)
    for i in tl.static_range(0 if WHOLE else STEPS):
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
    if NORM is not None and not PER_HEAD:
        scale = tl.rsqrt(squares / D + eps)[:, None]
        acc *= scale
        up *= scale
    if SWIGLU:
        acc *= sigmoid(acc) * up
    live = (b < batch)[:, None] & inside[None, :]
    tl.store(OUT + b[:, None] * o_b + (column + rows)[None, :], (acc + extra).to(OUT.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["batch"])
def product(
    X, W, W1, W2, W3, W4, OUT, batch, n, n1, n2, n3, n4,
    D: tl.constexpr, SWIGLU: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, OPERAND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``OUT = X [W; W1; ...]^T`` of ``X [batch, D]``: ROWS of these, and BN rows of a weight ``[n, D]``, per program.

    Rows of the weight are rows of the matrix units (which take 64 at a time on Hopper GPUs), those of x are columns.
    PARTS: ``OUT [PARTS, batch, n]`` of as many parts of the columns, each by a program of its own; `add_up` adds them.
    SWIGLU: ``silu(X W^T) * (X W1^T)``, with half of the rows of a tile from each.
    """
    tl.static_assert(PARTS == 1 or not SWIGLU)
    # Programs with the same part of the weight are neighbours: one reads it from memory, the others from the cache.
    blocks = tl.cdiv(batch, ROWS)
    b = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(0) // blocks % PARTS
    pid = tl.program_id(0) // blocks // PARTS
    r = tl.arange(0, BN)
    if SWIGLU:
        HALF: tl.constexpr = BN // 2
        rows = pid * HALF + r % HALF
        size, width = n, n
        # (`token.fits` wants weights that start at 16 bytes; Triton 3.9 does not see it behind the choice. Said of both
        # dimensions, as the word overrides what the compiler knows, and 3.6 copies by what it knows of the second.)
        weight = tl.multiple_of(tl.where(r < HALF, W, W1)[:, None], (16, 16))
    else:
        weight, size, column, first = _weight(pid, W, W1, W2, W3, W4, n, n1, n2, n3, n4, BN)
        rows = (pid - first) * BN + r
        width = n + n1 + n2 + n3 + n4
    inside = rows < size
    live = b < batch
    kk = tl.arange(0, BK)
    STEPS: tl.constexpr = (D + BK - 1) // BK
    EACH: tl.constexpr = (STEPS + PARTS - 1) // PARTS
    wait(PDL)
    acc = tl.zeros([BN, ROWS], tl.float32)
    for i in range(part * EACH, tl.minimum(part * EACH + EACH, STEPS)):
        k = i * BK + kk
        if D % BK == 0:
            x = tl.load(X + b[:, None] * D + k[None, :], mask=live[:, None], other=0.0)
            w = tl.load(weight + rows[:, None] * D + k[None, :], mask=inside[:, None], other=0.0)
        else:
            there = (k < D)[None, :]
            x = tl.load(X + b[:, None] * D + k[None, :], mask=live[:, None] & there, other=0.0)
            w = tl.load(weight + rows[:, None] * D + k[None, :], mask=inside[:, None] & there, other=0.0)
        acc = tl.dot(w.to(OPERAND), tl.trans(x.to(OPERAND)), acc)
    out = OUT + part * batch * width + b[None, :] * width
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, HALF, ROWS]), [1, 2, 0]))
        rows = pid * HALF + tl.arange(0, HALF)
        acc = gate * sigmoid(gate) * up
        tl.store(out + rows[:, None], acc.to(OUT.dtype.element_ty), mask=live[None, :] & (rows < size)[:, None])
    else:
        tl.store(out + (column + rows)[:, None], acc.to(OUT.dtype.element_ty), mask=live[None, :] & inside[:, None])


@triton.jit
def add_up(
    PARTIAL, RESIDUAL, NORM, SUM, OUT, stride, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``SUM = RESIDUAL + sum PARTIAL`` of ``PARTIAL [PARTS, rows, WIDTH]`` and, with NORM, ``OUT = norm(SUM)``; one row
    per program. stride: from part to part."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < WIDTH
    extra = tl.load(RESIDUAL + at, mask=inside, other=0.0)  # (from a launch before the previous one)
    if NORM is not None:
        factors = tl.load(NORM + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(PARTIAL + part * stride + at, mask=inside, other=0.0)
    total = (y + extra.to(tl.float32)).to(SUM.dtype.element_ty)
    tl.store(SUM + at, total, mask=inside)
    if NORM is not None:
        y = total.to(tl.float32)
        y *= tl.rsqrt(tl.sum(y * y, 0) / WIDTH + eps)
        tl.store(OUT + at, (y * factors).to(OUT.dtype.element_ty), mask=inside)


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
