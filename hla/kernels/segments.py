"""How sequences are cut into segments that are walked in parallel, and the fold of what the segments accumulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hla.kernels.configs import device_config
from hla.kernels.launch import launch

INVARIANT_SEGMENT = 2048
SHORTEST_SEGMENT = 256  # a split costs another pass over keys and values, and one more launch
ROWS, HEADS = 1024, 4  # of a tile of sums over tokens
_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside, the split of a sequence depends on its length alone, never on the batch or the number of heads.

    A sequence then gives the same bits in every batch (by default the split fills the card, and with it changes the
    order of float32 sums). It costs speed where few sequences are long.
    """
    global _batch_invariant
    before, _batch_invariant = _batch_invariant, enabled
    try:
        yield
    finally:
        _batch_invariant = before


def is_batch_invariant() -> bool:
    return _batch_invariant


@dataclass(frozen=True)
class Cut:
    """Segments of a batch: ``slots`` of them, at most ``segment`` tokens each.

    Sequences of one length T: slot ``b * per_sequence + i``. Packed ones: ``table [slots, 4]`` on the device holds
    (sequence or -1, start, stop, 1 if first + 2 if last), ``first [N + 1]`` the first slot of each sequence.
    """

    sequences: int
    length: int
    segment: int
    per_sequence: int
    slots: int
    table: Tensor | None = None
    first: Tensor | None = None

    @property
    def split(self) -> bool:
        return self.slots > self.sequences


