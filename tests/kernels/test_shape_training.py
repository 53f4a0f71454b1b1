"""A layer whose convolution, feature map, norms and gates are kernels equals the layer operation by operation.

So do the gradients of its input and of every parameter.
"""

import pytest
import torch

from hla import HigherOrderLinearAttention
from hla.layer_state import state_tensors
from tests.kernels.test_shape import CASES, new_layer
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import shape, shape_training

MORE = {
    "many taps": dict(conv_size=5, output_gate=False),
    "no gate, no norm": dict(output_norm=False, output_gate=False, write_gate=False),
    "hla2": dict(op="hla2", write_gate=True),
}
CASES = CASES | MORE


def results(layer, x: torch.Tensor, dy: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    x = x.to(next(layer.parameters()).dtype).requires_grad_()
    y, _ = layer(x, **options)
    used = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((y * dy.to(y.dtype)).sum(), [x, *used.values()], allow_unused=True)
    return {"y": y, **dict(zip(["x", *used], grads, strict=True))}


HOW = {name: ["plain"] for name in CASES} | {
    "default": ["plain", "masked", "packed"],
    "grouped": ["masked"],
    "many taps": ["packed"],
    "no conv": ["masked"],
}


@pytest.mark.parametrize("case,how", [(case, how) for case in CASES for how in HOW[case]])
def test_kernels_equal_the_operations(case, how, monkeypatch):
    monkeypatch.setattr(shape_training, "STEPS", 2)  # several programs along the sequence
    monkeypatch.setattr(shape_training, "NUMBERS", 128)
    monkeypatch.setattr(shape_training, "GRADIENT", (64, 3, 3))
    layer = new_layer(CASES[case])
    B = 1 if how == "packed" else 2
    x, dy = torch.randn(B, 21, 40), torch.randn(B, 21, 40)
    options = {
        "plain": {},
        "masked": dict(attention_mask=torch.rand(B, 21) > 0.3),
        "packed": dict(cu_seqlens=torch.tensor([0, 2, 2, 3, 11, 21], dtype=torch.int32)),
    }[how]
    truth = results(layer.double(), x, dy, **options)
    calls = []
    monkeypatch.setattr(
        shape_training, "launch", lambda *a, f=shape_training.launch, **k: (calls.append(a[0]), f(*a, **k))
    )
    monkeypatch.setattr(HigherOrderLinearAttention, "_has_kernels", lambda *_: True)
    found = results(layer.float(), x, dy, **options)
    names = [kernel.__name__ for kernel in calls]
    assert names.count("_shape") == names.count("_shape_gradient") == 1
    assert names.count("_gated_norm") == (2 if layer.o_norm is not None else 0)
    assert found.keys() == truth.keys()
    for name, y in truth.items():
        if y is None:
            assert found[name] is None or not found[name].any()
        else:
            assert_close(found[name], y, 1e-3, name)  # (what hla_q does to float32)


# Runs have 6 tokens here, programs 12.
BORDERS = {
    "few tokens": dict(T=5),
    "a run less one": dict(T=11),
    "whole programs": dict(T=12),
    "one token more": dict(T=13),
    "sequences end with runs": dict(T=26, ends=[0, 6, 12, 18, 24, 26]),
    "sequences end beside runs": dict(T=26, ends=[0, 5, 6, 7, 11, 13, 17, 19, 26]),
    "sequences over programs": dict(T=26, ends=[0, 1, 14, 15, 26]),
    "pads end with runs": dict(T=26, pads=[0, 1, 2, 3, 4, 5, 12, 13, 14, 24]),
    "pads beside runs": dict(T=26, pads=[5, 7, 10, 11, 13, 15, 23, 25]),
}


@pytest.mark.parametrize("name", BORDERS)
def test_at_borders_of_runs_and_programs(name, monkeypatch):
    monkeypatch.setattr(shape, "PROGRAMS", 1)
    monkeypatch.setattr(shape_training, "TILE", (32, 2, 6))
    monkeypatch.setattr(shape_training, "GRADIENT", (32, 3, 6))
    T, ends, pads = (BORDERS[name].get(n) for n in ("T", "ends", "pads"))
    assert shape.runs_of(1, 26, 3, 16, (32, 3, 6)) == (2, 6, 3, 3)
    torch.manual_seed(0)
    layer = HigherOrderLinearAttention(10, 1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, douts = torch.randn(1, T, 10), torch.randn(3, 1, T, 1, 10)
    mask = None
    if pads is not None:
        mask = torch.ones(1, T, 1, dtype=torch.bool)
        mask[:, pads] = False
    cu = None if ends is None else torch.tensor(ends, dtype=torch.int32)

    def results(layer: HigherOrderLinearAttention, dtype: torch.dtype) -> list[torch.Tensor]:
        layer, leaf = layer.to(dtype), x.to(dtype).requires_grad_()
        outputs = layer._project(leaf, mask, None, cu, None, False)[:3]
        used = [leaf, layer.qkv_proj.weight, layer.conv_weight, layer.write_proj.weight]
        return [*outputs, *torch.autograd.grad(outputs, used, list(douts.to(dtype)))]

    truth = results(layer, torch.float64)
    monkeypatch.setattr(HigherOrderLinearAttention, "_has_kernels", lambda *_: True)
    for a, b in zip(results(layer, torch.float32), truth, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("case", ["default", "no gates", "many taps", "no conv"])
def test_a_layer_that_goes_on_has_the_same_gradients(case, monkeypatch):
    """Pieces of which the second is shorter than the convolution."""
    layer = new_layer(CASES[case])
    x, dy = torch.randn(2, 12, 40), torch.randn(2, 12, 40)

    def in_pieces(dtype: torch.dtype) -> list[torch.Tensor]:
        moved = layer.to(dtype)
        inputs, state, outputs = x.to(dtype).requires_grad_(), None, []
        for piece in inputs.split([7, 2, 3], 1):
            y, state = moved(piece, state=state, output_state=True)
            outputs.append(y)
        total = (torch.cat(outputs, 1) * dy.to(dtype)).sum() + sum(s.square().sum() for s in state_tensors(state))
        used = [p for p in moved.parameters() if p.requires_grad]
        return [*outputs, *torch.autograd.grad(total, [inputs, *used], allow_unused=True)]

    truth = in_pieces(torch.float64)
    monkeypatch.setattr(HigherOrderLinearAttention, "_has_kernels", lambda *_: True)
    for a, b in zip(in_pieces(torch.float32), truth, strict=True):
        assert (a is None) == (b is None) or not a.any()
        if b is not None:
            assert_close(a, b, 1e-3)


def test_no_tokens():
    layer = new_layer({})
    x = torch.randn(2, 0, layer.channels, requires_grad=True)
    q, _, _ = shape_training.shaped(layer, x, torch.randn(2, 0, 4), None, None)
    q.sum().backward()
    assert x.grad.shape == x.shape


def test_one_token_whose_strides_mean_nothing():
    """A dimension of size 1 may have any stride, and the tensor is still contiguous."""
    layer = new_layer(CASES["grouped"])
    qkv, write = torch.randn(1, 3, layer.channels).transpose(0, 1), torch.randn(1, 3, 2).transpose(0, 1)
    assert qkv.is_contiguous() and qkv.stride(1) == 3 * layer.channels

    def results(*leaves: torch.Tensor) -> list[torch.Tensor]:
        leaves = tuple(x.detach().requires_grad_() for x in leaves)
        outputs = shape_training.shaped(layer, *leaves, None, None)
        return [*outputs, *torch.autograd.grad(sum(y.pow(3).sum() for y in outputs), leaves)]

    usual = (x.view(-1).view(3, 1, -1) for x in (qkv, write))
    for x, y in zip(results(qkv, write), results(*usual), strict=True):
        assert torch.equal(x, y)


def test_silu_product():
    a, b, dout = (torch.randn(3, 1000, dtype=torch.float64) for _ in range(3))

    def results(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (a, b)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    truth = results(lambda x, y: torch.nn.functional.silu(x) * y, torch.float64)
    for x, y in zip(results(shape_training.silu_product, torch.float32), truth, strict=True):
        assert_close(x, y, 1e-6)


def test_an_output_whose_gradient_is_none():
    """As a `torch.library` operator (so for subclasses of tensors), where eager mode has no gradient to go through."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    a, b = torch.randn(2, 2, 8, requires_grad=True).unbind()
    (out,) = shape_training._product_operation.op([a, b], [True, True], "")
    found = torch.autograd.grad(Nothing.apply(out).sum() + a.sum(), [a, b], allow_unused=True)
    assert torch.equal(found[0], torch.ones_like(a)) and found[1] is None
