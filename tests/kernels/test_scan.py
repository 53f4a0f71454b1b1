"""The scan of moments over chunks, and what it means for each of them, in the interpreter, against a plain loop."""

import itertools

import pytest
import torch

from tests.ops.cases import F64, assert_close

pytest.importorskip("triton")
import triton.language as tl

from hla.kernels.launch import launch
from hla.kernels.query_side_kernels import fold_later, scan_later
from hla.kernels.segments import cut_every

D, C, HEADS, GROUP = 16, 16, 4, 2


@pytest.mark.parametrize("lengths", [None, [33, 0, 5, 16, 0]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_moments_of_later_chunks_and_what_they_do_to_k(lengths, gated, ends):
    B, T = (2, 150) if lengths is None else (1, sum(lengths))
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    chunks = cut_every(C, B, T, cu, torch.device("cpu"))
    borders = (
        [(b, 0, T) for b in range(B)] if lengths is None else [(0, int(a), int(b)) for a, b in itertools.pairwise(cu)]
    )
    moments, m = torch.randn(chunks.slots, HEADS, D, D), torch.randn(chunks.slots, HEADS)
    k, g = torch.randn(B, T, HEADS // GROUP, D), -torch.rand(B, T, HEADS // GROUP)
    dk, dc, dtrace = torch.randn(B, T, HEADS, D), torch.randn(B, T, HEADS), torch.randn(B, T, HEADS)
    entering = torch.randn(chunks.sequences, D, HEADS, D).transpose(1, 2) if ends else None
    leaving = torch.empty(chunks.sequences, HEADS, D, D) if ends else None
    log2e = 1.4426950408889634
    totals = torch.zeros(chunks.slots, HEADS)

    want_dk, want_dc, want_leaving = dk.to(F64), dc.to(F64), []
    slot = 0
    for n, (b, start, stop) in enumerate(borders):
        first = slot
        starts = list(range(start, max(stop, start + 1), C))
        carry = torch.zeros(HEADS, D, D, dtype=F64) if entering is None else entering[n].to(F64)
        carry_m = torch.zeros(HEADS, dtype=F64)
        for i in reversed(range(len(starts))):
            begin, end = starts[i], min(starts[i] + C, stop)
            if begin >= end:
                continue
            own = slice(begin, end)
            decay = g[b, own].to(F64).repeat_interleave(GROUP, 1) * gated
            totals[first + i] = decay.sum(0).float() * log2e
            keys = k[b, own].to(F64).repeat_interleave(GROUP, 1)
            added = torch.einsum("thk,hkj->thj", keys, carry + carry.mT) + 2 * carry_m[:, None] * keys
            added *= (decay.sum(0) - decay.cumsum(0)).exp()[..., None]
            for t in range(end - begin):  # traces inside the chunk
                weight = (decay[t:].cumsum(0) - decay[t]).exp()
                added[t] += 2 * (weight * dtrace[b, own][t:]).sum(0)[:, None] * keys[t]
            want_dk[b, own] += added
            want_dc[b, own] -= 0.5 * (added * keys).sum(-1) * gated
            rho = decay.sum(0).exp()
            carry = carry * rho[:, None, None] + moments[first + i]
            carry_m = carry_m * rho + m[first + i]
        want_leaving.append(carry + torch.diag_embed(carry_m[:, None].expand(HEADS, D)))
        slot += len(starts)

    traces = torch.empty_like(m)
    strides = (0, 0, 0, 0) if entering is None else entering.stride()
    launch(
        scan_later, chunks.sequences * HEADS * 2,
        moments, m, traces, totals if gated else None, entering, leaving, chunks.table, chunks.first,
        chunks.per_sequence, HEADS, *strides, D=D, BLOCK=D * D // 2, AHEAD=4, warps=2,
    )  # fmt: skip
    launch(
        fold_later, chunks.slots * HEADS,
        k, g if gated else None, moments, traces, dtrace, dk, dc, chunks.table, T, chunks.per_sequence, HEADS, GROUP, 1,
        *k.stride()[:3], D=D, C=C, BK=D, GATED=gated, OPERAND=tl.float32, PRECISION="ieee", warps=4, stages=1,
    )  # fmt: skip
    assert_close(dk, want_dk, 1e-5)
    assert_close(dc, want_dc, 1e-5)
    if ends:
        assert_close(leaving, torch.stack(want_leaving), 1e-5)
