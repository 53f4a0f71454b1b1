"""`hla_q` on a piece of a sequence by its kernels, exchanges included, as one function with a gradient of its own.

What a piece tells the ones after it, its S and P, is part of what its kernels compute anyway, segment by segment
(`hla.kernels.segments`); and so is what it tells the ones before it in the backward pass, the gradients of the S and P
that enter it. Apart from the exchanges a piece costs what it costs alone. (`Pending`, which knows every operator, has
the operator and the summaries as two functions, each with a backward pass over the tokens.)

The two messages of a backward pass are what the forward one gathered once: P's is sent first, as what comes back
belongs into gradients that S's depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hla.distributed.exchange import Flight
from hla.kernels.library import refuse_double_backward
from hla.kernels.linear_attn import sums
from hla.kernels.query_side import Behind, Sizes, gradients_of, prepared, readings
from hla.kernels.segments import enter, folded, in_parts
from hla.ops.checks import Call
from hla.ops.state import HLAQState, State

if TYPE_CHECKING:
    from hla.distributed.sequence import SequenceParallel


class PendingReadings:
    """`hla.distributed.Pending` for `hla_q` without packed sequences, where `hla.kernels.query_side` takes the call."""

    def __init__(self, parallel: SequenceParallel, call: Call, initial: State | None):
        self.parallel, self.call, self.initial = parallel, call, initial
        self.tensors = prepared(call)
        q, k, v, g, _, nodes = (None if x is None else x.detach() for x in self.tensors)
        assert q is not None and k is not None and v is not None and nodes is not None
        self.sizes = Sizes(q, k, None, nodes.shape[-1] - 1)
        N, heads, shape = k.shape[0], k.shape[2], self.sizes.segments
        self.shapes = [(N, heads), *((N, heads, k.shape[3], x.shape[3]) for x in (k, v))]
        message = torch.empty(sum(prod(x) for x in self.shapes), dtype=torch.float32, device=k.device)
        decay, *states = (x.view(y) for x, y in zip(self._split(message), self.shapes, strict=True))
        self.sums = []
        for x, state in zip((k, v), states, strict=True):
            own, self.totals = sums(k, x, g, shape, heads=heads)
            totals = None if self.totals is None else in_parts(self.totals, shape)
            folded(in_parts(own, shape), totals, out=state, decay=decay)
            self.sums.append(own)
        self.flight = Flight(parallel.group)
        self.landing = self.flight.gather(message)

    def _split(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return numbers.split([prod(x) for x in self.shapes], -1)

    def finish(self) -> tuple[Tensor, State | None]:
        """The output for this rank's tokens, and the final state if asked for."""
        S = P = None
        if self.initial is not None:
            assert isinstance(self.initial, HLAQState)
            S, P = self.initial
        o, *final = _Readings.apply(self, *self.tensors, S, P)
        return o, HLAQState(*final) if final else None

    def told(self) -> list[Tensor]:
        """The log2-decay, S and P of every rank, ``[ranks, B, HKV, ...]``."""
        self.flight.land()
        return [x.view(-1, *shape) for x, shape in zip(self._split(self.landing), self.shapes, strict=True)]


class _Readings(torch.autograd.Function):
    @staticmethod
    def forward(ctx, piece: PendingReadings, q, k, v, g, ridge, nodes, S, P):
        parallel, call, s = piece.parallel, piece.call, piece.sizes
        decays, *of_pieces = piece.told()
        initial = (None, None) if S is None else (S.float(), P.float())
        entering = [
            folded(x, decays, y, count=parallel.rank) for x, y in zip(of_pieces, initial, strict=True)
        ]  # fmt: skip
        final = []
        if call.output_final_state:
            final = [folded(x, decays, y) for x, y in zip(of_pieces, initial, strict=True)]
        if s.segments.split:
            for states, state in zip(piece.sums, entering, strict=True):
                enter(states, piece.totals, state, s.segments, reverse=False)
        (o, *behind), kept = readings(
            s, call.scale, q, k, v, g, ridge, nodes, *entering, final=g is not None, keep=any(ctx.needs_input_grad),
            entered=piece.sums if s.segments.split else (),
        )  # fmt: skip
        ctx.parallel, ctx.sizes, ctx.scale, ctx.final = parallel, s, call.scale, call.output_final_state
        ctx.behind = len(behind)
        ctx.save_for_backward(q, k, v, g, ridge, nodes, S, P, *entering, decays.contiguous(), *behind, *kept)
        ctx.set_materialize_grads(False)
        return o, *final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS=None, dP=None):
        refuse_double_backward()
        parallel = ctx.parallel
        q, k, v, g, ridge, nodes, S0, P0, S, P, decays, *rest = ctx.saved_tensors
        behind, (x, *entered) = rest[: ctx.behind], rest[ctx.behind :]
        owns: list[Tensor] = []

        def tell(dfinal: Tensor | None) -> Callable[[Tensor], Callable[[], Tensor]]:
            def told(own: Tensor) -> Callable[[], Tensor]:
                """Starts to tell the other ranks what this piece does to what enters it."""
                owns.append(own)
                message = own[None]
                if ctx.final:  # of which every rank has a part of the gradient
                    message = torch.stack([own, torch.zeros_like(own) if dfinal is None else dfinal])
                flight = Flight(parallel.group)
                landing = flight.gather(message.view(-1))

                def wait() -> Tensor:
                    flight.land()
                    of_pieces, *of_final = landing.view(parallel.size, *message.shape).unbind(1)
                    last = of_final[0].sum(0) if of_final else None
                    return folded(of_pieces, decays, last, count=parallel.size - 1 - parallel.rank, reverse=True)

                return wait

            return told

        needed = (*ctx.needs_input_grad[1:7], False, False)
        found = gradients_of(
            ctx.sizes, ctx.scale, q, k, v, g, ridge, nodes, S, P, x, entered, behind, do,
            Behind(tell_S=tell(dS), tell_P=tell(dP)), needed,
        )  # fmt: skip
        initial: list[Tensor | None] = [None, None]
        if S0 is not None:
            until, whole = (y.sum(0).exp2()[..., None, None] for y in (decays[: parallel.rank], decays))
            own_P, own_S = owns
            for i, (own, dfinal) in enumerate(((own_S, dS), (own_P, dP))):
                initial[i] = until * own if dfinal is None else until * own + whole * dfinal
            initial = [y.to(x.dtype) for x, y in zip((S0, P0), initial, strict=True)]
        results = [*found[:6], *initial]
        return None, *(y if need else None for y, need in zip(results, ctx.needs_input_grad[1:], strict=True))
