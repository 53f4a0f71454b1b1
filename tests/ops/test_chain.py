"""Chains: stages run block by block, sharing what they share, equal to one call of the primitive per stage."""

import pytest
import torch

from hla.ops.higher_order import one_by_one
from hla.ops.linear_attn import Stage, chain
from tests.ops.cases import F64, assert_close, gradients, small_chunks  # noqa: F401


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_a_chain_equals_its_stages_one_by_one(gated, heads, small_chunks):  # noqa: F811
    """a and b share a moment; c has another decay, d another initial state, e other values: not to be shared."""
    torch.manual_seed(0)
    new = lambda *s: torch.randn(*s, dtype=F64, requires_grad=True)  # noqa: E731
    q, k, v = new(1, 17, heads[0], 3), new(1, 17, heads[1], 3), new(1, 17, heads[1], 3)
    S, other, P = (new(1, heads[1], 3, 3) for _ in range(3))
    w = new(1, 17, heads[0])
    g = (-torch.rand(1, 17, heads[1], dtype=F64)).requires_grad_() if gated else None
    stages = [
        Stage("a", "q", "k", "k", gain="w", residuals=((0.5, "q"), ("w", "q"))),
        Stage("b", "a", "k", "k", gain=0.3, residuals=(("w", "a"), (1.0, "q"))),
        Stage("c", "b", "k", "k", gate=2),
        Stage("d", "c", "k", "k"),
        Stage("e", "d", "k", "v"),
    ]
    leaves = [q, k, v, w, S, other, P] + ([g] if gated else [])
    results = []
    for run in (chain, one_by_one):
        outputs, finals = run(
            stages, {"q": q, "k": k, "v": v}, {"w": w}, g,
            outputs={"e": F64, "b": F64}, initial_states=[S, S, S, other, P],
        )  # fmt: skip
        total = sum(((i + 1) * x.sin()).sum() for i, x in enumerate([*outputs, *finals]))
        results.append([*outputs, *finals, *gradients(total, leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-11)
