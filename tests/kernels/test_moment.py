"""Summaries of segments by the Triton kernels (on a GPU compiled, elsewhere in the interpreter) equal those of the
PyTorch form in float64."""

import pytest
import torch

from hla.ops import segments as algebra
from tests.ops.cases import F64, assert_close

pytest.importorskip("triton")
from hla.kernels import segments
from hla.kernels.moment import moment, moments_of_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _device():
    with torch.device(DEVICE):
        yield


def leaf(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype).requires_grad_()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heads", [(2, 2, 1), (2, 4, 2), (4, 2, 4), (2, None, 1)])
@pytest.mark.parametrize("T", [1, 70, 0])
def test_moment_and_its_gradients(T, heads, weighted, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 64)  # several segments
    Ha, Hb, Hw = heads
    a = leaf(2, T, Ha, 5)
    b = None if Hb is None else leaf(2, T, Hb, 20)
    w = torch.rand(2, T, Hw).requires_grad_() if weighted else None
    leaves = [x for x in (a, b, w) if x is not None]
    found = moment(a, b, w)
    dmoment = torch.randn_like(found)
    grads = torch.autograd.grad((found * dmoment).sum(), leaves)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (a, b, w)]
    truth = algebra._Moment.apply(*wide)
    grads_truth = torch.autograd.grad((truth * dmoment).sum(), [x for x in wide if x is not None])
    assert_close(found, truth, 1e-5)
    for x, y in zip(grads, grads_truth, strict=True):
        assert_close(x, y, 1e-5)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_moments_of_keys(weighted, used, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST_SEGMENT", 64)
    k, v = leaf(2, 70, 3, 5), leaf(2, 70, 3, 20)
    w = torch.rand(2, 70, 1).requires_grad_() if weighted else None
    leaves = [x for x in (k, v, w) if x is not None]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (k, v, w)]
    found = moments_of_keys(k, v, w)
    truth = algebra._Moment.apply(wide[0], None, wide[2]), algebra._Moment.apply(*wide)
    douts = [torch.randn_like(x) for x in found]
    results = []
    for moments, inputs in ((found, leaves), (truth, [x for x in wide if x is not None])):
        total = sum((x * d).sum() for x, d, use in zip(moments, douts, used, strict=True) if use)
        results.append([*moments, *torch.autograd.grad(total, inputs, allow_unused=True)])
    for x, y in zip(*results, strict=True):
        assert (x is None) == (y is None) or not x.any()
        if y is not None:
            assert_close(x, y, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("op", ["linear_attn", "hla2", "ahla", "hla3", "hla_q"])
def test_summaries(op, gated, monkeypatch):
    B, T, HQ, HKV, K, V = 1, 70, 2, 1, 5, 6
    q, k, v = leaf(B, T, HQ, K), leaf(B, T, HKV, K), leaf(B, T, HKV, V)
    options = dict(g=-torch.rand(B, T, HKV)) if gated else {}
    leaves = [k, v]
    if op not in ("linear_attn", "hla_q"):
        options |= dict(gain=torch.rand(B, T, HQ), ridge=torch.rand(B, T, HQ))
        leaves.append(q)
    tensors = [x.requires_grad_() for x in options.values()]

    def summary(wide: torch.dtype):
        inputs = [x.detach().to(wide).requires_grad_() for x in (q, k, v, *tensors)]
        named = dict(zip(options, inputs[3:], strict=True))
        found = algebra.summarize(op, *inputs[:3], **named)
        generator = torch.Generator(DEVICE).manual_seed(0)
        total = sum((x * torch.randn(x.shape, generator=generator, dtype=F64).to(wide)).sum() for x in found)
        return [*found, *torch.autograd.grad(total, inputs, allow_unused=True)]

    truth = summary(F64)
    used = []
    monkeypatch.setattr(algebra, "_has_kernels", lambda *_: used.append(1) or True)
    for x, y in zip(summary(torch.float32), truth, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert_close(x, y, 1e-4)
    assert used
