"""A layer whose convolution, feature map, norms and gates are kernels equals the layer operation by operation.

So do the gradients of its input and of every parameter.
"""

import pytest
import torch

from hla import HigherOrderLinearAttention, joined
from hla.layer_state import state_tensors
from hla.norm import RMSNorm
from tests.kernels.test_shape import CASES, new_layer
from tests.ops.cases import assert_close

pytest.importorskip("triton")
from hla.kernels import gates, shape, shape_training

MORE = {
    "many taps": dict(conv_size=5, output_gate=False),
    "no gate, no norm": dict(output_norm=False, output_gate=False, write_gate=False),
    "no norm": dict(output_norm=False),
    "hla2": dict(op="hla2", write_gate=True),
    "constants, decay": dict(ridge=0.5, nodes="token"),
    "one kv head": dict(num_kv_heads=1),
    "not joined": {},
}
CASES = CASES | MORE


def with_kernels(monkeypatch, joins: bool = True) -> None:
    monkeypatch.setattr(HigherOrderLinearAttention, "_has_kernels", lambda *_: True)
    monkeypatch.setattr(joined, "has_kernels", lambda _: joins)


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
    "one kv head": ["masked"],
    "no conv": ["masked"],
}


@pytest.mark.parametrize("case,how", [(case, how) for case in CASES for how in HOW[case]])
def test_kernels_equal_the_operations(case, how, monkeypatch):
    monkeypatch.setattr(shape_training, "STEPS", 2)  # several programs along the sequence
    monkeypatch.setattr(shape_training, "NUMBERS", 32)
    monkeypatch.setattr(shape_training, "PROGRAMS", 4)
    monkeypatch.setattr(gates, "STEPS", 2)
    monkeypatch.setattr(gates, "NUMBERS", 128)
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
    for module in (shape_training, gates):
        monkeypatch.setattr(module, "launch", lambda *a, f=module.launch, **k: (calls.append(a[0]), f(*a, **k)))
    products = []
    monkeypatch.setattr(joined._Joined, "apply", lambda *a, f=joined._Joined.apply: (products.append(1), f(*a))[1])
    with_kernels(monkeypatch, case != "not joined")
    found = results(layer.float(), x, dy, **options)
    assert len(products) == (case not in ("not joined", "grouped"))  # (which has biases)
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
    ddecay, dridge = torch.randn(2, 1, T, 1)
    mask = None
    if pads is not None:
        mask = torch.ones(1, T, 1, dtype=torch.bool)
        mask[:, pads] = False
    cu = None if ends is None else torch.tensor(ends, dtype=torch.int32)

    def results(layer: HigherOrderLinearAttention, kernels: bool) -> list[torch.Tensor]:
        dtype = layer.conv_weight.dtype
        leaf = x.to(dtype).requires_grad_()
        if kernels:
            *outputs, _, options, _ = shape_training.project(layer, leaf, mask, cu, None, False)
        else:
            *outputs, _, _ = layer._project(leaf, mask, None, cu, None, False)
            options = {"g": layer._log_decay(leaf, mask), **layer._coefficients(leaf, outputs[1])}
        outputs += [options["g"], options["ridge"]]
        used = [leaf, *(p for n, p in layer.named_parameters() if not n.startswith(("node", "gate", "o_")))]
        return [*outputs, *torch.autograd.grad(outputs, used, [d.to(dtype) for d in (*douts, ddecay, dridge)])]

    truth = results(layer.double(), False)
    with_kernels(monkeypatch)
    for a, b in zip(results(layer.float(), True), truth, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("case", ["default", "no gates", "many taps", "no conv", "hla2"])
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
    with_kernels(monkeypatch)
    for a, b in zip(in_pieces(torch.float32), truth, strict=True):
        assert (a is None) == (b is None) or not a.any()
        if b is not None:
            assert_close(a, b, 1e-3)


def test_subclasses_that_replace_what_kernels_do(monkeypatch):
    class Weighed(HigherOrderLinearAttention):
        def _project(self, *args):
            q, k, v, p, conv = super()._project(*args)
            return q, k, 3 * v, p, conv

    class Constant(HigherOrderLinearAttention):
        def _coefficients(self, x, k):
            return super()._coefficients(x, k) | {"ridge": 7.0}

    with_kernels(monkeypatch)
    x = torch.randn(1, 9, 40)
    for kind in (Weighed, Constant):
        layer = new_layer(dict(output_norm=False))
        plain, _ = layer(x)
        layer.__class__ = kind
        found, _ = layer(x)
        layer.backend = "torch"
        assert_close(found, layer(x)[0].double(), 1e-3)
        assert not torch.allclose(found, plain, rtol=1e-2)


@pytest.mark.parametrize("unused", [None, "ridge", "g", "q"])
def test_coefficients_from_their_logits(unused, monkeypatch):
    """Also where the ridge has reached its bounds, and at pads."""
    monkeypatch.setattr(shape_training, "STEPS", 2)
    monkeypatch.setattr(shape_training, "NUMBERS", 32)
    monkeypatch.setattr(shape_training, "PROGRAMS", 4)
    layer = new_layer(dict(num_kv_heads=1))
    layer.ridge_head.data.copy_(torch.tensor([-11.5, 0.0, 1.0, 12.5]))
    layer.dt_bias.data.fill_(-6)
    first = layer.channels + 1  # the write gate's column is before
    y, mask = torch.randn(2, 37, first + 4 + 1 + 3), torch.rand(2, 37, 1) > 0.3
    dridge, dg, dq = torch.randn(2, 37, 4), torch.randn(2, 37, 1), torch.randn(2, 37, 4, 10)
    used = [layer.ridge_head, layer.A_log, layer.dt_bias]

    def plain(y: torch.Tensor, head, a_log, bias) -> tuple:
        ridge = (y[..., first : first + 4] + head).clamp(-12, 12).exp()
        return ridge, -a_log.exp() * torch.nn.functional.softplus(y[..., first + 4 : first + 5] + bias) * mask

    def gradients(ridge, g, leaves: list, q=None) -> list:
        total = 0 if unused == "ridge" else (ridge.log() * dridge.to(ridge.dtype)).sum()
        total = total + (0 if unused == "g" else (g * dg.to(g.dtype)).sum())
        total = total + (0 if unused == "q" or q is None else (q * dq).sum())
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    exact = [x.detach().double().requires_grad_() for x in (y, *used)]
    truth = [*plain(*exact), *gradients(*plain(*exact), exact)]
    y.requires_grad_()
    q, _, _, ridge, g = shape_training.shaped(layer, y, mask, None)
    found = [ridge, g, *gradients(ridge, g, [y, *used], q)]
    for a, b in zip(found[:2] + found[3:], truth[:2] + truth[3:], strict=True):
        assert not a.any() if b is None else assert_close(a, b, 1e-6) is None
    dy, true_dy = found[2], truth[2]
    assert ((true_dy[..., first : first + 4] == 0) == (dy[..., first : first + 4] == 0)).all()  # where it is clamped
    assert_close(dy[..., first : first + 5], true_dy[..., first : first + 5], 1e-6)
    assert not dy[..., first + 5 :].any() and not dy[..., first - 1].any()
    assert dy[..., : layer.channels].any() == (unused != "q")


def test_no_tokens():
    layer = new_layer({})
    x = torch.randn(2, 0, layer.channels + 12, requires_grad=True)
    q, *_ = shape_training.shaped(layer, x, None, None)
    q.sum().backward()
    assert x.grad.shape == x.shape and not layer.conv_weight.grad.any()


def test_one_token_whose_strides_mean_nothing():
    """A dimension of size 1 may have any stride, and the tensor is still contiguous."""
    layer = new_layer(CASES["grouped"])
    y = torch.randn(1, 3, layer.channels + 8).transpose(0, 1)
    assert y.is_contiguous() and y.stride(1) == 3 * y.shape[2]

    def results(y: torch.Tensor) -> list[torch.Tensor]:
        y = y.detach().requires_grad_()
        outputs = shape_training.shaped(layer, y, None, None)
        return [*outputs, *torch.autograd.grad(sum(y.pow(3).sum() for y in outputs), y)]

    for x, z in zip(results(y), results(y.reshape(-1).view(3, 1, -1)), strict=True):
        assert torch.equal(x, z)


def test_under_torch_compile_without_a_graph_break(monkeypatch):
    layer = new_layer({})
    x, dy = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    truth = results(layer.double(), x, dy)
    with_kernels(monkeypatch)
    found = results(torch.compile(layer.float(), fullgraph=True, backend="aot_eager"), x, dy)
    for (name, y), z in zip(truth.items(), found.values(), strict=True):
        assert not z.any() if y is None else assert_close(z, y, 1e-3, name) is None


@pytest.mark.parametrize("columns", [12, 64])
@pytest.mark.parametrize("D", [12, 10])
def test_gated_norm_of_a_gate_with_more_columns(D, columns):
    norm = RMSNorm(D, eps=1e-6)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    o, gate, dout = torch.randn(2, 9, 3, D), torch.randn(2, 9, 3 * D + columns), torch.randn(2, 9, 3 * D)

    def results(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [y.to(dtype).requires_grad_() for y in (o, gate)]
        out = function(norm.to(dtype), *leaves)
        return [out, *torch.autograd.grad(out, [*leaves, norm.weight], dout.to(dtype))]

    def plain(norm: RMSNorm, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return norm(o).flatten(2) * torch.nn.functional.silu(gate[..., : 3 * D])

    truth = results(plain, torch.float64)
    for x, y in zip(results(gates.gated_norm, torch.float32), truth, strict=True):
        assert_close(x, y, 1e-6)


@pytest.mark.parametrize("more", [None, 0, 24], ids=["apart", "side by side", "and more columns"])
@pytest.mark.parametrize("size", [1000, 48, 7, 3000])
def test_silu_product(size, more):
    a, b, dout = (torch.randn(3, 5, size, dtype=torch.float64) for _ in range(3))
    rest = torch.randn(3, 5, more or 0, dtype=torch.float64)

    def results(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (a, b, rest)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype), materialize_grads=True, allow_unused=True)]

    def kernel(a: torch.Tensor, b: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        if more is None:
            return gates.silu_product(a, b)
        return gates.silu_of_halves(torch.cat([a, b, rest], -1), size)

    truth = results(lambda a, b, rest: torch.nn.functional.silu(a) * b, torch.float64)
    *found, drest = results(kernel, torch.float32)
    for x, y in zip(found, truth, strict=False):
        assert_close(x, y, 1e-6)
    assert drest.shape == rest.shape and not drest.any()


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
    (out,) = gates._product_operation.op([a, b], [True, True], "8")
    found = torch.autograd.grad(Nothing.apply(out).sum() + a.sum(), [a, b], allow_unused=True)
    assert torch.equal(found[0], torch.ones_like(a)) and found[1] is None


class OtherGate(HigherOrderLinearAttention):
    def _gate_logits(self, hidden_states):
        return 0 * super()._gate_logits(hidden_states) + 5


class OtherRidge(HigherOrderLinearAttention):
    def _positive_ridge(self, hidden_states):
        return 0 * super()._positive_ridge(hidden_states) + 9


@pytest.mark.parametrize("kind", [OtherGate, OtherRidge])
def test_what_a_subclass_computes_in_its_own_way_is_left_to_it(kind, monkeypatch):
    torch.manual_seed(0)
    layer, x, dy = kind(16, 2), torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    truth = results(layer.double(), x, dy)
    monkeypatch.setattr(HigherOrderLinearAttention, "_has_kernels", lambda *_: True)
    assert_close(results(layer.float(), x, dy)["y"], truth["y"], 1e-4)
