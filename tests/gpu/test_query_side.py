"""`hla_q` on Hopper GPUs: the kernels in Gluon, forward, equal those in Triton that they take the place of."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import hla

pytest.importorskip("triton")
from hla.kernels.configs import has_gluon  # noqa: E402

if not torch.cuda.is_available() or not has_gluon(torch.cuda.get_device_capability()):
    pytest.skip("needs a Hopper GPU and a Triton whose Gluon is known", allow_module_level=True)

from hla.kernels import ahead, query_side, query_side_walk  # noqa: E402
from hla.ops.state import HLAQState  # noqa: E402

SHAPES = {
    "short": dict(B=2, T=65, HQ=4, HKV=2),
    "one token": dict(B=1, T=1, HQ=2, HKV=1),
    "split": dict(B=1, T=2100, HQ=2, HKV=2),
    "packed": dict(B=1, T=200, HQ=4, HKV=2, lengths=(0, 1, 63, 0, 65, 71)),
    "packed and split": dict(B=1, T=900, HQ=4, HKV=1, lengths=(0, 1, 63, 64, 0, 65, 300, 407)),
}
KERNEL = {64: "walk_readings", 128: "solve_hopper"}  # by head size
OPTIONS = ("gate", "no gate", "strong gate", "states", "order 1", "order 2", "scale", "nodes")


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched (not: rehearsed to be compiled ahead), but for those of walks."""
    names: list[str] = []
    for module in (query_side, query_side_walk):

        def note(kernel, *args, launch=module.launch, **constants):
            if ahead.local.notes is None:
                names.append(kernel.__name__)
            launch(kernel, *args, **constants)

        monkeypatch.setattr(module, "launch", note)
    return names


def inputs(option: str, D: int, *, B: int, T: int, HQ: int, HKV: int, lengths: tuple[int, ...] = ()):
    generator = torch.Generator("cuda").manual_seed(T)
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
@pytest.mark.parametrize("D", KERNEL)
def test_kernels_for_hopper_equal_those_for_all(D, shape, option, launched, monkeypatch):
    tensors, kw = inputs(option, D, **SHAPES[shape])
    do = torch.linspace(-1, 1, tensors[0].numel(), device="cuda").view(tensors[0].shape).bfloat16()

    def run(dtype=torch.bfloat16, backend="triton"):
        more = kw
        if "initial_state" in kw and dtype == torch.float64:
            more = kw | {"initial_state": HLAQState(*(x.double() for x in kw["initial_state"]))}
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        numbers = {name: more[name].clone().requires_grad_() for name in ("g", "ridge", "nodes") if name in more}
        more = more | numbers
        with torch.no_grad():  # without x for a backward pass
            alone, _ = hla.hla_q(*leaves, **more, backend=backend)
        o, (S, P) = hla.hla_q(*leaves, **more, output_final_state=True, backend=backend)
        names = ["dq", "dk", "dv", *(f"d{name}" for name in numbers)]
        gradients = torch.autograd.grad(o, [*leaves, *numbers.values()], do.to(o.dtype))
        found = {"alone": alone, "o": o.detach(), "S": S.detach(), "P": P.detach()}
        return found | dict(zip(names, gradients, strict=True))

    found = run()
    assert KERNEL[D] in launched
    monkeypatch.setattr(query_side, "copies_whole", lambda *tensors: False)
    launched.clear()
    other = run()
    assert KERNEL[D] not in launched
    truth = run(torch.float64, "torch")
    for name, y in truth.items():
        size = y.double().norm().clamp(min=1e-3)  # (a gate does nothing to a single token)
        errors = [float((x[name].double() - y).norm() / size) for x in (found, other)]
        # (Of one token o is one number times v: the roundings of a few numbers do not average out.)
        few = shape == "one token"
        cap = (1e-1 if few else 5e-2) if name.startswith("d") else 1.5e-2 if few else 5e-3
        assert errors[0] <= (max(cap, 1.01 * errors[1]) if few else cap), (name, errors)
        if not few:
            assert errors[0] <= max(1.5 * errors[1], 1e-5), (name, errors)


@pytest.mark.parametrize("D", KERNEL)
def test_rows_that_cannot_be_copied_whole_take_the_other_way(D, launched):
    """Forward; the gradient copies them."""
    (q, k, v), kw = inputs("gate", D, **SHAPES["short"])
    shifted = torch.empty(q.numel() + 4, device="cuda", dtype=q.dtype)[4:].view(q.shape).copy_(q)
    results = []
    for x in (q, shifted):
        leaves = [y.detach().requires_grad_() for y in (x, k, v)]
        launched.clear()
        o, _ = hla.hla_q(*leaves, **kw, backend="triton")
        assert (KERNEL[D] in launched) == (x is q)
        results.append([o, *torch.autograd.grad(o, leaves, torch.ones_like(o))])
    for x, y in zip(*results, strict=True):
        assert (x - y).float().norm() <= 1e-2 * x.float().norm()
