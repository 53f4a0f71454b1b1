"""`hla_q` on a piece of a sequence by its kernels, exchanges included, as one function with a gradient of its own.

What a piece tells the ones after it, its S and P, is part of what its kernels compute anyway, segment by segment
(`hla.kernels.segments`); and so is what it tells the ones before it in the backward pass, the gradients of the S and P
that enter it. Apart from the exchanges a piece costs what it costs alone. (`PendingSummaries`, which knows every
operator, has the operator and the summaries as two functions, each with a backward pass over the tokens.)

In the backward pass P's gradient is told first and hides behind a walk of S over the keys; S's comes from a chain of
readings that begins with P's, and nothing is left to hide it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hla.distributed.exchange import Flight, Message
from hla.distributed.packing import Packing
from hla.distributed.sequence import Pending, SequenceParallel
from hla.kernels.library import refuse_double_backward
from hla.kernels.linear_attn import sums
from hla.kernels.query_side import Asked, Behind, Sizes, gradients_of, prepared, readings, supports
from hla.kernels.segments import enter, fold_segments, folded, parts_of
from hla.ops.checks import Call
from hla.ops.state import HLAQState, State


def takes(call: Call, initial: State | None, packing: Packing | None) -> bool:
    """Whether `begin` takes this call: `hla_q`, packed sequences only without states before and behind them."""
    stateless = initial is None and not call.output_final_state
    return call.op == "hla_q" and supports(call) and (packing is None or stateless)


@torch.compiler.disable  # (kernels and collectives are launched from Python here)
def begin(parallel: SequenceParallel, call: Call, initial: State | None, packing: Packing | None) -> Pending:
    """Makes what this piece tells, and starts to tell it."""
    return PendingReadings(parallel, call, initial, packing)


class PendingReadings(Pending):
    def __init__(self, parallel: SequenceParallel, call: Call, initial: State | None, packing: Packing | None):
        self.parallel, self.call, self.initial, self.borders = parallel, call, initial, None
        self.tensors = prepared(call)
        self.versions = self._versions()
        q, k, v, g, _, nodes = (None if x is None else x.detach() for x in self.tensors)
        assert q is not None and k is not None and v is not None and nodes is not None
        self.sizes = Sizes(q, k, call.cu_seqlens, nodes.shape[-1] - 1)
        N, heads, shape, of_tail = k.shape[0], k.shape[2], self.sizes.segments, None
        if packing is not None:
            self.borders = Borders(packing)
            of_tail = parts_of(self.borders.tail, shape)
        states = [(N, heads, k.shape[3], x.shape[3]) for x in (k, v)]
        self.message = Message([(N, heads), *states], parallel.group, k.device)
        decay, *parts = self.message.parts
        self.sums = []
        for x, part in zip((k, v), parts, strict=True):
            own, self.totals = sums(k, x, g, shape, heads=heads)
            fold_segments(own, self.totals, shape, parts=of_tail, out=part, decay=decay)
            self.sums.append(own)
        self.message.send()

    def _versions(self) -> list[int]:
        return [0 if x is None or x.is_inference() else x._version for x in self.tensors]

    @torch.compiler.disable
    def finish(self) -> tuple[Tensor, State | None]:
        if self._versions() != self.versions:
            raise RuntimeError("a tensor of this operator was changed in place after `begin`, which had read it")
        S = P = None
        if self.initial is not None:
            assert isinstance(self.initial, HLAQState)
            S, P = self.initial
        self.keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*self.tensors, S, P))
        o, *final = _Readings.apply(self, *self.tensors, S, P)
        return o, HLAQState(*final) if final else None


class Borders:
    """The two packed sequences that go over the borders of a piece.

    Attributes:
        head, tail: the sequences ``[1]`` of the first token of the piece, and of the first one behind it.
        before, behind: the ranks that have tokens of head before this one, and of tail after it, for `folded`.
    """

    def __init__(self, packing: Packing):
        at, rank = packing.sequence_at, packing.rank
        self.sequences, self.head, self.tail = packing.sequences, at[rank : rank + 1], at[rank + 1 : rank + 2]
        ranks = torch.arange(at.numel(), device=at.device)
        # From the last rank on in which the sequence at its right border begins: that is head.
        begins = torch.where(packing.fresh[:rank], ranks[:rank], 0).amax(0, True) if rank else ranks[:1]
        self.before = torch.cat([begins, ranks[rank : rank + 1]])
        goes_on = (at[rank + 1 : -1] == self.tail).sum(0, True)
        self.behind = torch.cat([ranks[rank + 1 : rank + 2], ranks[rank + 1 : rank + 2] + goes_on])

    def placed(self, row: Tensor, sequence: Tensor) -> Tensor:
        """``[N, ...]`` of zeros, but for one sequence."""
        return row.new_zeros(self.sequences, *row.shape[1:]).index_copy(0, sequence, row)


class _Readings(torch.autograd.Function):
    @staticmethod
    def forward(ctx, piece: PendingReadings, q, k, v, g, ridge, nodes, S, P):
        parallel, call, s, borders = piece.parallel, piece.call, piece.sizes, piece.borders
        decays, *of_pieces = piece.message.told()
        initial = (None, None) if S is None else (S.float(), P.float())
        before = range(parallel.rank) if borders is None else borders.before
        entering = [folded(x, decays, y, parts=before) for x, y in zip(of_pieces, initial, strict=True)]
        final = []
        if call.output_final_state:
            final = [folded(x, decays, y) for x, y in zip(of_pieces, initial, strict=True)]
        of_all = entering if borders is None else [borders.placed(x, borders.head) for x in entering]
        if s.segments.split:
            for states, state in zip(piece.sums, of_all, strict=True):
                enter(states, piece.totals, state, s.segments, reverse=False)
        needs_g = piece.keep and g is not None and g.requires_grad
        (o, *behind), kept = readings(
            s, call.scale, q, k, v, g, ridge, nodes, *of_all, final=needs_g, keep=piece.keep,
            entered=piece.sums if s.segments.split else (),
        )  # fmt: skip
        if borders is not None:
            behind = [x.index_select(0, borders.tail) for x in behind]
        ctx.parallel, ctx.sizes, ctx.borders = parallel, s, borders
        ctx.scale, ctx.final, ctx.behind = call.scale, call.output_final_state, len(behind)
        ctx.save_for_backward(q, k, v, g, ridge, nodes, S, P, *entering, decays.contiguous(), *behind, *kept)
        ctx.set_materialize_grads(False)
        return o, *final

    @staticmethod
    def backward(ctx, do, dS=None, dP=None):
        refuse_double_backward()
        borders = ctx.borders
        q, k, v, g, ridge, nodes, S0, P0, S, P, decays, *rest = ctx.saved_tensors
        behind, (x, *entered) = rest[: ctx.behind], rest[ctx.behind :]
        if borders is not None:
            S, P = (borders.placed(y, borders.head) for y in (S, P))
            behind = [borders.placed(y, borders.tail) for y in behind]
        of_S, of_P = (FromBehind(ctx.parallel, decays, y, ctx.final, borders) for y in (dS, dP))
        needed = (*ctx.needs_input_grad[1:7], False, False)
        found = gradients_of(
            ctx.sizes, ctx.scale, q, k, v, g, ridge, nodes, S, P, x, entered, behind, do,
            Behind(of_S, of_P, None if borders is None else borders.head), needed,
        )  # fmt: skip
        results = [*found[:6], of_S.of_initial(S0), of_P.of_initial(P0)]
        return None, *(y if need else None for y, need in zip(results, ctx.needs_input_grad[1:], strict=True))


class FromBehind(Asked):
    """The gradient of a state behind this piece, folded from what the later ones tell.

    Args:
        decays: the log2-decays of all pieces ``[ranks, N, H]``.
        dfinal: this rank's part of the gradient of the state behind the whole sequence, or None.
        has_final: whether any rank may have such a part.
    """

    def __init__(
        self, parallel: SequenceParallel, decays: Tensor, dfinal: Tensor | None, has_final: bool,
        borders: Borders | None = None,
    ):  # fmt: skip
        self.parallel, self.decays, self.dfinal = parallel, decays, dfinal
        self.has_final, self.borders = has_final, borders

    def tell(self, own: Tensor) -> None:
        self.own, message = own, own[None]
        if self.has_final:
            message = torch.stack([own, torch.zeros_like(own) if self.dfinal is None else self.dfinal])
        self.flight = Flight(self.parallel.group)
        self.landing = self.flight.gather(message.view(-1)).view(self.parallel.size, *message.shape)

    def wait(self) -> Tensor:
        self.flight.land()
        of_pieces, *of_final = self.landing.unbind(1)
        last = of_final[0].sum(0) if of_final else None
        if self.borders is not None:
            found = folded(of_pieces, self.decays, parts=self.borders.behind, reverse=True)
            return self.borders.placed(found, self.borders.tail)
        later = range(self.parallel.rank + 1, self.parallel.size)
        return folded(of_pieces, self.decays, last, parts=later, reverse=True)

    def of_initial(self, initial: Tensor | None) -> Tensor | None:
        """This rank's part of the gradient of the state before the whole sequence, if there is one."""
        if initial is None:
            return None
        until, whole = (
            y.sum(0).exp2()[..., None, None] for y in (self.decays[: self.parallel.rank], self.decays)
        )  # fmt: skip
        y = until * self.own if self.dfinal is None else until * self.own + whole * self.dfinal
        return y.to(initial.dtype)