def cut(batch: int, length: int, programs: int, cu_seqlens: Tensor | None, device: torch.device) -> Cut:
    """Cuts so that the card is filled; ``programs``: how many one segment occupies (heads x blocks of columns)."""
    wanted = 2 * device_config(device)[1]
    total = batch * length
    if _batch_invariant:
        segment = INVARIANT_SEGMENT
    elif cu_seqlens is None:
        pieces = max(1, round(wanted / max(1, batch * programs)))
        segment = max(SHORTEST_SEGMENT, -(-length // pieces))
    else:
        segment = max(SHORTEST_SEGMENT, -(-total * programs // wanted))
    return cut_every(-(-segment // 64) * 64, batch, length, cu_seqlens, device)


def cut_every(segment: int, batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Cut:
    """Segments of this many tokens; the last one of a sequence may be shorter."""
    if cu_seqlens is None:
        per_sequence = max(1, -(-length // segment))
        return Cut(batch, length, segment, per_sequence, batch * per_sequence)
    sequences = cu_seqlens.numel() - 1
    slots = length // segment + sequences
    table = torch.full((slots, 4), -1, dtype=torch.int32, device=device)
    first = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    launch(_table, sequences, cu_seqlens, table, first, sequences, segment, N=1024)
    return Cut(sequences, length, segment, 0, slots, table, first)


@triton.jit(do_not_specialize=["sequences", "segment"])
def _table(CU, TABLE, FIRST, sequences, segment, N: tl.constexpr):
    """Program n writes the rows of sequence n, after those of all sequences before it."""
    n = tl.program_id(0)
    row = 0
    for i in range(0, tl.cdiv(n, N)):
        m = i * N + tl.arange(0, N)
        lengths = tl.load(CU + m + 1, mask=m < n, other=0) - tl.load(CU + m, mask=m < n, other=0)
        row += tl.sum(tl.where(m < n, tl.maximum(tl.cdiv(lengths.to(tl.int32), segment), 1), 0), 0)
    start = tl.load(CU + n).to(tl.int32)
    stop = tl.load(CU + n + 1).to(tl.int32)
    count = tl.maximum(tl.cdiv(stop - start, segment), 1)
    for i in range(0, count):
        p = TABLE + (row + i) * 4
        tl.store(p, n)
        tl.store(p + 1, start + i * segment)
        tl.store(p + 2, tl.minimum(start + (i + 1) * segment, stop))
        tl.store(p + 3, tl.where(i == 0, 1, 0) + tl.where(i == count - 1, 2, 0))
    tl.store(FIRST + n, row)
    if n == sequences - 1:
        tl.store(FIRST + n + 1, row + count)


def enter(states: Tensor, totals: Tensor | None, initial: Tensor | None, shape: Cut, reverse: bool) -> None:
    """In place: from what each segment accumulated to the state that enters it.

    Args:
        states: ``[slots, H, K, V]`` float32; what the last segment of each sequence holds, if anything, is not read.
        totals: ``[slots, H]`` log2-decay over each segment, or None. initial: ``[sequences, H, K, V]`` or None.
    """
    _, heads, K, V = states.shape
    size, block = K * V, 1024
    strides = (0, 0, 0, 0) if initial is None else initial.stride()
    launch(
        _enter, triton.cdiv(size, block) * heads * shape.sequences,
        states, totals, initial, shape.first, shape.per_sequence, heads, size, V, *strides,
        REVERSE=reverse, BLOCK=block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["per_sequence", "heads", "size", "V", "i_n", "i_h", "i_k", "i_v"])
def _enter(
    STATES, TOTALS, INITIAL, FIRST, per_sequence, heads, size, V, i_n, i_h, i_k, i_v,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    x = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    h = (tl.program_id(0) // blocks) % heads
    n = tl.program_id(0) // (blocks * heads)
    inside = x < size
    if FIRST is None:
        first, count = n * per_sequence, per_sequence
    else:
        first = tl.load(FIRST + n)
        count = tl.load(FIRST + n + 1) - first
    carry = tl.zeros([BLOCK], tl.float32)
    if INITIAL is not None:
        p = INITIAL + tl.cast(n, tl.int64) * i_n + h * i_h + (x // V) * i_k + (x % V) * i_v
        carry = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, count):
        slot = first + (count - 1 - i if REVERSE else i)
        p = STATES + (tl.cast(slot, tl.int64) * heads + h) * size + x
        own = tl.zeros([BLOCK], tl.float32)
        if i < count - 1:
            own = tl.load(p, mask=inside, other=0.0)
        tl.store(p, carry, mask=inside)
        if i < count - 1:
            if TOTALS is not None:
                carry *= tl.exp2(tl.load(TOTALS + slot * heads + h))
            carry += own


def folded(
    states: Tensor, totals: Tensor | None, initial: Tensor | None = None, *, parts: range | Tensor | None = None,
    reverse: bool = False, factor: float = 1.0, out: Tensor | None = None, decay: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The state ``[N, H, K, V]`` after some parts of N sequences, in reverse from behind before them.

    Args:
        states: ``[P, N, H, K, V]`` float32, what each part adds to a state; heads, K and V contiguous.
        totals: ``[P, N, H]``, the log2 of their decays, heads contiguous; None: nothing decays.
        initial: ``[N, H, K, V]``, any strides.
        parts: which, one behind the other: a range, or on the device the first and the one behind the last; None: all.
        factor: of the result. out, decay: where the result and the sums of totals go, contiguous; decay ``[N, H]``.
    """
    P, N, heads, K, V = states.shape
    if out is None:
        out = torch.empty(N, heads, K, V, dtype=torch.float32, device=states.device)
    on_device = parts if isinstance(parts, Tensor) else None
    first, stop = (parts.start, parts.stop) if isinstance(parts, range) else (0, P)
    block = 1024
    launch(
        _fold, triton.cdiv(K * V, block) * heads * N,
        states, totals, initial, out, decay, on_device, first, stop, heads, K * V, V, float(factor),
        *states.stride()[:2], *((0, 0) if totals is None else totals.stride()[:2]),
        *((0, 0, 0, 0) if initial is None else initial.stride()), REVERSE=reverse, BLOCK=block,
    )  # fmt: skip
    return out


def fold_segments(
    states: Tensor, totals: Tensor | None, shape: Cut, *, parts: Tensor | None = None, reverse: bool = False,
    factor: float = 1.0, out: Tensor | None = None, decay: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`folded` of what segments do, ``[slots, H, K, V]`` and ``[slots, H]``; of packed ones that of `parts_of` one."""

    def in_parts(x: Tensor) -> Tensor:
        """``[parts, sequences, ...]``"""
        return (
            x[:, None] if parts is not None else x.unflatten(0, (shape.sequences, shape.per_sequence)).transpose(0, 1)
        )

    totals = None if totals is None else in_parts(totals)
    return folded(in_parts(states), totals, parts=parts, reverse=reverse, factor=factor, out=out, decay=decay)


def parts_of(sequence: Tensor, shape: Cut) -> Tensor:
    """The slots ``[2]`` of a packed sequence ``[1]``, first and behind the last."""
    assert shape.first is not None
    return shape.first[sequence + torch.arange(2, device=sequence.device)]


@triton.jit(
    do_not_specialize=[
        "first", "stop", "heads", "size", "V", "factor", "s_j", "s_n", "t_j", "t_n", "i_n", "i_h", "i_k", "i_v",
    ]
)  # fmt: skip
def _fold(
    STATES, TOTALS, INITIAL, OUT, DECAY, PARTS, first, stop, heads, size, V, factor, s_j, s_n, t_j, t_n,
    i_n, i_h, i_k, i_v, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK)
    block = tl.program_id(0) % blocks
    x = block * BLOCK + tl.arange(0, BLOCK)
    h = (tl.program_id(0) // blocks) % heads
    n = tl.cast(tl.program_id(0) // (blocks * heads), tl.int64)
    inside = x < size
    carry = tl.zeros([BLOCK], tl.float32)
    passed = 0.0
    if PARTS is not None:
        first = tl.load(PARTS).to(tl.int32)
        stop = tl.load(PARTS + 1).to(tl.int32)
    if INITIAL is not None:
        p = INITIAL + n * i_n + h * i_h + (x // V) * i_k + (x % V) * i_v
        carry = tl.load(p, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, stop - first):
        j = tl.cast(stop - 1 - i if REVERSE else first + i, tl.int64)
        own = tl.load(STATES + j * s_j + n * s_n + h * size + x, mask=inside, other=0.0)
        if TOTALS is not None:
            total = tl.load(TOTALS + j * t_j + n * t_n + h)
            carry *= tl.exp2(total)
            passed += total
        carry += own
    tl.store(OUT + (n * heads + h) * size + x, carry * factor, mask=inside)
    if DECAY is not None:
        if block == 0:
            tl.store(DECAY + n * heads + h, passed)


def sum_later(dc: Tensor, at_ends: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``sum_{s >= t} dc_s`` within each sequence, ``[B, T, H]`` float32; ``at_ends [N, H]`` is added at last tokens."""
    return _sums(dc, at_ends, cu_seqlens, earlier=False)


def minus_earlier(dc: Tensor, at_starts: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``at_starts - sum_{s < t} dc_s`` within each sequence, ``[B, T, H]`` float32; ``at_starts [N, H]`` or None.

    The same as `sum_later` where ``at_starts`` is the sum of everything, ends included, and more precise where ends are
    large and come from another pass: then they need not cancel.
    """
    return _sums(dc, at_starts, cu_seqlens, earlier=True)


def _sums(dc: Tensor, borders: Tensor | None, cu_seqlens: Tensor | None, earlier: bool) -> Tensor:
    out = torch.empty_like(dc, memory_format=torch.contiguous_format)
    B, T, H = dc.shape
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    blocks = triton.cdiv(H, HEADS)
    if not out.numel():
        return out
    dc, borders = dc.contiguous(), None if borders is None else borders.float().contiguous()
    # Long sequences in parts at once, each of which begins with the sums of those that the walk met before.
    parts = 1 if cu_seqlens is not None else triton.cdiv(T, ROWS)
    sums = torch.empty(sequences, parts, H, dtype=torch.float64, device=dc.device) if parts > 1 else None
    for result in (None, out) if parts > 1 else (out,):
        launch(
            _sum, sequences * parts * blocks, dc, borders, sums, cu_seqlens, result, T, H, blocks, parts,
            EARLIER=earlier, ROWS=ROWS, HEADS=HEADS, MANY=64, warps=8,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["length", "heads", "blocks", "parts"])
def _sum(
    DC, BORDERS, SUMS, CU, OUT, length, heads, blocks, parts, EARLIER: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Some heads of a sequence, or with SUMS ``[sequences, parts, heads]`` those of ROWS of its tokens: without OUT
    their sums. (Sequences of the table CU are one part each.)"""
    h = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    part = (tl.program_id(0) // blocks) % parts
    n = tl.program_id(0) // (blocks * parts)
    if CU is None:
        start = tl.cast(n, tl.int64) * length
        stop = start + length
    else:
        start = tl.load(CU + n).to(tl.int64)
        stop = tl.load(CU + n + 1).to(tl.int64)
    carry = tl.zeros([HEADS], tl.float64)
    if OUT is not None:
        if BORDERS is not None:
            carry += tl.load(BORDERS + n * heads + h, mask=h < heads, other=0.0)
    if SUMS is not None:
        start += tl.cast(part, tl.int64) * ROWS
        stop = tl.minimum(stop, start + ROWS)
        if OUT is not None:
            for first in range(0, parts, MANY):
                i = first + tl.arange(0, MANY)
                met = i < part if EARLIER else (i > part) & (i < parts)
                at = (n * parts + i)[:, None] * heads + h[None, :]
                sums = tl.sum(tl.load(SUMS + at, mask=met[:, None] & (h < heads)[None, :], other=0.0), 0)
                carry += -sums if EARLIER else sums
    for i in range(0, tl.cdiv(stop - start, ROWS)):
        t = (start + i * ROWS if EARLIER else stop - (i + 1) * ROWS) + tl.arange(0, ROWS)
        inside = ((t >= start) & (t < stop))[:, None] & (h < heads)[None, :]
        at = t[:, None] * heads + h[None, :]
        x = tl.load(DC + at, mask=inside, other=0.0)
        if OUT is None:
            tl.store(SUMS + (n * parts + part) * heads + h, tl.sum(x.to(tl.float64), 0), mask=h < heads)
        elif EARLIER:
            y = carry[None, :] - (tl.cumsum(x, 0) - x)
            carry -= tl.sum(x, 0)
            tl.store(OUT + at, y.to(tl.float32), mask=inside)
        else:
            y = carry[None, :] + tl.cumsum(x, 0, reverse=True)
            carry += tl.sum(x, 0)
            tl.store(OUT + at, y.to(tl.float32), mask=inside)
