"""One all-gather that autograd can go back through, started here and finished there.

Forward, every rank tells all ranks what it holds. The mirror image of that in the backward pass: every rank has a
gradient for what each rank told it, sends it back to that rank, and adds up what it gets (an all-to-all and a sum in
the order of the ranks: the same bits every time). Both collectives run while other work does: what the forward pass
computes between `Exchange` and `Exchange.wait`, the backward pass computes between its start and its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Exchange:
    """An all-gather of several tensors of one dtype, of the same shapes on every rank, as one message.

    Every rank must take part, forward and backward: what comes of `wait` belongs into the loss of every rank (`tied`).
    """

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup):
        self.shapes = [x.shape for x in tensors]
        self._flight = Flight(group)
        message = torch.cat([x.reshape(-1) for x in tensors])
        self._landing = _Start.apply(self._flight, message)
        self.received: Tensor | None = None  # [ranks, numbers]

    def wait(self) -> list[list[Tensor]]:
        """The tensors of every rank."""
        sizes = [shape.numel() for shape in self.shapes]
        return [
            [x.view(shape) for x, shape in zip(row.split(sizes), self.shapes, strict=True)]
            for row in self._received().unbind()
        ]

    def wait_stacked(self) -> list[Tensor]:
        """The same, those of all ranks as one tensor ``[ranks, ...]``."""
        parts = self._received().split([shape.numel() for shape in self.shapes], 1)
        return [x.view(self._flight.size, *shape) for x, shape in zip(parts, self.shapes, strict=True)]

    def _received(self) -> Tensor:
        self.received = _Wait.apply(self._flight, self._landing)
        return self.received

    def tied(self, x: Tensor) -> Tensor:
        """x, which now counts as computed from what was received.

        The first rank has nothing before it and would not read what it received: without a path back to it, it would
        leave the others waiting in the backward pass.
        """
        return _Tied.apply(x, self.received)


class Flight:
    """What is on its way: the handles of the collectives, and the tensors they read and write."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, dist.get_world_size(group)
        self.handle: dist.Work | None = None
        self.cargo: Tensor | None = None

    def gather(self, message: Tensor) -> Tensor:
        landing = message.new_empty(self.size, message.numel())
        self.cargo = message
        self.handle = all_gather(landing.view(-1), message, group=self.group, async_op=True)
        return landing

    def scatter(self, rows: Tensor) -> Tensor:
        landing = torch.empty_like(rows)
        self.cargo = rows
        self.handle = dist.all_to_all_single(landing, rows, group=self.group, async_op=True)
        return landing

    def land(self) -> None:
        assert self.handle is not None
        self.handle.wait()
        self.handle = self.cargo = None


class Message:
    """Float32 tensors, contiguous, that every rank tells all ranks, without autograd.

    Args:
        shapes: of `parts`, which are to be filled before `send`; the same on every rank.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], group: dist.ProcessGroup, device: torch.device):
        self.shapes, self.sizes = shapes, [math.prod(x) for x in shapes]
        self.flight = Flight(group)
        self.own = torch.empty(sum(self.sizes), dtype=torch.float32, device=device)
        self.parts = [x.view(*y) for x, y in zip(self.own.split(self.sizes), shapes, strict=True)]

    def send(self) -> None:
        self.landing = self.flight.gather(self.own)

    def told(self) -> list[Tensor]:
        """Of every part that of all ranks, ``[ranks, ...]``."""
        self.flight.land()
        parts = self.landing.split(self.sizes, 1)
        return [x.view(self.flight.size, *y) for x, y in zip(parts, self.shapes, strict=True)]


def all_gather(*args, **kwargs) -> dist.Work | None:
    """(`all_gather_into_tensor` until PyTorch 2.12.)"""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(*args, **kwargs)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flight: Flight, message: Tensor) -> Tensor:
        ctx.flight = flight
        return flight.gather(message.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx, landing: Tensor):
        ctx.flight.land()
        return None, landing.sum(0)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flight: Flight, landing: Tensor) -> Tensor:
        ctx.flight = flight
        flight.land()
        return landing.view_as(landing)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradients: Tensor):
        return None, ctx.flight.scatter(gradients.contiguous())


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        ctx.shape = other.shape
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor):
        return dx, dx.new_zeros(ctx.shape)
