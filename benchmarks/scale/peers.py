"""Ring attention and Ulysses in their plainest form, to count what they send. They are exact, and not fast."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Causal softmax attention of this rank's piece: ``[B, H, T, D]`` (k, v: H or fewer), all equally long."""
    return _Ring.apply(q, k, v, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        o = torch.zeros(*q.shape[:3], v.shape[3])
        total = torch.full(q.shape[:3], -torch.inf)
        held = [k, v]
        for hop in range(size):
            if hop <= rank:  # pieces after this one are passed on unread
                keys, values = _for_queries(held, q)
                scores = _scores(q, keys, hop == 0)
                new = torch.logaddexp(total, scores.logsumexp(-1))
                read = (scores - new[..., None]).exp() @ values
                o, total = o * (total - new).exp()[..., None] + read, new
            if hop + 1 < size:
                held = _passed_on(held, group)
        ctx.group = group
        ctx.save_for_backward(q, k, v, o, total)
        return o.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, do: Tensor):
        q, k, v, o, total = ctx.saved_tensors
        group, do = ctx.group, do.float()
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        share = (do * o).sum(-1, keepdim=True)
        held, gradients = [k, v], [torch.zeros(x.shape) for x in (k, v)]
        dq = torch.zeros(q.shape)
        for hop in range(size):
            if hop <= rank:
                keys, values = _for_queries(held, q)
                weights = (_scores(q, keys, hop == 0) - total[..., None]).exp()
                dscores = weights * (do @ values.mT - share) * q.shape[-1] ** -0.5
                dq += dscores @ keys
                for gradient, own in zip(gradients, (dscores.mT @ q.float(), weights.mT @ do), strict=True):
                    gradient += own.unflatten(1, (k.shape[1], -1)).sum(2)
            if hop + 1 < size:
                held = _passed_on(held, group)
            if size > 1:
                gradients = _passed_on(gradients, group)  # the last time, home
        return dq.to(q.dtype), gradients[0].to(k.dtype), gradients[1].to(v.dtype), None


def _for_queries(held: list[Tensor], q: Tensor) -> list[Tensor]:
    """K and V in float32, each head as often as query heads read it."""
    return [x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in held]


def _scores(q: Tensor, k: Tensor, diagonal: bool) -> Tensor:
    scores = q.float() @ k.mT * q.shape[-1] ** -0.5
    if not diagonal:
        return scores
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)


def _passed_on(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """What the rank before holds; the next one gets these."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    received = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    sends = [dist.P2POp(dist.isend, x.contiguous(), after, group) for x in tensors]
    receipts = [dist.P2POp(dist.irecv, x, before, group) for x in received]
    for work in dist.batch_isend_irecv([*sends, *receipts]):
        work.wait()
    return received


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same, by exchanging pieces of the sequence for heads and back; the ranks divide the heads."""
    q, k, v = (_Exchanged.apply(x, 1, 2, group) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return _Exchanged.apply(o, 2, 1, group)


class _Exchanged(torch.autograd.Function):
    """Cut in one dimension, put together in another; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.way = join, cut, group
        return _exchanged(x, cut, join, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor):
        return _exchanged(dx, *ctx.way), None, None, None


def _exchanged(x: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    rows = torch.stack(x.chunk(dist.get_world_size(group), cut))
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, group=group)
    return torch.cat(received.unbind(), join)
