"""The kernels around the operator of a layer that trains, on a card, beside the operations they replace."""

import copy

import pytest
import torch
from torch.nn import functional as F

from hla import HigherOrderLinearAttention, joined
from hla.models import HLAConfig, modeling_hla
from hla.models.modeling_hla import HLAAttention, HLABlock
from hla.norm import RMSNorm
from hla.rotary import rope_cos_sin
from tests.kernels.test_shape import CASES

pytest.importorskip("triton")
from hla.kernels import rotary
from hla.kernels.gates import gated_norm, silu_of_halves, silu_product
from hla.kernels.shape_training import project

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_no_worse(found: list, plain: list, truth: list, dtype: torch.dtype, factor: float = 1.2) -> None:
    floor = 2e-5 if dtype == torch.float32 else 2e-3
    for i, (x, y, z) in enumerate(zip(found, plain, truth, strict=True)):
        error, yardstick = (float((a.double() - z).norm() / z.norm().clamp(min=1e-30)) for a in (x, y))
        assert error <= max(factor * yardstick, floor), (i, error, yardstick)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "grouped"])
def test_from_the_input_of_a_layer_to_that_of_its_operator(case, how, dtype):
    torch.manual_seed(0)
    layer = HigherOrderLinearAttention(512, 4, **CASES[case]).cuda().to(dtype)
    B, T = (1, 900) if how == "packed" else (2, 450)
    x = torch.randn(B, T, 512, device="cuda").to(dtype)
    mask = torch.ones(B, T, 1, device="cuda", dtype=torch.bool)
    mask[0, 300:] = False
    ends = torch.tensor([0, 2, 2, 500, 900], dtype=torch.int32, device="cuda")
    mask, ends = mask if how == "masked" else None, ends if how == "packed" else None

    def results(layer: HigherOrderLinearAttention, x: torch.Tensor, kernels: bool) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        if kernels:
            *outputs, _, options, _ = project(layer, x, mask, ends, None, False)
        else:
            *outputs, _, _ = layer._project(x, mask, None, ends, None, False)
            options = {"g": layer._log_decay(x, mask), **layer._coefficients(x, outputs[1])}
        learned = {"g": layer.decay == "token", "ridge": torch.is_tensor(options.get("ridge"))}
        outputs += [options[n] for n, yes in learned.items() if yes]
        generator = torch.Generator("cuda").manual_seed(1)
        douts = [torch.randn(y.shape, device="cuda", generator=generator).to(dtype).to(y.dtype) for y in outputs]
        used = [p for n, p in layer.named_parameters() if not n.startswith(("gate_proj", "node", "o_"))]
        return [*outputs, *torch.autograd.grad(outputs, [x, *used], douts)]

    truth = results(copy.deepcopy(layer).double(), x.double(), False)
    found, again = results(layer, x, True), results(layer, x, True)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    # (A few numbers per head: how far each of the two is from the truth is chance.)
    assert_no_worse(found, results(layer, x, False), truth, dtype, factor=2)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "float32"])
