"""`hla_q` on Hopper GPUs: the walk that does everything forward equals the three launches it takes the place of."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import hla

pytest.importorskip("triton")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from hla.kernels import query_side, query_side_walk  # noqa: E402
from hla.ops.state import HLAQState  # noqa: E402

SHAPES = {
    "short": dict(B=2, T=65, HQ=4, HKV=2),
    "one token": dict(B=1, T=1, HQ=2, HKV=1),
    "split": dict(B=1, T=2100, HQ=2, HKV=2),
    "packed": dict(B=1, T=900, HQ=4, HKV=1, lengths=(0, 1, 63, 64, 0, 65, 300, 407)),
}
OPTIONS = ("gate", "no gate", "strong gate", "states", "order 1", "order 2", "scale", "nodes")


def inputs(D: int, option: str, *, B: int, T: int, HQ: int, HKV: int, lengths: tuple[int, ...] = ()):
    generator = torch.Generator("cuda").manual_seed(T + D)
    new = lambda *s: torch.randn(*s, generator=generator, device="cuda")  # noqa: E731
    q, k = (F.normalize(new(B, T, heads, D), dim=-1).bfloat16() for heads in (HQ, HKV))
    v = new(B, T, HKV, D).bfloat16()
    kw = dict(order=int(option[-1]) if option.startswith("order") else 4, ridge=1 + new(B, T, HQ).abs())
    if option != "no gate":
        kw["g"] = -new(B, T, HKV).abs() * (4.0 if option == "strong gate" else 0.05)
    if option == "scale":
        kw["scale"] = -0.3
    if option == "nodes":
        kw["nodes"] = 0.1 + new(B, T, HQ, 5).abs()
    if lengths:
        kw["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    if option == "states":
        keys, values = (new(len(lengths) or B, HKV, 3, D) for _ in range(2))
        kw["initial_state"] = HLAQState(keys.mT @ keys / D, keys.mT @ values / D)
    return (q, k, v), kw


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("D", [64, 128])
def test_one_walk_equals_three_launches(D, shape, option, monkeypatch):
    tensors, kw = inputs(D, option, **SHAPES[shape])
    monkeypatch.setattr(query_side, "fills", lambda *sizes: True)
    walked = []
    walk = query_side_walk.walk_through
    monkeypatch.setattr(query_side_walk, "walk_through", lambda *a, **k: walked.append(1) or walk(*a, **k))

    do = torch.linspace(-1, 1, tensors[0].numel(), device="cuda").view(tensors[0].shape).bfloat16()

    def run(dtype=torch.bfloat16, backend="triton"):
        more = kw
        if "initial_state" in kw and dtype == torch.float64:
            more = kw | {"initial_state": HLAQState(*(x.double() for x in kw["initial_state"]))}
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        with torch.no_grad():  # without x for a backward pass
            alone, _ = hla.hla_q(*leaves, **more, backend=backend)
        o, (S, P) = hla.hla_q(*leaves, **more, output_final_state=True, backend=backend)
        dq, dk, dv = torch.autograd.grad(o, leaves, do.to(o.dtype))
        return {"alone": alone, "o": o.detach(), "S": S.detach(), "P": P.detach(), "dq": dq, "dk": dk, "dv": dv}

    found = run()
    assert walked
    monkeypatch.setattr(query_side, "_copies", lambda *tensors: False)
    other = run()
    assert len(walked) == 2
    truth = run(torch.float64, "torch")
    for name, y in truth.items():
        size = y.double().norm()
        errors = [float((x[name].double() - y).norm() / size) for x in (found, other)]
        # (Of one token o is one number times v: the roundings of a few numbers do not average out.)
        cap = 5e-2 if name.startswith("d") else 1.5e-2 if shape == "one token" else 5e-3
        assert errors[0] <= cap, (name, errors)
        if shape != "one token":
            assert errors[0] <= max(1.3 * errors[1], 1e-5), (name, errors)


def test_rows_that_cannot_be_copied_whole_take_the_other_way(monkeypatch):
    monkeypatch.setattr(query_side, "fills", lambda *sizes: True)
    (q, k, v), kw = inputs(64, "gate", **SHAPES["short"])
    shifted = torch.empty(q.numel() + 4, device="cuda", dtype=q.dtype)[4:].view(q.shape).copy_(q)
    monkeypatch.setattr(query_side_walk, "walk_through", lambda *a, **k: pytest.fail("rows are not aligned"))
    o, _ = hla.hla_q(shifted, k, v, **kw, backend="triton")
    truth, _ = hla.hla_q(q.double(), k.double(), v.double(), **kw, backend="torch")
    assert (o.double() - truth).norm() <= 5e-3 * truth.norm()
