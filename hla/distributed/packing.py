"""From the summaries of the pieces to the state that enters a piece, with or without packed sequences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hla.distributed.exchange import Exchange
from hla.ops.checks import Call


def fold(
    initial: Any, after: Callable[[Any, int], Any], rank: int, size: int | None, packing: Packing | None
) -> tuple[Any, Any]:
    """The state that enters the piece of ``rank``, and the one after the last of ``size`` pieces (None: not wanted).

    ``after(state, j)`` is the state after piece j. In a packed row the state is that of the sequence at the border: it
    begins with the initial one of that sequence wherever that sequence begins.
    """
    state = initial if packing is None else rebuilt(initial, packing.at(initial, 0))
    entering = state
    for j in range(rank if size is None else size):
        if packing is not None:
            begun, fresh = packing.at(initial, j + 1), packing.fresh[j]
            pairs = zip(begun, state, strict=True)
            state = rebuilt(state, [None if x is None else torch.where(fresh, x, y) for x, y in pairs])
        state = after(state, j)
        if j + 1 == rank:
            entering = state
    return entering, None if size is None else state


def fold_sums(
    initial: Any, told: Sequence[Tensor], rank: int, size: int | None, packing: Packing | None, *, from_zero: bool
) -> tuple[Any, Any]:
    """As `fold`, for states that decay and have something added: one weighted sum over the pieces, not one by one.

    Args:
        told: of all pieces, their log-decays ``[ranks, B, H]`` and what they add to each part of the state ``[ranks, B,
            H, ...]``, the first ones (of which the others are None).
        from_zero: whether initial is zeros.
    """

    def at(border: int) -> Any:
        """The state at a border."""
        parts = list(initial) if packing is None else packing.at(initial, border)
        if border == 0:
            return rebuilt(initial, parts)
        log, moments = told[0][:border], [x[:border] for x in told[1:]]
        if packing is not None:  # from where the sequence at the border begins
            fresh = packing.fresh[:border].int()
            begun = (fresh.flip(0).cumsum(0).flip(0) - fresh)[:, None, None] == 0
            log = torch.where(begun, log, 0)
        until = log.flip(0).cumsum(0).flip(0)
        weight = torch.cat([until[1:], torch.zeros_like(until[:1])]).exp()
        if packing is not None:
            weight = torch.where(begun, weight, 0)
        sums = [(weight[..., None, None] * x).sum(0) for x in moments]
        if not from_zero:
            decay = until[0].exp()[..., None, None]
            sums = [x + decay * y for x, y in zip(sums, parts[: len(sums)], strict=True)]
        return rebuilt(initial, sums + parts[len(sums) :])

    return at(rank), None if size is None else at(size)


def rebuilt(state: Any, parts: Sequence[Any]) -> Any:
    """A state, a NamedTuple or a tuple, of other parts."""
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


class Packing:
    """Where packed sequences lie in the pieces; index arithmetic on the device, so that nothing waits for a GPU.

    The sequence *at* a border between pieces is the one of the token right behind it. What rank j tells is about its
    *tail*, its tokens of the sequence at its right border; that is all that later ranks need to know of it.
    """

    def __init__(self, cu_seqlens: Tensor, borders: list[int], rank: int):
        self.rank, self.length, self.start = rank, borders[rank + 1] - borders[rank], borders[rank]
        self.local = cu_seqlens
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            return  # refused in a moment, as everywhere
        self.local = (cu_seqlens - self.start).clamp(0, self.length)
        if cu_seqlens.device.type == "cpu" and int(cu_seqlens[-1]) != borders[-1]:
            raise ValueError(
                f"cu_seqlens must end at the length of the whole sequence, {borders[-1]}; got {int(cu_seqlens[-1])}"
            )
        cu = cu_seqlens.long()
        self.sequences = cu.numel() - 1
        edges = self._edges(borders, cu.device)
        self.sequence_at = torch.searchsorted(cu[1:].contiguous(), edges, right=True).clamp(max=self.sequences - 1)
        begin = cu[self.sequence_at][1:]
        self.tail = edges[1:] - torch.maximum(begin, edges[:-1])  # tokens of each rank's tail
        self.fresh = begin >= edges[:-1]  # whether it begins on that rank
        self.ends_here = (cu[1:] > edges[rank]) & (cu[1:] <= edges[rank + 1])
        if rank == 0:
            self.ends_here = self.ends_here | (cu[1:] == 0)

    @staticmethod
    def _edges(borders: list[int], device: torch.device) -> Tensor:
        """The borders of the pieces; of equal pieces made on the device, as a CUDA graph demands it."""
        lengths = {stop - start for start, stop in itertools.pairwise(borders)}
        if len(lengths) == 1:
            return torch.arange(len(borders), device=device) * lengths.pop()
        return torch.tensor(borders, device=device)

    def tail_of(self, call: Call) -> Call:
        """The call with everything before the tail turned into padding, which changes no state."""
        padding = torch.arange(self.length, device=self.tail.device) < self.length - self.tail[self.rank]
        pad = lambda x: x.masked_fill(padding.view(-1, *[1] * (x.dim() - 2)), 0)  # noqa: E731
        k = pad(call.k)
        p = call.p if call.op in ("linear_attn", "hla_q") else k if call.p is call.k else pad(call.p)
        return replace(call, k=k, p=p, g=None if call.g is None else pad(call.g))

    def at(self, state: Sequence[Any], border: int) -> list[Any]:
        """Of N rows, that of the sequence at a border."""
        index = self.sequence_at[border : border + 1]
        return [None if x is None else x.index_select(0, index) for x in state]

    def placed(self, row: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """N rows, that of the sequence at this rank's left border replaced."""
        here = torch.arange(self.sequences, device=self.tail.device) == self.sequence_at[self.rank]
        return [
            None if y is None else torch.where(here.view(-1, *[1] * (y.dim() - 1)), x, y)
            for x, y in zip(row, rows, strict=True)
        ]

    def collected(self, ends: Sequence[Any], group: dist.ProcessGroup) -> list[Any]:
        """N rows on every rank, each from the rank where its sequence ends."""
        present = [x for x in ends if x is not None]
        mine = [torch.where(self.ends_here.view(-1, *[1] * (x.dim() - 1)), x, 0) for x in present]
        told = Exchange(mine, group).wait()
        rows = iter([sum(parts[1:], parts[0]) for parts in zip(*told, strict=True)])
        return [None if x is None else next(rows) for x in ends]
