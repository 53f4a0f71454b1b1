"""The kernels of hla_q in Gluon, for Hopper GPUs, run on the CPU: outputs, states and gradients in bfloat16 are as near
to float64 as bfloat16 is."""

import pytest
import torch

import hla

pytest.importorskip("triton")
from hla.kernels import (
    pairs,
    pairs_hopper,
    query_side,
    query_side_adjoint,
    query_side_hopper,
    query_side_walk,
    segments,
)
from hla.ops.state import HLAQState
from tests.kernels import gluon
from tests.ops.cases import F64

KERNELS = {
    64: {"walk_readings", "pair_gradients_hopper", "adjoint"},
    128: {"solve_hopper", "pair_gradients_hopper", "adjoint_at_once"},
}
# (sequences, tokens, heads of q and of k, order, gate, what is packed or cut)
CASES = {
    "default form": (1, 150, 1, 1, 4, True, "whole"),
    "strong gate": (1, 150, 1, 1, 4, True, "strong"),
    "grouped, with states": (2, 90, 4, 2, 4, True, "states"),
    "grouped, without gate": (2, 70, 2, 1, 3, False, "whole"),
    "one reading": (1, 70, 1, 1, 1, True, "states"),
    "packed": (1, 150, 2, 2, 3, True, "packed"),
    "split": (1, 150, 2, 1, 2, True, "split"),
}


@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_hla_q(case, D, late, monkeypatch):
    B, T, HQ, HKV, order, gated, cut = CASES[case]
    launched = gluon.on_the_cpu(monkeypatch, query_side, query_side_walk, pairs, pairs_hopper, late=late)
    # (The interpreter computes in float32; chunks are to be those of bfloat16.)
    config = query_side.query_side_config
    monkeypatch.setattr(query_side, "query_side_config", lambda key, wide, capability: config(key, False, capability))
    if cut == "split":
        monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 64)
    new = lambda *shape: torch.randn(B, T, *shape).bfloat16()  # noqa: E731
    unit = lambda x: torch.nn.functional.normalize(x.float(), dim=-1).bfloat16()  # noqa: E731
    inputs = {
        "q": unit(new(HQ, D)), "k": unit(new(HKV, D)), "v": new(HKV, D), "ridge": 0.5 + torch.rand(B, T, HQ),
        "nodes": 0.1 + 0.8 * torch.rand(B, T, HQ, order + 1),
    }  # fmt: skip
    if gated:
        inputs["g"] = -(8.0 if cut == "strong" else 0.2) * torch.rand(B, T, HKV)
    if cut == "states":
        S = unit(torch.randn(B, HKV, 20, D)).float()
        inputs |= {"S": S.mT @ S, "P": torch.randn(B, HKV, D, D)}
    cu_seqlens = torch.tensor([0, 70, 70, 133, T], dtype=torch.int32) if cut == "packed" else None
    direction, at_end = torch.randn(B, T, HQ, D), torch.randn(2, D, D)
    at_end[0] += at_end[0].mT.clone()
    found, expected = [], []
    for results, dtype, backend in ((found, None, "triton"), (expected, F64, "torch")):
        leaves = {n: x.clone().to(dtype or x.dtype).requires_grad_() for n, x in inputs.items()}
        initial = HLAQState(leaves["S"], leaves["P"]) if "S" in leaves else None
        o, state = hla.hla_q(
            **{n: x for n, x in leaves.items() if n not in "SP"}, order=order, cu_seqlens=cu_seqlens,
            initial_state=initial, output_final_state=True, backend=backend,
        )  # fmt: skip
        loss = (o * direction).sum()
        if initial is not None:
            loss = loss + sum((x * y).sum() for x, y in zip(state, at_end, strict=True))
        loss.backward()
        results += [
            ("o", o.detach()),
            *((f"{n} at the end", x.detach()) for n, x in zip("SP", state, strict=True)),
            *((f"gradient of {n}", x.grad) for n, x in leaves.items()),
        ]
    assert set(launched) == KERNELS[D]
    for (name, a), (_, b) in zip(found, expected, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        limit = 8e-3
        if cut == "strong":  # (Where hardly anything is read, the gradient of nodes is little more than roundings.)
            limit = 1.5e-2 if name == "gradient of g" else 0.1
        assert error < limit, (name, error)


def test_sums_of_rows_and_diagonals_in_parts():
    """What a rounding error of a token's own reading hangs on, which weak gates do not show."""
    x = torch.randn(64, 64)
    for diagonal in (query_side_hopper._diagonal, query_side_adjoint._own):
        parts = gluon.function(diagonal)(x)
        assert parts.shape == (64, 4) and torch.equal(parts.sum(1), x.diagonal())
        # (Both of x and of u, in the thread that has this number.)
        assert torch.equal(parts != 0, torch.arange(4) == (torch.arange(64) % 8 // 2)[:, None])
    parts = gluon.function(query_side_hopper._own_part)(x)
    assert parts.shape == (64, 4)
    torch.testing.assert_close(parts.sum(1).as_subclass(torch.Tensor), x.sum(1))