def test_a_block_whose_linear_maps_are_joined(how, monkeypatch):
    """Beside one whose maps are not, with rows of gates and of the MLP that are filled up."""
    torch.manual_seed(0)
    config = HLAConfig(hidden_size=512, num_attention_heads=3, head_dim=72, intermediate_size=328)
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    block = HLABlock(config, 0).cuda().to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    x, dy = torch.randn(2, 450, 512, device="cuda"), torch.randn(2, 450, 512, device="cuda")
    products = []  # the groups of each

    def counted(x, dtype, sizes, *weights, apply=joined._Joined.apply):
        products.append(len(sizes))
        return apply(x, dtype, sizes, *weights)

    monkeypatch.setattr(joined._Joined, "apply", counted)

    def results(block: HLABlock) -> list[torch.Tensor]:
        leaf = x.to(block.mixer.qkv_proj.weight.dtype).requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast" and leaf.dtype == torch.float32):
            y = block(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *block.parameters()], dy.to(y.dtype))]

    truth = results(copy.deepcopy(block).double())
    assert products == []
    found, again = results(block), results(block)
    assert products == [2, 1] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for owner in (joined, modeling_hla):
        monkeypatch.setattr(owner, "joinable", lambda *_: False)
    plain = results(block)
    assert len(products) == 4
    # (A few numbers per head: how far each of the two is from the truth is chance.)
    few = [3 if x.numel() <= 16 else 1.5 for x in truth]
    for one in zip(found, plain, truth, few, strict=True):
        assert_no_worse(*([x] for x in one[:3]), dtype, factor=one[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [320, 328, 1001])
def test_silu_product(size, dtype):
    torch.manual_seed(0)
    both, dout = torch.randn(700, 2 * size + 24).cuda().to(dtype), torch.randn(700, size).cuda().to(dtype)

    def results(function, wide: torch.dtype) -> list[torch.Tensor]:
        leaf = both.to(wide).requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out, leaf, dout.to(wide))]

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x[:, :size]) * x[:, size : 2 * size]

    truth, yardstick = results(plain, torch.float64), results(plain, dtype)
    assert_no_worse(results(lambda x: silu_of_halves(x, size), dtype), yardstick, truth, dtype)
    apart = results(lambda x: silu_product(x[:, :size], x[:, size : 2 * size]), dtype)
    assert_no_worse(apart, yardstick, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True, "wide"])
@pytest.mark.parametrize("D", [40, 128])
def test_gated_norm(D, gated, dtype):
    """wide: rows of the gate with more columns than are read."""
    torch.manual_seed(0)
    norm = RMSNorm(D, eps=1e-6).cuda()
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    columns = 3 * D + (24 if gated == "wide" else 0)
    o, gate, dout = torch.randn(2, 700, 3, D), torch.randn(2, 700, columns), torch.randn(2, 700, 3 * D)
    o, gate, dout = (y.cuda().to(dtype) for y in (o, gate, dout))

    def results(function, norm: RMSNorm, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [y.to(wide).requires_grad_() for y in ((o, gate) if gated else (o,))]
        out = function(norm, leaves[0], leaves[1] if gated else None)
        return [out, *torch.autograd.grad(out, [*leaves, norm.weight], dout.to(wide))]

    def plain(norm: RMSNorm, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return norm(o).flatten(2) * (1 if gate is None else F.silu(gate[..., : 3 * D]))

    truth = results(plain, copy.deepcopy(norm).double(), torch.float64)
    assert_no_worse(results(gated_norm, norm, dtype), results(plain, norm, dtype), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["plain", "masked", "packed"])
@pytest.mark.parametrize("D", [64, 96])
def test_softmax_attention_with_rotary_embeddings(D, how, dtype, monkeypatch):
    torch.manual_seed(0)
    config = HLAConfig(hidden_size=512, num_attention_heads=6, num_key_value_heads=2, head_dim=D)
    attention = HLAAttention(config, 0).cuda().to(dtype)
    B, T = (1, 900) if how == "packed" else (2, 450)
    x, dy = (torch.randn(B, T, 512, device="cuda").to(dtype) for _ in range(2))
    mask = torch.ones(B, T, device="cuda", dtype=torch.bool)
    mask[0, 300:] = False
    positions = mask.long().cumsum(1) - 1 if how == "masked" else torch.arange(T, device="cuda")[None]
    ends = torch.tensor([0, 2, 2, 500, 900], dtype=torch.int32, device="cuda")
    given = mask if how == "masked" else None, ends if how == "packed" else None, None
    launches = []
    monkeypatch.setattr(rotary, "launch", lambda *a, f=rotary.launch, **k: (launches.append(a[0]), f(*a, **k)))

    def results(attention: HLAAttention, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = attention(x, rope_cos_sin(positions, D, 10_000.0, x.dtype), *given)
        return [y, *torch.autograd.grad(y, [x, *attention.parameters()], dy.to(y.dtype))]

    truth = results(copy.deepcopy(attention).double(), x.double())
    assert launches == []
    found = results(attention, x)
    assert len(launches) == 2
    monkeypatch.setattr(HLAAttention, "_has_kernels", lambda *_: False)
    assert_no_worse(found, results(attention, x), truth, dtype)
