"""How a batch of sequences is cut into chunks, and how the states between chunks are walked.

Chunked work has the layout ``[B, M, H, C, D]``: M chunks of C tokens with the head before the token, so that every
step is a batch of small matrix products and the query heads of one key head are neighbouring rows. Two layouts exist:

- `Uniform`: B sequences of equal length; chunk m of every sequence covers the same tokens.
- `Packed`: N sequences in one row given by ``cu_seqlens``; a chunk never spans two sequences. All its index arithmetic
  stays on the device (the number of chunks is the bound ``T // C + N``), so nothing waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(device: torch.device) -> torch.dtype:
    """The dtype of cumulated decays: their differences must keep float32's digits after a decay of -1000, a reset."""
    return torch.float32 if device.type == "mps" else torch.float64


class Uniform:
    """B sequences of T tokens each, cut into chunks of C tokens; the last chunk is padded with zeros."""

    def __init__(self, batch: int, length: int, chunk: int):
        self.sequences, self.length, self.chunk = batch, length, chunk
        self.num_chunks = -(-length // chunk)

    def load(self, x: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Chunks ``first .. last - 1`` of ``[B, T, H, D]`` as contiguous ``[B, M, H, C, D]`` of the given dtype."""
        x = x[:, first * self.chunk : last * self.chunk]
        if missing := (last - first) * self.chunk - x.shape[1]:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        x = x.unflatten(1, (last - first, self.chunk)).transpose(2, 3)
        return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)

    def new_output(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[B, T, H, D]`` to be filled by `store`."""
        return torch.empty(shape, dtype=dtype, device=device)

    def store(self, out: Tensor, y: Tensor, first: int, last: int) -> None:
        """The inverse of `load`: writes chunks into ``out [B, T, H, D]``."""
        target = out[:, first * self.chunk : last * self.chunk]
        y = y.transpose(2, 3)
        if target.shape[1] == (last - first) * self.chunk:
            target.unflatten(1, (last - first, self.chunk)).copy_(y)
        else:
            target.copy_(y.flatten(1, 2)[:, : target.shape[1]])

    def finish_output(self, out: Tensor) -> Tensor:
        return out

    def walk(self, initial: Tensor, reverse: bool) -> _UniformWalk:
        return _UniformWalk(initial, reverse)

    def reverse_cumsum(self, dc: Tensor, at_ends: Tensor | None) -> Tensor:
        """``sum_{s >= t} dc_s`` within each sequence, in float64; ``at_ends [B, H]`` is added at the last tokens."""
        total = dc.to(wide(dc.device)).flip(1).cumsum(1).flip(1)
        return total if at_ends is None else total + at_ends[:, None]


class Packed:
    """N sequences in one row of T tokens, ``cu_seqlens [N + 1]``; sequences may be empty."""

    def __init__(self, cu_seqlens: Tensor, length: int, chunk: int):
        cu = cu_seqlens.long()
        lengths = cu.diff()
        # Every sequence, also an empty one, gets at least one chunk, so that its states pass from start to end.
        per_sequence = ((lengths + chunk - 1) // chunk).clamp(min=1)
        chunk_end = per_sequence.cumsum(0)
        self.sequences, self.length, self.chunk = lengths.numel(), length, chunk
        self.num_chunks = length // chunk + self.sequences
        m = torch.arange(self.num_chunks, device=cu.device)
        sequence = torch.searchsorted(chunk_end, m, right=True)
        used = sequence < self.sequences
        self.sequence = sequence.clamp(max=self.sequences - 1)
        index_in_sequence = m - (chunk_end - per_sequence)[self.sequence]
        self.is_first = used & (index_in_sequence == 0)
        self.is_last = used & (index_in_sequence == per_sequence[self.sequence] - 1)
        offset = index_in_sequence[:, None] * chunk + torch.arange(chunk, device=cu.device)
        self.valid = (used[:, None] & (offset < lengths[self.sequence][:, None])).flatten()
        token = (cu[self.sequence][:, None] + offset).flatten()
        self.read = torch.where(self.valid, token, 0)  # pads read token 0 and are zeroed
        self.write = torch.where(self.valid, token, length)  # pads write to one spare row behind the last token
        self.cu = cu

    def load(self, x: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
        span = slice(first * self.chunk, last * self.chunk)
        if x.shape[1] == 0:
            rows = x.new_zeros(span.stop - span.start, *x.shape[2:], dtype=dtype)
        else:
            rows = x[0].index_select(0, self.read[span]).masked_fill_(~self.valid[span, None, None], 0).to(dtype)
        return rows.unflatten(0, (last - first, self.chunk)).transpose(1, 2).contiguous()[None]

    def new_output(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.empty((shape[0], shape[1] + 1, *shape[2:]), dtype=dtype, device=device)

    def store(self, out: Tensor, y: Tensor, first: int, last: int) -> None:
        rows = y[0].transpose(1, 2).flatten(0, 1).to(out.dtype)
        out[0].index_copy_(0, self.write[first * self.chunk : last * self.chunk], rows)

    def finish_output(self, out: Tensor) -> Tensor:
        return out[:, :-1]

    def walk(self, initial: Tensor, reverse: bool) -> _PackedWalk:
        return _PackedWalk(self, initial, reverse)

    def reverse_cumsum(self, dc: Tensor, at_ends: Tensor | None) -> Tensor:
        total = F.pad(dc[0].to(wide(dc.device)).flip(0).cumsum(0), (0, 0, 1, 0)).flip(0)  # [T + 1, H]
        after = total[self.cu[1:]]  # what belongs to later sequences
        if at_ends is not None:
            after = after - at_ends
        token = torch.arange(self.length, device=dc.device)
        sequence = torch.searchsorted(self.cu[1:].contiguous(), token, right=True)
        return (total[:-1] - after[sequence])[None]


class _UniformWalk:
    """The recurrence ``x <- rho x + u`` over the chunks of B sequences, a block of chunks at a time.

    Within a block of M chunks it is one matrix product with the (M + 1) x (M + 1) lower-triangular matrix of decays
    between chunk borders: M is small, and M products with tiny operands would cost more than the arithmetic.
    """

    def __init__(self, initial: Tensor, reverse: bool):
        self.carry, self.reverse = initial, reverse

    def block(self, u: Tensor, log_rho: Tensor | None, first: int, last: int) -> Tensor:
        """States that *enter* the chunks, ``[B, M, H, K, V]``; ``u`` of that shape, ``log_rho [B, M, H]`` `wide`."""
        B, M, H, K, V = u.shape
        decays = self._decays(u, log_rho, first, last)  # [B or 1, H or 1, M + 1, M + 1]
        x = decays[..., 1:] @ u.reshape(B, M, H, K * V).transpose(1, 2)
        x = x.addcmul_(decays[..., :1], self.carry.reshape(B, H, 1, K * V)).unflatten(-1, (K, V))
        self.carry = x[:, :, -1].clone()  # a view would keep the states of the whole block alive
        return x[:, :, :-1].transpose(1, 2)

    def _decays(self, u: Tensor, log_rho: Tensor | None, first: int, last: int) -> Tensor:
        """Row m: what enters chunk m (the last row: what leaves the block); columns: the carry, then each chunk's u."""
        M = u.shape[1]
        mask = self._reachable(M, first, last, u.device)
        if log_rho is None:
            matrix = mask.to(u.dtype)[None, None]
        else:
            steps = log_rho.transpose(1, 2)  # [B, H, M]
            c = F.pad((steps.flip(-1) if self.reverse else steps).cumsum(-1), (1, 0))
            matrix = (c[..., :, None] - c[..., None, :]).masked_fill(~mask, float("-inf")).to(u.dtype).exp()
        if self.reverse:  # from scan order to the order of the chunks
            matrix = torch.cat([matrix[..., :-1, :].flip(-2), matrix[..., -1:, :]], -2)
            matrix = torch.cat([matrix[..., :1], matrix[..., 1:].flip(-1)], -1)
        return matrix

    def _reachable(self, M: int, first: int, last: int, device: torch.device) -> Tensor:
        return torch.ones(M + 1, M + 1, dtype=torch.bool, device=device).tril()

    @property
    def final(self) -> Tensor:
        return self.carry


class _PackedWalk(_UniformWalk):
    """The same over packed sequences: at the end of one the state is put aside and the next initial state taken."""

    def __init__(self, layout: Packed, initial: Tensor, reverse: bool):
        self.layout, self.initial = layout, initial
        start = layout.sequences - 1 if reverse else 0
        super().__init__(initial[start : start + 1], reverse)
        self.ends = layout.is_first if reverse else layout.is_last
        self.finals = torch.zeros(
            (initial.shape[0] + 1, *initial.shape[1:]), dtype=initial.dtype, device=initial.device
        )

    def block(self, u: Tensor, log_rho: Tensor | None, first: int, last: int) -> Tensor:
        sequences = self.layout.sequences
        ends, sequence = self.ends[first:last], self.layout.sequence[first:last]
        following = (sequence + (-1 if self.reverse else 1)).clamp(0, sequences - 1)
        # At an end nothing of the old sequence goes on (see _reachable) and u is the next sequence's initial state.
        states = super().block(torch.where(ends[:, None, None, None], self.initial[following], u), log_rho, first, last)
        rho = 1.0 if log_rho is None else log_rho[0, :, :, None, None].to(u.dtype).exp()
        final = u[0] + rho * states[0]
        self.finals.index_copy_(0, torch.where(ends, sequence, sequences), final)
        return states

    def _reachable(self, M: int, first: int, last: int, device: torch.device) -> Tensor:
        ends = self.ends[first:last]
        passed = F.pad((ends.flip(0) if self.reverse else ends).cumsum(0), (1, 0))
        return super()._reachable(M, first, last, device) & (passed[:, None] == passed)

    @property
    def final(self) -> Tensor:
        return self.finals[:-1]
