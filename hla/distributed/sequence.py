"""Operators and the short convolution on a sequence of which every rank holds one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hla.convolution import history_after, positions_in_packed, short_convolution
from hla.distributed.exchange import Exchange
from hla.distributed.packing import Packing, fold, fold_sums, rebuilt
from hla.ops import dispatch, fused
from hla.ops.checks import Call, check_backend, check_call, check_state
from hla.ops.linear_attn import compute_dtype
from hla.ops.segments import HLAQSegment, LinearAttnSegment, Segment, advance, summary_of
from hla.ops.state import State, pack, unpack, zeros

# hla_n up to order 3 is one of these; from order 4 its segments have no summary of moderate size.
HLA_N = {1: "linear_attn", 2: "hla2", 3: "hla3"}


class SequenceParallel:
    """A sequence spread over a process group in contiguous pieces, rank 0 holding the first.

    A segment of a sequence can be summarised by a few moments of its own tokens (`hla.ops.segments`). So every rank
    summarises its piece, one all-gather tells the summaries to all, every rank folds those of the ranks before it into
    the state that enters its piece, and from there its piece is a sequence like any other. In the backward pass the
    gradients of the summaries go the way back in one all-to-all. (By kernels, `readings` and `chains`, every state of
    an operator has a gather back, and those of chains one there.) What is sent does not depend on the length.

    Args:
        group: the process group, or a one-dimensional `DeviceMesh`; None means the default group.
        lengths: tokens of each rank's piece, some of which may be 0; None means that all pieces are equally long.

    Raises:
        ValueError: torch.distributed is not initialised, or this process or the lengths do not fit the group.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None, lengths: Sequence[int] | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("sequence parallelism needs a process group: call torch.distributed.init_process_group")
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be one dimension of a DeviceMesh; got {group.ndim} dimensions")
            group = group.get_group()
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise ValueError("group must be a ProcessGroup that this process is in, or one dimension of a DeviceMesh")
        self.group: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not in the group of the sequence")
        if lengths is not None and len(lengths) != self.size:
            raise ValueError(f"lengths must hold one number for each of the {self.size} ranks; got {len(lengths)}")
        if lengths is not None and min(lengths) < 0:
            raise ValueError(f"lengths must not be negative; got {list(lengths)}")
        self.lengths = None if lengths is None else [int(n) for n in lengths]

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        return self  # of a copied layer or model: process groups cannot be copied

    def __repr__(self) -> str:
        return f"SequenceParallel(rank={self.rank}, size={self.size}, lengths={self.lengths})"

    def borders(self, length: int) -> list[int]:
        """Where the pieces begin and end in the sequence, ``size + 1`` numbers; this rank's has ``length`` tokens."""
        if self.lengths is None:
            return [length * r for r in range(self.size + 1)]
        if self.lengths[self.rank] != length:
            raise ValueError(f"rank {self.rank} has {length} tokens; lengths says {self.lengths[self.rank]}")
        return [sum(self.lengths[:r]) for r in range(self.size + 1)]

    def span(self, length: int) -> slice:
        """The tokens of this rank in the whole sequence."""
        borders = self.borders(length)
        return slice(borders[self.rank], borders[self.rank + 1])

    def run(self, op: str, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, State | None]:
        """The operator on this rank's piece of the sequence: `begin` and `Pending.finish` in one."""
        return self.begin(op, q, k, v, **arguments).finish()

    def begin(
        self,
        op: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        order: int | None = None,
        g: Tensor | None = None,
        p: str | Tensor | None = "q",
        ridge: float | Tensor | None = None,
        gain: float | Tensor = 1.0,
        value_ridge: float | Tensor = 0.0,
        value_gain: float | Tensor = 1.0,
        nodes: Tensor | None = None,
        scale: float | None = None,
        normalize: bool = False,
        eps: float = 1e-6,
        initial_state: State | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> Pending:
        """Summarises this rank's piece and starts the all-gather, which runs until `Pending.finish` waits for it.

        Arguments as for the operators (`hla.hla2` and its siblings), of which ``op`` is one: tensors per token hold the
        tokens of this rank; the rest is the same on every rank:

        Args:
            op: "linear_attn", "hla2", "ahla", "hla3", "hla_q", or "hla_n" up to order 3.
            initial_state: before the first token of the whole sequence, given on every rank. Its gradient is, like
                that of a parameter, a sum over ranks of which each rank has its part.
            output_final_state: the state after the last token of the whole sequence, on every rank. With cu_seqlens
                this takes one more all-gather, of N states.
            cu_seqlens: borders of the packed sequences in the whole row of tokens, not in this rank's piece.

        Raises:
            ValueError, TypeError: as for the operators; also for hla_n from order 4, and where lengths do not fit.
        """
        check_backend(backend)
        packing = self._packing(cu_seqlens, q)
        call = check_call(
            op, q, k, v, order=order, g=g, p=p, ridge=ridge, gain=gain, value_ridge=value_ridge, value_gain=value_gain,
            nodes=nodes, scale=scale, normalize=normalize, eps=eps, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens if packing is None else packing.local,
        )  # fmt: skip
        if op == "hla_n" and call.order not in HLA_N:
            raise ValueError(f"hla_n has no segment summaries, and so no sequence parallelism, of order {order}")
        if initial_state is not None:
            check_state(call, initial_state, q.shape[0] if packing is None else packing.sequences, "initial_state")
        kernels = dispatch(call.op, "chunk", backend, q.device, compute_dtype(q, v)) is fused
        if self.size > 1 and kernels:
            from hla.distributed import chains, readings

            if readings.takes(call, initial_state, packing):
                return readings.begin(self, call, initial_state, packing)
            if chains.takes(call, packing):
                return chains.PendingChain(self, call, initial_state)
        return PendingSummaries(self, call, initial_state, packing, backend)

    def _packing(self, cu_seqlens: Tensor | None, x: Tensor) -> Packing | None:
        if cu_seqlens is None:
            return None
        return Packing(cu_seqlens, self.borders(x.shape[1]), self.rank)

    def short_convolution(
        self,
        x: Tensor,
        weight: Tensor,
        cu_seqlens: Tensor | None = None,
        history: Tensor | None = None,
        output_history: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`hla.convolution.short_convolution` of this rank's piece, the last inputs of earlier ranks before it.

        Args as there: x is this rank's piece, cu_seqlens and history are those of the whole sequence, and so is the
        history returned, the same on every rank.
        """
        before = weight.shape[1] - 1
        packing = self._packing(cu_seqlens, x)
        local = None if packing is None else packing.local
        if before == 0 or self.size == 1:
            return short_convolution(x, weight, local, history, output_history)
        start, ends = self._history(x, x.shape[1], before, history, output_history, packing)
        y, own = short_convolution(x, weight, local, start, output_history)
        if packing is None or not output_history:
            return y, ends
        assert own is not None
        return y, packing.collected((own,), self.group)[0]

    def convolution_history(
        self, x: Tensor, length: int, before: int, history: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The last ``before`` inputs before this rank's piece and before what follows the sequence.

        Args:
            x: the last (at least ``before``) inputs of this rank's piece, which has ``length``: ``[B, T, C]``.
            history: what was before the whole sequence, ``[B, C, before]``, as are both results.
        """
        if before == 0 or self.size == 1:
            return history, history_after(history, x, before)
        return self._history(x, length, before, history, True, None)

    def _history(
        self, x: Tensor, length: int, before: int, history: Tensor | None, wants_end: bool, packing: Packing | None
    ) -> tuple[Tensor, Tensor | None]:
        """What enters this piece (one row per sequence), and what leaves the last one (None: packed, or not wanted)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        borders = self.borders(length)
        own = x[:, max(0, x.shape[1] - before) :].to(dtype)
        own = torch.nn.functional.pad(own, (0, 0, before - own.shape[1], 0))
        exchange = Exchange([own], self.group)
        told = [row for (row,) in exchange.wait()]
        if history is None:
            rows = x.shape[0] if packing is None else packing.sequences
            history = x.new_zeros(rows, x.shape[2], before, dtype=dtype)
        history = exchange.tied(history.to(dtype))
        place = torch.arange(before, device=x.device)

        def after(state: tuple[Tensor], j: int) -> tuple[Tensor]:
            """The last inputs once those of rank j were seen, m of them its own (fewer if the piece is short)."""
            m = min(borders[j + 1] - borders[j], before) if packing is None else packing.tail[j].clamp(max=before)
            earlier = state[0].index_select(1, (place + m).clamp(max=before - 1))
            return (torch.where((place + m >= before)[:, None], told[j], earlier),)

        initial = (history.mT,)
        ends = self.size if wants_end and packing is None else None
        (entering,), final = fold(initial, after, self.rank, ends, packing)
        start = entering if packing is None else packing.placed((entering,), initial)[0]
        return start.mT, None if final is None else final[0].mT.contiguous()

    def positions_in_packed(self, cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`hla.convolution.positions_in_packed` for the ``length`` tokens of this rank."""
        span = self.span(length)
        sequence, position = positions_in_packed(cu_seqlens, self.borders(length)[-1])
        return sequence[span], position[span]

    def counted(self, counted: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
        """Numbers ``[B, T]`` of tokens counted from the start of the sequence, and ``[B]`` of all there are.

        ``counted`` is counted from this rank's first token; where there are pads, the ranks tell each other how many
        tokens they have.
        """
        length = counted.shape[1]
        if not masked or self.size == 1:
            borders = self.borders(length)
            return counted + borders[self.rank], counted.new_full(counted.shape[:1], borders[-1])
        own = counted[:, -1] if length else counted.new_zeros(counted.shape[0])
        told = torch.stack([x for (x,) in Exchange([own], self.group).wait()])
        return counted + told[: self.rank].sum(0)[:, None], told.sum(0)

    def position_after(self, position_ids: Tensor) -> Tensor:
        """``[B or 1]``, the position after that of the last token of the whole sequence."""
        empty = position_ids.shape[1] == 0
        own = position_ids.new_full(position_ids.shape[:1], -1) if empty else position_ids[:, -1] + 1
        after = torch.zeros_like(own)
        for (x,) in Exchange([own], self.group).wait() if self.size > 1 else [[own]]:
            after = torch.where(x < 0, after, x)
        return after


class Pending:
    """An operator whose all-gather is on its way: what can be computed without its output can be computed now."""

    def finish(self) -> tuple[Tensor, State | None]:
        """The output for this rank's tokens, and the final state if asked for."""
        raise NotImplementedError


class PendingSummaries(Pending):
    """Any operator: summaries (`hla.ops.segments`), their fold, and the operator from the state that this gives."""

    def __init__(self, parallel: SequenceParallel, call: Call, initial: State | None, packing: Packing | None, backend):
        self.parallel, self.call, self.initial, self.packing, self.backend = parallel, call, initial, packing, backend
        self.exchange = None
        if parallel.size > 1:
            tail = self._algebra_call()
            segment = summary_of(tail if packing is None else packing.tail_of(tail), backend)
            self.segment: type = type(segment)
            self.exchange = Exchange(segment, parallel.group)

    def finish(self) -> tuple[Tensor, State | None]:
        call, packing = self.call, self.packing
        compute = dispatch(call.op, "chunk", self.backend, call.q.device, compute_dtype(call.q, call.v))
        if self.exchange is None:
            return compute(replace(call, initial_state=self.initial))
        parallel = self.parallel
        rank, size = parallel.rank, parallel.size if call.output_final_state and packing is None else None
        told = self.exchange.wait_stacked()
        initial = self._algebra_state()
        initial = rebuilt(initial, [None if x is None else self.exchange.tied(x) for x in initial])
        if self.segment in (LinearAttnSegment, HLAQSegment):
            state, final = fold_sums(initial, told, rank, size, packing, from_zero=self.initial is None)
        else:
            segments: list[Segment] = [self.segment(*tensors) for tensors in zip(*told, strict=True)]
            state, final = fold(initial, lambda s, j: advance(s, segments[j]), rank, size, packing)
        if packing is not None:
            state = rebuilt(state, packing.placed(state, initial))
        local = replace(call, initial_state=self._own_state(state))
        o, ends = compute(replace(local, output_final_state=packing is not None and call.output_final_state))
        if packing is not None and ends is not None:
            return o, rebuilt(ends, packing.collected(ends, self.parallel.group))
        return o, None if final is None else self._own_state(final)

    # The algebra of segments knows hla_n by its other names, and m, n as one more column of the moments they belong to.

    def _alias(self) -> tuple[str, int | None]:
        call = self.call
        if call.op != "hla_n":
            return call.op, call.order
        assert call.order is not None
        return HLA_N[call.order], None

    def _algebra_call(self) -> Call:
        op, order = self._alias()
        return replace(self.call, op=op, order=order, cu_seqlens=None)

    def _algebra_state(self) -> State:
        op, order = self._alias()
        call = self.call
        if self.initial is None:
            return zeros(
                op, call.q.shape[0] if self.packing is None else self.packing.sequences, call.q.shape[2],
                call.k.shape[2], call.q.shape[3], call.v.shape[3] + call.normalize, order=order,
                p_heads=call.p.shape[2], dtype=compute_dtype(call.q, call.v), device=call.q.device,
            )  # fmt: skip
        S, moments, ones = unpack(call.op, call.order, self.initial)
        if ones is not None:
            moments = [torch.cat([x, y[..., None]], -1) for x, y in zip(moments, ones, strict=True)]
        dtype = compute_dtype(call.q, call.v)
        return pack(op, order, None if S is None else S.to(dtype), [x.to(dtype) for x in moments], None)

    def _own_state(self, state: State) -> State:
        """The inverse of `_algebra_state`."""
        call = self.call
        S, moments, _ = unpack(*self._alias(), state)
        ones = [x[..., -1] for x in moments] if call.normalize else None
        return pack(call.op, call.order, S, [x[..., :-1] for x in moments] if call.normalize else moments, ones)
