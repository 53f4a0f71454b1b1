"""Chains of the primitive on a piece of a sequence by their kernels: `linear_attn`, `hla2`, `ahla`, `hla3`.

A stage of a chain reads one state. What a piece adds to it are sums that the kernels make anyway where they split a
sequence into segments (`hla.kernels.segments`), and so is what it does to the gradient of that state. So every stage
has a gather of its own, and every gradient of a stage, and a piece costs what it costs alone. The summaries of
`hla.ops.segments` need one gather for all stages, and for that every k~ and v~ twice: of the piece alone, and as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hla.distributed.exchange import Message
from hla.distributed.packing import Packing
from hla.distributed.readings import FromBehind
from hla.distributed.sequence import Pending, SequenceParallel
from hla.kernels.chain import Backward, Plan, Sizes, decode, encode, ends_of, gradients_of, kept_of, prepared, run_stage
from hla.kernels.library import refuse_double_backward
from hla.kernels.linear_attn import shared, sums
from hla.kernels.segments import enter, fold_segments, folded
from hla.ops.checks import Call
from hla.ops.higher_order import compose
from hla.ops.linear_attn import Stage
from hla.ops.state import State


def takes(call: Call, packing: Packing | None) -> bool:
    """Whether `PendingChain` takes this call."""
    return packing is None and call.op != "hla_q"


class PendingChain(Pending):
    """Nothing begins before `finish`: what stages tell depends on what others were told."""

    def __init__(self, parallel: SequenceParallel, call: Call, initial: State | None):
        self.parallel, self.call = parallel, replace(call, initial_state=initial)

    @torch.compiler.disable  # (kernels and collectives are launched from Python here)
    def finish(self) -> tuple[Tensor, State | None]:
        return compose(self.call, run=partial(_chain, self.parallel))


def _chain(
    parallel: SequenceParallel, stages: Sequence[Stage], tensors: dict[str, Tensor], per_token: dict[str, Tensor],
    g: Tensor | None, *, outputs: dict[str, torch.dtype], initial_states: Sequence[Tensor | None],
    output_final_states: bool, cu_seqlens: None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """As `hla.kernels.chain.chain`; the states are those before and behind the whole sequence."""
    plan, flat = prepared(stages, tensors, per_token, g, outputs, initial_states, output_final_states)
    results = _Chain.apply(parallel, encode(plan), *flat)
    return list(results[: len(outputs)]), list(results[len(outputs) :])


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parallel: SequenceParallel, text: str, g, *flat):
        p = decode(text)
        x, initial = p.unflatten(flat)
        sizes = Sizes(p, x, g)
        shape = sizes.cut(None)
        entering, all_decays, finals = [], [], []
        for s, (heads, *_), start in zip(p.stages, sizes.states, initial, strict=True):
            own, totals = sums(x[s.keys], x[s.values], g, shape, heads=heads, gate=s.gate)
            message = Message([(sizes.batch, heads), (sizes.batch, *own.shape[1:])], parallel.group, own.device)
            fold_segments(own, totals, shape, decay=message.parts[0], out=message.parts[1])
            message.send()
            decays, states = message.told()
            state = folded(states, decays, start, parts=range(parallel.rank))
            if p.finals:
                finals.append(folded(states, decays, start))
            if shape.split:
                enter(own, totals, state, shape, reverse=False)
            run_stage(p, s, x, g, sizes, shape, initial=state, final=False, entered=own if shape.split else None)
            entering.append(state)
            all_decays.append(decays.contiguous())  # (and not all that was told)
        ctx.parallel, ctx.text, ctx.count = parallel, text, len(flat)
        ctx.save_for_backward(g, *flat, *entering, *all_decays, *kept_of(p, x))
        ctx.set_materialize_grads(False)
        return *(x[name] for name, _ in p.outputs), *finals

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward()
        p, parallel = decode(ctx.text), ctx.parallel
        g, *rest = ctx.saved_tensors
        n, count = len(p.stages), ctx.count
        flat, entering, decays = rest[:count], rest[count : count + n], rest[count + n : count + 2 * n]
        x, initial = p.unflatten(flat)
        x |= dict(zip(p.kept, rest[count + 2 * n :], strict=True))
        outputs = len(p.outputs)
        dfinals = grads[outputs:] if p.finals else [None] * n
        asked = [FromBehind(parallel, y, dy, p.finals) for y, dy in zip(decays, dfinals, strict=True)]

        def behind(back: Backward, i: int) -> tuple[Tensor, Tensor | None]:
            return _behind(back, p, i, asked[i])

        needed = ctx.needs_input_grad[2:]
        dg, results, _ = gradients_of(p, x, g, entering, grads[:outputs], needed, None, behind)
        results += [of.of_initial(start) for of, start in zip(asked, initial, strict=True) if start is not None]
        return None, None, *(y if need else None for y, need in zip([dg, *results], needed, strict=True))


def _behind(back: Backward, p: Plan, i: int, asked: FromBehind) -> tuple[Tensor, Tensor | None]:
    """The gradient of the state behind this piece, of a stage, and what of it enters the segments of a split."""
    s, heads, hs = p.stages[i], back.sizes.of[p.stages[i].out][0], back.sizes.states[i][0]
    dy, shape, (write, factor) = back.gradient_of(s), back.shape, back.writing(s)
    later, totals = sums(
        back.x[s.query], dy, back.g, shape, heads=heads, gate=s.gate, reverse=True, write=write,
        exact=back.gated and not back.goes_in_pairs(s, heads),
    )  # fmt: skip
    asked.tell(shared(fold_segments(later, totals, shape, reverse=True, factor=factor), hs))
    dstate = asked.wait()
    if not shape.split:
        return dstate, None
    enter(later, totals, ends_of(dstate, factor, heads // hs), shape, reverse=True)
    return dstate, later
