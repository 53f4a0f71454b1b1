"""Linear maps joined in one product are the maps: outputs, gradients of the input and of every weight."""

import copy

import pytest
import torch
from torch import nn

from hla import joined as module
from hla.joined import joinable, joined
from hla.models import HLAConfig, modeling_hla
from hla.models.modeling_hla import HLAMLP
from tests.ops.cases import assert_close
from tests.test_projection import Doubled, linear_with

GROUPS = [[40, 3, 5], [64], [7]]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    for owner in (module, modeling_hla):
        monkeypatch.setattr(owner, "has_kernels", lambda x: True)


def new_maps(dtype: torch.dtype = torch.float64) -> list[list[nn.Linear]]:
    return [[nn.Linear(12, n, bias=False, dtype=dtype) for n in group] for group in GROUPS]


def apart(x: torch.Tensor, groups: list[list[nn.Linear]]) -> list[torch.Tensor]:
    outputs = [torch.cat([linear(x) for linear in group], -1) for group in groups]
    return [nn.functional.pad(y, (0, -y.shape[-1] % 64)) for y in outputs]


def results(function, x: torch.Tensor, groups: list, douts: list[torch.Tensor], used: list) -> list:
    outputs = function(x, groups)
    total = sum((y.double() * dy).sum() for y, dy in zip(outputs, douts, strict=True) if dy is not None)
    return [*outputs, *torch.autograd.grad(total, used, allow_unused=True)]


@pytest.mark.parametrize("shape", [(2, 9, 12), (5, 12), (2, 0, 12)])
@pytest.mark.parametrize("unused", [None, 0, 2])
@pytest.mark.parametrize("frozen", [None, "input", "a weight", "a group"])
def test_it_is_the_products(frozen, unused, shape, monkeypatch):
    groups, x = new_maps(), torch.randn(*shape, dtype=torch.float64)
    x.requires_grad_(frozen != "input")
    for linear in {"a weight": groups[0][1:2], "a group": groups[0]}.get(frozen, []):
        linear.weight.requires_grad_(False)
    douts = [torch.randn(*shape[:-1], 64, dtype=torch.float64) for _ in GROUPS]
    if unused is not None:
        douts[unused] = None
    used = [y for y in (x, *(m.weight for group in groups for m in group)) if y.requires_grad]
    found = results(joined, x, groups, douts, used)
    assert found[0].grad_fn.name() == "_JoinedBackward"
    for a, b in zip(found, results(apart, x, groups, douts, used), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-12) if b.numel() else None
    assert found[0].shape[-1] == 64 and not found[0][..., 48:].any()


def test_nothing_that_needs_a_gradient():
    x, maps = torch.randn(3, 12, dtype=torch.float64), new_maps()[0]
    for linear in maps:
        linear.weight.requires_grad_(False)
    assert joinable(x, maps) and not joined(x, [maps])[0].requires_grad


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16])
def test_under_autocast(input, weights):
    """As maps of their own: rounded at the same places, gradients in the dtypes of what they are of."""
    groups, x = new_maps(weights), torch.randn(4, 12).to(input).requires_grad_()
    douts = [torch.randn(4, 64).double() for _ in GROUPS]
    used = [x, *(m.weight for group in groups for m in group)]
    with torch.autocast("cpu"):
        found, plain = (results(f, x, groups, douts, used) for f in (joined, apart))
        with torch.no_grad():
            assert joinable(x, groups[0])
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == b.dtype
        assert_close(a.double(), b.double(), 1e-2)
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], plain[0])


@pytest.mark.parametrize("cast", [False, True])
def test_what_is_kept_for_the_gradient(cast):
    """Weights themselves, which a sharded model gives back meanwhile, unless a cast has made others of them."""
    groups, x, kept = new_maps(torch.float32), torch.randn(4, 12, requires_grad=True), []
    with torch.autocast("cpu", enabled=cast):
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
            joined(x, groups)
    weights = [m.weight.data_ptr() for group in groups for m in group]
    assert [y.data_ptr() in weights for y in kept] == ([False] * 4 if cast else [False] + [True] * 5)
    assert {y.dtype for y in kept} == {torch.bfloat16 if cast else torch.float32}


def test_double_backward_is_refused():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(joined(x, new_maps())[0].sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "linear",
    [
        Doubled(12, 40, bias=False),
        nn.Linear(12, 40),
        linear_with(lambda m: m.register_forward_hook(lambda *call: 2 * call[-1])),
        linear_with(lambda m: m.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],))),
        linear_with(lambda m: m.register_full_backward_hook(lambda *call: None)),
        linear_with(lambda m: setattr(m, "forward", lambda x: torch.zeros(3, 40))),
        nn.Sequential(nn.Linear(12, 40)),
    ],
    ids=["subclass", "bias", "hook", "pre-hook", "backward hook", "forward", "module"],
)
def test_what_is_more_than_a_product_is_called(linear):
    maps, x = [linear, nn.Linear(12, 5, bias=False)], torch.randn(3, 12)
    assert joinable(x, maps[1:]) and not joinable(x, maps)
    (y,) = joined(x, [maps])
    assert torch.equal(y, torch.cat([linear(x), maps[1](x), torch.zeros(3, 19)], -1))


def test_weights_of_other_dtypes_are_joined_under_autocast_alone():
    x, maps = torch.randn(3, 12), new_maps(torch.bfloat16)[0]
    assert not joinable(x, maps)
    with torch.autocast("cpu"):
        assert joinable(x, maps)


@torch.no_grad()
def test_without_gradients_nothing_is_copied():
    groups, x = new_maps(), torch.randn(3, 12, dtype=torch.float64)
    assert not joinable(x, groups[0])
    for a, b in zip(joined(x, groups), apart(x, groups), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [64, 40])
def test_mlp(size, monkeypatch):
    pytest.importorskip("triton")
    config = HLAConfig(vocab_size=16, hidden_size=12, num_attention_heads=2, intermediate_size=size)
    mlp, x, dy = HLAMLP(config), torch.randn(2, 9, 12), torch.randn(2, 9, 12)

    def results(mlp: HLAMLP, dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = mlp.to(dtype)(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *mlp.parameters()], dy.to(dtype))]

    products = []
    monkeypatch.setattr(module._Joined, "apply", lambda *a, f=module._Joined.apply: (products.append(1), f(*a))[1])
    monkeypatch.setattr(modeling_hla, "has_kernels", lambda x: x.dtype == torch.float32)
    truth = results(copy.deepcopy(mlp), torch.float64)
    for hooked in (False, True):
        if hooked:
            mlp.up_proj.register_forward_hook(lambda *call: None)
        for found, y in zip(results(mlp, torch.float32), truth, strict=True):
            assert_close(found, y, 1e-6)
    assert len(products) == 1


def test_a_backward_pass_inside_autocast_computes_as_the_forward_pass_did():
    groups, x = new_maps(torch.float32), torch.randn(5, 12, requires_grad=True)
    used = [x, *(linear.weight for group in groups for linear in group)]
    truth = torch.autograd.grad(sum(y.sum() for y in apart(x, groups)), used)
    total = sum(y.sum() for y in joined(x, groups))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, used)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)
